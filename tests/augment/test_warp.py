"""Rotations against NumPy and SciPy, and as options of the view maker."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxmed.augment import geometry, warp
from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError

KEY = jax.random.key(0)


def images(shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shape', [(5, 6, 6, 2), (5, 3, 4, 4, 1)])
def test_quarter_turns_are_numpys(shape):
  image = images(shape)
  have = np.asarray(jax.jit(warp.quarter_turns)(image, np.arange(5)))
  for k in range(5):
    np.testing.assert_array_equal(have[k], np.rot90(image[k], k, axes=(-3, -2)))


def test_turns_come_with_their_probability_and_each_as_often():
  image = np.broadcast_to(np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1), (4000, 2, 2, 1))
  have = np.asarray(warp.quarter_turns(image, geometry.random_turns(KEY, 4000, 0.6))).reshape(4000, 4)
  share = [(have == np.rot90(image[0], k).reshape(4)).all(axis=1).mean() for k in range(4)]
  np.testing.assert_allclose(share, [0.4, 0.2, 0.2, 0.2], atol=0.025)


@pytest.mark.parametrize('shape', [(4, 9, 12, 2), (4, 3, 8, 7, 1)])
def test_rotation_is_bilinear_about_the_centre_and_repeats_the_border(shape):
  image, degrees = images(shape), np.array([0.0, 12.5, -30.0, 90.0])
  have = np.asarray(jax.jit(warp.rotate)(image, degrees))
  height, width = shape[-3:-1]
  y, x = np.mgrid[:height, :width].astype(np.float64)
  y, x = y - (height - 1) / 2, x - (width - 1) / 2
  for b, angle in enumerate(np.deg2rad(degrees)):
    place = [np.sin(angle) * x + np.cos(angle) * y + (height - 1) / 2,
             np.cos(angle) * x - np.sin(angle) * y + (width - 1) / 2]
    planes = np.moveaxis(image[b].astype(np.float64), -1, 0).reshape(-1, height, width)
    want = np.stack([ndimage.map_coordinates(p, place, order=1, mode='nearest') for p in planes])
    want = np.moveaxis(want.reshape(shape[-1], *shape[1:-1]), 0, -1)
    np.testing.assert_allclose(have[b], want, atol=2e-5)
  np.testing.assert_array_equal(have[0], image[0])


def test_a_rotation_by_ninety_degrees_is_a_quarter_turn_counterclockwise():
  image = images((1, 8, 8, 3))
  np.testing.assert_allclose(warp.rotate(image, np.array([90.0])), np.rot90(image, axes=(1, 2)), atol=1e-5)


def test_angles_are_uniform_and_each_samples_own():
  ramp = np.broadcast_to(np.linspace(-1, 1, 31, dtype=np.float32)[None, None, :, None], (1000, 31, 31, 1))
  have = np.asarray(warp.rotate(ramp, geometry.random_angles(KEY, 1000, 20.0)))
  angle = np.rad2deg(np.arctan2(have[:, 14, 15, 0] - have[:, 16, 15, 0], have[:, 15, 16, 0] - have[:, 15, 14, 0]))
  assert np.abs(angle).max() < 20.01 and np.abs(angle).max() > 19.5
  assert abs(angle.mean()) < 1.2 and abs(angle.std() - 20 / 3**0.5) < 0.5
  assert len(np.unique(angle.round(4))) > 980


def maker(size, **options):
  return ViewMaker(size, (0.0,), (1.0,), scale=(1.0, 1.0), flip=(0.0,) * len(size), **options)


def test_views_are_turned_and_the_gram_teacher_sees_the_same_turn():
  image = images((40, 8, 8, 1))
  batch = {'image': image, 'channels': np.zeros((40, 1), np.int32)}
  alike = {'xla_cpu_parallel_codegen_split_count': 32}  # XLA's default: with one part the two programs round differently
  jit = lambda f: jax.jit(f, compiler_options=alike)
  out = jit(maker((8, 8), views=2, rotate90=(1.0, 0.0, 0.0), rotate=10.0, noise=0.1, gram_size=(8, 8)))(KEY, batch)
  gram = np.asarray(out['gram']['image'])
  assert abs((np.asarray(out['global']['image']) - gram).std() - 0.1) < 0.01
  still = maker((8, 8), views=2, rotate=10.0, gram_size=(8, 8))
  np.testing.assert_allclose(jit(still)(KEY, batch)['gram']['image'][:, 1], gram[:, 1], atol=1e-6)  # another program
  turned = jax.jit(maker((8, 8), rotate90=1.0))(KEY, batch)['image']
  kept = [any(np.array_equal(turned[b], np.rot90(image[b], k)) for k in (1, 2, 3)) for b in range(40)]
  assert all(kept)


def test_quarter_turns_need_two_equal_axes():
  for options in (dict(size=(8, 10)), dict(size=(8, 8, 10)), dict(size=(8, 8), local_size=(4, 6)),
                  dict(size=(8, 8), gram_size=(8, 4))):
    with pytest.raises(UserError, match='augment.rotate90'):
      maker(**options, rotate90=0.5)
  maker((4, 8, 8), rotate90=0.5)
  maker((8, 10), rotate=5.0)


def places_of(shape, seed=1):
  """Places in and around a grid."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.uniform(-1.5, n + 0.5, size=(4, 5)) for n in shape], axis=-1).astype(np.float32)


@pytest.mark.parametrize('grid', [(7, 9), (4, 6, 5)])
def test_values_between_pixels_are_scipys(grid):
  image, places = images((*grid, 2)), places_of(grid)
  have = np.asarray(jax.jit(warp.linear)(image, places))
  at = np.moveaxis(places.astype(np.float64), -1, 0)
  for c in range(2):
    want = ndimage.map_coordinates(image[..., c].astype(np.float64), at, order=1, mode='nearest')
    np.testing.assert_allclose(have[..., c], want, atol=2e-5)
  part = np.asarray(warp.linear(image, places, np.array(grid) - 2))
  cut = image[tuple(slice(n - 2) for n in grid)]
  np.testing.assert_allclose(part[..., 0], ndimage.map_coordinates(cut[..., 0].astype(np.float64), at, order=1,
                                                                   mode='nearest'), atol=2e-5)


def test_nearest_values_are_labels_or_outside():
  mask, places = np.arange(24).reshape(2, 3, 4), places_of((2, 3, 4))
  have = np.asarray(warp.nearest(mask, places, -1))
  index = np.round(places).astype(int)
  within = ((index >= 0) & (index < mask.shape)).all(axis=-1)
  assert within.any() and not within.all()
  inside = np.where(within[..., None], index, 0)
  np.testing.assert_array_equal(have, np.where(within, mask[tuple(np.moveaxis(inside, -1, 0))], -1))
  own = np.asarray(warp.nearest(mask, places, -1, np.array([1, 3, 4])))
  np.testing.assert_array_equal(own, np.where(index[..., 0] < 1, have, -1))


@pytest.mark.parametrize('grid', [(6, 7), (4, 5, 6)])
def test_no_displacement_is_the_identity_and_whole_pixels_are_shifts(grid):
  image, zero = images((*grid, 2)), np.zeros((*grid, len(grid)), np.float32)
  np.testing.assert_array_equal(warp.displaced(image, zero), image)
  mask = np.arange(np.prod(grid)).reshape(grid)
  np.testing.assert_array_equal(warp.displaced_nearest(mask, zero, -1), mask)
  np.testing.assert_array_equal(np.asarray(warp.displaced(image, zero + 1))[(slice(-1),) * len(grid)],
                                image[(slice(1, None),) * len(grid)])
  moved = np.asarray(warp.displaced_nearest(mask, zero + 1, -1))
  assert (moved[-1] == -1).all() and moved[(0,) * len(grid)] == mask[(1,) * len(grid)]


@pytest.mark.parametrize('rank', [2, 3])
def test_determinants_are_exact_for_affine_maps_and_numpys_otherwise(rank):
  rng = np.random.default_rng(0)
  matrix, grid = 0.3 * rng.normal(size=(rank, rank)), (5, 6, 4)[:rank]
  x = np.stack(np.meshgrid(*map(np.arange, grid), indexing='ij'), axis=-1)
  flow = (x @ matrix.T).astype(np.float32)
  np.testing.assert_allclose(warp.jacobian_determinant(flow), np.linalg.det(np.eye(rank) + matrix), rtol=1e-4)
  flow = rng.normal(size=(*grid, rank))
  slopes = np.stack([np.stack(np.gradient(flow[..., i]), axis=-1) for i in range(rank)], axis=-2)
  np.testing.assert_allclose(warp.jacobian_determinant(flow.astype(np.float32)), np.linalg.det(np.eye(rank) + slopes),
                             atol=1e-4)
  mirrored = np.where(np.arange(rank) == 0, -2.0 * x, 0)  # the first axis runs backwards
  np.testing.assert_allclose(warp.jacobian_determinant(mirrored.astype(np.float32)), -1, atol=1e-5)


def test_flows_are_as_smooth_and_as_large_as_asked():
  grid, sigma, most = (16, 12), np.array([2.0, 1.0]), np.array([3.0, 0.5])
  flow = np.asarray(warp.smooth_flow(KEY, grid, sigma, most))
  np.testing.assert_allclose(np.abs(flow).max(axis=(0, 1)), most, rtol=1e-5)
  noise = np.asarray(jax.random.normal(KEY, (2, *grid)), np.float64)
  for i in range(2):
    want = np.fft.ifftn(ndimage.fourier_gaussian(np.fft.fftn(noise[i]), sigma[i])).real
    np.testing.assert_allclose(flow[..., i], want * most[i] / np.abs(want).max(), atol=1e-4)
  assert not np.asarray(warp.smooth_flow(KEY, grid, sigma, np.zeros(2))).any()


def test_affine_maps_are_rotations_after_zooms():
  a, b, c = angles = np.array([0.3, -0.7, 1.1])
  turn = lambda i, j, angle: np.eye(3) + (np.cos(angle) - 1) * (np.outer(*[np.eye(3)[i]] * 2) + np.outer(
      *[np.eye(3)[j]] * 2)) + np.sin(angle) * (np.outer(np.eye(3)[j], np.eye(3)[i]) - np.outer(np.eye(3)[i], np.eye(3)[j]))
  zoom = np.array([1.2, 0.8, 1.0])
  want = turn(0, 1, c) @ turn(2, 0, b) @ turn(1, 2, a) @ np.diag(zoom)
  np.testing.assert_allclose(warp.affine(jax.numpy.asarray(angles), jax.numpy.asarray(zoom)), want, atol=1e-6)
  plane = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]) @ np.diag([1.2, 0.8])
  np.testing.assert_allclose(warp.affine(jax.numpy.asarray([9.0, 0.5]), jax.numpy.asarray([1.2, 0.8])), plane, atol=1e-6)
