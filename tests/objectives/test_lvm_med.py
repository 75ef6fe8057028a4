"""LVM-Med: affinities against a NumPy restatement, every kind of encoder, and a loss that training brings down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.errors import UserError
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives.contrastive import lvm_med
from jaxmed.objectives.contrastive.lvm_med import LVMMed
from jaxmed.objectives.losses import matching
from tests.objectives.siamese_fakes import all_views, batch, encoder, evaluate, start, unit

solve = jax.jit(lambda vertex, *edges: matching.solve(vertex, matching.lift(*edges)))

SMALL = dict(group=4, neighbors=2, matches=3, hidden_dim=12, local_dim=8, noise=0.0)


def numpy_places(objective, params, data):
  """Dense features [B, V, P, D] in float64, one cell after another: the mean of the channels that are there."""
  out = []
  for v in range(2):
    mask = data['channel_mask'][:, v] if 'channel_mask' in data else None
    features = objective.encoder.apply({'params': params}, data['image'][:, v], data['channels'][:, v], mask, False)
    x = np.asarray(features.patches, np.float64)
    if objective.encoder.per_channel:
      x = x.reshape(x.shape[0], data['image'].shape[-1], -1, x.shape[-1])
      there = np.ones(x.shape[:2]) if mask is None else np.asarray(mask, np.float64)
      x = np.einsum('bcnd,bc->bnd', x, there) / there.sum(axis=1)[:, None, None]
    out.append(x)
  return np.stack(out, axis=1)


def numpy_graph(params, z, near):
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  for i in range(2):
    own, around = params[f'own{i}'], params[f'around{i}']
    z = z @ own['kernel'] + own['bias'] + z[near].mean(axis=1) @ around['kernel']
    z = np.maximum(z, 0) if i == 0 else z
  return unit(z)


def numpy_local(a, b, matches):
  """Mean of the best cosines of every image of a with every one of b, place by place."""
  out = np.zeros((len(a), len(b)))
  for i, j in np.ndindex(out.shape):
    cosine = unit(a[i]) @ unit(b[j]).T
    for best in (cosine.max(axis=0), cosine.max(axis=1)):
      out[i, j] += 0.5 * np.sort(best)[-matches:].mean()
  return out


def numpy_affinities(objective, params, data, group):
  """(vertex, edge, left, right) of the images `group`, from all parameters and views, in float64."""
  y = numpy_places(objective, params['encoder'], data)
  z = all_views(params['projector'], y.mean(axis=2))
  shape = y.shape
  y = all_views(params['local_projector'], y.reshape(shape[0], -1, shape[-1])).reshape(*shape[:3], -1)[group]
  z = z[group]
  sides = []
  for v in range(2):
    distance = np.square(z[:, None, v] - z[None, :, v]).sum(axis=-1) + 1e9 * np.eye(len(z))
    near = np.argsort(distance)[:, : min(objective.neighbors, len(z) - 1)]
    nodes = numpy_graph(params['graph'], z[:, v], near)
    sides.append((nodes, near, unit(nodes[:, None] - nodes[near])))
  (a, left, along), (b, right, across) = sides
  share = objective.local_weight
  vertex = (1 - share) * a @ b.T + share * numpy_local(y[:, 0], y[:, 1], objective.matches)
  return vertex, objective.edge_weight * np.einsum('ird,aqd->iraq', along, across), left, right


@pytest.mark.parametrize('kind', ['vit', 'channel'])
def test_affinities_and_loss_are_the_numpy_reference(kind):
  objective, variables, data = start(LVMMed, kind, batch(kind, count=8), **SMALL)
  params = variables['params']

  @jax.jit
  def affinities(params):
    graphs, _ = objective._graphs(params, data, jax.random.key(0), True)  # heads are normalised by the batch
    return (*jax.vmap(objective._affinities)(*graphs), graphs[0]['near'], graphs[1]['near'])

  have = affinities(params)
  errors = []
  for g in range(2):
    want = numpy_affinities(objective, params, data['global'], np.arange(4 * g, 4 * g + 4))
    for one, other in zip(have, want, strict=True):
      np.testing.assert_allclose(one[g], other, atol=2e-5)
    vertex = jnp.asarray(want[0] - objective.margin * np.eye(4), jnp.float32)
    edges = jnp.asarray(want[1], jnp.float32), *map(jnp.asarray, want[2:])
    p = np.asarray(solve(vertex, *edges))
    values = [np.float64(matching.value(vertex, *edges, jnp.asarray(q))) for q in (p, np.arange(4))]
    errors.append((2 * (p != np.arange(4)).mean(), (p == np.arange(4)).mean(), values[0] - values[1]))
  loss, (metrics, _) = evaluate(objective, variables, data)
  want = np.mean(errors, axis=0)
  assert float(loss) == pytest.approx(want[0]) and want[0] > 0
  assert float(metrics['lvm_med_loss']) == float(loss)
  assert float(metrics['matching_accuracy']) == pytest.approx(want[1])
  assert float(metrics['matching_gap']) == pytest.approx(want[2], abs=1e-4)


@pytest.mark.parametrize('kind', ['channel 3D', 'conv'])
def test_every_part_of_any_encoder_learns(kind):
  objective, variables, data = start(LVMMed, kind, batch(kind, count=6), **SMALL | {'noise': 0.05})

  def loss(params):
    return objective.loss(variables | {'params': params}, data, jax.random.key(3), 0)

  (value, (metrics, extra)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])
  stats = metrics.pop('stats')
  assert set(stats) == {'projector', 'local_projector'} | ({'encoder'} if kind == 'conv' else set())
  assert value.shape == () and value.dtype == jnp.float32 and float(value) > 0 and extra == {}
  assert all(m.shape == () for m in metrics.values())
  assert set(grads) == {'encoder', 'projector', 'local_projector', 'graph'}
  for name, tree in grads.items():
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(tree)), name
    assert sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(tree)) > 0, name


def test_duplicates_and_empty_images_are_finite():
  objective, variables, data = start(LVMMed, 'conv', batch('conv', count=4), **SMALL)

  def loss(params, image):
    changed = dict(data, **{'global': data['global'] | {'image': image}})
    return objective.loss(variables | {'params': params}, changed, jax.random.key(3), 0)[0]

  run = jax.jit(jax.value_and_grad(loss))
  image = data['global']['image']
  for change in (jnp.broadcast_to(image[:1, :1], image.shape), image.at[1].set(image[0]), jnp.zeros_like(image)):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(variables['params'], change)))


def test_the_order_of_the_images_of_a_graph_does_not_matter():
  objective, variables, data = start(LVMMed, 'conv', batch('conv', count=8), **SMALL | {'group': 8})
  order = np.random.default_rng(0).permutation(8)
  run = jax.jit(jax.value_and_grad(lambda p, d: objective.loss(variables | {'params': p}, d, jax.random.key(0), 0)[0]))
  first, grads = run(variables['params'], data)
  second, others = run(variables['params'], jax.tree.map(lambda x: x[order], data))
  assert float(first) == float(second) > 0
  size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * size), grads, others)


def test_groups_keep_the_order_and_leave_none_out():
  x = jnp.arange(24.0).reshape(12, 2)
  np.testing.assert_array_equal(lvm_med.in_groups(x, 4), np.asarray(x).reshape(3, 4, 2))
  np.testing.assert_array_equal(lvm_med.in_groups(x, 32), np.asarray(x)[None])
  cut = np.asarray(lvm_med.in_groups(jnp.arange(11), 4))
  np.testing.assert_array_equal(cut, [[0, 1, 2, 3], [4, 5, 6, 7], [7, 8, 9, 10]])


def test_places_are_means_of_blocks_and_of_channels_that_are_there():
  rng = np.random.default_rng(0)
  x, valid = rng.normal(size=(2, 2 * 5 * 4, 3)), np.ones((2, 2, 20), bool)
  valid[0, 1] = False
  features = Features(None, None, jnp.asarray(x, jnp.float32), jnp.asarray(valid.reshape(2, -1)), (2, 5, 4))
  have = np.asarray(lvm_med.pooled_places(features, True, 6))
  cells = x.reshape(2, 2, 5, 4, 3)
  cells = np.stack([cells[0, 0], cells[1].mean(axis=0)])
  want = [cells[:, r : r + 2, c : c + 2].mean(axis=(1, 2)) for r in (0, 2, 4) for c in (0, 2)]
  np.testing.assert_allclose(have, np.stack(want, axis=1), atol=1e-6)


def test_held_out_views_that_are_the_same_match_in_spite_of_margin_and_noise():
  objective, variables, data = start(LVMMed, 'conv', batch('conv', count=8), **SMALL | {'noise': 5.0, 'margin': 50.0})
  data['global']['image'] = jnp.repeat(data['global']['image'][:, :1], 2, axis=1)
  loss, (metrics, extra) = evaluate(objective, variables, data, train=False)
  assert float(loss) == 0 and float(metrics['matching_accuracy']) == 1 and float(metrics['matching_gap']) == 0
  assert 'stats' not in metrics and extra == {}


def test_the_loss_falls_when_it_is_minimised():
  data = batch('conv', count=8)
  options = SMALL | {'noise': 0.02, 'hidden_dim': 64, 'local_dim': 32}
  objective, variables, _ = start(LVMMed, 'conv', data, **options)
  image, adam = data['global']['image'][:, :1], optax.adam(1e-2)

  @jax.jit
  def step(params, moments, key):
    views = image + 0.3 * jax.random.normal(key, (8, 2, *image.shape[2:]))
    noisy = dict(data, **{'global': data['global'] | {'image': views}})
    loss = lambda p: objective.loss(variables | {'params': p}, noisy, key, 0)
    (_, (metrics, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = adam.update(grads, moments)
    return optax.apply_updates(params, updates), moments, metrics['lvm_med_loss']

  params, moments, losses = variables['params'], adam.init(variables['params']), []
  for key in jax.random.split(jax.random.key(0), 30):
    params, moments, loss = step(params, moments, key)
    losses.append(float(loss))
  print('first five', np.mean(losses[:5]), 'last five', np.mean(losses[-5:]))
  assert np.mean(losses[:5]) > 0.5 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize('options,word', [
    (dict(group=1), 'group'), (dict(neighbors=0), 'neighbors'), (dict(local_weight=1.5), 'local_weight'),
    (dict(margin=-1), 'margin'), (dict(noise=-1), 'noise'), (dict(strength=0), 'strength'),
    (dict(feature='means'), "'mean'")])
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    LVMMed(encoder('vit'), **options)


def test_one_image_or_one_view_is_too_few():
  objective, variables, data = start(LVMMed, 'vit', batch(count=1), **SMALL)
  with pytest.raises(UserError, match='batch_size 1'):
    objective.loss(variables, data, jax.random.key(0), 0)
  with pytest.raises(UserError, match='augment.views 1'):
    jax.eval_shape(objective.init, jax.random.key(0), batch(views=1))
