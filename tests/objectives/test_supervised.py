"""Supervised cross-entropy against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.supervised.supervised import Supervised

RNG = np.random.default_rng(0)


def make(**options):
  encoder = create_model('channel_vit_micro/4', (8, 8), 2, embed_dim=16, depth=1, num_heads=2)
  objective = Supervised(encoder, num_classes=3, **options)
  batch = {'image': jnp.asarray(RNG.normal(size=(6, 8, 8, 2)), jnp.float32),
           'channels': jnp.tile(jnp.arange(2), (6, 1)), 'label': jnp.array([0, 2, 1, -1, 2, 0])}
  return objective, nn.unbox(jax.jit(objective.init)(jax.random.key(0), batch)), batch


@pytest.mark.parametrize('feature', ['cls', 'mean'])
def test_loss_is_smoothed_cross_entropy_over_labelled_samples(feature):
  objective, variables, batch = make(label_smoothing=0.2, feature=feature)
  loss, (metrics, _) = jax.jit(objective.loss)(variables, batch, jax.random.key(0), 0)
  features = objective.encoder.apply({'params': variables['params']['encoder']}, batch['image'], batch['channels'])
  pooled = features.cls if feature == 'cls' else np.asarray(features.patches).mean(axis=1)
  head = variables['params']['head']
  logits = np.asarray(pooled, np.float64) @ np.asarray(head['kernel'], np.float64) + np.asarray(head['bias'])
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  label = np.asarray(batch['label'])
  known = label >= 0
  target = np.eye(3)[label] * 0.8 + 0.2 / 3
  want = -(target * log_p).sum(axis=1)[known].mean()
  assert abs(float(loss) - want) < 1e-5 * want
  assert abs(float(metrics['accuracy']) - (logits.argmax(axis=1) == label)[known].mean()) < 1e-6


def test_unlabelled_samples_carry_no_gradient_and_evaluation_does_not_mix():
  objective, variables, batch = make(mixup=0.8, cutmix=1.0)
  loss = jax.jit(lambda image, key: objective.loss(variables, dict(batch, image=image), key, 0, False)[0])
  gradient = np.asarray(jax.grad(loss)(batch['image'], jax.random.key(0)))
  assert (gradient[3] == 0).all() and (np.abs(gradient[[0, 1, 2, 4, 5]]).max(axis=(1, 2, 3)) > 0).all()
  assert float(loss(batch['image'], jax.random.key(0))) == float(loss(batch['image'], jax.random.key(1)))


def test_needs_classes():
  with pytest.raises(UserError, match=r'loader\.label'):
    encoder = create_model('vit_micro/4', (8, 8), 2, embed_dim=16, depth=1, num_heads=2)
    Supervised(encoder).init(jax.random.key(0), {'image': jnp.zeros((1, 8, 8, 2)), 'channels': jnp.zeros((1, 2), int)})
