"""A corpus as a sequence of records, with its manifest."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.data.corpus import COLUMNS, MANIFEST, SPLITS, decode, is_corpus
from jaxmed.errors import UserError, choose


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Records in the order of `table`, read when they are asked for. Threads may share it; it can be pickled.

  Attributes:
    path: the corpus.
    table: one row a record (see jaxmed.data.corpus for the columns).
    stats: {channel: count, mean, std, low, high, split} of the corpus.
    readers: {split: TFDS data source}.
  """

  path: pathlib.Path
  table: pa.Table = dataclasses.field(repr=False)
  stats: dict[str, dict[str, Any]] = dataclasses.field(repr=False)
  readers: dict[str, Any] = dataclasses.field(repr=False)

  def __len__(self) -> int:
    return self.table.num_rows

  def __getitem__(self, i: int) -> dict[str, Any]:
    """The record of row i: image (a read-only array), channels, spacing, id, subject, source."""
    return self.__getitems__([i])[0]

  def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The records of several rows, in one call a split to the shards."""
    rows = [self._row(i) for i in rows]
    out: list[dict[str, Any]] = [{}] * len(rows)
    for code in set(self._split[rows].tolist()):
      places = [k for k, i in enumerate(rows) if self._split[i] == code]
      for k, example in zip(places, self._read(SPLITS[code], [int(self._place[rows[k]]) for k in places])):
        out[k] = example
    return out

  def select(self, split: str | None = None, label: str | None = None, sources: Sequence[str] = ()) -> 'Source':
    """The rows of a split, with `label` only those where that column says something, with `sources` only theirs.

    Raises:
      UserError: an unknown split, column or source; the nearest one is named.
    """
    keep = pa.chunked_array([pa.array(np.ones(len(self), bool))])
    if split is not None:
      choose('split', split, SPLITS)
      keep = pc.and_(keep, pc.equal(self.table['split'], split))
    if label is not None:
      keep = pc.and_(keep, pc.is_valid(self.column(label)))
    if sources:
      for name in sources:
        choose(f'source of {self.path}', name, pc.unique(self.table['source']).to_pylist())
      keep = pc.and_(keep, pc.is_in(self.table['source'], value_set=pa.array(sources, pa.string())))
    return dataclasses.replace(self, table=self.table.filter(keep))

  def column(self, name: str) -> pa.ChunkedArray:
    """A column of the manifest; a UserError names the nearest one to an unknown name."""
    choose(f'column of {self.path}', name, self.table.column_names)
    return self.table[name]

  def classes(self, label: str) -> tuple[str, ...]:
    """The values of a column as sorted text, nulls left out."""
    values = pc.unique(_as_text(self.column(label), label)).to_pylist()
    return tuple(sorted(v for v in values if v is not None))

  def codes(self, label: str, classes: Sequence[str]) -> np.ndarray:
    """int32 [N]: the position of each row's value among `classes`, -1 where it has none.

    Raises:
      UserError: an unknown column, or a value that is none of `classes`.
    """
    text = _as_text(self.column(label), label)
    codes = pc.index_in(text, value_set=pa.array(list(classes), pa.string()))
    lost = pc.and_(pc.is_valid(text), pc.is_null(codes))
    if pc.any(lost).as_py():
      choose(f'value of column {label!r} in {self.path}', text.filter(lost)[0].as_py(), classes)
    return pc.fill_null(codes, -1).to_numpy().astype(np.int32)

  @functools.cached_property
  def channels(self) -> tuple[str, ...]:
    """The names of all channels of these rows, in order of first appearance."""
    return tuple(pc.unique(pc.list_flatten(self.table['channels'])).to_pylist())

  @functools.cached_property
  def _split(self) -> np.ndarray:
    return pc.index_in(self.table['split'], value_set=pa.array(SPLITS)).to_numpy().astype(np.int8)

  @functools.cached_property
  def _place(self) -> np.ndarray:
    return self.table['row'].to_numpy()

  def _row(self, i: int) -> int:
    i = i.__index__()
    if not -len(self) <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    return i % len(self)

  def _read(self, split: str, places: list[int]) -> list[dict[str, Any]]:
    reader = self.readers[split]
    try:
      # One at a time is the faster call for one; it starts no threads.
      found = [reader[places[0]]] if len(places) == 1 else reader.__getitems__(places)
      return [decode(example) for example in found]
    except (RuntimeError, ValueError, KeyError, IndexError) as e:
      raise UserError(f'{self.path} has a damaged shard of split {split}: {e}; prepare it again') from e


def open_source(uri: str | os.PathLike) -> Source:
  """Opens a corpus that `prepare` wrote. Records are all its rows, in the manifest's order.

  Raises:
    UserError: the folder is missing, no corpus, or damaged.
  """
  path = pathlib.Path(uri)
  if not path.exists():
    raise UserError(f'{path} does not exist: expected a corpus (a folder that `jaxmed prepare` writes)')
  if not is_corpus(path):
    raise UserError(f'{path} is no corpus: it has no {MANIFEST}; make one with `jaxmed prepare`')
  try:
    table = pq.read_table(path / MANIFEST)
  except (pa.ArrowException, OSError) as e:
    raise UserError(f'{path / MANIFEST} is damaged: {e}; prepare it again') from e
  lost = [c for c in COLUMNS.names if c not in table.column_names]
  if lost:
    raise UserError(f'{path / MANIFEST} has no column {lost[0]!r}: prepare it again')
  stats = files.read_json(path / 'stats.json')
  return Source(path, table.combine_chunks(), stats, _open_shards(path, table))


def _open_shards(path: pathlib.Path, table: pa.Table) -> dict[str, Any]:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(path)
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    lost = [f for info in builder.info.splits.values() for f in info.filepaths if not os.path.isfile(f)]
  except Exception as e:  # TFDS raises its own kinds for missing or damaged metadata
    raise UserError(f'{path} has damaged metadata: {" ".join(str(e).split())}; prepare it again') from e
  if lost:
    raise UserError(f'{path} lacks the shard {os.path.basename(lost[0])}: prepare it again')
  wanted = {d['values']: d['counts'] for d in pc.value_counts(table['split']).to_pylist()}
  if counts != wanted:
    raise UserError(f'{path} is damaged: the manifest has {wanted} records, the shards {counts}; '
                    'prepare it again')
  return {name: builder.as_data_source(split=name) for name in counts}


def _as_text(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
  try:
    return column.cast(pa.string())
  except pa.ArrowException as e:
    raise UserError(f'column {name!r} holds {column.type}, which cannot be a label') from e
