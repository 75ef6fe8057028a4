"""SparK and the MAE of U-Nets: what is hidden, the loss in float64, what no layer sees, and the sign of a grey answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders.densify import Densify
from jaxmed.models.layers.convolution import enlarge
from jaxmed.objectives.masked.spark import SparK
from tests.objectives import dense_fakes as fakes
from tests.objectives.siamese_fakes import close

KEY = jax.random.key(4)


@pytest.mark.parametrize('family', ['unet', 'channel_vit'])
def test_the_loss_and_who_sees_what(family):
  objective, variables, data = fakes.start(SparK, family, mask_size=2)

  @jax.jit
  def both(params, image):
    batch = {**data, 'image': image}
    loss = lambda p, x: objective.loss({'params': p, 'extra': {}}, {**batch, 'image': x}, KEY, 0)
    (value, (metrics, _)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, image)
    first, second = jax.random.split(KEY)
    return value, metrics, grads, objective.restore(params, batch, first, True, {'dropout': second})

  value, metrics, (grads, to_image), (restored, clean, hidden, _) = both(variables['params'], data['image'])
  there, image = np.isfinite(data['image']), np.nan_to_num(np.asarray(data['image'], np.float64))
  hidden = np.broadcast_to(hidden, there.shape)
  counts, known = there & hidden, there & ~hidden
  np.testing.assert_array_equal(clean, image)
  close(value, np.square(np.asarray(restored, np.float64) - image)[counts].mean(), 3e-5)
  axes = (1, 2, 3)
  grey = np.where(known, image, 0).sum(axes, keepdims=True) / np.maximum(known.sum(axes, keepdims=True), 1)
  close(metrics['explained'], 1 - float(value) / np.square(grey - image)[counts].mean(), 1e-4)
  assert hidden[:2].mean() == 0.75 and len({x[..., 0].tobytes() for x in hidden}) == len(hidden)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, to_image)))
  assert objective.sparse == (family == 'unet') == ('densify' in grads)
  again = both(variables['params'], jnp.where(hidden, 7.0, data['image']))[3][0]
  np.testing.assert_allclose(again, restored, atol=1e-5)  # a hidden pixel reaches nothing


def test_hidden_places_stay_out_of_finer_and_coarser_maps():
  """A convolution's maps at strides 1, 2 and 4, of blocks of 2: zero where all blocks are hidden, elsewhere not."""
  encoder = create_model('nnunet_micro', (16, 16), 1, depths=(1, 1, 1), dims=(8, 8, 8))
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.normal(size=(2, 16, 16, 1)), jnp.float32)
  hidden = rng.random((2, 8, 8)) < 0.75

  @jax.jit
  def maps(image):
    params = encoder.init(jax.random.key(0), image)['params']
    out = encoder.apply({'params': params}, image, hidden=jnp.asarray(hidden), levels=(1, 2, 3))
    return [level.map for level in out.levels], out.valid

  found, valid = maps(image)
  for x, n in zip(found, (16, 8, 4)):
    visible = np.asarray(enlarge(jnp.asarray(~hidden[..., None]), (n, n)))[..., 0]
    assert not np.any(np.asarray(x)[~visible]) and (np.abs(np.asarray(x)[visible]).max(axis=-1) > 0).all()
    if n >= 8:
      np.testing.assert_array_equal(visible, ~np.kron(hidden, np.ones((1, n // 8, n // 8))).astype(bool))
  np.testing.assert_array_equal(valid, visible.reshape(2, -1))
  np.testing.assert_array_equal(visible, ~hidden.reshape(2, 4, 2, 4, 2).all(axis=(2, 4)))
  other = maps(jnp.where(jnp.repeat(jnp.repeat(hidden, 2, 1), 2, 2)[..., None], 9.0, image))[0]
  assert all(np.array_equal(a, b) for a, b in zip(found, other))


def test_densify_by_hand():
  rng = np.random.default_rng(0)
  x, visible = rng.normal(size=(2, 4, 4, 3)).astype(np.float32), rng.random((2, 4, 4, 1)) < 0.5
  module = Densify()
  params = {'norm0': {'scale': jnp.full(3, 2.0), 'bias': jnp.full(3, 0.5)}, 'token0': jnp.asarray([7.0, 8.0, 9.0])}
  got = np.asarray(module.apply({'params': params}, (jnp.asarray(x),), jnp.asarray(visible))[0])
  for i in range(2):
    seen = x[i][visible[i, ..., 0]]
    want = 2 * (seen - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-5) + 0.5
    np.testing.assert_allclose(got[i][visible[i, ..., 0]], want, atol=1e-5)
    np.testing.assert_array_equal(got[i][~visible[i, ..., 0]], np.broadcast_to([7, 8, 9], (16 - len(seen), 3)))


def test_a_grey_answer_shows(monkeypatch):
  objective, variables, data = fakes.start(SparK, 'unet', mask_size=2)

  def grey(self, params, batch, rng, train, rngs):
    blocks = jnp.repeat(jnp.repeat(jnp.repeat(self._hidden(rng, batch), 2, 1), 2, 2), 2, 3)[..., None]
    mean = jnp.where(blocks, 0, batch['image']).sum((1, 2, 3), keepdims=True) / (~blocks).sum((1, 2, 3), keepdims=True)
    return jnp.broadcast_to(mean, batch['image'].shape), batch['image'], blocks, {}

  monkeypatch.setattr(SparK, 'restore', grey)
  metrics = jax.jit(lambda data: objective.loss(variables, data, KEY, 0)[1][0])(data)
  assert float(metrics['explained']) == pytest.approx(0, abs=1e-5)


def test_wrong_options():
  unet = fakes.encoder('unet')
  for options, words in ((dict(mask_ratio=1.0), 'objective.mask_ratio'), (dict(mask_size=0), 'objective.mask_size'),
                         (dict(hide='mask'), 'objective.hide'), (dict(decoder='u'), 'objective.decoder')):
    with pytest.raises(UserError, match=words):
      SparK(unet, **options)
  with pytest.raises(UserError, match='hide=sparse needs an encoder of stages'):
    SparK(fakes.encoder('channel_vit'), hide='sparse')
  for options, words in ((dict(mask_size=3), 'does not divide'), (dict(mask_size=8), 'hides none of 1 blocks')):
    with pytest.raises(UserError, match=words):
      jax.eval_shape(SparK(unet, **options).init, jax.random.key(0), fakes.batch('unet'))
