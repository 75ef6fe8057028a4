"""The manifest of a corpus as a table whose columns are read when they are asked for.

Of a corpus of ten million records that a run opens, identifiers, paths and hashes are nine tenths of the bytes and are
never looked at. Text that repeats is kept as codes of a dictionary.
"""

import contextlib
import functools
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed.errors import UserError

DATASET = 'dataset'  # column that says which of several corpora a record is of
# Columns of few values: read as codes, handed out as text.
_REPEATING = {'source': 'source', 'split': 'split', 'dtype': 'dtype', 'channels': 'channels.list.element'}
_NEEDED = ('split', 'channels', 'shape', 'dtype')  # by every pipeline: looked at in one pass
_BITS = 62
_EXACT = 32  # shorter text is not cut in statistics


class Manifest:
  """Rows of a Parquet file: answers the common queries of a pyarrow.Table lazily, and becomes one for the others.

  Threads may share it; it can be pickled.
  """

  def __init__(self, columns: Any, rows: np.ndarray | None = None):
    """`columns` are a `Columns` or a `Joint`; `rows` are those to show, None for all."""
    self._file = columns
    self._rows = rows
    self._own: dict[str, pa.ChunkedArray] = {}
    self._distinct: dict[str, tuple[np.ndarray, list]] = {}

  @property
  def schema(self) -> pa.Schema:
    """Names and types of the columns."""
    return self._file.schema

  @property
  def column_names(self) -> list[str]:
    """Of all columns, read or not."""
    return self._file.schema.names

  @property
  def num_rows(self) -> int:
    """Number of rows."""
    return self._file.rows if self._rows is None else len(self._rows)

  def __len__(self) -> int:
    return self.num_rows

  def column(self, name: str) -> pa.ChunkedArray:
    """A column, in one chunk."""
    if self._rows is None:
      return self._file.plain(name)
    if name not in self._own:
      self._own[name] = _take(self._file.plain(name), self._rows)
    return self._own[name]

  __getitem__ = column

  def distinct(self, name: str) -> tuple[np.ndarray, list]:
    """The values of a column in order of first appearance, and the place among them of each row, int32 [N].

    A list's values are lists. Null is a value too.
    """
    if name not in self._distinct:
      self._distinct[name] = self._file.distinct(name) if self._rows is None else self._among(name, self._rows)
    return self._distinct[name]

  def _among(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, list]:
    codes, values = self._file.distinct(name)
    if not len(rows):
      return np.zeros(0, np.int32), []
    taken = np.zeros(len(rows), np.int32) if len(values) == 1 else codes[rows]
    again, firsts = _coded_again(taken, len(values))
    return again, [values[code] for code in taken[firsts].tolist()]

  def filter(self, mask: Any) -> 'Manifest':
    """The rows where a mask of Booleans is true (null counts as false)."""
    if isinstance(mask, pc.Expression):
      return self.whole().filter(mask)
    mask = mask if isinstance(mask, (pa.Array, pa.ChunkedArray)) else pa.array(mask, pa.bool_())
    return self.take(np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
                                    if isinstance(mask, pa.Array) else pc.fill_null(mask, False).to_numpy()))

  def take(self, rows: Any) -> 'Manifest':
    """Some rows by their numbers."""
    rows = np.asarray(rows, np.int64)
    return Manifest(self._file, rows if self._rows is None else self._rows[rows])

  def slice(self, offset: int = 0, length: int | None = None) -> 'Manifest':
    """Rows from `offset` on."""
    end = self.num_rows if length is None else min(offset + length, self.num_rows)
    return self.take(np.arange(offset, max(end, offset)))

  def whole(self) -> pa.Table:
    """All columns of these rows."""
    return pa.table({name: self.column(name) for name in self.column_names}, schema=self.schema)

  def equals(self, other: Any) -> bool:
    """Whether another manifest or table has the same columns and rows."""
    return self.whole().equals(other.whole() if isinstance(other, Manifest) else other)

  def to_pylist(self) -> list[dict[str, Any]]:
    """All rows as dicts."""
    return self.whole().to_pylist()

  def __getattr__(self, name: str) -> Any:
    if name.startswith('_'):
      raise AttributeError(name)
    return getattr(self.whole(), name)

  def __getstate__(self) -> dict:
    return {'columns': self._file, 'rows': self._rows}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state['columns'], state['rows'])  # type: ignore[misc]


class Columns:
  """The columns of a Parquet file, each read once. A UserError names a file that is damaged."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._codes: dict[str, tuple[np.ndarray, list]] = {}
    with _guarded(path), pq.ParquetFile(path) as file:
      self.schema = pa.schema([(f.name, f.type) for f in file.schema_arrow])
      self.rows, self._groups = file.metadata.num_rows, file.metadata.num_row_groups
    self._lock = threading.Lock()
    self._read: dict[str, pa.ChunkedArray] = {}
    self._plain: dict[str, pa.ChunkedArray] = {}

  def column(self, name: str) -> pa.ChunkedArray:
    """A column in one chunk, text of few values as a dictionary."""
    with self._lock:
      if name not in self._read:
        with _guarded(self.path):
          coded = [_REPEATING[name]] if name in _REPEATING else None
          table = pq.read_table(self.path, columns=[name], read_dictionary=coded)
        self._read[name] = table.combine_chunks()[name]
      return self._read[name]

  def distinct(self, name: str) -> tuple[np.ndarray, list]:
    """See `Manifest.distinct`. Row group by row group: no column of lists is ever in memory whole."""
    with self._lock:
      if name not in self._codes:
        names = [n for n in _NEEDED if n in self.schema.names and n not in self._codes] if name in _NEEDED else [name]
        groups = range(self._groups)
        with _guarded(self.path), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
          parts = list(pool.map(functools.partial(self._group, names), groups))
        for k, n in enumerate(names):
          self._codes[n] = _merged([part[k] for part in parts])
      return self._codes[name]

  def _group(self, names: Sequence[str], group: int) -> list[tuple[np.ndarray, list]]:
    with pq.ParquetFile(self.path, read_dictionary=[_REPEATING[n] for n in names if n in _REPEATING]) as file:
      known = _constants(file.metadata.row_group(group), self.schema, names)
      table = file.read_row_group(group, columns=[n for n in names if n not in known], use_threads=False)
    return [known[n] if n in known else distinct(table[n]) for n in names]

  def plain(self, name: str) -> pa.ChunkedArray:
    """A column in its stored type, dictionaries decoded."""
    column = self.column(name)
    if column.type == self.schema.field(name).type:
      return column
    with self._lock:
      if name not in self._plain:
        self._plain[name] = column.cast(self.schema.field(name).type)
      return self._plain[name]

  def __getstate__(self) -> dict:
    return {'path': self.path}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state['path'])  # type: ignore[misc]


def _constants(group: pq.RowGroupMetaData, schema: pa.Schema, names: Sequence[str]
               ) -> dict[str, tuple[np.ndarray, list]]:
  """`distinct` of those columns of a row group that have one value, as its statistics tell without a look at the rows.

  Of columns of text and of lists of one text each: as many entries as rows, none of them null (as an empty list's is).
  """
  out, paths = {}, {_REPEATING.get(name, name): name for name in names}  # a name may have dots too
  for column in map(group.column, range(group.num_columns)):
    name = paths.get(column.path_in_schema)
    if name is None:
      continue
    told = column.statistics
    kind = pa.string() if name == column.path_in_schema else pa.list_(pa.string())
    if (told is not None and schema.field(name).type == kind and told.has_min_max and told.has_null_count
        and told.null_count == 0 and column.num_values == group.num_rows and told.min == told.max
        and len(told.min) < _EXACT):
      out[name] = np.zeros(group.num_rows, np.int32), [told.min if kind == pa.string() else [told.min]]
  return out


@contextlib.contextmanager
def _guarded(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (pa.ArrowException, OSError) as e:
    raise UserError(f'{path} is damaged: {" ".join(str(e).split())}; prepare it again') from e


class Joint:
  """The manifests of several corpora, one after the other, with a column `dataset` of their names.

  Identifiers and subjects have the name before them, 'NAME/SUBJECT': the same number is another patient elsewhere.
  A column that a corpus lacks is null there.
  """

  def __init__(self, parts: Sequence[Manifest], names: Sequence[str]):
    """Raises a UserError where a column has different types."""
    self._codes: dict[str, tuple[np.ndarray, list]] = {}
    self.parts, self.names = list(parts), list(names)
    fields: dict[str, pa.DataType] = {}
    for part, name in zip(parts, names):
      for field in part.schema:
        kept = fields.setdefault(field.name, field.type)
        if field.type != kept and pa.types.is_null(kept):
          fields[field.name] = field.type
        elif field.type not in (kept, pa.null()) and field.name != DATASET:
          raise UserError(f'column {field.name!r} of {name} holds {field.type}, that of another corpus {kept}: prepare '
                          'one of them again')
    self.schema = pa.schema([*((n, t) for n, t in fields.items() if n != DATASET), (DATASET, pa.string())])
    self.rows = sum(len(part) for part in parts)
    self._lock = threading.Lock()
    self._read: dict[str, pa.ChunkedArray] = {}

  def column(self, name: str) -> pa.ChunkedArray:
    """A column in one chunk."""
    with self._lock:
      if name not in self._read:
        chunks = [self._of(part, dataset, name) for part, dataset in zip(self.parts, self.names)]
        whole = pa.chunked_array([c for chunk in chunks for c in chunk.chunks], self.schema.field(name).type)
        self._read[name] = pa.table([whole], [name]).combine_chunks()[name]
      return self._read[name]

  plain = column

  def distinct(self, name: str) -> tuple[np.ndarray, list]:
    """See `Manifest.distinct`."""
    if name not in self._codes:
      self._codes[name] = distinct(self.column(name))
    return self._codes[name]

  def _of(self, part: Manifest, dataset: str, name: str) -> pa.ChunkedArray:
    kind = self.schema.field(name).type
    if name == DATASET:
      return pa.chunked_array([pa.repeat(pa.scalar(dataset, kind), len(part))])
    if name not in part.column_names:
      return pa.chunked_array([pa.nulls(len(part), kind)])
    column = part.column(name).cast(kind)
    return pc.binary_join_element_wise(dataset, column, '/') if name in ('id', 'subject') else column

  def __getstate__(self) -> dict:
    return {'parts': self.parts, 'names': self.names}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state['parts'], state['names'])  # type: ignore[misc]


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
  return column.take(pa.array(rows))


def distinct(column: pa.ChunkedArray) -> tuple[np.ndarray, list]:
  """See `Manifest.distinct`."""
  array = _whole(column)
  if not len(array):
    return np.zeros(0, np.int32), []
  if pa.types.is_list(array.type):
    codes, firsts = _coded_lists(array)
  elif pa.types.is_dictionary(array.type):
    codes, firsts = _coded_places(array)
  else:
    codes, firsts = _coded(array)
  return codes, array.take(pa.array(firsts)).to_pylist()


def _merged(parts: Sequence[tuple[np.ndarray, list]]) -> tuple[np.ndarray, list]:
  """The distinct values of pieces of a column, one after the other."""
  places: dict[Any, int] = {}
  codes: list[np.ndarray] = []
  values: list[Any] = []
  for own, found in parts:
    table = np.empty(len(found), np.int32)
    for k, value in enumerate(found):
      key = tuple(value) if isinstance(value, list) else 'NaN' if value != value else value
      if key not in places:
        places[key] = len(values)
        values.append(value)
      table[k] = places[key]
    codes.append(own if (table == np.arange(len(table))).all() else table[own])
  if len(values) == 1:
    return np.zeros(sum(map(len, codes)), np.int32), values  # takes no memory before it is looked at
  return np.concatenate(codes) if codes else np.zeros(0, np.int32), values


def _whole(column: pa.ChunkedArray) -> pa.Array:
  array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
  return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _coded(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
  """Codes int32 [N] in order of first appearance, and the first row of each."""
  encoded = pc.dictionary_encode(array, null_encoding='encode')
  codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
  # Values appear first in rising order of their codes: where a running maximum rises.
  return codes, np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))


def _coded_places(array: pa.DictionaryArray) -> tuple[np.ndarray, np.ndarray]:
  """The same of a dictionary's few values, without looking at them."""
  count = len(array.dictionary)
  places = array.indices if not array.null_count else pc.fill_null(array.indices, count)
  return _coded_again(places.to_numpy(zero_copy_only=False), count)


def _coded_again(raw: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The same of whole numbers from 0 to `count`."""
  if count > 64:
    return _coded(pa.array(raw))
  if (raw == raw[0]).all():
    return np.zeros(len(raw), np.int32), np.zeros(1, np.int64)
  used = np.flatnonzero(np.bincount(raw, minlength=count + 1))
  firsts = np.array([int(np.argmax(raw == place)) for place in used])
  codes = np.zeros(count + 1, np.int32)
  codes[used[np.argsort(firsts)]] = np.arange(len(used))
  return codes[raw], np.sort(firsts)


def _coded_lists(array: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
  """The same of lists."""
  offsets, lengths = array.offsets.to_numpy(), pc.list_value_length(array)
  values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
  span = pc.min_max(lengths).as_py()
  if array.null_count or values.null_count or not span['max']:
    return _coded(pa.array([None if v is None else repr(v) for v in array.to_pylist()]))
  if pa.types.is_dictionary(values.type):
    places = values.indices.to_numpy(zero_copy_only=False)
  elif pa.types.is_integer(values.type) and pc.min(values).as_py() >= 0:
    places = values.to_numpy(zero_copy_only=False)
  else:
    places = _coded(values)[0]
  if span['min'] == span['max']:
    table = places.reshape(len(array), span['max'])
    if (table == table[0]).all():
      return np.zeros(len(array), np.int32), np.zeros(1, np.int64)
  return _coded(pa.array(_list_keys(places, offsets - offsets[0])))


def _list_keys(places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
  """A number for each list of numbers >= 0, the same for equal ones alone: int64 [N]."""
  lengths, starts = np.diff(offsets), offsets[:-1]
  base = int(places.max()) + 2  # 0 stands for the end
  keys, most = np.zeros(len(lengths), np.int64), 1
  for place in range(int(lengths.max())):
    if most * base >= 1 << _BITS:
      keys = _coded(pa.array(keys))[0].astype(np.int64)
      most = int(keys.max()) + 1
    keys *= base
    has = lengths > place
    if has.all():
      keys += places[starts + place].astype(np.int64) + 1
    else:
      keys[has] += places[starts[has] + place].astype(np.int64) + 1
    most *= base
  return keys


def name_of(value: Any) -> str:
  """A value as text; of a list, as channels are, 'A+B'."""
  return 'null' if value is None else '+'.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

