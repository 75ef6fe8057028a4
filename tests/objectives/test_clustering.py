"""Sinkhorn and spherical k-means against float64 NumPy, and what they must withstand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.losses.clustering import sinkhorn, spherical_kmeans

RNG = np.random.default_rng(0)


def reference(logits, temperature, iterations):
  q = np.exp(logits.astype(np.float64) / temperature).T
  q /= q.sum()
  for _ in range(iterations):
    q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    q /= q.sum(axis=0, keepdims=True) * q.shape[1]
  return (q * q.shape[1]).T


@pytest.mark.parametrize('iterations', [1, 3, 20])
@pytest.mark.parametrize('temperature', [0.05, 1.0])
def test_sinkhorn_is_the_numpy_reference(iterations, temperature):
  logits = RNG.uniform(-1, 1, size=(12, 7)).astype(np.float32)
  codes = np.asarray(jax.jit(sinkhorn, static_argnums=2)(logits, temperature, iterations))
  np.testing.assert_allclose(codes, reference(logits, temperature, iterations), rtol=2e-5, atol=1e-9)
  np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-5)
  if iterations == 20 and temperature == 1.0:
    np.testing.assert_allclose(codes.sum(axis=0), 12 / 7, rtol=1e-4)  # all prototypes are used alike


def test_rows_that_do_not_count_change_nothing():
  logits = RNG.normal(size=(9, 5)).astype(np.float32)
  weights = np.array([1, 1, 0, 1, 0, 0, 1, 1, 1])
  held = logits.copy()
  held[2], held[4], held[5] = np.nan, np.inf, 1e30
  codes = np.asarray(sinkhorn(held, 0.3, weights=weights))
  np.testing.assert_allclose(codes[weights > 0], reference(logits[weights > 0], 0.3, 3), rtol=2e-5)
  assert (codes[weights == 0] == 0).all()
  np.testing.assert_array_equal(codes, np.asarray(sinkhorn(held, 0.3, weights=weights > 0)))
  assert (np.asarray(sinkhorn(held, 0.3, weights=np.zeros(9))) == 0).all()


def test_sinkhorn_at_its_limits():
  far = np.array([[0.0, -200.0], [-900.0, -1000.0], [900.0, 0.0]], np.float32)  # exp(logits / 0.04) has no float32
  codes = np.asarray(sinkhorn(far, 0.04))
  assert np.isfinite(codes).all()
  np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.asarray(sinkhorn(np.ones((4, 8)), 0.05)), 1 / 8, rtol=1e-6)  # all alike
  order = RNG.permutation(12)
  logits = RNG.normal(size=(12, 7)).astype(np.float32)
  np.testing.assert_allclose(np.asarray(sinkhorn(logits, 0.1))[order], np.asarray(sinkhorn(logits[order], 0.1)),
                             rtol=1e-5)
  assert (np.asarray(jax.grad(lambda x: (sinkhorn(x, 0.1) ** 2).sum())(jnp.asarray(logits))) == 0).all()
  assert sinkhorn(jnp.asarray(logits, jnp.bfloat16), 0.1).dtype == jnp.float32


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def kmeans_reference(x, first, iterations):
  centroids = x[first].astype(np.float64)
  for _ in range(iterations):
    label = (x @ centroids.T).argmax(axis=1)
    for k in range(len(centroids)):
      if (label == k).any():
        centroids[k] = unit(x[label == k].sum(axis=0))
  return centroids, (x @ centroids.T).argmax(axis=1)


@pytest.mark.parametrize('block', [2**24, 5 * 7])  # all rows at once; 7 at a time, the last part not full
def test_kmeans_is_the_numpy_reference(block):
  x = unit(RNG.normal(size=(40, 6)))
  seen = np.arange(40) % 4 > 0
  for seed in range(4):
    start, _ = spherical_kmeans(jnp.asarray(x, jnp.float32), 5, jax.random.key(seed), jnp.asarray(seen), iterations=0)
    assert seen[[int(np.abs(x - c).sum(axis=1).argmin()) for c in np.asarray(start)]].all()
  key = jax.random.key(2)
  start, _ = spherical_kmeans(jnp.asarray(x, jnp.float32), 5, key, jnp.asarray(seen), iterations=0, block=block)
  first = [int(np.abs(x - c).sum(axis=1).argmin()) for c in np.asarray(start)]
  assert len(set(first)) == 5
  centroids, label = jax.jit(spherical_kmeans, static_argnums=(1, 4, 5))(
      jnp.asarray(x, jnp.float32), 5, key, jnp.asarray(seen), 10, block)
  rows = np.flatnonzero(seen)
  want, want_label = kmeans_reference(x[rows], [list(rows).index(i) for i in first], 10)
  np.testing.assert_allclose(np.asarray(centroids), want, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(label)[rows], want_label)
  assert (np.asarray(label)[~seen] == -1).all()


def test_kmeans_finds_clusters_and_withstands_poor_data():
  centres = unit(RNG.normal(size=(4, 8)))
  true = np.arange(80) % 4
  x = jnp.asarray(unit(centres[true] + 0.02 * RNG.normal(size=(80, 8))), jnp.float32)
  best = 0.0
  for seed in range(8):
    label = np.asarray(spherical_kmeans(x, 4, jax.random.key(seed), jnp.ones(80, bool))[1])
    best = max(best, np.mean([np.bincount(true[label == k]).max() for k in set(label)]) / 20)
  assert best == 1.0  # some start separates them exactly
  alike = jnp.ones((10, 3)) / 3**0.5
  for weights in (jnp.ones(10, bool), jnp.arange(10) < 2, jnp.zeros(10, bool)):
    centroids, label = spherical_kmeans(alike, 4, jax.random.key(0), weights)
    assert np.isfinite(np.asarray(centroids)).all()
    assert ((np.asarray(label) >= 0) == np.asarray(weights)).all()
