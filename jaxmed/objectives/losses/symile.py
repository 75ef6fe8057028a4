"""Symile: contrast of any number of modalities by their multilinear inner product (Saporta et al. 2024, 2411.01053).

rajesh-lab/symile, symile/loss.py and symile/similarity.py. Pure functions in float32 over the global batch. With M
modalities the inner product of x_1 .. x_M is sum_d prod_m x_m[d]; with two it is a dot product and the loss is CLIP's.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError, choose
from jaxmed.objectives.losses.contrast import log_partition
from jaxmed.objectives.losses.paired import MARGIN

NEGATIVES = ('shuffled', 'all')
MOST = 3  # modalities with all B^(M-1) combinations as candidates


def symile(vectors: Sequence[jax.Array], logit_scale: jax.Array, rng: jax.Array, counts: jax.Array | None = None,
           negatives: str = 'shuffled', chunk: int = -1) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The mean over modalities m, the anchors, of the cross-entropy of finding the rest of a record among candidates.

  With p_i the inner product of record i times exp(logit_scale), and n_ik that of its anchor with candidate k, a term is
  logsumexp(p_i, n_i1, n_i2, ...) - p_i. A candidate is the product of one vector of each other modality: 'shuffled'
  permutes each modality by itself, B candidates that all anchors share; 'all' has all B^(M-1) combinations. The
  record's own combination is no candidate. The official 'n' writes p_i over the i-th candidate, so that it lacks one
  candidate, and a permutation that restores a record counts as a negative: with two modalities it is not CLIP's.

  Args:
    vectors: M of [B, D], as they are: normalise them first.
    rng: of the permutations.
    counts: [B] bool, records that count; None for all.
    chunk: so many candidates at a time, see `contrast.log_partition`.
  Returns:
    The loss, and for each anchor the share of records that are nearer than any candidate.
  Raises:
    UserError: fewer than two modalities, or more than MOST with negatives='all'.
  """
  check(len(vectors), negatives)
  vectors = [x.astype(jnp.float32) for x in vectors]
  real = jnp.ones(len(vectors[0]), bool) if counts is None else counts
  scale, total = jnp.exp(logit_scale), jnp.maximum(real.sum(), 1)
  mean = lambda x: jnp.where(real, x, 0).sum() / total
  positive = scale * functools.reduce(jnp.multiply, vectors).sum(axis=-1)
  losses, right = [], []
  for anchor, key in enumerate(jax.random.split(rng, len(vectors))):
    others = vectors[:anchor] + vectors[anchor + 1:]
    keys, there, own = combined(others, real) if negatives == 'all' else shuffled(others, real, key)
    rest, top = log_partition(vectors[anchor], keys, 1 / scale, own, chunk, there)
    losses.append(mean(jnp.logaddexp(rest, positive) - positive))
    right.append(jax.lax.stop_gradient(mean((positive > top + MARGIN * scale).astype(jnp.float32))))
  return jnp.stack(losses).mean(), tuple(right)


def check(count: int, negatives: str) -> None:
  """Raises a UserError for a number of modalities that a kind of negatives does not serve."""
  choose('objective.negatives', negatives, NEGATIVES)
  if count < 2:
    raise UserError(f'symile compares two modalities or more, not {count}: name towers, such as towers.text.model='
                    'text_micro')
  if negatives == 'all' and count > MOST:
    raise UserError(f'objective.negatives=all has B^{count - 1} candidates with {count} modalities: expected at most '
                    f'{MOST} modalities, or objective.negatives=shuffled')


def shuffled(others: Sequence[jax.Array], real: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Products of the rows of [B, D] each in an order of its own: keys [B, D], which count [B], and the key that is the
  record's own [B], -1 where there is none."""
  size = len(real)
  orders = jnp.stack([jax.random.permutation(k, size) for k in jax.random.split(rng, len(others))])  # [M - 1, B]
  keys = functools.reduce(jnp.multiply, [x[order] for x, order in zip(others, orders)])
  agree = (orders == orders[0]).all(axis=0)
  own = jnp.full(size, -1).at[jnp.where(agree, orders[0], size)].set(jnp.arange(size), mode='drop')
  return keys, real[orders].all(axis=0), own


def combined(others: Sequence[jax.Array], real: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The same of all combinations of rows: keys [B^(M - 1), D], those of rows (i, i, ...) their own."""
  size = len(real)
  keys, there = others[0], real
  for x in others[1:]:
    keys = (keys[:, None] * x).reshape(-1, x.shape[-1])
    there = (there[:, None] & real).reshape(-1)
  step = sum(size**k for k in range(len(others)))  # from one own combination to the next
  return keys, there, jnp.arange(size) * step


def retrieval_logits(queries: Sequence[jax.Array], candidates: jax.Array) -> jax.Array:
  """Inner products [N, C] of the queries, M - 1 of [N, D], with candidates [C, D] of the modality that they lack."""
  query = functools.reduce(jnp.multiply, queries)
  return jnp.einsum('nd,cd->nc', query, candidates, precision=jax.lax.Precision.HIGHEST)


def first_scale(count: int, dim: int, cosine: float = 0.07) -> float:
  """ln of the scale at which random unit vectors of `count` modalities have logits of CLIP's size at 1 / cosine.

  The inner product of `count` random unit vectors [dim] has the deviation dim^((1 - count) / 2), so that each modality
  after the second asks for a factor of sqrt(dim).
  """
  return -math.log(cosine) + (count - 2) / 2 * math.log(dim)
