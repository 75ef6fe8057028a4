"""Models Genesis: the loss in float64, each change alone, what does not exist, and the sign of copying."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.volumes.models_genesis import ModelsGenesis
from tests.objectives import dense_fakes as fakes
from tests.objectives.siamese_fakes import close


@pytest.mark.parametrize('family', ['unet', 'channel_vit'])
def test_the_loss_and_its_pixels(family):
  objective, variables, data = fakes.start(ModelsGenesis, family)
  (value, metrics, grads), (shown, clean), restored, _ = fakes.everything(
      objective, ModelsGenesis.corrupted, variables['params'], data, jax.random.key(4))
  restored = np.asarray(decoding.of_channels(objective.encoder, shown, restored), np.float64)
  there, image = np.isfinite(data['image']), np.nan_to_num(np.asarray(data['image'], np.float64))
  np.testing.assert_array_equal(clean, image)
  close(value, np.square(restored - image)[there].mean(), 3e-5)
  close(metrics['restored'], 1 - float(value) / np.square(shown['image'] - image)[there].mean(), 1e-4)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads)) and any(map(np.any, jax.tree.leaves(grads['encoder'])))
  assert not np.any(np.asarray(shown['image'])[~there]) and np.any(shown['image'] != clean)


def test_each_change_alone():
  objective, _, data = fakes.start(ModelsGenesis, 'unet')
  none = dict(shuffle=0.0, nonlinear=0.0, paint=0.0, outpaint=1.0)
  share = {}
  for name in ('shuffle', 'nonlinear', 'paint'):
    alone = dataclasses.replace(objective, **none | {name: 1.0})
    shown, clean = jax.jit(alone.corrupted)(jax.random.key(1), data)
    x, clean = np.asarray(shown['image']), np.asarray(clean)
    low, high = (f(clean, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    assert (x >= low - 1e-5).all() and (x <= high + 1e-5).all()
    share[name] = (np.abs(x - clean) > 1e-6).mean()
    if name == 'nonlinear':  # a curve of the channel: the order of its values stays or turns round
      first, second = x[0, ..., 0].ravel(), clean[0, ..., 0].ravel()
      steps = np.diff(first[np.argsort(second)])
      assert (steps >= -1e-5).all() or (steps <= 1e-5).all()
  assert share['shuffle'] == 0  # windows of a tenth of eight pixels hold one
  assert share['nonlinear'] > 0.9 and 0.3 < share['paint'] < 1


def test_copying_shows(monkeypatch):
  objective, variables, data = fakes.start(ModelsGenesis, 'unet')
  monkeypatch.setattr(ModelsGenesis, '_restored', lambda self, params, shown, train, rngs: (shown['image'], {}))
  metrics = jax.jit(lambda data: objective.loss(variables, data, jax.random.key(0), 0)[1][0])(data)
  assert float(metrics['restored']) == pytest.approx(0, abs=1e-6) and metrics['restoration'] > 0


def test_wrong_options():
  for options, words in ((dict(paint=1.5), 'objective.paint 1.5 is a probability'), (dict(decoder='u'), 'objective.decoder'),
                         (dict(shuffle=0, nonlinear=0, paint=0), 'nothing is left to restore')):
    with pytest.raises(UserError, match=words):
      ModelsGenesis(fakes.encoder('unet'), **options)
  with pytest.raises(UserError, match='maps of several sizes'):
    objective = ModelsGenesis(fakes.encoder('channel_vit'), decoder='unet')
    jax.eval_shape(objective.init, jax.random.key(0), jax.tree.map(jnp.asarray, fakes.batch('channel_vit')))
