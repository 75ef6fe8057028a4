"""Antialiased resizing of images of any rank, one axis after the other."""

import functools
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=256)
def weights(length: int, size: int) -> np.ndarray:
  """The matrix [size, length] float32 that resamples an axis with a triangle filter.

  Output pixel i is centred on (i + 0.5) * length / size; when shrinking, the triangle is as many times wider
  as the axis shrinks (Pillow's BILINEAR, bilinear with antialiasing elsewhere). Rows sum to 1, so that edges
  keep their brightness.
  """
  scale = length / size
  centres = (np.arange(size) + 0.5) * scale
  distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1.0)
  matrix = np.maximum(0.0, 1.0 - distance)
  matrix = (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
  matrix.flags.writeable = False
  return matrix


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes an image [*grid, C] to [*size, C] by a triangle filter in float32, each channel on its own.

  Integers are rounded (half to even) and keep their type; of 32-bit ones the first 24 bits count. The image itself is returned when it fits already.

  Raises:
    ValueError: `size` has another rank than the grid.
  """
  size = tuple(size)
  if len(size) != image.ndim - 1:
    raise ValueError(f'size {size} does not have the rank of the grid {image.shape[:-1]}')
  if image.shape[:-1] == size:
    return image
  out = image.astype(np.float32)
  # The axes that shrink most come first: less is left for the others to do.
  for axis in sorted(range(len(size)), key=lambda a: size[a] / image.shape[a]):
    if out.shape[axis] != size[axis]:
      lead, tail = out.shape[:axis], out.shape[axis + 1:]
      flat = out.reshape(int(np.prod(lead)), out.shape[axis], int(np.prod(tail)))
      out = np.matmul(weights(out.shape[axis], size[axis]), flat).reshape(*lead, size[axis], *tail)
  if image.dtype.kind in 'iu':
    info = np.iinfo(image.dtype)
    # float32 has no largest int32; float64 has.
    out = np.clip(np.rint(out.astype(np.float64)), info.min, info.max)
  return out.astype(image.dtype)
