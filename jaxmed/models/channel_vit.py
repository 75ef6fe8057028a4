"""ChannelViT: one token a patch and channel (Bao, Sivanandan, Karaletsos 2024; insitro/ChannelViT)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.positions import resample
from jaxmed.models.tokens import Tokens, grid_of, patchify
from jaxmed.models.vit import ViT


class ChannelViT(ViT):
  """ViT whose patches are embedded one channel at a time by a shared projection.

  Tokens are channel-major: all patches of the first channel, then of the second. A learned embedding of the channel
  is added before the positions, which all channels share. `in_channels` is the size of the channel vocabulary; an
  input may hold any number of its channels in any order.

  With 'offset' interpolation (the default) positions are those of the official class, which resamples its table at
  the native size too unless the sample has a single channel.
  """

  pos_interpolation: str = 'offset'

  per_channel = True

  def setup(self):
    super().setup()
    init = nn.with_logical_partitioning(nn.initializers.truncated_normal(0.02), ('channels', 'embed'))
    self.channel_embed = self.param('channel_embed', init, (self.in_channels, self.embed_dim), jnp.float32)

  def embed_patches(self, image: jax.Array, channels: jax.Array | None = None,
                    channel_mask: jax.Array | None = None, hidden: jax.Array | None = None) -> Tokens:
    """Embeds images [B, *size, C], normalised float, as C * N patch tokens with positions.

    Args:
      channels: [B, C] int, each channel's row in the vocabulary; None for 0 .. C-1.
      channel_mask: [B, C] bool, True where a channel is there; None for all.
      hidden: [B, C * N] bool, tokens whose patch becomes the mask token; None for none.
    """
    batch, *size, count = image.shape
    grid = grid_of(tuple(size), self.patch_size)
    if channels is None:
      channels = jnp.broadcast_to(jnp.arange(count), (batch, count))
    if channel_mask is not None:  # what a missing channel's slot holds must not matter, NaN included
      image = jnp.where(channel_mask.reshape(batch, *[1] * len(grid), count), image, 0)
    x = self.patch_embed(patchify(image, self.patch_size, per_channel=True))  # [B, C, N, D]
    x = self._hide(x, None if hidden is None else hidden.reshape(x.shape[:3]))
    x = x + self.channel_embed[channels][:, :, None].astype(x.dtype)
    x = x + self._channel_positions(grid, count, channel_mask).astype(x.dtype)
    x = x.reshape(batch, -1, x.shape[-1])  # [B, C * N, D]
    tokens = x.shape[1] // count
    valid = None if channel_mask is None else jnp.repeat(channel_mask, tokens, axis=1)
    where = self._coordinates(grid)
    return Tokens(x, valid, None if where is None else jnp.tile(where, (1, count, 1)))

  def _channel_positions(self, grid, count: int, channel_mask: jax.Array | None) -> jax.Array:
    """Positions [1 or B, 1, N, D]: resampled by the official rule, which depends on the number of channels."""
    table = self._position_table(grid)
    native = grid_of(self.image_size, self.patch_size)
    if self.pos not in ('learned', 'sincos') or self.pos_interpolation != 'offset' or grid != native:
      return table[None, None]
    shifted = resample(table, grid, grid, self.pos_interpolation)
    if channel_mask is None:
      return (table if count == 1 else shifted)[None, None]
    single = channel_mask.sum(axis=1)[:, None, None, None] == 1
    return jnp.where(single, table, shifted)
