"""Block masks: what every mask must satisfy, and the distribution beside a plain restatement of the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment.masks import block_masks, scattered_masks, spread_counts

masks = functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))(block_masks)


def reference_mask(rng, count, grid, smallest, largest):
  """One mask of the official generators' distribution, by plain loops, and how many blocks were proposed."""
  height, width = grid
  mask, done, proposed = np.zeros(grid, bool), 0, 0
  while done < count:
    missing = min(count - done, largest)
    for _ in range(10):
      proposed += 1
      area, ratio = rng.uniform(*sorted((smallest, missing))), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
      h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
      if h >= height or w >= width:
        continue
      top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
      new = h * w - mask[top : top + h, left : left + w].sum()
      if 0 < new <= missing:
        mask[top : top + h, left : left + w] = True
        done += new
        break
    else:
      break
  return mask, proposed


@pytest.mark.parametrize('grid, count, smallest, largest', [
    ((14, 14), 60, 4, 98), ((14, 14), 30, 16, 1e9), ((7, 7), 20, 4, 24), ((4, 6), 5, 4, 12)])
def test_distribution_is_the_official_generators(grid, count, smallest, largest):
  rng = np.random.default_rng(0)
  want, proposed = zip(*(reference_mask(rng, count, grid, smallest, largest) for _ in range(1500)), strict=True)
  want = np.stack(want)
  got = np.asarray(masks(jax.random.key(1), jnp.full(6000, count), grid, smallest, largest)).reshape(-1, *grid)
  assert np.mean(np.array(proposed) > 64) < 0.01  # the bound on proposals hardly ever matters
  error = lambda x: x.std() * np.sqrt(1 / 1500 + 1 / 6000)
  size = want.sum((1, 2))
  assert abs(got.sum((1, 2)).mean() - size.mean()) < 4 * error(size) + 0.01
  touching = lambda m: (m[:, 1:] & m[:, :-1]).sum((1, 2)) - (m[:, :, 1:] & m[:, :, :-1]).sum((1, 2))
  neighbours = lambda m: (m[:, 1:] & m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] & m[:, :, :-1]).sum((1, 2))
  for statistic in (touching, neighbours):  # the blocks' direction and compactness
    assert abs(statistic(got).mean() - statistic(want).mean()) < 4 * error(statistic(want)), statistic(want).mean()
  place = want.mean(0)
  bound = 5 * np.sqrt(place * (1 - place) * (1 / 1500 + 1 / 6000)) + 1e-3
  assert (np.abs(got.mean(0) - place) < bound).all()  # where in the image


@pytest.mark.parametrize('grid', [(14, 14), (4, 4), (2, 2), (1, 8), (6, 6, 6), (2, 14, 14), (1, 7, 7), (12, 3, 5)])
def test_every_mask_keeps_its_count(grid):
  patches = int(np.prod(grid))
  count = jnp.linspace(0, patches / 2, 64).astype(jnp.int32)
  got = np.asarray(masks(jax.random.key(2), count, grid, 4.0, patches / 2))
  assert got.shape == (64, patches) and got.dtype == bool
  size = got.sum(1)
  assert (size <= np.asarray(count)).all() and size[0] == 0
  least = 0.8 if patches > 8 else 0.5  # in the smallest grids most proposals do not fit
  assert size.sum() > least * np.asarray(count).sum(), (size.sum(), count.sum())


def test_a_lone_block_of_a_volume_is_a_box_of_the_asked_shape():
  """With one attempt a mask is one block: all its patches, in each axis, are consecutive."""
  grid = (8, 10, 12)
  got = np.asarray(masks(jax.random.key(3), jnp.full(400, 100), grid, 20.0, 0.0, 1)).reshape(-1, *grid)
  sizes = []
  for mask in got[got.any((1, 2, 3))]:
    sides = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    assert all(np.ptp(s) + 1 == len(s) for s in sides)
    assert mask.sum() == np.prod([len(s) for s in sides])
    sizes.append([len(s) for s in sides])
  volume = np.prod(sizes, axis=1)
  assert volume.min() >= 8 and volume.max() <= 100 and 40 < volume.mean() < 75
  depth = np.array(sizes)[:, 0] / np.sqrt(np.prod(np.array(sizes)[:, 1:], axis=1))
  assert abs(np.log(depth).mean()) < 0.2 and depth.min() < 0.5 and depth.max() > 2


def test_keys_differ_and_repeat():
  draw = lambda seed: np.asarray(masks(jax.random.key(seed), jnp.full(8, 40), (14, 14)))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any() and len({m.tobytes() for m in draw(0)}) == 8


def test_fractional_count_is_never_exceeded():
  got = np.asarray(masks(jax.random.key(4), jnp.full(200, 20.7), (14, 14), 16.0)).sum(1)
  assert got.max() == 20


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('crops, probability', [(16, 0.5), (2, 0.5), (1, 0.5), (7, 0.5), (6, 1.0)])
def test_counts_come_from_one_bin_each(crops, probability, exact):
  patches, low, high = 196, 0.1, 0.5
  number = int(crops * probability)
  edges = np.linspace(low, high, number + 1)
  counts = jax.jit(spread_counts, static_argnums=(1, 2, 3, 4, 5))
  rows = [np.asarray(counts(jax.random.key(s), crops, patches, probability, (low, high), exact)) for s in range(8)]
  for row in rows:
    assert row.shape == (crops,) and (row > 0).sum() == number
    chosen = np.sort(row[row > 0])
    assert (chosen >= np.floor(patches * edges[:-1])).all() and (chosen <= np.floor(patches * edges[1:] + 1e-4)).all()
    if exact:
      np.testing.assert_array_equal(chosen, np.floor(patches * edges[1:] + 1e-4))
  if crops > 2:
    assert len({tuple(row > 0) for row in rows}) > 1 or number == crops  # which crops is random


def test_scattered_masks_have_their_counts_anywhere():
  count = jnp.asarray([0, 5, 27] * 200)
  found = np.asarray(scattered_masks(jax.random.key(0), count, 27))
  np.testing.assert_array_equal(found.sum(axis=1), count)
  assert np.abs(found[1::3].mean(axis=0) - 5 / 27).max() < 0.12
