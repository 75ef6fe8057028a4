"""SimMIM: mask tokens in the encoder, raw pixels out of a linear head (Xie et al. 2022; microsoft/SimMIM)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.layers.initial import patch_laws
from jaxmed.models.layers.tokens import patchify
from jaxmed.models.layers.transformer import Dense
from jaxmed.objectives.base import Method
from jaxmed.objectives.masked.mae import MASK_CHANNELS
from jaxmed.objectives.networks import inputs, on_own_grids, own_grids, run, token_slots, with_stats


@dataclasses.dataclass(frozen=True)
class SimMIM(Method):
  """Replaces random squares of patches by a mask token and predicts their pixels, by mean absolute error.

  Follows models/simmim.py and data/data_simmim.py.

  Attributes:
    mask_ratio: share of the squares that is hidden, rounded up.
    mask_size: side of a square in pixels; at least a patch, at most a third of the image.
    mask_channels: for channel tokens, 'independent' masks a channel, or 'shared' the same places in all.
  """

  encoder: Encoder
  mask_ratio: float = 0.6
  mask_size: int = 32
  mask_channels: str = 'independent'

  LEARNING_RATE: ClassVar = (4e-4, 2048)  # 1e-4 * B / 512 at the published batch of 2048
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'mask_token': True, 'masking': 'token', 'drop_path': 0.1, 'layer_scale': 0.1, 'kernel_init': 'beit',
                  'patch_init': ''},
      'optimizer': {'weight_decay': 0.05, 'clip': 5.0},
      'augment': {'scale': (0.67, 1.0)},
  }

  def __post_init__(self):
    choose('objective.mask_channels', self.mask_channels, MASK_CHANNELS)
    if not 0 < self.mask_ratio < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1')
    if self.mask_size < 1:
      raise UserError(f'objective.mask_size {self.mask_size} must be at least 1 pixel')

  @property
  def head(self) -> Dense:
    """Linear map from a token to its pixels."""
    pixels = math.prod(self.encoder.patch_size)
    kernel_init, bias_init = patch_laws('torch', '', self.encoder.embed_dim)  # a 1 x 1 convolution there
    return Dense((pixels * (1 if self.encoder.per_channel else self.encoder.in_channels),), ('embed', 'patch'),
                 kernel_init=kernel_init, bias_init=bias_init)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    encoder_key, head_key = jax.random.split(rng)
    hidden = jnp.zeros((batch['image'].shape[0], token_slots(self.encoder, batch)[1]), bool)
    encoder = self.encoder.init(encoder_key, **inputs(batch), hidden=hidden)['params']
    head = self.head.init(head_key, jnp.zeros((1, self.encoder.embed_dim)))['params']
    return {'params': {'encoder': encoder, 'head': head}, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean absolute error over the hidden pixels of the global batch."""
    del step
    predicted, hidden, stats = self._predict(variables['params'], batch, rng, train)
    target = patchify(jax.lax.stop_gradient(batch['image']), self.encoder.patch_size, self.encoder.per_channel)
    error = jnp.abs(predicted.astype(jnp.float32) - target.reshape(predicted.shape))  # [B, N, P]
    counts = hidden[..., None] & self._pixels(batch)
    loss = jnp.where(counts, error, 0.0).sum() / jnp.maximum(jnp.broadcast_to(counts, error.shape).sum(), 1)
    metrics = {'simmim_loss': loss, 'hidden_tokens': hidden.sum(axis=1).mean()}
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])

  def _predict(self, params: Any, batch: Batch, rng: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, Any]:
    """Predicted pixels [B, N, P] of every token, which tokens are hidden [B, N] bool, new running statistics."""
    mask_key, drop_key = jax.random.split(rng)
    hidden = self._mask(mask_key, batch)
    features, stats = run(self.encoder, params['encoder'], **inputs(batch), train=train, rngs={'dropout': drop_key},
                          hidden=hidden)
    return self.head.apply({'params': params['head']}, features.patches), hidden, stats

  def _pixels(self, batch: Batch) -> jax.Array:
    """Which pixels of a token exist, broadcastable to [B, N, P]."""
    mask, tokens = batch.get('channel_mask'), token_slots(self.encoder, batch)[2]
    exist = jnp.ones((1, 1, 1), bool) if tokens is None else tokens[..., None]
    if mask is None or self.encoder.per_channel:
      return exist
    return exist & jnp.tile(mask, (1, math.prod(self.encoder.patch_size)))[:, None]

  def _mask(self, rng: jax.Array, batch: Batch) -> jax.Array:
    """Hidden tokens [B, N]: whole squares, drawn for each sample (and channel)."""
    grid, count, _ = token_slots(self.encoder, batch)
    size, cells = batch['image'].shape[0], math.prod(grid)
    side = min(self.mask_size, min(batch['image'].shape[1:-1]) // 3)
    unit = [max(side // p, 1) for p in self.encoder.patch_size]
    coarse = [-(-n // u) for n, u in zip(grid, unit, strict=True)]
    channels = count // cells if self.mask_channels == 'independent' else 1
    noise = jax.random.uniform(rng, (size, channels, math.prod(coarse)))
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    hidden = (rank < math.ceil(math.prod(coarse) * self.mask_ratio)).reshape(size, channels, *coarse)
    for axis, (u, n) in enumerate(zip(unit, grid, strict=True), 2):
      hidden = jax.lax.slice_in_dim(jnp.repeat(hidden, u, axis=axis), 0, n, axis=axis)
    hidden = on_own_grids(hidden.reshape(size, channels, cells), grid, own_grids(self.encoder, batch))
    return jnp.broadcast_to(hidden, (size, count // cells, cells)).reshape(size, count)
