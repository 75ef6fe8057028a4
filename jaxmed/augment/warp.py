"""Rotations in the plane of the last two axes, for images of any rank."""

import jax
import jax.numpy as jnp


def quarter_turns(image: jax.Array, turns: jax.Array) -> jax.Array:
  """Turns samples [B, *grid, C], whose last two axes are equal, counterclockwise by `turns` [B] int quarters."""
  turns = turns.reshape(-1, *[1] * (image.ndim - 1)) % 4
  image = jnp.where(turns % 2 == 1, jnp.swapaxes(image, -3, -2), image)
  image = jnp.where((turns == 1) | (turns == 2), jnp.flip(image, -3), image)
  return jnp.where((turns == 2) | (turns == 3), jnp.flip(image, -2), image)


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
  """Rotates samples [B, *grid, C] counterclockwise about the centre by `degrees` [B].

  Bilinear; what comes from outside repeats the border. Angles are true where pixels are square.
  """
  height, width = image.shape[-3:-1]
  rows, columns = _sources(height, width, degrees)
  return jax.vmap(_bilinear)(image, jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1))


def rotate_nearest(mask: jax.Array, degrees: jax.Array, outside: int) -> jax.Array:
  """Rotates integers [B, *grid] as `rotate` does: each pixel has the nearest value, or `outside` beyond the border."""
  height, width = mask.shape[-2:]
  rows, columns = (jnp.round(x).astype(jnp.int32) for x in _sources(height, width, degrees))
  within = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # [B, H, W]

  def one(x, place, within):
    flat = x.reshape(*x.shape[:-2], height * width)
    return jnp.where(within, jnp.take(flat, place, axis=-1, mode='clip'), outside)

  return jax.vmap(one)(mask, rows * width + columns, within)


def _sources(height: int, width: int, degrees: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rows and columns [B, H, W] that the pixels of a rotated plane come from; some lie outside of it."""
  angle = jnp.deg2rad(degrees)[:, None, None]
  y = jnp.arange(height)[:, None] - (height - 1) / 2
  x = jnp.arange(width) - (width - 1) / 2
  return (jnp.sin(angle) * x + jnp.cos(angle) * y + (height - 1) / 2,
          jnp.cos(angle) * x - jnp.sin(angle) * y + (width - 1) / 2)


def _bilinear(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Values of one image [..., H, W, C] at rows and columns [H, W] inside of the grid."""
  height, width, channels = image.shape[-3:]
  top, left = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
  bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
  flat = image.reshape(*image.shape[:-3], height * width, channels)
  at = lambda y, x: jnp.take(flat, y * width + x, axis=-2, mode='clip')  # [..., H, W, C]
  down, across = (rows - top)[..., None], (columns - left)[..., None]
  upper = at(top, left) * (1 - across) + at(top, right) * across
  lower = at(bottom, left) * (1 - across) + at(bottom, right) * across
  return upper * (1 - down) + lower * down
