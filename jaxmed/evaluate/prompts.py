"""Classes in words: names of classes, templates with a slot, and the texts that both make.

A file of prompts is JSON, either {class: name, [names] or {"yes": .., "no": ..}} or an object with `templates` (texts
with the slot {}), `negatives` (the same, of what a label is not) and `classes`; each may be missing. Lists that come
with the package lie in class_lists/, with their sources: {"source", "licence", "templates", "negatives", "lists":
{NAME: classes}}.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.errors import UserError, choose

SLOT = '{}'
PLAIN, NEGATIVE = ('{}',), ('no {}',)  # of a file that has none: the name alone; CheXzero's pair (zero_shot.py)
_SHIPPED = pathlib.Path(__file__).parent / 'class_lists'
_KEYS = ('source', 'licence', 'templates', 'negatives', 'classes')


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The texts of each class.

  Attributes:
    yes: {class: its texts}. no: the same of what the class is not.
    source: where they come from, '' for the user's.
    unused: classes of the file that the label does not have.
  """

  yes: dict[str, tuple[str, ...]]
  no: dict[str, tuple[str, ...]]
  source: str = ''
  unused: tuple[str, ...] = ()


def make(name: str, classes: Sequence[str], template: str = '') -> Prompts:
  """The prompts of the classes of a label.

  Args:
    name: of a list that comes with the package, or a JSON file; '' takes each class as its own name.
    classes: values of the label. Upper and lower case, spaces, '-' and '_' do not tell classes apart.
    template: with the slot {}, in the place of those of the list.
  Raises:
    UserError: an unknown list, a damaged file, a template without the slot, a class without a prompt.
  """
  told, where = _read(name) if name else ({}, 'the label')
  names: Mapping[str, Any] = told.get('classes') or {c: c for c in classes}
  if not isinstance(names, dict):
    raise UserError(f'{where}: classes are {names!r}: expected {{class: name or list of names}}')
  yes = (template,) if template else _texts(told.get('templates', PLAIN), 'templates', where)
  no = _texts(told.get('negatives', NEGATIVE), 'negatives', where)
  for text in (*yes, *no):
    if SLOT not in text:
      raise UserError(f'the template {text!r} of {"--option zero_shot.template" if text == template else where} has no '
                      f'slot {SLOT} for the name of the class')
  known = {_folded(k): k for k in names}
  lost = [c for c in classes if _folded(c) not in known]
  if lost:
    raise UserError(f'{where} has no prompt for the class {lost[0]!r}: it has {", ".join(map(str, names))}')
  found = {c: names[known[_folded(c)]] for c in classes}
  asked = {_folded(c) for c in classes}
  return Prompts({c: _filled(yes, v, 'yes', c, where) for c, v in found.items()},
                 {c: _filled(no, v, 'no', c, where) for c, v in found.items()},
                 str(told.get('source', '')), tuple(k for k in names if _folded(k) not in asked))


@functools.cache
def shipped() -> dict[str, dict[str, Any]]:
  """{name: {'source', 'licence', 'templates', 'classes', maybe 'negatives'}} of the lists of the package."""
  out: dict[str, dict[str, Any]] = {}
  for path in sorted(_SHIPPED.glob('*.json')):
    told = json.loads(path.read_text(encoding='utf-8'))
    lists = told.pop('lists')
    out |= {name: told | {'classes': classes} for name, classes in lists.items()}
  return out


def _read(name: str) -> tuple[dict[str, Any], str]:
  """What a list or a file says, and what errors call it."""
  if name in shipped():
    return shipped()[name], f'the list {name}'
  if not name.endswith('.json') and not os.path.exists(name):
    choose('list of prompts (or JSON file)', name, shipped())
  try:
    told = json.loads(pathlib.Path(name).read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise UserError(f'cannot read prompts from {name}: {e}') from e
  if not isinstance(told, dict) or not told:
    raise UserError(f'{name} holds no prompts: expected {{class: name or list of names}}, or templates and classes')
  if not set(told) & {'templates', 'classes', 'negatives'}:
    return {'classes': told}, name
  for key in told:
    choose(f'key of {name}', key, _KEYS)
  return told, name


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
  if isinstance(value, str):
    return (value,)
  if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v.strip() for v in value):
    raise UserError(f'{where}: {key} are {value!r}: expected a text, or a list of texts')
  return tuple(value)


def _filled(templates: Sequence[str], value: Any, side: str, name: str, where: str) -> tuple[str, ...]:
  """The texts of one class; those of {'yes': .., 'no': ..} are whole already."""
  if isinstance(value, dict):
    return _texts(value.get(side, ()), f'prompts {side!r} of class {name!r}', where)
  names = _texts(value, f'names of class {name!r}', where)
  return tuple(dict.fromkeys(t.replace(SLOT, n) for t in templates for n in names))


def _folded(name: str) -> str:
  """What classes are told apart by."""
  return ' '.join(re.sub(r'(?<=\w)[-_](?=\w)', ' ', str(name).lower()).split())
