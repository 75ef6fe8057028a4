"""A trained segmentation network with all that it needs to take whole images as they are stored: what
`jaxmed.load_segmenter` returns."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed import tiles
from jaxmed.augment import intensity
from jaxmed.augment.views import ViewMaker
from jaxmed.data.readers.spacing import resampled
from jaxmed.data.resize import resize
from jaxmed.encoder import Encoder
from jaxmed.errors import UserError, choose

SIDES = ('left', 'right')


@dataclasses.dataclass(frozen=True)
class Segmenter:
  """A network, its weights, and how stored intensities become its input and its logits a mask.

  Attributes:
    objective: of method segment: encoder, decoder, values and names of the classes.
    params: {'encoder', 'decoder'}.
    channels: the vocabulary in order, [{'name', 'mean', 'std'}] in native units.
    normalize: see `augment.intensity.normalize`. Its statistics are those of the whole image.
    tile: pixels of a tile, loader.load_size of a run that read parts of records (loader.fit=crop); () where the network
      saw whole records resized, and sees whole images resized.
    spacing: mm along each axis that all training records had; () where they differ or are unknown.
    flips: axes along which training mirrored images.
    info: what else is known of the run (method, steps, ...), plain data.
  """

  objective: Any
  params: Any
  channels: tuple[dict[str, Any], ...]
  normalize: str = 'corpus'
  tile: tuple[int, ...] = ()
  spacing: tuple[float, ...] = ()
  flips: tuple[int, ...] = ()
  info: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def values(self) -> tuple[int, ...]:
    """The value of each class in masks, rising."""
    return tuple(self.objective.values)

  @property
  def names(self) -> tuple[str, ...]:
    """The name of each class."""
    return tuple(self.objective.names) or tuple(map(str, self.values))

  @property
  def image_size(self) -> tuple[int, ...]:
    """The grid of the network."""
    return self.objective.encoder.image_size

  @property
  def rank(self) -> int:
    """Axes of an image."""
    return len(self.image_size)

  @property
  def encoder(self) -> Encoder:
    """The encoder alone."""
    return Encoder(self.objective.encoder, self.params['encoder'], self.channels, self.normalize, info=self.info)

  @property
  def mirrored(self) -> tuple[int, ...]:
    """The axes that prediction mirrors by default: those of training, none where a class has a side in its name."""
    sided = any(side in name.lower() for name in self.names for side in SIDES)
    return () if sided else self.flips

  def logits(self, image: np.ndarray, channels: Sequence[str] | None = None, *, step: float = 0.5,
             flips: Sequence[int] | None = None, batch_size: int = 1,
             devices: Sequence[Any] | None = None) -> Iterator[np.ndarray]:
    """Yields the logits of a whole image on its own grid, a slice [*size[1:], K] float32 of its first axis at a time.

    Args:
      image: [*size, C] in stored intensities, of any number type, at the spacing of training.
      channels: the C names, in the order of the last axis; by default the vocabulary's first C.
      step: largest distance of two tiles, as a share of their size. flips: axes to mirror, by default `mirrored`.
      batch_size: tiles in one pass on each device. devices: all by default.
    Raises:
      UserError: an image of another rank, or channels that the network does not take.
    """
    image = self._checked(image)
    ids = self.encoder.channel_ids(channels, image.shape[-1])
    flips = self.mirrored if flips is None else tuple(flips)
    network = self._network(ids, statistics(image, self.normalize, self.channels, ids))
    ask: dict[str, Any] = dict(step=step, flips=flips, devices=devices)
    if self.tile:
      yield from tiles.slices(network, image, self.tile, batch_size=batch_size, **ask)
      return
    small = resize(image, self.image_size)
    found = tiles.slices(network, small, self.image_size, **ask)
    yield from tiles.resampled(found, len(small), image.shape[:-1])

  def predict(self, image: np.ndarray, channels: Sequence[str] | None = None, **options: Any) -> np.ndarray:
    """The mask [*size] int32 of a whole image [*size, C], in stored values of classes; arguments as of `logits`."""
    return self.decided(self.logits(image, channels, **options))

  def mask_of(self, record: Mapping[str, Any], name: str = '', **options: Any) -> np.ndarray:
    """The mask [*size] int32 of a record on the grid of its image.

    The image is brought to the spacing of training, where that is known; logits go back to the grid of the image, and
    the largest one decides there.

    Args:
      record: with image, channels and spacing, as a source gives it. name: of it, in errors. options: of `logits`.
    Raises:
      UserError: a spacing that is unknown where training had one, and as of `logits`.
    """
    size, spacing = record['image'].shape[:-1], record['spacing']
    try:
      moved, scales = dict(record), None
      if self.spacing and len(size) == self.rank:
        if not spacing:
          raise UserError(f'spacing is not known, and the run was trained on pixels of '
                          f'{", ".join(f"{s:g}" for s in self.spacing)} mm: expected an image that says it')
        moved = resampled(moved, self.spacing)
        scales = [None if n == s else s / n for n, s in zip(moved['spacing'], spacing, strict=True)]
      logits = self.logits(moved['image'], moved['channels'], **options)
      if scales and any(scales):
        logits = tiles.resampled(logits, len(moved['image']), size, scales)
      return self.decided(logits)
    except UserError as e:
      raise UserError(f'{name}: {e}' if name else str(e)) from e

  def decided(self, logits: Iterator[np.ndarray]) -> np.ndarray:
    """The mask [*size] int32 of slices of logits: the value of the class with the largest one.

    Slices are held in the smallest type while sums of tiles take memory, too.
    """
    small = np.array(self.values, np.result_type(*map(np.min_scalar_type, self.values)))
    return np.stack([small[x.argmax(axis=-1)] for x in logits], dtype=np.int32)

  def _checked(self, image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != self.rank + 1:
      form = '[D, H, W, C]' if self.rank == 3 else '[H, W, C]'
      raise UserError(f'an image of shape {list(image.shape)}: the run takes {form}, {self.rank} axes and channels')
    return image

  def _network(self, ids: np.ndarray, stats: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Logits [B, *tile, K] of tiles [B, *tile, C] of stored intensities."""
    view = dataclasses.replace(self.encoder.view(self.image_size), normalize='none')
    return lambda x: _logits(self.objective, view, self.params, x, ids, stats)


def _forward(objective: Any, view: ViewMaker, params: Any, x: jax.Array, ids: np.ndarray,
             stats: np.ndarray) -> jax.Array:
  low, high, mean, std = stats
  x = (jnp.clip(x, low, high) - mean) / std
  batch = view.plain({'image': x, 'channels': jnp.broadcast_to(ids, (len(x), len(ids)))})
  logits = objective.logits({'params': params}, batch)[0][0]
  return jax.image.resize(logits, (*x.shape[:-1], logits.shape[-1]), 'linear')


_logits = jax.jit(_forward, static_argnums=(0, 1))


def statistics(image: np.ndarray, mode: str, channels: Sequence[dict[str, Any]],
               ids: Sequence[int] | np.ndarray) -> np.ndarray:
  """What normalises each channel of a whole image [*size, C], [4, C] float32: limits to cut to, mean, deviation.

  (clip(x, low, high) - mean) / deviation is what `intensity.normalize` gives with this mode. Means are float64.
  """
  name, limits = intensity.parse_mode(mode)
  given = intensity.foreground_table(limits, len(channels)) if name == 'foreground' else np.empty(0)
  rows = []
  for c, i in enumerate(ids):
    low, high, mean, std = -np.inf, np.inf, 0.0, 1.0
    if name == 'foreground':
      low, high, mean, std = given[i]
    elif name == 'corpus':
      mean, std = channels[i]['mean'], max(channels[i]['std'], 1e-6)
    elif name == 'window':
      low, high = limits
      mean, std = (low + high) / 2, (high - low) / 2
    elif name == 'full':
      if image.dtype.kind != 'u':
        raise UserError(f"loader.normalize 'full' takes unsigned integers as they are stored, not {image.dtype}")
      mean = std = np.iinfo(image.dtype).max / 2
    elif name in ('percentile', 'image'):
      low, high = np.percentile(image[..., c], limits) if name == 'percentile' else (low, high)
      mean, std = _moments(image[..., c], low, high)
    else:
      choose('loader.normalize', name, ('none',))
    rows.append((low, high, mean, std))
  return np.array(rows, np.float32).T


def _moments(pixels: np.ndarray, low: float, high: float) -> tuple[float, float]:
  """Mean and deviation of pixels cut to limits, slice by slice; the deviation at least 1e-6."""
  cut = lambda x: np.clip(x.astype(np.float64), low, high)
  mean = sum(cut(x).sum() for x in pixels) / pixels.size
  return mean, max(float(np.sqrt(sum(np.square(cut(x) - mean).sum() for x in pixels) / pixels.size)), 1e-6)
