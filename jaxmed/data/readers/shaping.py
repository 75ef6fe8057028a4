"""From what a reader gives to what is stored: masks laid on, spacing, crop, planes, and how much is no background."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxmed.data.readers.companions import masked
from jaxmed.data.readers.content import Box, box, cropped, foreground
from jaxmed.data.readers.spacing import for_axes, grid, resampled
from jaxmed.data.readers.types import BESIDE, Options, Record

_TIME = re.compile(r't\d+$')  # of a part


def shaped(records: Iterable[Record], options: Options, masks: Sequence[Record] = ()) -> Iterator[Record]:
  """Yields records as a corpus stores them, from a reader's records (`volume` marks whole volumes).

  First the mask is laid on (one for all, or one each) and what is not finite filled; then the image is brought to
  `options.spacing`; then it is cropped, all times of a series by the box of the first; then planes are cut. Tiles of
  slides and clips in time keep their grid.

  Raises:
    ValueError: a mask does not fit, or is missing; a channel without a finite pixel has no mean.
  """
  boxes: dict[Any, Box | None] = {}
  for number, record in enumerate(records):
    axis = across(record, options)
    free = _is_free(record)
    record = {k: v for k, v in record.items() if k != 'volume'}
    if masks:
      record = masked(record, masks, number)
    record = _filled(record, options.nan)
    if free and options.spacing:
      record = resampled(record, options.spacing)
    inside = None
    if options.min_content > 0 or (free and options.crop == 'foreground'):
      inside = foreground(record['image'], record['channels'], record.get('meta', {}))
    if free and options.crop == 'foreground' and inside is not None:
      key = (inside.shape, _TIME.sub('', record['part']))
      at = boxes.setdefault(key, box(inside, options.margin))
      record, inside = (cropped(record, at), inside[at]) if at else (record, inside)
    yield from _planes(record, axis, inside if options.min_content > 0 else None)


def across(record: Record, options: Options) -> int | None:
  """The axis that planes are cut across; None where the image stays whole."""
  if not record.get('volume') or options.volumes == 'whole':
    return None
  spacing = record['spacing']
  if options.plane == 'axial' or not spacing or record.get('meta', {}).get('orientation') != 'RAS':
    return 0
  return int(np.argmax(spacing)) if max(spacing) >= 1.2 * min(spacing) else 0


def count(record: Record, options: Options) -> int | None:
  """The number of records that `shaped` makes of one, by its shape alone; None where pixels decide."""
  axis = across(record, options)
  if axis is None:
    return 1
  if options.crop != 'none':
    return None
  shape, spacing = record['image'].shape[:-1], record['spacing']
  if options.spacing and spacing:
    shape = grid(shape, spacing, for_axes(options.spacing, len(spacing)))
  return int(shape[axis])


def _is_free(record: Record) -> bool:
  """Whether the image may get another grid: not tiles, whose size is chosen, nor clips [T, H, W, C]."""
  return 'tile_xy' not in record.get('meta', {}) and bool(record.get('volume') or record['image'].ndim == 3)


def _planes(record: Record, axis: int | None, inside: np.ndarray | None) -> Iterator[Record]:
  """An image whole, or the planes across an axis of a volume: parts 'z000', 'z001' ... of a number of z each, or [D, W,
  C] of y or [D, H, C] of x. A part that the record has already goes before: 't002z000'. `inside` is what is no
  background of the image, and `content` becomes its share."""
  if axis is None:
    yield _counted(record | ({} if inside is None else {'content': float(inside.mean())}))
    return
  spacing = record['spacing'] and [s for i, s in enumerate(record['spacing']) if i != axis]
  number = record['image'].shape[axis]
  width = max(3, len(str(number - 1)))
  for i in range(number):
    out = record | {'image': record['image'].take(i, axis), 'spacing': spacing,
                    'part': f'{record["part"]}{"zyx"[axis]}{i:0{width}d}'}
    out |= {k: record[k].take(i, axis) for k in BESIDE if k in record}
    if inside is not None:
      out['content'] = float(inside.take(i, axis).mean())
    yield _counted(out)


def _filled(record: Record, how: str) -> Record:
  """The record with finite pixels; `filled` [*grid, C] says which of them were not, where there are such."""
  image = record['image']
  if how == 'refuse' or image.dtype.kind != 'f' or np.isfinite(image).all():
    return record
  bad = ~np.isfinite(image)
  image = np.where(bad, np.float32(0), image)
  for c, name in enumerate(record['channels'] if how == 'mean' else ()):
    here = bad[..., c]
    if here.all():
      raise ValueError(f'channel {name} has no finite pixel, so no mean: expected one, or --nan 0')
    image[here, c] = image[..., c].sum(dtype=np.float64) / (here.size - int(here.sum()))
  return record | {'image': image, 'filled': bad}


def _counted(record: Record) -> Record:
  """The record with the number of its pixels that were filled in `meta`."""
  bad = record.pop('filled', None)
  if bad is None or not bad.any():
    return record
  return record | {'meta': record.get('meta', {}) | {'nan_filled': int(bad.sum())}}
