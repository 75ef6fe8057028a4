"""ChannelViT: one token a patch and channel (Bao, Sivanandan, Karaletsos 2024; insitro/ChannelViT)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Supports
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers.channel_attention import TokenOrder, token_order
from jaxmed.models.layers.channel_embed import HashedChannels, initializer, unnamed
from jaxmed.models.layers.positions import resample
from jaxmed.models.layers.tokens import Tokens, grid_of, patchify, without_missing


class ChannelViT(ViT):
  """ViT whose patches are embedded one channel at a time by a shared projection.

  Tokens are channel-major: all patches of the first channel, then of the second. A learned embedding of the channel
  is added before the positions, which all channels share. `in_channels` is the size of the channel vocabulary; an
  input may hold any number of its channels in any order.

  Attributes:
    channel_attention: 'joint' is the paper's, over all tokens; the others cost less, see `channel_attention`.
    channel_embedding: 'table' is the paper's; 'hashed' makes embeddings of the names and what else is known of channels
      (`channel_names`, see `channel_embed.parse`), with `hash_rows` rows of `hash_width` numbers and `hashes` hash
      functions a feature, so that other channels need no other parameters.
    hash_prune, hash_widths, hash_draw: OptEmbed's ways to shrink that table: the weight of what draws thresholds up (0:
      none), numbers of a row for each feature, and whether training draws these, see `channel_embed`.
    channel_init: of the table, 'trunc_normal' or 'orthogonal' (DiChaViT).

  With 'offset' interpolation (the default) positions are those of the official class, which resamples its table at
  the native size too unless the sample has a single channel. Patches begin as PyTorch's convolution does.
  """

  pos_interpolation: str = 'offset'
  patch_init: str = 'torch'
  channel_attention: str = 'joint'
  channel_embedding: str = 'table'
  channel_init: str = 'trunc_normal'
  hash_rows: int = 4096
  hashes: int = 2
  hash_width: int = 32
  hash_prune: float = 0.0
  hash_widths: tuple[int, ...] = ()
  hash_draw: bool = False
  channel_names: tuple[str, ...] = ()

  per_channel = True
  supports = Supports(one_pass=True, embed_patches=True, project=True, channel_vectors=True, penalty=True, sizes=True,
                      attention_maps=True, levels=True)

  def setup(self):
    super().setup()
    if self.channel_embedding == 'hashed':
      names = self.channel_names or unnamed(self.in_channels)
      self.channel_hash = HashedChannels(
          names, self.embed_dim, self.hash_rows, self.hashes, self.hash_width, self.hash_prune > 0, self.hash_widths,
          self.hash_draw)
    else:
      init = nn.with_logical_partitioning(initializer(self.channel_init), ('channels', 'embed'))
      self.channel_embed = self.param('channel_embed', init, (self.in_channels, self.embed_dim), jnp.float32)

  def channel_vectors(self) -> jax.Array:
    """The embedding [V, D] of each channel of the vocabulary, float32."""
    return self.channel_hash() if self.channel_embedding == 'hashed' else self.channel_embed

  def penalty(self, params: Mapping[str, Any]) -> jax.Array | None:
    """What is added to any method's loss: hash_prune * sum exp(-threshold) (OptEmbed, equation 8); None for nothing."""
    if self.channel_embedding != 'hashed' or not self.hash_prune:
      return None
    return self.hash_prune * jnp.exp(-params['channel_hash']['threshold']).sum()

  def _token_order(self, grid: tuple[int, ...]) -> TokenOrder | None:
    return token_order(self.channel_attention, grid, self.num_prefix_tokens)

  def project(self, image: jax.Array) -> jax.Array:
    """Projected patches [B, C, N, D] of images [B, *size, C], before anything is added."""
    return self.patch_embed(patchify(image, self.patch_size, per_channel=True))

  def embed_patches(self, image: jax.Array, channels: jax.Array | None = None,
                    channel_mask: jax.Array | None = None, hidden: jax.Array | None = None,
                    sizes: jax.Array | None = None) -> Tokens:
    """Embeds images [B, *size, C], normalised float, as C * N patch tokens with positions.

    Args:
      channels: [B, C] int, each channel's row in the vocabulary; None for 0 .. C-1.
      channel_mask: [B, C] bool, True where a channel is there; None for all.
      hidden: [B, C * N] bool, tokens whose patch becomes the mask token; None for none.
      sizes: [B, rank] int, pixels of each image in the corner of its array, multiples of the patch; None for all.
    """
    batch, *size, count = image.shape
    grid = grid_of(tuple(size), self.patch_size)
    if channels is None:
      channels = jnp.broadcast_to(jnp.arange(count), (batch, count))
    image = without_missing(image, channel_mask)
    image, own, cells = self._cropped(image, grid, sizes)
    x = self.project(image)
    x = self._hide(x, None if hidden is None else hidden.reshape(x.shape[:3]))
    x = x + self.channel_vectors()[channels][:, :, None].astype(x.dtype)
    x = x + self._channel_positions(grid, count, channel_mask, own).astype(x.dtype)
    x = x.reshape(batch, -1, x.shape[-1])  # [B, C * N, D]
    tokens = x.shape[1] // count
    valid = None if channel_mask is None else jnp.repeat(channel_mask, tokens, axis=1)
    if cells is not None:
      cells = jnp.tile(cells, (1, count))
      valid = cells if valid is None else valid & cells
    where = self._coordinates(grid, own)
    return Tokens(x, valid, None if where is None else jnp.tile(where, (1, count, 1)))

  def _channel_positions(self, grid, count: int, channel_mask: jax.Array | None, own: jax.Array | None) -> jax.Array:
    """Positions [1 or B, 1, N, D]: resampled by the official rule, which depends on the number of channels."""
    if own is not None:
      shifted, table = self._own_positions(grid, own)
      if self.pos_interpolation != 'offset':
        return table[:, None]
      alone = jnp.full(len(own), count == 1) if channel_mask is None else channel_mask.sum(axis=1) == 1
      return jnp.where(alone[:, None, None], table, shifted)[:, None]
    table = self._position_table(grid)
    native = grid_of(self.image_size, self.patch_size)
    if self.pos not in ('learned', 'sincos') or self.pos_interpolation != 'offset' or grid != native:
      return table[None, None]
    shifted = resample(table, grid, grid, self.pos_interpolation)
    if channel_mask is None:
      return (table if count == 1 else shifted)[None, None]
    single = channel_mask.sum(axis=1)[:, None, None, None] == 1
    return jnp.where(single, table, shifted)
