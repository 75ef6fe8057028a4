"""Images brought to a spacing in mm: antialiased where that is coarser, linear where it is finer."""

from collections.abc import Sequence

import numpy as np

from jaxmed.data.readers.geometry import shifted
from jaxmed.data.readers.types import BESIDE, Record, check_size
from jaxmed.data.resize import resize

_SAME = 1e-3  # an axis whose spacing is off by less than this share stays as it is


def grid(shape: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]) -> list[int]:
  """The axes of `resampled`: as many pixels of the wanted spacing as the field holds, rounded, at least one."""
  return [n if _same(s, w) else max(1, int(n * s / w + 0.5)) for n, s, w in zip(shape, spacing, wanted)]


def resampled(record: Record, wanted: Sequence[float]) -> Record:
  """The record with pixels (and `mask`) `wanted` mm apart: one number, or one an axis z, y, x.

  New and old grid have the same middle, so that `origin` moves by a part of a pixel. Pixels are weighted by a triangle
  (linear where the new spacing is finer, as many times wider as it is coarser), edges repeated; integers are rounded
  and keep their type. A mask takes the nearest value. Where the spacing is unknown nothing is done, which is noted.

  Raises:
    ValueError: the result would be larger than readers.MAX_BYTES.
  """
  image, spacing, meta = record['image'], record['spacing'], record.get('meta', {})
  if not spacing:
    notes = [*filter(None, [meta.get('notes')]), 'spacing unknown: not resampled']
    return record | {'meta': meta | {'notes': '; '.join(notes)}}
  wanted = for_axes(wanted, len(spacing))
  size = grid(image.shape, spacing, wanted)
  scales = [None if _same(s, w) else w / s for s, w in zip(spacing, wanted)]
  if not any(scales):
    return record
  check_size((*size, image.shape[-1]), np.dtype(np.float32))
  new = [s if scale is None else w for s, w, scale in zip(spacing, wanted, scales)]
  start = [((n - 1) * s - (m - 1) * w) / 2 for n, s, m, w in zip(image.shape, spacing, size, new)]
  out = record | {'image': resize(image, size, scales), 'spacing': [float(w) for w in new]}
  out |= {k: _nearest(record[k], size, scales) for k in BESIDE if k in record}
  return shifted(out, start)


def for_axes(wanted: Sequence[float], rank: int) -> tuple[float, ...]:
  """`wanted` for 2 or 3 axes: one number holds for every axis; of three, the last two are a plane's."""
  return tuple(wanted) * rank if len(wanted) == 1 else tuple(wanted)[-rank:]


def _same(spacing: float, wanted: float) -> bool:
  return abs(wanted - spacing) < _SAME * spacing


def _nearest(mask: np.ndarray, size: Sequence[int], scales: Sequence[float | None]) -> np.ndarray:
  for axis, (wanted, scale) in enumerate(zip(size, scales)):
    if scale:
      length = mask.shape[axis]
      places = np.floor(length / 2 + (np.arange(wanted) + 0.5 - wanted / 2) * scale).astype(int)
      mask = mask.take(places.clip(0, length - 1), axis)
  return mask
