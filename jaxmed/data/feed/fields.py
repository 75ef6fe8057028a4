"""Fields: which arrays a batch has, and how a record fills them.

One list of `contracts.Field` says it: the pipeline reads what the list names, padding rows are its blanks, and the
shapes that a step is compiled for are its shapes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.contracts import FIELDS, Field
from jaxmed.errors import UserError, choose

TEXT_LENGTH = 256
# Fields that need nothing of a corpus: every record has an image, a label may be missing, all classes be annotated,
# words are those of `text`.
ALWAYS = ('image', 'label', 'number', 'annotated', 'words')
ANNOTATED = 'annotated'  # column of the manifest: JSON or lists, values of masks whose classes the source annotates
BOXES = 'boxes'  # column of the manifest: JSON or lists, [[start ..., end ...], ...] in pixels of the stored image

_INTEGERS = ('uint8', 'uint16', 'int16')


def of(wanted: Sequence[str], *, size: Sequence[int], slots: int, dtype: str, masked: bool = True,
       text_length: int = TEXT_LENGTH, signal: Sequence[int] = (0, 0), boxes: int = 0,
       extent: bool = False, labels: int = 0) -> tuple[Field, ...]:
  """The fields of a batch; label and index are always among them.

  Args:
    wanted: what an objective wants of a record, see `contracts.FIELDS`.
    size: the grid of the loaded arrays.
    slots: channels C of an image. dtype: of images. masked: whether some samples have fewer channels.
    text_length: ids L of a text.
    signal: steps T and channels K.
    boxes: the most boxes N of a sample.
    extent: whether images fill a part of their arrays, see `aspect_grid`.
    labels: classes K of masks.

  Raises:
    UserError: an unknown name; the nearest one is named.
  """
  size = tuple(int(n) for n in size)
  for name in wanted:
    choose('field of a record', name, FIELDS)
  arrays: dict[str, list[tuple[str, str, tuple[int, ...], str]]] = {
      'image': [('image', 'image', (*size, slots), dtype), ('channels', 'image', (slots,), 'int32'),
                *([('channel_mask', 'image', (slots,), 'bool')] if masked else []),
                *([('extent', 'row', (len(size),), 'int32')] if extent else [])],
      'mask': [('mask', 'mask', size, 'int32')],
      'annotated': [('annotated', 'class', (labels,), 'bool')],
      'text': [('text', 'text', (text_length,), 'int32')],
      'words': [('words', 'text', (text_length,), 'int32')],
      'signal': [('signal', 'signal', tuple(signal), 'float32'), ('signal_mask', 'signal', tuple(signal[:1]), 'bool')],
      'boxes': [('boxes', 'box', (boxes, 2 * len(size)), 'float32')],
      'number': [('number', 'number', (), 'float32')],
  }
  found = [Field(*array) for name in arrays if name in wanted for array in arrays[name]]
  return (*found, Field('label', 'label', (), 'int32'), Field('index', 'row', (), 'int32'))


def of_source(source: Any, size: Sequence[int], wanted: Sequence[str] = ('image',), **lengths: Any
              ) -> tuple[Field, ...]:
  """The fields of batches of one source, in its type and with the channels of its widest record.

  Args:
    source: rows to read.
    size, wanted: as for `of`.
    lengths: text_length, signal, boxes and labels, as for `of`.
  """
  dtypes = source.distinct('dtype')[1]
  dtype = dtypes[0] if len(dtypes) == 1 and dtypes[0] in _INTEGERS else 'float32'
  return of(wanted, size=size, slots=widest(source), dtype=dtype, **lengths)


def widest(source: Any) -> int:
  """The most channels of a record."""
  return max(len(names) for names in source.distinct('channels')[1])


def widened(fields: Sequence[Field], slots: int) -> tuple[Field, ...]:
  """The fields with room for at least so many channels."""
  wider = lambda f: dataclasses.replace(f, shape=(*f.shape[:-1], max(f.shape[-1], slots)))
  return tuple(wider(f) if f.kind == 'image' else f for f in fields)


def names(fields: Sequence[Field]) -> tuple[str, ...]:
  """Keys of a batch."""
  return tuple(f.name for f in fields)


def shapes(fields: Sequence[Field], *lead: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """{name: (shape, dtype)} of a batch whose arrays have these leading axes."""
  return {f.name: ((*lead, *f.shape), np.dtype(f.dtype)) for f in fields}


def blanks(fields: Sequence[Field]) -> dict[str, np.ndarray]:
  """A sample that stands for none: a row of padding."""
  return {f.name: np.full(f.shape, f.fill, f.dtype) for f in fields}


def nbytes(fields: Sequence[Field]) -> int:
  """Bytes of a sample."""
  return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes(fields).values())


def held(source: Any) -> tuple[str, ...]:
  """Which of `contracts.FIELDS` some of these rows have, by the columns of the manifest.

  The column of texts is not read, as it holds them whole: that it is there is enough.
  """
  out = []
  for name in FIELDS:
    if name in ALWAYS or name not in source.table.column_names or str(source.column_type(name)) == 'null':
      continue
    if name == 'text' or source.column(name).null_count < len(source):
      out.append(name)
  return tuple(out)


def aspect_grid(grid: Sequence[int], size: Sequence[int], spacing: Sequence[float] | None = None) -> tuple[int, ...]:
  """The grid of an image [*grid] that is shrunk into [*size] with its aspect.

  All axes get one step, in mm where the `spacing` is known; an axis that is stored more coarsely stays as it is, and
  nothing is enlarged. Without spacing the first of three axes, slices or frames, is shrunk by itself.
  """
  steps = spacing or (1.0,) * len(grid)
  needs = [n * step / most if n > most else 0.0 for n, most, step in zip(grid, size, steps, strict=True)]
  alone = 1 if spacing is None and len(grid) == 3 else 0
  step = max(needs[alone:])
  fitted = [n if step <= own else max(round(n * own / step), 1) for n, own in zip(grid, steps)]
  return (*(min(grid[i], size[i]) for i in range(alone)), *(min(a, b) for a, b in zip(fitted[alone:], size[alone:])))


def padded_signal(signal: np.ndarray, shape: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray]:
  """A signal [t, K] as [T, K] float32, cut at the end or padded with 0, and which steps it has, [T] bool.

  Raises:
    UserError: it has another number of channels; `name` is the record in the error.
  """
  steps, channels = shape
  if signal.shape[1] != channels:
    raise UserError(f'{name} has a signal of {signal.shape[1]} channels, other records one of {channels}: give all '
                    'signals of a corpus the same channels')
  short = max(steps - len(signal), 0)
  return np.pad(signal[:steps].astype(np.float32), ((0, short), (0, 0))), np.arange(steps) < steps - short


def parse_boxes(value: Any, rank: int, name: str) -> np.ndarray:
  """Boxes of a record [n, 2 * rank] float32 from the column BOXES: JSON, lists, or nothing.

  Raises:
    UserError: something else; `name` is the record in the error.
  """
  try:
    rows = json.loads(value) if isinstance(value, str) and value else value or []
    boxes = np.asarray(rows, np.float32).reshape(len(rows), -1) if len(rows) else np.zeros((0, 2 * rank), np.float32)
    fits = boxes.shape[1] == 2 * rank and bool((boxes[:, :rank] < boxes[:, rank:]).all())
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise UserError(f'{name} has the boxes {value!r}: expected [[start, ..., end, ...], ...], {2 * rank} numbers a box '
                    'in pixels, each end after its start')
  return boxes


def placed_boxes(boxes: np.ndarray, start: Sequence[float], scale: Sequence[float], size: Sequence[int], count: int
                 ) -> np.ndarray:
  """Boxes [n, 2 * rank] of a stored image as [count, 2 * rank] of the array of `size` that is loaded from it.

  Pixel p lies at (p - start) * scale there. Boxes are cut at the border. Those wholly outside, and those after the
  first `count`, are left out; rows without one are -1.
  """
  rank = len(size)
  moved = (boxes.reshape(-1, 2, rank) - np.asarray(start, np.float32)) * np.asarray(scale, np.float32)
  inside = ((moved[:, 1] > 0) & (moved[:, 0] < np.asarray(size))).all(axis=1)
  kept = np.clip(moved[inside], 0, np.asarray(size)).reshape(-1, 2 * rank)[:count]
  return np.pad(kept, ((0, count - len(kept)), (0, 0)), constant_values=-1).astype(np.float32)


def parse_annotated(value: Any, name: str) -> list[int] | None:
  """The values of masks whose classes a record's source annotates, from the column ANNOTATED; None for all.

  Raises:
    UserError: neither a list of whole numbers nor JSON of one; `name` is the record in the error.
  """
  if value is None or value == '':
    return None
  try:
    values = json.loads(value) if isinstance(value, str) else list(value)
  except (TypeError, ValueError):
    values = None
  if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
    raise UserError(f'{name} has {ANNOTATED} {value!r}: expected a list of values of masks, such as [0, 1, 2]')
  return values


def annotated(source: Any, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Which classes are annotated, for each kind of row: the kind of each row [N] int32, and [kinds, K] bool.

  labels: stored values of the K classes.

  Raises:
    UserError: a row names a value that is none of them.
  """
  if ANNOTATED not in source.table.column_names:
    return np.zeros(len(source), np.int32), np.ones((1, len(labels)), bool)
  codes, values = source.distinct(ANNOTATED)
  out = np.ones((len(values), len(labels)), bool)
  for k, value in enumerate(values):
    found = parse_annotated(value, f'{source.path}: a record')
    if found is None:
      continue
    for number in found:
      if number not in labels:
        raise UserError(f'{source.path}: a record has {ANNOTATED} {value!r}, but {number} is no class of its masks: '
                        f'choose among {", ".join(map(str, labels))}')
    out[k] = np.isin(labels, found)
  return codes, out


def numbers(source: Any, column: str) -> np.ndarray:
  """A column as numbers [N] float64, NaN where it says nothing.

  Raises:
    UserError: an unknown column, or a value that is no finite number.
  """
  codes, values = source.distinct(column)
  out = np.full(len(values), np.nan)
  for k, value in enumerate(values):
    if value is None or value == '' or value != value:
      continue
    try:
      out[k] = float(value)
    except (TypeError, ValueError):
      out[k] = np.inf
    if np.isinf(out[k]):
      raise UserError(f'column {column!r} of {source.path} holds {value!r}: expected finite numbers') from None
  return out[codes]


def channel_ids(names: Sequence[str], ids: Mapping[str, int], slots: int) -> np.ndarray:
  """The ids of a record's channels [slots] int32, 0 where it has fewer."""
  out = np.zeros(slots, np.int32)
  out[:len(names)] = [ids[c] for c in names]
  return out
