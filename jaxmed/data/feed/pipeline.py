"""Records -> batches, as a pure function of (seed, step).

The chain is a Grain MapDataset, indexable at any step: no position is stored anywhere. With P processes,
process p takes batches p, p + P, ... of batch_size / P elements, so that the processes' batches, one after
the other, are the same global batch for every P.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from jaxmed.data.corpus.source import Source
from jaxmed.data.feed.lacking import Lack
from jaxmed.data.resize import resize
from jaxmed.errors import UserError, choose

FITS = ('resize', 'crop')
# Batches that are read ahead take at most this much memory, with at least two of them.
PREFETCH_BYTES = 256 << 20
# Elements of a stream that does not end. Grain's own infinity, sys.maxsize, overflows in batches of one element.
_ENDLESS = 1 << 60
_INTEGERS = ('uint8', 'uint16', 'int16')

Batch = dict[str, np.ndarray]
Vocabulary = Sequence[str] | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class _Layout:
  """What every element of a pipeline looks like."""

  size: tuple[int, ...]
  channels: int
  dtype: np.dtype
  ids: dict[str, int]
  fit: str


@dataclasses.dataclass(frozen=True)
class _Elements:
  """A source of elements; rows from `len(source)` up to `length` are blank.

  With fit 'resize' they have the layout's size; with 'crop' they have no image until `crop` reads its window.
  """

  source: Source
  layout: _Layout
  labels: np.ndarray
  length: int
  lack: Lack | None = None

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: int) -> dict[str, Any]:
    layout, i = self.layout, int(i)
    channels = np.zeros(layout.channels, np.int32)
    mask = np.zeros(layout.channels, bool)
    if i >= len(self.source):
      blank = np.zeros((*layout.size, layout.channels), layout.dtype)
      return {'image': blank, 'channels': channels, 'channel_mask': mask, 'label': np.int32(-1),
              'index': np.int32(-1)}
    if layout.fit == 'resize':
      record = self.source[i]
      names, image = record['channels'], self._padded(resize(record['image'], layout.size), i)
    else:
      names, image = self.source.value('channels', i), None
    channels[:len(names)] = [layout.ids[c] for c in names]
    mask[:len(names)] = True if self.lack is None else self.lack.shown(i, names)
    return {'image': image, 'channels': channels, 'channel_mask': mask, 'label': self.labels[i],
            'index': np.int32(i)}

  def crop(self, element: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    """Reads a window of the layout's size: random with `rng`, else central. Smaller images lie amid zeros."""
    i, layout = int(element['index']), self.layout
    if i < 0:
      return element
    grid = self.source.value('shape', i)[:-1]
    spare = [have - want for have, want in zip(grid, layout.size)]
    pad = [(max(0, -s) // 2, max(0, -s) - max(0, -s) // 2) for s in spare]
    start = [0 if s <= 0 else int(rng.integers(s + 1)) if rng is not None else s // 2 for s in spare]
    window = self.source.window(i, start, layout.size)
    if any(map(any, pad)):
      window = np.pad(window, [*pad, (0, 0)])
    return element | {'image': self._padded(window, i)}

  def _padded(self, image: np.ndarray, i: int) -> np.ndarray:
    """The image of row i with as many channels as all have."""
    missing = self.layout.channels - image.shape[-1]
    if missing < 0:
      raise UserError(f'{self.source.path}: record {i} has {image.shape[-1]} channels, more than the '
                      f'{self.layout.channels} that its manifest tells of: prepare the corpus again')
    image = image.astype(self.layout.dtype, copy=False)
    return np.pad(image, [(0, 0)] * (image.ndim - 1) + [(0, missing)]) if missing else image


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """The endless stream of elements that a sampler chooses."""

  elements: _Elements
  sampler: Callable[[int], int]

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, position: int) -> dict[str, Any]:
    return self.elements[self.sampler(int(position))]


def train_batches(
    source: Source, *, batch_size: int, size: Sequence[int], vocabulary: Vocabulary, seed: int,
    start_step: int = 0, process_index: int = 0, process_count: int = 1, label: str | None = None,
    classes: Sequence[str] = (), fit: str = 'resize', threads: int = 2, prefetch: int | None = None,
    sampler: Callable[[int], int] | None = None, lack: Lack | None = None,
) -> Iterator[Batch]:
  """Endless shuffled batches from `start_step` on; the order differs from epoch to epoch.

  Args:
    source: the rows to train on.
    batch_size: size B of the global batch; this process yields b = B / process_count elements.
    size: the grid of the images, of rank 2 or 3.
    vocabulary: channel names, where a channel's id is its place, or {name: id}, where several names may share an id.
    seed: with the step it determines order and crops.
    start_step: the first step to yield.
    process_index: this process.
    process_count: number of processes, a divisor of B.
    label: manifest column of the labels.
    classes: its values in order; all of the source's own when empty.
    fit: 'resize' (antialiased, the whole image) or 'crop' (a random window, zero-padded where too small).
    threads: reading threads.
    prefetch: batches read ahead; by default what fits into PREFETCH_BYTES, 2 to 16.
    sampler: gives the row at each position of the stream (see jaxmed.data.feed.sampling) instead of a shuffle.
    lack: channels that a share of the rows shall lack.

  Returns:
    An iterator of dicts: image [b, *size, C] (uint8, uint16 or int16 if all records are, else float32),
    channels [b, C] int32 (0 where padded), channel_mask [b, C] bool, label [b] int32 (-1 where none), index
    [b] int32 (row of the source). C is the largest number of channels of the source.

  Raises:
    UserError: nothing to read, a size of another rank than the images, a channel that is not in the
      vocabulary, an unknown label column or value, a batch that the processes cannot share.
  """
  elements = _elements(source, size, vocabulary, label, classes, fit, len(source), lack)
  local = _share(batch_size, process_index, process_count)
  if sampler is None:
    data = grain.MapDataset.source(elements).seed(seed).shuffle().repeat(_ENDLESS // len(source))
  else:
    data = grain.MapDataset.source(_Drawn(elements, sampler)).seed(seed)
  if fit == 'crop':
    data = data.random_map(elements.crop)
  data = data.batch(local)[process_index::process_count][start_step:]
  return _iterate(data, elements.layout, local, threads, prefetch)


def eval_batches(
    source: Source, *, batch_size: int, size: Sequence[int], vocabulary: Vocabulary,
    label: str | None = None, classes: Sequence[str] = (), fit: str = 'resize', process_index: int = 0,
    process_count: int = 1, threads: int = 2, prefetch: int | None = None,
) -> Iterator[Batch]:
  """Every row once, in order; the last batch is filled up with blanks of index -1. See `train_batches`.

  A crop is taken from the centre.
  """
  batches = -(-len(source) // max(batch_size, 1))
  elements = _elements(source, size, vocabulary, label, classes, fit, batches * batch_size)
  local = _share(batch_size, process_index, process_count)
  data = grain.MapDataset.source(elements)
  if fit == 'crop':
    data = data.map(lambda e: elements.crop(e, None))
  return _iterate(data.batch(local)[process_index::process_count], elements.layout, local, threads, prefetch)


def elements(source: Source, size: Sequence[int], vocabulary: Vocabulary, fit: str) -> _Elements:
  """The elements that `train_batches` shuffles and batches, one by one, without labels."""
  return _elements(source, size, vocabulary, None, (), fit, len(source))


def one(data: _Elements, i: int, rng: np.random.Generator) -> dict[str, Any]:
  """Element i with its image, cropped where the elements are."""
  element = data[i]
  return data.crop(element, rng) if data.layout.fit == 'crop' else element


def _elements(source, size, vocabulary, label, classes, fit, length, lack=None) -> _Elements:
  if not len(source):
    raise UserError(f'{source.path} has no records in this selection')
  choose('fit', fit, FITS)
  size = tuple(int(n) for n in size)
  _check_rank(source, size)
  for name in source.channels:
    choose(f'channel of {source.path}', name, vocabulary)
  dtypes = source.distinct('dtype')[1]
  dtype = np.dtype(dtypes[0] if len(dtypes) == 1 and dtypes[0] in _INTEGERS else 'float32')
  widest = max(len(names) for names in source.distinct('channels')[1])
  labels = np.broadcast_to(np.int32(-1), len(source))
  if label is not None:
    labels = source.codes(label, classes or source.classes(label))
  ids = dict(vocabulary) if isinstance(vocabulary, Mapping) else {name: i for i, name in enumerate(vocabulary)}
  return _Elements(source, _Layout(size, widest, dtype, ids, fit), labels, length, lack)


def _check_rank(source: Source, size: tuple[int, ...]) -> None:
  if min(size, default=0) < 1:
    raise UserError(f'size is {size}: expected positive numbers')
  codes, shapes = source.distinct('shape')
  other = np.array([len(shape) - 1 != len(size) for shape in shapes])
  if other.any():
    i = int(np.argmax(other[codes]))
    grid = shapes[codes[i]][:-1]
    raise UserError(f'size {"x".join(map(str, size))} has rank {len(size)}, but {source.table["id"][i].as_py()} in '
                    f'{source.path} is {"x".join(map(str, grid))} of rank {len(grid)}')


def _share(batch_size: int, process_index: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'batch_size {batch_size} is not divisible by {process_count} processes')
  if not 0 <= process_index < process_count:
    raise UserError(f'process {process_index} is not one of {process_count}')
  return batch_size // process_count


def _iterate(data, layout: _Layout, local: int, threads: int, prefetch: int | None) -> Iterator[Batch]:
  if prefetch is None:
    size = local * layout.channels * layout.dtype.itemsize * int(np.prod(layout.size))
    prefetch = int(np.clip(PREFETCH_BYTES // max(size, 1), 2, 16))
  # Grain would read 500 batches ahead by default.
  options = grain.ReadOptions(num_threads=max(1, threads), prefetch_buffer_size=max(prefetch, threads, 1))
  return iter(data.to_iter_dataset(options))
