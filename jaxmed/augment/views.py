"""The view maker: one batch of stored images -> one batch of normalised, augmented images."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmed.augment import channels as channel_lib
from jaxmed.augment import intensity
from jaxmed.augment.resample import crop_resize
from jaxmed.errors import UserError, choose


CHANNEL_VIEWS = ('shared', 'each')
TEACHER_CHANNELS = ('all', 'same')


@dataclasses.dataclass(frozen=True)
class ViewMaker:
  """Options of a view; the same for 2D images, volumes and video.

  Attributes:
    size: output grid. scale, ratio: of random resized crops (share of the area or volume, aspect).
    flip: probability of a flip along each axis; () flips the last one with 0.5.
    mean, std: [V] float tables in native units, by channel id. normalize: see `intensity.normalize`.
    place: number of channel ids if every channel goes to the place of its id (an encoder of fixed channels), else 0.
    views: global views of a sample; with one and no local views a batch is just augmented, see `__call__`.
    local_views, local_size, local_scale: of the small crops that go with them.
    gram_size: grid of global crops without changes of intensity, at another resolution (DINOv3's Gram teacher).
    channel_sampling: 'none' or 'hcs'. channel_views: whether all views of a batch show the same channels ('shared') or
      each its own ('each'). teacher_channels: what the teacher sees meanwhile, 'all' channels or the 'same'.
  """

  size: tuple[int, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  normalize: str = 'corpus'
  place: int = 0
  scale: tuple[float, float] = (0.2, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: tuple[float, ...] = ()
  brightness: float = 0.0
  contrast: float = 0.0
  noise: float = 0.0
  views: int = 1
  local_views: int = 0
  local_size: tuple[int, ...] = ()
  local_scale: tuple[float, float] = (0.05, 0.4)
  gram_size: tuple[int, ...] = ()
  channel_sampling: str = 'none'
  channel_views: str = 'each'
  teacher_channels: str = 'all'

  def __post_init__(self):
    choose('augment.channel_sampling', self.channel_sampling, channel_lib.CHANNEL_SAMPLING)
    choose('augment.channel_views', self.channel_views, CHANNEL_VIEWS)
    choose('augment.teacher_channels', self.teacher_channels, TEACHER_CHANNELS)
    choose('loader.normalize', self.normalize, intensity.NORMALIZE)
    for name in ('scale', 'local_scale'):
      value = getattr(self, name)
      if not (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
        raise UserError(f'augment.{name} {value} must be two numbers with 0 < low <= high <= 1')
    if not (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1]):
      raise UserError(f'augment.ratio {self.ratio} must be two numbers with 0 < low <= high')
    if len(self.flip) not in (0, len(self.size)):
      raise UserError(f'augment.flip {self.flip} needs one probability for each of the {len(self.size)} axes')
    if self.views < 1 or self.local_views < 0:
      raise UserError(f'augment.views {self.views} must be at least 1, and local_views {self.local_views} at least 0')

  @property
  def many(self) -> bool:
    """Whether a batch becomes groups of views."""
    return self.views > 1 or self.local_views > 0

  def plain(self, batch: dict) -> dict:
    """Normalised, not augmented; the grid is resized where it differs from `size`."""
    image = self._normalized(batch)
    if image.shape[1:-1] != self.size:
      full = jnp.asarray(image.shape[1:-1])
      resize = lambda x: crop_resize(x, jnp.zeros_like(full), full, self.size)
      image = jax.vmap(resize)(image)
    return self._placed(dict(batch, image=image))

  def held_out(self, rng: jax.Array, batch: dict) -> dict:
    """What a held-out loss is measured on: the plain batch, or, where a method needs several views, views by `rng`."""
    return self(rng, batch) if self.many else self.plain(batch)

  def __call__(self, rng: jax.Array, batch: dict) -> dict:
    """Augmented views of the batch; entries that are not images stay as they are.

    One view: image [B, *size, C] float32, channels [B, C]. When channels are sampled, `channel_mask` [B, C] says which
    are shown and `channel_there` which there are.
    Many views: instead of those the groups 'global' and, where asked for, 'local' and 'gram', each a dict with image
    [B, V, *size, C], channels [B, V, C], channel_mask [B, V, C] where something is missing and, when channels are
    sampled, teacher_mask [B, V, C].
    """
    image = self._normalized(batch)
    if not self.many:
      view_key, channel_key = jax.random.split(rng)
      out = dict(batch, image=self._view(view_key, image, self.size, self.scale)[0])
      if self.channel_sampling == 'hcs':
        out['channel_there'] = there = _there(batch)
        out['channel_mask'] = channel_lib.hierarchical_channel_sampling(channel_key, there)
      return self._placed(out)
    keys = jax.random.split(rng, 3)
    rest = {k: v for k, v in batch.items() if k not in ('image', 'channels', 'channel_mask')}
    images, gram = self._views(keys[0], image, self.views, self.size, self.scale)
    rest['global'] = self._group(keys[1], batch, images, 0)
    if self.gram_size:
      rest['gram'] = self._group(keys[1], batch, gram, 0, sample=False)
    if self.local_views:
      small = self._views(keys[2], image, self.local_views, self.local_size, self.local_scale)[0]
      rest['local'] = self._group(keys[1], batch, small, self.views)
    return rest

  def _views(self, rng: jax.Array, image: jax.Array, count: int, size: tuple[int, ...],
             scale: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """`count` views [B, V, *size, C] of every image, and the same crops for the Gram teacher."""
    keys = jax.random.split(rng, count)
    return jax.vmap(lambda key: self._view(key, image, size, scale), out_axes=1)(keys)

  def _view(self, rng: jax.Array, image: jax.Array, size: tuple[int, ...],
            scale: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """One view [B, *size, C], and its crop at `gram_size` without changes of intensity (the view itself without one)."""
    crop_key, flip_key, jitter_key = jax.random.split(rng, 3)
    box = self._box(crop_key, image, size, scale)
    crop = lambda to: self._flip(flip_key, self._crop(image, box, to))
    view = intensity.jitter(jitter_key, crop(size), self.brightness, self.contrast, self.noise)
    return view, crop(self.gram_size) if self.gram_size and size == self.size else view

  def _group(self, rng: jax.Array, batch: dict, image: jax.Array, first: int, sample: bool = True) -> dict:
    """Views [B, V, *size, C] with their channels; `first` is the place of the first one among all views."""
    count = image.shape[1]
    spread = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))
    there = _there(batch)
    masks = {'channel_mask': spread(there)} if 'channel_mask' in batch else {}
    if self.channel_sampling == 'hcs' and sample:
      draw = lambda i: channel_lib.hierarchical_channel_sampling(jax.random.fold_in(rng, i), there)
      each = self.channel_views == 'each'
      shown = jax.vmap(draw, out_axes=1)(jnp.arange(first, first + count)) if each else spread(draw(0))
      masks = {'channel_mask': shown, 'teacher_mask': spread(there) if self.teacher_channels == 'all' else shown}
    group = {'image': image, 'channels': spread(batch['channels'])} | masks
    if not self.place:
      return group
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    split = lambda x: x.reshape(-1, count, *x.shape[1:])
    placed = self._placed({k: merge(v) for k, v in group.items()})
    return {k: split(v) for k, v in placed.items()}

  def _placed(self, batch: dict) -> dict:
    """The batch with each channel at the place of its id, where the encoder takes fixed channels."""
    if not self.place:
      return batch
    channels, shown = batch['channels'], _there(batch)
    exists = batch.get('teacher_mask', batch.get('channel_there', shown))
    masks = {'channel_mask': shown} | {k: batch[k] for k in ('channel_there', 'teacher_mask') if k in batch}
    masks = {k: channel_lib.mask_by_name(channels, v, self.place) for k, v in masks.items()}
    return batch | masks | {
        'image': channel_lib.by_name(batch['image'], channels, exists, self.place),
        'channels': jnp.broadcast_to(jnp.arange(self.place), (channels.shape[0], self.place))}

  def _normalized(self, batch: dict) -> jax.Array:
    return intensity.normalize(batch['image'], batch['channels'], jnp.asarray(self.mean, jnp.float32),
                               jnp.asarray(self.std, jnp.float32), self.normalize)

  def _box(self, rng: jax.Array, image: jax.Array, size: tuple[int, ...], scale: tuple[float, float]):
    """A random box for every image, (start, length), both [B, rank]; None for the whole one at its own size."""
    grid = image.shape[1:-1]
    if scale[0] == 1.0 and grid == size:
      return None
    keys = jax.random.split(rng, image.shape[0])
    return jax.vmap(lambda key: random_box(key, grid, scale, self.ratio))(keys)

  def _crop(self, image: jax.Array, box, size: tuple[int, ...]) -> jax.Array:
    if box is None and image.shape[1:-1] == size:
      return image
    if box is None:
      full = jnp.broadcast_to(jnp.asarray(image.shape[1:-1]), (image.shape[0], len(size)))
      box = jnp.zeros_like(full), full
    return jax.vmap(lambda x, s, n: crop_resize(x, s, n, size))(image, *box)

  def _flip(self, rng: jax.Array, image: jax.Array) -> jax.Array:
    rank = image.ndim - 2
    chances = self.flip or (0.0,) * (rank - 1) + (0.5,)
    for axis, chance in enumerate(chances):
      if chance:
        rng, key = jax.random.split(rng)
        turn = jax.random.bernoulli(key, chance, (image.shape[0],) + (1,) * (rank + 1))
        image = jnp.where(turn, jnp.flip(image, axis + 1), image)
    return image


def _there(batch: dict) -> jax.Array:
  """[B, C] bool: the channels that each sample has."""
  mask = batch.get('channel_mask')
  return jnp.ones(batch['channels'].shape, bool) if mask is None else mask


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
