"""One geometry a view, applied by kind: masks and boxes stay on what their image shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmed.augment import geometry
from jaxmed.augment.geometry import Geometry
from jaxmed.augment.views import ViewMaker

KEY = jax.random.key(1)
STEP = 50  # of intensity from one label to the next
OPTIONS = {'crop': dict(scale=(0.3, 0.9), flip=(0.0, 0.0)), 'flip': dict(scale=(1.0, 1.0), flip=(0.5, 0.5)),
           'quarter': dict(scale=(0.5, 1.0), rotate90=0.7), 'rotate': dict(scale=(0.5, 1.0), rotate=40.0)}


def labels(count, grid):
  """Boxes of the labels 1 and 2 in a field of 0, and the rows of these boxes [count, 3, 2 * rank], the last one absent."""
  rng, rank = np.random.default_rng(0), len(grid)
  mask, boxes = np.zeros((count, *grid), np.int32), np.full((count, 3, 2 * rank), -1, np.float32)
  for i in range(count):
    for label, half in ((1, 0), (2, 1)):
      low = [half * n // 2 + int(rng.integers(1, n // 8 + 2)) for n in grid]
      high = [a + int(rng.integers(n // 4, n // 3)) for a, n in zip(low, grid)]
      mask[i][tuple(slice(a, b) for a, b in zip(low, high))] = label
      boxes[i, label - 1] = low + high
  return mask, boxes


def batch(count, grid, boxes=True):
  mask, rows = labels(count, grid)
  out = {'image': np.uint8(mask * STEP)[..., None], 'channels': np.zeros((count, 1), np.int32), 'mask': mask}
  return out | ({'boxes': rows} if boxes else {})


def maker(size, **options):
  return ViewMaker(size, (0.0,), (1.0,), 'none', **options)


def agree(image, mask):
  """Where all pixels around have one label, the image has its intensity; how many such pixels there are, by label."""
  seen = np.zeros(3, int)
  for x, m in zip(np.asarray(image)[..., 0], np.asarray(mask)):
    # A cubic kernel rings two pixels beside an edge.
    even = ndimage.maximum_filter(m, 7) == ndimage.minimum_filter(m, 7)
    for label in range(3):
      inside = even & (m == label)
      np.testing.assert_allclose(x[inside], label * STEP, atol=2)
      seen[label] += inside.sum()
  return seen


@pytest.mark.parametrize('name', OPTIONS)
def test_masks_follow_their_image(name):
  images = batch(12, (40, 44))
  made = jax.jit(maker((40, 40), **OPTIONS[name]))(KEY, images)
  assert made['mask'].dtype == jnp.int32 and made['mask'].shape == (12, 40, 40)
  assert (agree(made['image'], made['mask']) > 100).all()
  outside = np.asarray(made['mask']) == -1
  assert outside.any() == (name == 'rotate')
  if name == 'rotate':
    assert not outside[:, 18:22, 18:22].any() and outside[:, 0, 0].any()


def test_masks_of_volumes():
  images = batch(2, (20, 20, 20))
  made = jax.jit(maker((20, 20, 20), scale=(0.9, 1.0), flip=(0.0, 0.5, 0.5)))(KEY, images)
  assert (agree(made['image'], made['mask'])[:1] > 50).all()


def test_masks_of_groups():
  made = jax.jit(maker((32, 32), views=2, flip=(0.0, 0.0), local_views=1, local_size=(16, 16)))(KEY, batch(4, (40, 40)))
  assert sorted(made) == ['global', 'local']
  assert made['global']['boxes'].shape == (4, 2, 3, 4) and made['local']['mask'].shape == (4, 1, 16, 16)
  merged = lambda group, key: made[group][key].reshape(-1, *made[group][key].shape[2:])
  assert agree(merged('global', 'image'), merged('global', 'mask')).sum() > 1000


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('grid', [(40, 44), (12, 40, 40)])
def test_boxes_bound_what_is_left_of_their_label(name, grid):
  rank, options = len(grid), dict(OPTIONS[name])
  if options.get('flip'):
    options['flip'] = (0.0,) * (rank - 2) + options['flip']
  size = (*grid[:-2], 40, 40)
  made = jax.jit(maker(size, **options))(KEY, batch(8, grid))
  mask, boxes = np.asarray(made['mask']), np.asarray(made['boxes'])
  assert (boxes[:, 2] == -1).all()
  found = 0
  for i in range(8):
    for label in (1, 2):
      box, pixels = boxes[i, label - 1], np.argwhere(mask[i] == label)
      if not len(pixels):
        assert (box == -1).all() or (box[rank:] - box[:rank]).min() <= 2 or name == 'rotate'
        continue
      low, high = pixels.min(axis=0), pixels.max(axis=0) + 1
      assert (box[:rank] >= 0).all() and (box[rank:] <= np.array(size)).all()
      assert (box[:rank] <= low + 1).all() and (box[rank:] >= high - 1).all()
      if name != 'rotate':
        np.testing.assert_allclose(box, [*low, *high], atol=1)
      found += 1
  assert found > 8


def test_a_box_by_hand():
  """Of a crop of twice the resolution; flipped; turned; wholly outside; rotated by ninety degrees as a quarter turn."""
  boxes = np.float32([[[3, 4, 5, 9], [8, 8, 9, 9], [-1, -1, -1, -1]]])
  crop = dict(start=jnp.array([[2, 4]]), length=jnp.array([[4, 4]]))
  apply = lambda **more: np.asarray(geometry.apply_boxes(Geometry(**crop, **more), boxes, (12, 12), (8, 8)))[0].tolist()
  none = [-1.0] * 4
  assert apply() == [[2, 0, 6, 8], none, none]
  assert apply(flips=jnp.array([[True, False]])) == [[2, 0, 6, 8], none, none]
  boxes[0, 0] = [3, 4, 4, 5]
  assert apply() == [[2, 0, 4, 2], none, none]
  assert apply(flips=jnp.array([[True, True]])) == [[4, 6, 6, 8], none, none]
  turned = apply(turns=jnp.array([1]))
  assert turned == [[6, 2, 8, 4], none, none]
  np.testing.assert_allclose(apply(angle=jnp.array([90.0])), turned, atol=1e-4)


def test_nearest_takes_the_label_at_the_centre_of_a_pixel():
  mask = np.arange(12, dtype=np.int32)[None]
  for size, want in (((4,), [1, 4, 7, 10]), ((24,), np.arange(12).repeat(2)), ((5,), [1, 3, 6, 8, 10])):
    assert geometry.nearest(mask, jnp.array([[0]]), jnp.array([[12]]), size)[0].tolist() == list(want)
  assert geometry.nearest(mask, jnp.array([[4]]), jnp.array([[6]]), (3,))[0].tolist() == [5, 7, 9]


def test_plain_and_sizes_of_their_own():
  images = batch(4, (40, 40))
  plain = jax.jit(maker((20, 20)).plain)(images)
  assert (agree(plain['image'], plain['mask']) > 0).any() and plain['mask'].shape == (4, 20, 20)
  np.testing.assert_array_equal(plain['boxes'], np.where(images['boxes'] < 0, -1, images['boxes'] / 2))
  np.testing.assert_array_equal(plain['view_box'], [[0, 0, 40, 40]] * 4)
  made = jax.jit(maker((40, 40), scale=(1.0, 1.0), flip=(0.0, 0.0), sample_sizes=(20,)))(KEY, images)
  np.testing.assert_array_equal(made['mask'][:, :20, :20], plain['mask'])
  assert (np.asarray(made['mask'])[:, 20:] == -1).all() and (np.asarray(made['mask'])[:, :, 20:] == -1).all()
  np.testing.assert_array_equal(made['boxes'], plain['boxes'])


def test_all_records_of_a_window_are_cut_alike():
  images = batch(6, (24, 24))
  windows = {k: np.stack([v, v, v], axis=1) for k, v in images.items()} | {'index': np.arange(18).reshape(6, 3)}
  made = jax.jit(maker((16, 16), scale=(0.3, 0.9), rotate=20.0, contrast=0.3))(KEY, windows)
  assert made['image'].shape == (6, 3, 16, 16, 1) and made['view_box'].shape == (6, 3, 4)
  for name in ('image', 'mask', 'boxes', 'view_box', 'view_flip'):
    np.testing.assert_array_equal(made[name][:, 1:], np.repeat(made[name][:, :1], 2, axis=1))
  assert len(np.unique(made['view_box'][:, 0], axis=0)) > 3  # of each sample its own
  np.testing.assert_array_equal(made['index'], windows['index'])
  plain = jax.jit(maker((24, 24)).plain)(windows)
  np.testing.assert_array_equal(plain['image'], windows['image'])
  assert plain['view_box'][5, 2].tolist() == [0, 0, 24, 24]
  two = jax.eval_shape(maker((16, 16), views=2), KEY, windows)
  assert two['global']['image'].shape == (6, 3, 2, 16, 16, 1) and two['global']['view_box'].shape == (6, 3, 2, 4)


def test_slices_of_a_volume_are_cut_by_their_own_share():
  draw = lambda key: geometry.random_box(key, (40, 60, 80), (0.16, 0.48), (0.9, 1 / 0.9), slices=(0.2, 0.5))
  box = jax.jit(jax.vmap(draw))
  start, length = map(np.asarray, box(jax.random.split(KEY, 2000)))
  assert start.min() >= 0 and (start + length).max(axis=0).tolist() <= [40, 60, 80]
  assert np.unique(length[:, 0]).tolist() == list(range(8, 21)) and abs(length[:, 0].mean() - 14) < 0.2
  area, aspect = length[:, 1] * length[:, 2] / 4800, length[:, 2] / length[:, 1]
  assert area.min() > 0.14 and area.max() < 0.5 and abs(area.mean() - 0.32) < 0.01
  assert aspect.min() > 0.85 and aspect.max() < 1.18
  assert abs(np.corrcoef(length[:, 0], area)[0, 1]) < 0.1
