"""A trained encoder with all that it needs to take images as they are stored: what `jaxmed.load` returns."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.augment.views import ViewMaker
from jaxmed.data.corpus.vocabulary import described, ids_of
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.errors import UserError, choose
from jaxmed.interop.inflate import inflate
from jaxmed.interop.weight_formats import load_file
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers.channel_embed import unnamed


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A model, its weights, and how stored intensities become its input.

  Attributes:
    channels: the vocabulary in order, [{'name', 'mean', 'std'}] in native units, maybe with 'aliases' and 'features'
      (see `data.vocabulary`). normalize: 'corpus' | 'image' |
      'none', see `augment.intensity.normalize`. feature: 'mean' or 'cls', the vector that the method recommends.
    info: what else is known of the run (method, steps, ...), plain data.
    pair: of a run of images and texts, what makes comparable vectors of both, a `jaxmed.pair.Pair`; None elsewhere.
  """

  model: ViT
  params: Any
  channels: tuple[dict[str, Any], ...]
  normalize: str = 'corpus'
  feature: str = 'mean'
  info: dict[str, Any] = dataclasses.field(default_factory=dict)
  pair: Any = None

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Channel names by id."""
    return tuple(c['name'] for c in self.channels)

  @property
  def described(self) -> dict[str, Any]:
    """What an exported file says of it beside model and weights: all that `jaxmed.load` needs, plain data."""
    return self.info | {'channels': list(self.channels), 'normalize': self.normalize, 'feature': self.feature}

  @property
  def ids(self) -> dict[str, int]:
    """The id of each channel by its name and aliases."""
    return ids_of(self.channels)

  @property
  def named(self) -> bool:
    """Whether the channels have names, not only numbers."""
    return self.vocabulary != unnamed(len(self.channels))

  @property
  def image_size(self) -> tuple[int, ...]:
    """The native grid."""
    return self.model.image_size

  @property
  def _fixed(self) -> bool:
    """Whether every image must have all channels in their order: a model of fixed channels that never missed one."""
    return not self.model.per_channel and not self.info.get('mixed')

  def embed(self, images: np.ndarray, channels: Sequence[str] | None = None,
            batch_size: int = 64, levels: Sequence[int] = ()) -> dict[str, Any]:
    """Features of images in stored intensities.

    Args:
      images: [N, *size, C] of any number type; the size may differ from the native one if the patch divides it.
      channels: the C names, in the order of the last axis; by default the vocabulary's first C.
      levels: blocks (from 1) or stages (0 is the stem) whose outputs are wanted too.
    Returns:
      float32 arrays: 'cls' [N, D] (where the model has a class token), 'mean' [N, D], 'patches' [N, *grid, D] or,
      for channel tokens, [N, C, *grid, D], and 'map' [N, *grid, D], the mean of these over channels, for dense heads.
      With `levels` also 'levels', {level: map [N, *grid, D] or, for channel tokens, [N, C, *grid, D]}, each with the
      grid and width of its level, before any final norm.
    Raises:
      UserError: a name or level that the encoder does not have, or shapes that do not fit.
    """
    images = self.checked(images)
    ids = self.channel_ids(channels, images.shape[-1])
    run = lambda part: self._apply(part, np.tile(ids, (len(part), 1)), None, True, tuple(levels))
    return in_batches(run, batch_size, images)

  def checked(self, images: np.ndarray) -> np.ndarray:
    """Images as an array [N, *size, C] whose size the model can take, or a UserError."""
    images = np.asarray(images)
    rank = len(self.image_size)
    if images.ndim != rank + 2:
      raise UserError(f'images must be [N, {"D, " if rank == 3 else ""}H, W, C], not an array of shape {images.shape}')
    if any(n % p or n < p for n, p in zip(images.shape[1:-1], self.model.patch_size, strict=True)):
      raise UserError(f'images of {images.shape[1:-1]} do not divide into patches of {self.model.patch_size}')
    return images

  def channel_ids(self, names: Sequence[str] | None, count: int) -> np.ndarray:
    """Vocabulary ids [count] of the names."""
    if names is None:
      names = self.vocabulary[:count]
    for name in names:
      choose('channel', name, self.ids)
    ids = [self.ids[n] for n in names]
    if len(ids) != count or len(set(ids)) != count or (self._fixed and ids != list(range(len(self.channels)))):
      raise UserError(f'the encoder takes the channels {", ".join(self.vocabulary)}; '
                      f'{count} channels came with the names {", ".join(names)}')
    return np.asarray(ids, np.int32)

  def extended(self, stats: Mapping[str, Mapping[str, float]]) -> 'Encoder':
    """The encoder extended by the channels of `stats` {name: {'mean', 'std'}} that it lacks.

    Hashed embeddings make a vector of the name; of a table the mean of its rows stands in. Not for an encoder that sees
    all channels together: a UserError.
    """
    fresh = {name: s for name, s in stats.items() if name not in self.ids}
    if not fresh:
      return self
    if not self.model.per_channel:
      raise UserError(f'the encoder was trained on the channels {", ".join(self.vocabulary)} together and cannot take '
                      f'{", ".join(fresh)} too')
    channels = (*self.channels, *({'name': n, 'mean': s['mean'], 'std': s['std']} for n, s in fresh.items()))
    model, params = inflate(self.model, self.params, described(self.channels), described(channels))
    return dataclasses.replace(self, model=model, params=jax.tree.map(jnp.asarray, params), channels=channels)

  def embed_source(self, source: Any, batch_size: int = 64, dense: bool = False,
                   levels: Sequence[int] = ()) -> dict[str, Any]:
    """{'cls', 'mean'} float32 [N, D] of all rows of a `Source`, in order; 'map' [N, *grid, D] if `dense`.

    With `levels` also 'levels', as of `embed`; tokens of channels that a row lacks mean nothing there.

    Rows are resized to the native grid; they may have different channels.
    """
    parts: list[dict[str, Any]] = []
    if self._fixed:
      for names in {tuple(names) for names in source.table.column('channels').to_pylist()}:
        self.channel_ids(names, len(names))
    batch_size = min(batch_size, max(len(source), 1))
    batches = eval_batches(source, batch_size=batch_size, size=self.image_size, vocabulary=self.ids)
    for batch in batches:
      real = batch['index'] >= 0
      mask = np.where(real[:, None], batch['channel_mask'], True)
      out = self._apply(batch['image'], batch['channels'], None if mask.all() else mask, dense, tuple(levels))
      out.pop('patches', None)
      parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[real], out))
    return _joined(parts)

  def embed_subsets(self, source: Any, subsets: Sequence[Sequence[str]], batch_size: int = 64,
                    feature: str = 'mean') -> np.ndarray:
    """Features float32 [S, N, D] of all rows of a source, once for each subset of channels that they show.

    Records are read once. A ChannelViT has tokens of the channels shown alone; another encoder sees the others zeroed
    and the rest scaled. A row that has none of a subset's channels has the features of an image without any.
    """
    ids = [[self.ids[choose('channel', name, self.ids)] for name in s] for s in subsets]
    parts: list[list[np.ndarray]] = [[] for _ in subsets]
    batch_size = min(batch_size, max(len(source), 1))
    for batch in eval_batches(source, batch_size=batch_size, size=self.image_size, vocabulary=self.ids):
      real = batch['index'] >= 0
      for out, wanted in zip(parts, ids, strict=True):
        shown = batch['channel_mask'] & np.isin(batch['channels'], wanted)
        image, channels = batch['image'], batch['channels']
        if self.model.per_channel:  # those shown first, and no more slots than one of the rows needs
          count = min(len(wanted), shown.shape[1])
          order = np.argsort(~shown, axis=1, kind='stable')[:, :count]
          image = np.take_along_axis(image, order.reshape(len(image), *[1] * (image.ndim - 2), count), axis=-1)
          channels, shown = (np.take_along_axis(a, order, axis=1) for a in (channels, shown))
          shown[~real] = True
        mask = None if shown.all() else shown
        found = self._apply(image, channels, mask, False)
        out.append(np.asarray(found[choose('feature', feature, found)])[real])
    return np.stack([np.concatenate(p) for p in parts])

  def untrained(self, seed: int = 0) -> 'Encoder':
    """The same encoder with fresh random weights: the baseline of every evaluation."""
    params = _fresh(self.model, (1, *self.image_size, len(self.channels)), jax.random.key(seed))
    return dataclasses.replace(self, params=params, info=self.info | {'method': 'untrained'},
                               pair=self.pair and self.pair.untrained(seed))

  def view(self, size: tuple[int, ...]) -> ViewMaker:
    """What makes the model's input of stored intensities [B, *size, C]."""
    table = lambda key: tuple(float(c[key]) for c in self.channels)
    place = 0 if self._fixed or self.model.per_channel else len(self.channels)
    return ViewMaker(size, table('mean'), table('std'), normalize=self.normalize, place=place)

  def _apply(self, image: np.ndarray, ids: np.ndarray, mask: np.ndarray | None, patches: bool,
             levels: tuple[int, ...] = ()) -> dict[str, Any]:
    if levels and not self.model.supports.levels:
      raise UserError(f'{type(self.model).__name__} has no levels')
    return _forward(self.model, self.view(image.shape[1:-1]), patches, levels, self.params, image, ids, mask)


def in_batches(run: Callable[..., Mapping[str, Any]], batch_size: int, *arrays: np.ndarray) -> dict[str, np.ndarray]:
  """What `run` makes of rows of arrays, so many at a time; the last ones are padded, so that nothing is recompiled."""
  count, parts = len(arrays[0]), []
  for i in range(0, count, batch_size):
    some = [a[i : i + batch_size] for a in arrays]
    real = len(some[0])
    short = min(batch_size, count) - real
    out = run(*(np.pad(a, [(0, short)] + [(0, 0)] * (a.ndim - 1)) for a in some))
    parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[:real], dict(out)))
  return _joined(parts)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Equal trees of arrays, one after the other along the first axis."""
  return jax.tree.map(lambda *some: np.concatenate(some), *parts) if parts else {}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh(model, shape, key):
  return nn.unbox(model.init(key, jnp.zeros(shape))['params'])


def _features(model, view, patches, levels, params, image, ids, mask):
  batch = view.plain({'image': image, 'channels': ids} | ({} if mask is None else {'channel_mask': mask}))
  method = 'concatenated' if model.pooling == 'concat' else '__call__'
  features = model.apply({'params': params}, batch['image'], batch['channels'], batch.get('channel_mask'),
                         method=method, **({'levels': levels} if levels else {}))
  out = {'mean': features.mean}
  if features.cls is not None:
    out['cls'] = features.cls.astype(jnp.float32)
  if patches:
    out['patches'] = features.patches.astype(jnp.float32).reshape(len(image), *features.grid, -1)
    out['map'] = _over_channels(out['patches'], batch.get('channel_mask')) if model.per_channel else out['patches']
  if levels:
    out['levels'] = {i: level.map.astype(jnp.float32) for i, level in zip(levels, features.levels, strict=True)}
  return out


def _over_channels(patches: jax.Array, mask: jax.Array | None) -> jax.Array:
  """[B, C, *grid, D] -> [B, *grid, D]: the mean over the channels that are there, [B, C]."""
  if mask is None:
    return patches.mean(axis=1)
  weight = mask.reshape(*mask.shape, *[1] * (patches.ndim - 2)).astype(patches.dtype)
  return (patches * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)


_forward = jax.jit(_features, static_argnums=(0, 1, 2, 3))


def from_file(path: str | os.PathLike) -> Encoder:
  """The encoder of a file that `jaxmed export` or `jaxmed import` wrote; UserError: there is none, or it is damaged."""
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f'{path} does not exist: expected a run directory or an exported file')
  model, params, info = load_file(path)
  channels = info.get('channels') or [{'name': n, 'mean': 0.0, 'std': 1.0} for n in unnamed(model.in_channels)]
  return Encoder(model, params, tuple(channels), info.get('normalize', 'none'), info.get('feature', 'cls'), info)
