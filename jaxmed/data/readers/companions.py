"""What a table lays beside an image: a mask on the same grid, and a signal in time."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.data.readers import wfdb
from jaxmed.data.readers.types import Masks, Record, check_pixels, check_size, number

SIGNALS = ('.npy', '.csv', '.parquet', '.pq', '.edf', '.hea')
_NEAR = 0.01  # share by which spacings may differ, and half of a voxel by which origins may


def masked(record: Record, masks: Sequence[Record], number: int) -> Record:
  """The record with `mask` [*grid]: the only one there is, or the one of its number.

  Raises:
    ValueError: it lies on another grid, or there is none.
  """
  if len(masks) != 1 and number >= len(masks):
    raise ValueError(f'mask: the file holds {len(masks)} images, fewer than the image has')
  mask = masks[0] if len(masks) == 1 else masks[number]
  shape, own = list(record['image'].shape[:-1]), list(mask['image'].shape)
  if shape != own:
    raise ValueError(f'mask: its grid is {own}, that of the image {shape}')
  spacing = record['spacing'], mask['spacing']
  if all(spacing) and len(spacing[0]) == len(spacing[1]):
    if not np.allclose(spacing[0], spacing[1], rtol=_NEAR, atol=0):
      raise ValueError(f'mask: its spacing is {_numbers(spacing[1])} mm, that of the image {_numbers(spacing[0])} mm')
    origins = [r.get('meta', {}).get('origin') for r in (record, mask)]
    if all(origins) and not np.allclose(origins[0], origins[1], rtol=0, atol=max(spacing[0]) / 2):
      raise ValueError(f'mask: its origin is {_numbers(origins[1])} mm, that of the image {_numbers(origins[0])} mm')
  return record | {'mask': mask['image']}


def read_signal(path: str | os.PathLike) -> tuple[np.ndarray, float | None]:
  """A signal [T, C] and its rate in Hz, where the file says.

  It is that of .npy [T] or [T, C] (integers as they are, floats as float32), the numeric columns of a CSV file (with a
  line of names) or a Parquet file in their order (integers of at most 32 bits alike, else float32), or the channels of
  an EDF file, or of a WFDB header .hea with its samples, in its physical units (float32; annotations left out).

  Raises:
    ValueError: another suffix, damaged, no numbers, other axes, NaN or infinity.
  """
  path = pathlib.Path(path)
  suffix = path.suffix.lower()
  if suffix not in SIGNALS:
    raise ValueError(f'signal: no reader for {path.name}; known: {", ".join(SIGNALS)}')
  try:
    rate = None
    if suffix == '.edf':
      array, rate = _edf(path)
    elif suffix == '.hea':
      array, rate, _ = wfdb.read(path)
    else:
      array = _npy(path) if suffix == '.npy' else _columns(path)
    if array.ndim == 1:
      array = array[:, None]
    if array.ndim != 2:
      raise ValueError(f'shape {list(array.shape)}: expected [T] or [T, C]')
    return check_pixels(array), rate
  except Exception as e:  # pyarrow and NumPy raise their own for damaged files
    raise ValueError(f'signal: {e}') from e


def _npy(path: pathlib.Path) -> np.ndarray:
  array = np.load(path, mmap_mode='r', allow_pickle=False)
  check_size(array.shape, array.dtype)
  return np.array(array)


def _edf(path: pathlib.Path) -> tuple[np.ndarray, float]:
  """European Data Format (Kemp et al., 1992) and EDF+ without gaps: channels of one rate."""
  with open(path, 'rb') as f:
    head = f.read(256)
    if head[:8].strip() != b'0' or len(head) < 256:
      raise ValueError('is not EDF')
    if head[192:197] == b'EDF+D':
      raise ValueError('has gaps in time (EDF+D)')
    records, seconds, count = int(head[236:244]), float(head[244:252]), int(head[252:256])
    check_size((count, 256), np.dtype(np.uint8))
    texts = f.read(256 * count)
    data = f.read()
  at = 0
  columns: dict[str, list[bytes]] = {}
  for name, width in (('label', 16), ('kind', 80), ('unit', 8), ('low', 8), ('high', 8), ('least', 8), ('most', 8),
                      ('filter', 80), ('samples', 8)):
    columns[name] = [texts[at + i * width : at + (i + 1) * width].strip() for i in range(count)]
    at += count * width
  samples = [int(n) for n in columns['samples']]
  kept = [i for i in range(count) if columns['label'][i] != b'EDF Annotations']
  if len({samples[i] for i in kept}) != 1 or seconds <= 0:
    raise ValueError('its channels have several rates, or none')
  if records * sum(samples) * 2 != len(data):
    raise ValueError(f'holds {len(data)} bytes of samples: its header tells of {records * sum(samples) * 2}')
  ends = np.cumsum([0, *samples])
  stored = np.frombuffer(data, '<i2').reshape(records, -1)
  out = []
  for i in kept:
    low, high, least, most = (number(columns[k][i].decode('latin1'), f'{k} of channel {i}')
                              for k in ('low', 'high', 'least', 'most'))
    value = stored[:, ends[i] : ends[i + 1]].reshape(-1).astype(np.float64)
    out.append((value - least) * (high - low) / (most - least) + low)
  return np.stack(out, axis=1), samples[kept[0]] / seconds


def _columns(path: pathlib.Path) -> np.ndarray:
  import pyarrow as pa
  from pyarrow import csv, parquet

  table = csv.read_csv(path) if path.suffix.lower() == '.csv' else parquet.read_table(path)
  other = [f.name for f in table.schema if not (pa.types.is_integer(f.type) or pa.types.is_floating(f.type))]
  if other or not table.num_columns:
    raise ValueError(f'column {other[0]!r} holds no numbers' if other else 'no columns')
  return np.stack([table[name].to_numpy() for name in table.column_names], axis=1)


def labels(image: np.ndarray) -> np.ndarray:
  """[*grid] integers of an image [*grid, C] with equal channels, as of a mask saved in colour."""
  if any(not np.array_equal(image[..., 0], image[..., c]) for c in range(1, image.shape[-1])):
    raise ValueError(f'has {image.shape[-1]} channels: expected one value a pixel')
  mask = image[..., 0]
  if mask.dtype.kind == 'f':
    whole = np.rint(mask)
    if not np.array_equal(whole, mask) or np.abs(whole).max() >= 2**24:
      raise ValueError('its values are no integers')
    low, high = whole.min(), whole.max()
    mask = whole.astype(np.uint8 if low >= 0 and high < 256 else np.int32)
  return np.ascontiguousarray(mask)


def laid_together(masks: Masks, records: Sequence[Record]) -> Record:
  """One mask of the files of a layout, whose records have `image` [*grid] of integers, in their order.

  Raises:
    ValueError: structures on different grids.
  """
  first, out = records[0], records[0]['image']
  if masks.codes:
    return first | {'image': recoded(out, masks.codes)}
  if not masks.values:
    if masks.absent is None or not (out == masks.absent).any():
      return first
    wide = out.astype(np.int16 if out.max() < 2**15 else np.int32)
    return first | {'image': np.where(out == masks.absent, wide.dtype.type(-1), wide)}
  out = np.zeros(out.shape, np.uint8 if max(masks.values) < 256 else np.int16)
  for file, value, record in zip(masks.files, masks.values, records, strict=True):
    if record['image'].shape != out.shape:
      raise ValueError(f'{file.name} has the grid {list(record["image"].shape)}, {masks.files[0].name} '
                       f'{list(out.shape)}')
    out[record['image'] > 0] = value
  return first | {'image': out}


def recoded(mask: np.ndarray, codes: Mapping[int, int]) -> np.ndarray:
  """A mask of other values [*grid]: those that `codes` lead to.

  Raises:
    ValueError: a value that `codes` lack.
  """
  values, places = np.unique(mask, return_inverse=True)
  lost = [int(v) for v in values if int(v) not in codes]
  if lost:
    raise ValueError(f'holds the value {lost[0]}, which the layout does not know: expected '
                     f'{", ".join(map(str, codes))}')
  found = np.array([codes[int(v)] for v in values])
  return found.astype(np.uint8 if found.min() >= 0 and found.max() < 256 else np.int16)[places].reshape(mask.shape)


def packed(image: np.ndarray) -> np.ndarray:
  """Colours [*grid, 3 or 4] uint8 as 65536 R + 256 G + B, int32; of equal channels, or of one, their value."""
  planes = image[..., :3].astype(np.int32)
  if image.shape[-1] < 3 or (planes == planes[..., :1]).all():
    return planes[..., 0]
  return planes @ np.array([65536, 256, 1], np.int32)


def _numbers(values: Sequence[float]) -> str:
  return ', '.join(f'{v:g}' for v in values)
