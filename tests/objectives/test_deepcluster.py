"""DeepCluster-v2: loss against float64 NumPy, when it clusters, what the bank keeps, and that it learns clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.objectives.clustering.deepcluster import DeepCluster
from jaxmed.objectives.networks import Clock
from tests.objectives.siamese_fakes import (
  all_views,
  batch,
  close,
  encoder,
  evaluate,
  features,
  log_softmax,
  start,
  unit,
)

SMALL = dict(rows=12, num_prototypes=3, num_sets=3, hidden_dim=24, out_dim=8, clock=Clock(100, 2.0))


def projections(objective, variables, data):
  x = [features(objective, variables['params']['encoder'], data[name]) for name in ('global', 'local') if name in data]
  return unit(all_views(variables['params']['projector'], np.concatenate(x, axis=1)))


def loss_reference(z, centroids, labels):
  """Mean over sets of the cross-entropy of all views of the labelled samples, by loops."""
  total = []
  for c, label in zip(centroids, labels):
    rows = [-log_softmax(z[b, v] @ c.T / 0.1)[label[b]] for b in range(len(z)) for v in range(z.shape[1]) if label[b] >= 0]
    total.append(np.mean(rows) if rows else 0.0)
  return np.mean(total)


def test_an_epoch_fills_the_bank_then_it_is_clustered():
  data = batch('vit', 6, 2, 2)
  objective, variables, data = start(DeepCluster, 'vit', data, **SMALL)
  z = projections(objective, variables, data)
  halves = [dict(data, index=jnp.arange(6)), dict(data, index=jnp.array([11, 10, 9, 8, 7, 6]))]
  for step, half in enumerate(halves):  # the first epoch: two steps
    loss, (metrics, extra) = evaluate(objective, variables, half, step)
    assert float(loss) == 0 and float(metrics['assigned']) == 0
    variables = variables | {'extra': extra}
    np.testing.assert_allclose(extra['bank'][:, half['index']], z[:, :2].swapaxes(0, 1), atol=1e-5)
    assert float(metrics['images_seen']) == (step + 1) / 2
    assert bool(objective.frozen(step)['encoder']) and bool(objective.frozen(step)['projector'])
  assert not bool(objective.frozen(2)['encoder'])
  assert int(extra['clusterings']) == 0
  before = extra
  loss, (metrics, extra) = evaluate(objective, variables, halves[0], 2)
  assert int(extra['clusterings']) == 1 and float(metrics['assigned']) == 1
  centroids = np.asarray(extra['centroids'], np.float64)
  np.testing.assert_allclose(np.linalg.norm(centroids, axis=-1), 1, rtol=1e-5)
  for s in range(3):  # global views take turns
    want = (np.asarray(before['bank'][s % 2], np.float64) @ centroids[s].T).argmax(axis=1)
    np.testing.assert_array_equal(extra['assignments'][s], want)
  close(loss, loss_reference(z, centroids, np.asarray(extra['assignments'])[:, :6]), 1e-4)
  _, (_, third) = evaluate(objective, variables | {'extra': extra}, halves[1], 3)  # not again within the epoch
  np.testing.assert_array_equal(third['assignments'], extra['assignments'])
  assert int(evaluate(objective, variables | {'extra': third}, halves[1], 4)[1][1]['clusterings']) == 2


def test_images_without_a_cluster_do_not_count_and_held_out_ones_get_the_nearest():
  objective, variables, data = start(DeepCluster, 'vit', batch('vit', 6, 2, 1), **SMALL)
  rng = np.random.default_rng(0)
  centroids, labels = unit(rng.normal(size=(3, 3, 8))), rng.integers(-1, 3, size=(3, 12))
  labels[0, :6] = -1
  extra = variables['extra'] | {'centroids': jnp.asarray(centroids, jnp.float32), 'clusterings': jnp.int32(1),
                                'assignments': jnp.asarray(labels, jnp.int32)}
  variables = variables | {'extra': extra}
  z = projections(objective, variables, data)
  close(evaluate(objective, variables, data, 2)[0], loss_reference(z, centroids, labels[:, :6]), 1e-4)
  held, (metrics, after) = evaluate(objective, variables, data, 2, train=False)
  assert float(metrics['assigned']) == 1 and np.isfinite(float(held)) and not bool(after['seen'].any())


def test_defaults_follow_the_data():
  clusters = lambda rows, **options: DeepCluster(encoder('conv'), rows=rows, **options)._clusters
  assert [clusters(n) for n in (1_281_167, 5000, 100, 5)] == [3000, 500, 10, 2]
  assert clusters(100, num_prototypes=7) == 7
  period = lambda steps, epoch: DeepCluster(encoder('conv'), rows=9, clock=Clock(steps, epoch)).period
  assert period(1000, 50.0) == 50 and period(100, 50.0) == pytest.approx(10)


def test_it_learns_clusters():
  data = batch('conv', 12)
  kind = np.arange(12) % 3
  base = np.random.default_rng(5).normal(size=(3, 1, 8, 8, 2))
  data['global']['image'] = jnp.asarray(base[kind] + 0.3 * np.asarray(data['global']['image']), jnp.float32)
  objective, variables, data = start(DeepCluster, 'conv', data, **(SMALL | dict(clock=Clock(60, 6.0))))
  adam = optax.adam(1e-2)

  @jax.jit
  def step(params, extra, moments, n):
    loss = lambda p: objective.loss({'params': p, 'target': {}, 'extra': extra}, data, jax.random.key(n), n)
    (value, (_, extra)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = adam.update(grads, moments)
    return optax.apply_updates(params, updates), extra, moments, value

  params, extra, moments = variables['params'], variables['extra'], adam.init(variables['params'])
  losses = []
  for n in range(60):
    params, extra, moments, value = step(params, extra, moments, n)
    losses.append(float(value))
  assert losses[:6] == [0.0] * 6 and losses[-1] < 0.2 * losses[6]
  labels = np.asarray(extra['assignments'])
  assert max(len({(a, b) for a, b in zip(kind, label)}) == 3 for label in labels)  # a set found the three kinds
