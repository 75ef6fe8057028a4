"""From stored numbers to what an encoder sees, and small changes of intensity that suit any modality."""

import jax
import jax.numpy as jnp

NORMALIZE = ('corpus', 'image', 'none')


def normalize(image: jax.Array, channels: jax.Array, mean: jax.Array, std: jax.Array, mode: str) -> jax.Array:
  """Normalises native intensities, channel by channel.

  Args:
    image: [B, *grid, C] of any number type.
    channels: [B, C] int, rows of `mean` and `std` [V] in native units.
    mode: 'corpus' (x - mean) / std with the table, 'image' with each image's own mean and deviation, 'none'.
  Returns:
    [B, *grid, C] float32.
  """
  x = image.astype(jnp.float32)
  if mode == 'none':
    return x
  axes = tuple(range(1, x.ndim - 1))
  if mode == 'image':
    centred = x - x.mean(axis=axes, keepdims=True)
    return centred / jnp.maximum(jnp.sqrt(jnp.square(centred).mean(axis=axes, keepdims=True)), 1e-6)
  shape = (x.shape[0], *[1] * len(axes), x.shape[-1])
  return (x - mean[channels].reshape(shape)) / jnp.maximum(std[channels], 1e-6).reshape(shape)


def jitter(rng: jax.Array, image: jax.Array, brightness: float, contrast: float, noise: float) -> jax.Array:
  """Changes normalised images [B, *grid, C], each channel of each sample by its own draw.

  contrast: factor in 1 +- contrast about the channel's mean; brightness: shift in +- brightness; noise: standard
  deviation of the Gaussian noise that is added. Zero leaves that part out.
  """
  keys = jax.random.split(rng, 3)
  shape = (image.shape[0], *[1] * (image.ndim - 2), image.shape[-1])
  if contrast:
    factor = jax.random.uniform(keys[0], shape, minval=1 - contrast, maxval=1 + contrast)
    mean = image.mean(axis=tuple(range(1, image.ndim - 1)), keepdims=True)
    image = (image - mean) * factor + mean
  if brightness:
    image = image + jax.random.uniform(keys[1], shape, minval=-brightness, maxval=brightness)
  if noise:
    image = image + noise * jax.random.normal(keys[2], image.shape)
  return image
