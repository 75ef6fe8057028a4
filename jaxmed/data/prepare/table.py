"""The table that says which files to read, with subjects, splits, labels, texts, masks and signals."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from jaxmed.data import readers
from jaxmed.data.corpus.corpus_format import COLUMNS, SPLITS
from jaxmed.data.prepare.items import Item, Plan, joined, one_line
from jaxmed.errors import UserError, choose

_TABLE_COLUMNS = ('path', 'subject', 'split', 'source')
# Columns of the manifest, too, whose content goes into records.
_TYPES = {'text': pa.string(), 'mask': pa.string(), 'signal': pa.string(), 'signal_rate': pa.float64()}
_NULLS = ['', 'NA', 'NaN', 'nan', 'null']


def from_table(path: pathlib.Path, found: list[Item], inputs: Sequence[str | os.PathLike]) -> Plan:
  """A plan of what a table lists. A row's path is a file, an image that is a folder, or a folder of found files; so are
  those of its mask and signal, where it has them.

  Raises:
    UserError: a damaged table, one that lists nothing that exists, or something twice.
  """
  rows = _read_table(path)
  types = {f.name: f.type for f in rows.schema if f.name not in _TABLE_COLUMNS}
  by_file = {os.path.realpath(i.file): i for i in found}
  plan = Plan([], types=types)
  seen: set[str] = set()
  beside: set[str] = set()
  for row in rows.to_pylist():
    name = row['path']
    if not name:
      raise UserError(f'{path}: a row has no path')
    if row.get('split') is not None:
      choose(f'split of {name} in {path}', row['split'], SPLITS)
    place = _place(name, path, inputs)
    if place is None:
      plan.rejects.append((name, 'the table names it, but no such file exists'))
      continue
    others = {k: _place(row[k], path, inputs) for k in ('mask', 'signal') if row.get(k)}
    lost = [k for k, file in others.items() if file is None]
    if lost:
      plan.rejects.append((name, f'the table names the {lost[0]} {row[lost[0]]}, but no such file exists'))
      continue
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


def _place(name: str, path: pathlib.Path, inputs: Sequence[str | os.PathLike]) -> pathlib.Path | None:
  roots = [pathlib.Path(i) for i in inputs if os.path.isdir(i)] + [path.parent]
  return next((p for p in (root / name for root in roots) if p.exists()), None)


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
  return [(real, Item(place, name, name, path.resolve().parent.name))]


def _read_table(path: pathlib.Path) -> pa.Table:
  if not path.is_file():
    raise UserError(f'{path} does not exist: expected a CSV or Parquet table')
  try:
    if path.suffix.lower() in ('.parquet', '.pq'):
      rows = pq.read_table(path)
    else:
      text = pacsv.ConvertOptions(column_types=dict.fromkeys(_TABLE_COLUMNS, pa.string()) | _TYPES,
                                  strings_can_be_null=True, null_values=_NULLS)
      rows = pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True), convert_options=text)
  except (pa.ArrowException, OSError) as e:
    raise UserError(f'cannot read {path} as a table: {one_line(e)}') from e
  names = [n for n in _TABLE_COLUMNS if n in rows.column_names]
  choose(f'column (needed in {path})', 'path', rows.column_names)
  clash = sorted((set(rows.column_names) & set(COLUMNS.names)) - set(_TABLE_COLUMNS))
  if clash:
    raise UserError(f'{path} has a column {clash[0]!r}, which the manifest keeps for itself: rename it')
  wanted = dict.fromkeys(names, pa.string()) | {n: t for n, t in _TYPES.items() if n in rows.column_names}
  for n, kind in wanted.items():
    try:
      rows = rows.set_column(rows.column_names.index(n), n, rows[n].cast(kind))
    except pa.ArrowException as e:
      raise UserError(f'{path}: column {n!r} holds {rows[n].type}, expected {kind}') from e
  return rows
