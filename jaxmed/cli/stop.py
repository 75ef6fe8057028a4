"""`jaxmed stop`: the end of a launched run."""

import argparse
from typing import Any

DOES = 'let what was launched save and end'
EXAMPLE = 'jaxmed stop run'


def options(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='RUN', help='what --out was')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Lets what was launched save and end."""
  from jaxmed.launch import control
  out = control.stop(args.path)
  return {'json': out, 'text': out['stopped']}
