"""Rotations in the plane of the last two axes, for images of any rank."""

import jax
import jax.numpy as jnp


def quarter_turns(image: jax.Array, turns: jax.Array) -> jax.Array:
  """Turns samples [B, *grid, C], whose last two axes are equal, counterclockwise by `turns` [B] int quarters."""
  turns = turns.reshape(-1, *[1] * (image.ndim - 1)) % 4
  image = jnp.where(turns % 2 == 1, jnp.swapaxes(image, -3, -2), image)
  image = jnp.where((turns == 1) | (turns == 2), jnp.flip(image, -3), image)
  return jnp.where((turns == 2) | (turns == 3), jnp.flip(image, -2), image)


def random_quarter_turns(rng: jax.Array, image: jax.Array, probability: jax.Array | float) -> jax.Array:
  """One, two or three quarter turns, equally likely, with `probability` (MONAI RandRotate90); no turn otherwise."""
  turn_key, count_key = jax.random.split(rng)
  turn = jax.random.bernoulli(turn_key, probability, image.shape[:1])
  return quarter_turns(image, turn * jax.random.randint(count_key, image.shape[:1], 1, 4))


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
  """Rotates samples [B, *grid, C] counterclockwise about the centre by `degrees` [B].

  Bilinear; what comes from outside repeats the border. Angles are true where pixels are square.
  """
  height, width = image.shape[-3:-1]
  angle = jnp.deg2rad(degrees)[:, None, None]
  y = jnp.arange(height)[:, None] - (height - 1) / 2
  x = jnp.arange(width) - (width - 1) / 2
  source = lambda p, n: jnp.clip(p + (n - 1) / 2, 0, n - 1)
  rows = source(jnp.sin(angle) * x + jnp.cos(angle) * y, height)  # [B, H, W]
  columns = source(jnp.cos(angle) * x - jnp.sin(angle) * y, width)
  return jax.vmap(_bilinear)(image, rows, columns)


def random_rotation(rng: jax.Array, image: jax.Array, degrees: float) -> jax.Array:
  """`rotate` by an angle uniform in +- degrees, one a sample."""
  return rotate(image, jax.random.uniform(rng, image.shape[:1], minval=-degrees, maxval=degrees))


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
