"""Crops against Pillow, boxes against torchvision's rule, normalisation, flips, determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmed.augment.geometry import random_box
from jaxmed.augment.intensity import jitter, normalize
from jaxmed.augment.mix import mix
from jaxmed.augment.resample import crop_resize
from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('box,size', [((3, 5, 20, 24), (16, 16)), ((0, 0, 40, 50), (9, 13)), ((10, 2, 6, 7), (32, 24))])
def test_crop_is_pillows_bicubic_of_the_same_box(box, size):
  image = RNG.uniform(-2, 3, (40, 50, 2)).astype(np.float32)
  y, x, h, w = box
  want = np.stack([np.asarray(Image.fromarray(image[y:y + h, x:x + w, c]).resize(size[::-1], Image.Resampling.BICUBIC))
                   for c in range(2)], axis=-1)
  have = jax.jit(crop_resize, static_argnums=3)(image, jnp.array([y, x]), jnp.array([h, w]), size)
  np.testing.assert_allclose(have, want, atol=1e-5)


def test_crop_of_the_whole_volume_at_its_own_size_changes_nothing():
  volume = RNG.normal(size=(6, 8, 10, 1)).astype(np.float32)
  have = jax.jit(crop_resize, static_argnums=3)(volume, jnp.zeros(3, int), jnp.array([6, 8, 10]), (6, 8, 10))
  np.testing.assert_allclose(have, volume, atol=1e-6)


@pytest.mark.parametrize('grid', [(48, 64), (16, 24, 20)])
def test_boxes_lie_inside_and_cover_the_asked_share(grid):
  keys = jax.random.split(jax.random.key(0), 4000)
  start, length = jax.jit(jax.vmap(lambda k: random_box(k, grid, (0.2, 0.6), (3 / 4, 4 / 3))))(keys)
  start, length = np.asarray(start), np.asarray(length)
  assert (start >= 0).all() and (start + length <= grid).all() and (length >= 1).all()
  share = length.prod(axis=1) / np.prod(grid)
  assert abs(share.mean() - 0.4) < 0.03
  assert share.min() > 0.17 and share.max() < 0.65
  if len(grid) == 2:
    aspect = np.log(length[:, 1] / length[:, 0])
    assert abs(aspect.mean()) < 0.02 and np.abs(aspect).max() < np.log(4 / 3) + 0.15
  room = np.asarray(grid) - length
  position = (start / np.maximum(room, 1))[room > 0]
  assert abs(position.mean() - 0.5) < 0.02  # uniform placement


def test_a_box_that_never_fits_falls_back_to_the_centre():
  start, length = random_box(jax.random.key(1), (4, 100), (1.0, 1.0), (3 / 4, 4 / 3))
  assert length[0] == 4 and length[1] == round(4 * (4 / 3) ** 0.5)
  assert start[0] == 0 and abs(int(start[1]) - (100 - int(length[1])) / 2) <= 1


def test_normalisation_by_channel_id_and_by_image():
  image = RNG.integers(0, 4096, (3, 5, 6, 2)).astype(np.uint16)
  ids = np.array([[0, 1], [1, 0], [2, 1]])
  mean, std = np.array([100.0, 2000.0, 7.0]), np.array([10.0, 500.0, 3.0])
  have = normalize(image, ids, jnp.asarray(mean), jnp.asarray(std), 'corpus')
  want = (image - mean[ids][:, None, None]) / std[ids][:, None, None]
  np.testing.assert_allclose(have, want, rtol=1e-5)
  each = np.asarray(normalize(image, ids, jnp.asarray(mean), jnp.asarray(std), 'image'))
  np.testing.assert_allclose(each.mean(axis=(1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(each.std(axis=(1, 2)), 1, atol=1e-5)
  assert normalize(image, ids, None, None, 'none').dtype == jnp.float32


def test_jitter_moves_each_channel_by_its_own_draw_within_the_bounds():
  image = RNG.normal(size=(64, 4, 4, 3)).astype(np.float32)
  out = np.asarray(jitter(jax.random.key(0), image, 0.5, 0.0, 0.0)) - image
  shift = out[:, 0, 0]
  np.testing.assert_allclose(out, np.broadcast_to(shift[:, None, None], out.shape), atol=1e-6)
  assert np.abs(shift).max() <= 0.5 and np.abs(shift).max() > 0.45 and len(np.unique(shift.round(5))) > 180
  contrast = np.asarray(jitter(jax.random.key(0), image, 0.0, 0.3, 0.0))
  np.testing.assert_allclose(contrast.mean(axis=(1, 2)), image.mean(axis=(1, 2)), atol=1e-5)
  ratio = contrast.std(axis=(1, 2)) / image.std(axis=(1, 2))
  assert ratio.min() > 0.7 - 1e-4 and ratio.max() < 1.3 + 1e-4
  np.testing.assert_array_equal(jitter(jax.random.key(0), image, 0.0, 0.0, 0.0), image)


def maker(**options):
  return ViewMaker((16, 16), (0.0,) * 3, (1.0,) * 3, **options)


def test_a_view_is_a_function_of_its_key_and_flips_half_of_the_samples():
  image = RNG.normal(size=(200, 16, 16, 3)).astype(np.float32)
  batch = {'image': image, 'channels': np.tile(np.arange(3), (200, 1))}
  view = jax.jit(maker(scale=(1.0, 1.0)))
  one, again, other = (np.asarray(view(jax.random.key(k), batch)['image']) for k in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, other)
  flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(one, image)])
  kept = np.array([np.array_equal(a, b) for a, b in zip(one, image)])
  assert (flipped | kept).all() and 70 < flipped.sum() < 130


def test_volumes_are_cropped_and_flipped_along_any_axis():
  image = RNG.normal(size=(4, 8, 12, 10, 2)).astype(np.float32)
  batch = {'image': image, 'channels': np.tile(np.arange(2), (4, 1))}
  view = ViewMaker((8, 8, 8), (0.0, 0.0), (1.0, 1.0), flip=(1.0, 0.0, 0.0), scale=(0.5, 1.0))
  assert jax.jit(view)(jax.random.key(0), batch)['image'].shape == (4, 8, 8, 8, 2)
  whole = ViewMaker((8, 12, 10), (0.0, 0.0), (1.0, 1.0), flip=(1.0, 0.0, 0.0), scale=(1.0, 1.0))
  np.testing.assert_array_equal(jax.jit(whole)(jax.random.key(0), batch)['image'], image[:, ::-1])


@pytest.mark.parametrize('options,word', [
    (dict(scale=(0.0, 1.0)), 'augment.scale'), (dict(ratio=(2.0, 1.0)), 'augment.ratio'),
    (dict(flip=(0.5,)), 'augment.flip'),
    (dict(channel_sampling='hsc'), "'hcs'"), (dict(normalize='corpse'), "'corpus'")])
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    maker(**options)


def test_mixup_and_cutmix_blend_image_and_target_by_the_same_share():
  n = 6
  image = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 10, 10, 1))
  target = np.eye(n, dtype=np.float32)
  channels = np.zeros((n, 1), int)
  seen, blend = set(), jax.jit(mix, static_argnums=(4, 5))
  for seed in range(12):
    mixed, blended = map(np.asarray, blend(jax.random.key(seed), image, target, channels, 0.8, 1.0))
    np.testing.assert_allclose(blended.sum(axis=1), 1, atol=1e-6)
    # the mean pixel of sample i is share * i + (1 - share) * (n - 1 - i), with the share of its target
    share = blended[0, 0]
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), share * np.arange(n) + (1 - share) * np.arange(n)[::-1],
                               atol=1e-4)
    seen.add('paste' if set(np.unique(mixed[0])) <= {0.0, 5.0} else 'blend')
  assert seen == {'paste', 'blend'}


def test_samples_with_other_channels_are_not_mixed():
  image = RNG.normal(size=(4, 6, 6, 1)).astype(np.float32)
  target = np.eye(4, dtype=np.float32)
  channels = np.array([[0], [1], [1], [2]])
  mixed, blended = mix(jax.random.key(0), image, target, channels, 0.8, 0.0)
  np.testing.assert_array_equal(mixed[0], image[0])
  np.testing.assert_array_equal(blended[3], target[3])
  assert not np.allclose(mixed[1], image[1])
