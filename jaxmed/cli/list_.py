"""`jaxmed list`: names that a config or a command can take."""

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

DOES = 'show methods, models, formats and recipes'
EXAMPLE = 'jaxmed list'


def options(p: argparse.ArgumentParser) -> None:
  del p


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Methods, models, formats, recipes."""
  del args
  from jaxmed import config, objectives
  from jaxmed.interop.weight_formats import FORMATS
  from jaxmed.models import list_models
  first = lambda text: (text or '').strip().split('\n')[0]
  recipes = {}
  for p in sorted(pathlib.Path('experiments').rglob('*.py')):
    variants = config.variants(str(p))
    recipes[str(p)] = first(_docstring(p)) + (f' [:{" :".join(variants)}]' if variants else '')
  out: dict[str, Any] = {
      'methods': {name: first(sys.modules[cls.__module__].__doc__) for name, cls in objectives.METHODS.items()},
      'models': list_models(), 'formats': {name: f.about for name, f in FORMATS.items()}, 'recipes': recipes}
  lines = []
  for title, entries in out.items():
    lines.append(f'{title}:')
    lines += [f'  {k:22} {v}' for k, v in entries.items()] if isinstance(entries, Mapping) else [
        '  ' + ', '.join(entries)]
  return {'json': out, 'text': '\n'.join(lines)}


def _docstring(path: pathlib.Path) -> str:
  import ast
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
