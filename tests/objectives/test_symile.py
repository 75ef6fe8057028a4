"""Symile: the loss against loops in float64 and PyTorch, CLIP with two modalities, what is missing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives.losses import paired
from jaxmed.objectives.losses import symile as losses
from tests.objectives.siamese_fakes import check_gradient, unit
from tools import symile_xor

KEY = jax.random.key(3)


def rows(count, size=5, dim=6, seed=0):
  return [unit(x) for x in np.random.default_rng(seed).normal(size=(count, size, dim))]


def orders_of(count, size):
  """The permutations that `shuffled` draws for each anchor."""
  return [[np.asarray(jax.random.permutation(k, size)) for k in jax.random.split(key, count - 1)]
          for key in jax.random.split(KEY, count)]


def reference(vectors, s, counts, negatives):
  """Anchor by anchor and record by record; candidates are tuples of rows."""
  count, size = len(vectors), len(vectors[0])
  mip = lambda parts: np.prod(parts, axis=0).sum()
  total = 0.0
  for m, orders in enumerate(orders_of(count, size)):
    others = [v for k, v in enumerate(vectors) if k != m]
    tuples = (itertools.product(range(size), repeat=count - 1) if negatives == 'all'
              else zip(*[o.tolist() for o in orders]))
    tuples = [t for t in tuples if all(counts[list(t)])]
    for i in np.flatnonzero(counts):
      own = np.exp(s) * mip([v[i] for v in vectors])
      found = [np.exp(s) * mip([vectors[m][i], *(o[j] for o, j in zip(others, t))]) for t in tuples if set(t) != {i}]
      total += np.log(np.exp(own) + sum(map(np.exp, found))) - own
  return total / count / counts.sum()


@functools.partial(jax.jit, static_argnums=(3, 4))
def loss(vectors, s, counts, negatives='shuffled', chunk=0):
  return losses.symile(vectors, s, KEY, counts, negatives, chunk)


@pytest.mark.parametrize('count, negatives', [(3, 'shuffled'), (4, 'shuffled'), (3, 'all')])
def test_loss_and_gradient_are_those_of_a_loop(count, negatives):
  vectors, counts = rows(count), np.array([True, True, True, False, True])
  f32 = lambda xs: [jnp.asarray(x, jnp.float32) for x in xs]
  want = reference(vectors, 1.2, counts, negatives)
  have, right = loss(f32(vectors), 1.2, counts, negatives)
  assert float(have) == pytest.approx(want, rel=2e-6) and len(right) == count
  assert float(loss(f32(vectors), 1.2, counts, negatives, 2)[0]) == pytest.approx(want, rel=2e-6)
  check_gradient(lambda x, s: loss([x, *f32(vectors[1:])], s, counts, negatives)[0],
                 lambda x, s: reference([x, *vectors[1:]], s, counts, negatives), vectors[0], np.float64(1.2))


@pytest.mark.parametrize('negatives', losses.NEGATIVES)
def test_two_modalities_are_clip(negatives):
  u, v = (jnp.asarray(x, jnp.float32) for x in rows(2))
  counts = jnp.asarray([True, False, True, True, True])
  have, right = loss([u, v], 2.0, counts, negatives)
  want, both = paired.clip(u, v, jnp.asarray(2.0), counts)
  assert float(have) == pytest.approx(float(want), rel=1e-6) and [*map(float, right)] == [*map(float, both)]


def test_all_candidates_are_a_cross_entropy_of_every_combination():
  torch = pytest.importorskip('torch')
  vectors = [torch.tensor(x) for x in rows(3)]
  x, y, z = vectors
  logits = 3.0 * torch.stack([torch.einsum('id,jd,kd->ijk', a, b, c).reshape(5, -1)
                              for a, b, c in ((x, y, z), (y, x, z), (z, x, y))])
  own = torch.arange(5) * 6
  want = sum(torch.nn.functional.cross_entropy(part, own) for part in logits) / 3
  have = loss([jnp.asarray(v, jnp.float32) for v in rows(3)], float(np.log(3.0)), np.ones(5, bool), 'all')[0]
  assert float(have) == pytest.approx(float(want), rel=2e-6)


def test_what_is_nearest_and_the_first_scale():
  one_hot = jnp.eye(6)
  value, right = losses.symile([one_hot] * 3, jnp.asarray(3.0), KEY)
  assert [*map(float, right)] == [1.0] * 3 and float(value) < 6 * np.exp(-np.exp(3.0)) + 1e-6
  logits = losses.retrieval_logits([one_hot[:2], one_hot[:2]], one_hot)
  assert logits.argmax(axis=1).tolist() == [0, 1]
  rng = np.random.default_rng(0)
  mips = np.prod([unit(x) for x in rng.normal(size=(3, 4000, 16))], axis=0).sum(axis=1)
  assert np.exp(losses.first_scale(3, 16)) * mips.std() == pytest.approx(np.exp(losses.first_scale(2, 16)) / 4, rel=0.05)


def test_xor_is_found_by_three_modalities_and_no_pair():
  """A fifth of the records of tools/symile_xor.py; with half of the modalities missing, too."""
  small = dict(count=2000, epochs=20, batch=500)
  assert symile_xor.run('symile', 0.5, 0, **small) > 0.95
  assert abs(symile_xor.run('clip', 0.0, 0, **small) - 0.5) < 0.1


def test_bad_input():
  with pytest.raises(UserError, match='symile compares two modalities or more, not 1'):
    losses.check(1, 'shuffled')
  with pytest.raises(UserError, match=r'negatives=all has B\^3 candidates with 4 modalities: expected at most 3'):
    losses.check(4, 'all')
  with pytest.raises(UserError, match="unknown objective.negatives 'shufled'"):
    losses.check(2, 'shufled')
