"""Whole images by overlapping tiles: where they start, how they are weighted, and what they add up to.

The rules are those of nnU-Net v2 (nnunetv2/inference/sliding_window_prediction.py): tiles are spread evenly with steps
of at most a share of their size, weighted by a Gaussian around their middle, and an image that is smaller than a tile
is padded around its middle. Sums are float32 (nnU-Net's are float16, to fit a GPU); mirrored logits are averaged.

Sums are kept for as many slices along the first axis as a tile has, so that memory does not grow with the length of an
image; beyond BUDGET they lie in a temporary file.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from jaxmed.data.resize import weights
from jaxmed.errors import UserError
from jaxmed.parallel.mesh import batch_sharding, batch_shards, make_mesh

SIGMA, PEAK = 1 / 8, 10.0  # of the weights: a share of the tile, and the largest one
BUDGET = 2 << 30  # bytes of sums that are held in memory
Network = Callable[[jax.Array], jax.Array]


def starts(length: int, tile: int, step: float = 0.5) -> tuple[int, ...]:
  """Where tiles start along an axis: evenly spread, at most `step` of a tile apart, the last one at the end."""
  if length <= tile:
    return (0,)
  count = math.ceil((length - tile) / (tile * step)) + 1
  return tuple(int(np.round((length - tile) / (count - 1) * i)) for i in range(count))


def gaussian(tile: Sequence[int]) -> np.ndarray:
  """The weight [*tile] float32 of each pixel: a Gaussian around pixel n // 2 of each axis of n, cut off at 4 sigma.

  What is cut off has the smallest of the other weights. Of an axis of even length the weights are not symmetric.
  """
  out = np.ones(())
  for n in tile:
    line = np.zeros(n)
    line[n // 2] = 1
    out = out[..., None] * ndimage.gaussian_filter1d(line, n * SIGMA, mode='constant')
  out = (out * (PEAK / out.max())).astype(np.float32)
  return np.maximum(out, out[out > 0].min())


def predict_tiles(network: Network, image: np.ndarray, tile: Sequence[int], **options: Any) -> np.ndarray:
  """`slices` in one array: logits [*size, K] float32."""
  return np.stack(list(slices(network, image, tile, **options)))


def slices(network: Network, image: np.ndarray, tile: Sequence[int], *, step: float = 0.5, flips: Sequence[int] = (),
           batch_size: int = 1, fill: float = 0.0, devices: Sequence[Any] | None = None,
           budget: int = BUDGET) -> Iterator[np.ndarray]:
  """Yields the logits of an image, a slice [*size[1:], K] float32 along its first axis at a time.

  Args:
    network: gives logits [B, *tile, K] of tiles [B, *tile, C] float32, for one B alone. It is best jitted, and called
      with arrays that are cut along B over the devices.
    image: [*size, C] of any number type, 2 or 3 axes.
    step: largest distance of two tiles, as a share of their size.
    flips: axes that may be mirrored; the network sees all 2 ** n mirror images, and their logits are averaged.
    batch_size: tiles in one pass on each device.
    fill: what lies around an image that is smaller than a tile.
    devices: on which tiles are spread; all by default.
  Raises:
    UserError: a step or a tile that does not suit the image.
  """
  _check(image, tile, step, flips)
  tile = tuple(tile)
  before = [max(0, t - n) // 2 for n, t in zip(image.shape, tile)]
  places = list(itertools.product(*(starts(n, t, step) for n, t in zip(image.shape, tile))))
  mesh = make_mesh({'data': 0}, devices)
  weight = gaussian(tile)
  sums: _Sums | None = None
  size = tuple(max(n, t) for n, t in zip(image.shape, tile))
  read = lambda place: _cut(image, [p - b for p, b in zip(place, before)], tile, fill)
  inside = tuple(slice(b, b + n) for b, n in zip(before[1:], image.shape[1:-1]))
  shown = range(before[0], before[0] + image.shape[0])
  for place, logits in _each(_averaged(network, flips), places, read, batch_size * batch_shards(mesh), mesh):
    sums = sums or _Sums(tile, size, logits.shape[-1], budget)
    yield from (x[inside] for z, x in sums.until(place[0]) if z in shown)
    sums.add(place, logits, weight)
  assert sums is not None
  yield from (x[inside] for z, x in sums.until(size[0]) if z in shown)


def resampled(slices: Iterable[np.ndarray], length: int, size: Sequence[int],
              scales: Sequence[float | None] | None = None) -> Iterator[np.ndarray]:
  """Yields slices [*size[1:], K] of an image of the grid `size`, linear between those [*grid[1:], K] of another grid.

  Args:
    length: number of the given slices. scales: for each axis how many of the given pixels the new ones are apart,
      around the same middle; None where both grids cover the same field.
  """
  scales = scales or (None,) * len(size)
  first = weights(length, size[0], scales[0], False)
  source, held = enumerate(slices), dict[int, np.ndarray]()
  for i in range(size[0]):
    wanted = {int(c): float(w) for c, w in zip(*(x[first.indptr[i] : first.indptr[i + 1]] for x in (
      first.indices, first.data))) if w}
    held = {z: x for z, x in held.items() if z >= min(wanted)}
    while max(held, default=-1) < max(wanted):
      z, x = next(source)
      if z >= min(wanted):
        held[z] = _plane(x, size[1:], scales[1:])
    yield sum(held[z] * np.float32(w) for z, w in wanted.items())  # type: ignore[misc]


def _plane(x: np.ndarray, size: Sequence[int], scales: Sequence[float | None]) -> np.ndarray:
  """A slice [*grid, K] at other places of each axis."""
  for axis, (n, scale) in enumerate(zip(size, scales)):
    if scale or x.shape[axis] != n:
      moved = np.moveaxis(x, axis, 0)
      matrix = weights(len(moved), n, scale, False)
      x = np.moveaxis((matrix @ moved.reshape(len(moved), -1)).reshape(n, *moved.shape[1:]), 0, axis)
  return x


class _Sums:
  """Weighted logits and weights of the slices that tiles still add to."""

  def __init__(self, tile: tuple[int, ...], size: tuple[int, ...], classes: int, budget: int):
    shape = (tile[0], *size[1:], classes)
    if math.prod(shape) * 4 <= budget:
      self.logits = np.zeros(shape, np.float32)
    else:
      self.file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the array
      self.logits = np.memmap(self.file, np.float32, 'w+', shape=shape)
    self.weights = np.zeros(shape[:-1], np.float32)
    self.first = 0  # the first slice that they hold; slice z lies at z % tile[0]

  def add(self, place: Sequence[int], logits: np.ndarray, weight: np.ndarray) -> None:
    """Adds the logits [*tile, K] of a tile at a place whose first axis is at `first` or behind it by less than a tile.

    Slice by slice, so that no second tile of logits is held.
    """
    at: tuple[Any, ...] = tuple(slice(p, p + n) for p, n in zip(place[1:], weight.shape[1:]))
    for i in range(len(weight)):
      z = (place[0] + i) % len(self.weights)
      self.logits[z][at] += logits[i] * weight[i, ..., None]
      self.weights[z][at] += weight[i]

  def until(self, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """The mean logits of the slices before `end`, to which no tile adds any more; they are cleared."""
    for z in range(self.first, end):
      row = z % len(self.weights)
      yield z, self.logits[row] / self.weights[row, ..., None]
      self.logits[row] = 0
      self.weights[row] = 0
    self.first = end


def _averaged(network: Network, flips: Sequence[int]) -> Network:
  """The mean over all mirror images of tiles, mirrored back."""
  if not flips:
    return network
  kinds = [[1 + a for a, on in zip(flips, turned) if on] for turned in itertools.product((0, 1), repeat=len(flips))]

  def mean(x: jax.Array) -> jax.Array:
    total = network(x)
    for axes in kinds[1:]:
      total = total + jnp.flip(network(jnp.flip(x, axes)), axes)
    return total / len(kinds)
  return mean


def _each(network: Network, places: Sequence[tuple[int, ...]], read: Callable[[tuple[int, ...]], np.ndarray],
          count: int, mesh: Any) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """(place, logits [*tile, K]) of each tile in order; the next batch is computed while the host adds up the last."""
  waiting: tuple[Sequence[tuple[int, ...]], Any] | None = None
  for i in range(0, len(places), count):
    some = places[i : i + count]
    tiles = np.stack([read(p) for p in some])
    tiles = np.pad(tiles, [(0, count - len(some))] + [(0, 0)] * (tiles.ndim - 1))
    logits = network(jax.device_put(tiles, batch_sharding(mesh)))
    if waiting:
      yield from _fetched(*waiting)
    waiting = some, logits
  if waiting:
    yield from _fetched(*waiting)


def _fetched(places: Sequence[tuple[int, ...]], logits: Any) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """Logits one tile at a time."""
  for i, place in enumerate(places):
    yield place, np.asarray(logits[i], np.float32)


def _cut(image: np.ndarray, start: Sequence[int], tile: Sequence[int], fill: float) -> np.ndarray:
  """The part [*tile, C] float32 of an image that begins at `start`, which may lie outside, amid `fill`."""
  at = tuple(slice(max(s, 0), min(s + t, n)) for s, t, n in zip(start, tile, image.shape))
  part = image[at].astype(np.float32)
  pad = [(max(-s, 0), max(s + t - n, 0)) for s, t, n in zip(start, tile, image.shape)]
  return np.pad(part, [*pad, (0, 0)], constant_values=fill) if any(map(any, pad)) else part


def _check(image: np.ndarray, tile: Sequence[int], step: float, flips: Sequence[int]) -> None:
  if len(tile) != image.ndim - 1 or len(tile) not in (2, 3):
    raise UserError(f'an image of {"x".join(map(str, image.shape[:-1]))} with {image.ndim - 1} axes; the model takes '
                    f'tiles of {"x".join(map(str, tile))}')
  if not 0 < step <= 1:
    raise UserError(f'step is {step}: expected a share of a tile, above 0 and 1 at most')
  if not all(0 <= a < len(tile) for a in flips) or len(set(flips)) < len(flips):
    raise UserError(f'axes to mirror are {", ".join(map(str, flips))}: expected some of 0 to {len(tile) - 1}')
