"""Losses of pairs with any targets against float64 loops: labels, mixed inputs, soft targets; and their methods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from jaxmed.errors import UserError
from jaxmed.models.text.registry import create_text
from jaxmed.objectives import METHODS
from jaxmed.objectives.losses import paired
from jaxmed.objectives.networks import Clock
from tests.objectives import siamese_fakes as fakes
from tests.objectives.siamese_fakes import check_gradient, unit

COUNTS = np.array([True, True, False, True, True])
SAME = np.array([3, 7, 3, 3, 9])
SHARE, OTHER = np.array([0.3, 1.0, 0.6, 0.2, 0.9]), np.array([1, 1, 4, 2, 0])  # one is its own partner


def cross_entropy(logits, targets, real):
  """The sum over j of -T_ij log softmax_j among those that count, the mean over i that count."""
  total = 0.0
  for i in real:
    log_sum = np.log(sum(np.exp(logits[i, j]) for j in real))
    total += sum(targets[i, j] * (log_sum - logits[i, j]) for j in real)
  return total / len(real)


def unicl_reference(u, v, s, real):
  logits = np.exp(s) * unit(u) @ unit(v).T
  targets = (SAME[:, None] == SAME).astype(float)
  targets /= targets[:, real].sum(axis=1, keepdims=True)
  return (cross_entropy(logits, targets, real) + cross_entropy(logits.T, targets, real)) / 2


def mixed_reference(u, v, s, real):
  logits, p = np.exp(s) * unit(u) @ unit(v).T, np.diag(SHARE)
  for i, j in enumerate(OTHER):
    p[i, j] += 1 - SHARE[i]
  np.testing.assert_allclose(p.sum(axis=1), 1)
  return (cross_entropy(logits, p, real) + cross_entropy(logits.T, p.T, real)) / 2


def softened_reference(u, v, s, real, fixed=None):
  own = unit(v if fixed is None else fixed)
  logits, alike = np.exp(s) * unit(u) @ unit(v).T, np.exp(np.exp(s) * own @ own.T)
  targets = alike / alike[:, real].sum(axis=1, keepdims=True)
  return (cross_entropy(logits, targets, real) + cross_entropy(logits.T, targets, real)) / 2


def chunks(loss):
  return functools.partial(jax.jit, static_argnums=(4, 5))(loss)


KINDS = {
    'unicl': (lambda u, v, s, counts, chunk: paired.unicl(u, v, s, SAME[:, None], counts, chunk), unicl_reference),
    'mixed': (lambda u, v, s, counts, chunk: paired.mixed(u, v, jnp.exp(-s), jnp.float32(SHARE), jnp.asarray(OTHER), counts, chunk),
              mixed_reference),
    'softened': (lambda u, v, s, counts, chunk: paired.softened(u, v, jnp.exp(-s), counts, chunk), softened_reference),
}


def given(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), np.float64(1.3)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('counts', [None, COUNTS], ids=['all', 'some'])
def test_losses_are_those_of_loops(kind, counts):
  loss, reference = KINDS[kind]
  real = np.arange(5) if counts is None else np.flatnonzero(counts)
  u, v, s = given()
  one = jax.jit(lambda u, v: loss(u, v, jnp.float32(s), counts, 0))
  assert float(one(jnp.float32(u), jnp.float32(v))) == pytest.approx(reference(u, v, s, real), rel=2e-6)
  fixed = {'fixed': v} if kind == 'softened' else {}  # no gradient through the targets
  check_gradient(one, lambda u, v: reference(u, v, s, real, **fixed), u, v)


@pytest.mark.parametrize('kind', KINDS)
def test_some_at_a_time_is_all_at_once(kind):
  loss, (u, v, s) = KINDS[kind][0], given(1)

  @jax.jit
  def every(u, v, s):
    return [jax.value_and_grad(lambda u, v, s, c=c: loss(u, v, s, COUNTS, c), (0, 1, 2))(u, v, s) for c in (0, 1, 2, 3, 5)]

  whole, *parts = every(jnp.float32(u), jnp.float32(v), jnp.float32(s))
  for part in parts:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), whole, part)
  assert not np.any(whole[1][0][2]) and not np.any(whole[1][1][2])  # what does not count has no gradient


def test_they_are_clip_where_each_pair_is_alone():
  u, v, s = map(jnp.float32, given(2))
  want = float(paired.clip(u, v, s, chunk=0)[0])
  assert float(paired.unicl(u, v, s, jnp.arange(5)[:, None], chunk=2)) == pytest.approx(want, rel=1e-5)
  ones = jnp.ones(5)
  assert float(paired.mixed(u, v, jnp.exp(-s), ones, jnp.asarray(OTHER), chunk=0)) == pytest.approx(want, rel=1e-5)
  v = jnp.eye(5, 7)
  want = float(paired.clip(u, v, jnp.log(50.0), chunk=0)[0])
  assert float(paired.softened(u, v, 0.02, chunk=0)) == pytest.approx(want, rel=1e-5)


def test_equal_labels_are_no_negatives():
  """One step of descent brings pairs of one label nearer; CLIP drives them apart."""
  u = jnp.eye(4, 6) + 0.1
  v, s, same = u + 0.05, jnp.float32(1.0), jnp.array([[0], [0], [1], [2]])
  across = lambda loss: float(jax.grad(lambda v: loss(u, v))(v)[1] @ u[0])
  assert across(lambda u, v: paired.unicl(u, v, s, same)) < 0 < across(lambda u, v: paired.clip(u, v, s)[0])


def start(name, **options):
  method, encoder = METHODS[name], fakes.encoder('vit')
  words = create_text('text_micro', 7, embed_dim=16, depth=1, num_heads=2)
  objective = method(encoder, out_dim=8, towers=FrozenDict(text=words), **options)
  rng = np.random.default_rng(0)
  size = (6, *encoder.image_size, encoder.in_channels)
  batch = {'image': jnp.float32(rng.normal(size=size)), 'label': jnp.array([0, 0, -1, -1, -1, 1]),
           'channels': jnp.zeros((6, encoder.in_channels), jnp.int32), 'index': jnp.arange(6),
           'text': jnp.asarray(rng.integers(1, 257, (6, 7))).at[3].set(0).at[4].set(jnp.arange(1, 8)).at[2].set(jnp.arange(1, 8))}
  return objective, objective.init(jax.random.key(0), batch), batch


def test_classes_of_labels_and_texts():
  objective, _, batch = start('unicl')
  of = np.asarray(objective.classes(batch))
  alike = (of[:, None] == of).all(axis=-1)
  want = np.eye(6, dtype=bool)
  want[0, 1] = want[1, 0] = want[2, 4] = want[4, 2] = True
  np.testing.assert_array_equal(alike, want)
  alone = np.asarray(dataclasses.replace(objective, by_text=False).classes(batch))
  assert len(np.unique(alone, axis=0)) == 5


def test_unicl_and_convirt_are_what_their_losses_say():
  for name, options in (('unicl', {}), ('convirt', {'weight': 0.75})):
    objective, variables, batch = start(name, **options)
    value, (metrics, _) = jax.jit(objective.loss)(variables, batch, jax.random.key(1), 0)
    assert np.isfinite(float(value)) and metrics['logit_scale'] == pytest.approx(10.0 if name == 'convirt' else 1 / 0.07, rel=1e-5)
  assert variables['params']['similarity'] == {}  # nothing of ConVIRT's logits is trained


def test_inputs_are_mixed_at_first_and_half_of_them():
  objective, variables, batch = start('mind_eye', clock=Clock(100, 10.0))
  share, other = objective.drawn(jax.random.key(0), batch | {'label': jnp.zeros(4000)} | {
      k: jnp.zeros((4000, 1), jnp.int32) for k in ('channels',)}, jnp.asarray(True))
  assert 0.47 < float((share < 1).mean()) < 0.53 and sorted(np.asarray(other)) == [*range(4000)]
  assert 0.4 < float(share[share < 1].mean()) < 0.6 and float((np.abs(share[share < 1] - 0.5) > 0.4).mean()) > 0.5  # Beta(.15, .15)
  apart = batch | {'channels': jnp.arange(6)[:, None]}
  assert np.all(objective.drawn(jax.random.key(0), apart, jnp.asarray(True))[0] == 1)  # of other channels
  loss = jax.jit(objective.loss, static_argnums=4)
  key = jax.random.key(2)
  early, late = (float(loss(variables, batch, key, step, True)[0]) for step in (0, 50))
  held = float(loss(variables, batch, key, 50, False)[0])
  assert early != late and held == pytest.approx(late, rel=1e-5)  # SoftCLIP mixes nothing
  with pytest.raises(UserError, match='objective.mix_share 2'):
    dataclasses.replace(objective, mix_share=2)
