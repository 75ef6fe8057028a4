"""data2vec 2.0: latents averaged over blocks, predicted at hidden places (Baevski et al. 2023; fairseq)."""

import dataclasses
import math
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.predictor import ConvPredictor
from jaxmed.models.layers.tokens import grid_of
from jaxmed.objectives.base import Method
from jaxmed.objectives.networks import (
  Clock,
  encode_shown,
  inputs,
  on_own_grids,
  own_cells,
  own_grids,
  ramp,
  token_slots,
  with_stats,
)


@dataclasses.dataclass(frozen=True)
class Data2Vec(Method):
  """Regresses what a moving-average encoder makes of the whole image from a few blocks of it.

  Follows examples/data2vec/models/data2vec2.py and config/v2/base_images_only_task.yaml: targets are the outputs of the
  MLPs of the last blocks, instance-normalised over tokens, averaged, layer-normalised; each image is masked several
  ways while its target is computed once; a convolutional decoder fills noise at hidden places in; squared error over
  hidden tokens, summed over features and divided by the root of their number; the class token regresses their mean.
  Here encoders are pre-norm, and a convolutional encoder's target is its last feature map.

  Attributes:
    masks: maskings of each image. mask_ratio: share of the tokens that is hidden.
    block: side in tokens of the blocks that are kept (the official code hides the inverse of blocks).
    block_share: how much more than what is kept the blocks cover before they are thinned out to the exact number.
    top_blocks: encoder blocks whose outputs are averaged, counted from the last; 0 for all but the first two.
    cls_weight: of the class token's loss, a mean over images and maskings. The official code weights their sum, of 16
      images and 16 maskings on a GPU, by 0.01: 2.56 on the mean (data2vec2.py; fairseq, trainer.py).
    noise: deviation of what stands in for hidden tokens.
    momentum_start, momentum_end, momentum_share: EMA of the target encoder, linear in this share of the run.
    decoder_dim, decoder_depth, decoder_groups: of the decoder; width 0 is the encoder's.
  """

  encoder: Encoder
  masks: int = 16
  mask_ratio: float = 0.8
  block: int = 3
  block_share: float = 0.07
  top_blocks: int = 0
  cls_weight: float = 2.56
  noise: float = 0.01
  momentum_start: float = 0.9998
  momentum_end: float = 0.99999
  momentum_share: float = 0.27
  decoder_dim: int = 0
  decoder_depth: int = 6
  decoder_groups: int = 16
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (1e-3, 256)
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'pos': 'sincos', 'masking': 'sparse', 'patch_init': 'xavier'},
      'optimizer': {'b2': 0.95, 'weight_decay': 0.05, 'clip': 4.0},
      'augment': {'scale': (0.2, 1.0)},
  }

  def __post_init__(self):
    if not 0 < self.mask_ratio < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1')
    for name in ('masks', 'block', 'decoder_groups'):
      if vars(self)[name] < 1:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least 1')
    dim = self.decoder_dim or self.encoder.embed_dim
    if dim % self.decoder_groups or self.encoder.embed_dim % self.decoder_groups:
      raise UserError(f'objective.decoder_groups {self.decoder_groups} does not divide the widths '
                      f'{self.encoder.embed_dim} and {dim}')

  @property
  def decoder(self) -> ConvPredictor:
    """The decoder that goes with the encoder."""
    e = self.encoder
    return ConvPredictor(grid_of(e.image_size, e.patch_size), e.embed_dim, self.decoder_dim or e.embed_dim,
                         self.decoder_depth, self.decoder_groups, dtype=e.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    encoder_key, decoder_key = jax.random.split(rng)
    encoder = self.encoder.init(encoder_key, **inputs(batch))['params']
    tokens = jnp.zeros((1, token_slots(self.encoder, batch)[1], self.encoder.embed_dim))
    decoder = self.decoder.init(decoder_key, tokens)['params']
    return {'params': {'encoder': encoder, 'decoder': decoder},
            'target': {'encoder': jax.tree.map(jnp.copy, encoder)}, 'extra': {}}

  def encoder_params(self, variables: Variables) -> Any:
    """Weights of the student: the official code fine-tunes it, not the average."""
    return variables['params']['encoder']

  def momentum(self, step: jax.Array) -> jax.Array:
    """EMA factor of the target encoder."""
    return ramp(self.momentum_start, self.momentum_end, step, self.momentum_share * self.clock.steps)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Scaled squared error over the hidden tokens of all maskings of the global batch."""
    target, exists = self._target(variables, batch)
    predicted, hidden, cls, stats = self._predict(variables['params'], batch, rng, train)
    count, dim = target.shape[1:]
    scale = dim**-0.5
    error = jnp.square(predicted.reshape(-1, self.masks, count, dim) - target[:, None]).sum(axis=-1) * scale
    counts = hidden.reshape(-1, self.masks, count) & exists[:, None]
    loss = jnp.where(counts, error, 0.0).sum() / jnp.maximum(counts.sum(), 1)
    metrics = {'data2vec_loss': loss, 'target_std': target.std(axis=(0, 1)).mean(), 'momentum': self.momentum(step)}
    if cls is not None and self.cls_weight:
      middle = jnp.where(exists[..., None], target, 0.0).sum(axis=1) / exists.sum(axis=1, keepdims=True)
      off = jnp.square(cls.reshape(-1, self.masks, dim) - middle[:, None]).sum(axis=-1).mean() * scale
      loss, metrics['cls_loss'] = loss + self.cls_weight * off, off
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])

  def _target(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets [B, N, D] float32 without gradient, and which tokens exist [B, N]."""
    _, count, valid = token_slots(self.encoder, batch)
    exists = jnp.ones((batch['image'].shape[0], count), bool) if valid is None else valid
    depth = self.encoder.num_levels
    top = min(self.top_blocks or max(depth - 2, 1), depth)
    levels = {'levels': tuple(range(depth - top + 1, depth + 1))} if self.encoder.supports.levels else {}
    features = self.encoder.apply({'params': variables['target']['encoder']}, **inputs(batch), **levels)
    layers = [level.ffn for level in features.levels if level.ffn is not None] or [features.patches]
    return jax.lax.stop_gradient(average_of_layers(jnp.stack(layers), exists)), exists  # of [L, B, N, D]

  def _predict(self, params: Any, batch: Batch, rng: jax.Array, train: bool):
    """Predictions [B * masks, N, D] float32, hidden tokens [B * masks, N], class tokens or None, new statistics."""
    keys = jax.random.split(rng, 3)
    known: Any = inputs(batch)
    many = cast(Batch, {name: jnp.repeat(x, self.masks, axis=0) for name, x in known.items()})
    count, valid = token_slots(self.encoder, many)[1:]
    order, shown, visible = self._mask(keys[0], many)
    features, stats = encode_shown(self.encoder, params['encoder'], many, shown, visible, train, {'dropout': keys[1]})
    kept = shown.shape[1]
    filler = self.noise * jax.random.normal(keys[2], (len(shown), count, self.encoder.embed_dim))
    latent = features.patches if visible is None else jnp.where(visible[..., None], features.patches, filler[:, :kept])
    x = jnp.concatenate([latent, filler[:, kept:].astype(latent.dtype)], axis=1)
    x = jnp.take_along_axis(x, order[..., None], axis=1)  # in the order of the grid
    there = None if 'sizes' not in many else valid
    predicted = self.decoder.apply({'params': params['decoder']}, x, there).astype(jnp.float32)
    cls = None if features.cls is None else features.cls.astype(jnp.float32)
    hidden = order >= kept
    if visible is not None:  # small images show fewer
      hidden |= ~jnp.take_along_axis(visible, jnp.minimum(order, kept - 1), axis=1)
    return predicted, hidden, cls, stats

  def _mask(self, rng: jax.Array, batch: Batch):
    """Rank of every token [R, N] (shown ones first), the shown ones [R, K], which exist [R, K] or None."""
    grid, count, valid = token_slots(self.encoder, batch)
    size, cells, channels = batch['image'].shape[0], math.prod(grid), count // math.prod(grid)
    keep = [max(n - int(n * self.mask_ratio), min(n, 1)) for n in range(cells + 1)]  # of so many
    kept, own, inside = keep[cells], own_grids(self.encoder, batch), own_cells(self.encoder, batch)
    score = inverse_blocks(rng, size, grid, kept, self.block, self.block_share)  # the same places in all channels
    if inside is not None:
      score = jnp.where(inside, on_own_grids(score, grid, own), 3.0)
      first = jnp.arange(kept) < jnp.asarray(keep)[inside.sum(axis=1)][:, None]  # [R, kept]
    shown = jnp.argsort(score, axis=1)
    rank = jnp.argsort(shown, axis=1)
    order = (rank[:, None] + jnp.where(rank < kept, 0, (channels - 1) * kept)[:, None]).repeat(channels, axis=1)
    step = jnp.where(rank < kept, kept, cells - kept)[:, None] * jnp.arange(channels)[:, None]
    order = (order + step).reshape(size, count)
    index = (shown[:, None, :kept] + cells * jnp.arange(channels)[:, None]).reshape(size, channels * kept)
    if valid is None:
      return order, index, None
    exist = jnp.take_along_axis(valid, index, axis=1)
    return order, index, exist if inside is None else exist & jnp.tile(first, (1, channels))


def inverse_blocks(rng: jax.Array, size: int, grid: tuple[int, ...], kept: int, block: int, extra: float) -> jax.Array:
  """Scores [size, cells], whose `kept` smallest are shown: random cells of a union of random blocks.

  As many blocks as would cover kept + extra * cells cells without overlap, their centres drawn without replacement;
  cells of none follow at random where the blocks do not suffice (fairseq, data/data_utils.py:compute_block_mask_2d).
  """
  cells, rank = math.prod(grid), len(grid)
  centre_key, cell_key = jax.random.split(rng)
  number = max(1, math.ceil((kept + extra * cells) / block**rank))
  noise = jax.random.uniform(centre_key, (size, cells))
  centres = (jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < number).reshape(size, *grid).astype(jnp.float32)
  low = (block - 1) // 2
  window, pad = (1, *(block,) * rank), ((0, 0), *((low, block - 1 - low),) * rank)
  inside = jax.lax.reduce_window(centres, -jnp.inf, jax.lax.max, window, (1,) * (rank + 1), pad).reshape(size, cells)
  return jax.random.uniform(cell_key, (size, cells)) + jnp.where(inside > 0, 0.0, 1.0)


def average_of_layers(layers: jax.Array, exists: jax.Array) -> jax.Array:
  """Mean over layers [L, B, N, D], each normalised over the existing tokens; layer-normalised [B, N, D] float32."""
  x = layers.astype(jnp.float32)
  there = exists[None, ..., None]
  mean = lambda y: jnp.where(there, y, 0.0).sum(axis=2, keepdims=True) / there.sum(axis=2, keepdims=True)
  centred = x - mean(x)
  x = (centred * jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-5)).mean(axis=0)
  return (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-5)
