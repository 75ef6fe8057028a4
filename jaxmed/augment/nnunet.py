"""The augmentation list of nnU-Net v2, for images [B, *grid, C] of two or three axes.

MIC-DKFZ/nnUNet, nnUNetTrainer.get_training_transforms, and the classes of MIC-DKFZ/batchgeneratorsv2 that it names; the
file of each stands at its function. What draws takes a key; what does the work takes its parameters. The spatial part
is in `geometry`, in one resampling with the crop.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.augment.intensity import chosen, gamma, select

PER_CHANNEL = 0.5  # share of the channels of an image that blur and low resolution change
FLAT = 3.0  # nnunetv2/configuration.py, ANISO_THRESHOLD
RADIUS = 3  # of blurs of at most 1 pixel, whose kernels have 7 taps

# What nnU-Net asks for, as keys of `augment`; ranges are the defaults of those keys. Each probability is of the call in
# get_training_transforms. Elastic deformation is off there (p_elastic_deform=0).
NNUNET: dict[str, Any] = {
    'rotation_probability': (0.2,),  # SpatialTransform, p_rotation; angles by `rotation`
    'zoom_probability': (0.2,),  # SpatialTransform, p_scaling, of 0.7 to 1.4 on all axes alike
    'noise_probability': (0.1,),  # GaussianNoiseTransform; its "variance" of 0 to 0.1 is used as deviation
    'soften_probability': (0.2,),  # GaussianBlurTransform, 0.5 to 1 pixels, each channel with 0.5
    'multiply_probability': (0.15,),  # MultiplicativeBrightnessTransform, 0.75 to 1.25
    'stretch_probability': (0.15,),  # ContrastTransform, 0.75 to 1.25, cut to the old range
    'coarse_probability': (0.25,),  # SimulateLowResolutionTransform, 0.5 to 1, each channel with 0.5
    'inverted_power_probability': (0.1,),  # GammaTransform of the inverted image, 0.7 to 1.5, keeps mean and deviation
    'power_probability': (0.3,),  # GammaTransform, the same
    'flip': (0.5,),  # MirrorTransform along all axes
}
# Views by that list alone: crops are not resized, and other changes are off.
VIEWS: dict[str, Any] = {'scale': (1.0, 1.0), 'brightness': 0.0, 'contrast': 0.0, 'gamma': 0.0, 'blur': 0.0} | NNUNET


CHANGES = ('noise', 'soften', 'multiply', 'stretch', 'coarse', 'inverted_power', 'power')  # in their order
CHANCES = tuple(f'{name}_probability' for name in ('rotation', 'zoom', 'elastic', *CHANGES))  # keys of `augment`
RANGES = ('noise', 'soften', 'multiply', 'stretch', 'coarse', 'power')


def flat(size: tuple[int, ...]) -> bool:
  """Whether a patch is so thin along its first axis that nnU-Net treats its slices as images ("dummy 2D")."""
  return len(size) == 3 and max(size) / size[0] > FLAT


def rotation(size: tuple[int, ...]) -> tuple[float, ...]:
  """The greatest angle about each axis, in degrees, for a patch: nnU-Net's rule.

  nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size. In 2D the last one is of the plane.
  """
  if len(size) == 2:
    return (0.0, 15.0 if max(size) / min(size) > 1.5 else 180.0)
  return (180.0, 0.0, 0.0) if flat(size) else (30.0,) * 3


def around_one(rng: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
  """Factors: below 1 with one half where the range allows that, else from 1 on (intensity/contrast.py, BGContrast)."""
  side, place = jax.random.split(rng)
  below = jax.random.bernoulli(side, 0.5, shape) & (low < 1)
  share = jax.random.uniform(place, shape)
  start = max(low, 1.0)
  return jnp.where(below, low + share * (1 - low), start + share * (high - start))


def soften(image: jax.Array, sigma: jax.Array) -> jax.Array:
  """Blurs each channel along each axis by `sigma` [B, C, rank] pixels, at most 1; the border is mirrored.

  noise/gaussian_blur.py: a kernel of the odd length nearest to 6 sigma + 0.5.
  """
  length = 6 * sigma + 0.5
  rounded = jnp.round(length)
  odd = jnp.where(rounded % 2 == 1, rounded, rounded + jnp.where(length >= rounded, 1, -1))
  taps = jnp.arange(-RADIUS, RADIUS + 1)
  weights = jnp.where(abs(taps) <= (odd[..., None] - 1) / 2, jnp.exp(-0.5 * jnp.square(taps / sigma[..., None])), 0)
  weights = weights / weights.sum(axis=-1, keepdims=True)  # [B, C, rank, taps]
  for axis, n in enumerate(image.shape[1:-1]):
    pad = [(RADIUS, RADIUS) if a == axis + 1 else (0, 0) for a in range(image.ndim)]
    padded = jnp.pad(image, pad, mode='reflect')
    parts = [_to_channels(weights[:, :, axis, i], image) * jax.lax.slice_in_dim(padded, i, i + n, axis=axis + 1)
             for i in range(2 * RADIUS + 1)]
    image = functools.reduce(jnp.add, parts)
  return image


def stretch(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Contrast times `factor` [B, C] about the channel's mean, cut to its old range (intensity/contrast.py)."""
  axes = tuple(range(1, image.ndim - 1))
  mean, low, high = (f(image, axis=axes, keepdims=True) for f in (jnp.mean, jnp.min, jnp.max))
  return jnp.clip((image - mean) * _to_channels(factor, image) + mean, low, high)


def coarse(image: jax.Array, zoom: jax.Array) -> jax.Array:
  """Each channel as of a scan with round(n zoom) pixels along an axis of n, `zoom` [B, C, rank] in (0, 1].

  Nearest pixels on the way down, linear on the way up (spatial/low_resolution.py, torch's interpolate with
  'nearest-exact' and align_corners=False).
  """
  for axis in range(image.ndim - 2):
    image = _coarse_along(image, axis + 1, zoom[..., axis, None])
  return image


def _coarse_along(image: jax.Array, axis: int, zoom: jax.Array) -> jax.Array:
  """`coarse` along one axis of the image, `zoom` [B, C, 1]."""
  n = image.shape[axis]
  count = jnp.maximum(jnp.round(n * zoom), 1)  # [B, C, 1]
  place = jnp.maximum((jnp.arange(n) + 0.5) * count / n - 0.5, 0)  # [B, C, n]
  below = jnp.floor(place)
  shape = [len(image), *(n if a == axis else 1 for a in range(1, image.ndim - 1)), -1]
  along = lambda x: jnp.moveaxis(x, 1, -1).reshape(shape)
  source = lambda index: jnp.minimum(jnp.floor((index + 0.5) * n / count), n - 1).astype(jnp.int32)
  take = lambda index: jnp.take_along_axis(image, along(source(index)), axis=axis)
  share = along(place - below)
  return take(below) * (1 - share) + take(jnp.minimum(below + 1, count - 1)) * share


def power(image: jax.Array, exponent: jax.Array, inverted: bool = False) -> jax.Array:
  """Gamma by `exponent` [B, C] that keeps each channel's mean and deviation; of the negative with `inverted`.

  intensity/gamma.py with p_retain_stats=1.
  """
  axes = tuple(range(1, image.ndim - 1))
  x = -image if inverted else image
  moments = lambda a: (a.mean(axis=axes, keepdims=True), a.std(axis=axes, keepdims=True))
  (mean, deviation), x = moments(x), gamma(x, exponent)
  now, spread = moments(x)
  x = (x - now) * (deviation / jnp.maximum(spread, 1e-7)) + mean
  return -x if inverted else x


def change(rng: jax.Array, image: jax.Array, chances: dict[str, Any], ranges: dict[str, tuple[float, float]]
           ) -> jax.Array:
  """The changes of intensity, in nnU-Net's order.

  Args:
    chances: {name: probability} of those that are on, names as in NNUNET without '_probability'.
    ranges: {name: (low, high)}.
  """
  batch, rank, count = len(image), image.ndim - 2, image.shape[-1]
  thin = flat(image.shape[1:-1])

  def noise(key, x):
    size_key, key = jax.random.split(key)
    deviation = jax.random.uniform(size_key, (batch, *[1] * (rank + 1)), minval=ranges['noise'][0],
                                   maxval=ranges['noise'][1])
    return x + deviation * jax.random.normal(key, x.shape)

  def softened(key, x):
    which, key = jax.random.split(key)
    sigma = jax.random.uniform(key, (batch, count, rank), minval=ranges['soften'][0], maxval=ranges['soften'][1])
    return _of_channels(which, soften(x, sigma), x)

  def coarsened(key, x):
    which, key = jax.random.split(key)
    zoom = jax.random.uniform(key, (batch, count, 1), minval=ranges['coarse'][0], maxval=ranges['coarse'][1])
    zoom = jnp.broadcast_to(zoom, (batch, count, rank))
    return _of_channels(which, coarse(x, zoom.at[..., 0].set(1.0) if thin else zoom), x)

  factors = lambda key, name: around_one(key, (batch, count), *ranges[name])
  steps = {
      'noise': noise, 'soften': softened,
      'multiply': lambda key, x: x * _to_channels(factors(key, 'multiply'), x),
      'stretch': lambda key, x: stretch(x, factors(key, 'stretch')), 'coarse': coarsened,
      'inverted_power': lambda key, x: power(x, factors(key, 'power'), True),
      'power': lambda key, x: power(x, factors(key, 'power'))}
  for i, name in enumerate(CHANGES):
    if name in chances:
      draw, key = jax.random.split(jax.random.fold_in(rng, i))
      image = select(chosen(draw, chances[name], batch), steps[name](key, image), image)
  return image


def _of_channels(rng: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """`new` in about half of the channels of each image."""
  some = jax.random.bernoulli(rng, PER_CHANNEL, (len(old), old.shape[-1]))
  return jnp.where(_to_channels(some, old), new, old)


def _to_channels(value: jax.Array, image: jax.Array) -> jax.Array:
  """[B, C] -> [B, 1.., C], to go with an image."""
  return value.reshape(len(image), *[1] * (image.ndim - 2), -1)
