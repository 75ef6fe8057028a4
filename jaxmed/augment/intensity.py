"""From stored numbers to what an encoder sees, and changes of intensity that suit any modality.

Changes take normalised images [B, *grid, C] float32 of any rank. What draws takes a key; what does the work takes its
parameters, one a sample or one a channel of a sample.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, choose

NORMALIZE = ('corpus', 'image', 'none', 'window', 'percentile', 'full', 'foreground')
COLORED = ('corpus', 'full')  # modes from which the stored colours can be had back, see `stored_range`
PERCENTILES = (0.5, 99.5)
DEGREE = 3  # of bias fields


def parse_mode(text: str) -> tuple[str, tuple[float, ...]]:
  """'window:-1000:400' -> ('window', (-1000.0, 400.0)); the two numbers of 'percentile' may be left out, those of
  'foreground' are four for all channels, or four for each.

  Raises:
    UserError: an unknown mode, or numbers that do not suit it.
  """
  name, *words = text.split(':')
  choose('loader.normalize', name, NORMALIZE)
  try:
    limits = tuple(map(float, words))
  except ValueError:
    limits = (math.nan,)
  if name == 'percentile' and not words:
    return name, PERCENTILES
  if name == 'foreground':
    if not limits or len(limits) % 4 or not all(map(math.isfinite, limits)) or any(
        a >= b or d <= 0 for a, b, d in zip(limits[::4], limits[1::4], limits[3::4], strict=True)):
      raise UserError(f'loader.normalize {text!r} needs LOW:HIGH:MEAN:STD of the foreground, for all channels or for '
                      'each, which jaxmed fingerprint prints')
    return name, limits
  if name not in ('window', 'percentile'):
    if words:
      raise UserError(f'loader.normalize {text!r}: {name!r} takes no numbers')
    return name, ()
  low, high = (-math.inf, math.inf) if name == 'window' else (0, 100)
  if len(limits) != 2 or not low <= limits[0] < limits[1] <= high or not all(map(math.isfinite, limits)):
    example = 'window:-1000:400 (Hounsfield units)' if name == 'window' else 'percentile:0.5:99.5'
    raise UserError(f'loader.normalize {text!r} needs two rising numbers, for example {example}')
  return name, limits


def normalize(image: jax.Array, channels: jax.Array, mean: jax.Array, std: jax.Array, mode: str,
              within: jax.Array | None = None) -> jax.Array:
  """Normalises native intensities, channel by channel.

  Modes:
    'corpus': (x - mean) / std with the table. 'image': with each channel's own mean and deviation. 'none'.
    'window:LOW:HIGH' (CT): cut to this window, in native units (Hounsfield), which then becomes -1 .. 1.
    'percentile' or 'percentile:LOW:HIGH' (MR): each channel of each image is cut to its own percentiles, by default
      0.5 and 99.5, then to zero mean and unit deviation. Costs some 70 passes over the image.
    'foreground:LOW:HIGH:MEAN:STD' (CT, as nnU-Net): cut to this window of native units, minus the mean, over the
      deviation; four numbers for all channels, or four for each in the order of the vocabulary.
    'full' (8 bits): 0 .. top of the stored type becomes -1 .. 1. Of a 16-bit type that holds 12 bits only 6 % is used.

  Args:
    image: [B, *grid, C] of any number type.
    channels: [B, C] int, rows of `mean` and `std` [V] in native units.
    within: [B, *grid] bool, pixels that belong to the image and count for its statistics; None for all.
  Returns:
    [B, *grid, C] float32.
  Raises:
    UserError: a mode that does not exist, or 'full' for a type that is not an unsigned integer.
  """
  name, limits = parse_mode(mode)
  x = image.astype(jnp.float32)
  if name == 'none':
    return x
  if name == 'image':
    return _standardized(x, within)
  if name == 'window':
    return jnp.clip((x - limits[0]) / (limits[1] - limits[0]), 0, 1) * 2 - 1
  if name == 'foreground':
    rows = jnp.asarray(foreground_table(limits, len(mean)))[channels]  # [B, C, 4]
    low, high, mean, std = (_spread(rows[..., i], x) for i in range(4))
    return (jnp.clip(x, low, high) - mean) / std
  if name == 'percentile':
    return _standardized(jnp.clip(x, *percentiles(x, limits, within)), within)
  if name == 'full':
    if not jnp.issubdtype(image.dtype, jnp.unsignedinteger):
      raise UserError(f"loader.normalize 'full' takes unsigned integers as they are stored, not {image.dtype}: "
                      "choose 'corpus' or 'image'")
    return x * (2 / jnp.iinfo(image.dtype).max) - 1
  return (x - _spread(mean[channels], x)) / _spread(jnp.maximum(std[channels], 1e-6), x)


def foreground_table(limits: tuple[float, ...], vocabulary: int) -> np.ndarray:
  """Low, high, mean and deviation of each channel of the vocabulary, [V, 4] float32, from the numbers of 'foreground'.

  Raises:
    UserError: numbers of neither one channel nor all.
  """
  table = np.asarray(limits, np.float32).reshape(-1, 4)
  if len(table) not in (1, vocabulary):
    raise UserError(f'loader.normalize foreground has numbers of {len(table)} channels: expected those of one, for '
                    f'all, or of the {vocabulary} of the vocabulary')
  return np.broadcast_to(table, (vocabulary, 4))


def percentiles(x: jax.Array, limits: tuple[float, ...], within: jax.Array | None = None) -> jax.Array:
  """Percentiles of each channel of [B, *grid, C] float32, linear between ranks: [len(limits), B, 1.., C].

  Of the pixels `within` [B, *grid] bool; None for all.

  Exact, by bisection over the bits of a float32 instead of sorting: a sort takes five times as long on a CPU.
  """
  bits = jax.lax.bitcast_convert_type(jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1), jnp.int32)
  keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # [B, C, N] in the order of the floats
  value = lambda key: jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
  count = keys.shape[-1] if within is None else within.sum(axis=range(1, within.ndim))[:, None]  # [B, 1]
  if within is not None:  # the others come after all that count
    keys = jnp.where(within.reshape(len(keys), 1, -1), keys, jnp.iinfo(jnp.int32).max)
  out = []
  for limit in limits:
    place = limit / 100 * (count - 1)
    rank = math.floor(place) if within is None else jnp.floor(place).astype(jnp.int32)
    below = _ranked(keys, rank)
    enough = (keys <= below[..., None]).sum(axis=-1) > rank + (place > rank)
    following = jnp.where(keys > below[..., None], keys, jnp.iinfo(jnp.int32).max).min(axis=-1)
    above = jnp.where(enough, below, following)
    out.append(_spread(value(below) + (value(above) - value(below)) * (place - rank), x))
  return jnp.stack(out)


def _ranked(keys: jax.Array, rank: jax.Array | int) -> jax.Array:
  """The int32 with `rank` others before it along the last axis, [..., N] -> [...]."""
  def halve(_, bounds):
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
    left = (keys <= middle[..., None]).sum(axis=-1) > rank
    return jnp.where(left, low, middle + 1), jnp.where(left, middle, high)

  return jax.lax.fori_loop(0, 32, halve, (keys.min(axis=-1), keys.max(axis=-1)))[0]


def stored_range(channels: jax.Array, mean: jax.Array, std: jax.Array, mode: str,
                 top: float) -> tuple[jax.Array, jax.Array]:
  """(scale, offset), both [B, C]: normalised * scale + offset is the stored value over `top`, the top of its type.

  Raises:
    UserError: a mode that does not allow the way back.
  """
  name = parse_mode(mode)[0]
  if name == 'full':
    half = jnp.full(channels.shape, 0.5)
    return half, half
  if name == 'corpus':
    return jnp.maximum(std[channels], 1e-6) / top, mean[channels] / top
  raise UserError(f"changes of colour need loader.normalize 'corpus' or 'full', not {mode!r}")


def chosen(rng: jax.Array, probability: jax.Array | float, count: int) -> jax.Array:
  """[count] bool, each True with `probability`."""
  return jax.random.bernoulli(rng, probability, (count,))


def select(where: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """`new` for the samples `where` [B], `old` for the others."""
  return jnp.where(where.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def jitter(rng: jax.Array, image: jax.Array, brightness: float, contrast: float, noise: float,
           where: jax.Array | None = None) -> jax.Array:
  """Adds brightness and scales contrast, drawn for each channel of each sample.

  contrast: factor in 1 +- contrast about the channel's mean; brightness: shift in +- brightness; noise: standard
  deviation of the Gaussian noise that is added. Zero leaves that part out. where: [B] bool, the samples whose contrast
  and brightness change; all without it.
  """
  keys = jax.random.split(rng, 3)
  shape, old = (image.shape[0], *[1] * (image.ndim - 2), image.shape[-1]), image
  if contrast:
    factor = jax.random.uniform(keys[0], shape, minval=1 - contrast, maxval=1 + contrast)
    mean = image.mean(axis=_grid_axes(image), keepdims=True)
    image = (image - mean) * factor + mean
  if brightness:
    image = image + jax.random.uniform(keys[1], shape, minval=-brightness, maxval=brightness)
  if where is not None and (contrast or brightness):
    image = select(where, image, old)
  if noise:
    image = image + noise * jax.random.normal(keys[2], image.shape)
  return image


def gamma(image: jax.Array, exponent: jax.Array) -> jax.Array:
  """Raises each channel, scaled to its range, to the power `exponent` [B, C] (MONAI RandAdjustContrast, nnU-Net)."""
  low, high = _range(image)
  span = jnp.maximum(high - low, 1e-6)
  return jnp.exp(_spread(exponent, image) * jnp.log((image - low) / span)) * span + low


def random_gamma(rng: jax.Array, image: jax.Array, strength: float) -> jax.Array:
  """`gamma` with exponents log-uniform in 1 / (1 + strength) .. 1 + strength, one a channel of a sample."""
  bound = math.log1p(strength)
  shape = image.shape[0], image.shape[-1]
  return gamma(image, jnp.exp(jax.random.uniform(rng, shape, minval=-bound, maxval=bound)))


def bias_field(coefficients: jax.Array, grid: tuple[int, ...]) -> jax.Array:
  """The smooth field exp(sum of coefficient * product of Legendre polynomials), [B, *grid, C].

  Axes run from -1 to 1. coefficients: [B, C, K] of the products of total degree at most 3 (K = 10 in 2D, 20 in 3D), in
  the order of itertools.product. MONAI's RandBiasField does the same in 3D; in 2D it takes other ten products.
  """
  rank = len(grid)
  orders = np.array([o for o in itertools.product(range(DEGREE + 1), repeat=rank) if sum(o) <= DEGREE])
  dense = jnp.zeros((*coefficients.shape[:2], *(DEGREE + 1,) * rank))
  field = dense.at[(slice(None), slice(None), *orders.T)].set(coefficients)
  for n in grid:  # one axis after the other; a basis over the whole grid would be large
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, n), DEGREE).astype(np.float32)  # [n, 4]
    field = jnp.tensordot(field, basis, axes=(2, 1))  # the axis done goes to the end, so the next one is at 2
  return jnp.exp(jnp.moveaxis(field, 1, -1))


def random_bias_field(rng: jax.Array, image: jax.Array, strength: float) -> jax.Array:
  """Multiplies each channel, above its minimum, by a `bias_field` whose coefficients are uniform in +- strength."""
  grid = image.shape[1:-1]
  shape = image.shape[0], image.shape[-1], math.comb(DEGREE + len(grid), DEGREE)
  field = bias_field(jax.random.uniform(rng, shape, minval=-strength, maxval=strength), grid)
  low = _range(image)[0]
  return (image - low) * field + low


def blur(image: jax.Array, sigma: jax.Array, radius: int) -> jax.Array:
  """Gaussian blur with a deviation of `sigma` [B] pixels along every axis, cut off at `radius` pixels.

  The border is mirrored about its pixels, as torchvision's gaussian_blur does with a kernel of 2 * radius + 1.
  """
  for axis, n in enumerate(image.shape[1:-1]):
    weights = _blur_weights(sigma, n, radius)
    along = lambda w, x, axis=axis: jnp.moveaxis(jnp.tensordot(w, x, axes=(1, axis)), 0, axis)
    image = jax.vmap(along)(weights, image)
  return image


def _blur_weights(sigma: jax.Array, n: int, radius: int) -> jax.Array:
  """Matrices [B, n, n] of a blur along an axis: each pixel counts itself and its images in the two mirrors."""
  i, j = jnp.arange(n)[:, None], jnp.arange(n)
  tap = lambda d: jnp.where(abs(d) <= radius, jnp.exp(-0.5 * jnp.square(d / sigma[:, None, None])), 0.0)
  weights = tap(i - j) + jnp.where(j > 0, tap(i + j), 0.0) + jnp.where(j < n - 1, tap(2 * (n - 1) - i - j), 0.0)
  return weights / weights.sum(axis=-1, keepdims=True)


def random_blur(rng: jax.Array, image: jax.Array, largest: float) -> jax.Array:
  """`blur` with one sigma a sample, uniform between 0.1 (or `largest`, if smaller) and `largest` pixels."""
  sigma = jax.random.uniform(rng, image.shape[:1], minval=min(0.1, largest), maxval=largest)
  return blur(image, sigma, math.ceil(4 * largest))


def solarize(image: jax.Array) -> jax.Array:
  """Inverts the values above the middle of each channel's range."""
  low, high = _range(image)
  return jnp.where(image > (low + high) / 2, low + high - image, image)


def sometimes(rng: jax.Array, image: jax.Array, probability: jax.Array | float,
              change: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
  """change(key, image) for a share `probability` of the samples."""
  key, draw_key = jax.random.split(rng)
  return select(chosen(draw_key, probability, len(image)), change(key, image), image)


def _standardized(x: jax.Array, within: jax.Array | None = None) -> jax.Array:
  where = None if within is None else within[..., None]
  mean = lambda y: jnp.mean(y, axis=_grid_axes(y), keepdims=True, where=where)
  centred = x - mean(x)
  return centred / jnp.maximum(jnp.sqrt(mean(jnp.square(centred))), 1e-6)


def _grid_axes(x: jax.Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim - 1))


def _range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Minimum and maximum of each channel, [B, 1.., C]."""
  return x.min(axis=_grid_axes(x), keepdims=True), x.max(axis=_grid_axes(x), keepdims=True)


def _spread(value: jax.Array, x: jax.Array) -> jax.Array:
  """[B, C] -> [B, 1.., C], to go with x."""
  return value.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
