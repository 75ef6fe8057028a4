"""Hierarchical channel sampling against its law."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

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
