import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.layers.tokens import Features, Tokens, grid_of, patchify, unpatchify

from .common import normal

SHAPES = [((6, 8), (3, 2)), ((8, 8), (4, 4)), ((4, 6, 10), (2, 3, 5)), ((3, 8, 4), (1, 4, 2)), ((6,), (2,))]


def loop(image, patch, per_channel):
  """Patches one by one: row-major over the grid, then (*patch, C) or channel-major."""
  batch, *size, channels = image.shape
  grid = [n // p for n, p in zip(size, patch, strict=True)]
  out = []
  for b in range(batch):
    rows = [[] for _ in range(channels if per_channel else 1)]
    for cell in np.ndindex(*grid):
      cut = image[(b, *(slice(i * p, (i + 1) * p) for i, p in zip(cell, patch, strict=True)))]
      for c, row in enumerate(rows):
        row.append((cut[..., c] if per_channel else cut).ravel())
    out.append(rows if per_channel else rows[0])
  return np.asarray(out)


@pytest.mark.parametrize('size,patch', SHAPES)
@pytest.mark.parametrize('per_channel', [False, True])
def test_patchify_is_the_loop_and_unpatchify_its_inverse(size, patch, per_channel):
  image = np.asarray(normal((2, *size, 3)))
  patches = patchify(jnp.asarray(image), patch, per_channel)
  np.testing.assert_array_equal(patches, loop(image, patch, per_channel))
  np.testing.assert_array_equal(unpatchify(patches, size, patch, per_channel), image)


def test_sizes_that_do_not_divide():
  assert grid_of((8, 6, 4), (2, 3, 4)) == (4, 2, 1)
  for size, patch in (((8, 7), (4, 4)), ((2, 8), (4, 4)), ((8, 8), (4, 4, 4)), ((0, 8), (4, 4))):
    with pytest.raises(ValueError, match='does not divide into patches'):
      grid_of(size, patch)


def test_take_moves_position_and_validity_along():
  x, position = normal((2, 5, 4)), normal((1, 5, 2))
  valid = jnp.asarray([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)
  index = jnp.asarray([[4, 0], [2, 2]])
  got = Tokens(x, valid, position).take(index)
  for b in range(2):
    for k in range(2):
      np.testing.assert_array_equal(got.x[b, k], x[b, index[b, k]])
      np.testing.assert_array_equal(got.position[b, k], position[0, index[b, k]])
      assert got.valid[b, k] == valid[b, index[b, k]]


def test_mean_of_valid_tokens():
  patches = normal((2, 4, 3))
  valid = np.asarray([[1, 0, 1, 0], [0, 0, 0, 1]], bool)
  got = Features(None, None, patches, jnp.asarray(valid)).mean
  for b in range(2):
    np.testing.assert_allclose(got[b], np.asarray(patches)[b][valid[b]].mean(0), rtol=1e-6)
  np.testing.assert_allclose(Features(None, None, patches).pooled('mean'), patches.mean(1), rtol=1e-6)
  cls = normal((2, 3))
  np.testing.assert_array_equal(Features(cls, None, patches).pooled('cls'), cls)
