"""Channels are a set: any number, in any order, and a missing one leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .common import build, features, normal

SUBSETS = [[2], [0, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_masked_channels_give_the_smaller_image(pos):
  model, params = build('channel_vit_micro/4', 12, 4, pos=pos)
  image = np.array(normal((len(SUBSETS), 12, 12, 4)))
  mask = np.zeros((len(SUBSETS), 4), bool)
  for row, subset in zip(mask, SUBSETS, strict=True):
    row[subset] = True
  holes = np.where(mask[:, None, None, :], image, np.nan)  # what a missing channel holds
  got = features(model, params, jnp.asarray(holes), None, jnp.asarray(mask))
  for i, subset in enumerate(SUBSETS):
    one = features(model, params, jnp.asarray(image[i : i + 1][..., subset]), jnp.asarray([subset]))
    np.testing.assert_allclose(got.cls[i], one.cls[0], atol=1e-5)
    tokens = got.patches[i].reshape(4, 9, -1)[np.asarray(subset)]
    np.testing.assert_allclose(tokens.reshape(-1, 48), one.patches[0], atol=1e-5)
    np.testing.assert_allclose(got.mean[i], one.mean[0], atol=1e-5)
    np.testing.assert_array_equal(got.valid[i], np.repeat(mask[i], 9))


def test_masked_channels_get_no_gradient():
  model, params = build('channel_vit_micro/4', 12, 4)
  image = normal((2, 12, 12, 4))
  mask = jnp.asarray([[1, 0, 1, 1], [0, 1, 0, 1]], bool)

  def loss(params, image):
    f = model.apply({'params': params}, image, None, mask)
    return (f.cls**2).sum() + (f.mean * jnp.arange(48)).sum()

  grad_params, grad = jax.jit(jax.grad(loss, (0, 1)))(params, image)
  size = np.abs(grad).sum(axis=(1, 2))
  assert (size[~np.asarray(mask)] == 0).all() and (size[np.asarray(mask)] > 1e-3).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad_params))


def test_channel_order_does_not_matter():
  model, params = build('channel_vit_micro/4', (8, 12), 5)
  image, ids, order = normal((2, 8, 12, 3)), jnp.asarray([[4, 0, 2], [1, 2, 3]]), np.array([2, 0, 1])
  a = features(model, params, image, ids)
  b = features(model, params, image[..., order], ids[:, order])
  np.testing.assert_allclose(a.cls, b.cls, atol=1e-5)
  np.testing.assert_allclose(
    a.patches.reshape(2, 3, 6, 48)[:, order], b.patches.reshape(2, 3, 6, 48), atol=1e-5
  )
  c = features(model, params, image, ids[:, order])  # other channels in the same slots are another image
  assert np.abs(a.cls - c.cls).max() > 1e-2
  assert a.grid == (3, 2, 3)


def test_ids_default_to_the_vocabulary_in_order():
  model, params = build('channel_vit_micro/4', 8, 3)
  image = normal((2, 8, 8, 3))
  a = features(model, params, image)
  b = features(model, params, image, jnp.asarray([[0, 1, 2]] * 2))
  np.testing.assert_array_equal(a.patches, b.patches)


def test_vit_baseline_scales_what_is_left():
  model, params = build('vit_micro/4', 8, 4)
  image, mask = normal((1, 8, 8, 4)), np.array([[1, 0, 1, 0]], bool)
  got = features(model, params, image, None, jnp.asarray(mask))
  want = features(model, params, image * jnp.asarray([2.0, 0, 2.0, 0]))
  np.testing.assert_allclose(got.patches, want.patches, atol=1e-5)
