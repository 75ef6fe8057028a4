"""Modes of normalisation and changes of intensity against NumPy in float64; who draws what; views of different kinds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial.legendre import leggrid2d, leggrid3d

from jaxmed.augment import intensity
from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def images(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def normalized(image, mode, mean=(0.0,), std=(1.0,)):
  ids = np.zeros((image.shape[0], image.shape[-1]), np.int32)
  return np.asarray(intensity.normalize(image, ids, jnp.asarray(mean), jnp.asarray(std), mode))


# Normalisation


def test_a_window_of_hounsfield_units_becomes_minus_one_to_one():
  image = np.array([-2000, -1000, -300, 0, 400, 3000], np.int16).reshape(1, 6, 1, 1)
  np.testing.assert_allclose(normalized(image, 'window:-1000:400').ravel(), [-1, -1, 0, 3 / 7, 1, 1], atol=1e-6)


@pytest.mark.parametrize('mode, limits', [('percentile', (0.5, 99.5)), ('percentile:2:97', (2, 97))])
@pytest.mark.parametrize('shape', [(3, 20, 31, 2), (2, 5, 9, 7, 1)])
def test_percentiles_are_cut_and_standardised(mode, limits, shape):
  image = images(shape) * 100
  image[0] = np.round(image[0] / 50)  # many equal values
  axes = tuple(range(1, image.ndim - 1))
  low, high = np.percentile(image.astype(np.float64), limits, axis=axes, keepdims=True)
  cut = np.clip(image.astype(np.float64), low, high)
  want = (cut - cut.mean(axis=axes, keepdims=True)) / cut.std(axis=axes, keepdims=True)
  np.testing.assert_allclose(normalized(image, mode), want, rtol=3e-6, atol=2e-6)


def test_percentiles_are_numpys():
  x = images((3, 20, 31, 2))
  x[1] = np.round(x[1])
  x[2, ..., 0] = -4
  places = (0.0, 0.5, 30.0, 99.5, 100.0)
  want = np.percentile(x.astype(np.float64), places, axis=(1, 2), keepdims=True)
  np.testing.assert_allclose(jax.jit(intensity.percentiles, static_argnums=1)(x, places), want, atol=1e-6)


def test_the_foreground_is_cut_centred_and_scaled():
  """Raw values are cut to the window; mean and deviation are of the values that were not (nnU-Net's CT)."""
  image = np.array([[-1000, 40], [100, -9], [900, 41]], np.int16).reshape(1, 3, 1, 2)
  one, each = 'foreground:-50:300:120:60', 'foreground:-50:300:120:60:0:40:10:5'
  got = normalized(image, one)[..., 0].ravel()
  np.testing.assert_allclose(got, [(-50 - 120) / 60, (100 - 120) / 60, (300 - 120) / 60], rtol=1e-6)
  ids, two = np.array([[0, 1]]), jnp.zeros(2)
  got = np.asarray(intensity.normalize(image, ids, two, two, each))
  np.testing.assert_allclose(got[..., 1].ravel(), [6, -2, 6], rtol=1e-6)
  np.testing.assert_allclose(got[..., 0], normalized(image, one)[..., 0], rtol=1e-6)
  with pytest.raises(UserError, match='numbers of 2 channels'):
    normalized(image, each)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_the_full_range_of_a_type_becomes_minus_one_to_one(dtype):
  top = np.iinfo(dtype).max
  image = np.array([0, top // 5, top], dtype).reshape(1, 3, 1, 1)
  np.testing.assert_allclose(normalized(image, 'full').ravel(), [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float32, np.int16])
def test_the_full_range_needs_an_unsigned_type(dtype):
  with pytest.raises(UserError, match="'full'.*" + np.dtype(dtype).name):
    normalized(np.zeros((1, 2, 2, 1), dtype), 'full')


@pytest.mark.parametrize('text, name, limits', [
    ('corpus', 'corpus', ()), ('window:-1000:400', 'window', (-1000.0, 400.0)),
    ('percentile', 'percentile', (0.5, 99.5)), ('percentile:1:99', 'percentile', (1.0, 99.0)),
    ('foreground:-50:300:120.5:60', 'foreground', (-50, 300, 120.5, 60))])
def test_modes_are_read(text, name, limits):
  assert intensity.parse_mode(text) == (name, limits)


@pytest.mark.parametrize('text, word', [
    ('windw:1:2', "'window'"), ('window', 'window:-1000:400'), ('window:3', 'two'), ('window:400:-1000', 'two'),
    ('window:a:b', 'two'), ('window:0:inf', 'two'), ('percentile:5', 'percentile:0.5:99.5'),
    ('percentile:-1:99', 'two'), ('percentile:1:101', 'two'), ('corpus:1:2', 'no numbers'),
    ('foreground', 'fingerprint'), ('foreground:0:1:0', 'LOW:HIGH:MEAN:STD'), ('foreground:1:0:0:1', 'fingerprint'),
    ('foreground:0:1:0:0', 'fingerprint')])
def test_bad_modes_are_named(text, word):
  with pytest.raises(UserError, match=word):
    intensity.parse_mode(text)
  with pytest.raises(UserError, match='loader.normalize'):
    ViewMaker((8, 8), (0.0,), (1.0,), normalize=text)


# Changes with given parameters


@pytest.mark.parametrize('shape', [(3, 7, 9, 2), (2, 4, 5, 6, 3)])
def test_gamma_acts_on_each_channels_own_range(shape):
  image, exponent = images(shape), RNG.uniform(0.4, 2.5, (shape[0], shape[-1]))
  axes = tuple(range(1, image.ndim - 1))
  x = image.astype(np.float64)
  low, span = x.min(axis=axes, keepdims=True), np.ptp(x, axis=axes, keepdims=True)
  wide = exponent.reshape(shape[0], *[1] * len(axes), shape[-1])
  have = intensity.gamma(image, exponent)
  np.testing.assert_allclose(have, ((x - low) / span) ** wide * span + low, atol=5e-6)
  np.testing.assert_allclose(intensity.gamma(image, np.ones_like(exponent)), image, atol=1e-6)


def test_gamma_leaves_a_constant_channel():
  np.testing.assert_array_equal(intensity.gamma(np.full((1, 3, 3, 1), 2.5, np.float32), np.full((1, 1), 1.7)), 2.5)


@pytest.mark.parametrize('grid', [(7, 9), (4, 5, 6)])
def test_the_bias_field_is_numpys_legendre_series(grid):
  rank = len(grid)
  orders = [o for o in itertools.product(range(4), repeat=rank) if sum(o) <= 3]
  coefficients = RNG.uniform(-0.5, 0.5, (2, 3, len(orders)))
  have = np.asarray(intensity.bias_field(coefficients, grid))
  assert have.shape == (2, *grid, 3)
  axes = [np.linspace(-1, 1, n) for n in grid]
  for b, c in np.ndindex(2, 3):
    dense = np.zeros((4,) * rank)
    dense[tuple(np.transpose(orders))] = coefficients[b, c]
    want = np.exp((leggrid2d if rank == 2 else leggrid3d)(*axes, dense))
    np.testing.assert_allclose(have[b, ..., c], want, rtol=1e-5)


def blurred(image, sigma, radius):
  """A blur of [*grid, C] by NumPy: taps, mirrored padding, one axis after the other."""
  taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  for axis in range(image.ndim - 1):
    padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)], mode='reflect')
    image = np.apply_along_axis(lambda x: np.convolve(x, taps / taps.sum(), mode='valid'), axis, padded)
  return image


@pytest.mark.parametrize('grid', [(11, 14), (6, 8, 9)])
def test_blur_is_a_mirrored_gaussian_of_each_samples_own_width(grid):
  image, sigma = images((3, *grid, 2)), np.array([0.1, 0.8, 2.0])
  have = np.asarray(jax.jit(intensity.blur, static_argnums=2)(image, sigma, 5))
  for b in range(3):
    np.testing.assert_allclose(have[b], blurred(image[b].astype(np.float64), sigma[b], 5), atol=2e-6)
  np.testing.assert_allclose(have[0], image[0], atol=1e-6)


def test_blur_keeps_a_constant_image_even_if_it_is_smaller_than_the_kernel():
  image = np.full((1, 1, 3, 5, 1), 2.0, np.float32)
  np.testing.assert_allclose(intensity.blur(image, np.array([2.0]), 8), image, rtol=1e-6)


def test_solarising_inverts_above_the_middle_of_each_channel():
  image = np.array([[-1.0, 0.5, 2.0, 3.0], [10, 20, 12, 18]]).T.reshape(1, 2, 2, 2).astype(np.float32)
  have = np.asarray(intensity.solarize(image)).reshape(4, 2).T
  np.testing.assert_allclose(have, [[-1, 0.5, 0, -1], [10, 10, 12, 12]], atol=1e-6)


# Draws


def test_each_channel_of_each_sample_draws_its_own_gamma_within_the_bounds():
  ramp = np.linspace(0, 1, 9, dtype=np.float32)
  image = np.broadcast_to(ramp.reshape(1, 3, 3, 1), (500, 3, 3, 2))
  have = np.asarray(intensity.random_gamma(KEY, image, 0.5))
  exponent = np.log(have[:, 1, 1]) / np.log(0.5)
  assert exponent.min() > 1 / 1.5 - 1e-4 and exponent.max() < 1.5 + 1e-4
  assert len(np.unique(exponent.round(6))) > 990
  assert abs(np.log(exponent).mean()) < 0.03  # log-uniform: as often below one as above
  assert abs(np.log(exponent).std() - np.log(1.5) / 3**0.5) < 0.01


def test_each_channel_draws_its_own_bias_field_above_its_minimum():
  image = images((40, 6, 6, 3))
  have = np.asarray(intensity.random_bias_field(KEY, image, 0.2))
  low = image.min(axis=(1, 2), keepdims=True)
  field = np.where(image > low, have - low, 1) / np.where(image > low, image - low, 1)
  assert field.min() > np.exp(-2.0) and field.max() < np.exp(2.0)  # ten terms of at most 0.2
  assert len(np.unique(field[:, 2, 2].round(6))) > 115
  np.testing.assert_allclose(have.min(axis=(1, 2)), low[:, 0, 0], atol=1e-5)


def test_each_sample_draws_its_own_blur():
  spike = np.zeros((300, 9, 9, 1), np.float32)
  spike[:, 4, 4] = 1
  have = np.asarray(intensity.random_blur(KEY, spike, 2.0))[:, 4, 4, 0]
  sigma = np.linspace(0.1, 2.0, 96)
  peak = np.array([blurred(spike[0, :, 4], s, 8)[4, 0] for s in sigma])
  drawn = np.interp(np.sqrt(have), peak[::-1], sigma[::-1])
  assert len(np.unique(have)) > 280 and abs(drawn.mean() - 1.05) < 0.1 and drawn.max() > 1.8


def test_jitter_reaches_only_the_chosen_samples_and_noise_all():
  image, where = images((6, 5, 5, 2)), np.array([True, False] * 3)
  have = np.asarray(intensity.jitter(KEY, image, 0.5, 0.3, 0.0, where))
  np.testing.assert_array_equal(have[1::2], image[1::2])
  np.testing.assert_array_equal(have[::2], np.asarray(intensity.jitter(KEY, image, 0.5, 0.3, 0.0))[::2])
  assert (np.abs(have - image)[::2].max(axis=(1, 2, 3)) > 0.01).all()
  noisy = np.asarray(intensity.jitter(KEY, image, 0.0, 0.0, 0.3, where)) - image
  assert abs(noisy.std() - 0.3) < 0.03


def test_a_share_of_the_samples_changes():
  image = images((2000, 2, 2, 1))
  have = np.asarray(intensity.sometimes(KEY, image, 0.3, lambda key, x: x + 1))
  changed = (have != image).reshape(2000, -1)
  assert (changed.all(axis=1) == changed.any(axis=1)).all()
  assert abs(changed[:, 0].mean() - 0.3) < 0.04


# In the view maker


@functools.partial(jax.jit, static_argnums=0)
def made(view, key, batch):
  return view(key, batch)


def batch_of(image):
  return {'image': image, 'channels': np.tile(np.arange(image.shape[-1], dtype=np.int32), (len(image), 1))}


def plain(size=(8, 8), channels=2, **options):
  """Views that show the whole image, so that only intensities can change."""
  return ViewMaker(size, (0.0,) * channels, (1.0,) * channels, scale=(1.0, 1.0), local_scale=(1.0, 1.0),
                   flip=(0.0,) * len(size), local_size=size, **options)


def test_each_kind_of_view_has_its_own_probability():
  image = images((60, 8, 8, 2))
  out = made(plain(views=3, local_views=2, solarize=(0.0, 1.0, 0.5)), KEY, batch_of(image))
  solar = np.asarray(intensity.solarize(image))
  np.testing.assert_array_equal(out['global']['image'][:, 0], image)
  for v in (1, 2):
    np.testing.assert_allclose(out['global']['image'][:, v], solar, atol=1e-6)
  changed = (np.asarray(out['local']['image']) != image[:, None]).any(axis=(2, 3, 4))
  assert 40 < changed.sum() < 80  # of 120
  assert (changed[:, 0] != changed[:, 1]).any()  # each view by its own draw


def test_one_number_is_the_same_for_all_kinds_and_one_view_is_of_the_first_kind():
  image = images((6, 8, 8, 2))
  solar = np.asarray(intensity.solarize(image))
  out = made(plain(views=2, local_views=1, solarize=(1.0,)), KEY, batch_of(image))
  for name in ('global', 'local'):
    for v in range(out[name]['image'].shape[1]):
      np.testing.assert_allclose(out[name]['image'][:, v], solar, atol=1e-6)
  np.testing.assert_allclose(made(plain(solarize=(1.0, 0.0, 0.0)), KEY, batch_of(image))['image'], solar, atol=1e-6)
  np.testing.assert_array_equal(made(plain(solarize=(0.0, 1.0, 1.0)), KEY, batch_of(image))['image'], image)


def test_jitter_with_probability_zero_in_a_kind_of_view_leaves_it():
  image = images((4, 8, 8, 2))
  out = made(plain(views=2, local_views=1, brightness=0.5, contrast=0.5, jitter_probability=(0.0, 1.0, 0.0)), KEY,
             batch_of(image))
  np.testing.assert_array_equal(out['global']['image'][:, 0], image)
  np.testing.assert_array_equal(out['local']['image'][:, 0], image)
  assert (np.abs(out['global']['image'][:, 1] - image).max(axis=(1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize('size', [(8, 8), (6, 8, 8)])
def test_all_options_together_are_finite_and_a_function_of_the_key(size):
  view = plain(size, views=2, local_views=1, rotate90=0.5, rotate=20.0, brightness=0.3, contrast=0.3, noise=0.1,
               jitter_probability=0.8, gamma=0.5, gamma_probability=0.5, bias=0.3, bias_probability=(0.5, 0.2, 0.1),
               blur=1.5, blur_probability=(1.0, 0.1, 0.5), solarize=(0.0, 0.2, 0.0))
  image = batch_of(images((5, *size, 2)))
  one, again, other = (np.asarray(made(view, jax.random.key(k), image)['global']['image']) for k in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert np.isfinite(one).all() and (one != other).any(axis=(2, 3, 4) if len(size) == 2 else (2, 3, 4, 5)).all()


@pytest.mark.parametrize('options, word', [
    (dict(solarize=1.5), 'augment.solarize'), (dict(blur_probability=(0.1, 0.2)), 'augment.blur_probability'),
    (dict(grayscale=()), 'augment.grayscale'), (dict(gamma=-0.1), 'augment.gamma'), (dict(blur=-1.0), 'augment.blur')])
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    plain(**options)
