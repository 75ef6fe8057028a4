"""Losses of masks in float64 NumPy and SciPy; the methods segment and regress whole, with what is not known, missing or frozen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmed.contracts import PENALTY
from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders import dense
from jaxmed.objectives.dense.segment import Segment
from jaxmed.objectives.losses import segmentation as losses
from jaxmed.objectives.losses.boundary import boundary, signed_distance
from jaxmed.objectives.networks import Clock
from jaxmed.objectives.supervised.regress import Regress

VALUES = (0, 2, 5, 7)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 6, 5, 4))
MASK = RNG.choice([-1, 0, 2, 5, 7, 9], size=(3, 6, 5), p=[0.1, 0.3, 0.2, 0.2, 0.15, 0.05])  # 9 is no class
ANNOTATED = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1]], bool)


def numpy_case(logits, mask, annotated):
  """(p [P, K], t [P, K] one-hot) of the known pixels of a sample, what is not annotated being background."""
  p = np.exp(logits - logits.max(axis=-1, keepdims=True)).reshape(-1, 4)
  p /= p.sum(axis=1, keepdims=True)
  p[:, 0] += p[:, 1:][:, ~annotated[1:]].sum(axis=1)
  p[:, 1:][:, ~annotated[1:]] = 0
  flat = mask.reshape(-1)
  classes = np.array([{0: 0, 2: 1, 5: 2, 7: 3}.get(v, -1) for v in flat])
  classes = np.where((classes > 0) & ~annotated[np.maximum(classes, 0)], 0, classes)
  return p[classes >= 0], np.eye(4)[classes[classes >= 0]]


CASES = [numpy_case(*x) for x in zip(LOGITS, MASK, ANNOTATED)]


def truth(annotated=ANNOTATED):
  return losses.truth_of(jnp.asarray(MASK), VALUES, None if annotated is None else jnp.asarray(annotated))


def logp(annotated=ANNOTATED):
  return losses.log_probabilities(jnp.asarray(LOGITS, jnp.float32), truth(annotated))


def test_the_published_example():
  p = np.array([[.7, .2, .1], [.1, .8, .1], [.3, .3, .4], [.6, .3, .1]], np.float32)
  t = losses.truth_of(jnp.asarray([[0, 1, 2, 1]]), (0, 1, 2))
  entropy, dice = losses.cross_entropy(jnp.log(p)[None], t), losses.soft_dice(jnp.log(p)[None], t)
  assert float(entropy) == pytest.approx(0.675021, abs=1e-6)
  assert float(dice) == pytest.approx((0.611112 + 0.470591) / 2, abs=1e-6)
  assert float(entropy - dice) == pytest.approx(0.134169, abs=1e-6)
  assert losses.output_weights(5) == pytest.approx((0.5333, 0.2667, 0.1333, 0.0667, 0), abs=1e-4)
  assert losses.output_weights(1) == (1.0,) and losses.output_weights(2) == (1.0, 0.0)


def test_cross_entropy_and_focal_loss():
  own = np.concatenate([(p * t).sum(axis=1) for p, t in CASES])
  assert float(losses.cross_entropy(logp(), truth())) == pytest.approx(-np.log(own).mean(), rel=1e-5)
  assert float(losses.focal(logp(), truth(), 2.0)) == pytest.approx(-((1 - own) ** 2 * np.log(own)).mean(), rel=1e-5)
  assert float(losses.focal(logp(), truth(), 0.0)) == pytest.approx(-np.log(own).mean(), rel=1e-5)


@pytest.mark.parametrize('batch', [False, True])
def test_soft_dice(batch):
  both, total = (np.stack([f(p, t).sum(axis=0) for p, t in CASES]) for f in (lambda p, t: p * t, lambda p, t: p + t))
  counts = ANNOTATED & (np.arange(4) > 0)
  if batch:
    both, total, counts = (both * counts).sum(axis=0), (total * counts).sum(axis=0), counts.any(axis=0)
  want = ((2 * both + 1e-5) / (total + 1e-5))[counts].mean()
  assert float(losses.soft_dice(logp(), truth(), batch)) == pytest.approx(want, rel=1e-5)


def test_hard_dice_and_overlap():
  found = [p.argmax(axis=1) for p, _ in CASES]
  both = np.array([[(t[:, k] * (f == k)).sum() for k in range(4)] for f, (_, t) in zip(found, CASES)]) * (ANNOTATED & (np.arange(4) > 0))
  total = np.array([[t[:, k].sum() + (f == k).sum() for k in range(4)] for f, (_, t) in zip(found, CASES)]) * (ANNOTATED & (np.arange(4) > 0))
  got = losses.overlap(jnp.asarray(LOGITS, jnp.float32), truth())
  np.testing.assert_array_equal(got[0], both)
  np.testing.assert_array_equal(got[1], total)
  want = (2 * both.sum(axis=0)[1:] / total.sum(axis=0)[1:]).mean()
  assert float(losses.hard_dice(jnp.asarray(LOGITS, jnp.float32), truth())) == pytest.approx(want, rel=1e-6)
  nothing = losses.truth_of(jnp.zeros((1, 4), jnp.int32), (0, 1))
  assert float(losses.hard_dice(jnp.asarray([[[2.0, 0.0]] * 4]), nothing)) == 1.0


def test_all_annotated_is_as_none_said():
  every = np.ones((3, 4), bool)
  np.testing.assert_allclose(logp(every), logp(None), atol=1e-6)
  np.testing.assert_allclose(np.exp(logp()).sum(axis=-1), 1, rtol=1e-5)


def test_without_a_background_a_label_of_what_is_not_annotated_is_unknown():
  mask = jnp.asarray([[1, 2, 3, -1]])
  t = losses.truth_of(mask, (1, 2, 3), jnp.asarray([[True, False, True]]))
  assert t.known.tolist() == [[True, False, True, False]] and t.background == -1
  x = jnp.asarray(RNG.normal(size=(1, 4, 3)), jnp.float32)
  np.testing.assert_allclose(losses.log_probabilities(x, t), jax.nn.log_softmax(x), rtol=1e-6)
  assert losses.wanted(t, 1, 3).tolist() == [[True, False, True]]


def test_gradients_are_finite_and_reach_what_is_merged():
  def loss(x):
    t = truth()
    p = losses.log_probabilities(x, t)
    return losses.cross_entropy(p, t) - losses.soft_dice(p, t) + losses.focal(p, t) + boundary(p, t)

  grads = jax.grad(loss)(jnp.asarray(LOGITS, jnp.float32))
  assert np.isfinite(grads).all() and np.abs(grads[1, ..., 1]).max() > 0  # class 1 is part of sample 1's background
  assert np.abs(np.asarray(grads)[np.asarray(MASK) < 0]).max() == 0


@pytest.mark.parametrize('shape', [(9, 7), (5, 6, 4)])
def test_signed_distances(shape):
  inside = RNG.random((2, *shape, 3)) < 0.3
  inside[1, ..., 2], inside[0, ..., 1] = False, True  # empty, and all
  got = np.asarray(signed_distance(jnp.asarray(inside)))
  for b in range(2):
    for k in range(3):
      one = inside[b, ..., k]
      want = ndimage.distance_transform_edt(~one) * ~one - (ndimage.distance_transform_edt(one) - 1) * one
      np.testing.assert_allclose(got[b, ..., k], want if one.any() and not one.all() else 0, atol=1e-6)


def test_the_boundary_loss():
  p = np.exp(np.asarray(logp(None), np.float64))
  total = count = 0.0
  for b in range(3):
    for k, value in enumerate(VALUES[1:], 1):
      one = MASK[b] == value
      phi = ndimage.distance_transform_edt(~one) * ~one - (ndimage.distance_transform_edt(one) - 1) * one
      known = np.isin(MASK[b], VALUES)
      total, count = total + (phi * p[b, ..., k])[known].sum(), count + known.sum()
  assert float(boundary(logp(None), truth(None))) == pytest.approx(total / count, rel=1e-5)


def test_coarser_labels_are_those_at_the_centres():
  got = losses.coarser(truth(None), (3, 2))
  rows, columns = (np.floor((np.arange(n) + 0.5) * have / n).astype(int) for n, have in ((3, 6), (2, 5)))
  for name in ('classes', 'known'):
    np.testing.assert_array_equal(getattr(got, name), np.asarray(getattr(truth(None), name))[:, rows][:, :, columns])


class TwoOutputs(nn.Module):
  """Logits of each pixel of the image, and of the map; its first output looks at the image alone."""

  num_classes: int
  deep_supervision: bool = False
  dtype: str = 'float32'

  @classmethod
  def levels(cls, encoder):
    return (encoder.num_levels,)

  @nn.compact
  def __call__(self, image, maps, train=False):
    fine, coarse = nn.Dense(self.num_classes, name='fine')(image), nn.Dense(self.num_classes, name='coarse')(maps[0])
    fine = fine + jax.image.resize(coarse, fine.shape, 'nearest')
    return (fine, coarse) if self.deep_supervision else (fine,)


@pytest.fixture
def two(monkeypatch):
  monkeypatch.setitem(dense.DECODERS, 'two', TwoOutputs)


def batch_of(size=(8, 8), channels=2, missing=True):
  rng = np.random.default_rng(1)
  mask = rng.choice([-1, *VALUES], size=(3, *size))
  shown = np.ones((3, channels), bool)
  shown[1, -1] = not missing
  image = np.float32(rng.normal(size=(3, *size, channels)))
  image[~shown.repeat(int(np.prod(size)), axis=0).reshape(3, *size, channels)] = np.nan
  return {'image': image, 'channels': np.tile(np.arange(channels, dtype=np.int32), (3, 1)), 'channel_mask': shown,
          'mask': np.int32(mask), 'annotated': ANNOTATED}


def started(family='channel_vit_micro/4', size=(8, 8), **options):
  encoder = create_model(family, size, 2, embed_dim=16, depth=1, num_heads=2)
  objective = Segment(encoder, values=VALUES, clock=Clock(100), **{'decoder': 'linear'} | options)
  variables = nn.unbox(jax.jit(objective.init)(jax.random.key(0), batch_of(size)))
  return objective, variables


def test_the_whole_loss_with_two_outputs(two):
  """The coarse output has weight 0, as the last; so the loss is that of the fine one, beside numbers of NumPy."""
  objective, variables = started(decoder='two', deep_supervision=True, focal_weight=0.5, boundary_weight=0.2, batch_dice=True)
  batch = batch_of()
  outputs, _ = objective.logits(variables, batch)
  assert [x.shape for x in outputs] == [(3, 8, 8, 4), (3, 2, 2, 4)]
  value, (metrics, _) = objective.loss(variables, batch, jax.random.key(1), 50, train=False)
  cases = [numpy_case(np.asarray(x, np.float64), m, a) for x, m, a in zip(outputs[0], batch['mask'], ANNOTATED)]
  own = np.concatenate([(p * t).sum(axis=1) for p, t in cases])
  t = losses.truth_of(jnp.asarray(batch['mask']), VALUES, jnp.asarray(ANNOTATED))
  p = losses.log_probabilities(outputs[0], t)
  want = -np.log(own).mean() - float(losses.soft_dice(p, t, True)) - 0.5 * ((1 - own) ** 2 * np.log(own)).mean()
  assert float(value) == pytest.approx(want + 0.5 * 0.2 * float(boundary(p, t)), rel=1e-4)  # halfway, half the weight
  assert float(metrics['known_pixels']) == pytest.approx(np.isin(batch['mask'], VALUES).mean())


def test_a_decoders_own_weights_and_terms(monkeypatch):
  """Weights of its outputs in place of nnU-Net's, and in training what it leaves in the collection of penalties."""
  class Own(TwoOutputs):
    output_weights = staticmethod(lambda count: (0.0, 3.0))

    @nn.compact
    def __call__(self, image, maps, train=False):
      self.sow(PENALTY, 'own', 0.25)
      return super().__call__(image, maps, train)

  monkeypatch.setitem(dense.DECODERS, 'own', Own)
  objective, variables = started(decoder='own', deep_supervision=True, dice_weight=0.0)
  batch = batch_of()
  coarse = objective.logits(variables, batch)[0][1]
  truth = losses.coarser(objective.truth(batch), (2, 2))
  want = 3 * losses.cross_entropy(losses.log_probabilities(coarse, truth), truth)
  value, (metrics, _) = objective.loss(variables, batch, jax.random.key(1), 0)
  assert float(value) == pytest.approx(float(want) + 0.25, rel=1e-5) and float(metrics['decoder_penalty']) == 0.25


def test_missing_and_moved_channels(two):
  """What a missing channel holds is nothing; channels in another order, with their ids, give the same logits."""
  objective, variables = started(decoder='two')
  batch = batch_of()
  logits = objective.logits(variables, batch)[0][0]
  assert np.isfinite(logits).all()
  other = batch | {'image': np.where(np.isnan(batch['image']), 3.0, batch['image'])}
  np.testing.assert_array_equal(objective.logits(variables, other)[0][0], logits)
  swapped = batch | {name: batch[name][..., ::-1] for name in ('image', 'channels', 'channel_mask')}
  np.testing.assert_allclose(objective.logits(variables, swapped)[0][0], logits, atol=1e-5)


def test_volumes_and_classes_that_are_ignored():
  objective, variables = started('vit_micro/4', (8, 8, 8))
  batch = batch_of((8, 8, 8))
  part = dataclasses.replace(objective, values=(0, 5), ignore=(2, 7), stored=VALUES)
  assert objective.logits(variables, batch)[0][0].shape == (3, 8, 8, 8, 4)
  assert np.isfinite(objective.loss(variables, batch, jax.random.key(0), 0)[0])
  t = part.truth(batch)
  assert t.annotated.tolist() == ANNOTATED[:, [0, 2]].tolist()
  np.testing.assert_array_equal(t.known, np.isin(batch['mask'], (0, 5)))


def test_a_frozen_encoder_gets_no_gradient_and_the_first_steps_are_the_decoders():
  objective, variables = started(freeze_encoder=True)
  grads = jax.grad(lambda p: objective.loss(variables | {'params': p}, batch_of(), jax.random.key(0), 0)[0])(variables['params'])
  assert not any(np.abs(g).max() for g in jax.tree.leaves(grads['encoder']))
  assert all(np.abs(g).max() for g in jax.tree.leaves(grads['decoder']))
  assert objective.frozen(0) == {'encoder': True}
  first = dataclasses.replace(objective, freeze_encoder=False, head_first=0.25)
  assert [bool(first.frozen(step)['encoder']) for step in (0, 24, 25, 99)] == [True, True, False, False]
  assert dataclasses.replace(objective, freeze_encoder=False).frozen(0) == {}


@pytest.mark.parametrize('huber', [0.0, 0.5])
def test_regression(huber):
  encoder = create_model('vit_micro/4', (8, 8), 2, embed_dim=16, depth=1, num_heads=2)
  objective = Regress(encoder, mean=40.0, std=10.0, huber=huber)
  batch = {k: v for k, v in batch_of(missing=False).items() if k in ('image', 'channels')} | {
      'number': np.float32([37.0, np.nan, 61.0])}
  variables = nn.unbox(jax.jit(objective.init)(jax.random.key(0), batch))
  told = np.asarray(objective.predict(variables, batch), np.float64)
  value, (metrics, _) = objective.loss(variables, batch, jax.random.key(1), 0, train=False)
  error = np.abs(told - batch['number'])[[0, 2]] / 10
  want = np.where(error <= huber, error**2 / 2, huber * (error - huber / 2)) if huber else error
  assert float(value) == pytest.approx(want.mean(), rel=1e-5)
  assert float(metrics['mae']) == pytest.approx(10 * error.mean(), rel=1e-5)
  grads = jax.grad(lambda p: objective.loss(variables | {'params': p}, batch, jax.random.key(0), 0)[0])(variables['params'])
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('options, words', [
    ({'values': (0, 2, 2)}, 'objective.values .* must be whole numbers that rise'),
    ({'values': (0, 1), 'ignore': (1,)}, 'objective.values has 1, which is ignored'),
    ({'values': (-1, 0)}, 'objective.values has -1'),
    ({'ce_weight': 0.0, 'dice_weight': 0.0}, 'at least 0, one above'),
    ({'head_first': 1.0}, r'objective.head_first 1.0 must lie in \[0, 1\)'),
    ({'decoder': 'linar'}, "unknown objective.decoder 'linar': did you mean 'linear'")])
def test_what_is_refused(options, words):
  with pytest.raises(UserError, match=words):
    Segment(create_model('vit_micro/4', (8, 8), 2), **options)


def test_a_family_without_a_decoder_of_its_own_takes_the_linear_one(monkeypatch):
  monkeypatch.setattr(dense, 'AUTO', {'vit': 'nothing'})
  assert dense.decoder_for('vit') == dense.decoder_for('swim') == 'linear'
  monkeypatch.setattr(dense, 'AUTO', {'vit': 'unetr'})
  assert dense.decoder_for('vit', (16, 16)) == 'unetr' and dense.decoder_for('vit', (14, 14)) == 'linear'
