"""Crops, rotations and changes of colour equal torchvision's at the same parameters."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
F = pytest.importorskip('torchvision.transforms.v2.functional')

from jaxmed.augment import color, intensity, warp  # noqa: E402
from jaxmed.augment.resample import crop_resize  # noqa: E402


def images(count, size=(24, 31)):
  """[B, H, W, 3] in 0 .. 1, with pure black and white, grays and pure colours."""
  x = np.random.default_rng(0).uniform(size=(count, *size, 3)).astype(np.float32)
  x[:, 0, 0], x[:, 0, 1], x[:, 0, 2], x[:, 0, 3], x[:, 0, 4] = 0.0, 1.0, 0.4, (1, 0, 0), (0, 0.5, 0.5)
  return x


def theirs(call, x):
  """A torchvision call on one image [H, W, C]."""
  return call(torch.from_numpy(np.moveaxis(x, -1, 0).copy())).numpy().transpose(1, 2, 0)


def planes(change):
  """A change of planes [3, B, H, W] as one of images [B, H, W, 3]."""
  return lambda x, *args: np.moveaxis(np.asarray(jax.jit(change)(np.moveaxis(x, -1, 0), *args)), 0, -1)


@pytest.mark.parametrize('box, size', [((3, 5, 20, 24), (16, 16)), ((0, 0, 24, 31), (9, 13)), ((10, 2, 6, 7), (32, 24))])
def test_random_resized_crop(box, size):
  x = images(1)[0]
  resize = functools.partial(F.resized_crop, interpolation=F.InterpolationMode.BICUBIC, antialias=True)
  want = theirs(lambda t: resize(t, *box, list(size)), x)
  have = jax.jit(crop_resize, static_argnums=3)(x, np.array(box[:2]), np.array(box[2:]), size)
  np.testing.assert_allclose(have, want, atol=1e-5)


def test_saturation():
  x, factor = images(4), np.array([0.0, 0.6, 1.0, 1.8])
  want = np.stack([theirs(lambda t: F.adjust_saturation(t, f), y) for f, y in zip(factor, x, strict=True)])
  # the weights of gray there have four digits
  np.testing.assert_allclose(planes(color.saturate)(x, factor), want, atol=3e-4)


def test_hue():
  x, shift = images(4), np.array([0.0, 0.1, -0.3, 0.5])
  want = np.stack([theirs(lambda t: F.adjust_hue(t, s), y) for s, y in zip(shift, x, strict=True)])
  np.testing.assert_allclose(planes(color.turn_hue)(x, shift), want, atol=5e-6)


def test_grayscale():
  x = images(1)
  want = theirs(lambda t: F.rgb_to_grayscale(t, num_output_channels=3), x[0])
  np.testing.assert_allclose(planes(color.grayscale)(x)[0], want, atol=2e-4)


def test_solarize():
  x = images(1)
  np.testing.assert_allclose(intensity.solarize(x)[0], theirs(lambda t: F.solarize(t, 0.5), x[0]), atol=1e-6)


def test_gaussian_blur():
  x, sigma = images(3), np.array([0.1, 0.9, 2.0])
  want = np.stack([theirs(lambda t: F.gaussian_blur(t, [17, 17], [s, s]), y) for s, y in zip(sigma, x, strict=True)])
  have = jax.jit(intensity.blur, static_argnums=2)(x, sigma, 8)
  np.testing.assert_allclose(have, want, atol=2e-6)


def test_contrast_about_gray_with_one_channel():
  """Where there is one channel, contrast is torchvision's; there it is common to the channels of RGB."""
  x = images(1)[..., :1] * 0.5 + 0.25
  low, high = np.asarray(intensity.jitter(jax.random.key(0), x, 0.0, 0.4, 0.0)), x.mean()
  factor = (low - high)[0, 0, 0, 0] / (x - high)[0, 0, 0, 0]
  np.testing.assert_allclose(low[0], theirs(lambda t: F.adjust_contrast(t, float(factor)), x[0]), atol=1e-5)


def test_rotation_inside_of_the_image():
  x, degrees = images(4, (25, 32)), np.array([0.0, 10.0, -33.0, 90.0])
  turn = functools.partial(F.rotate, interpolation=F.InterpolationMode.BILINEAR)
  want = np.stack([theirs(lambda t: turn(t, float(d)), y) for d, y in zip(degrees, x, strict=True)])
  inside = np.stack([theirs(lambda t: turn(t, float(d)), np.ones_like(y)) for d, y in zip(degrees, x, strict=True)])
  have = np.asarray(jax.jit(warp.rotate)(x, degrees))
  shown = inside > 1 - 1e-6  # not mixed with the black around the image there
  assert shown.mean() > 0.7
  np.testing.assert_allclose(have[shown], want[shown], atol=2e-5)
