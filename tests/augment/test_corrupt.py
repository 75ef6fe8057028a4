"""Corruptions: turns, boxes, noise, curves and shuffled windows against plain NumPy; what does not exist stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment import corrupt, warp

RNG = np.random.default_rng(0)
GRID = (12, 15, 18)


def sample(grid=GRID, count=4, channels=2):
  """Images, of which the first lacks a channel and the last ends early."""
  there = np.ones((count, *grid, channels), bool)
  there[0, ..., 1] = False
  there[-1, grid[0] - 3 :] = False
  image = np.where(there, RNG.normal(size=there.shape) * 3 + 5, 0).astype(np.float32)
  return jnp.asarray(image), jnp.asarray(there)


def compiled(change):
  return jax.jit(change, static_argnames=('grid', 'count'))


@pytest.mark.parametrize('plane', [(-3, -2), (-4, -2), (-4, -3)])
def test_quarter_turns_in_any_plane_and_in_a_corner(plane):
  image = RNG.normal(size=(4, 5, 5, 5, 2)).astype(np.float32)
  sizes, turns = np.asarray([[5, 5, 5], [4, 2, 3], [2, 5, 3], [3, 4, 2]]), np.arange(4)
  whole = np.asarray(warp.quarter_turns(jnp.asarray(image), jnp.asarray(turns), plane))
  found, own = map(np.asarray, warp.quarter_turns_in_corner(jnp.asarray(image), jnp.asarray(sizes), jnp.asarray(turns), plane))
  for i in range(4):
    np.testing.assert_array_equal(whole[i], np.rot90(image[i], i, plane))
    cut = tuple(slice(n) for n in sizes[i])
    want = np.rot90(image[i][cut], i, plane)
    assert tuple(own[i]) == want.shape[:-1]
    np.testing.assert_array_equal(found[i][tuple(slice(n) for n in own[i])], want)


def test_boxes_are_painted_one_over_the_other():
  start = RNG.integers(0, 10, (3, 6, 3))
  end = np.minimum(start + RNG.integers(1, 7, start.shape), GRID)
  value, used = RNG.integers(1, 5, (3, 6)), RNG.random((3, 6)) < 0.6
  last, any_ = np.zeros((3, *GRID), int), np.zeros((3, *GRID), bool)
  for i, m in np.ndindex(3, 6):
    where = (i, *(slice(a, b) for a, b in zip(start[i, m], end[i, m])))
    last[where] = value[i, m]
    any_[where] |= used[i, m]
  np.testing.assert_array_equal(corrupt.painted(*map(jnp.asarray, (value, start, end)), GRID), last)
  np.testing.assert_array_equal(corrupt.union(*map(jnp.asarray, (start, end, used)), GRID), any_)


def test_cut_out_reaches_its_share():
  cut = compiled(corrupt.cut_out)
  shares = np.asarray(cut(jax.random.key(1), 64, (24, 24, 24))).mean(axis=(1, 2, 3))
  # The pixels of boxes sum to U(0, 0.3); at random places they cover 1 - exp(-share), less where they overlap.
  assert 0.09 < shares.mean() < 0.16 and shares.max() < 0.33 and shares.min() < 0.03
  assert not np.any(cut(jax.random.key(1), 4, (8, 8), most=0.0))
  one = np.asarray(corrupt.cut_out(jax.random.key(2), 32, (40, 20), most=0.9, boxes=1))
  for box in one:
    rows, columns = (np.flatnonzero(box.any(axis=a)) for a in (1, 0))
    assert box.sum() == len(rows) * len(columns) and len(rows) <= 9 and len(columns) <= 4  # int(share * n) - 1


def test_noise_has_the_range_of_its_channel():
  image, there = sample()
  low, high = map(np.asarray, corrupt.value_range(image, there))
  own = np.asarray(image)[-1, : GRID[0] - 3]
  np.testing.assert_array_equal(low[-1, 0, 0, 0], own.min(axis=(0, 1, 2)))
  np.testing.assert_array_equal(high[-1, 0, 0, 0], own.max(axis=(0, 1, 2)))
  assert low[0, ..., 1] == high[0, ..., 1] == 0
  for law, deviation in (('normal', 1 / 7), ('uniform', 12**-0.5)):
    noise = np.asarray(corrupt.noise_like(jax.random.key(0), image, there, law))
    assert (noise >= low).all() and (noise <= high).all()
    np.testing.assert_allclose(noise[1:].std(axis=(1, 2, 3)) / (high - low)[1:, 0, 0, 0], deviation, rtol=0.05)


def published_curve(x, points, falling):
  """The table of MrGiovanni/ModelsGenesis, read linearly."""
  t = np.linspace(0, 1, 100_000)
  corners = np.concatenate([[[0, 0]], points, [[1, 1]]])
  power = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
  along, value = corners.T @ power
  assert (np.diff(along) > -1e-12).all() and (np.diff(value) > -1e-12).all()  # sorting moves nothing
  return np.interp(x, along, value[::-1] if falling else value)


def test_curves_are_the_published_table():
  image, there = sample()
  points, falling = RNG.random((4, 2, 2, 2)), RNG.random((4, 2)) < 0.5
  got = np.asarray(jax.jit(corrupt.bezier)(image, there, jnp.asarray(points, jnp.float32), jnp.asarray(falling)))
  for i, c in np.ndindex(4, 2):
    inside = np.asarray(there)[i, ..., c]
    x = np.asarray(image, np.float64)[i, ..., c]
    if not inside.any():
      np.testing.assert_array_equal(got[i, ..., c], x)
      continue
    low, high = x[inside].min(), x[inside].max()
    want = low + (high - low) * published_curve((x - low) / (high - low), points[i, c], falling[i, c])
    np.testing.assert_allclose(got[i, ..., c][inside], want[inside], atol=2e-3 * (high - low))
    np.testing.assert_array_equal(got[i, ..., c][~inside], x[~inside])
  straight = jnp.broadcast_to(jnp.asarray([[1 / 3, 1 / 3], [2 / 3, 2 / 3]]), (4, 2, 2, 2))
  same = corrupt.bezier(image, there, straight, jnp.zeros((4, 2), bool))
  np.testing.assert_allclose(same, image, atol=1e-4)


@pytest.mark.parametrize('grid', [GRID, (30, 20)])
def test_shuffling_stays_in_windows(grid):
  image, there = sample(grid)
  place = jnp.stack([*jnp.meshgrid(*map(jnp.arange, grid), indexing='ij'), jnp.zeros(grid, int)], axis=-1)
  marked = jnp.concatenate([image, jnp.broadcast_to(place, (4, *place.shape)).astype(jnp.float32)], axis=-1)
  known = jnp.concatenate([there, jnp.broadcast_to(there.any(-1, keepdims=True), (4, *place.shape))], axis=-1)
  got = np.asarray(jax.jit(functools.partial(corrupt.shuffle_locally, largest=0.2))(jax.random.key(3), marked, known))
  moved = got[..., 2:-1] - np.asarray(place)[..., :-1]
  most = np.asarray([int(0.2 * n) for n in grid])
  assert (np.abs(moved) < most).all() and (np.abs(moved).max(axis=tuple(range(moved.ndim - 1))) > 0).all()
  inside = np.asarray(there).any(axis=-1)
  for i in range(4):
    source = tuple(got[i, ..., 2:-1].astype(int).reshape(-1, len(grid)).T)
    assert len(set(zip(*source))) == np.prod(grid)  # a permutation, the same for both channels
    np.testing.assert_array_equal(got[i, ..., :2].reshape(-1, 2), np.asarray(image)[i][source])
    assert not np.any(moved[i][~inside[i]]) and inside[i][source].reshape(grid)[inside[i]].all()


def test_painting_is_inside_or_outside_of_boxes():
  image, there = sample((24, 24, 24), count=24)
  new = {change: np.asarray(jax.jit(change)(jax.random.key(5), image, there)) != np.asarray(image)
         for change in (corrupt.paint_in, corrupt.paint_out)}
  inside, outside = (x[1:-1].any(axis=-1) for x in new.values())
  for x in new.values():
    assert not x[~np.asarray(there)].any()
  # One box has sides of 4 to 8 inside, of 11 to 14 outside; five at most.
  assert (inside.sum(axis=(1, 2, 3)) <= 5 * 8**3).all() and np.median(inside.sum(axis=(1, 2, 3))) >= 4**3
  kept = ~outside
  assert (kept.sum(axis=(1, 2, 3)) >= 0.95 * 11**3).all() and (kept.sum(axis=(1, 2, 3)) < 24**3).all()
  for mask in (inside, kept):
    assert not mask[:, :3].any() and not mask[:, -3:].any()
