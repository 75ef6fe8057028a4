"""A trained encoder with all that it needs to take images as they are stored: what `jaxmed.load` returns."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.augment.views import ViewMaker
from jaxmed.data.pipeline import eval_batches
from jaxmed.errors import UserError, choose
from jaxmed.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A model, its weights, and how stored intensities become its input.

  Attributes:
    channels: the vocabulary in order, [{'name', 'mean', 'std'}] in native units. normalize: 'corpus' | 'image' |
      'none', see `augment.intensity.normalize`. feature: 'mean' or 'cls', the vector that the method recommends.
    info: what else is known of the run (method, steps, ...), plain data.
  """

  model: ViT
  params: Any
  channels: tuple[dict[str, Any], ...]
  normalize: str = 'corpus'
  feature: str = 'mean'
  info: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Channel names by id."""
    return tuple(c['name'] for c in self.channels)

  @property
  def image_size(self) -> tuple[int, ...]:
    """The native grid."""
    return self.model.image_size

  @property
  def _fixed(self) -> bool:
    """Whether every image must have all channels in their order: a model of fixed channels that never missed one."""
    return not self.model.per_channel and not self.info.get('mixed')

  def embed(self, images: np.ndarray, channels: Sequence[str] | None = None,
            batch_size: int = 64) -> dict[str, np.ndarray]:
    """Features of images in stored intensities.

    Args:
      images: [N, *size, C] of any number type; the size may differ from the native one if the patch divides it.
      channels: the C names, in the order of the last axis; by default the vocabulary's first C.
    Returns:
      float32 arrays: 'cls' [N, D] (where the model has a class token), 'mean' [N, D], 'patches' [N, *grid, D] or,
      for channel tokens, [N, C, *grid, D].
    Raises:
      UserError: a name that the encoder does not know, or shapes that do not fit.
    """
    images = np.asarray(images)
    rank = len(self.image_size)
    if images.ndim != rank + 2:
      raise UserError(f'images must be [N, {"D, " if rank == 3 else ""}H, W, C], not an array of shape {images.shape}')
    ids = self.channel_ids(channels, images.shape[-1])
    if any(n % p or n < p for n, p in zip(images.shape[1:-1], self.model.patch_size, strict=True)):
      raise UserError(f'images of {images.shape[1:-1]} do not divide into patches of {self.model.patch_size}')
    parts = []
    for i in range(0, len(images), batch_size):
      part = images[i : i + batch_size]
      short = min(batch_size, len(images)) - len(part)  # the last batch is padded, so that nothing is recompiled
      part = np.pad(part, [(0, short)] + [(0, 0)] * (images.ndim - 1))
      out = self._apply(part, np.tile(ids, (len(part), 1)), None, patches=True)
      parts.append({k: np.asarray(v)[: len(part) - short] for k, v in out.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} if parts else {}

  def channel_ids(self, names: Sequence[str] | None, count: int) -> np.ndarray:
    """Vocabulary ids [count] of the names."""
    if names is None:
      names = self.vocabulary[:count]
    for name in names:
      choose('channel', name, self.vocabulary)
    if len(names) != count or len(set(names)) != count or (self._fixed and tuple(names) != self.vocabulary):
      raise UserError(f'the encoder takes the channels {", ".join(self.vocabulary)}; '
                      f'{count} channels came with the names {", ".join(names)}')
    return np.asarray([self.vocabulary.index(n) for n in names], np.int32)

  def embed_source(self, source: Any, batch_size: int = 64) -> dict[str, np.ndarray]:
    """{'cls', 'mean'} float32 [N, D] of all rows of a `data.sources.Source`, in order.

    Rows are resized to the native grid; they may have different channels.
    """
    rows: dict[str, list[np.ndarray]] = {}
    if self._fixed:
      for names in {tuple(names) for names in source.table.column('channels').to_pylist()}:
        self.channel_ids(names, len(names))
    batch_size = min(batch_size, max(len(source), 1))
    batches = eval_batches(source, batch_size=batch_size, size=self.image_size, vocabulary=self.vocabulary)
    for batch in batches:
      real = batch['index'] >= 0
      mask = np.where(real[:, None], batch['channel_mask'], True)
      out = self._apply(batch['image'], batch['channels'], None if mask.all() else mask, patches=False)
      for name, value in out.items():
        rows.setdefault(name, []).append(np.asarray(value)[real])
    return {k: np.concatenate(v) for k, v in rows.items()}

  def untrained(self, seed: int = 0) -> 'Encoder':
    """The same encoder with fresh random weights: the baseline of every evaluation."""
    slots = len(self.channels)
    image = jnp.zeros((1, *self.image_size, slots))
    params = jax.jit(lambda key: nn.unbox(self.model.init(key, image)['params']))(jax.random.key(seed))
    return dataclasses.replace(self, params=params, info=self.info | {'method': 'untrained'})

  def _apply(self, image: np.ndarray, ids: np.ndarray, mask: np.ndarray | None, patches: bool) -> dict[str, jax.Array]:
    table = lambda key: tuple(float(c[key]) for c in self.channels)
    place = 0 if self._fixed or self.model.per_channel else len(self.channels)
    return _forward(self.model, (table('mean'), table('std')), self.normalize, place, patches, self.params, image, ids,
                    mask)


def _features(model, tables, normalize, place, patches, params, image, ids, mask):
  view = ViewMaker(image.shape[1:-1], *tables, normalize=normalize, place=place)
  batch = view.plain({'image': image, 'channels': ids} | ({} if mask is None else {'channel_mask': mask}))
  features = model.apply({'params': params}, batch['image'], batch['channels'], batch.get('channel_mask'))
  out = {'mean': features.mean}
  if features.cls is not None:
    out['cls'] = features.cls.astype(jnp.float32)
  if patches:
    out['patches'] = features.patches.astype(jnp.float32).reshape(len(image), *features.grid, -1)
  return out


_forward = jax.jit(_features, static_argnums=(0, 1, 2, 3, 4))
