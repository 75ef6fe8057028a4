"""Where views come from: geometry is drawn once a view and applied to each kind of field.

A view is a box of the loaded array, resized, then flipped, turned by quarters and rotated, in this order. With a
`warped` geometry the box is resized, rotated about all axes, zoomed and deformed in one resampling. Boxes are
rows (start, end) of continuous coordinates: pixel p covers p .. p + 1. Shapes: B samples, N boxes, `grid` the loaded
array, `size` the view, both of `rank` axes.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.augment import nnunet, warp
from jaxmed.augment.resample import crop_resize

ABSENT = -1  # label of a pixel that a mask does not tell of, and each number of a box that is not there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Geometry:
  """What `draw` drew for one view of each sample.

  Attributes:
    start, length: [B, rank] int32, the box in pixels of the loaded array; None for the whole array.
    flips: [B, rank] bool, the axes that are flipped; None for none.
    turns: [B] int32, quarter turns counterclockwise in the last two axes; None for none.
    angle: [B] float32, degrees of a rotation counterclockwise in the last two axes; None for none.
    matrix: [B, rank, rank] float32, from places in the view about its centre to places in the box about its centre, in
      pixels of the view, see `warp.affine`; None for none.
    flow: [B, *size, rank] float32, displacements in pixels of the view, before the matrix; None for none.
    extent: [B, rank] int32, what the images fill of their arrays, for what is warped; None for all.
  """

  start: jax.Array | None = None
  length: jax.Array | None = None
  flips: jax.Array | None = None
  turns: jax.Array | None = None
  angle: jax.Array | None = None
  matrix: jax.Array | None = None
  flow: jax.Array | None = None
  extent: jax.Array | None = None

  def box(self, count: int, grid: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(start, length), both [B, rank] int32, of `count` samples; the whole grid where there is no box."""
    if self.start is not None and self.length is not None:
      return self.start, self.length
    whole = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (count, len(grid)))
    return jnp.zeros_like(whole), whole

  def view_box(self, count: int, grid: tuple[int, ...]) -> jax.Array:
    """The box as [B, 2 * rank] float32, start and end in pixels of the loaded array."""
    start, length = self.box(count, grid)
    return jnp.concatenate([start, start + length], axis=1).astype(jnp.float32)

  @property
  def warped(self) -> bool:
    """Whether a view is made in one resampling."""
    return self.matrix is not None or self.flow is not None

  def places(self, count: int, grid: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
    """Where in the loaded array the pixels of the view come from before flips, [B, *size, rank]."""
    rank = len(size)
    middle = (jnp.asarray(size, jnp.float32) - 1) / 2
    x = warp.centres(size) - middle
    x = jnp.broadcast_to(x, (count, *x.shape)) if self.flow is None else x + self.flow
    if self.matrix is not None:
      x = jnp.einsum('bij,b...j->b...i', self.matrix, x, precision='highest')
    along = lambda a: a.astype(jnp.float32).reshape(count, *[1] * rank, rank)
    start, length = map(along, self.box(count, grid))
    return (x + middle + 0.5) * (length / jnp.asarray(size)) - 0.5 + start


def draw_warp(rng: jax.Array, count: int, size: tuple[int, ...], rotation: tuple[tuple[float, ...], Any] | None,
              zoom: tuple[tuple[float, float], Any] | None,
              elastic: tuple[tuple[float, float], tuple[float, float], Any] | None) -> dict[str, jax.Array]:
  """The `matrix` and `flow` of views, each where it is asked for.

  Args:
    rotation: (greatest angle about each axis in degrees, probability). zoom: (range of the factor of all axes,
      probability); above 1 things get smaller. elastic: (range of the greatest displacement in pixels, range of the
      deviation of its blur as a fraction of each side, probability).
  """
  rank, out = len(size), {}
  keys = jax.random.split(rng, 7)
  angles, factors = jnp.zeros((count, rank)), jnp.ones((count, rank))
  plane = jnp.asarray([0.0 if nnunet.flat(size) and axis == 0 else 1.0 for axis in range(rank)])
  drawn = lambda key, chance: jax.random.bernoulli(key, chance, (count,))[:, None]
  if rotation is not None:
    most = jnp.deg2rad(jnp.asarray(rotation[0], jnp.float32))
    angles = jax.random.uniform(keys[0], (count, rank), minval=-1, maxval=1) * most * drawn(keys[1], rotation[1])
  if zoom is not None:
    factor = jax.random.uniform(keys[2], (count, 1), minval=zoom[0][0], maxval=zoom[0][1])
    factors = jnp.where(drawn(keys[3], zoom[1]) & (plane > 0), factor, 1.0)
  if rotation is not None or zoom is not None:
    out['matrix'] = jax.vmap(warp.affine)(angles, factors)
  if elastic is not None:
    sigma_key, size_key = jax.random.split(keys[5])
    shape = count, rank
    sigma = jax.random.uniform(sigma_key, shape, minval=elastic[1][0], maxval=elastic[1][1]) * jnp.asarray(size)
    most = jax.random.uniform(size_key, shape, minval=elastic[0][0], maxval=elastic[0][1])
    most = most * plane * drawn(keys[6], elastic[2])
    out['flow'] = jax.vmap(lambda key, s, m: warp.smooth_flow(key, size, s, m))(
        jax.random.split(keys[4], count), sigma, most)
  return out


def draw(crop_key: jax.Array, turn_key: jax.Array, count: int, grid: tuple[int, ...], size: tuple[int, ...],
         scale: tuple[float, float], ratio: tuple[float, float], flip: tuple[float, ...] = (),
         rotate90: jax.Array | float | None = None, rotate: float = 0.0, extent: jax.Array | None = None,
         slices: tuple[float, ...] = ()) -> Geometry:
  """The geometry of one view of `count` samples.

  Args:
    crop_key, turn_key: of the boxes; of flips, turns and angles.
    grid, size: of the loaded array and of the view.
    scale, ratio, slices: see `random_box`. Arrays that have the size of the view already are taken whole where scale is
      1 and there are no `slices`.
    flip: probability of a flip along each axis; () flips the last one with 0.5.
    rotate90: probability of one to three quarter turns, None for none. rotate: greatest angle in degrees.
    extent: [B, rank] int32, what each image fills of its array, from the corner on; None for all.
  """
  start = length = flips = turns = None
  if scale[0] != 1.0 or grid != size or extent is not None or slices:
    keys = jax.random.split(crop_key, count)
    within = jnp.broadcast_to(jnp.asarray(grid), (count, len(grid))) if extent is None else extent
    box = lambda key, own: random_box(key, own, scale, ratio, slices=slices)
    start, length = jax.vmap(box)(keys, within)
  flip_key, quarter_key, angle_key = jax.random.split(turn_key, 3)
  chances = flip or (0.0,) * (len(grid) - 1) + (0.5,)
  if any(chances):
    flips = random_flips(flip_key, count, chances)
  if rotate90 is not None:
    turns = random_turns(quarter_key, count, rotate90)
  return Geometry(start, length, flips, turns, random_angles(angle_key, count, rotate) if rotate else None)


def random_tile(rng: jax.Array, place: jax.Array, count: int, grid: tuple[int, ...],
                tiles: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Boxes (start, length), both [count, rank] int32, that are a tile of the grid, or lie anywhere in it.

  The grid has prod(tiles) tiles, counted along the last axis first. The box at `place` is the tile of that number;
  beyond the last one it is a window of the size of a tile, uniform over whole pixels (Luffy03/VoCo,
  utils/data_utils.py, which likewise never draws the last place).
  """
  length = jnp.asarray([n // parts for n, parts in zip(grid, tiles, strict=True)], jnp.int32)
  room = jnp.asarray(grid, jnp.int32) - length
  fixed = jnp.stack(jnp.unravel_index(place % math.prod(tiles), tiles)).astype(jnp.int32) * length
  anywhere = jax.random.randint(rng, (count, len(grid)), 0, jnp.maximum(room, 1))
  start = jnp.where(place < math.prod(tiles), fixed, anywhere)
  return start, jnp.broadcast_to(length, start.shape)


def random_flips(rng: jax.Array, count: int, chances: tuple[float, ...]) -> jax.Array:
  """Axes to flip, [count, rank] bool; `chances` has a probability an axis."""
  out = []
  for chance in chances:
    if chance:
      rng, key = jax.random.split(rng)
    out.append(jax.random.bernoulli(key, chance, (count,)) if chance else jnp.zeros(count, bool))
  return jnp.stack(out, axis=1)


def random_turns(rng: jax.Array, count: int, probability: jax.Array | float) -> jax.Array:
  """Quarter turns [count] int32: one, two or three, equally likely, with `probability` (MONAI RandRotate90); else 0."""
  turn_key, count_key = jax.random.split(rng)
  turn = jax.random.bernoulli(turn_key, probability, (count,))
  return turn * jax.random.randint(count_key, (count,), 1, 4)


def random_angles(rng: jax.Array, count: int, degrees: float) -> jax.Array:
  """Angles [count] float32, uniform in +- degrees."""
  return jax.random.uniform(rng, (count,), minval=-degrees, maxval=degrees)


def apply_image(geometry: Geometry, image: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """Images [B, *grid, C] as views [B, *size, C]: antialiased, bilinear where rotated; the border is repeated.

  Warped ones are linear throughout and see what lies around the box.
  """
  count, grid = len(image), image.shape[1:-1]
  if geometry.warped:
    image = jax.vmap(warp.linear)(image.astype(jnp.float32), geometry.places(count, grid, size), *_own(geometry))
  elif geometry.start is not None or grid != size:
    image = jax.vmap(lambda x, s, n: crop_resize(x, s, n, size))(image, *geometry.box(count, grid))
  if geometry.flips is not None:
    for axis in range(len(size)):
      flip = geometry.flips[:, axis].reshape(-1, *[1] * (len(size) + 1))
      image = jnp.where(flip, jnp.flip(image, axis + 1), image)
  if geometry.turns is not None:
    image = warp.quarter_turns(image, geometry.turns)
  return image if geometry.angle is None else warp.rotate(image, geometry.angle)


def apply_mask(geometry: Geometry, mask: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """Masks [B, *grid] int as views [B, *size]: the label at the centre of each pixel.

  It is ABSENT where a rotation shows what lies outside of the box, or a warp what lies outside of the image.
  """
  count, grid = len(mask), mask.shape[1:]
  if geometry.warped:
    one = lambda x, places, *own: warp.nearest(x, places, ABSENT, *own)
    mask = jax.vmap(one)(mask, geometry.places(count, grid, size), *_own(geometry))
  elif geometry.start is not None or grid != size:
    mask = nearest(mask, *geometry.box(count, grid), size)
  if geometry.flips is not None:
    for axis in range(len(size)):
      flip = geometry.flips[:, axis].reshape(-1, *[1] * len(size))
      mask = jnp.where(flip, jnp.flip(mask, axis + 1), mask)
  if geometry.turns is not None:
    mask = warp.quarter_turns(mask[..., None], geometry.turns)[..., 0]
  return mask if geometry.angle is None else warp.rotate_nearest(mask, geometry.angle, ABSENT)


def _own(geometry: Geometry) -> tuple[jax.Array, ...]:
  return () if geometry.extent is None else (geometry.extent,)


def apply_boxes(geometry: Geometry, boxes: jax.Array, grid: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
  """Boxes [B, N, 2 * rank] float32 of the loaded array as boxes of the view, cut at its border.

  A rotated box becomes the bounding box of its corners; displacements of a `flow` are not followed. A box that is
  wholly outside becomes a row of ABSENT.
  """
  rank = len(grid)
  there = (boxes >= 0).all(axis=-1)
  start, length = (x[:, None].astype(jnp.float32) for x in geometry.box(len(boxes), grid))  # [B, 1, rank]
  sides = jnp.asarray(size, jnp.float32)
  low, high = ((x - start) * sides / length for x in (boxes[..., :rank], boxes[..., rank:]))  # [B, N, rank]
  if geometry.matrix is not None:
    low, high = _through(jnp.linalg.inv(geometry.matrix), low, high, sides)
  low, high, there = _clipped(low, high, sides, there)
  if geometry.flips is not None:
    low, high = _flipped(low, high, sides, geometry.flips[:, None])
  if geometry.turns is not None:
    turns = geometry.turns[:, None, None] % 4
    swap = lambda x: jnp.where(turns % 2 == 1, jnp.concatenate([x[..., :-2], x[..., :-3:-1]], axis=-1), x)
    axes = jnp.concatenate([jnp.zeros((*turns.shape[:2], rank - 2), bool), (turns == 1) | (turns == 2),
                            (turns == 2) | (turns == 3)], axis=-1)
    low, high = _flipped(swap(low), swap(high), sides, axes)
  if geometry.angle is not None:
    low, high = _rotated(low, high, sides, jnp.deg2rad(geometry.angle)[:, None])
    low, high, there = _clipped(low, high, sides, there)
  return jnp.where(there[..., None], jnp.concatenate([low, high], axis=-1), float(ABSENT))


def nearest(mask: jax.Array, start: jax.Array, length: jax.Array, size: tuple[int, ...],
            own: jax.Array | None = None) -> jax.Array:
  """Resizes the boxes (start, length), both [B, rank], of masks [B, *grid] to [B, *size] by the label at each centre.

  With `own` [B, rank] to that size, in the corner of [B, *size], which is ABSENT elsewhere.
  """
  def one(x, start, length, own):
    for axis, n in enumerate(size):
      place = jnp.arange(n)
      index = ((2 * place + 1) * length[axis]) // (2 * own[axis])
      x = jnp.take(x, jnp.minimum(index, length[axis] - 1) + start[axis], axis=axis, mode='clip')
      within = (place < own[axis]).reshape([-1 if a == axis else 1 for a in range(len(size))])
      x = jnp.where(within, x, ABSENT)
    return x

  whole = jnp.broadcast_to(jnp.asarray(size), start.shape) if own is None else own
  return jax.vmap(one)(mask, start, length, whole)


def follow(geometry: Geometry, batch: Any, grid: tuple[int, ...], size: tuple[int, ...]) -> dict[str, jax.Array]:
  """What goes with the images of a batch, as it is in the view: 'mask', 'boxes' and the flips as 'view_flip'.

  Each where there is one. The arguments are those of `apply_boxes`.
  """
  out = {} if geometry.flips is None else {'view_flip': geometry.flips}
  if 'mask' in batch:
    out['mask'] = apply_mask(geometry, batch['mask'], size)
  if 'boxes' in batch:
    out['boxes'] = apply_boxes(geometry, batch['boxes'], grid, size)
  return out


def in_corner(group: Any, sizes: jax.Array, size: tuple[int, ...]) -> dict[str, jax.Array]:
  """'mask' [..., *size] and 'boxes' [..., N, 2 * rank] of views that are resized to `sizes` [..., rank].

  They lie in the corner of their arrays, where masks are ABSENT elsewhere. Each where the group has it.
  """
  out = {}
  if 'mask' in group:
    own = sizes.reshape(-1, len(size))
    whole = jnp.broadcast_to(jnp.asarray(size), own.shape)
    mask = nearest(group['mask'].reshape(-1, *size), jnp.zeros_like(whole), whole, size, own)
    out['mask'] = mask.reshape(group['mask'].shape)
  if 'boxes' in group:
    share = sizes / jnp.asarray(size)
    share = jnp.concatenate([share, share], axis=-1)[..., None, :]
    out['boxes'] = jnp.where(group['boxes'] < 0, group['boxes'], group['boxes'] * share)
  return out


def _clipped(low: jax.Array, high: jax.Array, sides: jax.Array, there: jax.Array):
  """Boxes cut at 0 and `sides`, and which are there and not wholly outside."""
  inside = ((high > 0) & (low < sides)).all(axis=-1)
  return jnp.clip(low, 0, sides), jnp.clip(high, 0, sides), there & inside


def _through(matrix: jax.Array, low: jax.Array, high: jax.Array, sides: jax.Array):
  """The bounding boxes of boxes [B, N, rank] that a matrix [B, rank, rank] moves about the centre."""
  ends = jnp.stack([low, high]) - sides / 2
  corners = jnp.stack([jnp.stack([ends[side][..., axis] for axis, side in enumerate(sides_of)], axis=-1)
                       for sides_of in itertools.product((0, 1), repeat=low.shape[-1])])
  moved = jnp.einsum('bij,cbnj->cbni', matrix, corners, precision='highest') + sides / 2
  return moved.min(axis=0), moved.max(axis=0)


def _flipped(low: jax.Array, high: jax.Array, sides: jax.Array, axes: jax.Array):
  """Boxes flipped along the axes that are True."""
  return jnp.where(axes, sides - high, low), jnp.where(axes, sides - low, high)


def _rotated(low: jax.Array, high: jax.Array, sides: jax.Array, angle: jax.Array):
  """The bounding boxes of boxes [B, N, rank] whose last two axes are rotated by `angle` [B, 1] about the centre."""
  middle = sides[-2:] / 2
  y, x = (jnp.stack([low[..., a], low[..., a], high[..., a], high[..., a]]) for a in (-2, -1))  # [4, B, N] corners
  y, x = y - middle[0], x[jnp.array([0, 2, 0, 2])] - middle[1]
  rows = jnp.cos(angle) * y - jnp.sin(angle) * x + middle[0]
  columns = jnp.sin(angle) * y + jnp.cos(angle) * x + middle[1]
  ends = lambda pick: jnp.stack([pick(rows, axis=0), pick(columns, axis=0)], axis=-1)
  return (jnp.concatenate([low[..., :-2], ends(jnp.min)], axis=-1),
          jnp.concatenate([high[..., :-2], ends(jnp.max)], axis=-1))


def filled(extent: jax.Array, grid: tuple[int, ...]) -> jax.Array:
  """Which pixels of arrays [B, *grid] belong to images that fill `extent` [B, rank] of them, bool."""
  along = lambda axis: [-1 if a == axis else 1 for a in range(len(grid))]
  inside = jnp.ones((len(extent), *grid), bool)
  for axis, n in enumerate(grid):
    inside &= jnp.arange(n).reshape(along(axis)) < extent[:, axis].reshape(-1, *[1] * len(grid))
  return inside


def random_box(rng: jax.Array, grid: jax.Array | tuple[int, ...], scale: tuple[float, float],
               ratio: tuple[float, float], tries: int = 10, slices: tuple[float, ...] = ()
               ) -> tuple[jax.Array, jax.Array]:
  """A random box of whole pixels of an image [*grid]: (start, length), both [rank] int32.

  The rule of torchvision's RandomResizedCrop: the area is a uniform share of the image, the aspect log-uniform; of
  ten draws the first that fits is taken, and if none fits the largest central box whose aspect is at the bound. In
  3D the volume is the share and each axis has its own log-uniform stretch. With `slices`, in 3D, the first axis goes by
  itself: its length is a uniform share of the image's in that range, and the last two are as in 2D
  (AICONSlab/3DINO, dinov2/data/augmentations.py:RandomResizedCrop3d).
  """
  rank = len(grid)
  if slices and rank == 3:
    rng, key = jax.random.split(rng)
    start, length = random_box(rng, grid[1:], scale, ratio, tries)
    share, place = jax.random.uniform(key, (2,))
    depth = jnp.maximum(jnp.round(grid[0] * (slices[0] + (slices[1] - slices[0]) * share)), 1)
    first = jnp.stack([jnp.floor(place * (grid[0] - depth + 1)), depth]).astype(jnp.int32)
    return jnp.concatenate([first[:1], start]), jnp.concatenate([first[1:], length])
  size = jnp.asarray(grid, jnp.float32)
  area_key, aspect_key, place_key = jax.random.split(rng, 3)
  share = jax.random.uniform(area_key, (tries, 1), minval=scale[0], maxval=scale[1])
  low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
  stretch = jax.random.uniform(aspect_key, (tries, max(rank - 1, 1)), minval=low, maxval=high)
  if rank == 2:  # aspect = width / height
    stretch = jnp.concatenate([-stretch, stretch], axis=1) / 2
  else:
    stretch = jnp.pad(stretch, ((0, 0), (0, rank - stretch.shape[1]))) / 2
    stretch = stretch - stretch.mean(axis=1, keepdims=True)
  length = jnp.round((share * jnp.prod(size)) ** (1 / rank) * jnp.exp(stretch))  # [tries, rank]
  fits = jnp.all((length >= 1) & (length <= size), axis=1)
  # Height and width in 2D: at most width / ratio[0] and height * ratio[1].
  longest = size[::-1] * jnp.asarray([1 / ratio[0], ratio[1]]) if rank == 2 else size.min() * jnp.sqrt(ratio[1])
  side = jnp.minimum(size, jnp.round(longest))
  length = jnp.where(fits.any(), length[jnp.argmax(fits)], side)
  room = size - length
  start = jnp.where(fits.any(), jnp.floor(jax.random.uniform(place_key, (rank,)) * (room + 1)), jnp.floor(room / 2))
  return jnp.minimum(start, room).astype(jnp.int32), length.astype(jnp.int32)
