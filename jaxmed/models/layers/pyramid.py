"""Maps of several strides for decoders: which levels of an encoder, a pyramid of one grid, and resizing between grids.

Maps are [B, *size, D], in order from fine to coarse.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmed.contracts import Encoder
from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.models.layers.convolution import Hierarchical
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.models.layers.unet_blocks import Up

Size = tuple[int, ...]


def of_one_grid(encoder: Encoder) -> bool:
  """Whether all levels of an encoder have one grid, as a transformer's have."""
  return not isinstance(encoder, Hierarchical)


def evenly(depth: int, count: int) -> tuple[int, ...]:
  """Blocks at equal distances, the last one last: (3, 6, 9, 12) for 12 and 4; 1 is the first block."""
  return tuple(max(1, round(depth * i / count)) for i in range(1, count + 1))


def four_levels(encoder: Encoder) -> tuple[int, ...]:
  """The last four stages of a hierarchical encoder, or as many as it has; four blocks at equal distances of another."""
  last = encoder.num_levels
  return evenly(last, 4) if of_one_grid(encoder) else tuple(range(max(1, last - 3), last + 1))


def all_levels(encoder: Encoder, decoder: str, instead: str) -> tuple[int, ...]:
  """All stages of a hierarchical encoder, and the stem where it is finer than they, for a decoder with skips.

  Raises:
    UserError: an encoder whose maps have one size; names what to choose `instead`.
  """
  if of_one_grid(encoder):
    raise UserError(f'the decoder {decoder} needs maps of several sizes, and those of {type(encoder).__name__} have '
                    f'one: choose {instead}')
  return tuple(range(0 if getattr(encoder, 'stem_level', False) else 1, encoder.num_levels + 1))


def doublings(size: Size, grid: Size) -> list[Size]:
  """Strides by which a grid grows to an image, the finest step first; an axis doubles in as many steps as it needs.

  Raises:
    UserError: the cells of the grid are no powers of two.
  """
  cells = [n // g for n, g in zip(size, grid, strict=True)]
  if any(n % g or c & (c - 1) for n, g, c in zip(size, grid, cells, strict=True)) or max(cells) < 2:
    raise UserError(f'patches of {"x".join(map(str, cells))} do not grow to the image in steps of two: expected powers '
                    'of two, such as 8 or 16')
  return [tuple(2 if c % 2 ** (j + 1) == 0 else 1 for c in cells) for j in range(max(cells).bit_length() - 1)]


def growth(fine: jax.Array, coarse: jax.Array, decoder: str) -> Size:
  """How many times larger the first map [B, *size, D] is along each axis, for a decoder of that name.

  Raises:
    UserError: a size that the other does not divide.
  """
  sizes = list(zip(fine.shape[1:-1], coarse.shape[1:-1], strict=True))
  if any(a % b for a, b in sizes):
    raise UserError(f'the decoder {decoder} cannot enlarge a map of {coarse.shape[1:-1]} to {fine.shape[1:-1]}: '
                    'expected whole factors')
  return tuple(a // b for a, b in sizes)


def each_level(option: str, values: tuple, count: int) -> tuple:
  """An option of a decoder with an entry for each of `count` stages, or (); a UserError for another number."""
  if len(values) not in (0, count):
    raise UserError(f'decoder.{option} has {len(values)} entries: expected one for each of {count} stages')
  return values


class Pyramid(nn.Module):
  """Four maps of one grid [B, *grid, D] -> maps at 4, 2, 1 and 1/2 of it.

  Transposed convolutions, a batch norm and GELU between two of them, and a max-pool of two (open-mmlab/mmsegmentation,
  mmseg/models/necks/featurepyramid.py). A grid of one place along an axis is not halved.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    finest, fine, middle, coarse = maps
    two = (2,) * (middle.ndim - 2)
    up = lambda x, name: Up(x.shape[-1], two, 'transposed', self.dtype, True, 'torch', name=name)(x)
    finest = kernels.gelu(BatchNorm(dtype=self.dtype, name='norm')(up(finest, 'up4_first'), train))
    if min(coarse.shape[1:-1]) > 1:
      coarse = lax.reduce_window(coarse, -jnp.inf, lax.max, (1, *two, 1), (1, *two, 1), 'VALID')
    return up(finest, 'up4_second'), up(fine, 'up2'), middle, coarse


def resize(x: jax.Array, size: Size) -> jax.Array:
  """Linear interpolation to [B, *size, D] between the centres of places (align_corners=False), not antialiased."""
  if x.shape[1:-1] == tuple(size):
    return x
  return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), 'linear', antialias=False)


def resize_corners(x: jax.Array, size: Size) -> jax.Array:
  """Linear interpolation to [B, *size, D] that leaves the corners where they are (align_corners=True)."""
  for axis, n in enumerate(size, 1):
    have = x.shape[axis]
    if have == n:
      continue
    place = np.arange(n) * ((have - 1) / max(n - 1, 1))
    low = np.minimum(place.astype(int), max(have - 2, 0))
    share = jnp.asarray(place - low, jnp.float32).reshape(-1, *[1] * (x.ndim - 1 - axis)).astype(x.dtype)
    x = jnp.take(x, low, axis) * (1 - share) + jnp.take(x, np.minimum(low + 1, have - 1), axis) * share
  return x


def nearest(x: jax.Array, size: Size) -> jax.Array:
  """The place floor(i * old / new) of each axis (PyTorch's 'nearest'): [B, *size, D]."""
  for axis, n in enumerate(size, 1):
    if x.shape[axis] != n:
      x = jnp.take(x, np.arange(n) * x.shape[axis] // n, axis)
  return x


def pool(x: jax.Array, count: int) -> jax.Array:
  """Means over `count` parts of each axis, which overlap where they do not divide it (PyTorch's AdaptiveAvgPool)."""
  for axis in range(1, x.ndim - 1):
    n = x.shape[axis]
    weights = np.zeros((count, n), np.float32)
    for i in range(count):
      start, end = i * n // count, -(-(i + 1) * n // count)
      weights[i, start:end] = 1 / (end - start)
    x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(weights, x.dtype), ((axis,), (1,))), -1, axis)
  return x
