"""Block masks over patch grids, drawn on the device with static shapes (BEiT, iBOT, DINOv2)."""

import math

import jax
import jax.numpy as jnp

TRIES = 10  # rejected blocks in a row after which a mask stays as it is
ASPECT = (0.3, 1 / 0.3)


def block_masks(rng: jax.Array, count: jax.Array, grid: tuple[int, ...], smallest: float = 4.0, largest: float = 0.0,
                attempts: int = 64) -> jax.Array:
  """Masks [B, prod(grid)] bool of random blocks, of at most `count` patches each.

  Blocks are proposed one after the other. The area is uniform between `smallest` and what is still missing, the ratio
  height / width log-uniform in 0.3 .. 1 / 0.3, the corner uniform. A block is taken if it is smaller than the grid
  along both axes, adds at least one patch and does not exceed what is missing. A mask is ready when it has `count`
  patches or after ten rejections in a row, so it often stays a little below; nothing fills it up
  (facebookresearch/dinov2, data/masking.py:MaskingGenerator; bytedance/ibot, loader.py, with its own `smallest`).

  Axes before the last two (depth or time) are not in the official codes: the block's extent along such an axis, over
  the geometric mean of the extents that follow, is log-uniform in the same range and cut to the grid.

  Args:
    count: [B], patches to mask; 0 for none. May be fractional, as iBOT's.
    grid: patches along each axis, two or more.
    smallest: least area of a proposed block, in patches (not of what it adds).
    largest: greatest area of a proposed block; 0 for no limit.
    attempts: most proposals a mask. The official loops have no such bound; few masks need more than 40.
  """
  count = jnp.asarray(count, jnp.float32)
  draws = jax.random.uniform(rng, (attempts, 2 * len(grid), count.shape[0]))

  def step(state, draw):
    mask, done, rejected = state  # [B, *grid] bool, [B] patches so far, [B] rejections in a row
    missing = jnp.minimum(count - done, largest or math.inf)
    area = smallest + (missing - smallest) * draw[0]
    block, size, fits = _blocks(draw[1:], area, grid)
    added = size - (mask & block).sum(axis=range(1, mask.ndim))
    take = fits & (added > 0) & (added <= missing) & (done < count) & (rejected < TRIES)
    mask = mask | (block & take.reshape(-1, *[1] * len(grid)))
    return (mask, done + added * take, jnp.where(take, 0, rejected + 1)), None

  start = (jnp.zeros((count.shape[0], *grid), bool), jnp.zeros_like(count), jnp.zeros(count.shape, jnp.int32))
  mask = jax.lax.scan(step, start, draws)[0][0]
  return mask.reshape(count.shape[0], -1)


def _blocks(draw: jax.Array, area: jax.Array, grid: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Random boxes of about `area` [B] patches: [B, *grid] bool, their sizes [B], whether each may be used [B].

  draw: [2 * rank - 1, B] uniform in 0 .. 1: rank - 1 ratios, then rank corners.
  """
  rank, low, high = len(grid), *map(math.log, ASPECT)
  ratios = jnp.exp(low + (high - low) * draw[: rank - 1])
  sides, rest = [], jnp.maximum(area, 0.0)
  for axis in range(rank - 2):
    left = rank - axis
    side = jnp.round(rest ** (1 / left) * ratios[axis] ** ((left - 1) / left))
    sides.append(jnp.clip(side, 1, grid[axis]))
    rest = rest / sides[-1]
  sides += [jnp.round(jnp.sqrt(rest * ratios[-1])), jnp.round(jnp.sqrt(rest / ratios[-1]))]
  box, fits = jnp.ones((area.shape[0], *[1] * rank), bool), jnp.ones(area.shape, bool)
  for axis, (side, n) in enumerate(zip(sides, grid, strict=True)):
    fits &= (side < n) | (n == 1) | (axis < rank - 2)
    corner = jnp.floor(draw[rank - 1 + axis] * (n - side + 1))
    place = jnp.arange(n) - corner[:, None]
    inside = (place >= 0) & (place < side[:, None])
    box &= inside.reshape(-1, *[n if i == axis else 1 for i in range(rank)])
  return box, jnp.stack(sides).prod(axis=0), fits


def scattered_masks(rng: jax.Array, count: jax.Array, patches: int) -> jax.Array:
  """Masks [B, patches] bool of `count` [B] patches each, any of them alike."""
  noise = jax.random.uniform(rng, (count.shape[0], patches))
  return jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < count[:, None]


def spread_counts(rng: jax.Array, crops: int, patches: int, probability: float, ratio: tuple[float, float],
                  exact: bool = False) -> jax.Array:
  """How many patches to mask in each crop, [crops] int32 (facebookresearch/dinov2, data/collate.py).

  A share `probability` of the crops is masked; of these, the i-th masks a share drawn from the i-th of equal bins of
  `ratio`, or with `exact` the bin's upper end (facebookresearch/dinov3, data/collate.py). Their order is random.
  """
  masked = int(crops * probability)
  edges = jnp.linspace(*ratio, masked + 1)
  draw_key, order_key = jax.random.split(rng)
  place = 1.0 if exact else jax.random.uniform(draw_key, (masked,))
  share = edges[:-1] + (edges[1:] - edges[:-1]) * place
  counts = jnp.zeros(crops, jnp.int32).at[:masked].set(jnp.floor(patches * share + 1e-4).astype(jnp.int32))
  return jax.random.permutation(order_key, counts)
