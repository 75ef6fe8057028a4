"""Volume Fusion: mixed images and their coefficients, the loss in float64, and the sign of the commonest class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives.volumes.volume_fusion import VolumeFusion
from tests.objectives import dense_fakes as fakes
from tests.objectives.siamese_fakes import close, log_softmax

K = 4


def reference(logits, classes, known):
  """(cross-entropy, mean soft Dice of all classes and samples) in float64."""
  logp, hot = log_softmax(logits), np.eye(K + 1)[classes]
  entropy = -(logp * hot).sum(axis=-1)[known].mean()
  p, t = np.exp(logp) * known[..., None], hot * known[..., None]
  both, total = ((x).sum(axis=(1, 2, 3)) for x in (p * t, p + t))
  return entropy, ((2 * both + 1e-5) / (total + 1e-5)).mean()


@pytest.mark.parametrize('family', ['unet', 'channel_vit'])
def test_the_loss_and_what_is_mixed(family):
  objective, variables, data = fakes.start(VolumeFusion, family, boxes=(2, 6))
  (value, metrics, grads), (shown, truth), logits, _ = fakes.everything(
      objective, VolumeFusion.fused, variables['params'], data, jax.random.key(4))
  classes, known = np.asarray(truth.classes), np.asarray(truth.known)
  entropy, dice = reference(np.asarray(logits, np.float64), classes, known)
  close(metrics['cross_entropy'], entropy, 3e-5)
  close(value, entropy + 1 - dice, 3e-5)
  assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(grads['decoder']))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  there, image = np.isfinite(data['image']), np.nan_to_num(np.asarray(data['image'], np.float64))
  same = np.asarray(data['channels']) == np.roll(data['channels'], 1, axis=0)
  both = there & np.roll(there, 1, axis=0) & same[:, None, None, None]
  share = np.where(both, classes[..., None] / K, 0)
  np.testing.assert_allclose(shown['image'], (1 - share) * image + share * np.roll(image, 1, axis=0), atol=1e-6)
  np.testing.assert_array_equal(known, there.any(axis=-1))
  assert not classes[~both.any(axis=-1)].any() and classes.max() <= K and len(np.unique(classes)) > 2
  close(metrics['fused'], (classes > 0)[known].mean())


def test_the_commonest_class_shows():
  objective, variables, data = fakes.start(VolumeFusion, 'unet', boxes=(2, 6))
  blind = {**variables['params'], 'decoder': jax.tree.map(jnp.zeros_like, variables['params']['decoder'])}
  (_, metrics, _), *_ = fakes.everything(objective, VolumeFusion.fused, blind, data, jax.random.key(4))
  assert metrics['above_common'] <= 0
  close(metrics['cross_entropy'], np.log(K + 1))


def test_boxes_are_as_many_and_as_large_as_asked():
  data = {'image': jnp.zeros((64, 32, 32, 1)).at[::2].set(1.0), 'channels': jnp.zeros((64, 1), int)}
  one = VolumeFusion(fakes.encoder('unet'), boxes=(1, 1), sides=(0.25, 0.5))
  image, truth = (lambda shown: (np.asarray(shown[0]['image']), np.asarray(shown[1].classes)))(
      jax.jit(one.fused)(jax.random.key(0), data))
  for i, classes in enumerate(truth):
    rows, columns = (np.flatnonzero(classes.any(axis=a)) for a in (1, 0))
    assert (classes > 0).sum() == len(rows) * len(columns) and max(len(rows), len(columns)) <= 16
    assert len(set(classes[classes > 0])) == 1
    expected = 1 - classes / K if i % 2 == 0 else classes / K
    np.testing.assert_allclose(image[i, ..., 0], expected)


def test_wrong_options():
  for options, words in ((dict(classes=0), 'objective.classes'), (dict(boxes=(5, 2)), 'objective.boxes'),
                         (dict(sides=(0.5,)), 'objective.sides'), (dict(decoder='u'), 'objective.decoder')):
    with pytest.raises(UserError, match=words):
      VolumeFusion(fakes.encoder('unet'), **options)
  data = jax.tree.map(lambda x: x[:1], fakes.batch('unet'))
  with pytest.raises(UserError, match='batch_size must be at least 2'):
    VolumeFusion(fakes.encoder('unet')).init(jax.random.key(0), data)
