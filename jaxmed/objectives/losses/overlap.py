"""Losses that say where a crop lies by how much it overlaps others (VoCo, Wu et al. 2024; Luffy03/VoCo and
Luffy03/Large-Scale-Medical, models/voco_head.py), as pure functions in float32."""

import jax
import jax.numpy as jnp

from jaxmed.models.layers.norm import normalize
from jaxmed.objectives.losses.matching import dot

NEGATIVES = ('log', 'square')  # of the second and of the first release
TINY = 1e-6  # in logarithms and divisors of both releases


def shares(crops: jax.Array, bases: jax.Array) -> jax.Array:
  """The part of each crop that lies in each base, [B, Q, K] in 0 .. 1; along a row 1 where bases tile the array.

  Args:
    crops, bases: boxes [B, Q, 2 * rank] and [B, K, 2 * rank], starts then ends along each axis.
  """
  rank = crops.shape[-1] // 2
  crop, base = crops[:, :, None].astype(jnp.float32), bases[:, None].astype(jnp.float32)
  low = jnp.maximum(crop[..., :rank], base[..., :rank])
  high = jnp.minimum(crop[..., rank:], base[..., rank:])
  whole = jnp.prod(crop[..., rank:] - crop[..., :rank], axis=-1)
  return jnp.prod(jnp.maximum(high - low, 0), axis=-1) / jnp.maximum(whole, TINY)


def likeness(crops: jax.Array, bases: jax.Array) -> jax.Array:
  """max(0, cosine) of vectors [B, Q, D] and [B, K, D], [B, Q, K]."""
  return jax.nn.relu(dot('bqd,bkd->bqk', normalize(crops), normalize(bases)))


def position(predicted: jax.Array, wanted: jax.Array, negative: str = 'log') -> tuple[jax.Array, jax.Array]:
  """(positive, negative) loss of each sample, [B] each, of shares [B, Q, K] that are predicted and wanted.

  The positive one is the mean of -log(1 - |wanted - predicted|), weighted by what is wanted. The negative one is over
  the pairs that do not touch: the mean of -log(1 - predicted), or with 'square' of its square.
  """
  apart = jnp.abs(wanted - predicted)
  positive = -(wanted * jnp.log(1 - apart + TINY)).sum(axis=(1, 2)) / (wanted.sum(axis=(1, 2)) + TINY)
  away = (wanted == 0).astype(jnp.float32)
  cost = jnp.square(predicted) if negative == 'square' else -jnp.log(1 - predicted + TINY)
  return positive, (away * cost).sum(axis=(1, 2)) / (away.sum(axis=(1, 2)) + TINY)


def alike(bases: jax.Array, counts: jax.Array | None = None) -> jax.Array:
  """Mean over pairs i < j of max(0, cos(b_i, b_j))^2 of bases [B, K, D], [B].

  No gradient reaches the second of a pair, as in both releases: the last base has none from here.

  Args:
    counts: [B, K] bool, the bases that count (two crops of nothing but air are alike whatever is learned); None for
      all.
  """
  x = normalize(bases)
  cosine = jax.nn.relu(dot('bid,bjd->bij', x, jax.lax.stop_gradient(x)))
  pairs = jnp.triu(jnp.ones(cosine.shape[1:], bool), 1)[None]
  if counts is not None:
    pairs = pairs & counts[:, :, None] & counts[:, None]
  total = jnp.broadcast_to(pairs, cosine.shape).sum(axis=(1, 2))
  return jnp.where(pairs, jnp.square(cosine), 0).sum(axis=(1, 2)) / jnp.maximum(total, 1)
