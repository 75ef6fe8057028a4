"""Antialiased resampling of a box of an image, with a box that may differ from sample to sample."""

import jax
import jax.numpy as jnp


def box_weights(start: jax.Array, length: jax.Array, n_in: int, n_out: int, own: jax.Array | None = None) -> jax.Array:
  """Matrix [n_out, n_in] that resamples the pixels [start, start + length) of an axis to n_out.

  With `own`, an integer, to so many, and zero after them.

  Antialiased bicubic (Keys' kernel with a = -0.5, stretched when shrinking); pixels outside of the box are not
  read, so it equals cropping first and then calling Pillow's or torch's antialiased bicubic resize.
  """
  scale = length / (n_out if own is None else own)
  stretch = jnp.maximum(scale, 1.0)
  centre = (jnp.arange(n_out) + 0.5) * scale - 0.5 + start
  pixel = jnp.arange(n_in)
  t = jnp.abs(pixel[None] - centre[:, None]) / stretch
  near = (1.5 * t - 2.5) * t * t + 1
  far = ((-0.5 * t + 2.5) * t - 4) * t + 2
  weights = jnp.where(t <= 1, near, jnp.where(t < 2, far, 0.0))
  weights = jnp.where((pixel >= start) & (pixel < start + length), weights, 0.0)
  if own is None:
    return weights / weights.sum(axis=1, keepdims=True)
  within = (jnp.arange(n_out) < own)[:, None]
  return jnp.where(within, weights / jnp.where(within, weights.sum(axis=1, keepdims=True), 1.0), 0.0)


def crop_resize(image: jax.Array, start: jax.Array, length: jax.Array, size: tuple[int, ...],
                own: jax.Array | None = None) -> jax.Array:
  """Crops the box (start, length), both [rank], out of image [*grid, C] and resizes it to [*size, C]; float32.

  With `own` [rank] it is resized to that, in the corner of [*size, C], which is zero elsewhere.
  """
  x = image.astype(jnp.float32)
  for axis, n_out in enumerate(size):
    weights = box_weights(start[axis], length[axis], x.shape[axis], n_out, None if own is None else own[axis])
    x = jnp.moveaxis(jnp.tensordot(weights, x, axes=(1, axis)), 0, axis)
  return x
