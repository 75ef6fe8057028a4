"""Windows of a map, shifted or not, and attention within them with a bias of relative position (Liu et al. 2021, Swin).

Maps are [B, *size, D] with two or three axes. All of a window's geometry follows from static sizes, in NumPy.
Definitions: microsoft/Swin-Transformer, models/swin_transformer.py, and Project-MONAI/MONAI, monai/networks/nets/
swin_unetr.py, which reads the bias of a window that is smaller than its table from other offsets (`bias_rows`) and lets
tokens look at the padding (`segments`).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmed.models.layers import kernels
from jaxmed.models.layers.tokens import patchify, unpatchify
from jaxmed.parallel.mesh import platform

CHUNK_BYTES = 2**30  # of logits that attention makes at a time on accelerators; on CPU `kernels.CHUNK_BYTES`
_MASKED, _TINY = -1e30, 1e-30

Size = tuple[int, ...]


def regime(size: Size, window: int) -> tuple[Size, Size]:
  """(window, shift) along each axis: where one window covers the axis it is as long as that, and not shifted."""
  return tuple(min(n, window) for n in size), tuple(0 if n <= window else window // 2 for n in size)


def padded(size: Size, window: Size) -> Size:
  """The size with zeros at the ends, so that windows divide it."""
  return tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))


def pad(x: jax.Array, window: Size) -> jax.Array:
  """x [B, *size, D] with zeros at the ends of its axes -> [B, *padded, D]."""
  size = x.shape[1:-1]
  more = [(0, m - n) for m, n in zip(padded(size, window), size, strict=True)]
  return jnp.pad(x, [(0, 0), *more, (0, 0)]) if any(m for _, m in more) else x


def partition(x: jax.Array, window: Size) -> jax.Array:
  """Cuts x [B, *size, D] into windows [B, W, N, D], row by row, as are the N tokens of each."""
  patches = patchify(x, window)
  return patches.reshape(*patches.shape[:2], math.prod(window), x.shape[-1])


def joined(x: jax.Array, size: Size, window: Size) -> jax.Array:
  """The inverse of `partition`: [B, W, N, D] -> [B, *size, D]."""
  return unpatchify(x.reshape(*x.shape[:2], -1), size, window)


def roll(x: jax.Array, shift: Size, back: bool = False) -> jax.Array:
  """x [B, *size, D] moved by `shift` places towards the start of each axis, or `back`."""
  return jnp.roll(x, [n if back else -n for n in shift], tuple(range(1, x.ndim - 1)))


@functools.lru_cache(maxsize=256)
def segments(size: Size, window: Size, shift: Size, pad_mask: bool) -> np.ndarray:
  """The region of each token of the rolled, padded map in its window, [W, N] int32 from 1.

  Tokens look at those of their region: after the roll a window at the end of an axis holds places from both ends. With
  `pad_mask` padding has region 0, at which nothing looks; without it padding is as any other token (MONAI).
  """
  full, regions, inside = padded(size, window), np.zeros((), np.int32), np.ones((), bool)
  for n, own, w, s in zip(full, size, window, shift, strict=True):
    place = np.arange(n)
    region = (place >= n - w).astype(np.int32) + (place >= n - s) if s else np.zeros(n, np.int32)
    regions = regions[..., None] * 3 + region
    inside = inside[..., None] & ((place + s) % n < own)
  regions = np.where(inside | (not pad_mask), regions + 1, 0)[..., None]
  grid = [m for n, w in zip(full, window, strict=True) for m in (n // w, w)]
  order = [*range(0, 2 * len(full), 2), *range(1, 2 * len(full), 2)]
  return regions.reshape(grid).transpose(order).reshape(-1, math.prod(window)).astype(np.int32)


@functools.lru_cache(maxsize=256)
def bias_rows(window: Size, table: int, exact: bool = True) -> np.ndarray:
  """Row of the table [(2 * table - 1) ** rank, H] of each pair of tokens of a window, [N, N] (query, key).

  A window that is clipped to a small map has fewer offsets than the table. `exact` takes those that the pairs have;
  otherwise they are the first N rows and columns of the whole window's index, as in MONAI, whose offsets are others.
  """
  if not exact:
    count = math.prod(window)
    return bias_rows((table,) * len(window), table)[:count, :count]
  places = np.stack(np.meshgrid(*map(np.arange, window), indexing='ij')).reshape(len(window), -1)
  apart = places[:, :, None] - places[:, None] + table - 1
  return np.ravel_multi_index(tuple(apart), (2 * table - 1,) * len(window))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, segments: jax.Array | None) -> jax.Array:
  """Attention within windows, some windows of each sample at a time where their logits would not fit.

  Args:
    q, k, v: [B, W, H, N, Dh]. bias: [H, N, N] float32, added to the scaled products.
    segments: [B or 1, W, N] int32: a key is looked at by queries of its own segment, and by none where that is 0. None
      for all.
  Returns:
    [B, W, H, N, Dh] in the dtype of v; zero where no key may be looked at. The softmax is taken in float32.
  """
  batch, windows, heads, tokens = q.shape[:4]
  most = kernels.CHUNK_BYTES if platform() == 'cpu' else CHUNK_BYTES
  chunks = next(n for n in range(1, windows + 1)
                if windows % n == 0 and (n == windows or 4 * batch * windows // n * heads * tokens**2 <= most))
  if chunks == 1:
    return _attend(q, k, v, bias, segments)
  cut = lambda x: None if x is None else jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)
  body = jax.checkpoint(lambda _, part: (None, _attend(part[0], part[1], part[2], bias, part[3])))
  out = lax.scan(body, None, (cut(q), cut(k), cut(v), cut(segments)))[1]
  return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _attend(q, k, v, bias, segments):
  logits = jnp.einsum('bwhnd,bwhmd->bwhnm', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5 + bias
  if segments is None:
    weights = jax.nn.softmax(logits)
  else:
    seen = ((segments[..., None] == segments[..., None, :]) & (segments != 0)[..., None, :])[:, :, None]
    logits = jnp.where(seen, logits, _MASKED)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True))) * seen
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), _TINY)
  return jnp.einsum('bwhnm,bwhmd->bwhnd', weights.astype(v.dtype), v)
