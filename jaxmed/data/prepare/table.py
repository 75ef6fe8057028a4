"""The table that says which files to read, with subjects, splits, labels, texts, masks and signals."""

import dataclasses
import io
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.data import readers
from jaxmed.data.corpus import labels
from jaxmed.data.corpus.corpus_format import COLUMNS, SPLITS
from jaxmed.data.prepare.items import Item, Plan, joined, one_line
from jaxmed.data.prepare.spreadsheet import named, raw_bytes, read_text
from jaxmed.data.prepare.walk import kind_of
from jaxmed.errors import UserError, choose
from jaxmed.files import name_of, text_of

_TABLE_COLUMNS = ('path', 'subject', 'split', 'source')
# Columns of the manifest, too, whose content goes into records.
_TYPES = {'text': pa.string(), 'mask': pa.string(), 'signal': pa.string(), 'signal_rate': pa.float64()}
_TEXTS = dict.fromkeys(_TYPES, pa.string())  # a number of text is cast later, so that an error names its cell


def from_table(path: pathlib.Path, found: Plan, inputs: Sequence[str | os.PathLike]) -> Plan:
  """A plan of what a table lists. A row's path is a file, an image that is a folder, or a folder of files that were
  found; its mask and signal are files.

  Raises:
    UserError: a damaged table, one that lists nothing that exists, or something twice.
  """
  rows, encoding = _read_table(path)
  types = {f.name: f.type for f in rows.schema if f.name not in _TABLE_COLUMNS}
  by_file = {os.path.realpath(i.file): i for i in found.items}
  plan = Plan([], types=types, ignored=found.ignored + len(found.rejects), others=found.others)
  seen: set[str] = set()
  beside: set[str] = set()
  for row in rows.to_pylist():
    name = row['path']
    if not name:
      raise UserError(f'{path}: a row has no path')
    if row.get('split') is not None:
      choose(f'split of {name} in {path}', row['split'], SPLITS)
    others = {k: _place(row[k], encoding, path, inputs) for k in ('path', 'mask', 'signal') if row.get(k)}
    lost = [(k, file) for k, file in others.items() if file is None or kind_of(file)]
    if lost:
      what, file = lost[0]
      but = f'it is {kind_of(file)}' if file else 'no such file exists'
      plan.rejects.append((name, f'the table names {"it" if what == "path" else f"the {what} {row[what]}"}, but {but}'))
      continue
    place = others.pop('path')
    assert place is not None
    beside |= {os.path.realpath(file) for file in others.values() if file}
    for real, item in _meant(place, name, path, by_file):
      if real in seen:
        raise UserError(f'{path} lists {item.inner} twice')
      seen.add(real)
      plan.items.append(dataclasses.replace(
        item, subject=row.get('subject'), split=row.get('split'), source=row.get('source') or item.source,
        extra={k: row[k] for k in types}, mask=others.get('mask'), signal=others.get('signal')))
  if not plan.items:
    raise UserError(f'{path} names no file that exists in {joined(inputs)}')
  plan.not_in_table = sum(real not in seen and real not in beside for real in by_file)
  return plan


def _place(name: str, encoding: str, path: pathlib.Path, inputs: Sequence[str | os.PathLike]) -> pathlib.Path | None:
  """Where the file of a cell lies, below an input or the folder of the table.

  A name may be written as the manifest has it (see files.text_of), in the encoding of the table, or with letters and
  accents in one piece or in two.
  """
  roots = [pathlib.Path(i) for i in inputs if os.path.isdir(i)] + [path.parent]
  names = [name, name_of(name), *(unicodedata.normalize(form, name) for form in ('NFC', 'NFD'))]
  if encoding not in ('utf-8', 'utf-8-sig'):
    names.append(os.fsdecode(name.encode(encoding if encoding in ('cp1252', 'latin-1') else 'cp1252', 'replace')))
  return next((p for p in (root / name for name in dict.fromkeys(names) for root in roots) if p.exists()), None)


def _meant(place: pathlib.Path, name: str, path: pathlib.Path, by_file: dict[str, Item]) -> list[tuple[str, Item]]:
  """(real path, item) of each file that a row's path stands for."""
  real = os.path.realpath(place)
  if real in by_file:
    return [(real, by_file[real])]
  if place.is_dir() and not readers.is_folder_format(place):
    inside = [(r, i) for r, i in by_file.items() if r.startswith(real + os.sep)]
    if not inside:
      raise UserError(f'{path} names the folder {name}, which holds no readable file')
    return inside
  return [(real, Item(place, text_of(name), text_of(name), text_of(path.resolve().parent.name)))]


def _read_table(path: pathlib.Path) -> tuple[pa.Table, str]:
  """The rows of a table, and the encoding of its text."""
  data, encoding = raw_bytes(path), 'utf-8'
  try:
    if path.suffix.lower() in ('.parquet', '.pq') or data[:4] == b'PAR1':
      source = pq.ParquetFile(io.BytesIO(data))
      named(path, source.schema_arrow.names)
      rows = source.read()
    else:
      rows, encoding = read_text(path, data, 'path', dict.fromkeys(_TABLE_COLUMNS, pa.string()) | _TEXTS)
  except (pa.ArrowException, OSError) as e:
    raise UserError(f'cannot read {path} as a table: {one_line(e)}') from e
  names = [n for n in _TABLE_COLUMNS if n in rows.column_names]
  choose(f'column (needed in {path})', 'path', rows.column_names)
  kept = {*COLUMNS.names, *labels.COLUMNS}
  clash = sorted((set(rows.column_names) & kept) - set(_TABLE_COLUMNS))
  if clash:
    raise UserError(f'{path} has a column {clash[0]!r}, which the manifest keeps for itself: rename it')
  wanted = dict.fromkeys(names, pa.string()) | {n: t for n, t in _TYPES.items() if n in rows.column_names}
  for n, kind in wanted.items():
    try:
      rows = rows.set_column(rows.column_names.index(n), n, rows[n].cast(kind))
    except pa.ArrowException as e:
      if not pa.types.is_string(rows[n].type):
        raise UserError(f'{path}: column {n!r} holds {rows[n].type}, expected {kind}') from e
      cell = _odd_number(rows[n])
      raise UserError(f'cannot read {path} as a table: column {n!r} holds {cell!r}, expected a number'
                      f'{" with a point, not a comma" if "," in cell else ""}') from e
  return rows, encoding


def _odd_number(column: pa.ChunkedArray) -> str:
  """The first cell of a text column that is no number."""
  for cell in column.to_pylist():
    try:
      float(cell or 0)
    except ValueError:
      return cell
  return ''
