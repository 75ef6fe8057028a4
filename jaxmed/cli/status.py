"""`jaxmed status`: how far a launched run, or a study, is."""

import argparse
import pathlib
from typing import Any

from jaxmed.errors import UserError

DOES = 'show the state of a launched run, or the grid of a study'
EXAMPLE = 'jaxmed status run'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='RUN|STUDY', help='run directory of the launch, or folder of a study')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """What the system says of what was launched, and how far the run or the cells are."""
  if (pathlib.Path(args.path) / 'plan.json').exists():
    return _study(args.path)
  from jaxmed.launch import control
  out = control.status(args.path)
  return {'json': out, 'text': f'{out["state"]}\n{out["progress"]}\nlog: {out["log"]}'}


def _study(path: str) -> dict[str, Any]:
  """The grid of a study: state, step and loss of each cell; of one that a queue runs, what that says too."""
  from jaxmed.launch import control
  from jaxmed.study import table
  found = table.status(path)
  text = table.grid_text(found)
  try:
    launched = control.status(path)
  except UserError:  # a study of local processes
    return {'json': found, 'text': text}
  more = {k: launched[k] for k in ('launcher', 'job', 'alive', 'state', 'log')}
  return {'json': found | more, 'text': f'{text}\n{more["state"]}\nlog: {more["log"]}'}
