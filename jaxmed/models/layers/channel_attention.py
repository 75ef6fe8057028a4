"""Attention over channel tokens whose cost does not grow with the square of the channels.

Tokens stand as in ChannelViT: prefix tokens, then all patches of the first channel, then of the second. With C channels
of N patches joint attention compares (C N)^2 pairs. The others have the same parameters, so weights go from one to
another; prefix tokens see every token, and every token sees them, in all of them:

  factorised  half of the heads within a channel, the other half across channels at a position (the factorised
              dot-product attention of ViViT, arXiv 2103.15691, model 4): C N (N + C) / 2 pairs.
  pooled      keys and values are means over the channels at a position: C N^2.
  shared      one query a position, the mean over channels, whose answer goes to each of them: C N^2.

A mean is over the channels that are there. With one channel 'pooled' and 'shared' are joint attention.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.parallel.mesh import axis_size

KINDS = ('joint', 'factorised', 'pooled', 'shared')
TokenOrder = tuple[str, int, int]  # a kind, channels, prefix tokens
Part = tuple[jax.Array, jax.Array]


def token_order(kind: str, grid: tuple[int, ...], prefix: int) -> TokenOrder | None:
  """What `attend` must know of rows of tokens [prefix + C * N], with grid (C, *); None for joint attention.

  Raises:
    UserError: tokens without a grid, as methods have that show the encoder some of them only.
  """
  if kind == 'joint':
    return None
  if not grid:
    raise UserError(f'encoder.channel_attention={kind} needs all patches of every channel, but the method leaves some '
                    'out: take joint, or a method that hides patches by a token (simmim, ibot, dinov2)')
  if axis_size('sequence') > 1:
    raise UserError(f'encoder.channel_attention={kind} does not work over mesh.sequence: take joint')
  return kind, grid[0], prefix


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, form: str, order: TokenOrder) -> jax.Array:
  """Attention [B, P + C * N, H, Dh] of rows to themselves; mask [B, P + C * N] bool or None, form of the kernel."""
  kind, channels, prefix = order
  mask = jnp.ones(q.shape[:2], bool) if mask is None else mask
  first = kernels.attention(q[:, :prefix], k, v, mask, form)
  rows = Rows(*((x[:, :prefix], x[:, prefix:].reshape(len(x), channels, -1, *x.shape[2:])) for x in (q, k, v, mask)))
  shape = rows.q[1].shape
  if kind == 'factorised':
    half = q.shape[2] // 2
    rest = jnp.concatenate([_within(rows.heads(0, half), form), _across(rows.heads(half, None), form)], axis=3)
  elif kind == 'pooled':
    there = rows.mask[1]  # [B, C, N]
    pool = lambda part: (part[0], _mean(part[1], there))
    few = Rows(rows.q, pool(rows.k), pool(rows.v), (rows.mask[0], there.any(axis=1)))
    rest = _keyed(few, rows.q[1].reshape(len(q), -1, *shape[3:]), form)
  else:
    one = kernels.attention(_mean(rows.q[1], rows.mask[1]), k, v, mask, form)  # [B, N, H, Dh]
    rest = jnp.broadcast_to(one[:, None], shape)
  return jnp.concatenate([first, rest.reshape(len(q), -1, *shape[3:])], axis=1)


class Rows(NamedTuple):
  """Operands as (prefix [B, P, ...], patches [B, C, N, ...])."""

  q: Part
  k: Part
  v: Part
  mask: Part

  def heads(self, low: int, high: int | None) -> 'Rows':
    """Some of the heads."""
    some = lambda part: (part[0][:, :, low:high], part[1][:, :, :, low:high])
    return Rows(some(self.q), some(self.k), some(self.v), self.mask)


def _within(rows: Rows, form: str) -> jax.Array:
  """Each channel by itself -> [B, C, N, H, Dh]."""
  batch, channels = rows.q[1].shape[:2]
  each = Rows(*((jnp.repeat(a, channels, axis=0), b.reshape(batch * channels, *b.shape[2:])) for a, b in rows))
  return _keyed(each, each.q[1], form).reshape(rows.q[1].shape)


def _across(rows: Rows, form: str) -> jax.Array:
  """Each position by itself, across channels; as `_within`."""
  return _within(Rows(*((a, b.swapaxes(1, 2)) for a, b in rows)), form).swapaxes(1, 2)


def _keyed(rows: Rows, q: jax.Array, form: str) -> jax.Array:
  """Attention of queries [B, M, H, Dh] to the prefix [B, P, ...] and patches [B, N, ...] of rows."""
  k, v, mask = (jnp.concatenate(part, axis=1) for part in (rows.k, rows.v, rows.mask))
  return kernels.attention(q, k, v, mask, form)


def _mean(x: jax.Array, there: jax.Array) -> jax.Array:
  """Mean over the channels of [B, C, N, H, Dh] that are there [B, C, N]; zero where none is."""
  weight = there[..., None, None].astype(x.dtype)
  return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
