"""SwAV: the loss against float64 NumPy, prototypes of length 1, the queue, frozen prototypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.clustering.swav import SwAV, swapped
from jaxmed.objectives.networks import Clock
from tests.objectives.siamese_fakes import (
  all_views,
  batch,
  check_gradient,
  close,
  encoder,
  evaluate,
  features,
  log_softmax,
  start,
  unit,
)
from tests.objectives.test_clustering import reference as sinkhorn_reference

SMALL = dict(num_prototypes=7, hidden_dim=24, out_dim=8)


def swapped_reference(codes, logits):
  """By loops: global view i's codes, every other view's logits."""
  log_p, views = log_softmax(logits), logits.shape[1]
  total = [-(codes[:, i] * log_p[:, v]).sum(axis=-1).mean() for i in range(codes.shape[1]) for v in range(views) if v != i]
  return np.mean(total)


def test_swapped_predictions():
  rng = np.random.default_rng(0)
  codes, logits = rng.dirichlet(np.ones(5), size=(6, 2)), rng.normal(size=(6, 5, 5))
  close(swapped(jnp.asarray(codes), jnp.asarray(logits)), swapped_reference(codes, logits))
  check_gradient(lambda x: swapped(jnp.asarray(codes, jnp.float32), x), lambda x: swapped_reference(codes, x), logits)


def projections(objective, variables, data):
  x = [features(objective, variables['params']['encoder'], data[name]) for name in ('global', 'local') if name in data]
  return unit(all_views(variables['params']['projector'], np.concatenate(x, axis=1)))


@pytest.mark.parametrize('kind,local,length', [('vit', 2, 0), ('vit', 0, 9), ('channel', 2, 4)])
def test_loss_and_queue(kind, local, length):
  data = batch(kind, 6, 2, local)
  objective, variables, data = start(SwAV, kind, data, queue_length=length, queue_start=2, **SMALL)
  kernel = np.asarray(variables['params']['prototypes']['kernel'], np.float64)
  kernel = kernel / np.linalg.norm(kernel, axis=0)
  z = projections(objective, variables, data)
  queue = unit(np.random.default_rng(4).normal(size=(2, length, 8)))

  def want(full):
    codes = []
    for i in range(2):
      rows = np.concatenate([z[:, i], queue[i]]) if full else z[:, i]
      codes.append(sinkhorn_reference(rows @ kernel, 0.05, 3)[:6])
    return swapped_reference(np.stack(codes, axis=1), z @ kernel / 0.1)

  if not length:
    assert variables['extra'] == {}
    return close(evaluate(objective, variables, data)[0], want(False), 1e-4)
  for queued in (length - 1, length):
    extra = {'queue': jnp.asarray(queue, jnp.float32), 'queued': jnp.int32(queued)}
    loss, (_, after) = evaluate(objective, variables | {'extra': extra}, data, step=2)
    close(loss, want(queued == length), 1e-4)
    assert int(after['queued']) == length
    moved = np.concatenate([z[:, :2].swapaxes(0, 1), queue], axis=1)[:, :length]
    np.testing.assert_allclose(after['queue'], moved, atol=1e-5)
  early = evaluate(objective, variables | {'extra': extra | {'queued': jnp.int32(0)}}, data, step=1)[1][1]
  assert int(early['queued']) == 0
  np.testing.assert_array_equal(early['queue'], extra['queue'])


def test_published_lengths():
  def length(count, **options):
    objective = SwAV(encoder('conv'), hidden_dim=8, **options)
    data = jax.eval_shape(lambda: batch('conv', 2))
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), data)
    extra = jax.eval_shape(objective.init, jax.random.key(0), data)['extra']
    return extra['queue'].shape[1] if extra else 0
  assert length(256) == 3840 and length(4096) == 0 and length(16, queue_length=5) == 5
  long = SwAV(encoder('conv'), clock=Clock(500_000, 5005.0))
  assert bool(long.frozen(5004)['prototypes']) and not bool(long.frozen(5005)['prototypes'])
  assert not bool(SwAV(encoder('conv'), freeze_prototypes=0).frozen(0)['prototypes'])


def test_lengths_of_prototypes_do_not_matter():
  objective, variables, data = start(SwAV, queue_length=0, **SMALL)
  longer = jax.tree.map(lambda x: x, variables)
  longer['params'] = dict(variables['params'], prototypes={'kernel': 3 * variables['params']['prototypes']['kernel']})
  close(evaluate(objective, longer, data)[0], float(evaluate(objective, variables, data)[0]))
