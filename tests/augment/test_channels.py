"""Channel sampling against its laws."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmed.augment import channels
from jaxmed.augment.channels import hierarchical_channel_sampling


def draws(mask, count):
  keys = jax.random.split(jax.random.key(7), count)
  return np.asarray(jax.jit(jax.vmap(hierarchical_channel_sampling, (0, None)))(keys, mask))


def test_sizes_and_subsets_are_uniform():
  size, count = 4, 12000
  kept = draws(jnp.ones((3, size), bool), count)
  np.testing.assert_array_equal(kept[:, 0], kept[:, 1])  # one subset a batch
  kept = kept[:, 0]
  assert stats.chisquare(np.bincount(kept.sum(axis=1), minlength=5)[1:]).pvalue > 0.01
  for n in (1, 2, 3):  # given its size, each subset is equally likely
    codes = kept[kept.sum(axis=1) == n] @ (1 << np.arange(size))
    _, seen = np.unique(codes, return_counts=True)
    assert len(seen) == {1: 4, 2: 6, 3: 4}[n]
    assert stats.chisquare(seen).pvalue > 0.01


def test_missing_channels_are_never_drawn_and_every_sample_keeps_one():
  mask = jnp.array([[True, True, True, True], [True, False, True, False], [False, False, False, True]])
  kept = draws(mask, 500)
  assert not (kept & ~np.asarray(mask)).any()
  assert (kept.sum(axis=2) >= 1).all()
  asked = kept[:, 0].sum(axis=1)
  np.testing.assert_array_equal(kept[:, 1].sum(axis=1), np.minimum(asked, 2))


def test_each_sample_draws_its_own():
  """A number uniform in 1 .. its own, and uniform subsets of that size, differing within a batch."""
  mask = jnp.asarray([[True] * 4, [True, False, True, True]] * 4000)
  have = np.asarray(channels.sampled_each(jax.random.key(0), mask))
  assert not (have & ~np.asarray(mask)).any()
  for rows, size in ((have[::2], 4), (have[1::2], 3)):
    counts = np.bincount(rows.sum(axis=1), minlength=size + 1)[1:] / len(rows)
    np.testing.assert_allclose(counts, 1 / size, atol=0.03)
    single = rows[rows.sum(axis=1) == 1].mean(axis=0)
    np.testing.assert_allclose(single[single > 0], 1 / size, atol=0.06)


def chance_of(subset, first, count, similarity, temperature):
  """Probability that `first` and count - 1 others, drawn one after the other, are this subset."""
  weight = np.exp((1 - similarity[first]) / temperature)
  total = 0.0
  for order in itertools.permutations([c for c in subset if c != first]):
    left = [c for c in range(len(similarity)) if c != first]
    p = 1.0
    for c in order:
      p *= weight[c] / weight[left].sum()
      left.remove(c)
    total += p
  return total if first in subset and len(subset) == count else 0.0


@pytest.mark.parametrize('temperature', [0.5, 1000.0])
def test_diverse_sampling_is_successive_draws(temperature):
  rng = np.random.default_rng(0)
  similarity = np.asarray(channels.cosines(jnp.asarray(rng.normal(size=(4, 3)))))
  draw = jax.jit(jax.vmap(lambda key: channels.diverse_channel_sampling(
      key, jnp.ones((1, 4), bool), jnp.asarray([[2, 0, 3, 1]]), jnp.asarray(similarity), temperature)[0]))
  have = np.asarray(draw(jax.random.split(jax.random.key(1), 40_000)))[:, [1, 3, 0, 2]]  # by id
  found = collections.Counter(tuple(np.flatnonzero(row).tolist()) for row in have)
  for count in range(1, 5):
    for subset in itertools.combinations(range(4), count):
      want = np.mean([chance_of(subset, first, count, similarity, temperature) for first in range(4)]) / 4
      assert abs(found[subset] / 40_000 - want) < 5 * (want / 40_000) ** 0.5 + 1e-3, subset


def test_diverse_sampling_of_other_channel_sets():
  """Samples with the same channels keep the same ones, wherever they stand; nothing is drawn that is not there."""
  ids = jnp.asarray([[0, 1, 2], [2, 0, 1], [3, 4, 0]])
  mask = jnp.asarray([[True] * 3, [True] * 3, [True, True, False]])
  for seed in range(20):
    have = np.asarray(channels.diverse_channel_sampling(jax.random.key(seed), mask, ids, jnp.eye(5), 0.1))
    kept = [set(np.asarray(ids[i])[have[i]].tolist()) for i in range(3)]
    assert kept[0] == kept[1] and kept[2] <= {3, 4} and all(kept)
