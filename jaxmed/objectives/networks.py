"""What the objectives share: running a network, views as one batch, schedules."""

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.contracts import Batch, Encoder, Views
from jaxmed.models.layers import positions
from jaxmed.models.layers.norm import STATS
from jaxmed.models.layers.tokens import Features, grid_of

# Changes of intensity and colour that methods which compare views want by default: the numbers of BYOL, MoCo v3 and
# DINO, and the stronger ones of SimCLR and SwAV. Brightness is additive here: 0.4 deviations are what a factor of 1 +-
# 0.4 does to images whose mean lies one deviation above black. No blur: what it destroys depends on the size of things.
PHOTOMETRIC: dict[str, Any] = {
    'jitter_probability': 0.8, 'brightness': 0.4, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': 0.2}
STRONG_PHOTOMETRIC: dict[str, Any] = PHOTOMETRIC | {'brightness': 0.8, 'contrast': 0.8, 'color': (0.8, 0.2)}


@dataclasses.dataclass(frozen=True)
class Clock:
  """The length of a run: steps, and steps an epoch. Filled in by the run; no option."""

  steps: int = 1000
  epoch: float = 100.0

  def warmup(self, epochs: float, share: float = 0.3) -> float:
    """Steps of a warm-up of so many epochs, but at most this share of the run (as short runs need)."""
    return min(epochs * self.epoch, share * self.steps)


def last_again(x: jax.Array, there: jax.Array) -> jax.Array:
  """Records x [B, K, ...] of windows, with the last one that is `there` [B, K] again where there is none.

  Blank records would move the statistics of batch norm, and may hold anything.
  """
  place = jnp.minimum(jnp.arange(there.shape[1]), jnp.maximum(there.sum(axis=1, keepdims=True) - 1, 0))  # [B, K]
  return jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)


def ramp(start: float, end: float, step: jax.Array, steps: float) -> jax.Array:
  """Linear from start to end in so many steps, then constant."""
  return start + (end - start) * jnp.clip(step / max(steps, 1e-9), 0.0, 1.0)


def cosine(start: float, end: float, step: jax.Array, steps: float) -> jax.Array:
  """Cosine from start to end in so many steps, then constant (facebookresearch/dino, utils.py:cosine_scheduler)."""
  return end + 0.5 * (start - end) * (1 + jnp.cos(math.pi * jnp.clip(step / max(steps, 1e-9), 0.0, 1.0)))


def run(module: nn.Module, params: Any, *args: Any, train: bool = False, rngs: Any = None,
        **kwargs: Any) -> tuple[Any, Any]:
  """Applies a module that takes `train`: (output, new running statistics by the paths of its parameters).

  Statistics are {} outside of training and for modules without batch normalisation. An objective returns them as
  metrics['stats'] = {'encoder': ..., 'projector': ...}; the training step writes them into the parameters.
  """
  out, state = run_noting((STATS,), module, params, *args, train=train, rngs=rngs, **kwargs)
  return out, state.get(STATS, {})


def run_noting(collections: tuple[str, ...], module: nn.Module, params: Any, *args: Any, train: bool = False,
               rngs: Any = None, **kwargs: Any) -> tuple[Any, Any]:
  """The same with all that a training pass leaves in `collections`, by their names."""
  if not train:
    return module.apply({'params': params}, *args, train=False, rngs=rngs, **kwargs), {}
  return module.apply({'params': params}, *args, train=True, rngs=rngs, mutable=list(collections), **kwargs)


def encode(encoder: Encoder, params: Any, batch: Batch, train: bool, rngs: Any, fixed: bool = False,
           **kwargs: Any) -> tuple[Features, Any]:
  """`run` of an encoder on a batch; a fixed one runs as in evaluation, and no gradient reaches it."""
  if fixed:
    params, train = jax.lax.stop_gradient(params), False
  return run(encoder, params, **inputs(batch), train=train, rngs=rngs, **kwargs)


def resting(fixed: bool, first: float, step: jax.Array, steps: int) -> dict[str, Any]:
  """{'encoder': whether it rests at a step}: always where it is fixed, else in the first fraction `first` of a run."""
  return {'encoder': True} if fixed else {'encoder': step < first * steps} if first else {}


def placed(image: jax.Array, channels: jax.Array, count: int) -> jax.Array:
  """Images [B, *size, C] with each channel at the place of its id, [B, *size, count]; zeros where there is none."""
  where = (channels[..., None] == jnp.arange(count)).astype(image.dtype)  # [B, C, count]
  return jnp.einsum('b...c,bcv->b...v', image, where, precision=jax.lax.Precision.HIGHEST)


def quiet(encoder: Encoder) -> Any:
  """The encoder without whatever is random in training, for a target or teacher.

  Batch normalisation still takes the statistics of the batch.
  """
  rates = {'drop_path': encoder.drop_path, 'rope_shift': encoder.rope_shift, 'rope_jitter': encoder.rope_jitter,
           'rope_rescale': encoder.rope_rescale, 'hash_draw': encoder.hash_draw}
  still = {name: type(rate)() for name, rate in rates.items() if rate}  # 0.0 and False
  if encoder.adapter is not None and encoder.adapter.dropout:
    still['adapter'] = dataclasses.replace(encoder.adapter, dropout=0.0)
  return encoder.clone(**still)


def with_stats(metrics: dict, train: bool, **stats: Any) -> dict:
  """The metrics, in training with the running statistics by module, empty ones left out."""
  found = {name: tree for name, tree in stats.items() if jax.tree.leaves(tree)}
  return metrics | {'stats': found} if train and found else metrics


def inputs(batch: Batch | Views) -> Batch:
  """The part of a batch that an encoder takes: image [B, *size, C], channels; channel_mask and sizes if present."""
  known: Any = batch
  return cast(Batch, {name: known[name] for name in ('image', 'channels', 'channel_mask', 'sizes') if name in batch})


def flat(group: Views) -> Batch:
  """`inputs` of the views of a group [B, V, ...] as one batch, sample by sample: image [B * V, *size, C] and so on.

  The order keeps each sample's views together, so that a batch cut over devices stays where it is.
  """
  known: Any = inputs(group)
  return cast(Batch, {name: x.reshape(-1, *x.shape[2:]) for name, x in known.items()})


def views(x: jax.Array, count: int) -> jax.Array:
  """[B * V, ...] -> [B, V, ...], the inverse of `flat` for features."""
  return x.reshape(-1, count, *x.shape[1:])


def seen_by_teacher(group: Views) -> Views:
  """The group as the teacher sees it: with `teacher_mask` in place of `channel_mask` where the view maker gave one."""
  return {**group, 'channel_mask': group['teacher_mask']} if 'teacher_mask' in group else group


def token_slots(encoder: Encoder, batch: Batch) -> tuple[tuple[int, ...], int, jax.Array | None]:
  """The tokens that an encoder makes of a batch: (grid of a channel, their number N, which exist [B, N] or None)."""
  grid = grid_of(batch['image'].shape[1:-1], encoder.patch_size)
  count, mask, cells = math.prod(grid), batch.get('channel_mask'), own_cells(encoder, batch)
  if not encoder.per_channel:
    return grid, count, cells
  channels = batch['image'].shape[-1]
  exist = None if mask is None else jnp.repeat(mask, count, axis=1)
  if cells is not None:
    cells = jnp.tile(cells, (1, channels))
    exist = cells if exist is None else exist & cells
  return grid, count * channels, exist


def own_sizes(batch: Batch) -> jax.Array:
  """Pixels of each image in the corner of its array, [B, rank] int."""
  size = jnp.asarray(batch['image'].shape[1:-1])
  return batch.get('sizes', jnp.broadcast_to(size, (len(batch['image']), len(size))))


def own_grids(encoder: Encoder, batch: Batch) -> jax.Array | None:
  """The token grids [..., rank] of images whose sizes differ, in the corner of their arrays; else None."""
  return batch['sizes'] // jnp.asarray(encoder.patch_size) if 'sizes' in batch else None


def own_cells(encoder: Encoder, batch: Batch) -> jax.Array | None:
  """Cells of the whole grid of images whose sizes differ, [B, prod(grid)] bool; None where all are whole."""
  own = own_grids(encoder, batch)
  return None if own is None else positions.inside(own, grid_of(batch['image'].shape[1:-1], encoder.patch_size))


def on_own_grids(places: jax.Array, grid: tuple[int, ...], own: jax.Array | None) -> jax.Array:
  """Values drawn for the cells of a whole grid [B, ..., prod(grid)], moved to images whose grids [B, rank] differ.

  Cell i of n takes what was drawn for cell floor(i * N / n) of N, so that about the same share of each image is marked
  and never more cells than of the whole grid. Cells outside of an image mean nothing.
  """
  if own is None:
    return places
  cells = jnp.asarray(np.indices(grid).reshape(len(grid), -1).T)  # [cells, rank]
  most = jnp.asarray(grid)
  there = jnp.minimum(cells * most // own[:, None], most - 1)  # [B, cells, rank]
  strides = jnp.asarray([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
  index = (there * strides).sum(axis=-1)
  index = jnp.broadcast_to(index.reshape(len(index), *[1] * (places.ndim - 2), -1), places.shape)
  return jnp.take_along_axis(places, index, axis=-1)


def encode_shown(encoder: Encoder, params: Any, batch: Batch, shown: jax.Array, valid: jax.Array | None, train: bool,
                 rngs: Any) -> tuple[Features, Any]:
  """Features of some patches alone, and new running statistics.

  Transformers never compute the others; convolutional encoders hide them (see their `masking`).

  Args:
    shown: [B, K] indices of tokens. valid: [B, K] bool, False where an index is padding; None for none.
  Returns:
    Features whose patches are the K shown ones.
  """
  if encoder.supports.embed_patches:
    tokens = encoder.apply({'params': params}, **inputs(batch), method='embed_patches').take(shown)
    if valid is not None:
      tokens = dataclasses.replace(tokens, valid=valid)
    return encoder.apply({'params': params}, tokens, train, method='encode', rngs=rngs), {}
  count = token_slots(encoder, batch)[1]
  seen = jnp.ones(shown.shape, bool) if valid is None else valid
  rows = jnp.arange(shown.shape[0])[:, None]
  hidden = jnp.ones((shown.shape[0], count + 1), bool).at[rows, jnp.where(seen, shown, count)].set(False)[:, :count]
  features, stats = run(encoder, params, **inputs(batch), train=train, rngs=rngs, hidden=hidden)
  patches = jnp.take_along_axis(features.patches, shown[..., None], axis=1)
  return dataclasses.replace(features, patches=patches, valid=valid), stats
