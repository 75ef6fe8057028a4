"""Convolutional and hierarchical encoders on volumes: their 2D selves slice by slice, and no axis unlike another."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models import create_model
from tests.models.test_conv import TINY, _draw, features, normal

DEEP = 16  # two places of the last map


def lifted(flat, deep):
  """Parameters of a volume's encoder that looks along depth at the place itself, from those of the 2D encoder."""
  flat, deep = (flax.traverse_util.flatten_dict(x) for x in (flat, deep))
  for path, wide in deep.items():
    if wide.shape != flat[path].shape:  # [*layers, k, k, C, D] -> [*layers, k, k, k, C, D]
      axis = int('blocks' in path)
      assert wide.shape == (*flat[path].shape[:axis], flat[path].shape[axis], *flat[path].shape[axis:])
      size = wide.shape[axis]
      at = size // 2 if size % 2 else 0  # even ones start where they stand: they are not padded
      taps = jnp.zeros(size).at[at].set(1.0).reshape(*(1,) * axis, size, *(1,) * (wide.ndim - axis - 1))
      flat[path] = jnp.expand_dims(flat[path], axis) * taps
  return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize('name', [n for n in TINY if n != 'swin_micro'])  # whose windows look along depth
def test_a_volume_of_one_repeated_slice_has_the_features_of_that_slice(name):
  """With convolutions that do not look along depth; with and without hidden patches, and for batch statistics."""
  plane, space = (create_model(name, size, 2, **TINY[name]) for size in ((16, 24), (DEEP, 16, 24)))
  params = _draw(plane)
  deep = lifted(params, _draw(space))
  image, hidden = normal(2, 16, 24, 2), np.zeros((2, 6), bool)
  hidden[0, [0, 4]] = hidden[1, [2, 3, 5]] = True
  volume = np.repeat(image[:, None], DEEP, axis=1)
  twice = np.repeat(hidden[:, None], 2, axis=1).reshape(2, 12)
  for mask, masks in ((None, None), (hidden, twice)):
    want, stats = features(plane, params, image, hidden=mask, train=True)
    got, own = features(space, deep, volume, hidden=masks, train=True)
    assert got.grid == (2, 2, 3) and got.patches.shape == (2, 12, 64)
    for half in np.split(np.asarray(got.patches), 2, axis=1):
      np.testing.assert_allclose(half, want.patches, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got.mean, want.mean, rtol=2e-4, atol=2e-4)
    # Variances are unbiased: n / (n - 1) differs between the two.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-4), own, stats)
  assert np.abs(want.patches).mean() > 0.1


@pytest.mark.parametrize('name', [n for n in TINY if n != 'swin_micro'])  # whose tables and merging have an order of axes
def test_axes_of_a_volume_are_alike(name):
  """Turned kernels on a turned volume give the turned map."""
  model = create_model(name, (8, 16, 24), 2, **TINY[name])
  params = _draw(model)
  order = (2, 0, 1)  # new depth, height, width from the old axes

  def turned(path, x):
    first = int('blocks' in path)
    if path[-1] != 'kernel' or x.ndim != first + 5:
      return x
    return jnp.transpose(x, (*range(first), *(first + i for i in order), first + 3, first + 4))

  flat = flax.traverse_util.flatten_dict(params)
  other = flax.traverse_util.unflatten_dict({path: turned(path, x) for path, x in flat.items()})
  image = normal(2, 8, 16, 24, 2)
  hidden = np.arange(12).reshape(2, 1, 2, 3) % 3 == 0
  axes = lambda x: np.transpose(x, (0, *(1 + i for i in order), *range(4, x.ndim)))
  want, _ = features(model, params, image, hidden=hidden.reshape(2, 6))
  got, _ = features(model.clone(image_size=(24, 8, 16)), other, axes(image), hidden=axes(hidden).reshape(2, 6))
  grid = lambda f: np.asarray(f.patches).reshape(2, *f.grid, 64)
  assert want.grid == (1, 2, 3) and got.grid == (3, 1, 2)
  np.testing.assert_allclose(grid(got), axes(grid(want)), rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(got.mean, want.mean, rtol=2e-4, atol=2e-4)
  unlike, _ = features(model.clone(image_size=(24, 8, 16)), params, axes(image), hidden=axes(hidden).reshape(2, 6))
  assert np.abs(unlike.patches - got.patches).max() > 0.01  # the kernels do look along each axis
