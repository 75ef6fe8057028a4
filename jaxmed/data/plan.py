"""What `prepare` will read, and all that can be known, and refused, before a pixel is read."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from jaxmed.data import readers
from jaxmed.data.corpus import COLUMNS, SPLITS
from jaxmed.errors import UserError, choose

_SPLIT_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
                  'test': 'test', 'testing': 'test'}
_TABLE_COLUMNS = ('path', 'subject', 'split', 'source')
_NULLS = ['', 'NA', 'NaN', 'nan', 'null']


@dataclasses.dataclass(frozen=True)
class Item:
  """A file to read and what is known of it before it is read.

  Attributes:
    file: where it lies.
    rel: its name in the corpus (manifest column `path`), unique.
    inner: its path below its input.
    source: the name of the input folder, or what the table says.
    subject: None leaves it to the reader.
    split: the split that a table or a folder gives, or None.
    extra: values of the manifest's other columns.
  """

  file: pathlib.Path
  rel: str
  inner: str
  source: str
  subject: str | None = None
  split: str | None = None
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Plan:
  """Files to read, in order.

  Attributes:
    items: the files.
    ignored: number of files found whose suffix no reader knows.
    not_in_table: number of readable files found that the table does not list.
    types: the manifest's other columns.
    rejects: (path, reason) of files that are already known to be bad.
  """

  items: list[Item]
  ignored: int = 0
  not_in_table: int = 0
  types: dict[str, pa.DataType] = dataclasses.field(default_factory=dict)
  rejects: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def make_plan(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, table: str | os.PathLike | None = None,
    labels_from_folders: bool = False, subject_pattern: str | None = None,
) -> Plan:
  """Lists the files to read, with subjects, given splits and columns. See `prepare` for the arguments.

  Raises:
    UserError: nothing to read, a damaged table, contradictory splits or labels.
  """
  found, ignored = _walk(inputs, pathlib.Path(os.path.abspath(out)))
  pattern = _compile(subject_pattern)
  if table is not None:
    plan = _from_table(pathlib.Path(table), found, inputs)
  elif found:
    plan = Plan(_folder_splits(found))
  else:
    raise UserError(f'no readable file in {_joined(inputs)} ({ignored} of other kinds): '
                    f'expected {", ".join(readers.SUFFIXES)}')
  plan.ignored = ignored
  if labels_from_folders:
    if 'label' in plan.types:
      raise UserError(f"{table} has a column 'label': drop it, or do not take labels from folders")
    plan.items = [dataclasses.replace(i, extra=i.extra | {'label': _folder_label(i)}) for i in plan.items]
    plan.types['label'] = pa.string()
  plan.items = [i if i.subject else dataclasses.replace(i, subject=_subject(i, pattern)) for i in plan.items]
  return plan


def given_splits(items: Iterable[Item]) -> dict[str, str]:
  """{subject: split} where a table or folders give one.

  Raises:
    UserError: a subject that has two.
  """
  seen: dict[str, tuple[str, str]] = {}
  for item in items:
    if item.split and item.subject:
      one_split(seen, item.subject, item.split, item.rel)
  return {subject: split for subject, (split, _) in seen.items()}


def one_split(seen: dict[str, tuple[str, str]], subject: str, split: str, rel: str) -> None:
  """Notes the split of a subject; a UserError names a subject that has another one already."""
  first, where = seen.setdefault(subject, (split, rel))
  if first != split:
    raise UserError(f'subject {subject!r} is in two splits: {first} ({where}) and {split} ({rel})')


def _walk(inputs, out: pathlib.Path) -> tuple[list[Item], int]:
  """Every file with a known suffix, sorted within each input, and the number of others."""
  if not inputs:
    raise UserError('no input: expected folders or files')
  names = _unique([pathlib.Path(os.path.abspath(i)).name for i in inputs])
  found: list[Item] = []
  ignored = 0
  for root, name in zip((pathlib.Path(i) for i in inputs), names):
    if not root.exists():
      raise UserError(f'{root} does not exist')
    if root.is_file():
      if readers.suffix(root) is None:
        raise UserError(f'{root} has no known suffix: expected {", ".join(readers.SUFFIXES)}')
      found.append(Item(root, name, root.name, pathlib.Path(os.path.abspath(root)).parent.name))
      continue
    before = len(found) + ignored
    for file in _files(root, out):
      inner = file.relative_to(root).as_posix()
      if readers.suffix(file) is None:
        ignored += 1
      else:
        found.append(Item(file, f'{name}/{inner}' if len(names) > 1 else inner, inner, name))
    if len(found) + ignored == before:
      raise UserError(f'{root} is empty: expected images in it')
  return found, ignored


def _files(root: pathlib.Path, out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Files under a folder, sorted; hidden ones and the corpus itself (when it lies inside) are left out."""
  for folder, dirs, names in os.walk(root, onerror=_unlisted, followlinks=True):
    kept = (d for d in sorted(dirs) if not d.startswith('.'))
    dirs[:] = [d for d in kept if os.path.abspath(os.path.join(folder, d)) not in (str(out), f'{out}.part')]
    yield from (pathlib.Path(folder, n) for n in sorted(names) if not n.startswith('.'))


def _unlisted(error: OSError) -> None:
  raise UserError(f'cannot list {error.filename}: {error.strerror}')


def _from_table(path: pathlib.Path, found: list[Item], inputs) -> Plan:
  rows = _read_table(path)
  types = {f.name: f.type for f in rows.schema if f.name not in _TABLE_COLUMNS}
  by_file = {os.path.realpath(i.file): i for i in found}
  roots = [pathlib.Path(i) for i in inputs if os.path.isdir(i)] + [path.parent]
  plan = Plan([], types=types)
  seen: dict[str, str] = {}
  for row in rows.to_pylist():
    name = row['path']
    if not name:
      raise UserError(f'{path}: a row has no path')
    file = next((f for f in (root / name for root in roots) if f.is_file()), None)
    if file is None:
      plan.rejects.append((name, 'the table names it, but no such file exists'))
      continue
    real = os.path.realpath(file)
    if real in seen:
      raise UserError(f'{path} lists {name} twice')
    seen[real] = name
    item = by_file.get(real, Item(file, name, name, path.resolve().parent.name))
    split = row.get('split')
    if split is not None:
      choose(f'split of {name} in {path}', split, SPLITS)
    plan.items.append(dataclasses.replace(
      item, subject=row.get('subject'), split=split, source=row.get('source') or item.source,
      extra={k: row[k] for k in types}))
  if not plan.items:
    raise UserError(f'{path} names no file that exists in {_joined(inputs)}')
  plan.not_in_table = sum(real not in seen for real in by_file)
  return plan


def _read_table(path: pathlib.Path) -> pa.Table:
  if not path.is_file():
    raise UserError(f'{path} does not exist: expected a CSV or Parquet table')
  try:
    if path.suffix.lower() in ('.parquet', '.pq'):
      rows = pq.read_table(path)
    else:
      text = pacsv.ConvertOptions(column_types={c: pa.string() for c in _TABLE_COLUMNS},
                                  strings_can_be_null=True, null_values=_NULLS)
      rows = pacsv.read_csv(path, convert_options=text)
  except (pa.ArrowException, OSError) as e:
    raise UserError(f'cannot read {path} as a table: {one_line(e)}') from e
  names = [n for n in _TABLE_COLUMNS if n in rows.column_names]
  choose(f'column (needed in {path})', 'path', rows.column_names)
  clash = sorted((set(rows.column_names) & set(COLUMNS.names)) - set(_TABLE_COLUMNS))
  if clash:
    raise UserError(f'{path} has a column {clash[0]!r}, which the manifest keeps for itself: rename it')
  for n in names:
    rows = rows.set_column(rows.column_names.index(n), n, rows[n].cast(pa.string()))
  return rows


def _folder_splits(items: list[Item]) -> list[Item]:
  """Takes the split from the first folder under the input, if that is train, val or test for every file."""
  split = [_SPLIT_FOLDERS.get(_first_folder(i).lower()) for i in items]
  if not any(split):
    return items
  if not all(split):
    outside = items[split.index(None)].rel
    raise UserError(f'some files lie in folders train, val or test, but {outside} does not: '
                    'move it, or give splits in a table')
  return [dataclasses.replace(i, split=s) for i, s in zip(items, split)]


def _first_folder(item: Item) -> str:
  parts = pathlib.PurePosixPath(item.inner).parts
  return parts[0] if len(parts) > 1 else ''


def _folder_label(item: Item) -> str:
  label = pathlib.PurePosixPath(item.inner).parent.name
  if not label or (label.lower() in _SPLIT_FOLDERS and item.split):
    raise UserError(f'{item.rel} lies in no folder that could be its label: expected LABEL/{item.file.name}')
  return label


def _compile(pattern: str | None) -> re.Pattern | None:
  if pattern is None:
    return None
  try:
    return re.compile(pattern)
  except re.error as e:
    raise UserError(f'subject_pattern {pattern!r} is no regular expression: {e}') from e


def _subject(item: Item, pattern: re.Pattern | None) -> str | None:
  if pattern is None:
    if readers.SUFFIXES.get(readers.suffix(item.file) or '') == 'nifti':
      return readers.stem(item.file)
    return item.rel[:len(item.rel) - len(readers.suffix(item.file) or '')]
  match = pattern.search(item.rel)
  if match is None:
    raise UserError(f'subject_pattern {pattern.pattern!r} matches nothing in {item.rel}')
  groups = match.groupdict()
  return groups['subject'] if 'subject' in groups else match.group(1 if pattern.groups else 0)


def _joined(inputs) -> str:
  return ', '.join(str(i) for i in inputs)


def _unique(names: list[str]) -> list[str]:
  out: list[str] = []
  for name in names:
    candidate, n = name, 2
    while candidate in out:
      candidate, n = f'{name}-{n}', n + 1
    out.append(candidate)
  return out


def one_line(error: BaseException) -> str:
  """An error as one line, with its kind unless it is a plain ValueError."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if isinstance(error, ValueError) else f'{type(error).__name__}: {text}'
