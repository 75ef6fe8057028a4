"""What all methods that compare views must keep: any encoder, any batch, no gradient into targets, one loss."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives import networks
from jaxmed.objectives.clustering.deepcluster import DeepCluster
from jaxmed.objectives.clustering.swav import SwAV
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.contrastive.barlow import BarlowTwins
from jaxmed.objectives.contrastive.byol import BYOL
from jaxmed.objectives.contrastive.lejepa import LeJEPA
from jaxmed.objectives.contrastive.mocov3 import MoCoV3
from jaxmed.objectives.contrastive.simclr import SimCLR
from jaxmed.objectives.contrastive.vicreg import VICReg
from tests.objectives.siamese_fakes import batch, encoder, evaluate, start

SMALL = {
    SimCLR: dict(out_dim=8), MoCoV3: dict(hidden_dim=24, out_dim=8), BYOL: dict(hidden_dim=24, out_dim=8),
    SwAV: dict(num_prototypes=5, hidden_dim=24, out_dim=8, queue_length=7, queue_start=0),
    DeepCluster: dict(rows=6, num_prototypes=2, num_sets=2, hidden_dim=24, out_dim=8), BarlowTwins: dict(hidden_dim=24),
    VICReg: dict(hidden_dim=24), LeJEPA: dict(hidden_dim=24, out_dim=8, slices=16),
}
MULTI = (SwAV, DeepCluster, LeJEPA)
METHODS = pytest.mark.parametrize('method', SMALL, ids=lambda m: m.__name__)


def views_for(method, kind='vit', count=6, seed=0):
  return batch(kind, count, local=2 if method in MULTI else 0, seed=seed)


def clustered(variables):
  """With assignments, where a method has them, so that its loss is not 0."""
  if 'assignments' not in variables['extra']:
    return variables
  extra = dict(variables['extra'])
  extra['assignments'] = jnp.arange(extra['assignments'].size).reshape(extra['assignments'].shape) % 2
  extra['centroids'] = jax.random.normal(jax.random.key(5), extra['centroids'].shape)
  extra['centroids'] /= jnp.linalg.norm(extra['centroids'], axis=-1, keepdims=True)
  return variables | {'extra': extra}


@functools.partial(jax.jit, static_argnums=0)
def _gradient(objective, params, target, extra, data):
  def loss(params, target):
    return objective.loss({'params': params, 'target': target, 'extra': extra}, data, jax.random.key(3), 0)
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, target)


def gradient(objective):
  """Compiled: variables, batch -> ((loss, aux), gradients of params and target)."""
  return lambda variables, data: _gradient(objective, variables['params'], variables['target'], variables['extra'], data)


def size(tree):
  return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))


def part(tree, like):
  """What a tree of dicts has under the keys of another."""
  return {k: part(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}


def finite(tree):
  return all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(tree))


def check_step(method, kind, variables, result):
  (value, (metrics, extra)), (grads, target) = result
  assert value.dtype == jnp.float32 and value.shape == () and finite((value, metrics, extra, grads))
  for name, tree in grads.items():
    assert size(tree) > 0, name
  assert size(target) == 0
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(extra) == shapes(variables['extra'])
  stats = metrics.pop('stats')
  assert all(m.shape == () for m in metrics.values())
  heads = set(variables['params']) - {'prototypes', 'encoder'}
  assert set(stats) == heads | ({'encoder'} if kind == 'conv' else set())
  for new, old in zip(jax.tree.leaves(stats), jax.tree.leaves(part(variables['params'], stats)), strict=True):
    assert new.shape == old.shape and not np.array_equal(new, old)


def flattened(data, change):
  return {k: dict(v, image=change(v['image'])) if isinstance(v, dict) else v for k, v in data.items()}


@METHODS
def test_channel_tokens_with_missing_channels(method):
  objective, variables, data = start(method, 'channel', views_for(method, 'channel'), **SMALL[method])
  variables = clustered(variables)
  check_step(method, 'channel', variables, gradient(objective)(variables, data))


@METHODS
def test_an_encoder_with_batch_norm_and_no_class_token(method):
  objective, variables, data = start(method, 'conv', views_for(method, 'conv'), **SMALL[method])
  variables, run = clustered(variables), gradient(objective)
  first = run(variables, data)
  order = np.random.default_rng(0).permutation(6)
  other = run(variables, jax.tree.map(lambda x: x[order], data))
  assert float(other[0][0]) == pytest.approx(float(first[0][0]), rel=2e-5)  # samples have no order
  for change in (lambda x: jnp.broadcast_to(x[:1, :1], x.shape), jnp.zeros_like):
    assert finite(run(variables, flattened(data, change)))
  check_step(method, 'conv', variables, first)


@METHODS
def test_two_samples(method):
  objective, variables, data = start(method, 'conv', views_for(method, 'conv', count=2), **SMALL[method])
  variables, run = clustered(variables), gradient(objective)
  for change in (lambda x: x, lambda x: jnp.broadcast_to(x[:1, :1], x.shape), jnp.zeros_like):
    assert finite(run(variables, flattened(data, change)))


@METHODS
def test_a_held_out_loss_changes_nothing(method):
  objective, variables, data = start(method, 'conv', views_for(method, 'conv'), **SMALL[method])
  variables = clustered(variables)
  held, (metrics, extra) = evaluate(objective, variables, data, train=False)
  assert finite(held) and 'stats' not in metrics
  jax.tree.map(np.testing.assert_array_equal, extra, variables['extra'])


@pytest.mark.parametrize('method', [MoCoV3, BYOL], ids=lambda m: m.__name__)
def test_targets_are_copies_that_follow_to_the_end(method):
  objective, variables, data = start(method, **SMALL[method])
  fresh = jax.jit(objective.init)(jax.random.key(0), data)
  for name in ('encoder', 'projector'):
    jax.tree.map(np.testing.assert_array_equal, fresh['params'][name], fresh['target'][name])
  assert set(fresh['target']) == {'encoder', 'projector'}
  assert float(objective.momentum(0)) == pytest.approx(objective.momentum_start)
  assert float(objective.momentum(objective.clock.steps)) == pytest.approx(1.0)
  middle = (1 + objective.momentum_start) / 2
  assert float(objective.momentum(objective.clock.steps // 2)) == pytest.approx(middle)


@pytest.mark.parametrize('method', [MoCoV3, BYOL], ids=lambda m: m.__name__)
def test_targets_see_all_channels(method):
  data = batch('channel')
  every = jnp.ones_like(data['global']['channel_mask'])
  image = jnp.nan_to_num(data['global']['image'])
  data['global'] |= {'image': image}
  seen = dict(data, **{'global': data['global'] | {'teacher_mask': every}})
  objective, variables, _ = start(method, 'channel', data, **SMALL[method])
  assert float(evaluate(objective, variables, data)[0]) != float(evaluate(objective, variables, seen)[0])


def test_batch_norm_of_views_apart():
  """Each view is encoded as if it were alone, and running statistics are the mean of the views'."""
  data, conv = batch('conv', views=3), encoder('conv')
  params = nn.unbox(jax.jit(siamese.init_encoder, static_argnums=0)(conv, jax.random.key(0), data))
  run = jax.jit(lambda group, norm: siamese.encode(conv, params, group, jax.random.key(1), True, 'mean', norm),
                static_argnums=1)
  group = data['global']
  have, stats = run(group, 'apart')
  alone = [run({name: x[:, v:v + 1] for name, x in group.items()}, 'together') for v in range(3)]
  np.testing.assert_allclose(have, np.concatenate([x for x, _ in alone], axis=1), atol=1e-6)
  together, _ = run(group, 'together')
  assert have.shape == together.shape and np.abs(have - together).max() > 1e-3
  mean = jax.tree.map(lambda *s: np.mean(s, axis=0), *[s for _, s in alone])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats, mean)


@pytest.mark.parametrize('method', [BYOL, MoCoV3, BarlowTwins, VICReg], ids=lambda m: m.__name__)
def test_methods_pass_the_norm_on(method, monkeypatch):
  seen, encode = [], siamese.encode
  monkeypatch.setattr(siamese, 'encode', lambda *args: seen.append(args[6:]) or encode(*args))
  objective, data = method(encoder('conv'), encoder_norm='apart', **SMALL[method]), batch('conv')
  variables = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), data))
  jax.eval_shape(lambda v: objective.loss(v, data, jax.random.key(0), jnp.asarray(0)), variables)
  assert seen.count(('apart',)) == 1 + bool(variables['target'])


RANDOM = {'drop_path': dict(depth=2, drop_path=0.9), 'rescale': dict(pos='rope', rope_rescale=2.0),
          'jitter': dict(pos='rope', rope_jitter=2.0), 'shift': dict(pos='rope', rope_shift=0.5)}


@pytest.mark.parametrize('options', RANDOM.values(), ids=list(RANDOM))
def test_a_target_has_nothing_random(options):
  """The class tokens of a target do not move between two keys: neither depth nor rotary coordinates are drawn."""
  random = encoder('channel', **options)
  data = batch('channel')
  params = nn.unbox(jax.jit(siamese.init_encoder, static_argnums=0)(random, jax.random.key(0), data))

  @functools.partial(jax.jit, static_argnums=0)
  def run(encoder, keys):
    return [siamese.encode(encoder, params, data['global'], key, True, 'cls')[0] for key in keys]

  keys = jax.random.split(jax.random.key(1))
  first, second = run(random, keys)
  assert not np.array_equal(first, second)
  first, second = run(networks.quiet(random), keys)
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize('method', [BYOL, MoCoV3], ids=lambda m: m.__name__)
def test_the_target_of_a_method_is_quiet(method, monkeypatch):
  random = encoder('channel', pos='rope', rope_rescale=2.0, rope_jitter=2.0, rope_shift=0.5, drop_path=0.1)
  objective, data, seen = method(random, **SMALL[method]), batch('channel'), []
  encode = siamese.encode
  monkeypatch.setattr(siamese, 'encode', lambda model, *rest: seen.append(model) or encode(model, *rest))
  variables = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), data))
  jax.eval_shape(lambda v: objective.loss(v, data, jax.random.key(0), jnp.asarray(0)), variables)
  assert seen == [random, random.clone(rope_rescale=0.0, rope_jitter=0.0, rope_shift=0.0, drop_path=0.0)]


@METHODS
def test_defaults(method):
  wide = encoder('vit', embed_dim=768, num_heads=12)
  objective = method(wide)
  rate, reference = method.LEARNING_RATE
  assert 0 < rate < 1 and reference > 1 and method.FEATURE in ('cls', 'mean')
  assert method.DEFAULTS['augment']['views'] == 2
  assert objective.encoder_params({'params': {'encoder': 1}, 'target': {'encoder': 2}}) == 1
  head = objective.head if method is BYOL else objective.projector
  want = {SimCLR: (768, 768, 128), MoCoV3: (4096, 4096, 256), BYOL: (4096, 256), SwAV: (2048, 128),
          DeepCluster: (2048, 128), BarlowTwins: (8192,) * 3, VICReg: (8192,) * 3, LeJEPA: (2048, 2048, 128)}[method]
  assert head.features == want
  narrow = method(encoder('vit', embed_dim=16))
  assert max((narrow.head if method is BYOL else narrow.projector).features) <= 256


@pytest.mark.parametrize('method,options,word', [
    (SimCLR, dict(temperature=0), 'temperature'), (SimCLR, dict(feature='clss'), "'cls'"),
    (SimCLR, dict(layers=0), 'layers'), (SimCLR, dict(chunk=-2), 'chunk'), (MoCoV3, dict(momentum_start=1.1), 'momentum'),
    (MoCoV3, dict(predictor_layers=0), 'predictor_layers'), (BYOL, dict(momentum_start=-1), 'momentum_start'),
    (SwAV, dict(num_prototypes=0), 'num_prototypes'), (SwAV, dict(queue_length=-2), 'queue_length'),
    (DeepCluster, dict(rows=5, num_prototypes=6), 'nearest is 5'), (BarlowTwins, dict(off_diagonal=-1), 'off_diagonal'),
    (VICReg, dict(covariance=-1), 'covariance'), (LeJEPA, dict(sigreg_weight=2), 'sigreg_weight'),
    (LeJEPA, dict(knots=1), 'knots'), (BYOL, dict(encoder_norm='each'), 'apart, together'),
    (VICReg, dict(encoder_norm='each'), 'apart, together')])
def test_bad_options_are_named(method, options, word):
  with pytest.raises(UserError, match=word):
    method(encoder('vit'), **options)


@pytest.mark.parametrize('method', [m for m in SMALL if m not in MULTI], ids=lambda m: m.__name__)
def test_one_view_is_too_few(method):
  objective = method(encoder('vit'), **SMALL[method])
  with pytest.raises(UserError, match='augment.views 1'):
    jax.eval_shape(objective.init, jax.random.key(0), batch(views=1))


def test_deepcluster_needs_rows():
  with pytest.raises(UserError, match='at least 2 training images'):
    jax.eval_shape(DeepCluster(encoder('vit')).init, jax.random.key(0), batch())
