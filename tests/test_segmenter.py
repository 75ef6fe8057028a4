"""Whole images by a segmentation network: normalisation of the whole image, channels, tiles, mirroring, values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmed import tiles
from jaxmed.augment import intensity
from jaxmed.data.resize import resize
from jaxmed.errors import UserError
from jaxmed.segmenter import statistics
from tests.segmenters import CHANNELS, direct, segmenter, stored

MODES = ['none', 'corpus', 'image', 'window:20:90', 'percentile', 'percentile:5:80', 'full', 'foreground:20:90:50:12',
         'foreground:20:90:50:12:10:200:80:30']


def test_every_mode_is_tested():
  assert {mode.partition(':')[0] for mode in MODES} == {*intensity.NORMALIZE}


@pytest.mark.parametrize('mode', MODES)
def test_statistics_are_those_of_a_whole_image(mode):
  image = stored(11, 9, 5, 2)
  image[8:] //= 3  # parts differ
  low, high, mean, std = statistics(image, mode, CHANNELS, (1, 0))
  table = lambda key: jnp.asarray([c[key] for c in CHANNELS])
  wanted = intensity.normalize(jnp.asarray(image)[None], jnp.asarray([[1, 0]]), table('mean'), table('std'), mode)[0]
  np.testing.assert_allclose((np.clip(image, low, high) - mean) / std, wanted, atol=2e-5)


def test_full_takes_unsigned_integers():
  with pytest.raises(UserError, match='unsigned'):
    statistics(np.zeros((4, 4, 1), np.float32), 'full', CHANNELS, (0,))


@pytest.mark.parametrize('size', [(8, 8), (8, 4, 8)])
def test_an_image_of_the_size_of_a_tile(size):
  s = segmenter(size, normalize='image', tile=size)
  image = stored(*size, 2)
  x = image.astype(np.float32)
  axes = tuple(range(len(size)))
  wanted = direct(s, (x - x.mean(axes)) / x.std(axes))
  np.testing.assert_allclose(np.stack(list(s.logits(image))), wanted, atol=1e-4)
  assert np.array_equal(s.predict(image), np.array([0, 2, 7])[wanted.argmax(-1)])


def test_a_tile_is_normalised_by_the_whole_image():
  """Tiles without overlap: each part is what the network says of it, normalised by all of the image."""
  s = segmenter(normalize='percentile', tile=(8, 8))
  image = stored(16, 8, 2)
  image[8:] //= 4
  low, high, mean, std = statistics(image, 'percentile', CHANNELS, (0, 1))
  x = (np.clip(image, low, high) - mean) / std
  got = np.stack(list(s.logits(image, step=1.0)))
  for part in (slice(0, 8), slice(8, 16)):
    np.testing.assert_allclose(got[part], direct(s, x[part]), atol=1e-4)


def test_a_tile_larger_than_the_network_is_resized_and_back():
  s = segmenter(normalize='none', tile=(16, 16))
  image = stored(16, 16, 2)
  got = np.stack(list(s.logits(image)))
  view = s.encoder.view((8, 8))  # as held-out batches are seen in training
  small = view.plain({'image': jnp.asarray(image)[None], 'channels': jnp.asarray([[0, 1]])})['image'][0]
  wanted = jax.image.resize(direct(s, small), (16, 16, 3), 'linear')
  np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_without_tiles_the_whole_image_is_resized():
  s = segmenter(normalize='none')
  image = stored(24, 16, 2)
  got = np.stack(list(s.logits(image)))
  wanted = jax.image.resize(direct(s, resize(image, (8, 8))), (24, 16, 3), 'linear')
  np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_channels_by_name_and_a_subset_of_them():
  s = segmenter(model='channel_vit_micro/4', tile=(8, 8))
  image = stored(8, 8, 2)
  both = np.stack(list(s.logits(image, ['T1', 'T2'])))
  np.testing.assert_allclose(np.stack(list(s.logits(image[..., ::-1], ['T2', 'T1']))), both, atol=1e-4)
  x = (image.astype(np.float32) - [100, 50]) / [20, 10]
  np.testing.assert_allclose(np.stack(list(s.logits(image[..., 1:], ['T2']))), direct(s, x[..., 1:], (1,)), atol=1e-4)
  with pytest.raises(UserError, match='T2'):
    s.predict(image, ['T1', 'T3'])


def test_mirrored_axes_are_those_of_training_unless_classes_have_sides():
  s = segmenter(tile=(8, 8), flips=(0, 1))
  image = stored(8, 8, 2)
  plain = lambda x: np.stack(list(s.logits(x, flips=())))
  mean = np.mean([np.flip(plain(np.flip(image, a)), a) for a in [(), (0,), (1,), (0, 1)]], axis=0)
  np.testing.assert_allclose(np.stack(list(s.logits(image))), mean, atol=1e-4)
  sided = dataclasses.replace(s, objective=dataclasses.replace(s.objective, names=('background', 'kidney_left', 'x')))
  assert s.mirrored == (0, 1) and sided.mirrored == ()
  np.testing.assert_allclose(np.stack(list(sided.logits(image))), plain(image), atol=1e-6)


@pytest.mark.parametrize('shape', [(8, 8), (8, 8, 8, 2)])
def test_an_image_of_another_rank(shape):
  with pytest.raises(UserError, match='2 axes and channels'):
    segmenter(tile=(8, 8)).predict(np.zeros(shape))


@pytest.mark.parametrize(('size', 'scales'), [
  ((9, 7, 12), None), ((4, 20, 3), None), ((6, 5, 7), None), ((9, 7, 12), (0.7, 0.75, 0.6)), ((3, 5, 6), (2.0, None, 1.3))])
def test_resampled_slices_are_linear_between_voxels(size, scales):
  given = np.random.default_rng(0).normal(size=(6, 5, 7, 3)).astype(np.float32)
  got = np.stack(list(tiles.resampled(iter(given), 6, size, scales)))
  at = [((np.arange(n) + 0.5 - n / 2) * (k / n if s is None else s) + k / 2 - 0.5).clip(0, k - 1)
        for n, k, s in zip(size, given.shape, scales or [None] * 3)]
  grid = np.meshgrid(*at, indexing='ij')
  for c in range(3):
    np.testing.assert_allclose(got[..., c], ndimage.map_coordinates(given[..., c], grid, order=1), atol=1e-5)
