"""Corruptions that a network is trained to undo: boxes of noise, shuffled pixels, curves of intensity.

Images are normalised [B, *grid, C] float32 of any rank, finite everywhere; `there` [B, *grid, C] bool says which of
their pixels exist. What does not exist stays as it is and counts in no range. Boxes are whole pixels of the array.
"""

import math

import jax
import jax.numpy as jnp

SHIFT = 3  # pixels between painted boxes and the border (Models Genesis)
HALVINGS = 24  # of the parameter of a curve: all bits of a float32


def value_range(image: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Smallest and largest value of each channel of a sample, [B, 1.., C]; 0 and 0 of a channel that is not there."""
  axes, some = tuple(range(1, image.ndim - 1)), there.any(axis=tuple(range(1, image.ndim - 1)), keepdims=True)
  bound = lambda fill, reduce: jnp.where(some, reduce(jnp.where(there, image, fill), axis=axes, keepdims=True), 0)
  return bound(jnp.inf, jnp.min), bound(-jnp.inf, jnp.max)


def random_sides(rng: jax.Array, shape: tuple[int, int], low: tuple[int, ...], high: tuple[int, ...]) -> jax.Array:
  """Sides of boxes [B, M, rank], each uniform in low .. high of its axis, both included and at least 1."""
  least = [max(n, 1) for n in low]
  most = [max(n, m) for n, m in zip(high, least, strict=True)]
  return jax.random.randint(rng, (*shape, len(low)), jnp.asarray(least), jnp.asarray(most) + 1)


def union(start: jax.Array, end: jax.Array, used: jax.Array, grid: tuple[int, ...]) -> jax.Array:
  """The pixels [B, *grid] bool in any of the boxes start .. end [B, M, rank] that are `used` [B, M]."""
  along = [_along(start, end, axis, n).astype(jnp.float32) for axis, n in enumerate(grid)]
  letters = 'xyz'[: len(grid)]
  terms = ','.join(f'bm{letter}' for letter in letters)
  return jnp.einsum(f'bm,{terms}->b{letters}', used.astype(jnp.float32), *along) > 0.5


def painted(value: jax.Array, start: jax.Array, end: jax.Array, grid: tuple[int, ...]) -> jax.Array:
  """Integers [B, *grid]: the value [B, M] of the last box start .. end [B, M, rank] that holds a pixel, 0 for none."""
  def paint(canvas, box):
    value, start, end = box
    inside, spread = jnp.ones(canvas.shape, bool), lambda x: x.reshape(-1, *[1] * len(grid))
    for axis, n in enumerate(grid):
      place = jnp.arange(n).reshape([-1 if a == axis else 1 for a in range(len(grid))])
      inside &= (place >= spread(start[:, axis])) & (place < spread(end[:, axis]))
    return jnp.where(inside, spread(value), canvas), None

  boxes = (jnp.moveaxis(x, 1, 0) for x in (value, start, end))
  return jax.lax.scan(paint, jnp.zeros((len(value), *grid), value.dtype), tuple(boxes))[0]


def cut_out(rng: jax.Array, count: int, grid: tuple[int, ...], most: float = 0.3,
            sides: tuple[float, float] = (0.05, 0.25), boxes: int = 256) -> jax.Array:
  """Pixels [B, *grid] bool in boxes that add up to a share of the array that is uniform in 0 .. most.

  Project-MONAI/research-contributions, SwinUNETR/Pretrain/utils/ops.py:patch_rand_drop. Boxes come until their pixels
  reach that share, each counted as often as it lies in one: fewer are covered, and the last box may exceed the share.
  A box starts uniformly, its sides are uniform between the shares `sides` of each axis, and the border cuts it.

  Args:
    boxes: most of them; a share of 0.3 of a volume takes some 140.
  """
  keys = jax.random.split(rng, 3)
  low, high = (tuple(int(share * n) for n in grid) for share in sides)
  size = jnp.asarray(grid)
  start = jax.random.randint(keys[0], (count, boxes, len(grid)), 0, size - jnp.asarray(low))
  end = jnp.minimum(start + random_sides(keys[1], (count, boxes), low, tuple(n - 1 for n in high)), size)
  volume = jnp.prod((end - start).astype(jnp.float32), axis=-1)  # [B, M]
  before = jnp.cumsum(volume, axis=1) - volume
  wanted = jax.random.uniform(keys[2], (count, 1), maxval=most) * math.prod(grid)
  return union(start, end, before < wanted, grid)


def noise_like(rng: jax.Array, image: jax.Array, there: jax.Array, law: str = 'normal') -> jax.Array:
  """Noise [B, *grid, C] over the range of each channel: 'uniform', or 'normal' about its middle.

  The deviation of normal noise is a seventh of the range, at whose ends it is cut. A block of 10^3 to 24^3 numbers that
  is scaled to the range by its own extremes, as published for Swin UNETR, has a sixth to an eighth.
  """
  low, high = value_range(image, there)
  if law == 'uniform':
    return low + (high - low) * jax.random.uniform(rng, image.shape)
  return jnp.clip((low + high) / 2 + (high - low) / 7 * jax.random.normal(rng, image.shape), low, high)


def bezier(image: jax.Array, there: jax.Array, points: jax.Array, falling: jax.Array) -> jax.Array:
  """Each channel by a curve from the corners of its range to each other (Zhou et al. 2021, Models Genesis).

  The cubic Bezier curve from (0, 0) to (1, 1) of the range, which neither coordinate ever leaves or turns on; a falling
  one goes from (0, 1) to (1, 0). MrGiovanni/ModelsGenesis, pytorch/utils.py:nonlinear_transformation, which reads it
  from a table.

  Args:
    points: [B, C, 2, 2], the two inner control points (x, y) in 0 .. 1. falling: [B, C] bool.
  """
  low, high = value_range(image, there)
  span = jnp.maximum(high - low, 1e-6)
  x = jnp.clip((image - low) / span, 0, 1)
  first, second = (points[:, :, i].reshape(len(image), *[1] * (image.ndim - 2), image.shape[-1], 2) for i in range(2))
  curve = lambda s, axis: s * (3 * (1 - s) * ((1 - s) * first[..., axis] + s * second[..., axis]) + s * s)

  def halve(_, bounds):
    below, above = bounds
    middle = (below + above) / 2
    left = curve(middle, 0) >= x
    return jnp.where(left, below, middle), jnp.where(left, middle, above)

  s = sum(jax.lax.fori_loop(0, HALVINGS, halve, (jnp.zeros_like(x), jnp.ones_like(x)))) / 2
  s = jnp.where(falling.reshape(first.shape[:-1]), 1 - s, s)
  return jnp.where(there, low + span * curve(s, 1), image)


def random_bezier(rng: jax.Array, image: jax.Array, there: jax.Array) -> jax.Array:
  """`bezier` with uniform control points for each channel of a sample, falling half of the time."""
  keys, shape = jax.random.split(rng), (image.shape[0], image.shape[-1])
  return bezier(image, there, jax.random.uniform(keys[0], (*shape, 2, 2)), jax.random.bernoulli(keys[1], 0.5, shape))


def shuffle_locally(rng: jax.Array, image: jax.Array, there: jax.Array, largest: float = 0.1) -> jax.Array:
  """Pixels of small windows in a random order, all channels alike (Models Genesis, local pixel shuffling).

  Windows tile the array, their sides along an axis uniform in 1 .. largest * n. Published are 10,000 windows of such
  sides that overlap, each filled from the image as it was: they miss 15 to 22 % of the pixels of cubes of 64 x 64 x 32
  to 160^3, and some values come twice. Here each window keeps its values. Pixels in no image keep their place.
  """
  count, grid = len(image), image.shape[1:-1]
  window = jnp.zeros((count, *grid), jnp.int32)
  keys = jax.random.split(rng, len(grid) + 1)
  for axis, n in enumerate(grid):
    sides = random_sides(keys[axis], (count, n), (1,), (int(largest * n),))[..., 0]
    index = jax.vmap(lambda end, n=n: jnp.searchsorted(end, jnp.arange(n), side='right'))(jnp.cumsum(sides, axis=1))
    window = window * n + index.reshape(count, *[n if a == axis else 1 for a in range(len(grid))])
  window = (2 * window + there.any(axis=-1)).reshape(count, -1)
  place = jnp.broadcast_to(jnp.arange(window.shape[1]), window.shape)
  noise = jax.random.uniform(keys[-1], window.shape)
  into = jax.lax.sort((window, place), dimension=1, num_keys=1, is_stable=True)[1]
  source = jax.lax.sort((window, noise, place), dimension=1, num_keys=2)[2]
  moved = lambda x, into, source: x.at[into].set(x[source])
  flat = image.reshape(count, -1, image.shape[-1])
  return jnp.where(there, jax.vmap(moved)(flat, into, source).reshape(image.shape), image)


def paint_in(rng: jax.Array, image: jax.Array, there: jax.Array) -> jax.Array:
  """Up to five boxes, with sides of a sixth to a third of the image, become uniform noise (Models Genesis)."""
  return paint(rng, image, there, [(n // 6, n // 3) for n in image.shape[1:-1]])


def paint_out(rng: jax.Array, image: jax.Array, there: jax.Array) -> jax.Array:
  """All becomes uniform noise but one to five boxes, with sides of three to four sevenths of the image."""
  return paint(rng, image, there, [(n - 4 * n // 7, n - 3 * n // 7) for n in image.shape[1:-1]], 1, False)


def paint(rng: jax.Array, image: jax.Array, there: jax.Array, sides: list[tuple[int, int]], least: int = 0,
          inside: bool = True, most: int = 5, again: float = 0.95) -> jax.Array:
  """Uniform noise inside or outside of boxes: `least` of them, then each with probability `again` after the one before.

  Args:
    sides: least and most pixels of a box along each axis. most: boxes of a sample.
  """
  keys, count, grid = jax.random.split(rng, 4), len(image), image.shape[1:-1]
  low, high = zip(*sides, strict=True)
  side = random_sides(keys[0], (count, most), low, high)
  room = jnp.asarray(grid) - side
  border = jnp.minimum(SHIFT, room // 2)
  start = jax.random.randint(keys[1], side.shape, border, room - border + 1)
  more = jax.random.bernoulli(keys[2], again, (count, most)) | (jnp.arange(most) < least)
  boxes = union(start, start + side, jnp.cumprod(more, axis=1) > 0, grid)[..., None]
  return jnp.where(there & (boxes if inside else ~boxes), noise_like(keys[3], image, there, 'uniform'), image)


def _along(start: jax.Array, end: jax.Array, axis: int, n: int) -> jax.Array:
  """[B, M, n] bool: places of an axis between the ends of each box."""
  place = jnp.arange(n)
  return (place >= start[..., axis, None]) & (place < end[..., axis, None])
