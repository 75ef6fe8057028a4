"""Corruption of maps of classes slice by slice, for a denoising autoencoder of labels.

The numbers are those of adigasu/Anatomically-aware_Uncertainty_for_Semi-supervised_Segmentation,
code_DAE/dataloaders/medical_dataloader.py:RandomCorrupt. Classes are taken as grey levels, as there: erosion lets the
lower class win. What lies beyond a slice counts nowhere.
"""

import jax
import jax.numpy as jnp
import numpy as np

SWAP_SIZES, SWAP_SHARE = (3, 8), 0.1  # pixels that a swap reaches over; share of the border that is swapped each way
DISKS = (1, 4)  # radius of the disk of erosion, dilation, opening and closing
WAYS = ((1, -1), (1, 1), (0, 1), (0, -1))  # axis and direction of the swaps, one after the other


def corrupted(rng: jax.Array, classes: jax.Array, probability: float) -> jax.Array:
  """Classes [B, *size] int, each slice of the last two axes changed in two ways, each with this probability.

  First pixels of the border swap places with others 3 to 8 pixels away: each of the four ways a tenth of them, drawn
  by themselves (there exactly a tenth, drawn with replacement). Then the slice is eroded, dilated, opened or closed.
  """
  keys = jax.random.split(rng, 4)
  x = classes.reshape(-1, *classes.shape[-2:])
  swaps, morphs = (jax.random.bernoulli(key, probability, (len(x), 1, 1)) for key in keys[:2])
  x = jnp.where(swaps, _swapped(keys[2], x), x)
  return jnp.where(morphs, _morphed(keys[3], x), x).reshape(classes.shape)


def extreme(x: jax.Array, radius: jax.Array, most: int, sign: jax.Array) -> jax.Array:
  """The largest (sign 1) or smallest (-1) value within a disk around each pixel of slices [S, H, W] int.

  radius, sign: [S] int, the first at most `most`; a disk has the pixels whose squared distance is at most radius^2.
  """
  square = np.stack(np.meshgrid(*[np.arange(-most, most + 1)] * 2, indexing='ij'), axis=-1).reshape(-1, 2)
  steps = jnp.asarray(square[(square**2).sum(axis=1) <= most**2])
  x, around = x * sign[:, None, None], jnp.square(radius)[:, None, None]
  beyond = jnp.pad(x, ((0, 0), (most, most), (most, most)), constant_values=jnp.iinfo(x.dtype).min)

  def larger(i, found):
    at = steps[i]
    moved = jax.lax.dynamic_slice(beyond, (0, at[0] + most, at[1] + most), x.shape)
    return jnp.where(jnp.square(at).sum() <= around, jnp.maximum(found, moved), found)

  return jax.lax.fori_loop(0, len(steps), larger, x) * sign[:, None, None]


def swap(x: jax.Array, chosen: jax.Array, reach: jax.Array, axis: int) -> jax.Array:
  """Slices [S, H, W] whose `chosen` pixels, bool, swap values with those `reach` [S] pixels further.

  axis: of a slice, 0 or 1. Beyond the end lies the beginning. Where a pixel is chosen and another one reaches it, its
  own swap counts.
  """
  move = jax.vmap(lambda a, n: jnp.roll(a, n, axis))
  there = jnp.where(move(chosen, reach), move(x, reach), x)
  return jnp.where(chosen, move(x, -reach), there)


def _swapped(rng: jax.Array, x: jax.Array) -> jax.Array:
  keys = jax.random.split(rng, 5)
  reach = jax.random.randint(keys[0], x.shape[:1], SWAP_SIZES[0], SWAP_SIZES[1] + 1)
  border = x > extreme(x, reach, SWAP_SIZES[1], -jnp.ones_like(reach))
  for axis in (1, 2):
    along = jnp.arange(x.shape[axis]) + reach[:, None] < x.shape[axis]
    border &= jnp.expand_dims(along, 3 - axis)
  for key, (axis, sign) in zip(keys[1:], WAYS, strict=True):
    x = swap(x, border & jax.random.bernoulli(key, SWAP_SHARE, x.shape), sign * reach, axis)
  return x


def _morphed(rng: jax.Array, x: jax.Array) -> jax.Array:
  radius_key, kind_key = jax.random.split(rng)
  radius = jax.random.randint(radius_key, x.shape[:1], DISKS[0], DISKS[1] + 1)
  kind = jax.random.randint(kind_key, x.shape[:1], 0, 4)  # erosion, dilation, opening, closing
  sign = 2 * (kind % 2) - 1
  once = extreme(x, radius, DISKS[1], sign)
  return jnp.where((kind >= 2)[:, None, None], extreme(once, radius, DISKS[1], -sign), once)
