"""Assignments of samples to prototypes: Sinkhorn-Knopp and spherical k-means, over the global batch, in float32."""

import jax
import jax.numpy as jnp

ABSENT = -1e30  # log weight of a row that does not count: finite, so that a batch without any row stays finite


def sinkhorn(logits: jax.Array, temperature: float | jax.Array, iterations: int = 3,
             weights: jax.Array | None = None) -> jax.Array:
  """Soft assignments that use all prototypes equally (Cuturi 2013; Caron et al. 2020; facebookresearch/swav,
  main_swav.py:distributed_sinkhorn; facebookresearch/dinov2, dino_clstoken_loss.py).

  Each iteration gives all prototypes the same mass over the batch, then all samples the same mass over the prototypes.
  It works on logarithms: the same numbers as the official exp(logits / temperature), but no logit overflows, and no
  sample that is far from every prototype underflows to 0 / 0.

  Args:
    logits: [B, K] scores of the global batch, any float type.
    temperature: their divisor (epsilon of SwAV).
    weights: [B], 0 or False for rows that do not count, 1 for the others; None for all. A row that does not count may
      hold anything, NaN included.
  Returns:
    [B, K] float32 without gradient; rows that count sum to 1, the others are 0.
  """
  scores = jax.lax.stop_gradient(logits).astype(jnp.float32) / temperature
  there = jnp.ones(scores.shape[0], bool) if weights is None else weights > 0
  scores = jnp.where(there[:, None], scores, 0.0)
  absent = jnp.where(there, 0.0, ABSENT)
  row = absent
  column = jnp.zeros(scores.shape[1])
  for _ in range(iterations):
    column = -jax.nn.logsumexp(scores + row[:, None], axis=0)
    row = absent - jax.nn.logsumexp(scores + column, axis=1)
  codes = jnp.exp(jnp.where(there[:, None], scores + column + row[:, None], ABSENT))
  return jax.lax.stop_gradient(codes)


def spherical_kmeans(x: jax.Array, count: int, rng: jax.Array, weights: jax.Array, iterations: int = 10,
                     block: int = 2**24) -> tuple[jax.Array, jax.Array]:
  """k-means by cosine, with centroids of length 1 (facebookresearch/swav, main_deepclusterv2.py:cluster_memory).

  Centroids start as different rows; one that loses all rows stays where it is. Rows are visited in parts, so that at
  most `block` scores are held at once.

  Args:
    x: [R, D] rows of length 1, at least `count`.
    weights: [R] bool, False for rows that do not count. Where fewer than `count` do, centroids are left without rows.
  Returns:
    Centroids [count, D] float32 and the nearest one of each row, [R] int32, -1 for rows that do not count.
  """
  rows, size = x.shape
  part = max(min(block // count, rows), 1)
  parts = -(-rows // part)
  pad = parts * part - rows
  cut = jnp.pad(x.astype(jnp.float32), ((0, pad), (0, 0))).reshape(parts, part, size)
  there = jnp.pad(weights > 0, (0, pad)).reshape(parts, part)
  order = jax.random.uniform(rng, (rows,)) + 2.0 * ~(weights > 0)
  first = jax.lax.top_k(-order, count)[1]
  alive = (weights > 0)[first]
  exact = jax.lax.Precision.HIGHEST  # as rounded to bfloat16, near centroids would be mixed up

  def nearest(centroids, rows):
    return jnp.where(alive, jnp.dot(rows, centroids.T, precision=exact), ABSENT).argmax(axis=1)

  def move(_, centroids):
    def visit(carry, block):
      rows, there = block
      belongs = jax.nn.one_hot(nearest(centroids, rows), count) * there[:, None]  # [part, K]
      return (carry[0] + jnp.dot(belongs.T, rows, precision=exact), carry[1] + belongs.sum(axis=0)), None
    start = jnp.zeros((count, size)), jnp.zeros(count)
    (total, members), _ = jax.lax.scan(visit, start, (cut, there))
    length = jnp.linalg.norm(total, axis=1, keepdims=True)
    moved = (members[:, None] > 0) & (length > 0)
    return jnp.where(moved, total / jnp.where(moved, length, 1.0), centroids)

  centroids = jax.lax.fori_loop(0, iterations, move, x[first].astype(jnp.float32))
  _, label = jax.lax.scan(lambda _, rows: (None, nearest(centroids, rows)), None, cut)
  return centroids, jnp.where(there, label, -1).reshape(-1)[:rows].astype(jnp.int32)
