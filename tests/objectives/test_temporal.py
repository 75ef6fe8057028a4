"""Methods of videos: losses from the parts by hand, frames that are not there, frozen encoders in pieces, what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives.losses import temporal
from jaxmed.objectives.temporal import frames
from jaxmed.objectives.temporal.anticipate import Anticipate
from jaxmed.objectives.temporal.phases import Phases
from jaxmed.objectives.temporal.phases_tools import PhasesTools
from tests.objectives import siamese_fakes as fakes

COUNT, LENGTH = 3, 6
OWN = np.array([6, 4, 1])  # frames of each window
SMALL = dict(num_classes=3, dropout=0.0, freeze_encoder=False)
PHASES = SMALL | dict(stages=2, layers=2, width=4, smoothing=0.15)
FUTURE = SMALL | dict(tokens=2, stride=2.0, dim=8, depth=1, num_heads=2, hidden_dim=8, look_back=3, pooled_dim=4, anchors=3)


def windows(beyond=np.nan):
  """Windows of noise; what lies beyond their frames is anything, labels too."""
  rng = np.random.default_rng(0)
  there = np.arange(LENGTH) < OWN[:, None]
  image = np.where(there[..., None, None, None], rng.normal(size=(COUNT, LENGTH, 8, 8, 2)), beyond)
  index = np.where(there, np.arange(COUNT * LENGTH).reshape(there.shape), -1)
  label = np.where(there, rng.integers(-1, 3, there.shape), 2)
  return {'image': jnp.asarray(image, jnp.float32), 'index': jnp.asarray(index), 'label': jnp.asarray(label),
          'channels': jnp.broadcast_to(jnp.arange(2), (COUNT, LENGTH, 2))}


@functools.cache
def started(method, **options):
  return fakes.start(method, 'vit', windows(), **options)


@functools.partial(jax.jit, static_argnums=0)
def step(objective, params, data):
  run = lambda params: objective.loss({'params': params, 'target': {}, 'extra': {}}, data, jax.random.key(3), 0, False)
  return jax.value_and_grad(run, has_aux=True)(params)


def vectors(objective, params, data):
  """[B, K, D] of the frames that are there, by the encoder's own call."""
  known = jnp.nan_to_num(data['image'].reshape(-1, 8, 8, 2))
  return fakes._vectors(objective.encoder, 'cls', params['encoder'], known, None, None).reshape(COUNT, LENGTH, -1)


@pytest.mark.parametrize('total', ['mean', 'sum'])
def test_phases(total):
  weights = (1.0, 0.5, 2.0)
  objective, variables, data = started(Phases, stage_sum=total, class_weights=weights, **PHASES)
  params, valid = variables['params'], np.arange(LENGTH) < OWN[:, None]
  (loss, (metrics, _)), grad = step(objective, params, data)
  x = vectors(objective, params, data)
  logits = jax.jit(objective.network.apply)({'params': params['head']}, x, jnp.asarray(valid))
  labels = np.where(valid, data['label'], -1)
  terms, right = 0.0, []
  for stage in np.asarray(logits, np.float64):
    log_p = stage - np.log(np.exp(stage).sum(axis=-1, keepdims=True))
    pairs = [(weights[y], -log_p[i][y]) for i, y in np.ndenumerate(labels) if y >= 0]
    terms += sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
    terms += 0.15 * np.mean([min((log_p[b, t, k] - log_p[b, t - 1, k]) ** 2, 16)
                             for b, t, k in np.ndindex(COUNT, LENGTH, 3) if t and valid[b, t]])
    right = [log_p[i].argmax() == y for i, y in np.ndenumerate(labels) if y >= 0]
  assert float(loss) == pytest.approx(terms / (2 if total == 'mean' else 1), rel=1e-5)
  assert float(metrics['accuracy']) == pytest.approx(np.mean(right))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
  assert np.abs(grad['encoder']['patch_embed']['kernel']).max() > 0


@pytest.mark.parametrize(('method', 'options'), [(Phases, PHASES | dict(stage_sum='mean', class_weights=(1.0, 0.5, 2.0))),
                                                 (Anticipate, FUTURE)])
def test_what_is_beyond_a_video_changes_nothing(method, options):
  objective, variables, data = started(method, **options)
  (loss, _), _ = step(objective, variables['params'], data)
  other = windows(7.0) | {'label': jnp.where(data['index'] >= 0, data['label'], 0)}
  assert float(step(objective, variables['params'], other)[0][0]) == float(loss)


def test_anticipation():
  objective, variables, data = started(Anticipate, **FUTURE)
  params, valid = variables['params'], jnp.arange(LENGTH) < OWN[:, None]
  (loss, (metrics, _)), grad = step(objective, params, data)
  at = np.array([0, 2, 4])
  said = jax.jit(objective.network.apply)({'params': params['head']}, vectors(objective, params, data), at)
  labels, ended = jnp.where(valid, data['label'], -1), jnp.asarray([False, True, True])
  current = temporal.class_cross_entropy(said.current, labels)
  tokens = temporal.future_tokens(labels, valid, 2, 2, 3, ended)[:, at]
  assert np.asarray(tokens)[1, 1].tolist() == [3, 3] and np.asarray(tokens)[0, 2].tolist() == [-1, -1]
  future = temporal.class_cross_entropy(said.future, tokens)
  horizon = 2 * 2 / 60
  minutes, told = temporal.remaining_time(labels, valid, 3, horizon, 60.0, ended)
  error = temporal.time_error(said.remaining, minutes, horizon, told)
  assert objective.network.horizon == pytest.approx(horizon)
  assert float(loss) == pytest.approx(float(0.5 * current + 0.5 * future + 0.005 * error), rel=1e-5)
  assert float(metrics['time_error']) == pytest.approx(float(error), rel=1e-5)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_a_frozen_encoder_in_pieces():
  objective, variables, data = started(Phases, stage_sum='mean', class_weights=(1.0, 0.5, 2.0), **PHASES)
  encode = lambda fixed, many: frames.encode(objective.encoder, variables['params']['encoder'], data, 'cls', True, None,
                                             fixed, many)[0]
  whole, pieces = jax.jit(lambda: (encode(True, 0), encode(True, 4)))()
  np.testing.assert_allclose(pieces, whole, atol=1e-5)
  there = np.arange(LENGTH) < OWN[:, None]
  np.testing.assert_allclose(np.asarray(whole)[there], vectors(objective, variables['params'], data)[there], atol=1e-5)
  frozen = objective.__class__(objective.encoder, **PHASES | dict(freeze_encoder=True, frames_at_once=4))
  assert frozen.frozen(0) == {'encoder': True} and objective.frozen(0) == {}


@pytest.mark.parametrize(('method', 'options', 'match'), [
  (Phases, dict(head='tecn'), "'tecno'"), (Phases, dict(num_classes=3, class_weights=(1.0,)), '1 numbers, loader.label 3'),
  (Phases, dict(layers=-1), 'at least 0'), (Anticipate, dict(num_heads=3), 'num_heads 3'),
  (Anticipate, dict(stride=0.1), 'less than a frame'), (Anticipate, dict(anchors=0), 'anchors 0 must be at least 1'),
  (Anticipate, dict(num_classes=3, class_weights=(1.0,)), '1 numbers')])
def test_options(method, options, match):
  with pytest.raises(UserError, match=match):
    method(fakes.encoder('vit'), **options)


@pytest.mark.parametrize('method', [Phases, Anticipate])
def test_needs_windows_and_labels(method):
  with pytest.raises(UserError, match=r'loader\.window'):
    method(fakes.encoder('vit'), num_classes=3).init(jax.random.key(0), {'image': jnp.zeros((2, 8, 8, 2))})
  with pytest.raises(UserError, match=r'loader\.label'):
    method(fakes.encoder('vit')).init(jax.random.key(0), windows())


@pytest.mark.parametrize(('joint', 'first'), [('sum', True), ('learned', False)])
def test_phases_and_tools(joint, first):
  data = {name: x[:, 0] for name, x in windows().items() if name != 'index'}
  tools = np.random.default_rng(1).integers(-1, 2, (COUNT, 1, 4))
  data |= {'signal': jnp.asarray(tools, jnp.float32), 'signal_mask': jnp.asarray([[True], [False], [True]])}
  objective, variables, _ = fakes.start(PhasesTools, 'vit', data, tools=4, num_classes=3, joint=joint, tools_first=first)
  params = variables['params']
  (loss, _), grad = step(objective, params, data)
  x = np.asarray(fakes._vectors(objective.encoder, 'cls', params['encoder'], data['image'], None, None), np.float64)
  dense = lambda name, v: v @ np.asarray(params['head'][name]['kernel'], np.float64) + params['head'][name]['bias']
  z = dense('tools', x)
  p = 1 / (1 + np.exp(-z))
  phases = dense('phases', np.concatenate([x, p], axis=1) if first else x)
  log_p = phases - np.log(np.exp(phases).sum(axis=1, keepdims=True))
  label = np.asarray(data['label'])
  phase = -np.mean([log_p[i, y] for i, y in enumerate(label) if y >= 0])
  known = (tools[:, 0] >= 0) & np.array([[True], [False], [True]])
  tool = -np.mean(np.log(np.where(tools[:, 0] > 0, p, 1 - p))[known])
  s = np.asarray(params.get('log_variances', np.zeros(2)), np.float64)
  want = np.exp(-s[0]) * phase + s[0] + np.exp(-s[1]) * tool + s[1]
  assert float(loss) == pytest.approx(want, rel=1e-5) and (joint == 'sum') == ('log_variances' not in params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
  with pytest.raises(UserError, match='objective.tools=5, but the signals of the corpus have 4'):
    PhasesTools(objective.encoder, tools=5, num_classes=3).loss(variables, data, jax.random.key(0), 0)
