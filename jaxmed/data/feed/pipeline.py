"""Records -> batches, as a pure function of (seed, step).

The chain is a Grain MapDataset, indexable at any step: no position is stored anywhere. With P processes,
process p takes batches p, p + P, ... of batch_size / P elements, so that the processes' batches, one after
the other, are the same global batch for every P.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from jaxmed.contracts import Field
from jaxmed.data.corpus.source import PIXELS, Source
from jaxmed.data.feed import fields as fields_lib
from jaxmed.data.feed import foreground as foreground_lib
from jaxmed.data.feed.foreground import Foreground
from jaxmed.data.feed.lacking import Lack
from jaxmed.data.feed.texts import Texts
from jaxmed.data.feed.windows import Windows
from jaxmed.data.resize import nearest, resize
from jaxmed.errors import UserError, choose

FITS = ('aspect', 'resize', 'crop')
# Batches that are read ahead take at most this much memory, with at least two of them.
PREFETCH_BYTES = 256 << 20
# Elements of a stream that does not end. Grain's own infinity, sys.maxsize, overflows in batches of one element.
_ENDLESS = 1 << 60

Batch = dict[str, np.ndarray]
Vocabulary = Sequence[str] | Mapping[str, int]
BYTES = Texts()  # the column `text` as its bytes


@dataclasses.dataclass(frozen=True)
class _Elements:
  """A source of elements with `fields`; rows that the source does not have are blank.

  With fit 'resize' they have the grid `size`; with 'aspect' they fill a part of it, from its corner on; with 'crop' an
  element is its row until `crop` reads a part of that size.
  """

  source: Source
  size: tuple[int, ...]
  fields: tuple[Field, ...]
  ids: dict[str, int]
  fit: str
  labels: np.ndarray
  length: int
  lack: Lack | None = None
  texts: Texts = BYTES
  annotated: tuple[np.ndarray, np.ndarray] | None = None  # see fields.annotated
  numbers: np.ndarray | None = None  # see fields.numbers

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: int) -> dict[str, Any]:
    i = int(i) if 0 <= i < len(self.source) else -1
    if self.fit == 'crop':
      return {'index': np.int32(i)}
    if i < 0:
      return fields_lib.blanks(self.fields)
    record, grid, size = self.source.record(i, self._pixels), self._grid(i), self.size
    if self.fit == 'aspect':
      size = fields_lib.aspect_grid(grid, size, record['spacing'])
    fitted = {'image': lambda x: resize(x, size), 'mask': lambda x: nearest(x, size)}
    pixels = {name: fitted[name](record[name]) for name in self._pixels if name in record}
    if size != self.size:
      pixels |= _framed(pixels, [(0, most - n) for n, most in zip(size, self.size)])
    element = self._filled(i, record | pixels, [0.0] * len(grid), [want / have for want, have in zip(size, grid)])
    return element | ({'extent': np.asarray(size, np.int32)} if self.fit == 'aspect' else {})

  def crop(self, element: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    """Reads a part of the grid `size`: random with `rng`, else central. Smaller images lie amid zeros.

    Where the element is `forced`, it is random among the parts with a class of the mask in their centre.
    """
    i = int(element['index'])
    if i < 0:
      return fields_lib.blanks(self.fields)
    start = self._start(i, element, rng)
    return self._cropped(i, start, self.source.cut(i, start, self.size, self._pixels))

  def crops(self, element: dict[str, Any], rng: np.random.Generator, count: int) -> dict[str, Any]:
    """`count` parts, stacked: the first is that of `crop`, the others lie anywhere in what was read for it.

    That is all bricks that it touches, or the whole image where it does not lie in bricks.
    """
    i = int(element['index'])
    start = self._start(i, element, rng)
    low, size = self.source.opened(i, start, self.size)
    near = self.source.cut(i, low, size, self._pixels)
    spare = [max(have - want, 0) for have, want in zip(size, self.size)]
    starts = [start, *([a + int(rng.integers(s + 1)) for a, s in zip(low, spare)] for _ in range(count - 1))]
    parts = []
    for start in starts:
      at = tuple(slice(s - a, s - a + n) for s, a, n in zip(start, low, self.size))
      parts.append(self._cropped(i, start, near | {name: near[name][at] for name in self._pixels if name in near}))
    return _stacked(parts)

  def _start(self, i: int, element: dict[str, Any], rng: np.random.Generator | None) -> list[int]:
    """Where a crop of row i begins."""
    spare = [have - want for have, want in zip(self._grid(i), self.size)]
    start = [0 if s <= 0 else int(rng.integers(s + 1)) if rng is not None else s // 2 for s in spare]
    if rng is not None and element.get('forced'):
      place = foreground_lib.centre(self.source.places_of(i), self._grid(i), rng)
      start = start if place is None else foreground_lib.start(place, self._grid(i), self.size)
    return start

  def _cropped(self, i: int, start: Sequence[int], record: dict[str, Any]) -> dict[str, Any]:
    """The element of what was read from `start` on, amid zeros where the image is smaller."""
    lack = [max(0, want - have) for have, want in zip(self._grid(i), self.size)]
    pad = [(n // 2, n - n // 2) for n in lack]
    if any(lack):
      record = record | _framed(record, pad)
    return self._filled(i, record, [s - before for s, (before, _) in zip(start, pad)], [1.0] * len(pad))

  @property
  def _pixels(self) -> tuple[str, ...]:
    return tuple(name for name in PIXELS if name in fields_lib.names(self.fields))

  def _grid(self, i: int) -> list[int]:
    return self.source.value('shape', i)[:-1]

  def _filled(self, i: int, record: dict[str, Any], start: Sequence[float], scale: Sequence[float]) -> dict[str, Any]:
    """The element of a record whose pixels have the grid `size`; pixel p of the stored ones is at (p - start) * scale.

    What the record lacks is blank.
    """
    out: dict[str, Any] = {'label': self.labels[i], 'index': np.int32(i)}
    shapes = {f.name: f.shape for f in self.fields}
    name = f'{self.source.path}: record {i}'
    if 'image' in shapes:
      slots, names = shapes['channels'][0], record['channels']
      out['image'] = self._padded(record['image'], i)
      out['channels'] = fields_lib.channel_ids(names, self.ids, slots)
      if 'channel_mask' in shapes:
        mask = np.zeros(slots, bool)
        mask[:len(names)] = True if self.lack is None else self.lack.shown(i, names)
        out['channel_mask'] = mask
    if 'mask' in shapes and 'mask' in record:
      out['mask'] = record['mask'].astype(np.int32)
    if 'annotated' in shapes and self.annotated is not None:
      kinds, classes = self.annotated
      out['annotated'] = classes[kinds[i]]
    if 'number' in shapes and self.numbers is not None:
      out['number'] = np.float32(self.numbers[i])
    if 'text' in shapes:
      out |= {k: x for k, x in self.texts.ids(self.source, i, shapes['text'][0]).items() if k in shapes}
    if 'signal' in shapes and 'signal' in record:
      out['signal'], out['signal_mask'] = fields_lib.padded_signal(record['signal'], shapes['signal'], name)
    if 'boxes' in shapes:
      boxes = fields_lib.parse_boxes(self.source.column(fields_lib.BOXES)[i].as_py(), len(self.size), name)
      out['boxes'] = fields_lib.placed_boxes(boxes, start, scale, self.size, shapes['boxes'][0])
    return fields_lib.blanks([f for f in self.fields if f.name not in out]) | out

  def _padded(self, image: np.ndarray, i: int) -> np.ndarray:
    """The image of row i with as many channels as all have."""
    field = next(f for f in self.fields if f.name == 'image')
    missing = field.shape[-1] - image.shape[-1]
    if missing < 0:
      raise UserError(f'{self.source.path}: record {i} has {image.shape[-1]} channels, more than the '
                      f'{field.shape[-1]} that its manifest tells of: prepare the corpus again')
    image = image.astype(field.dtype, copy=False)
    return np.pad(image, [(0, 0)] * (image.ndim - 1) + [(0, missing)]) if missing else image


def _framed(pixels: Mapping[str, Any], pad: Sequence[tuple[int, int]]) -> dict[str, Any]:
  """Image and mask with so many more pixels before and after each axis, zeros and -1."""
  out = {}
  if 'image' in pixels:
    out['image'] = np.pad(pixels['image'], [*pad, (0, 0)])
  if 'mask' in pixels:
    out['mask'] = np.pad(pixels['mask'].astype(np.int32), pad, constant_values=-1)
  return out


@dataclasses.dataclass(frozen=True)
class _Windowed:
  """Elements that are windows of others, stacked; those from the windows' number up to `length` are blank."""

  elements: _Elements
  windows: Windows
  length: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: int) -> dict[str, Any]:
    rows = self.windows.rows(int(i)) if i < len(self.windows) else np.full(self.windows.length, -1, np.int32)
    return {'index': rows} if self.elements.fit == 'crop' else _stacked([self.elements[int(row)] for row in rows])

  def crop(self, element: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    """Reads the same part of all records that have the same grid."""
    seed = None if rng is None else int(rng.integers(1 << 62))
    again = lambda: None if seed is None else np.random.default_rng(seed)
    return _stacked([self.elements.crop({'index': row}, again()) for row in element['index']])


def _stacked(elements: list[dict[str, Any]]) -> dict[str, Any]:
  return {name: np.stack([e[name] for e in elements]) for name in elements[0]}


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """The endless stream of elements that a sampler chooses."""

  elements: Any
  sampler: Callable[[int], int]

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, position: int) -> dict[str, Any]:
    return self.elements[self.sampler(int(position))]


def train_batches(
    source: Source, *, batch_size: int, size: Sequence[int], vocabulary: Vocabulary, seed: int,
    start_step: int = 0, process_index: int = 0, process_count: int = 1, label: str | None = None,
    classes: Sequence[str] = (), fit: str = 'resize', threads: int = 2, prefetch: int | None = None,
    sampler: Callable[[int], int] | None = None, lack: Lack | None = None, fields: Sequence[Field] = (),
    windows: Windows | None = None, texts: Texts = BYTES, labels: Sequence[int] = (),
    number: str = '', foreground: Foreground | None = None, crops: int = 1,
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
    fit: 'resize' (antialiased, the whole image), 'aspect' (the same without distortion, into the corner of the array;
      see `fields.aspect_grid`) or 'crop' (a random window, zero-padded where too small).
    threads: reading threads.
    prefetch: batches read ahead; by default what fits into PREFETCH_BYTES, 2 to 16.
    sampler: gives the row at each position of the stream (see jaxmed.data.feed.sampling) instead of a shuffle.
    lack: channels that a share of the rows shall lack.
    fields: arrays of a batch, see jaxmed.data.feed.fields; by default images of the source's type and channels. Where
      the source has records of more channels, images have room for these.
    windows: of which each element is one; the arrays have an axis K after the first, and the sampler gives windows.
    texts: what the text of a record is, and its ids; one of several is drawn for each sample.
    labels: stored values of the K classes of masks (see jaxmed.data.corpus.labels), for the field `annotated`.
    number: manifest column of the field `number`.
    foreground: which crops must show a class of their record's mask; fit is 'crop' then, and windows are None.
    crops: of a record, one after the other in the batch, of which the first alone decides what is read; fit is 'crop'
      then, and windows are None. Positions of `sampler` and `foreground` are those of records.

  Returns:
    An iterator of dicts with an array [b, ...] for each field. By default: image [b, *size, C] (uint8, uint16 or int16
    if all records are, else float32), channels [b, C] int32 (0 where padded), channel_mask [b, C] bool, label [b] int32
    (-1 where none), index [b] int32 (row of the source). C is the largest number of channels of the source.
    Others: mask [b, *size] int32 (-1 where it does not tell), annotated [b, K] bool, number [b] float32 (NaN where
    none), text [b, L] int32, signal [b, T, S] float32 and signal_mask [b, T] bool, boxes [b, N, 2 * rank] float32
    (pixels of the loaded array, rows of -1 for none).

  Raises:
    UserError: nothing to read, a size of another rank than the images, a channel that is not in the
      vocabulary, an unknown label column or value, a batch that the processes cannot share.
  """
  elements = _elements(source, size, vocabulary, label, classes, fit, len(source), lack, fields, texts,
                       masks=labels, number=number)
  if windows is not None:
    elements = _Windowed(elements, windows, len(windows))
  local = _share(batch_size, process_index, process_count)
  if local % crops:
    raise UserError(f'loader.crops={crops} does not divide the {local} records a step of each process')
  if sampler is None:
    data = grain.MapDataset.source(elements).seed(seed).shuffle().repeat(_ENDLESS // len(elements))
  else:
    data = grain.MapDataset.source(_Drawn(elements, sampler)).seed(seed)
  if foreground is not None:
    data = data.map_with_index(functools.partial(_forced, foreground))
  if crops > 1:
    data = data.random_map(functools.partial(elements.crops, count=crops))
  elif fit == 'crop':
    data = data.random_map(elements.crop)
  if texts.drawn and 'text' in fields_lib.names(fields_of(elements)):
    data = data.random_map(functools.partial(_retold, texts, source))
  data = data.batch(local // crops)[process_index::process_count][start_step:]
  return _iterate(data.map(_joined) if crops > 1 else data, _bytes(elements), local, threads, prefetch)


def _joined(batch: Batch) -> Batch:
  """[n, crops, ...] -> [n * crops, ...]."""
  return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def _retold(texts: Texts, source: Source, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
  """The element with a text that is drawn, each record of a window or crop of its own."""
  index, length = np.asarray(element['index']), element['text'].shape[-1]
  found = [texts.ids(source, int(i), length, rng) if i >= 0 else {} for i in index.reshape(-1)]
  out = {}
  for name in {'text', 'words'} & element.keys():
    blank = np.zeros(length, np.int32)
    out[name] = np.stack([ids.get(name, blank) for ids in found]).reshape(*index.shape, length)
  return element | out


def _forced(foreground: Foreground, position: int, element: dict[str, Any]) -> dict[str, Any]:
  return element | {'forced': foreground.forced(int(position))}


def eval_batches(
    source: Source, *, batch_size: int, size: Sequence[int], vocabulary: Vocabulary,
    label: str | None = None, classes: Sequence[str] = (), fit: str = 'resize', process_index: int = 0,
    process_count: int = 1, threads: int = 2, prefetch: int | None = None, fields: Sequence[Field] = (),
    windows: Windows | None = None, texts: Texts = BYTES, labels: Sequence[int] = (),
    number: str = '',
) -> Iterator[Batch]:
  """Every row, or window, once, in order; the last batch is filled up with blanks of index -1. See `train_batches`.

  A crop is taken from the centre. A label that is none of `classes` is none at all: training did not know it.
  """
  count = len(source) if windows is None else len(windows)
  length = -(-count // max(batch_size, 1)) * batch_size
  elements = _elements(source, size, vocabulary, label, classes, fit, length, None, fields, texts, False, labels,
                       number)
  if windows is not None:
    elements = _Windowed(elements, windows, length)
  local = _share(batch_size, process_index, process_count)
  data = grain.MapDataset.source(elements)
  if fit == 'crop':
    data = data.map(lambda e: elements.crop(e, None))
  return _iterate(data.batch(local)[process_index::process_count], _bytes(elements), local, threads, prefetch)


def elements(source: Source, size: Sequence[int], vocabulary: Vocabulary, fit: str) -> _Elements:
  """The elements that `train_batches` shuffles and batches, one by one, without labels."""
  return _elements(source, size, vocabulary, None, (), fit, len(source))


def one(data: _Elements, i: int, rng: np.random.Generator) -> dict[str, Any]:
  """Element i with its image, cropped where the elements are."""
  element = data[i]
  return data.crop(element, rng) if data.fit == 'crop' else element


def _elements(source, size, vocabulary, label, classes, fit, length, lack=None, fields=(), texts=BYTES,
              strict=True, masks=(), number='') -> Any:
  if not len(source):
    raise UserError(f'{source.path} has no records in this selection')
  choose('fit', fit, FITS)
  size = tuple(int(n) for n in size)
  _check_rank(source, size)
  for name in source.channels:
    choose(f'channel of {source.path}', name, vocabulary)
  labels = np.broadcast_to(np.int32(-1), len(source))
  if label is not None:
    labels = source.codes(label, classes or source.classes(label), strict)
  ids = dict(vocabulary) if isinstance(vocabulary, Mapping) else {name: i for i, name in enumerate(vocabulary)}
  if not fields:
    fields = fields_lib.of_source(source, size, extent=fit == 'aspect')
  fields = fields_lib.widened(fields, fields_lib.widest(source))
  wanted = fields_lib.names(fields)
  return _Elements(source, size, fields, ids, fit, labels, length, lack, texts,
                   fields_lib.annotated(source, masks) if 'annotated' in wanted else None,
                   fields_lib.numbers(source, number) if 'number' in wanted and number else None)


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


def fields_of(elements: Any) -> tuple[Field, ...]:
  """The fields of elements, or of those in windows."""
  return elements.elements.fields if isinstance(elements, _Windowed) else elements.fields


def _bytes(elements: Any) -> int:
  """Of one element."""
  count = elements.windows.length if isinstance(elements, _Windowed) else 1
  return count * fields_lib.nbytes(fields_of(elements))


def _iterate(data, size: int, local: int, threads: int, prefetch: int | None) -> Iterator[Batch]:
  if prefetch is None:
    prefetch = int(np.clip(PREFETCH_BYTES // max(local * size, 1), 2, 16))
  # Grain would read 500 batches ahead by default.
  options = grain.ReadOptions(num_threads=max(1, threads), prefetch_buffer_size=max(prefetch, threads, 1))
  return iter(data.to_iter_dataset(options))
