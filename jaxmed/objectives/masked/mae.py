"""Masked autoencoding (He et al. 2022; facebookresearch/mae, models_mae.py) for patch and channel tokens.

What ChA-MAEViT (Pham et al. 2025, arXiv 2503.19331; chaudatascience/cha_mae_vit) and CA-MAE (Kraus et al. 2024,
arXiv 2404.10242; recursionpharma/maes_microscopy) add to it are options, which are off by default.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.heads import CLASS_LOSSES, ClassHead
from jaxmed.models.decoders.mae import SHARES, Decoder
from jaxmed.models.layers.tokens import Features, grid_of, patchify, unpatchify
from jaxmed.objectives.base import Method
from jaxmed.objectives.losses.diversity import Diversity
from jaxmed.objectives.losses.hybrid import classified, spectral_error
from jaxmed.objectives.networks import encode_shown, inputs, token_slots, with_stats

MASK_CHANNELS = ('independent', 'shared', 'dynamic')
UNSAMPLED = ('drop', 'predict')


@dataclasses.dataclass(frozen=True)
class Masking:
  """What each sample shows, hides and has decoded, of N tokens; K is the most that a sample shows.

  Attributes:
    ids_keep: [B, K] indices of the shown tokens.
    ids_restore: [B, N] rank of each token, shown ones first: token n is the ids_restore[n]-th.
    visible: [B, K] bool, False where a sample with missing channels shows fewer than K.
    hidden: [B, N] float32, 1 where the token counts in the loss (the official `mask`).
    decoder_valid: [B, N] bool, tokens that the decoder sees; None for all.
  """

  ids_keep: jax.Array
  ids_restore: jax.Array
  visible: jax.Array
  hidden: jax.Array
  decoder_valid: jax.Array | None

  @property
  def shown(self) -> jax.Array:
    """Which of the N tokens are shown, [B, N] bool."""
    rest = self.ids_restore.shape[1] - self.visible.shape[1]
    return jnp.take_along_axis(jnp.pad(self.visible, ((0, 0), (0, rest))), self.ids_restore, axis=1)


@dataclasses.dataclass(frozen=True)
class MAE(Diversity, Method):
  """Hides most tokens of each sample and reconstructs their pixels.

  Attributes:
    mask_ratio: share of a sample's tokens that is hidden.
    norm_pixels: targets are (x - mean) / sqrt(var + 1e-6) of each patch, with the unbiased variance.
    mask_channels: for channel tokens, 'independent' masks a channel, 'shared' the same positions in all, or 'dynamic',
      see `_dynamic`: then a step may hide anything from no token to all but one channel, and the encoder's program is
      that of all tokens.
    patches_only, channels_only: probabilities of the first two modes of 'dynamic'.
    unsampled: what becomes of channels that channel sampling left out: 'drop', as HCS defines it, or 'predict', so
      that they are reconstructed from the others (channel masking as in CA-MAE and ChA-MAEViT).
    decoder_dim, decoder_depth, decoder_heads: of the decoder. 0 follows the encoder: 512, 8 and 16 as published where
      it is 768 wide or more; its own width, 4 blocks (2 below 384) and heads of 32 where it is narrower.
    decoder_channels: 'together' or 'separate', see `Decoder`.
    decoder_registers: whether the encoder's registers (encoder.num_registers: memory tokens) go on into the decoder.
    decoder_shares: whether the decoder adds the encoder's positions and channel embeddings in place of own ones; then
      it is as wide as the encoder.
    fourier: f, the weight of `spectral_error` beside the pixels' error, which has 1 - f.
    class_weight: w, the weight of a loss of classes beside those two, which have 1 - w; needs loader.label. class_loss,
      class_temperature: see `ClassHead`. feature: what it reads, 'cls' or 'mean' of the tokens shown.
    num_classes: filled in from the data.
  """

  encoder: Encoder
  mask_ratio: float = 0.75
  norm_pixels: bool = True
  mask_channels: str = 'independent'
  patches_only: float = 0.5
  channels_only: float = 0.5
  unsampled: str = 'drop'
  decoder_dim: int = 0
  decoder_depth: int = 0
  decoder_heads: int = 0
  decoder_channels: str = 'together'
  decoder_registers: bool = False
  decoder_shares: bool = False
  fourier: float = 0.0
  class_weight: float = 0.0
  class_loss: str = 'cross_entropy'
  class_temperature: float = 1.0
  feature: str = 'mean'
  num_classes: int = 0
  diversity_temperature: float = dataclasses.field(default=0.1, kw_only=True)

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # 1.5e-4 * B / 256 at the published batch of 4096
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'pos': 'sincos', 'kernel_init': 'xavier_uniform', 'patch_init': 'torch_bias'},
      'optimizer': {'b2': 0.95, 'weight_decay': 0.05},
      'augment': {'scale': (0.2, 1.0)},
  }

  def __post_init__(self):
    choose('objective.mask_channels', self.mask_channels, MASK_CHANNELS)
    choose('objective.unsampled', self.unsampled, UNSAMPLED)
    if not 0 < self.mask_ratio < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1')
    if min(self.patches_only, self.channels_only) < 0 or self.patches_only + self.channels_only > 1:
      raise UserError(f'objective.patches_only {self.patches_only} and channels_only {self.channels_only} must be '
                      'probabilities of two modes, together at most 1')
    if self.mask_channels == 'dynamic' and not self.encoder.per_channel:
      raise UserError('objective.mask_channels=dynamic hides channels: it needs a channel_vit')
    self.check_diversity(self.encoder)
    self._check_classes()
    self._check_decoder()

  def _check_classes(self) -> None:
    choose('objective.class_loss', self.class_loss, CLASS_LOSSES)
    choose('objective.feature', self.feature, ('cls', 'mean'))
    for name in ('fourier', 'class_weight'):
      if not 0 <= vars(self)[name] <= 1:
        raise UserError(f'objective.{name} {vars(self)[name]} is a share of the loss: it must lie in [0, 1]')
    if self.class_temperature <= 0:
      raise UserError(f'objective.class_temperature {self.class_temperature} must be above 0')

  def _check_decoder(self) -> None:
    dim, _, heads = self._decoder_size
    if dim % heads:
      raise UserError(f'objective.decoder_heads {heads} does not divide decoder_dim {dim}')
    choose('objective.decoder_channels', self.decoder_channels, SHARES)
    if self.decoder_channels == 'separate' and not self.encoder.per_channel:
      raise UserError('objective.decoder_channels=separate needs one token a channel: a channel_vit or bag')
    if self.decoder_registers and not self.encoder.num_registers:
      raise UserError('objective.decoder_registers needs registers: set encoder.num_registers, for example to 4')
    if self.decoder_shares and (not self.encoder.supports.channel_vectors or dim != self.encoder.embed_dim
                                or self.encoder.pos not in ('learned', 'sincos')):
      raise UserError('objective.decoder_shares needs a channel_vit whose encoder.pos is learned or sincos, and '
                      f'decoder_dim 0 or its width {self.encoder.embed_dim}, not {dim}')

  @property
  def _decoder_size(self) -> tuple[int, int, int]:
    width = self.encoder.embed_dim
    dim = self.decoder_dim or (width if self.decoder_shares else min(width, 512))
    depth = self.decoder_depth or (8 if width >= 768 else 4 if width >= 384 else 2)
    return dim, depth, self.decoder_heads or max(dim // 32, 1)

  @property
  def decoder(self) -> Decoder:
    """The decoder that goes with the encoder."""
    e = self.encoder
    dim, depth, heads = self._decoder_size
    pixels = math.prod(e.patch_size)
    return Decoder(
        grid=grid_of(e.image_size, e.patch_size), out_dim=pixels * (1 if e.per_channel else e.in_channels),
        vocabulary=e.in_channels if e.per_channel else 0, embed_dim=dim, depth=depth, num_heads=heads,
        kernel_init='xavier_uniform', remat=e.remat, dtype=e.dtype,
        channels=self.decoder_channels)

  @property
  def head(self) -> ClassHead:
    """Classifier of the loss of classes."""
    return ClassHead(self.num_classes, self.class_loss, self.class_temperature, self.encoder.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    rng, mask_key = jax.random.split(rng)
    encoder_key, decoder_key = jax.random.split(rng)
    image, channels = batch['image'], batch['channels']
    encoder = self.encoder.init(encoder_key, **inputs(batch))['params']
    masking = self._mask(mask_key, batch)
    latent = jnp.zeros((*masking.ids_keep.shape, self.encoder.embed_dim))  # [B, K, D]
    more = int(self.encoder.class_token) + (self.encoder.num_registers if self.decoder_registers else 0)
    prefix = jnp.zeros((image.shape[0], more, self.encoder.embed_dim)) if more else None  # [B, P, D]
    decoder = self.decoder.init(decoder_key, prefix, latent, masking.visible, masking.ids_restore, channels,
                                masking.decoder_valid, self._shared(nn.unbox(encoder), batch))['params']
    params = {'encoder': encoder, 'decoder': decoder}
    params |= self.init_proxies(self.encoder, jax.random.fold_in(rng, 2))
    if self.class_weight:
      if self.num_classes < 2:
        raise UserError('objective.class_weight needs loader.label, a manifest column with at least two classes')
      params['head'] = self.head.init(jax.random.fold_in(rng, 3), latent[:, 0])['params']
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean squared error over the hidden, existing tokens of the global batch, and what the options add."""
    del step
    params = variables['params']
    latent, predicted, masking, stats = self._forward(params, batch, rng, train)
    hidden, there = masking.hidden, self._pixels_there(batch)  # [B, N], [B, 1, P]
    counts = hidden[..., None] > 0 if there is None else (hidden[..., None] > 0) & there  # [B, N, 1 or P]
    target = jnp.where(counts, self.target(batch['image'], there), 0.0)  # [B, N, P]; a missing channel may hold NaN
    predicted = predicted.astype(jnp.float32)
    over_hidden = lambda error: jnp.where(hidden > 0, error, 0.0).sum() / jnp.maximum(hidden.sum(), 1.0)
    loss = over_hidden(mean_of(jnp.square(predicted - target), there)[..., 0])
    metrics = {'mae_loss': loss, 'hidden_tokens': hidden.sum(axis=1).mean()}
    if self.fourier:
      metrics['fourier_loss'] = over_hidden(spectral_error(predicted, target, self.encoder.patch_size, there))
      loss = (1 - self.fourier) * loss + self.fourier * metrics['fourier_loss']
    if self.class_weight and 'label' in batch:
      logits = self.head.apply({'params': params['head']}, latent.pooled(self.feature))  # [B, classes]
      metrics |= classified(logits, batch['label'])
      loss = (1 - self.class_weight) * loss + self.class_weight * metrics['class_loss']
    apart = self.diversity_losses(self.encoder, params, batch, masking.shown) if train else {}
    loss = loss + self.weighted_diversity(apart)
    return loss, (with_stats(metrics | apart, train, encoder=stats), variables['extra'])

  def target(self, image: jax.Array, there: jax.Array | None = None) -> jax.Array:
    """Pixels of each token [B, N, P] in float32; no gradient flows through it.

    `there` [B, 1, P] bool leaves the pixels of missing channels out of the patch's mean and variance.
    """
    x = patchify(jax.lax.stop_gradient(image).astype(jnp.float32), self.encoder.patch_size, self.encoder.per_channel)
    x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, P]
    return normalised(x, there) if self.norm_pixels else x

  def _pixels_there(self, batch: Batch) -> jax.Array | None:
    """[B, 1, P] bool, the pixels of a patch whose channel a sample has; None where all count."""
    mask = batch.get('channel_mask')
    if self.unsampled == 'predict':
      mask = batch.get('channel_there', mask)
    if self.encoder.per_channel or mask is None:
      return None
    return jnp.tile(mask, (1, math.prod(self.encoder.patch_size)))[:, None]  # [B, C] -> [B, 1, P]

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, Any]:
    """{'reconstructions': (original, masked, predicted)}, each [B, *size, C]; predictions in the patch's scale."""
    predicted, hidden, _ = self._predict(variables['params'], batch, rng, False)
    image = batch['image']
    e = self.encoder
    pixels = patchify(image, e.patch_size, e.per_channel)
    shape, flat = pixels.shape, pixels.reshape(image.shape[0], -1, pixels.shape[-1])  # [B, N, P]
    if self.norm_pixels:
      std = jnp.sqrt(flat.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
      predicted = predicted * std + flat.mean(axis=-1, keepdims=True)
    hidden = hidden[..., None]  # [B, N, 1]
    back = lambda x: unpatchify(x.reshape(shape), image.shape[1:-1], e.patch_size, e.per_channel)
    masked = jnp.where(hidden > 0, jnp.nan, flat)
    filled = jnp.where(hidden > 0, predicted, flat)
    return {'reconstructions': (image, back(masked), back(filled))}

  def _predict(self, params: Any, batch: Batch, rng: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, Any]:
    """Predicted pixels [B, N, P] of every token, which tokens were hidden [B, N] float, new running statistics."""
    _, predicted, masking, stats = self._forward(params, batch, rng, train)
    return predicted, masking.hidden, stats

  def _forward(self, params: Any, batch: Batch, rng: jax.Array,
               train: bool) -> tuple[Features, jax.Array, Masking, Any]:
    """Features of the shown tokens, predicted pixels [B, N, P] of every token, the masking, new running statistics."""
    mask_key, drop_key = jax.random.split(rng)
    masking = self._mask(mask_key, batch)
    some = token_slots(self.encoder, batch)[2] is not None or self.mask_channels == 'dynamic'
    valid = masking.visible if some else None
    latent, stats = encode_shown(self.encoder, params['encoder'], batch, masking.ids_keep, valid, train,
                                 {'dropout': drop_key})  # patches [B, K, D]
    predicted = self.decoder.apply(
        {'params': params['decoder']}, self._prefix(latent), latent.patches, masking.visible, masking.ids_restore,
        batch['channels'], masking.decoder_valid, self._shared(params['encoder'], batch))  # [B, N, P]
    return latent, predicted, masking, stats

  def _prefix(self, latent: Features) -> jax.Array | None:
    """Tokens [B, P, D] that the decoder sees besides the patches."""
    cls = None if latent.cls is None else latent.cls[:, None]  # [B, 1, D]
    parts = [x for x in (cls, latent.registers if self.decoder_registers else None) if x is not None]
    return jnp.concatenate(parts, axis=1) if parts else None

  def _shared(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array] | None:
    """The encoder's positions [N, D] and embeddings [B, C, D] of the batch's channels, if the decoder shares them."""
    if not self.decoder_shares:
      return None
    grid = grid_of(batch['image'].shape[1:-1], self.encoder.patch_size)
    table = self.encoder.apply({'params': params}, grid, method='_position_table')  # [N, D]
    return table, self.encoder.apply({'params': params}, method='channel_vectors')[batch['channels']]  # [B, C, D]

  def _mask(self, rng: jax.Array, batch: Batch) -> Masking:
    """Draws what each sample shows, by sorting noise as the official code does."""
    size, (_, count, valid) = batch['image'].shape[0], token_slots(self.encoder, batch)
    alike = batch['channels'].shape[1] if self.encoder.per_channel and self.mask_channels == 'shared' else 1
    len_keep = alike * int(count // alike * (1 - self.mask_ratio))  # K
    if len_keep < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} hides all {count} tokens: lower it or the patch size')
    noise_key, mode_key = jax.random.split(rng) if self.mask_channels == 'dynamic' else (rng, rng)
    noise = jnp.tile(jax.random.uniform(noise_key, (size, count // alike)), (1, alike))  # [B, N]
    sampled = jnp.ones((size, count), bool) if valid is None else valid
    decoder_valid = self._decoder_valid(batch, valid)
    exists = sampled if decoder_valid is None else decoder_valid
    noise = noise + 2.0 * ~sampled + 2.0 * ~exists  # first what may be shown, then what is only predicted
    quota = sampled.sum(axis=1, keepdims=True) * len_keep // count  # [B, 1], fewer where channels are missing
    if self.mask_channels == 'dynamic':
      len_keep, hide = count, self._dynamic(mode_key, noise, sampled, batch['channels'].shape[1])
      noise, quota = noise + 2.0 * hide, (sampled & ~hide).sum(axis=1, keepdims=True)
    ids_shuffle = jnp.argsort(noise, axis=1)  # [B, N]
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    visible = jnp.arange(len_keep)[None] < quota  # [B, K]
    hidden = (ids_restore >= quota) & exists
    return Masking(ids_shuffle[:, :len_keep], ids_restore, visible, hidden.astype(jnp.float32), decoder_valid)

  def _decoder_valid(self, batch: Batch, valid: jax.Array | None) -> jax.Array | None:
    """Tokens [B, N] that the decoder sees: the `valid` ones, or all tokens of a sample's channels."""
    if self.unsampled == 'predict' and self.encoder.per_channel and 'channel_there' in batch:
      return token_slots(self.encoder, {**batch, 'channel_mask': batch['channel_there']})[2]
    return valid

  def _dynamic(self, rng: jax.Array, noise: jax.Array, sampled: jax.Array, count: int) -> jax.Array:
    """Which tokens [B, C * N] dynamic channel-patch masking hides (ChA-MAEViT, arXiv 2503.19331).

    One mode a batch: patches, of each channel by itself a share `mask_ratio`; channels, k ~ U{0 .. C - 1} whole ones;
    or both. k goes by the number of channels that a sample has, and which ones are hidden is a sample's own draw.
    """
    mode_key, count_key, channel_key = jax.random.split(rng, 3)
    by_channel = lambda x: x.reshape(len(x), count, -1)
    there = by_channel(sampled).any(axis=2)  # [B, C]
    rank = lambda x: jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)
    keep = jnp.asarray([int(n * (1 - self.mask_ratio)) for n in range(noise.shape[1] // count + 1)])
    patches = rank(by_channel(noise)) >= keep[by_channel(sampled).sum(axis=2, keepdims=True)]  # [B, C, N]
    k = jnp.floor(jax.random.uniform(count_key) * there.sum(axis=1, keepdims=True))
    drawn = jnp.where(there, jax.random.uniform(channel_key, there.shape), 2.0)
    channels = (rank(drawn) < k)[..., None]  # [B, C, 1]
    mode = jax.random.uniform(mode_key)
    with_patches = (mode < self.patches_only) | (mode >= self.patches_only + self.channels_only)
    hide = (patches & with_patches) | (channels & (mode >= self.patches_only))
    return hide.reshape(noise.shape)  # [B, C * N]


def normalised(x: jax.Array, there: jax.Array | None = None) -> jax.Array:
  """Pixels [B, N, P] of each token with mean 0 and variance 1 (unbiased, plus 1e-6), of those there, as `mean_of`."""
  count = x.shape[-1] if there is None else jnp.maximum(there.sum(axis=-1, keepdims=True), 2)
  centred = x - mean_of(x, there)
  return centred / jnp.sqrt(mean_of(jnp.square(centred), there) * count / (count - 1) + 1e-6)


def mean_of(x: jax.Array, there: jax.Array | None) -> jax.Array:
  """Mean of [B, N, P] over the last axis, of the places that are there; keeps the axis."""
  if there is None:
    return x.mean(axis=-1, keepdims=True)
  return jnp.where(there, x, 0.0).sum(axis=-1, keepdims=True) / jnp.maximum(there.sum(axis=-1, keepdims=True), 1)
