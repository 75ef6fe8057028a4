"""A corpus as a sequence of records, with its manifest."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.data import store
from jaxmed.data.corpus import COLUMNS, MANIFEST, SPLITS, decode, is_corpus, shard_name
from jaxmed.errors import UserError, choose


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Records in the order of `table`, read when they are asked for. Threads may share it; it can be pickled.

  Attributes:
    path: the corpus.
    table: one row a record (see jaxmed.data.corpus for the columns).
    stats: {channel: count, mean, std, low, high, split} of the corpus.
    readers: {split: TFDS data source}.
    bricks: {split: files of the pixels of its large volumes}.
    shards: {split: records up to the end of each shard}.
  """

  path: pathlib.Path
  table: pa.Table = dataclasses.field(repr=False)
  stats: dict[str, dict[str, Any]] = dataclasses.field(repr=False)
  readers: dict[str, Any] = dataclasses.field(repr=False)
  bricks: dict[str, store.Files] = dataclasses.field(repr=False, default_factory=dict)
  shards: dict[str, np.ndarray] = dataclasses.field(repr=False, default_factory=dict)

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

  def window(self, i: int, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """The part [*size, C] of the image of row i that begins at `start`; shorter where the image ends.

    Of a volume that lies in bricks (see jaxmed.data.store) only the bricks that the part touches are read.

    Raises:
      ValueError: start or size has not one number >= 0 for each axis.
    """
    i = self._row(i)
    grid = self.table['shape'][i].as_py()[:-1]
    if not len(grid) == len(start) == len(size) or min(*start, *size) < 0:
      raise ValueError(f'window {tuple(start)} + {tuple(size)} does not fit an image of axes {tuple(grid)}')
    at = tuple(slice(min(int(a), n), min(int(a) + int(s), n)) for a, s, n in zip(start, size, grid))
    split, place = SPLITS[self._split[i]], int(self._place[i])
    return self._guarded(split, lambda: [self._pixels(split, place, decode(self.readers[split][place]), at)])[0]

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

    def found() -> list[dict[str, Any]]:
      # One at a time is the faster call for one; it starts no threads.
      examples = [reader[places[0]]] if len(places) == 1 else reader.__getitems__(places)
      return [self._whole(split, place, decode(e)) for place, e in zip(places, examples)]

    return self._guarded(split, found)

  def _guarded(self, split: str, read: Callable[[], list]) -> list:
    try:
      return read()
    except (RuntimeError, ValueError, KeyError, IndexError) as e:
      raise UserError(f'{self.path} has a damaged shard of split {split}: {e}; prepare it again') from e

  def _whole(self, split: str, place: int, record: dict[str, Any]) -> dict[str, Any]:
    if isinstance(record['image'], np.ndarray):
      return record
    at = tuple(slice(0, n) for n in record['shape'][:-1])
    image = self._pixels(split, place, record, at)
    image.flags.writeable = False
    return {k: v for k, v in record.items() if k not in ('shape', 'dtype')} | {'image': image}

  def _pixels(self, split: str, place: int, record: dict[str, Any], at: store.Slices) -> np.ndarray:
    if isinstance(record['image'], np.ndarray):
      return record['image'][at]
    shard = int(np.searchsorted(self.shards[split], place, side='right'))
    read = functools.partial(self.bricks[split].read, shard)
    first, edge = record['image']
    return store.window(read, record['shape'], record['dtype'], first, edge, at)


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
  shards, lengths = _open_shards(path, table)
  bricks = {split: store.Files([str(path / shard_name(f'{split}-bricks', i, len(ends))) for i in range(len(ends))])
            for split, ends in lengths.items()}
  return Source(path, table.combine_chunks(), stats, shards, bricks, lengths)


def _open_shards(path: pathlib.Path, table: pa.Table) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """{split: TFDS data source} and {split: records up to the end of each shard}."""
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
  lengths = {name: np.cumsum(info.shard_lengths) for name, info in builder.info.splits.items()}
  return {name: builder.as_data_source(split=name) for name in counts}, lengths


def _as_text(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
  try:
    return column.cast(pa.string())
  except pa.ArrowException as e:
    raise UserError(f'column {name!r} holds {column.type}, which cannot be a label') from e
