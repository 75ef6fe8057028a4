"""Joint clustering: its three terms in float64, places of slices, who gets gradients, blank slices, both clusterings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.layers.positions import sincos
from jaxmed.objectives.volumes.joint_clustering import JointClustering
from tests.models.test_vit import norm, numpy_block
from tests.objectives import siamese_fakes as fakes
from tests.objectives.test_clustering import reference as sinkhorn_reference

SMALL = dict(num_prototypes=5, hidden_dim=12, out_dim=8, depth=1, num_heads=1, mask_ratio=0.3)
COUNT, SLICES, VIEWS = 4, 5, 2
OWN = np.array([5, 5, 3, 1])  # slices of each volume; the last is an image
THERE = np.arange(SLICES) < OWN[:, None]
INDEX = np.where(THERE, np.arange(COUNT * SLICES).reshape(COUNT, SLICES), -1).astype(np.int32)
DEEP = dict(clustering='deepcluster', rows=COUNT * SLICES, num_sets=2)
TERMS = ('slices', 'volumes', 'masked')


def windows(kind='vit'):
  """Windows of noise; what lies beyond the slices of one is NaN."""
  group = fakes.batch(kind, COUNT * SLICES, VIEWS)['global']
  group = jax.tree.map(lambda x: x.reshape(COUNT, SLICES, *x.shape[1:]), group)
  shown = THERE.reshape(COUNT, SLICES, *[1] * (group['image'].ndim - 2))
  return {'global': group | {'image': jnp.where(shown, group['image'], jnp.nan)}, 'index': jnp.asarray(INDEX)}


@functools.cache
def started(kind='vit', deep=False):
  return fakes.start(JointClustering, kind, windows(kind), **SMALL | (DEEP if deep else {'queue_length': 0}))


@functools.partial(jax.jit, static_argnums=0)
def terms(objective, variables, data):
  """(loss, metrics, extra, {term: gradients of it alone})."""
  def each(params):
    loss, (metrics, extra) = objective.loss(variables | {'params': params}, data, jax.random.key(3), 50)
    kind = 'swav' if objective.clustering == 'swav' else 'deepcluster'
    values = [metrics[f'slices_{kind}_loss'], metrics[f'volumes_{kind}_loss'], metrics['masked_loss']]
    return values, (loss, metrics, extra)
  _, pull, out = jax.vjp(each, variables['params'], has_aux=True)
  return *out, {name: pull([float(name == other) for other in TERMS])[0] for name in TERMS}


def touched(grads):
  return {name for name, tree in grads.items() if any(np.any(x) for x in jax.tree.leaves(tree))}


def mixed(params, x, there, hidden):
  """The mixer in float64, volume by volume of slices x [N, K, D]: (mean over slices [N, dim], predictions)."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['mixer'])
  means, predicted = [], np.zeros_like(x)
  for i, own in enumerate(there):
    y = x[i, own] @ p['embed']['kernel'] + p['embed']['bias']
    y = np.where(hidden[i, own, None], p['mask_token'], y) + sincos((SLICES,), y.shape[-1])[own]
    block = jax.tree.map(lambda a: a[0], p['transformer']['blocks'])
    y = norm(numpy_block(block, y[None], np.zeros((1, 8)))[0], p['norm'])
    means.append(y.mean(axis=0))
    predicted[i, own] = y @ p['predict']['kernel'] + p['predict']['bias']
  return np.stack(means), predicted


def swav(z, kernel):
  """SwAV's loss of two views z [N, 2, D] of length 1."""
  scores = z @ (kernel / np.linalg.norm(kernel, axis=0))
  return -np.mean([(sinkhorn_reference(scores[:, i], 0.05, 3) * fakes.log_softmax(scores[:, 1 - i] / 0.1)).sum(axis=-1)
                   for i in (0, 1)])


def test_the_three_terms_and_who_is_trained():
  objective, variables, data = started()
  loss, metrics, _, grads = terms(objective, variables, data)
  params, there = variables['params'], THERE.repeat(VIEWS, axis=0)
  place = np.minimum(np.arange(SLICES), OWN[:, None] - 1)  # blanks are the last slice again
  filled = jax.tree.map(lambda x: x[np.arange(COUNT)[:, None], place].reshape(-1, *x.shape[2:]), data['global'])
  x = fakes.features(objective, params['encoder'], filled, 'mean')  # [B * K, V, D]
  z = fakes.unit(fakes.all_views(params['projector'], x))[THERE.reshape(-1)]
  kernel = lambda name: np.asarray(params[f'{name}_prototypes']['kernel'], np.float64)
  fakes.close(metrics['slices_swav_loss'], swav(z, kernel('slices')), 1e-4)
  x = x.reshape(COUNT, SLICES, VIEWS, -1).swapaxes(1, 2).reshape(COUNT * VIEWS, SLICES, -1)
  hidden = np.asarray(objective.hide(jax.random.split(jax.random.key(3), 4)[3], jnp.asarray(there)))
  volumes = fakes.unit(mixed(params, x, there, np.zeros_like(there))[0].reshape(COUNT, VIEWS, -1))
  fakes.close(metrics['volumes_swav_loss'], swav(volumes, kernel('volumes')), 1e-4)
  target = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
  want = np.square(mixed(params, x, there, hidden)[1] - target)[hidden].mean()
  fakes.close(metrics['masked_loss'], want, 1e-4)
  plain = np.stack([t[a & ~h].mean(axis=0) for t, a, h in zip(target, there, hidden)])[:, None]
  fakes.close(metrics['masked_gain'], 1 - want / np.square(plain - target)[hidden].mean(), 1e-3)
  fakes.close(metrics['volumes_spread'], 1 - np.square(volumes.mean(axis=(0, 1))).sum(), 1e-4)
  fakes.close(loss, sum(float(metrics[n]) for n in ('slices_swav_loss', 'volumes_swav_loss', 'masked_loss')))
  assert touched(grads['slices']) == {'encoder', 'projector', 'slices_prototypes'}
  assert touched(grads['volumes']) == {'encoder', 'mixer', 'volumes_prototypes'}
  assert touched(grads['masked']) == {'mixer'}
  same = terms(objective, variables, data | {'global': jax.tree.map(lambda x: x[:, :, ::-1], data['global'])})[1]
  fakes.close(same['slices_swav_loss'], float(metrics['slices_swav_loss']), 1e-4)  # the order of views says nothing


def test_places_of_slices_and_blanks():
  objective, variables, _ = started()
  x = jnp.asarray(np.random.default_rng(2).normal(size=(1, SLICES, 16)), jnp.float32)
  mean = jax.jit(lambda x, there: objective._mean(objective._mix(variables['params'], x, there)[0], there)[0])
  every, some = jnp.ones((1, SLICES), bool), jnp.arange(SLICES)[None] < 3
  assert np.abs(mean(x, every) - mean(x[:, ::-1], every)).max() > 1e-2
  np.testing.assert_allclose(mean(x, some), mean(x.at[:, 3:].set(7.0), some), atol=1e-6)


def test_how_many_slices_are_hidden():
  hide = jax.jit(JointClustering(fakes.encoder('vit'), num_heads=2, mask_ratio=0.1).hide)
  there = jnp.arange(64) < jnp.asarray([64, 20, 2, 1])[:, None]
  first, second = (np.asarray(hide(jax.random.key(i), there)) for i in (0, 1))
  assert first.sum(axis=1).tolist() == [7, 2, 1, 0] and not (first & ~there).any() and (first != second).any()


def test_an_encoder_that_says_nothing_is_seen():
  objective, variables, data = started()
  params = variables['params'] | {'encoder': jax.tree.map(jnp.zeros_like, variables['params']['encoder'])}
  metrics = terms(objective, variables | {'params': params}, data)[1]
  assert metrics['slices_spread'] < 1e-4 < metrics['volumes_spread']  # volumes still differ in their lengths
  data = {'global': jax.tree.map(jnp.nan_to_num, data['global']), 'index': jnp.arange(INDEX.size).reshape(INDEX.shape)}
  assert terms(objective, variables | {'params': params}, data)[1]['volumes_spread'] < 1e-4


def test_clusters_of_the_last_epoch_with_batch_norm():
  """Labels of the bank, for slices by their own row and for volumes by the row of their first slice."""
  objective, variables, data = started('conv', True)
  rng = np.random.default_rng(3)
  extra = {level: tree | {'centroids': jnp.asarray(fakes.unit(rng.normal(size=tree['centroids'].shape)), jnp.float32),
                          'assignments': jnp.asarray(rng.integers(0, 2, tree['assignments'].shape), jnp.int32),
                          'clusterings': jnp.asarray(100, jnp.int32)} for level, tree in variables['extra'].items()}
  loss, metrics, after, grads = terms(objective, variables | {'extra': extra}, data)
  assert np.isfinite(loss) and metrics['slices_assigned'] == pytest.approx(THERE.mean())
  assert metrics['volumes_assigned'] == 1 and set(metrics['stats']) == {'encoder', 'projector'}
  assert np.flatnonzero(after['slices']['seen']).tolist() == INDEX[THERE].tolist()
  assert np.flatnonzero(after['volumes']['seen']).tolist() == INDEX[:, 0].tolist()
  volumes = np.asarray(after['volumes']['bank'], np.float64)[:, INDEX[:, 0]].swapaxes(0, 1)  # [B, V, D]
  centroids, labels = (np.asarray(extra['volumes'][name]) for name in ('centroids', 'assignments'))
  want = -np.mean([np.take_along_axis(fakes.log_softmax(volumes @ c.T / 0.1), n[INDEX[:, 0], None, None], axis=-1)
                   for c, n in zip(centroids, labels)])
  fakes.close(metrics['volumes_deepcluster_loss'], want, 1e-4)
  assert touched(grads['slices']) == {'encoder', 'projector'} and touched(grads['volumes']) == {'encoder', 'mixer'}
  assert {name: bool(rests) for name, rests in objective.frozen(0).items()} == dict.fromkeys(
      ('encoder', 'projector', 'mixer'), True)


def test_wrong_options():
  encoder = fakes.encoder('vit')
  for options, match in (({'clustering': 'swap'}, 'objective.clustering'), ({'mask_ratio': 1.0}, 'objective.mask_ratio 1.0'),
                         ({'num_heads': 3}, 'num_heads 3 does not divide objective.dim 16'),
                         ({'masked_weight': -1.0}, 'objective.masked_weight'), ({'epsilon': 0.0}, 'objective.epsilon')):
    with pytest.raises(UserError, match=match):
      JointClustering(encoder, **{'num_heads': 2} | options)
  with pytest.raises(UserError, match='takes windows of slices: set loader.window'):
    JointClustering(encoder, num_heads=2).init(jax.random.key(0), fakes.batch('vit'))
