"""`jaxmed status`: how far a launched run is."""

import argparse
from typing import Any

DOES = 'show the state of a launched run'
EXAMPLE = 'jaxmed status run'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='RUN', help='run directory of the launch')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """What the system says of what was launched, and how far the run is."""
  from jaxmed.launch import control
  out = control.status(args.path)
  return {'json': out, 'text': f'{out["state"]}\n{out["progress"]}\nlog: {out["log"]}'}
