"""`jaxmed demo-data`: sample files."""

import argparse
from typing import Any

DOES = 'write a few sample files'
EXAMPLE = 'jaxmed demo-data samples'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='FOLDER', help='folder for the files')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Writes sample files."""
  from jaxmed.data.prepare.demo import demo_files
  names = [str(p) for p in demo_files(args.path)]
  return {'json': {'files': names}, 'text': '\n'.join(names)}
