"""Losses of records that have two vectors, such as an image and its text: which two belong to each other.

Pure functions in float32 over the global batch. The vectors [B, D] of one kind are visited some at a time, so that no
device holds [B, B] logits (`contrast.log_partition`). Pairs whose `counts` [B] bool is False, as of a record without a
text, are neither queries nor candidates.
"""

import functools
from collections.abc import Callable
from typing import Any

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


def weighted(queries: jax.Array, keys: jax.Array, scale: jax.Array | float,
             weights: Callable[[Any, jax.Array], jax.Array], along: Any, counts: jax.Array | None = None,
             chunk: int = -1) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the softmax over keys to any weights: sum_j T_ij (logsumexp_k l_ik - l_ij), and sum_j T_ij.

  l_ij = scale u_i . v_j; CLIP is T = 1. One minus entropies of T is left out, which has no gradient.

  Args:
    queries, keys: u and v, [B, D], as they are.
    weights: (of `along`, the part of a chunk [n, ...]; the numbers of its keys [n]) -> T [B, n].
    along: arrays [B, ...] of keys that tell their weights.
    counts, chunk: as of `clip`.
  Returns:
    Both [B]; 0 where a query has no weight.
  """
  blocks = chunked(keys, counts, chunk)
  count, size = blocks[2].shape
  fill = lambda x: jnp.pad(x, [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])

  def visit(carry, block):
    log_sum, agreement, total = carry
    (keys, there, column), told = block
    logits = jnp.where(there, scale * _dot('nd,md->nm', queries, keys), OUT)
    share = jnp.where(there, weights(told, column), 0)
    log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(logits, axis=1))
    return (log_sum, agreement + (share * jnp.where(there, logits, 0)).sum(axis=1), total + share.sum(axis=1)), None

  zero = jnp.zeros(len(queries))
  start = jnp.full(len(queries), OUT), zero, zero
  log_sum, agreement, total = over_chunks(visit, start, (blocks, jax.tree.map(fill, along)))[0]
  return total * log_sum - agreement, total


def unicl(first: jax.Array, second: jax.Array, logit_scale: jax.Array, same: jax.Array, counts: jax.Array | None = None,
          chunk: int = -1) -> jax.Array:
  """Label-aware contrast: all pairs of one class are positives of each other (Yang et al. 2022, UniCL, algorithm 1).

  Half of the means over i of -1 / |T_i| sum_j T_ij log softmax_j(l_ij) both ways, T_ij = 1 where `same` is equal. CLIP
  where all differ. The published code holds no loss (microsoft/UniCL).

  Args:
    same: [B, K] int, the class of each pair in any numbers; others are as of `clip`.
  """
  u, v, scale = normalize(first), normalize(second), jnp.exp(logit_scale)
  alike = lambda told, column: (same[:, None] == told).all(axis=-1).astype(jnp.float32)
  loss = jnp.zeros(())
  for queries, keys in ((u, v), (v, u)):
    cost, total = weighted(queries, keys, scale, alike, same, counts, chunk)
    loss = loss + _mean(cost / jnp.maximum(total, 1), counts) / 2
  return loss


def mixed(first: jax.Array, second: jax.Array, temperature: float, share: jax.Array, other: jax.Array,
          counts: jax.Array | None = None, chunk: int = -1) -> jax.Array:
  """BiMixCo: the first vectors are of inputs mixed of two, share_i of i and 1 - share_i of other_i (MindEye).

  With P_ij = share_i at i and 1 - share_i at other_i, half of the means of -sum_j P_ij log softmax_j(l_ij) and of the
  same with P and l transposed (MedARC-AI/fMRI-reconstruction-NSD, src/utils.py: mixco_nce). There the diagonal is
  overwritten where other_i = i, so that such a sample has no target; here the two are added.

  Args:
    share: [B]. other: [B] int, a permutation. Others are as of `clip`.
  """
  u, v, rows = normalize(first), normalize(second), jnp.arange(len(first))

  def forth(told, column):
    return share[:, None] * (column == rows[:, None]) + (1 - share)[:, None] * (column == other[:, None])

  def back(told, column):  # of the query j the weights of the mixed inputs i
    own, mate = told
    return own * (column == rows[:, None]) + (1 - own) * (mate == rows[:, None])

  there = weighted(u, v, 1 / temperature, forth, share, counts, chunk)[0]
  again = weighted(v, u, 1 / temperature, back, (share, other), counts, chunk)[0]
  return (_mean(there, counts) + _mean(again, counts)) / 2


def softened(first: jax.Array, second: jax.Array, temperature: jax.Array | float, counts: jax.Array | None = None,
             chunk: int = -1) -> jax.Array:
  """SoftCLIP: the targets are the softmax of the second vectors' own cosines (MindEye, src/utils.py: soft_clip_loss).

  Half of the cross-entropies both ways to softmax_j(v_i . v_j / T), without gradient through it; CLIP where the second
  vectors are orthogonal and T is small.
  """
  u, v = normalize(first), normalize(second)
  fixed = jax.lax.stop_gradient(v)
  total = log_partition(fixed, fixed, temperature, None, chunk, counts)[0]
  alike = lambda told, column: jnp.exp(_dot('nd,md->nm', fixed, told) / temperature - total[:, None])
  there, back = (weighted(a, b, 1 / temperature, alike, fixed, counts, chunk)[0] for a, b in ((u, v), (v, u)))
  return (_mean(there, counts) + _mean(back, counts)) / 2


def _nearest(positive: jax.Array, top: jax.Array, scale: jax.Array, counts: jax.Array | None) -> jax.Array:
  """The share of pairs whose logit is larger than the largest other one."""
  right = positive > top + MARGIN * scale
  return jax.lax.stop_gradient(_mean(right.astype(jnp.float32), counts))


def _mean(x: jax.Array, counts: jax.Array | None) -> jax.Array:
  """The mean of x [B] over the pairs that count."""
  return x.mean() if counts is None else jnp.where(counts, x, 0).sum() / jnp.maximum(counts.sum(), 1)
