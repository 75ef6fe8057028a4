"""`jaxmed stop`: the end of a launched run."""

import argparse
from typing import Any

DOES = 'let a launched run save and end'
EXAMPLE = 'jaxmed stop run'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='RUN', help='run directory of the launch')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Lets what was launched save and end."""
  from jaxmed.launch import control
  out = control.stop(args.path)
  return {'json': out, 'text': out['stopped']}
