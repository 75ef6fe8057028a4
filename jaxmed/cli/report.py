"""`jaxmed report`: the report of a run."""

import argparse
from typing import Any

DOES = 'write report.html of a run again'
EXAMPLE = 'jaxmed report run'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='RUN', help='run directory')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Writes the report of a run again."""
  from jaxmed.evaluate.page import write_report
  from jaxmed.train.build import rundir
  rundir.load_config(args.path)
  path = write_report(args.path)
  return {'json': {'report': str(path)}, 'text': str(path)}
