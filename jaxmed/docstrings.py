"""Meanings of options, read from the `Attributes:` of a class's docstring."""

import dataclasses
import fnmatch
import inspect
import re
from typing import Any


def meanings(cls: Any) -> dict[str, str]:
  """What the docstrings of a dataclass and its bases say of each field, '' where they say nothing.

  An entry begins with names of fields and a colon, at the start of a line or after a sentence, such as
  'scale, ratio: of crops.'; 'mask_*' is each field of that form.
  """
  names = [f.name for f in dataclasses.fields(cls)]
  out = dict.fromkeys(names, '')
  for base in cls.__mro__:  # the nearest class wins
    doc = base.__dict__.get('__doc__')
    for name, text in _entries(inspect.cleandoc(doc) if doc else '', names).items():
      out[name] = out[name] or text
  return out


def _entries(doc: str, names: list[str]) -> dict[str, str]:
  """{name: text} of the section `Attributes:`."""
  found = re.search(r'^Attributes:\n((?:[ ]+.*\n?|\n)*)', doc, re.MULTILINE)
  if not found:
    return {}
  field = '(?:' + '|'.join(sorted(map(re.escape, names), key=len, reverse=True)) + r'|\w+_\*)'
  head = re.compile(rf'(?:^|(?<=[.;] ))({field}(?:(?:, | and ){field})*): ')
  text = ' '.join(found[1].split())
  heads = list(head.finditer(text))
  out: dict[str, str] = {}
  for this, after in zip(heads, [*heads[1:], None]):
    body = text[this.end():after.start() if after else len(text)].strip().rstrip('.')
    for name in re.split(r', | and ', this[1]):
      for each in fnmatch.filter(names, name):
        out.setdefault(each, body)
  return out | _mentioned(out, [name for name in names if name not in out])


def _mentioned(entries: dict[str, str], missing: list[str]) -> dict[str, str]:
  """Names that have no entry and stand in the text of another: a pointer to it."""
  places = {name: [other for other, text in entries.items() if f'`{name}`' in text] for name in missing}
  return {name: f'see {found[0]}' for name, found in places.items() if found}


def summary(cls: Any) -> str:
  """The docstring of a class without its sections."""
  return re.split(r'\n(?:Attributes|Args|Raises|Returns):', inspect.getdoc(cls) or '')[0].strip()
