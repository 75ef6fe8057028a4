"""Positions of tokens on a grid of any rank: fixed sine-cosine, rotary, and resampled learned tables."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sincos(grid: tuple[int, ...], dim: int) -> np.ndarray:
  """Fixed sine-cosine positions [prod(grid), dim] float32.

  In 2D this is MAE's table (facebookresearch/mae, util/pos_embed.py): the first half of the features encodes the
  last grid axis, the second half the first. Other ranks split the features evenly, last axis first; features that
  do not divide are zero.
  """
  per_axis = dim // (2 * len(grid)) * 2
  coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing='ij'), axis=-1).reshape(-1, len(grid))
  omega = 1.0 / 10000 ** (np.arange(per_axis // 2, dtype=np.float64) / (per_axis / 2))
  parts = []
  for axis in reversed(range(len(grid))):
    angle = coordinates[:, axis : axis + 1] * omega
    parts += [np.sin(angle), np.cos(angle)]
  table = np.concatenate(parts, axis=1)
  return np.pad(table, ((0, 0), (0, dim - table.shape[1]))).astype(np.float32)


def coordinates(grid: tuple[int, ...]) -> np.ndarray:
  """Centres of the grid's cells [prod(grid), rank] float32, each axis scaled to [-1, 1] (as DINOv3's RoPE does)."""
  axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in grid]
  return np.stack(np.meshgrid(*axes, indexing='ij'), axis=-1).reshape(-1, len(grid)).astype(np.float32)


def own_coordinates(grids: jax.Array, most: tuple[int, ...]) -> jax.Array:
  """`coordinates` of samples whose grids [B, rank] lie in the corner of a larger one, [B, prod(most), rank]."""
  cells = jnp.asarray(np.indices(most).reshape(len(most), -1).T)
  return ((cells + 0.5) / jnp.asarray(grids, jnp.float32)[:, None] * 2 - 1).astype(jnp.float32)


def inside(grids: jax.Array, most: tuple[int, ...]) -> jax.Array:
  """Which cells of a grid belong to grids [B, rank] in its corner, [B, prod(most)] bool."""
  cells = jnp.asarray(np.indices(most).reshape(len(most), -1).T)
  return (cells < grids[:, None]).all(axis=-1)


def augment(rng: jax.Array, position: jax.Array, batch: int, shift: float, jitter: float, rescale: float) -> jax.Array:
  """Coordinates [B or 1, N, rank] changed at random for each sample, [B, N, rank]; 0 leaves a change out.

  In this order: each axis moved by U(-shift, shift), scaled log-uniformly in 1/jitter .. jitter, and all axes together
  scaled log-uniformly in 1/rescale .. rescale (facebookresearch/dinov3, layers/rope_position_encoding.py, which draws
  once a block for all samples).
  """
  keys, rank = jax.random.split(rng, 3), position.shape[-1]
  spread = lambda key, axes: jax.random.uniform(key, (batch, 1, axes), minval=-1.0, maxval=1.0)
  position = position + shift * spread(keys[0], rank)
  for key, limit, axes in ((keys[1], jitter, rank), (keys[2], rescale, 1)):
    if limit:
      position = position * jnp.exp(math.log(limit) * spread(key, axes))
  return position


def rotary_angles(position: jax.Array, head_dim: int, base: float) -> jax.Array:
  """Angles [B, N, head_dim // 2] of rotary positions for coordinates [B, N, rank] in [-1, 1].

  Each axis has head_dim // (2 * rank) frequencies with periods base**(2 i / (head_dim / rank)), as in DINOv3
  (dinov3/layers/rope_position_encoding.py) for rank 2; pairs of features that are left over are not rotated.
  """
  rank = position.shape[-1]
  count = head_dim // (2 * rank)
  periods = base ** (np.arange(count) / max(count, 1))
  angles = 2 * math.pi * position[..., :, None] / periods  # [B, N, rank, count]
  angles = angles.reshape(*position.shape[:-1], rank * count)
  return jnp.pad(angles, [(0, 0)] * (angles.ndim - 1) + [(0, head_dim // 2 - rank * count)])


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the feature pairs (i, i + Dh/2) of x [B, N, H, Dh] by angles [B, N, Dh/2], in float32."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def resample(table: jax.Array, old: tuple[int, ...], new: tuple[int, ...], mode: str) -> jax.Array:
  """Resamples a position table [prod(old), D] to [prod(new), D], one axis after the other.

  Args:
    mode: 'antialias' is torch's antialiased bicubic, which timm uses (`resample_abs_pos_embed`); the native size is
      returned as it is. 'offset' is torch's plain bicubic with the scale factor (new + 0.1) / old, which DINO and
      the official ChannelViT use (`interpolate_pos_encoding`); it shifts positions slightly at the native size too.
      'plain' is torch's plain bicubic.
  """
  if mode == 'antialias' and old == new:
    return table
  x = table.reshape(*old, -1)
  for axis, (a, b) in enumerate(zip(old, new, strict=True)):
    weights = jnp.asarray(_bicubic(a, b, mode), x.dtype)
    x = jnp.moveaxis(jnp.tensordot(weights, x, axes=(1, axis)), 0, axis)
  return x.reshape(-1, table.shape[-1])


def resample_each(table: jax.Array, old: tuple[int, ...], grids: jax.Array, most: tuple[int, ...],
                  mode: str) -> jax.Array:
  """`resample` to grids [B, rank] that are not known before, each in the corner of a larger one: [B, prod(most), D].

  What lies outside of a sample's grid means nothing.
  """
  def one(grid):
    x = table.reshape(*old, -1)
    for axis, (a, b) in enumerate(zip(old, most, strict=True)):
      weights = _bicubic_to(a, grid[axis], b, mode).astype(x.dtype)
      x = jnp.moveaxis(jnp.tensordot(weights, x, axes=(1, axis)), 0, axis)
    return x.reshape(-1, table.shape[-1])

  return jax.vmap(one)(grids)


def _bicubic_to(n_in: int, n_out: jax.Array, most: int, mode: str) -> jax.Array:
  """The matrix of `_bicubic` in the first rows of [most, n_in], written for all taps at once."""
  offset, margin = (0.1, 3) if mode == 'offset' else (0.0, 0 if mode == 'antialias' else 3)
  scale = n_in / (n_out.astype(jnp.float32) + offset)
  stretch = jnp.maximum(scale, 1.0) if mode == 'antialias' else 1.0
  centre = (jnp.arange(most) + 0.5) * scale - 0.5
  taps = np.arange(-margin, n_in + margin)
  weights = _cubic(jnp.abs(taps - centre[:, None]) / stretch, -0.5 if mode == 'antialias' else -0.75, jnp)
  weights = jnp.where((jnp.arange(most) < n_out)[:, None], weights, 0.0)
  if mode == 'antialias':
    weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-6)
  border = np.clip(taps, 0, n_in - 1)[:, None] == np.arange(n_in)
  return weights @ border.astype(np.float32)


@functools.lru_cache(maxsize=256)
def _bicubic(n_in: int, n_out: int, mode: str) -> np.ndarray:
  """Matrix [n_out, n_in] of torch's bicubic interpolation along one axis (half-pixel centres)."""
  if mode == 'offset':
    scale, a, stretch = n_in / (n_out + 0.1), -0.75, 1.0
  elif mode == 'plain':
    scale, a, stretch = n_in / n_out, -0.75, 1.0
  elif mode == 'antialias':
    scale, a = n_in / n_out, -0.5
    stretch = max(scale, 1.0)
  else:
    raise ValueError(f'unknown resampling mode {mode!r}')
  centre = (np.arange(n_out) + 0.5) * scale - 0.5
  reach = math.ceil(2 * stretch)
  taps = np.floor(centre)[:, None] + np.arange(-reach, reach + 2)
  weights = _cubic(np.abs(taps - centre[:, None]) / stretch, a)
  matrix = np.zeros((n_out, n_in))
  rows = np.arange(n_out)[:, None]
  if mode == 'antialias':  # taps outside the image are left out, the others are scaled up
    weights = np.where((taps >= 0) & (taps < n_in), weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
  np.add.at(matrix, (rows, np.clip(taps, 0, n_in - 1).astype(int)), weights)  # otherwise they read the border
  return matrix


def _cubic(t: Any, a: float, lib: Any = np) -> Any:
  """Keys' cubic convolution kernel at distance t >= 0."""
  near = ((a + 2) * t - (a + 3)) * t * t + 1
  far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
  return lib.where(t <= 1, near, lib.where(t < 2, far, 0.0))
