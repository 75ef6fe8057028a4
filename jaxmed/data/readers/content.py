"""What of an image is not background, and the box around it.

Background is, by a rule for each kind of image:
  CT in Hounsfield units      at most -500 HU
  colour (channels R, G, B)   nearly black or nearly white: all channels below 8 %, or above 86 %, of the type's range
  all else                    at most the level half way between the median of what lies below Otsu's threshold and that
                              threshold, of the volume (not the slice); of several channels, of their mean after each
                              was scaled to its smallest value and its 99.9th percentile
An image of one value is background. Noise alone is not told from content, unless slices with content lie beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.data.readers.geometry import shifted
from jaxmed.data.readers.slide import otsu
from jaxmed.data.readers.types import BESIDE, Record

CT_AIR = -500  # HU
BLACK, WHITE = 0.08, 0.86
# Of the largest piece of foreground, by axes of the image: smaller pieces do not widen the box. In a volume these are
# the table and the cables; in a plane they may be cells.
PIECE = {2: 0.01, 3: 0.2}
_SAMPLES = 1 << 20  # of the pixels that a threshold is found from

Box = tuple[slice, ...]


def foreground(image: np.ndarray, channels: Sequence[str], meta: dict[str, Any]) -> np.ndarray:
  """[*grid] bool of an image [*grid, C]: see the module's docstring."""
  if meta.get('intensity') == 'hu':
    return image[..., 0] > CT_AIR
  if list(channels) == ['R', 'G', 'B']:
    top = float(np.iinfo(image.dtype).max) if image.dtype.kind in 'iu' else max(1.0, float(image.max()))
    return (image.max(axis=-1) >= BLACK * top) & (image.min(axis=-1) <= WHITE * top)
  value = _one_value(image)
  sample = _sample(value)
  if sample.min() == sample.max():
    return value != sample[0]
  threshold = otsu(sample)
  return value > (float(np.median(sample[sample <= threshold])) + threshold) / 2


def box(inside: np.ndarray, margin: int) -> Box | None:
  """The box around the pieces of a foreground [*grid] that are not small, `margin` pixels wider; None where there is
  no foreground."""
  from scipy import ndimage

  labels, count = ndimage.label(inside)
  if not count:
    return None
  sizes = np.bincount(labels.ravel())[1:]
  boxes = ndimage.find_objects(labels)
  kept = [boxes[i] for i in np.flatnonzero(sizes >= PIECE[inside.ndim] * sizes.max())]
  return tuple(slice(max(0, min(b[a].start for b in kept) - margin), min(n, max(b[a].stop for b in kept) + margin))
               for a, n in enumerate(inside.shape))


def cropped(record: Record, at: Box) -> Record:
  """The part of a record's image (and mask) in a box; `origin` moves with it."""
  out = record | {k: record[k][at] for k in ('image', *BESIDE) if k in record}
  spacing = record['spacing']
  return shifted(out, [s.start * d for s, d in zip(at, spacing)] if spacing else None)


def _one_value(image: np.ndarray) -> np.ndarray:
  """[*grid] float32: the mean of the channels; several channels are each scaled to [0, 1] first."""
  if image.shape[-1] == 1:
    return image[..., 0].astype(np.float32)
  total = np.zeros(image.shape[:-1], np.float32)
  for c in range(image.shape[-1]):
    sample = _sample(image[..., c])
    low, high = float(sample.min()), float(np.percentile(sample, 99.9))
    total += ((image[..., c].astype(np.float32) - low) / max(high - low, 1e-12)).clip(0, 1)
  return total / image.shape[-1]


def _sample(values: np.ndarray) -> np.ndarray:
  flat = values.reshape(-1)
  return flat[::max(1, flat.size // _SAMPLES) | 1]  # odd: an even step may hit the same columns in every row
