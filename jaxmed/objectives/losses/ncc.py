"""Losses of two images that a displacement brings together: local correlation, cosine of features, smoothness.

GEMINI (He et al. 2025; YutingHe-list/GEMINI, GEMINI_SS_MIP/utils/losses3d.py), as pure functions in float32. All are
given the pixels that count, so that images may be smaller than their arrays.
"""

import jax
import jax.numpy as jnp

from jaxmed.models.layers.norm import normalize

EPSILON = 1e-5  # beside the product of two sums of squares


def window_sums(x: jax.Array, window: int) -> jax.Array:
  """Sums of x [B, *size, C] over the `window` (odd) pixels along each axis around each one that lie in the array."""
  for axis in range(1, x.ndim - 1):
    shape = tuple(window if a == axis else 1 for a in range(x.ndim))
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1,) * x.ndim, 'SAME')
  return x


def ncc(a: jax.Array, b: jax.Array, counts: jax.Array, window: int = 9, zero_pad: bool = False) -> jax.Array:
  """Squared correlation [B, *size, C] of a and b [B, *size, C] in windows, 0 to 1; 0 where one of them is constant.

  Args:
    counts: [B, *size, 1] of 0 and 1, the pixels that windows are made of: at a border a window has fewer.
    zero_pad: every window has window^rank pixels, and those outside are 0, as in the published code. There an image and
      a multiple of it plus a constant are unlike at the border.
  """
  x, y = a * counts, b * counts
  if zero_pad:
    n = jnp.float32(window ** (a.ndim - 2))
  else:  # means do not matter but to rounding
    n = jnp.maximum(window_sums(counts, window), 1)
    total = lambda z: z.sum(axis=tuple(range(1, z.ndim - 1)), keepdims=True)
    x, y = ((z - total(z) / jnp.maximum(total(counts), 1)) * counts for z in (x, y))
  sums = lambda z: window_sums(z, window)
  sx, sy = sums(x), sums(y)
  cross = sums(x * y) - sx * sy / n
  spread = lambda z, s: jnp.maximum(sums(z * z) - s * s / n, 0)
  return cross * cross / (spread(x, sx) * spread(y, sy) + EPSILON)


def mean_of(x: jax.Array, counts: jax.Array) -> jax.Array:
  """Mean [B] of x [B, ...] over the places that count, broadcastable to x; 0 where there is none."""
  counts = jnp.broadcast_to(counts, x.shape).astype(jnp.float32)
  axes = tuple(range(1, x.ndim))
  return jnp.where(counts > 0, x * counts, 0).sum(axis=axes) / jnp.maximum(counts.sum(axis=axes), 1)


def apart(a: jax.Array, b: jax.Array, counts: jax.Array) -> jax.Array:
  """1 minus the mean cosine of vectors a and b [B, *size, D] at the places [B, *size, 1] that count, [B]."""
  return 1 - mean_of((normalize(a) * normalize(b)).sum(axis=-1, keepdims=True), counts)


def smoothness(flow: jax.Array, counts: jax.Array) -> jax.Array:
  """Mean over axes, components and places of squared forward differences of a flow [B, *size, rank], [B].

  Args:
    counts: [B, *size, 1] of 0 and 1; a difference counts where both of its pixels do.
  """
  rank, out = flow.shape[-1], []
  for axis in range(1, rank + 1):
    end = flow.shape[axis]
    (next_flow, next_counts), (this_flow, this_counts) = (
        [jax.lax.slice_in_dim(x, first, end - 1 + first, axis=axis) for x in (flow, counts)] for first in (1, 0))
    out.append(mean_of(jnp.square(next_flow - this_flow), next_counts * this_counts))
  return sum(out, jnp.zeros(len(flow))) / rank
