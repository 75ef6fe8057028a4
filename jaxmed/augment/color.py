"""Changes of colour where a sample has red, green and blue among its channels; other channels stay as they are.

They work on planes [3, B, *grid] in the stored range: 0 .. 1 is zero to the top of the stored type.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Optical density of red, green and blue by haematoxylin, eosin and DAB (Ruifrok and Johnston 2001).
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DARKEST = 1 / 255  # least light, so that its optical density is finite


def rgb_ids(names: Sequence[str]) -> tuple[int, ...]:
  """Ids of R, G and B in a vocabulary, as `ViewMaker.rgb` takes them; () without these channels.

  'R', 'G', 'B' or 'red', 'green', 'blue' in any case, with the same prefix that ends in ':', '/' or '_' or with none
  ('fundus:R'). Three for each prefix that has all, in the order of the vocabulary.
  """
  found: dict[str, dict[str, int]] = {}
  for i, name in enumerate(names):
    name = name.strip().lower()
    last = re.split('[:/_]', name)[-1]
    if last in ('r', 'g', 'b', 'red', 'green', 'blue'):
      found.setdefault(name.removesuffix(last), {})[last[0]] = i
  return tuple(ids[c] for ids in found.values() if len(ids) == 3 for c in 'rgb')


def rgb_slots(channels: jax.Array, there: jax.Array, rgb: tuple[int, ...]) -> jax.Array:
  """[B, 3, C] bool: where red, green and blue are among the channels; all False for samples without the three.

  channels: [B, C] ids; there: [B, C] bool; rgb: the ids of red, green and blue.
  """
  slots = (channels[:, None] == jnp.asarray(rgb)[:, None]) & there[:, None]
  return slots & slots.any(axis=2).all(axis=1)[:, None, None]


def change_rgb(image: jax.Array, slots: jax.Array, scale: jax.Array, offset: jax.Array,
               change: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Applies `change` to red, green and blue in the stored range.

  Args:
    image: [B, *grid, C] normalised; times `scale` plus `offset`, both [B, C], it is in the stored range.
    slots: [B, 3, C] of `rgb_slots`; what is in other slots may be anything, even NaN.
    change: [3, B, *grid] -> [3, B, *grid].
  """
  wide = lambda x: x.reshape(x.shape[0], *[1] * (image.ndim - 2), *x.shape[1:])
  slots, scale, offset = wide(slots), wide(scale), wide(offset)  # [B, 1.., 3, C], [B, 1.., C]
  stored = image * scale + offset
  rgb = jnp.stack([jnp.where(slots[..., k, :], stored, 0.0).sum(axis=-1) for k in range(3)])
  new = change(rgb)
  value = sum(jnp.where(slots[..., k, :], new[k][..., None], 0.0) for k in range(3))
  return jnp.where(slots.any(axis=-2), (value - offset) / scale, image)


def gray(rgb: jax.Array) -> jax.Array:
  """Luma [B, *grid]."""
  return GRAY[0] * rgb[0] + GRAY[1] * rgb[1] + GRAY[2] * rgb[2]


def grayscale(rgb: jax.Array) -> jax.Array:
  """All three become the luma."""
  return jnp.broadcast_to(gray(rgb), rgb.shape)


def saturate(rgb: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with gray: 0 is gray, 1 the image; cut to 0 .. 1 (torchvision adjust_saturation). factor: [B]."""
  share = factor.reshape(-1, *[1] * (rgb.ndim - 2))
  return jnp.clip(rgb * share + gray(rgb) * (1 - share), 0, 1)


def turn_hue(rgb: jax.Array, shift: jax.Array) -> jax.Array:
  """Turns the hue by `shift` [B] of a full circle; HSV's value and saturation stay (torchvision adjust_hue)."""
  red, green, blue = rgb
  value = rgb.max(axis=0)
  chroma = value - rgb.min(axis=0)
  over = 1 / jnp.where(chroma > 0, chroma, 1.0)
  hue = jnp.where(value == red, (green - blue) * over,
                  jnp.where(value == green, 2 + (blue - red) * over, 4 + (red - green) * over))  # sixths of the circle
  hue = hue + 6 * shift.reshape(-1, *[1] * (hue.ndim - 1))
  place = [n + hue - 6 * jnp.floor((n + hue) / 6) for n in (5, 3, 1)]
  return jnp.stack([value - chroma * jnp.clip(jnp.minimum(p, 4 - p), 0, 1) for p in place])


def jitter(rng: jax.Array, rgb: jax.Array, saturation: float, hue: float, where: jax.Array) -> jax.Array:
  """Saturation by a factor in 1 +- saturation, then hue by +- hue of a circle, one a sample, where `where` [B]."""
  keys, old = jax.random.split(rng), rgb
  draw = lambda key, low, high: jax.random.uniform(key, where.shape, minval=low, maxval=high)
  if saturation:
    rgb = saturate(rgb, draw(keys[0], max(0.0, 1 - saturation), 1 + saturation))
  if hue:
    rgb = turn_hue(jnp.clip(rgb, 0, 1), draw(keys[1], -hue, hue))
  return jnp.where(where.reshape(-1, *[1] * (rgb.ndim - 2)), rgb, old)


def stain(rgb: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
  """Changes the amount of each stain, haematoxylin, eosin and DAB: amount * factor + shift, both [B, 3].

  Amounts are what the optical density -log10(rgb) is a mixture of (Ruifrok and Johnston 2001). The result is cut to
  0 .. 1.
  """
  density = -jnp.log(jnp.clip(rgb, DARKEST, 1)) / math.log(10)
  # density -> amounts -> changed amounts -> density, as one product with a matrix of each sample
  matrix = jnp.einsum('rs,bs,sk->rkb', np.linalg.inv(HED), factor, HED)
  move = (shift @ HED).T  # [3, B]
  wide = lambda x: x.reshape(-1, *[1] * (rgb.ndim - 2))
  new = [sum(density[r] * wide(matrix[r, k]) for r in range(3)) + wide(move[k]) for k in range(3)]
  return jnp.clip(jnp.exp(-math.log(10) * jnp.stack(new)), 0, 1)


def jitter_stain(rng: jax.Array, rgb: jax.Array, strength: float) -> jax.Array:
  """`stain` with factors in 1 +- strength and shifts in +- strength, one a stain of a sample (Tellez et al. 2018).

  HED-light there is 0.05. Shifts count in optical density to base 10; the authors' code adds 2 to the intensities and
  takes natural logarithms (DIAGNijmegen/pathology-he-auto-augment, custom_hed_transform.py).
  """
  factor, shift = jax.random.uniform(rng, (2, rgb.shape[1], 3), minval=-strength, maxval=strength)
  return stain(rgb, 1 + factor, shift)
