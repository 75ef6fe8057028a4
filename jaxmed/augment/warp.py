"""Where the pixels of an image come from: turns, rotations, and any displacement, for images of any rank.

Places are coordinates of pixels: pixel p has its centre at p, so displacements of zero are the identity to the bit.
"""

import math

import jax
import jax.numpy as jnp


def quarter_turns(image: jax.Array, turns: jax.Array, plane: tuple[int, int] = (-3, -2)) -> jax.Array:
  """Turns samples [B, *grid, C] counterclockwise by `turns` [B] int quarters in a plane, two axes of equal length."""
  turns, (first, second) = turns.reshape(-1, *[1] * (image.ndim - 1)) % 4, plane
  image = jnp.where(turns % 2 == 1, jnp.swapaxes(image, first, second), image)
  image = jnp.where((turns == 1) | (turns == 2), jnp.flip(image, first), image)
  return jnp.where((turns == 2) | (turns == 3), jnp.flip(image, second), image)


def quarter_turns_in_corner(image: jax.Array, sizes: jax.Array, turns: jax.Array,
                            plane: tuple[int, int] = (-3, -2)) -> tuple[jax.Array, jax.Array]:
  """The same of images that fill `sizes` [B, rank] of their arrays, from the corner on: (images, sizes) turned.

  What lies beyond an image goes round the array, and stays beyond it.
  """
  first, second = (axis + 1 for axis in plane)  # of sizes
  room = image.shape[plane[0]] - sizes  # a turn leaves an image at the other end of the axes that it flips
  own = lambda axis: room[:, axis]
  turns = turns % 4
  back = [jnp.where(turns == 1, own(second), jnp.where(turns == 2, own(first), 0)),
          jnp.where(turns == 3, own(first), jnp.where(turns == 2, own(second), 0))]
  shift = lambda x, down, right: jnp.roll(x, (-down, -right), plane)
  swapped = sizes.at[:, first].set(sizes[:, second]).at[:, second].set(sizes[:, first])
  return (jax.vmap(shift)(quarter_turns(image, turns, plane), *back),
          jnp.where((turns % 2 == 1)[:, None], swapped, sizes))


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
  """Rotates samples [B, *grid, C] counterclockwise about the centre by `degrees` [B].

  Bilinear; what comes from outside repeats the border. Angles are true where pixels are square.
  """
  return jax.vmap(linear)(image, _sources(image.shape[-3:-1], degrees))


def rotate_nearest(mask: jax.Array, degrees: jax.Array, outside: int) -> jax.Array:
  """Rotates integers [B, *grid] as `rotate` does: each pixel has the nearest value, or `outside` beyond the border."""
  return jax.vmap(lambda x, place: nearest(x, place, outside))(mask, _sources(mask.shape[-2:], degrees))


def _sources(size: tuple[int, ...], degrees: jax.Array) -> jax.Array:
  """Places [B, H, W, 2] that the pixels of a rotated plane come from; some lie outside of it."""
  height, width = size
  angle = jnp.deg2rad(degrees)[:, None, None]
  y = jnp.arange(height)[:, None] - (height - 1) / 2
  x = jnp.arange(width) - (width - 1) / 2
  return jnp.stack([jnp.sin(angle) * x + jnp.cos(angle) * y + (height - 1) / 2,
                    jnp.cos(angle) * x - jnp.sin(angle) * y + (width - 1) / 2], axis=-1)


def linear(image: jax.Array, places: jax.Array, extent: jax.Array | None = None) -> jax.Array:
  """Values of an image [..., *grid, C] at places [*size, rank] of its `rank` last axes, [..., *size, C].

  Linear between pixels; the border is repeated beyond it, or beyond `extent` [rank], pixels from the corner on.
  """
  rank, channels = places.shape[-1], image.shape[-1]
  grid = image.shape[-rank - 1 : -1]
  last = jnp.asarray(grid) - 1 if extent is None else extent - 1
  places = jnp.clip(places, 0, last.astype(places.dtype))
  low = jnp.floor(places).astype(jnp.int32)
  high, share = jnp.minimum(low + 1, last), places - low
  flat = image.reshape(*image.shape[: -rank - 1], math.prod(grid), channels)

  def between(axis: int, index: jax.Array) -> jax.Array:
    """The values at pixels `index` of the axes before, linear along the others."""
    if axis == rank:
      return jnp.take(flat, index, axis=-2, mode='clip')
    near, far = (between(axis + 1, index * grid[axis] + end[..., axis]) for end in (low, high))
    return near * (1 - share[..., axis, None]) + far * share[..., axis, None]

  return between(0, jnp.zeros(places.shape[:-1], jnp.int32))


def nearest(mask: jax.Array, places: jax.Array, outside: int, extent: jax.Array | None = None) -> jax.Array:
  """Values of integers [..., *grid] at places [*size, rank] of the last axes: of the nearest pixel, or `outside`.

  What lies beyond the border, or beyond `extent` [rank], is outside.
  """
  rank = places.shape[-1]
  grid = mask.shape[mask.ndim - rank :]
  index = jnp.round(places).astype(jnp.int32)
  within = ((index >= 0) & (index < (jnp.asarray(grid) if extent is None else extent))).all(axis=-1)
  strides = jnp.asarray([math.prod(grid[axis + 1 :]) for axis in range(rank)])
  flat = mask.reshape(*mask.shape[: mask.ndim - rank], math.prod(grid))
  return jnp.where(within, jnp.take(flat, (index * strides).sum(axis=-1), axis=-1, mode='clip'), outside)


def centres(grid: tuple[int, ...]) -> jax.Array:
  """The places of all pixels of a grid, [*grid, rank] float32."""
  return jnp.stack(jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in grid), indexing='ij'), axis=-1)


def displaced(image: jax.Array, flow: jax.Array) -> jax.Array:
  """An image [*grid, C] warped by a displacement [*grid, rank] in pixels: out(x) = image(x + flow(x)), see `linear`."""
  return linear(image, centres(flow.shape[:-1]) + flow)


def displaced_nearest(mask: jax.Array, flow: jax.Array, outside: int) -> jax.Array:
  """Integers [*grid] warped as `displaced` does, see `nearest`."""
  return nearest(mask, centres(flow.shape[:-1]) + flow, outside)


def integrated(velocity: jax.Array, steps: int, extent: jax.Array | None = None) -> jax.Array:
  """The displacement [*grid, rank] after unit time in a constant velocity field [*grid, rank], by squaring.

  A flow of 1 / 2^steps of the velocity, composed with itself `steps` times (Arsigny et al. 2006): it folds nowhere if
  that first one does not. See `linear` for `extent`.
  """
  places, flow = centres(velocity.shape[:-1]), velocity / 2**steps
  for _ in range(steps):
    flow = flow + linear(flow, places + flow, extent)
  return flow


def jacobian_determinant(flow: jax.Array) -> jax.Array:
  """det(I + d flow / dx) [*grid] of a displacement [*grid, rank] in pixels: growth of volume, negative where it folds.

  Central differences, one-sided at the border (numpy.gradient); exact for affine maps.
  """
  rank = flow.shape[-1]
  slopes = [jnp.stack(jnp.gradient(flow[..., i], axis=tuple(range(rank))), axis=-1) for i in range(rank)]
  return jnp.linalg.det(jnp.eye(rank) + jnp.stack(slopes, axis=-2))


def smooth_flow(rng: jax.Array, grid: tuple[int, ...], sigma: jax.Array, magnitude: jax.Array) -> jax.Array:
  """A random smooth displacement [*grid, rank] in pixels.

  Normal noise, blurred by a Gaussian that wraps around, then each component scaled to its greatest displacement
  (MIC-DKFZ/batchgeneratorsv2, transforms/spatial/spatial.py).

  Args:
    sigma: [rank], the deviation of the blur of each component along all axes, in pixels.
    magnitude: [rank], the greatest displacement of each component, in pixels.
  """
  rank = len(grid)
  noise = jax.random.normal(rng, (rank, *grid))
  square = sum(jnp.square(jnp.fft.fftfreq(n)).reshape([-1 if a == i else 1 for a in range(rank)])
               for i, n in enumerate(grid))
  along = lambda values: values.reshape(-1, *[1] * rank)
  law = jnp.exp(-2 * math.pi**2 * along(jnp.square(sigma)) * square)
  axes = tuple(range(1, rank + 1))
  smooth = jnp.fft.ifftn(jnp.fft.fftn(noise, axes=axes) * law, axes=axes).real
  most = jnp.abs(smooth).max(axis=axes, keepdims=True)
  return jnp.moveaxis(smooth * along(magnitude) / jnp.maximum(most, 1e-30), 0, -1)


def affine(angles: jax.Array, zoom: jax.Array) -> jax.Array:
  """The matrix [rank, rank] of a rotation after a zoom, from centred places of a view to those of its source.

  Rotations by `angles` [rank] in radians about the first, second, third axis, in this order; in 2D by the last one of
  them (MIC-DKFZ/batchgeneratorsv2, create_affine_matrix_3d and _2d). zoom: [rank]; above 1 things get smaller.
  """
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  one, none = jnp.ones(()), jnp.zeros(())
  rows = lambda *values: jnp.stack(values).reshape(len(angles), len(angles))
  if len(angles) == 2:
    return rows(cos[1], -sin[1], sin[1], cos[1]) * zoom
  first = rows(one, none, none, none, cos[0], -sin[0], none, sin[0], cos[0])
  second = rows(cos[1], none, sin[1], none, one, none, -sin[1], none, cos[1])
  third = rows(cos[2], -sin[2], none, sin[2], cos[2], none, none, none, one)
  product = lambda a, b: jnp.matmul(a, b, precision='highest')
  return product(product(third, second), first) * zoom
