"""The view maker: one batch of stored images -> one batch of normalised, augmented images."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmed.augment import channels as channel_lib
from jaxmed.augment import intensity
from jaxmed.augment.resample import crop_resize
from jaxmed.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class ViewMaker:
  """Options of a view; the same for 2D images, volumes and video.

  Attributes:
    size: output grid. scale, ratio: of random resized crops (share of the area or volume, aspect).
    flip: probability of a flip along each axis; () flips the last one with 0.5.
    mean, std: [V] float tables in native units, by channel id. normalize: see `intensity.normalize`.
    channel_sampling: 'none' or 'hcs'.
  """

  size: tuple[int, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  normalize: str = 'corpus'
  scale: tuple[float, float] = (0.2, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: tuple[float, ...] = ()
  brightness: float = 0.0
  contrast: float = 0.0
  noise: float = 0.0
  channel_sampling: str = 'none'

  def __post_init__(self):
    choose('augment.channel_sampling', self.channel_sampling, channel_lib.CHANNEL_SAMPLING)
    choose('loader.normalize', self.normalize, intensity.NORMALIZE)
    if not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
      raise UserError(f'augment.scale {self.scale} must be two numbers with 0 < low <= high <= 1')
    if not (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1]):
      raise UserError(f'augment.ratio {self.ratio} must be two numbers with 0 < low <= high')
    if len(self.flip) not in (0, len(self.size)):
      raise UserError(f'augment.flip {self.flip} needs one probability for each of the {len(self.size)} axes')

  def plain(self, batch: dict) -> dict:
    """Normalised, not augmented; the grid is resized where it differs from `size`."""
    image = self._normalized(batch)
    if image.shape[1:-1] != self.size:
      full = jnp.asarray(image.shape[1:-1])
      resize = lambda x: crop_resize(x, jnp.zeros_like(full), full, self.size)
      image = jax.vmap(resize)(image)
    return dict(batch, image=image)

  def __call__(self, rng: jax.Array, batch: dict) -> dict:
    """An augmented view of the batch: image [B, *size, C] float32, other entries as they are.

    When channels are sampled, `channel_mask` [B, C] says which are shown and `channel_there` which there are.
    """
    crop_key, flip_key, jitter_key, channel_key = jax.random.split(rng, 4)
    image = self._normalized(batch)
    image = self._crop(crop_key, image)
    image = self._flip(flip_key, image)
    image = intensity.jitter(jitter_key, image, self.brightness, self.contrast, self.noise)
    out = dict(batch, image=image)
    if self.channel_sampling == 'hcs':
      mask = batch.get('channel_mask')
      mask = jnp.ones(batch['channels'].shape, bool) if mask is None else mask
      out['channel_there'] = mask
      out['channel_mask'] = channel_lib.hierarchical_channel_sampling(channel_key, mask)
    return out

  def _normalized(self, batch: dict) -> jax.Array:
    return intensity.normalize(batch['image'], batch['channels'], jnp.asarray(self.mean, jnp.float32),
                               jnp.asarray(self.std, jnp.float32), self.normalize)

  def _crop(self, rng: jax.Array, image: jax.Array) -> jax.Array:
    grid = image.shape[1:-1]
    if self.scale[0] == 1.0 and grid == self.size:
      return image
    keys = jax.random.split(rng, image.shape[0])
    start, length = jax.vmap(lambda k: random_box(k, grid, self.scale, self.ratio))(keys)
    return jax.vmap(lambda x, s, n: crop_resize(x, s, n, self.size))(image, start, length)

  def _flip(self, rng: jax.Array, image: jax.Array) -> jax.Array:
    rank = image.ndim - 2
    chances = self.flip or (0.0,) * (rank - 1) + (0.5,)
    for axis, chance in enumerate(chances):
      if chance:
        rng, key = jax.random.split(rng)
        turn = jax.random.bernoulli(key, chance, (image.shape[0],) + (1,) * (rank + 1))
        image = jnp.where(turn, jnp.flip(image, axis + 1), image)
    return image


def random_box(rng: jax.Array, grid: tuple[int, ...], scale: tuple[float, float],
               ratio: tuple[float, float], tries: int = 10) -> tuple[jax.Array, jax.Array]:
  """A random box of whole pixels: (start, length), both [rank] int32.

  The rule of torchvision's RandomResizedCrop: the area is a uniform share of the image, the aspect log-uniform; of
  ten draws the first that fits is taken, and if none fits a central box of the whole image with a valid aspect. In
  3D the volume is the share and each axis has its own log-uniform stretch.
  """
  rank = len(grid)
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
  side = jnp.minimum(size, jnp.round(size.min() * jnp.sqrt(ratio[1])))
  length = jnp.where(fits.any(), length[jnp.argmax(fits)], side)
  room = size - length
  start = jnp.where(fits.any(), jnp.floor(jax.random.uniform(place_key, (rank,)) * (room + 1)), jnp.floor(room / 2))
  return jnp.minimum(start, room).astype(jnp.int32), length.astype(jnp.int32)
