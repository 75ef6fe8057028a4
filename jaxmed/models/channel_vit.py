"""ChannelViT: one token a patch and channel (Bao, Sivanandan, Karaletsos 2024; insitro/ChannelViT)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.channel_attention import Layout, layout_of
from jaxmed.models.channel_embed import HashedChannels, initializer, unnamed
from jaxmed.models.positions import resample
from jaxmed.models.tokens import Tokens, grid_of, patchify
from jaxmed.models.vit import ViT


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
    channel_init: of the table, 'trunc_normal' or 'orthogonal' (DiChaViT).

  With 'offset' interpolation (the default) positions are those of the official class, which resamples its table at
  the native size too unless the sample has a single channel.
  """

  pos_interpolation: str = 'offset'
  channel_attention: str = 'joint'
  channel_embedding: str = 'table'
  channel_init: str = 'trunc_normal'
  hash_rows: int = 4096
  hashes: int = 2
  hash_width: int = 32
  channel_names: tuple[str, ...] = ()

  per_channel = True

  def setup(self):
    super().setup()
    if self.channel_embedding == 'hashed':
      names = self.channel_names or unnamed(self.in_channels)
      self.channel_hash = HashedChannels(names, self.embed_dim, self.hash_rows, self.hashes, self.hash_width)
    else:
      init = nn.with_logical_partitioning(initializer(self.channel_init), ('channels', 'embed'))
      self.channel_embed = self.param('channel_embed', init, (self.in_channels, self.embed_dim), jnp.float32)

  def channel_vectors(self) -> jax.Array:
    """The embedding [V, D] of each channel of the vocabulary, float32."""
    return self.channel_hash() if self.channel_embedding == 'hashed' else self.channel_embed

  def _layout(self, grid: tuple[int, ...]) -> Layout | None:
    return layout_of(self.channel_attention, grid, self.num_prefix_tokens)

  def project(self, image: jax.Array) -> jax.Array:
    """Projected patches [B, C, N, D] of images [B, *size, C], before anything is added."""
    return self.patch_embed(patchify(image, self.patch_size, per_channel=True))

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
    x = self.project(image)
    x = self._hide(x, None if hidden is None else hidden.reshape(x.shape[:3]))
    x = x + self.channel_vectors()[channels][:, :, None].astype(x.dtype)
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
