"""Losses of records that have two vectors, such as an image and its text: which two belong to each other.

Pure functions in float32 over the global batch. The vectors [B, D] of one kind are visited some at a time, so that no
device holds [B, B] logits (`contrast.log_partition`). Pairs whose `counts` [B] bool is False, as of a record without a
text, are neither queries nor candidates.
"""

import functools

import jax
import jax.numpy as jnp

from jaxmed.models.layers.norm import normalize
from jaxmed.objectives.losses.contrast import OUT, chunked, log_partition, over_chunks

MARGIN = 1e-4  # of cosines; rounding alone makes no pair the nearest, so a collapsed batch has an accuracy of 0

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def clip(first: jax.Array, second: jax.Array, logit_scale: jax.Array, counts: jax.Array | None = None,
         weight: float = 0.5, chunk: int = -1) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """InfoNCE both ways with cosines times exp(logit_scale) (Radford et al. 2021; open_clip, src/open_clip/loss.py).

  With l_ij = exp(logit_scale) cos(u_i, v_j), the mean over i of w (logsumexp_j l_ij - l_ii) + (1 - w) (logsumexp_j l_ji
  - l_ii). A w of 1/2 is CLIP's; ConVIRT's lambda is w, 0.75 for images (Zhang et al. 2022).

  Args:
    first, second: u and v, [B, D], not normalised.
    counts: [B] bool, pairs that count; None for all.
    weight: w, of first to second.
    chunk: so many candidates at a time, see `contrast.log_partition`.
  Returns:
    The loss, and the accuracies from first to second and back: the share of pairs nearer than any other candidate.
  """
  u, v, scale = normalize(first), normalize(second), jnp.exp(logit_scale)
  positive = scale * (u * v).sum(axis=-1)

  def search(queries, keys):
    others, top = log_partition(queries, keys, 1 / scale, jnp.arange(len(keys)), chunk, counts)
    return jnp.logaddexp(others, positive) - positive, _nearest(positive, top, scale, counts)

  (there, right), (back, right_back) = search(u, v), search(v, u)
  return _mean(weight * there + (1 - weight) * back, counts), (right, right_back)


def siglip(first: jax.Array, second: jax.Array, logit_scale: jax.Array, bias: jax.Array,
           counts: jax.Array | None = None, chunk: int = -1) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Whether two belong to each other, asked of every two (Zhai et al. 2023, algorithm 1).

  With l_ij = exp(logit_scale) cos(u_i, v_j) + bias, the sum over i and j of softplus(-l_ij) where i = j and of
  softplus(l_ij) elsewhere, by B and not by its square (google-research/big_vision, trainers/proj/image_text/siglip.py).

  Args and returns are as of `clip`.
  """
  u, v, scale = normalize(first), normalize(second), jnp.exp(logit_scale)
  rows = jnp.ones(len(u), bool) if counts is None else counts

  def visit(carry, block):
    cost, top = carry
    keys, there, column = block
    logits = scale * _dot('nd,md->nm', u, keys) + bias
    own, real = column == jnp.arange(len(u))[:, None], rows[:, None] & there
    cost = cost + jnp.where(real, jax.nn.softplus(jnp.where(own, -logits, logits)), 0).sum(axis=1)
    others = jnp.where(real & ~own, jax.lax.stop_gradient(logits), OUT)
    return (cost, jnp.maximum(top, others.max(axis=1))), others.max(axis=0)

  start = jnp.zeros(len(u)), jnp.full(len(u), OUT)
  (cost, top), top_back = over_chunks(visit, start, chunked(v, counts, chunk))
  positive = scale * (u * v).sum(axis=-1) + bias
  right = (_nearest(positive, best, scale, counts) for best in (top, top_back.reshape(-1)[:len(u)]))
  return _mean(cost, counts), (next(right), next(right))


def _nearest(positive: jax.Array, top: jax.Array, scale: jax.Array, counts: jax.Array | None) -> jax.Array:
  """The share of pairs whose logit is larger than the largest other one."""
  right = positive > top + MARGIN * scale
  return jax.lax.stop_gradient(_mean(right.astype(jnp.float32), counts))


def _mean(x: jax.Array, counts: jax.Array | None) -> jax.Array:
  """The mean of x [B] over the pairs that count."""
  return x.mean() if counts is None else jnp.where(counts, x, 0).sum() / jnp.maximum(counts.sum(), 1)
