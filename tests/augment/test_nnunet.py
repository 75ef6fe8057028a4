"""nnU-Net's augmentation against NumPy and SciPy, its laws, and the one resampling of image and mask."""

import jax
import numpy as np
import pytest
from scipy import ndimage, stats

from jaxmed.augment import geometry, nnunet
from jaxmed.augment.geometry import Geometry
from jaxmed.augment.views import ViewMaker
from jaxmed.config import SECTIONS
from jaxmed.errors import UserError

KEY = jax.random.key(0)


def images(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_angles_follow_the_patch():
  """nnUNetTrainer: 2D by 1.5, 3D by a first axis that is more than three times shorter."""
  assert nnunet.rotation((256, 192)) == (0.0, 180.0) and nnunet.rotation((256, 160)) == (0.0, 15.0)
  assert nnunet.rotation((128, 128, 128)) == (30.0,) * 3 and nnunet.rotation((48, 144, 144)) == (30.0,) * 3
  assert nnunet.rotation((40, 224, 224)) == (180.0, 0.0, 0.0)


def test_factors_are_below_and_above_one_equally_often():
  f = np.asarray(nnunet.around_one(KEY, (4000,), 0.7, 1.5))
  assert 0.7 <= f.min() < 0.71 and 1.49 < f.max() <= 1.5 and abs((f < 1).mean() - 0.5) < 0.03
  assert stats.kstest(f[f < 1], 'uniform', (0.7, 0.3)).pvalue > 0.01
  assert stats.kstest(f[f >= 1], 'uniform', (1.0, 0.5)).pvalue > 0.01
  assert np.asarray(nnunet.around_one(KEY, (100,), 1.2, 1.5)).min() >= 1.2


@pytest.mark.parametrize('grid', [(9, 8), (5, 6, 4)])
def test_blur_has_the_taps_of_its_deviation(grid):
  x, rank = images(1, *grid, 2), len(grid)
  sigma = np.random.default_rng(1).uniform(0.5, 1.0, size=(1, 2, rank)).astype(np.float32)
  sigma[0, 0, 0], sigma[0, 1, 0] = 0.52, 0.98  # 3 and 7 taps: 6 sigma + 0.5 is 3.62 and 6.38
  have = np.asarray(jax.jit(nnunet.soften)(x, sigma))
  for c in range(2):
    want = x[0, ..., c].astype(np.float64)
    for axis in range(rank):
      length = 6 * float(sigma[0, c, axis]) + 0.5
      odd = min((3, 5, 7), key=lambda k: abs(k - length))  # noqa: B023
      taps = np.exp(-0.5 * (np.arange(-(odd // 2), odd // 2 + 1) / float(sigma[0, c, axis])) ** 2)
      want = ndimage.correlate1d(want, taps / taps.sum(), axis=axis, mode='mirror')
    np.testing.assert_allclose(have[0, ..., c], want, atol=1e-5)


def interpolated(x, count):
  """torch's nearest-exact to so many pixels along the first axis, and its linear interpolation back."""
  n = len(x)
  small = x[np.minimum(np.floor((np.arange(count) + 0.5) * n / count).astype(int), n - 1)]
  place = np.maximum((np.arange(n) + 0.5) * count / n - 0.5, 0)
  low = np.floor(place).astype(int)
  high, share = np.minimum(low + 1, count - 1), (place - low).reshape(-1, *[1] * (x.ndim - 1))
  return small[low] * (1 - share) + small[high] * share


def test_low_resolution_is_nearest_down_and_linear_up():
  x, zoom = images(1, 9, 12, 2), np.array([[[0.5, 0.7], [1.0, 0.5]]], np.float32)
  have = np.asarray(jax.jit(nnunet.coarse)(x, zoom))
  for c, counts in enumerate(((4, 8), (9, 6))):
    want = interpolated(x[0, ..., c].astype(np.float64), counts[0])
    want = interpolated(want.T, counts[1]).T
    np.testing.assert_allclose(have[0, ..., c], want, atol=1e-5)
  np.testing.assert_array_equal(nnunet.coarse(x, np.ones((1, 2, 2), np.float32)), x)


def test_contrast_keeps_the_range_and_gamma_the_moments():
  x, f = images(2, 6, 7, 3), np.random.default_rng(1).uniform(0.7, 1.5, size=(2, 3)).astype(np.float32)
  have = np.asarray(nnunet.stretch(x, f))
  for b in range(2):
    for c in range(3):
      v = x[b, ..., c].astype(np.float64)
      np.testing.assert_allclose(have[b, ..., c], np.clip((v - v.mean()) * f[b, c] + v.mean(), v.min(), v.max()),
                                 atol=1e-5)
      for inverted in (False, True):
        w = -v if inverted else v
        u = ((w - w.min()) / (w.max() - w.min())) ** float(f[b, c]) * (w.max() - w.min()) + w.min()
        u = (u - u.mean()) * (w.std(ddof=1) / u.std(ddof=1)) + w.mean()
        got = np.asarray(nnunet.power(x, f, inverted))[b, ..., c]
        np.testing.assert_allclose(got, -u if inverted else u, atol=2e-5)


def test_changes_come_with_their_probability_in_their_order():
  x = images(400, 8, 8, 2)
  ranges = {name: SECTIONS['augment']['noise_range' if name == 'noise' else name].default for name in nnunet.RANGES}
  run = jax.jit(lambda **chances: nnunet.change(KEY, x, chances, ranges))
  for name, each in (('noise', 1.0), ('soften', 0.75), ('multiply', 1.0), ('coarse', 0.75)):  # half of two channels
    changed = (np.asarray(run(**{name: 0.4})) != x).any(axis=(1, 2, 3)).mean()
    assert abs(changed - 0.4 * each) < 0.08, name
  noisy = np.asarray(run(noise=1.0)) - x
  assert stats.kstest(noisy.reshape(400, -1).std(axis=1), 'uniform', (0, 0.1)).pvalue > 0.001
  np.testing.assert_array_equal(run(noise=0.0, power=0.0), x)


def warped(grid, size, rng, **parts):
  """A geometry of boxes in a grid with a random matrix."""
  count, rank = 2, len(grid)
  start = rng.integers(0, 2, size=(count, rank)).astype(np.int32)
  length = (np.array(grid) - 2 - rng.integers(0, 2, size=(count, rank))).astype(np.int32)
  matrix = (np.eye(rank) + 0.3 * rng.normal(size=(count, rank, rank))).astype(np.float32)
  flow = rng.normal(size=(count, *size, rank)).astype(np.float32)
  return Geometry(start, length, matrix=matrix, flow=flow, **parts)


@pytest.mark.parametrize('grid, size', [((12, 10), (6, 8)), ((6, 8, 7), (4, 6, 5))])
def test_crop_rotation_zoom_and_flow_are_one_resampling(grid, size):
  g, rank = warped(grid, size, np.random.default_rng(0)), len(grid)
  image, mask = images(2, *grid, 2), np.random.default_rng(1).integers(0, 5, size=(2, *grid))
  have = np.asarray(jax.jit(lambda x: geometry.apply_image(g, x, size))(image))
  labels = np.asarray(geometry.apply_mask(g, mask, size))
  for b in range(2):
    centred = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing='ij'), axis=-1) + g.flow[b]
    view = centred @ g.matrix[b].astype(np.float64).T + (np.array(size) - 1) / 2
    at = (view + 0.5) * g.length[b] / np.array(size) - 0.5 + g.start[b]
    at = np.moveaxis(at, -1, 0)
    want = ndimage.map_coordinates(image[b, ..., 0].astype(np.float64), at, order=1, mode='nearest')
    np.testing.assert_allclose(have[b, ..., 0], want, atol=1e-4)
    index = np.round(at).astype(int)
    within = np.all([(i >= 0) & (i < n) for i, n in zip(index, grid, strict=True)], axis=0)
    near = np.abs(at - np.floor(at) - 0.5).min(axis=0) < 1e-4  # ties
    exact = np.where(within, mask[b][tuple(np.where(within, i, 0) for i in index)], -1)
    np.testing.assert_array_equal(labels[b][~near], exact[~near])
    assert rank == 3 or (labels == -1).any()


def test_nothing_drawn_is_a_plain_crop_to_the_bit():
  image, mask = images(2, 10, 12, 2), np.arange(240).reshape(2, 10, 12)
  start, length = np.array([[1, 2], [3, 0]], np.int32), np.array([[6, 8]] * 2, np.int32)
  eye = np.broadcast_to(np.eye(2, dtype=np.float32), (2, 2, 2))
  g = Geometry(start, length, matrix=eye)
  for b, (y, x) in enumerate(start):
    np.testing.assert_array_equal(geometry.apply_image(g, image, (6, 8))[b], image[b, y : y + 6, x : x + 8])
    np.testing.assert_array_equal(geometry.apply_mask(g, mask, (6, 8))[b], mask[b, y : y + 6, x : x + 8])
  boxes = np.array([[[2.0, 3.0, 5.0, 6.0]]] * 2, np.float32)
  np.testing.assert_allclose(geometry.apply_boxes(g, boxes, (10, 12), (6, 8)),
                             geometry.apply_boxes(Geometry(start, length), boxes, (10, 12), (6, 8)), atol=1e-5)


def test_boxes_hold_what_is_in_them():
  """A square of ones, turned and made smaller, lies in its box, which touches it."""
  image = np.zeros((1, 40, 40, 1), np.float32)
  image[0, 12:20, 10:26] = 1
  drawn = geometry.draw_warp(KEY, 1, (40, 40), ((0.0, 60.0), 1.0), ((1.2, 1.2), 1.0), None)
  g = Geometry(matrix=drawn['matrix'])
  y0, x0, y1, x1 = np.asarray(geometry.apply_boxes(g, np.array([[[12.0, 10.0, 20.0, 26.0]]]), (40, 40), (40, 40)))[0, 0]
  rows, columns = np.nonzero(np.asarray(geometry.apply_image(g, image, (40, 40)))[0, ..., 0] > 0.5)
  np.testing.assert_allclose([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1], [y0, x0, y1, x1], atol=1.5)


def test_draws_follow_their_laws():
  size = (8, 40, 40)  # thin: slices are images
  drawn = geometry.draw_warp(KEY, 600, size, (nnunet.rotation(size), 0.2), ((0.7, 1.4), 0.2), None)
  matrix = np.asarray(drawn['matrix'])
  np.testing.assert_allclose(matrix[:, 0], np.eye(3)[[0] * 600], atol=1e-6)
  zoom = np.sqrt(np.linalg.det(matrix[:, 1:, 1:]))
  zoomed, turned = np.abs(zoom - 1) > 1e-5, np.abs(matrix[:, 1, 2]) > 1e-5
  assert abs(zoomed.mean() - 0.2) < 0.06 and abs(turned.mean() - 0.2) < 0.06
  assert stats.kstest(zoom[zoomed], 'uniform', (0.7, 0.7)).pvalue > 0.001
  cubes = geometry.draw_warp(KEY, 300, (8, 8, 8), ((30.0,) * 3, 1.0), None, ((1.0, 2.0), (0.1, 0.2), 0.5))
  np.testing.assert_allclose(np.linalg.det(cubes['matrix']), 1, atol=1e-5)
  assert 29 < np.rad2deg(np.abs(np.arcsin(np.asarray(cubes['matrix'])[:, 2, 0]))).max() <= 30.01
  most = np.abs(np.asarray(cubes['flow'])).max(axis=(1, 2, 3))
  assert abs((most[:, 0] > 0).mean() - 0.5) < 0.1 and most[most > 0].min() >= 1 and most.max() <= 2


@pytest.mark.parametrize('grid, size', [((20, 22), (16, 16)), ((9, 12, 12), (4, 8, 8))])
def test_the_view_maker_has_the_list(grid, size):
  options = {k: v for k, v in nnunet.NNUNET.items() if k != 'flip'}
  view = ViewMaker(size, (0.0,), (1.0,), scale=(0.5, 1.0), flip=(0.0,) * len(size), elastic_probability=0.5, **options)
  image = images(8, *grid, 1)
  batch = {'image': image, 'channels': np.zeros((8, 1), np.int32), 'mask': (image[..., 0] > 0).astype(np.int32)}
  out = jax.jit(view)(KEY, batch)
  assert out['image'].shape == (8, *size, 1) and np.isfinite(out['image']).all()
  assert set(np.unique(out['mask'])) <= {-1, 0, 1}
  assert set(options) <= set(SECTIONS['augment']) and set(nnunet.NNUNET) <= set(SECTIONS['augment'])
  plain = ViewMaker(size, (0.0,), (1.0,), scale=(0.5, 1.0))
  off = ViewMaker(size, (0.0,), (1.0,), scale=(0.5, 1.0), zoom=(0.9, 1.1), power=(0.5, 2.0))
  np.testing.assert_array_equal(jax.jit(plain)(KEY, batch)['image'], jax.jit(off)(KEY, batch)['image'])


def test_wrong_options_are_told():
  for options, words in (({'zoom': (0.0, 1.0)}, 'augment.zoom'), ({'coarse': (0.5, 1.5)}, 'at most 1'),
                         ({'power': (2.0, 1.0)}, 'low <= high'), ({'rotation': (1.0, 2.0, 3.0)}, 'one for each of the 2'),
                         ({'noise_probability': 1.5}, 'must be a probability')):
    with pytest.raises(UserError, match=words):
      ViewMaker((8, 8), (0.0,), (1.0,), **options)
