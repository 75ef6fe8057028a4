"""A corpus as a sequence of records, with its manifest."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed.data.corpus import manifest, store
from jaxmed.data.corpus import places as places_lib
from jaxmed.data.corpus.corpus_format import SPLITS, decode
from jaxmed.data.corpus.manifest import Manifest
from jaxmed.errors import UserError, choose

PIXELS = ('image', 'mask')  # what of a record may be large


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Records in the order of `table`, read when they are asked for. Threads may share it; it can be pickled.

  Attributes:
    path: the corpus.
    table: one row a record (see jaxmed.data.corpus.corpus_format for the columns), a pyarrow.Table or a Manifest.
    stats: {channel: count, mean, std, low, high, split} of the corpus.
    readers: {split: TFDS data source}. Of several corpora the keys are 'DATASET/SPLIT' here and below.
    bricks: {split: files of the pixels of its large volumes}.
    shards: {split: records up to the end of each shard}.
    datasets: names of several corpora, the values of the column `dataset`; () for one.
    labels: {corpus: {value of its masks: name}} of those that have labels.json.
    places: {split: files of the places of the classes of its masks}, {} where there are none.
  """

  path: pathlib.Path
  table: Any = dataclasses.field(repr=False)
  stats: dict[str, dict[str, Any]] = dataclasses.field(repr=False)
  readers: dict[str, Any] = dataclasses.field(repr=False)
  bricks: dict[str, store.Files] = dataclasses.field(repr=False, default_factory=dict)
  shards: dict[str, np.ndarray] = dataclasses.field(repr=False, default_factory=dict)
  datasets: tuple[str, ...] = ()
  labels: Mapping[str, Mapping[int, str]] = dataclasses.field(repr=False, default_factory=dict)
  places: dict[str, store.Files] = dataclasses.field(repr=False, default_factory=dict)

  def __len__(self) -> int:
    return self.table.num_rows

  def __getitem__(self, i: int) -> dict[str, Any]:
    """The record of row i: image (a read-only array), channels, spacing, id, subject, source."""
    return self.__getitems__([i])[0]

  def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The records of several rows, in one call a split to the shards."""
    rows = [self._row(i) for i in rows]
    out: list[dict[str, Any]] = [{}] * len(rows)
    for code in set(self._key[rows].tolist()):
      places = [k for k, i in enumerate(rows) if self._key[i] == code]
      for k, example in zip(places, self._read(self._keys[code], [int(self._place[rows[k]]) for k in places])):
        out[k] = example
    return out

  def record(self, i: int, wanted: Sequence[str] = PIXELS) -> dict[str, Any]:
    """The record of row i; of 'image' and 'mask' it reads the `wanted` alone."""
    i = self._row(i)
    return self._read(self._keys[self._key[i]], [int(self._place[i])], wanted)[0]

  def window(self, i: int, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """The part [*size, C] of the image of row i that begins at `start`, see `cut`."""
    return self.cut(i, start, size, ('image',))['image']

  def cut(self, i: int, start: Sequence[int], size: Sequence[int], wanted: Sequence[str] = PIXELS) -> dict[str, Any]:
    """The record of row i whose pixels begin at `start` and have the grid `size`; fewer where the image ends.

    Of a volume that lies in bricks (see jaxmed.data.corpus.store) only the bricks that the part touches are read.
    `wanted` is as for `record`.

    Raises:
      ValueError: start or size has not one number >= 0 for each axis.
    """
    i = self._row(i)
    grid = self.value('shape', i)[:-1]
    if not len(grid) == len(start) == len(size) or min(*start, *size) < 0:
      raise ValueError(f'window {tuple(start)} + {tuple(size)} does not fit an image of axes {tuple(grid)}')
    at = tuple(slice(min(int(a), n), min(int(a) + int(s), n)) for a, s, n in zip(start, size, grid))
    return self._read(self._keys[self._key[i]], [int(self._place[i])], wanted, at)[0]

  def opened(self, i: int, start: Sequence[int], size: Sequence[int]) -> tuple[list[int], list[int]]:
    """(start, grid) of all that is unpacked where `cut` reads a part of row i: bricks, or the whole image."""
    *grid, channels = self.value('shape', i)
    size_of = int(np.prod([*grid, channels])) * np.dtype(self.value('dtype', i)).itemsize
    edge = store.EDGE if len(grid) == 3 and size_of > store.CHUNK_BYTES else max(grid)
    low = [a // edge * edge for a in start]
    return low, [min(-(-(a + n) // edge) * edge, have) - b for a, n, b, have in zip(start, size, low, grid)]

  def places_of(self, i: int) -> dict[int, np.ndarray]:
    """{value of a class in the mask of row i: flat positions of some of its pixels, ascending [n]}; no pixels are read.

    {} where the row has no mask, or the corpus stores no places.
    """
    i = self._row(i)
    split, place = self._keys[self._key[i]], int(self._place[i])
    if split not in self.places:
      return {}
    shard = int(np.searchsorted(self.shards[split], place, side='right'))
    first = int(self.shards[split][shard - 1]) if shard else 0
    return self._guarded(split, lambda: [places_lib.parse(self.places[split].read(shard, [place - first])[0])])[0]

  def select(self, split: str | None = None, label: str | None = None, sources: Sequence[str] = ()) -> 'Source':
    """The rows of a split, with `label` only those where that column says something, with `sources` only theirs.

    Raises:
      UserError: an unknown split, column or source; the nearest one is named.
    """
    keep = np.ones(len(self), bool)
    if split is not None:
      keep &= self._among('split', (choose('split', split, SPLITS),))
    if label is not None:
      keep &= pc.is_valid(self.column(label)).to_numpy()
    if sources:
      self._known('source', sources, f'source of {self.path}')
      keep &= self._among('source', sources)
    return self.keep(keep)

  def where(self, values: Mapping[str, Sequence[str]], *, but: bool = False) -> 'Source':
    """The rows that have one of the values in each of the columns; with `but` those that have none in any.

    Raises:
      UserError: an unknown column or value; the nearest one is named.
    """
    hits = []
    for name, wanted in values.items():
      self._known(name, wanted, f'value of column {name!r} of {self.path}')
      hits.append(self._among(name, wanted))
    if not hits:
      return self
    return self.keep(~np.logical_or.reduce(hits) if but else np.logical_and.reduce(hits))

  def distinct(self, name: str) -> tuple[np.ndarray, list]:
    """The values of a column in order of first appearance, and the place among them of each row, int32 [N]."""
    choose(f'column of {self.path}', name, self.table.column_names)
    if isinstance(self.table, Manifest):
      return self.table.distinct(name)
    if name not in self._found:
      self._found[name] = manifest.distinct(self.table[name])
    return self._found[name]

  def value(self, name: str, i: int) -> Any:
    """What a column of few values says of row i."""
    codes, values = self.distinct(name)
    return values[codes[i]]

  def _known(self, column: str, names: Sequence[str], kind: str) -> None:
    values = [manifest.name_of(v) for v in self.distinct(column)[1]]
    for name in names:
      choose(kind, name, values)

  def _among(self, column: str, names: Sequence[str]) -> np.ndarray:
    """bool [N]: which rows have one of these values."""
    codes, values = self.distinct(column)
    return np.array([manifest.name_of(v) in names for v in values], bool)[codes]

  def keep(self, rows: np.ndarray) -> 'Source':
    """The same records without those whose place in `rows` [N] is False."""
    return self if rows.all() else dataclasses.replace(self, table=self.table.filter(pa.array(rows)))

  def column(self, name: str) -> pa.ChunkedArray:
    """A column of the manifest; a UserError names the nearest one to an unknown name."""
    choose(f'column of {self.path}', name, self.table.column_names)
    return self.table[name]

  def classes(self, label: str) -> tuple[str, ...]:
    """The values of a column as sorted text, nulls left out."""
    return tuple(sorted(v for v in self._texts(label)[1] if v is not None))

  def codes(self, label: str, classes: Sequence[str], strict: bool = True) -> np.ndarray:
    """int32 [N]: the position of each row's value among `classes`, -1 where it has none.

    Raises:
      UserError: an unknown column, or a value that is none of `classes`; unless `strict` that is -1, too.
    """
    codes, texts = self._texts(label)
    places = {name: i for i, name in enumerate(classes)}
    for text in texts if strict else ():
      if text is not None and text not in places:
        choose(f'value of column {label!r} in {self.path}', text, classes)
    return np.array([-1 if t is None else places.get(t, -1) for t in texts], np.int32)[codes]

  def _texts(self, label: str) -> tuple[np.ndarray, list[str | None]]:
    """`distinct` with the values as text."""
    codes, values = self.distinct(label)
    kind = self.column_type(label)
    try:
      return codes, pa.array(values, kind).cast(pa.string()).to_pylist()
    except pa.ArrowException as e:
      raise UserError(f'column {label!r} holds {kind}, which cannot be a label') from e

  def column_type(self, name: str) -> pa.DataType:
    """The type of a column of the manifest."""
    choose(f'column of {self.path}', name, self.table.column_names)
    return self.table.schema.field(name).type

  @functools.cached_property
  def _found(self) -> dict[str, tuple[np.ndarray, list]]:
    return {}

  @functools.cached_property
  def channels(self) -> tuple[str, ...]:
    """The names of all channels of these rows, in order of first appearance."""
    return tuple(dict.fromkeys(name for names in self.distinct('channels')[1] for name in names))

  @functools.cached_property
  def _keys(self) -> tuple[str, ...]:
    """Of readers, bricks and shards."""
    return tuple(f'{name}/{split}' for name in self.datasets for split in SPLITS) if self.datasets else SPLITS

  @functools.cached_property
  def _key(self) -> np.ndarray:
    """The place among `_keys` of each row."""
    places = lambda column, names: np.array([names.index(v) for v in self.distinct(column)[1]], np.int32)
    split = places('split', SPLITS)[self.distinct('split')[0]]
    if not self.datasets:
      return split
    return places(manifest.DATASET, self.datasets)[self.distinct(manifest.DATASET)[0]] * len(SPLITS) + split

  @functools.cached_property
  def _place(self) -> np.ndarray:
    return self.table['row'].to_numpy()

  def reader(self, i: int) -> tuple[Any, int]:
    """The data source that holds row i, and its place there."""
    i = self._row(i)
    return self.readers[self._keys[self._key[i]]], int(self._place[i])

  def _row(self, i: int) -> int:
    i = i.__index__()
    if not -len(self) <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    return i % len(self)

  def _read(self, split: str, places: list[int], wanted: Sequence[str] = PIXELS, at: store.Slices | None = None
            ) -> list[dict[str, Any]]:
    reader = self.readers[split]

    def found() -> list[dict[str, Any]]:
      # One at a time is the faster call for one; it starts no threads.
      examples = [reader[places[0]]] if len(places) == 1 else reader.__getitems__(places)
      return [self._part(split, place, decode(e), wanted, at) for place, e in zip(places, examples)]

    return self._guarded(split, found)

  def _guarded(self, split: str, read: Callable[[], list]) -> list:
    try:
      return read()
    except (RuntimeError, ValueError, KeyError, IndexError) as e:
      raise UserError(f'{self.path} has a damaged shard of split {split}: {e}; prepare it again') from e

  def _part(self, split: str, place: int, record: dict[str, Any], wanted: Sequence[str], at: store.Slices | None
            ) -> dict[str, Any]:
    """What `decode` gave as a record: the pixels that are wanted, and of these the part `at`."""
    out = {k: v for k, v in record.items() if k not in (*PIXELS, 'shape', 'dtype', 'mask_shape', 'mask_dtype')}
    for field in wanted:
      pixels = record.get(field)
      if isinstance(pixels, tuple):  # in bricks
        whole = tuple(slice(0, n) for n in record['shape' if field == 'image' else f'{field}_shape'][:-1])
        pixels = self._pixels(split, place, record, at or whole, field)
        pixels = pixels if field == 'image' else pixels[..., 0]
        pixels.flags.writeable = False
      elif pixels is not None and at is not None:
        pixels = pixels[at]
      if pixels is not None:
        out[field] = pixels
    return out

  def _pixels(self, split: str, place: int, record: dict[str, Any], at: store.Slices, field: str) -> np.ndarray:
    """The part `at` of pixels that lie in bricks."""
    shard = int(np.searchsorted(self.shards[split], place, side='right'))
    read = functools.partial(self.bricks[split].read, shard)
    first, edge = record[field]
    prefix = '' if field == 'image' else f'{field}_'
    return store.window(read, record[f'{prefix}shape'], record[f'{prefix}dtype'], first, edge, at)


def metadata(folder: pathlib.Path, corpus: Any) -> Any:
  """What TFDS makes of the metadata in a folder; `corpus` is its name in errors."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
    [info.filepaths for info in builder.info.splits.values()]
    return builder
  except Exception as e:  # TFDS raises its own kinds for missing or damaged metadata
    raise UserError(f'{corpus} has damaged metadata: {" ".join(str(e).split())}; prepare it again') from e


def check_counts(builder: Any, table: Manifest, corpus: Any) -> None:
  """Raises a UserError where shards and manifest have different numbers of records."""
  counts = {name: info.num_examples for name, info in builder.info.splits.items()}
  codes, values = table.distinct('split')
  wanted = {value: int(np.count_nonzero(codes == k)) for k, value in enumerate(values)}
  if counts != wanted:
    raise UserError(f'{corpus} is damaged: the manifest has {wanted} records, the shards {counts}; prepare it again')
