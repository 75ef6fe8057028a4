"""What layouts of images with texts share: columns of a table, files by name, lists in cells, items with captions.

A record has the column `text`, the one that is trained on. Where it has several, `text` is the first and the column
`captions` holds all of them as a JSON list.
"""

import ast
import csv
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.readers import Parts
from jaxmed.errors import UserError
from jaxmed.files import name_of, text_of

TYPES = {'text': pa.string(), 'captions': pa.string()}
SPLITS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validate': 'val', 'validation': 'val',
          'dev': 'val', 'test': 'test', 'testing': 'test'}


def columns(path: pathlib.Path) -> tuple[str, ...]:
  """Names in the first line of a CSV file, maybe .gz; () where it cannot be read."""
  try:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as f:
      line = f.readline(1 << 16).decode('utf-8-sig', 'replace')
  except (OSError, EOFError, zlib.error):
    return ()
  return tuple(next(csv.reader([line]), ()))


def split_of(word: str | None) -> str | None:
  """The split that a word of a table means, None for any other."""
  return SPLITS.get((word or '').strip().lower())


def listed(cell: str | None) -> list[str]:
  """The texts of a cell: of a list as Python or JSON writes it, else the cell alone; blank ones left out."""
  cell = (cell or '').strip()
  if cell[:1] == '[' and cell[-1:] == ']':
    try:
      found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      found = None
    if isinstance(found, list) and all(isinstance(t, str) for t in found):
      return [t.strip() for t in found if t.strip()]
  return [cell] if cell else []


def texts(some: Sequence[str]) -> dict[str, str | None]:
  """The columns `text` and `captions` of the texts of a record."""
  some = list(dict.fromkeys(some))
  return {'text': some[0] if some else None,
          'captions': json.dumps(some, ensure_ascii=False) if len(some) > 1 else None}


def sections(findings: str | None, impression: str | None) -> dict[str, str | None]:
  """The columns of a report; its text begins with the impression, so that a text that is cut keeps that."""
  parts = [one_line(t) for t in (findings, impression)]
  whole = ' '.join(t for t in (parts[1], parts[0]) if t)
  return {'findings': parts[0] or None, 'impression': parts[1] or None, 'text': whole or None}


def one_line(text: str | None) -> str:
  """A text with single spaces in place of all white space."""
  return re.sub(r'\s+', ' ', text or '').strip()


def find(root: pathlib.Path, name: str, folders: Sequence[str] = ('',)) -> pathlib.Path | None:
  """The file of a name below the root or one of its folders, never outside; None where there is none."""
  parts = [p for p in name_of(name).replace('\\', '/').split('/') if p not in ('', '.')]
  if not parts or '..' in parts:
    return None
  places = (root / folder / pathlib.Path(*parts) for folder in folders)
  return next((place for place in places if place.is_file()), None)


class Listing:
  """A plan that grows by images with texts.

  Attributes:
    plan: it.
    root: the folder.
    source: the name of the data set.
  """

  def __init__(self, root: pathlib.Path, source: str, **types: pa.DataType):
    self.plan, self.root, self.source = Plan([], types=TYPES | types), root, source
    self._seen: set[str] = set()

  def add(self, file: pathlib.Path, told: Mapping[str, Any], *, subject: str = '', split: str | None = None,
          parts: Parts | None = None) -> None:
    """Adds an item with columns `told`, its own subject by default; a file that is there already is a reject."""
    rel = text_of(file.relative_to(self.root).as_posix())
    if rel in self._seen:
      self.reject(rel, 'is listed twice')
      return
    self._seen.add(rel)
    signal = file if 'signal' in told else None
    self.plan.items.append(Item(file, rel, rel, self.source, subject=subject or rel, split=split, signal=signal,
                                parts=parts, extra=dict.fromkeys(self.plan.types) | dict(told)))

  def reject(self, name: str, reason: str) -> None:
    """Adds a file that cannot be read."""
    self.plan.rejects.append((text_of(name), reason))

  def lost(self, name: str, table: pathlib.Path) -> None:
    """Rejects an image that a table names and that is not there, or a row that names none."""
    self.reject(name or table.name, f'{table.name} names it, but no such file exists' if name else
                'has a row without an image')


def lines_of(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
  """(number, object) of each line of a JSONL file, or of each element of a JSON list; None for what is no object.

  Raises:
    UserError: the file cannot be read, or is JSON of something else.
  """
  try:
    whole = path.read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'cannot read {path}: {e}') from e
  if whole.lstrip()[:1] == '[':
    try:
      found = json.loads(whole)
    except ValueError as e:
      raise UserError(f'cannot read {path} as JSON: {e}') from e
    yield from ((i + 1, row if isinstance(row, dict) else None) for i, row in enumerate(found))
    return
  for i, line in enumerate(whole.splitlines()):
    if line.strip():
      try:
        row = json.loads(line)
      except ValueError:
        row = None
      yield i + 1, row if isinstance(row, dict) else None
