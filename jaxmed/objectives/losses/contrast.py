"""Losses between the views of a global batch, as pure functions in float32.

Products run in full float32 on every device: at a temperature of 0.1, rounding similarities to bfloat16 (a TPU's
default) or TF32 would move logits by more than these losses differ between samples.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.models.layers.norm import FLOOR, normalize

OUT = -1e30  # logit of what does not count: finite, so that its gradient is 0 and not NaN
LARGE, CHUNK = 4096, 1024  # more keys than LARGE are visited CHUNK at a time

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def info_nce(queries: jax.Array, keys: jax.Array, positives: jax.Array, temperature: float | jax.Array,
             exclude: jax.Array | None = None, chunk: int = -1) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of finding each query's positive among all keys (van den Oord et al. 2018).

  The mean over queries and positives of logsumexp_k(query . key_k / T) - query . positive / T. All vectors are taken
  as they are: normalise them for cosines.

  Args:
    queries, keys: [N, D], [M, D] of the global batch.
    positives: [N, P, D], the keys that belong to each query; they are among `keys` too.
    exclude: [N] int, one key that a query does not look at (itself); None for none.
    chunk: see `log_partition`.
  Returns:
    The loss, and the share of queries whose nearest key is a positive (ties count).
  """
  positive = _dot('nd,npd->np', queries, positives) / temperature
  log_sum, top = log_partition(queries, keys, temperature, exclude, chunk)
  loss = (log_sum[:, None] - positive).mean()
  right = positive.max(axis=1) >= top - 1e-4 / temperature  # the same product, but summed in another order
  return loss, jax.lax.stop_gradient(right.astype(jnp.float32).mean())


def log_partition(queries: jax.Array, keys: jax.Array, temperature: float | jax.Array,
                  exclude: jax.Array | None = None, chunk: int = -1, counts: jax.Array | None = None
                  ) -> tuple[jax.Array, jax.Array]:
  """logsumexp over the keys of query . key / T, and the largest of these, both [N] float32.

  Args:
    exclude: [N] int, a key that does not count for each query.
    chunk: so many keys at a time, so that [N, chunk] scores are held, in the backward pass too; 0 for all at once,
      -1 for 1024 when there are more than 4096 keys. The numbers are the same.
    counts: [M] bool, keys that count for any query; None for all.
  """
  blocks = chunked(keys, counts, chunk)

  def visit(carry, block):
    log_sum, top = carry
    keys, there, column = block
    score = _dot('nd,md->nm', queries, keys) / temperature
    out = jnp.broadcast_to(~there, score.shape)
    if exclude is not None:
      out = out | (column == exclude[:, None])
    score = jnp.where(out, OUT, score)
    log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(score, axis=1))
    return (log_sum, jnp.maximum(top, jax.lax.stop_gradient(score).max(axis=1))), None

  start = jnp.full(queries.shape[0], OUT), jnp.full(queries.shape[0], OUT)
  return over_chunks(visit, start, blocks)[0]


def chunked(keys: jax.Array, counts: jax.Array | None, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keys [M, D] as [chunks, n, D], filled up with zeros, which of them count, and their numbers, [chunks, n] both.

  Args:
    counts: [M] bool, None for all. chunk: n, see `log_partition`.
  """
  count = keys.shape[0]
  chunk = (CHUNK if count > LARGE else 0) if chunk < 0 else chunk
  chunk = count if chunk == 0 else min(chunk, count)
  chunks = -(-count // chunk)
  there = jnp.ones(count, bool) if counts is None else counts
  filled = [jnp.pad(x, [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1)) for x in (keys, there)]
  column = jnp.arange(chunks * chunk)
  return filled[0].reshape(chunks, chunk, -1), filled[1].reshape(chunks, chunk), column.reshape(chunks, chunk)


def over_chunks(visit: Callable, start: Any, blocks: Any) -> tuple[Any, Any]:
  """A scan of visit(carry, block) over blocks [chunks, ...], which computes each again going back; one is called."""
  if len(jax.tree.leaves(blocks)[0]) > 1:
    return jax.lax.scan(jax.checkpoint(visit), start, blocks)
  carry, out = visit(start, jax.tree.map(lambda x: x[0], blocks))
  return carry, jax.tree.map(lambda x: x[None], out)


def nt_xent(z: jax.Array, temperature: float, chunk: int = -1) -> tuple[jax.Array, jax.Array]:
  """NT-Xent over all views of a batch (Chen et al. 2020, eq. 1), and the share of views whose nearest is a positive.

  Each view of a sample looks for the sample's others among all views but itself; with more than two views the mean
  over the positives (the outside form of SupCon, Khosla et al. 2020).

  Args:
    z: [B, V, D], not normalised.
  """
  size, views, _ = z.shape
  z = normalize(z)
  others = jnp.stack([jnp.roll(z, -k, axis=1) for k in range(1, views)], axis=2)  # [B, V, V - 1, D]
  rows = z.reshape(size * views, -1)
  return info_nce(rows, rows, others.reshape(*rows.shape[:1], views - 1, -1), temperature,
                  jnp.arange(size * views), chunk)


def pairs(count: int) -> list[tuple[int, int]]:
  """Ordered pairs of different views."""
  return [(i, j) for i in range(count) for j in range(count) if i != j]


def cosine_distance(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Mean squared distance of normalised vectors [..., D], 2 - 2 cos (Grill et al. 2020, eq. 2)."""
  return jnp.square(normalize(prediction) - normalize(target)).sum(axis=-1).mean()


def standardize(z: jax.Array, epsilon: float = 1e-5) -> jax.Array:
  """[N, D] with mean 0 and (biased) variance 1 over the batch, float32: batch normalisation without parameters."""
  z = z.astype(jnp.float32)
  z = z - z.mean(axis=0)
  return z * jax.lax.rsqrt(jnp.square(z).mean(axis=0) + epsilon)


def cross_correlation(a: jax.Array, b: jax.Array) -> jax.Array:
  """Correlations [D, D] over the batch between the dimensions of a [N, D] and of b [N, D]."""
  return _dot('ni,nj->ij', standardize(a), standardize(b)) / a.shape[0]


def redundancy(correlation: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared distance to the identity of a matrix [D, D]: (on the diagonal, off the diagonal), each summed."""
  diagonal = jnp.diagonal(correlation)
  return jnp.square(diagonal - 1).sum(), _off_diagonal(correlation)


def variance(z: jax.Array, epsilon: float = 1e-4) -> jax.Array:
  """Mean over dimensions of max(0, 1 - sqrt(var + epsilon)) for z [N, D], unbiased variance (Bardes et al. 2022)."""
  z = z - z.mean(axis=0)
  spread = jnp.square(z).sum(axis=0) / max(z.shape[0] - 1, 1)
  return jax.nn.relu(1 - jnp.sqrt(spread + epsilon)).mean()


def covariance(z: jax.Array) -> jax.Array:
  """Sum of the squared covariances between different dimensions of z [N, D], by D (Bardes et al. 2022)."""
  z = z - z.mean(axis=0)
  return _off_diagonal(_dot('ni,nj->ij', z, z) / max(z.shape[0] - 1, 1)) / z.shape[1]


def _off_diagonal(matrix: jax.Array) -> jax.Array:
  """Sum of the squares off the diagonal of [D, D]."""
  return jnp.square(matrix * (1 - jnp.eye(matrix.shape[0]))).sum()


def epps_pulley(x: jax.Array, knots: int = 17, limit: float = 3.0) -> jax.Array:
  """How far samples are from a standard normal, along an axis (Epps, Pulley 1983; Balestriero, LeCun 2025).

  N times the integral over [-limit, limit] of |empirical characteristic function - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by
  the trapezoidal rule on [0, limit], doubled (rbalestr-lab/lejepa, lejepa/univariate/epps_pulley.py).

  Args:
    x: [..., N, S], N samples of S variables; one knot at a time, so that only a few such arrays are held.
  Returns:
    [..., S].
  """
  t = jnp.linspace(0.0, limit, knots)
  step = limit / (knots - 1)
  normal = jnp.exp(-0.5 * jnp.square(t))
  weight = 2 * step * normal * jnp.where((t == 0) | (t == limit), 0.5, 1.0)

  @jax.checkpoint
  def error(total, knot):
    t, normal, weight = knot
    real, imaginary = jnp.cos(x * t).mean(axis=-2), jnp.sin(x * t).mean(axis=-2)
    return total + weight * (jnp.square(real - normal) + jnp.square(imaginary)), None

  zero = jnp.zeros((*x.shape[:-2], x.shape[-1]))
  return jax.lax.scan(error, zero, (t, normal, weight))[0] * x.shape[-2]


def sigreg(z: jax.Array, rng: jax.Array, slices: int, knots: int = 17, limit: float = 3.0) -> jax.Array:
  """Sketched isotropic Gaussian regularisation: the mean Epps-Pulley statistic of random projections.

  Args:
    z: [V, N, D], each view a batch of N samples of the global batch.
    rng: draws `slices` directions, uniform on the sphere (lejepa/multivariate/slicing.py).
  """
  directions = jax.random.normal(rng, (z.shape[-1], slices))
  directions = directions * jax.lax.rsqrt(jnp.maximum(jnp.square(directions).sum(axis=0), FLOOR))
  return epps_pulley(_dot('vnd,ds->vns', z.astype(jnp.float32), directions), knots, limit).mean()
