"""The view maker: one batch of stored images -> one batch of normalised, augmented images."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxmed.augment import channels as channel_lib
from jaxmed.augment import color as color_lib
from jaxmed.augment import geometry as geometry_lib
from jaxmed.augment import intensity, nnunet
from jaxmed.augment.geometry import Geometry
from jaxmed.augment.resample import crop_resize
from jaxmed.contracts import Batch, Views
from jaxmed.errors import UserError, choose

CHANNEL_VIEWS = ('shared', 'each')
TEACHER_CHANNELS = ('all', 'same')
FIRST, OTHER, LOCAL = 0, 1, 2  # kinds of view: the first global one, the other global ones, the local ones
CHANCES = ('rotate90', 'jitter_probability', 'grayscale', 'gamma_probability', 'bias_probability', 'blur_probability',
           'solarize', *nnunet.CHANCES)
RANGES = ('zoom', 'elastic', 'elastic_sigma', 'noise_range', 'soften', 'multiply', 'stretch', 'coarse', 'power')
FRAMES = ('image', 'channels', 'channel_mask', 'mask', 'boxes', 'extent')  # entries of a batch that views are made of
STRENGTHS = ('rotate', 'brightness', 'contrast', 'noise', 'stain', 'gamma', 'bias', 'blur')

Chance = Callable[[str], jax.Array | None]  # of an option in the view being made; None where it is off


@dataclasses.dataclass(frozen=True)
class ViewMaker:
  """Options of a view; the same for 2D images, volumes and video.

  Attributes:
    size: output grid. scale, ratio: of random resized crops (share of the area or volume, aspect).
    slice_scale, local_slice_scale: share of the first of three axes, of global and of local crops; scale and ratio are
      then of the plane of the other two. () for none; images of two axes have none.
    tiles: parts of a record along each axis: the first prod(tiles) views are these, and the others windows as large at
      random places, see `geometry.random_tile`; () draws crops by scale and ratio.
    flip: probability of a flip along each axis; () flips the last one with 0.5.
    rotate90: probability of one to three quarter turns in the last two axes, which must be equal. rotate: greatest
      angle of a rotation in that plane, in degrees.
    mean, std: [V] float tables in native units, by channel id. normalize: see `intensity.normalize`.
    brightness, contrast, noise: see `intensity.jitter`. jitter_probability: of brightness, contrast and color together.
    color: greatest change of saturation (a share) and of hue (of a circle; half the saturation's if not given) of RGB.
    grayscale: probability of RGB becoming gray. stain: strength of `color.jitter_stain`.
    gamma, bias, blur: see `intensity.random_gamma`, `random_bias_field`, `random_blur` (pixels), with probabilities.
    solarize: probability, see `intensity.solarize`.
    rotation, zoom, elastic, elastic_sigma: see `geometry.draw_warp`, in one resampling with the crop, with
      probabilities; rotation is one angle for every axis or one of each, () for `nnunet.rotation` of the size.
    noise_range, soften, multiply, stretch, coarse, power: ranges of the changes in `nnunet`, with probabilities.
    rgb: ids of red, green and blue in the vocabulary, maybe of several such triples one after the other, see
      `color.rgb_ids`; () leaves all colours as they are. top: the greatest value of the stored type, white.
    place: number of channel ids if every channel goes to the place of its id (an encoder of fixed channels), else 0.
    views: global views of a sample; with one and no local views a batch is just augmented, see `__call__`.
    local_views, local_size, local_scale: of the small crops that go with them.
    sample_sizes: sides of global views, of which each has its own, drawn alike; () for `size`. A view is made at `size`
      and then resized into the corner of its array, whose `sizes` [rank] are pixels; an axis that is shorter than the
      side keeps its length.
    gram_size: grid of global crops without changes of intensity, at another resolution (DINOv3's Gram teacher).
    channel_sampling: 'none', 'hcs', 'hcs_sample' (each sample its own), 'single' or 'diverse', see `channels`; the last
      one looks at a batch's entry 'similarity' [V, V], without which all channels are equally unlike.
    channel_temperature: of 'diverse'.
    channel_views: whether all views of a batch show the same channels ('shared') or
      each its own ('each'). teacher_channels: what the teacher sees meanwhile, 'all' channels or the 'same'.

  A probability is one number, or three: of the first global view, of the other global ones, of the local ones. Changes
  of intensity go in the order stain, colour, contrast, brightness, noise, gamma, bias field, grayscale, blur, solarize,
  then those of `nnunet.change`.
  """

  size: tuple[int, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  normalize: str = 'corpus'
  place: int = 0
  scale: tuple[float, float] = (0.2, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  slice_scale: tuple[float, ...] = ()
  tiles: tuple[int, ...] = ()
  flip: tuple[float, ...] = ()
  rotate90: float | tuple[float, ...] = 0.0
  rotate: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  noise: float = 0.0
  jitter_probability: float | tuple[float, ...] = 1.0
  color: float | tuple[float, ...] = ()
  grayscale: float | tuple[float, ...] = 0.0
  stain: float = 0.0
  gamma: float = 0.0
  gamma_probability: float | tuple[float, ...] = 1.0
  bias: float = 0.0
  bias_probability: float | tuple[float, ...] = 1.0
  blur: float = 0.0
  blur_probability: float | tuple[float, ...] = 0.5
  solarize: float | tuple[float, ...] = 0.0
  rotation: tuple[float, ...] = ()
  rotation_probability: float | tuple[float, ...] = 0.0
  zoom: tuple[float, float] = (0.7, 1.4)
  zoom_probability: float | tuple[float, ...] = 0.0
  elastic: tuple[float, float] = (0.0, 4.0)
  elastic_sigma: tuple[float, float] = (0.05, 0.2)
  elastic_probability: float | tuple[float, ...] = 0.0
  noise_range: tuple[float, float] = (0.0, 0.1)
  noise_probability: float | tuple[float, ...] = 0.0
  soften: tuple[float, float] = (0.5, 1.0)
  soften_probability: float | tuple[float, ...] = 0.0
  multiply: tuple[float, float] = (0.75, 1.25)
  multiply_probability: float | tuple[float, ...] = 0.0
  stretch: tuple[float, float] = (0.75, 1.25)
  stretch_probability: float | tuple[float, ...] = 0.0
  coarse: tuple[float, float] = (0.5, 1.0)
  coarse_probability: float | tuple[float, ...] = 0.0
  power: tuple[float, float] = (0.7, 1.5)
  power_probability: float | tuple[float, ...] = 0.0
  inverted_power_probability: float | tuple[float, ...] = 0.0
  views: int = 1
  local_views: int = 0
  local_size: tuple[int, ...] = ()
  local_scale: tuple[float, float] = (0.05, 0.4)
  local_slice_scale: tuple[float, ...] = ()
  sample_sizes: tuple[int, ...] = ()
  gram_size: tuple[int, ...] = ()
  channel_sampling: str = 'none'
  channel_temperature: float = 0.1
  channel_views: str = 'each'
  teacher_channels: str = 'all'
  rgb: tuple[int, ...] = ()
  top: float = 255.0

  def __post_init__(self):
    choose('augment.channel_sampling', self.channel_sampling, channel_lib.CHANNEL_SAMPLING)
    choose('augment.channel_views', self.channel_views, CHANNEL_VIEWS)
    choose('augment.teacher_channels', self.teacher_channels, TEACHER_CHANNELS)
    for name in ('scale', 'local_scale', 'slice_scale', 'local_slice_scale'):
      value = vars(self)[name]
      if (value or 'slice' not in name) and not (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
        raise UserError(f'augment.{name} {value} must be two numbers with 0 < low <= high <= 1')
    if not (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1]):
      raise UserError(f'augment.ratio {self.ratio} must be two numbers with 0 < low <= high')
    if len(self.flip) not in (0, len(self.size)):
      raise UserError(f'augment.flip {self.flip} needs one probability for each of the {len(self.size)} axes')
    if self.views < 1 or self.local_views < 0:
      raise UserError(f'augment.views {self.views} must be at least 1, and local_views {self.local_views} at least 0')
    if self.tiles and (len(self.tiles) != len(self.size) or min(self.tiles) < 1 or self.local_views
                       or self.views <= math.prod(self.tiles)):
      raise UserError(f'augment.tiles {self.tiles} needs a number for each of the {len(self.size)} axes, more views '
                      f'than the {math.prod(self.tiles)} tiles (augment.views is {self.views}) and no local views')
    self._check_changes()

  def _check_changes(self):
    """Options of rotations, intensity and colour."""
    mode = intensity.parse_mode(self.normalize)[0]
    for name in CHANCES:
      value = _numbers(vars(self)[name])
      if len(value) not in (1, 3) or not all(0 <= p <= 1 for p in value):
        raise UserError(f'augment.{name} {vars(self)[name]} must be a probability, or three: of the first global '
                        'view, of the other global views, of the local views')
    if self.channel_temperature <= 0:
      raise UserError(f'augment.channel_temperature {self.channel_temperature} must be above 0')
    for name in RANGES:
      value = vars(self)[name]
      if len(value) != 2 or not 0 <= value[0] <= value[1]:
        raise UserError(f'augment.{name} {value} must be two numbers with 0 <= low <= high')
    for name, most in (('zoom', math.inf), ('coarse', 1.0), ('soften', 1.0)):
      value = vars(self)[name]
      if not 0 < value[0] <= value[1] <= most:
        raise UserError(f'augment.{name} {value} must lie above 0' + (' and at most 1' if most == 1 else ''))
    if self.gram_size and any(_numbers(self.elastic_probability)):
      raise UserError('augment.elastic_probability deforms views of one resolution: leave augment.gram_size out')
    if len(self.rotation) not in (0, 1, len(self.size)):
      raise UserError(f'augment.rotation {self.rotation} takes one angle, or one for each of the {len(self.size)} axes')
    for name in STRENGTHS:
      if vars(self)[name] < 0:
        raise UserError(f'augment.{name} {vars(self)[name]} must be at least 0')
    if len(_numbers(self.color)) > 2 or min(self._color) < 0 or self._color[1] > 0.5:
      raise UserError(f'augment.color {self.color} must be the change of saturation, or that and the change of hue, '
                      'which is at most 0.5 of a circle')
    for size in (self.size, self.local_size, self.gram_size):
      if any(_numbers(self.rotate90)) and size and size[-1] != size[-2]:
        raise UserError(f'augment.rotate90 needs views with two equal last axes, not {size}')
    for name in ('color', 'grayscale', 'stain'):
      if self.rgb and any(_numbers(vars(self)[name])) and mode not in intensity.COLORED:
        raise UserError(f"augment.{name} works on stored colours: it needs loader.normalize 'corpus' or 'full', not "
                        f'{self.normalize!r}')

  @property
  def _color(self) -> tuple[float, float]:
    """Greatest change of saturation and of hue."""
    given = _numbers(self.color) or (0.0,)
    return given[0], given[1] if len(given) > 1 else given[0] / 2

  @property
  def many(self) -> bool:
    """Whether a batch becomes groups of views."""
    return self.views > 1 or self.local_views > 0

  def plain(self, batch: Batch) -> Batch:
    """Normalised, not augmented; the grid is resized where it differs from `size`, and masks and boxes with it."""
    if _windowed(self, batch):
      return _by_frame(self.plain, batch)
    image, own = self._normalized(batch), _extent(batch)
    count, grid = len(image), image.shape[1:-1]
    whole = Geometry() if own is None else Geometry(jnp.zeros_like(own), own)
    rest = {'view_box': whole.view_box(count, grid)} | geometry_lib.follow(whole, batch, grid, self.size)
    image = geometry_lib.apply_image(whole, image, self.size)
    return cast(Batch, self._placed({k: v for k, v in batch.items() if k != 'extent'} | rest | {'image': image}))

  def held_out(self, rng: jax.Array, batch: Batch) -> Batch:
    """What a held-out loss is measured on: the plain batch, or, where a method needs several views, views by `rng`."""
    return self(rng, batch) if self.many else self.plain(batch)

  def __call__(self, rng: jax.Array, batch: Batch) -> Batch:
    """Augmented views of the batch; `mask` and `boxes` follow their image, other entries stay as they are.

    One view: image [B, *size, C] float32, channels [B, C], view_box [B, 2 * rank] float32 (start and end of the view in
    pixels of the loaded array, before flips and turns) and, where there are flips, view_flip [B, rank] bool. When
    channels are sampled, `channel_mask` [B, C] says which are shown and `channel_there` which there are. With
    sample_sizes, sizes [B, rank].
    Many views: instead of those the groups 'global' and, where asked for, 'local' and 'gram', each a dict with image
    [B, V, *size, C], channels [B, V, C], channel_mask [B, V, C] where something is missing and, when channels are
    sampled, teacher_mask [B, V, C]; the global one with sizes [B, V, rank], it and the local one with view_box and
    view_flip.
    Windows, images [B, K, *grid, C]: each view is drawn once for all K frames; every entry has the axis K after the
    first, those of groups too: image [B, K, V, *size, C].
    """
    if _windowed(self, batch):
      return _by_frame(lambda frame: self(rng, frame), batch)
    image = self._normalized(batch)
    if not self.many:
      view_key, channel_key = jax.random.split(rng)
      chance = lambda name: self._chance(name, jnp.asarray(FIRST), (FIRST,))
      out = dict(batch, **self._view(view_key, image, batch, chance, self.size, self.scale, self.slice_scale)[0])
      out = self._sized(rng, out)
      if self.channel_sampling != 'none':
        out['channel_there'] = _there(batch)
        out['channel_mask'] = self._sampled(channel_key, batch)
      return cast(Batch, self._placed({k: v for k, v in out.items() if k not in ('similarity', 'extent')}))
    keys = jax.random.split(rng, 3)
    if self._alone:  # nobody looks at the other channels, so that views have a single slot
      return dataclasses.replace(self, channel_sampling='none')(rng, self._one_channel(keys[1], batch))
    rest: dict[str, Any] = {k: v for k, v in batch.items() if k not in (*FRAMES, 'similarity')}
    kinds = (FIRST, *(OTHER,) * (self.views - 1))
    views, gram = self._views(keys[0], image, batch, kinds, self.size, self.scale, self.slice_scale)
    rest['global'] = self._sized(rng, self._group(keys[1], batch, views, 0))
    if self.gram_size:
      rest['gram'] = self._group(keys[1], batch, {'image': gram}, 0, sample=False)
    if self.local_views:
      kinds = (LOCAL,) * self.local_views
      small = self._views(keys[2], image, batch, kinds, self.local_size, self.local_scale,
                          self.local_slice_scale)[0]
      rest['local'] = self._group(keys[1], batch, small, self.views)
    return cast(Batch, rest)

  def _sized(self, rng: jax.Array, group: Any) -> Any:
    """Views [..., *size, C], with `sample_sizes` resized into the corner of their arrays."""
    if not self.sample_sizes:
      return group
    image, rank = group['image'], len(self.size)
    lead = image.shape[: -rank - 1]
    place = jax.random.randint(jax.random.fold_in(rng, 3), lead, 0, len(self.sample_sizes))
    sizes = jnp.minimum(jnp.asarray(self.sample_sizes)[place][..., None], jnp.asarray(self.size))  # [..., rank]
    start, whole = jnp.zeros(rank, jnp.int32), jnp.asarray(self.size)
    resize = lambda x, own: crop_resize(x, start, whole, self.size, own)
    for _ in lead:
      resize = jax.vmap(resize)
    moved = geometry_lib.in_corner(group, sizes, self.size)
    return group | moved | {'image': resize(image, sizes), 'sizes': sizes}

  def _views(self, rng: jax.Array, image: jax.Array, batch: Batch, kinds: tuple[int, ...], size: tuple[int, ...],
             scale: tuple[float, float], slices: tuple[float, ...]) -> tuple[dict[str, jax.Array], jax.Array]:
    """A view of each of `kinds` of every image, [B, V, ...] by entry, and the same crops for the Gram teacher."""
    def make(key, kind, place):
      return self._view(key, image, batch, lambda name: self._chance(name, kind, kinds), size, scale, slices, place)

    places = jnp.arange(len(kinds))
    return jax.vmap(make, out_axes=1)(jax.random.split(rng, len(kinds)), jnp.asarray(kinds), places)

  def _chance(self, name: str, kind: jax.Array, kinds: tuple[int, ...]) -> jax.Array | None:
    """Probability of an option in a view of this kind, one of `kinds`; None if it is off in all of these."""
    value = _numbers(vars(self)[name])
    each = value * 3 if len(value) == 1 else value
    return jnp.asarray(each)[kind] if any(each[k] for k in kinds) else None

  def _view(self, rng: jax.Array, image: jax.Array, batch: Batch, chance: Chance, size: tuple[int, ...],
            scale: tuple[float, float], slices: tuple[float, ...],
            place: jax.Array | None = None) -> tuple[dict[str, jax.Array], jax.Array]:
    """One view, image [B, *size, C] and what follows it, and its crop at `gram_size` without changes of intensity.

    Without a `gram_size` the second is the image. `place` is that of the view among all, which tiles go by.
    """
    crop_key, turn_key, change_key = jax.random.split(rng, 3)
    count, grid = len(image), image.shape[1:-1]
    geometry = geometry_lib.draw(crop_key, turn_key, count, grid, size, scale, self.ratio, self.flip,
                                 chance('rotate90'), self.rotate, _extent(batch), slices)
    if self.tiles and place is not None:
      start, length = geometry_lib.random_tile(jax.random.fold_in(crop_key, 1), place, count, grid, self.tiles)
      geometry = dataclasses.replace(geometry, start=start, length=length)
    geometry = dataclasses.replace(geometry, **self._warp(jax.random.fold_in(rng, 1), count, size, chance),
                                   extent=_extent(batch))
    image, plain = geometry_lib.apply_image(geometry, image, size), image
    view = {'image': self._change(change_key, image, batch, chance), 'view_box': geometry.view_box(count, grid)}
    view |= geometry_lib.follow(geometry, batch, grid, size)
    if not self.gram_size or size != self.size:
      return view, view['image']
    return view, geometry_lib.apply_image(geometry, plain, self.gram_size)

  def _warp(self, rng: jax.Array, count: int, size: tuple[int, ...], chance: Chance) -> dict[str, jax.Array]:
    """What is drawn of a geometry for one resampling; {} for nothing."""
    turn, zoom, elastic = (chance(f'{name}_probability') for name in ('rotation', 'zoom', 'elastic'))
    angles = self.rotation * len(size) if len(self.rotation) == 1 else self.rotation or nnunet.rotation(size)
    return geometry_lib.draw_warp(
        rng, count, size, None if turn is None else (angles, turn), None if zoom is None else (self.zoom, zoom),
        None if elastic is None else (self.elastic, self.elastic_sigma, elastic))

  def _change(self, rng: jax.Array, image: jax.Array, batch: Batch, chance: Chance) -> jax.Array:
    """Changes of colour and intensity, in the order of the class's docstring."""
    keys = jax.random.split(rng, 9)
    recolor = lambda image, change: self._recolor(image, batch, change)
    if self.stain:
      image = recolor(image, lambda x: color_lib.jitter_stain(keys[1], x, self.stain))
    strength, jittered = (0.0, 0.0), None
    if (probability := chance('jitter_probability')) is not None:
      strength, jittered = (self.brightness, self.contrast), intensity.chosen(keys[0], probability, len(image))
      if any(self._color):
        image = recolor(image, lambda x: color_lib.jitter(keys[2], x, *self._color, jittered))
    image = intensity.jitter(keys[3], image, *strength, self.noise, jittered)
    image = self._sometimes(keys[4], image, 'gamma', chance, intensity.random_gamma)
    image = self._sometimes(keys[5], image, 'bias', chance, intensity.random_bias_field)
    if (probability := chance('grayscale')) is not None:
      image = intensity.sometimes(keys[6], image, probability, lambda _, x: recolor(x, color_lib.grayscale))
    image = self._sometimes(keys[7], image, 'blur', chance, intensity.random_blur)
    if (probability := chance('solarize')) is not None:
      image = intensity.sometimes(keys[8], image, probability, lambda _, x: intensity.solarize(x))
    given = {name: chance(f'{name}_probability') for name in nnunet.CHANGES}
    chances = {name: probability for name, probability in given.items() if probability is not None}
    ranges = {name: vars(self)['noise_range' if name == 'noise' else name] for name in nnunet.RANGES}
    return nnunet.change(jax.random.fold_in(rng, 1), image, chances, ranges) if chances else image

  def _sometimes(self, rng: jax.Array, image: jax.Array, name: str, chance: Chance, change: Callable) -> jax.Array:
    """change(key, image, strength) with the probability of the option `name`."""
    strength, probability = vars(self)[name], chance(f'{name}_probability')
    if not strength or probability is None:
      return image
    return intensity.sometimes(rng, image, probability, lambda key, x: change(key, x, strength))

  def _recolor(self, image: jax.Array, batch: Batch, change: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies a change of planes [3, B, *grid] in 0 .. 1 to each triple of colours that a sample has."""
    if not self.rgb:
      return image
    affine = intensity.stored_range(batch['channels'], *self._tables(), self.normalize, self.top)
    for i in range(0, len(self.rgb), 3):
      slots = color_lib.rgb_slots(batch['channels'], _there(batch), self.rgb[i : i + 3])
      image = color_lib.change_rgb(image, slots, *affine, change)
    return image

  def _group(self, rng: jax.Array, batch: Batch, view: dict[str, jax.Array], first: int, sample: bool = True) -> Views:
    """Views, [B, V, ...] by entry, with their channels; `first` is the place of the first one among all views."""
    count = view['image'].shape[1]
    spread = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))
    there = _there(batch)
    masks = {'channel_mask': spread(there)} if 'channel_mask' in batch else {}
    if self.channel_sampling != 'none' and sample:
      draw = lambda i: self._sampled(jax.random.fold_in(rng, i), batch)
      each = self.channel_views == 'each'
      shown = jax.vmap(draw, out_axes=1)(jnp.arange(first, first + count)) if each else spread(draw(0))
      masks = {'channel_mask': shown, 'teacher_mask': spread(there) if self.teacher_channels == 'all' else shown}
    group: Any = view | {'channels': spread(batch['channels'])} | masks
    if not self.place:
      return group
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    split = lambda x: x.reshape(-1, count, *x.shape[1:])
    placed = self._placed({k: merge(v) for k, v in group.items()})
    return cast(Views, {k: split(v) for k, v in placed.items()})

  def _sampled(self, rng: jax.Array, batch: Batch) -> jax.Array:
    """The channels [B, C] bool that a view shows."""
    there = _there(batch)
    if self.channel_sampling == 'hcs':
      return channel_lib.hierarchical_channel_sampling(rng, there)
    if self.channel_sampling == 'hcs_sample':
      return channel_lib.sampled_each(rng, there)
    if self.channel_sampling == 'single':
      return channel_lib.single_channel(rng, there)
    similarity = batch.get('similarity', jnp.eye(len(self.mean)))
    return channel_lib.diverse_channel_sampling(rng, there, batch['channels'], similarity, self.channel_temperature)

  @property
  def _alone(self) -> bool:
    same = self.channel_views == 'shared' and self.teacher_channels == 'same'
    return self.channel_sampling == 'single' and same and not self.place

  def _one_channel(self, rng: jax.Array, batch: Batch) -> Any:
    """A batch of one channel of each sample: image [B, *grid, 1], channels [B, 1]."""
    slot = jnp.argmax(self._sampled(rng, batch), axis=1, keepdims=True)  # [B, 1]
    image = batch['image']
    own = jnp.take_along_axis(image, slot.reshape(-1, *[1] * (image.ndim - 1)), axis=-1)
    rest: dict[str, Any] = {k: v for k, v in batch.items() if k != 'channel_mask'}
    return rest | {'image': own, 'channels': jnp.take_along_axis(batch['channels'], slot, axis=1)}

  def _placed(self, batch: Any) -> dict:
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

  def _normalized(self, batch: Batch) -> jax.Array:
    own, grid = _extent(batch), batch['image'].shape[1:-1]
    within = None if own is None else geometry_lib.filled(own, grid)
    return intensity.normalize(batch['image'], batch['channels'], *self._tables(), self.normalize, within)

  def _tables(self) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
  """An option that is one number or several, as a tuple."""
  return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _extent(batch: Batch) -> jax.Array | None:
  """Pixels [B, rank] that each image fills of its array, at least one (padding rows have none); None for all."""
  return jnp.maximum(batch['extent'], 1) if 'extent' in batch else None


def _there(batch: Batch) -> jax.Array:
  """[B, C] bool: the channels that each sample has."""
  mask = batch.get('channel_mask')
  return jnp.ones(batch['channels'].shape, bool) if mask is None else mask


def _windowed(view: ViewMaker, batch: Batch) -> bool:
  """Whether images are windows [B, K, *grid, C]."""
  return batch['image'].ndim == len(view.size) + 3


def _by_frame(make: Callable[[Any], Any], batch: Batch) -> Batch:
  """`make` of each frame of windows, entries with the axis K after the first; it draws the same for all frames."""
  known: Any = batch
  frames = {k: v for k, v in known.items() if k in FRAMES}
  shared = {k: v for k, v in known.items() if k == 'similarity'}
  made = jax.vmap(lambda frame: make(frame | shared), in_axes=1, out_axes=1)(frames)
  made.pop('similarity', None)
  return cast(Batch, {k: v for k, v in known.items() if k != 'similarity'} | made)
