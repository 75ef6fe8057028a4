"""Alice: matches of places, crops around them, alignment, the three losses in float64, who gets gradients."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders.casa import CASA
from jaxmed.objectives.distillation.self_distillation import cross_view
from jaxmed.objectives.volumes.alice import Alice, match
from tests.objectives import siamese_fakes as fakes

SMALL = dict(out_dim=8, hidden_dim=12, bottleneck_dim=6, decoder_dim=16, decoder_depth=1, decoder_heads=2, casa_heads=2,
             casa_hidden=16, tries=20, start_temperature=0.2, teacher_temperature=0.3)


def test_a_shifted_copy_is_found_by_its_shift():
  """Where its place is there; a threshold that nothing passes leaves the best of the places, and says so."""
  tokens = jax.random.normal(jax.random.key(0), (40, 6, 7, 5))
  shifted = jnp.roll(tokens, (2, -3), axis=(1, 2))
  flat = lambda x: x.reshape(40, 42, -1)
  ground = np.zeros((40, 6, 7), bool)
  ground[:, 1:4, 3:6] = True
  ask = jax.jit(match, static_argnames=('tries', 'threshold'))
  every = jnp.ones((40, 42), bool)
  first, second, score, passed = ask(jax.random.key(1), flat(tokens), flat(shifted), flat(jnp.asarray(ground))[..., 0],
                                     every, tries=5, threshold=0.99)
  at, there = (np.stack(np.unravel_index(x, (6, 7))) for x in (first, second))
  assert (there - at == np.asarray([[2], [-3]])).all() and ground[np.arange(40), *at].all() and passed.all()
  assert len(np.unique(first)) == 9 and np.allclose(score, 1, atol=1e-5)
  noise = jax.random.normal(jax.random.key(2), (40, 42, 5))
  *_, alone, _ = ask(jax.random.key(1), flat(tokens), noise, every, every, tries=1, threshold=1.0)
  *_, best, passed = ask(jax.random.key(1), flat(tokens), noise, every, every, tries=42, threshold=1.0)
  assert not passed.any() and (np.asarray(best) >= np.asarray(alone) - 1e-6).mean() > 0.7
  few = jnp.asarray(np.arange(42) < 4)[None].repeat(40, 0)
  assert (ask(jax.random.key(1), flat(tokens), noise, every, few, tries=3, threshold=0.5)[1] < 4).all()


def test_alignment_of_the_same_tokens_is_the_same():
  """And is attention, sum and norm, MLP, sum and norm in float64."""
  module, rng = CASA(2, 12), np.random.default_rng(0)
  query, context = (jnp.asarray(rng.normal(size=(2, n, 6)), jnp.float32) for n in (3, 4))
  params = nn.unbox(module.init(jax.random.key(0), query, context))['params']
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
  apply = jax.jit(lambda q, c: module.apply({'params': params}, q, c))
  out = apply(query, context)
  np.testing.assert_array_equal(out, apply(query, jnp.array(context)))
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  q, k, v = (np.einsum('bnd,dhe->bnhe', x, p[name]['kernel'].reshape(6, 2, 64))
             for name, x in (('q', query), ('k', context), ('v', context)))
  weights = np.exp(fakes.log_softmax(np.einsum('bnhe,bmhe->bhnm', q, k) / 8))
  y = np.einsum('bhnm,bmhe->bnhe', weights, v).reshape(2, 3, -1) @ p['proj']['kernel'].reshape(-1, 6)
  norm = lambda x, n: ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[n]['scale']
                       + p[n]['bias'])
  x = norm(np.asarray(query) + y, 'norm1')
  y = np.maximum(x @ p['fc1']['kernel'] + p['fc1']['bias'], 0) @ p['fc2']['kernel'] + p['fc2']['bias']
  np.testing.assert_allclose(out, norm(x + y, 'norm2'), atol=2e-4)


def start(kind='vit', count=3, **options):
  """(objective, variables, batch) on a tiny encoder; images of 16 pixels, crops of 8."""
  size = {'volume': (4, 16, 16)}.get(kind, (16, 16))
  name = {'vit': 'vit_micro/4', 'channel': 'channel_vit_micro/4', 'volume': 'stunet_micro'}[kind]
  sizes = dict(depths=(1, 1, 1), dims=(8, 8, 16), strides='1,1x2x2,1x2x2') if kind == 'volume' else fakes.TINY
  encoder = create_model(name, size, 2, **sizes)
  rng = np.random.default_rng(0)
  batch = {k: v[:, 0] for k, v in fakes.group(rng, count, 1, size, kind == 'channel').items()}
  objective = Alice(encoder, **SMALL | options)
  shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.3 if x.ndim > 1 else 0.1) + (x.ndim == 1), jnp.float32)
  drawn = {name: jax.tree.map(draw, shapes[name]) for name in ('params', 'target')}
  return objective, drawn | {'extra': jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
                                                   shapes['extra'])}, batch


@functools.partial(jax.jit, static_argnums=(0, 5))
@functools.partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
def step(objective, params, target, variables, batch, train):
  return objective.loss(variables | {'params': params, 'target': target}, batch, jax.random.key(0), 0, train)


@functools.partial(jax.jit, static_argnums=0)
def parts(objective, variables, batch):
  """What the loss is made of, by the objective's own pieces."""
  keys = jax.random.split(jax.random.key(0), 5)
  group, found = objective.matched_views(variables, batch, keys[0])
  hidden = objective.masks(keys[1], 2 * len(batch['image']))
  crops = group['image'].reshape(-1, *objective.crop, 2)
  channels = group['channels'].reshape(-1, 2)
  see = lambda params, image: objective.encoder.apply({'params': params['encoder']}, image, channels)
  student, teacher = (see(variables['params'], jnp.where(hidden[..., None], 0, crops)), see(variables['target'], crops))
  out = {'crops': crops, 'hidden': hidden}
  for name, f in (('params', student), ('target', teacher)):
    p = variables[name]
    out[name] = {'class': objective.project('head', p, f.mean), 'tokens': objective.project('patch_head', p, f.patches)}
    out[name]['decoded'], out[name]['pixels'] = objective.decoded(p, f)
  query = out['params']['tokens']
  for name, f in (('params', student), ('target', teacher)):
    out[name]['aligned'] = objective.aligned(variables['params'], query, out[name]['decoded'], f, False, keys[3])
  return out, found


def test_the_losses_are_the_reference_and_who_is_trained():
  objective, variables, batch = start(casa_dropout=0.0)
  (loss, (metrics, extra)), (grads, still) = step(objective, variables['params'], variables['target'], variables, batch,
                                                  True)
  found = jax.tree.map(lambda x: np.asarray(x, np.float64), parts(objective, variables, batch)[0])
  student, teacher = found['params'], found['target']
  centre = {k: np.asarray(v, np.float64) for k, v in variables['extra'].items()}
  soft = lambda x, c: np.exp(fakes.log_softmax((x - c) / 0.2))
  entropy = lambda p, x: -(p * fakes.log_softmax(x / 0.1)).sum(-1)
  swapped = np.arange(6) ^ 1  # the other crop of the pair
  dino = entropy(soft(teacher['class'], centre['centre'])[swapped], student['class']).mean()
  patch = entropy(soft(teacher['aligned'], centre['patch_centre']), student['aligned']).mean()
  pixels = student['pixels'].reshape(6, 2, 2, 4, 4, 2).swapaxes(2, 3).reshape(6, 8, 8, 2)
  rebuilt = np.square(pixels - found['crops']).mean() / 2
  used = soft(teacher['aligned'], centre['patch_centre']).mean((0, 1))  # of prototypes; 0 where all tokens have the same
  for name, want in (('dino_loss', dino), ('patch_loss', patch), ('reconstruction', rebuilt),
                     ('patch_entropy_share', -(used * np.log(used)).sum() / np.log(8))):
    fakes.close(metrics[name], want, 1e-4)
  fakes.close(loss, dino + patch + 10 * rebuilt, 1e-4)
  want = 0.9 * centre['patch_centre'] + 0.1 * teacher['aligned'].mean((0, 1))
  np.testing.assert_allclose(extra['patch_centre'], want, atol=1e-5)
  np.testing.assert_allclose(extra['centre'], 0.9 * centre['centre'] + 0.1 * teacher['class'].mean(0), atol=1e-5)
  assert not any(np.any(x) for x in jax.tree.leaves(still))
  for name in ('encoder', 'decoder', 'head', 'patch_head', 'casa'):
    assert any(np.any(x) for x in jax.tree.leaves(grads[name])), name
  assert set(variables['target']) == {'encoder', 'decoder', 'head', 'patch_head'}
  pairs = [jnp.asarray(x['class'].reshape(3, 2, 8), jnp.float32) for x in (student, teacher)]
  either = [float(cross_view(pairs[0][:, order], jax.nn.softmax(pairs[1][:, order]), 0.1)) for order in ([0, 1], [1, 0])]
  assert either[0] == pytest.approx(either[1], rel=1e-6)  # views may change places
  assert (found['hidden'].reshape(6, 4, 2, 4, 2).mean((2, 4)).reshape(6, 16).sum(1) == 12).all()


def test_crops_show_the_match_and_fall_backs_are_counted():
  """A record beside its shifted copy: the same pixels; with a threshold that nothing passes all pairs are fall-backs."""
  objective, variables, batch = start(count=2)
  rng = np.random.default_rng(3)
  image = np.zeros((16, 16, 2), np.float32)
  image[:12, :12] = rng.normal(size=(12, 12, 2))
  both = jnp.asarray(np.stack([image, np.roll(image, (4, 4), (0, 1))]))

  class Seeing(Alice):
    def places(self, variables, known):
      """Pixels as tokens, without positions."""
      x = known['image'].reshape(2, 4, 4, 4, 4, 2).swapaxes(2, 3).reshape(2, 16, -1)
      return x, jnp.ones((2, 16), bool), (4, 4)

  seeing = Seeing(objective.encoder, **SMALL | {'threshold': 0.9})
  look = jax.jit(lambda key: seeing.matched_views(variables, batch | {'image': both}, key))
  for key in range(4):
    group, found = look(jax.random.key(key))
    assert found['fallbacks'] == 0 and float(found['match_distance']) == 2
    a, b = np.asarray(group['image'][0])
    assert np.array_equal(a, b) and (a != 0).all()
  _, found = parts(dataclasses.replace(objective, threshold=1.0), variables, batch)
  assert found['fallbacks'] == 2


def test_a_frozen_matcher_and_a_matcher_that_sees_places_alone():
  """It takes the teacher's place; tokens that say nothing but where they are give a distance of 0."""
  objective, variables, batch = start(count=2)
  matcher = create_model('vit_micro/8', (16, 16), 2, **fakes.TINY)
  weights = jax.tree.map(jnp.zeros_like, nn.unbox(matcher.init(jax.random.key(0), **batch))['params'])
  weights['pos_embed'] = jnp.asarray(np.random.default_rng(0).normal(size=weights['pos_embed'].shape), jnp.float32)
  weights['norm']['scale'] = jnp.ones(16)
  given = dataclasses.replace(objective, towers=FrozenDict(matcher=matcher))
  (_, (metrics, _)), _ = step(given, variables['params'], variables['target'],
                              variables | {'fixed': {'matcher': weights}}, batch, False)
  assert float(metrics['match_distance']) == 0 and float(metrics['match_score']) == pytest.approx(1, abs=1e-4)
  with pytest.raises(UserError, match='towers.matcher.fixed must be True'):
    given.places(variables, batch)
  with pytest.raises(UserError, match='towers.matcher.init has 3 channels and 2 axes: expected 2'):
    dataclasses.replace(objective, towers=FrozenDict(matcher=create_model('vit_micro/8', (16, 16), 3, **fakes.TINY)))


@pytest.mark.parametrize('kind', ['channel', 'volume'])
def test_other_encoders_and_volumes(kind):
  objective, variables, batch = start(kind, 2)
  (loss, (metrics, _)), (grads, _) = step(objective, variables['params'], variables['target'], variables, batch, True)
  assert np.isfinite(loss) and all(np.isfinite(x) for x in jax.tree.leaves(metrics))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads)) and any(np.any(x) for x in jax.tree.leaves(grads['encoder']))
  hidden = np.asarray(objective.masks(jax.random.key(0), 5))
  if kind == 'volume':
    assert objective.crop == (2, 8, 8) and (hidden == hidden[:, :1]).all()
    deep = dataclasses.replace(objective, mask_parts=(2, 4, 4)).masks(jax.random.key(0), 5)
    assert not (np.asarray(deep)[:, 0] == np.asarray(deep)[:, 1]).all() and np.asarray(deep).mean() == 0.75


def test_wrong_options():
  objective, variables, batch = start()
  with pytest.raises(UserError, match='batch_size must be at least 2'):
    objective.loss(variables, jax.tree.map(lambda x: x[:1], batch), jax.random.key(0), 0)
  for options, words in (({'crop_size': (6,)}, 'crop_size'), ({'crop_size': (32,)}, 'crop_size'), ({'tries': 0}, 'tries'),
                         ({'mask_parts': (1, 1)}, 'mask_parts'), ({'mask_parts': (4,)}, 'mask_parts'),
                         ({'mask_ratio': 1.0}, 'mask_ratio'), ({'threshold': 2.0}, 'threshold'),
                         ({'decoder_heads': 3}, 'decoder_heads'), ({'patch_weight': -1.0}, 'negative')):
    with pytest.raises(UserError, match=words):
      dataclasses.replace(objective, **options)
