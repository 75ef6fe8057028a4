"""Antialiased resizing of images of any rank, one axis after the other; of masks to the nearest label."""

import functools
from collections.abc import Sequence

import numpy as np
from scipy import sparse


@functools.lru_cache(maxsize=256)
def weights(length: int, size: int, scale: float | None = None, antialias: bool = True) -> sparse.csr_array:
  """The sparse matrix [size, length] float32 that resamples an axis with a triangle filter.

  Output pixel i is centred on (i + 0.5) * length / size; when shrinking, the triangle is as many times wider as the
  axis shrinks (Pillow's BILINEAR, bilinear with antialiasing elsewhere), unless `antialias` is off. With `scale`,
  pixels are that many of the old ones apart, around the same middle. Rows sum to 1, so edges keep their brightness.
  """
  centres = (np.arange(size) + 0.5) * (length / size)
  if scale is None:
    scale = length / size
  else:
    centres = length / 2 + (np.arange(size) + 0.5 - size / 2) * scale
  distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / (max(scale, 1.0) if antialias else 1.0)
  matrix = np.maximum(0.0, 1.0 - distance)
  return sparse.csr_array((matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32))


def resize(image: np.ndarray, size: Sequence[int], scales: Sequence[float | None] | None = None) -> np.ndarray:
  """Resizes an image [*grid, C] to [*size, C] by a triangle filter in float32, channel by channel.

  `scales` says for each axis how many old pixels the new ones are apart (see `weights`); where it is None, old and new
  grid cover the same field. Integers are rounded (half to even) and keep their type; of 32-bit ones the first 24 bits
  count. The image itself is returned when it fits already.

  Raises:
    ValueError: `size` has another rank than the grid.
  """
  size = tuple(size)
  if len(size) != image.ndim - 1:
    raise ValueError(f'size {size} does not have the rank of the grid {image.shape[:-1]}')
  if image.shape[:-1] == size and not any(scales or ()):
    return image
  out = image.astype(np.float32)
  for axis, wanted in enumerate(size):
    scale = scales[axis] if scales else None
    # The first axis is resampled and becomes the grid's last: after all of them the order is the old one.
    # A few weights a row: the sparse product is ten times faster than a dense one, and starts no threads.
    if scale or len(out) != wanted:
      out = (weights(len(out), wanted, scale) @ out.reshape(len(out), -1)).reshape(wanted, *out.shape[1:])
    out = np.moveaxis(out, 0, -2)
  if image.dtype.kind in 'iu':
    info = np.iinfo(image.dtype)
    # float32 has no largest int32; float64 has.
    wide = out if image.dtype.itemsize < 4 else out.astype(np.float64)
    out = np.clip(np.rint(wide), info.min, info.max)
  return np.ascontiguousarray(out, image.dtype)


def nearest(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes integers [*grid] to [*size] over the same field: output pixel i has what lies at its centre.

  That is input pixel floor((i + 0.5) * length / size), as `resize` centres its pixels.

  Raises:
    ValueError: `size` has another rank than the grid.
  """
  if len(size) != mask.ndim:
    raise ValueError(f'size {tuple(size)} does not have the rank of the grid {mask.shape}')
  places = [(2 * np.arange(n) + 1) * length // (2 * n) for n, length in zip(size, mask.shape)]
  return mask[np.ix_(*places)]
