"""The light decoder of masked autoencoders, over patch or channel tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models import positions as pos
from jaxmed.models.layers import Dense, LayerNorm, Transformer


class Decoder(nn.Module):
  """Fills mask tokens in and predicts `out_dim` pixels for each token (facebookresearch/mae, models_mae.py).

  Attributes:
    grid: token grid of one channel. vocabulary: rows of the channel embedding, 0 for patch tokens.
  """

  grid: tuple[int, ...]
  out_dim: int
  vocabulary: int = 0
  embed_dim: int = 512
  depth: int = 8
  num_heads: int = 16
  kernel_init: str = 'xavier_uniform'
  remat: str = 'none'
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, cls: jax.Array | None, latent: jax.Array, visible: jax.Array, order: jax.Array,
               channels: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Predicts pixels.

    Args:
      cls: [B, D] or [B, 1, D] class token of the encoder, or None. latent: [B, K, D] of the shown tokens.
      visible: [B, K] bool, False where `latent` is padding. order: [B, N], rank of each token; token n is
        latent[order[n]] if order[n] < K and visible there.
      channels: [B, C] ids. valid: [B, N] bool or None.
    Returns:
      [B, N, out_dim] float of the compute type.
    """
    compute = jnp.dtype(self.dtype)
    dim, batch = self.embed_dim, latent.shape[0]
    shown, count = latent.shape[1], order.shape[1]
    named = lambda axis: nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, 'embed'))
    embed = Dense((dim,), (None, 'embed'), True, self.kernel_init, compute, name='embed')
    hole = self.param('mask_token', named(None), (1, dim), jnp.float32).astype(compute)

    x = jnp.where(visible[..., None], embed(latent), hole)  # [B, K, dim]
    x = jnp.concatenate([x, jnp.broadcast_to(hole, (batch, count - shown, dim))], axis=1)
    x = jnp.take_along_axis(x, order[..., None], axis=1)  # [B, N, dim] in the order of the grid
    table = jnp.asarray(pos.sincos(self.grid, dim))
    x = x + jnp.tile(table, (count // table.shape[0], 1)).astype(compute)
    if self.vocabulary:
      names = self.param('channel_embed', named('channels'), (self.vocabulary, dim), jnp.float32)
      x = x + jnp.repeat(names[channels], count // channels.shape[1], axis=1).astype(compute)
    if cls is not None:
      x = jnp.concatenate([embed(cls.reshape(batch, 1, -1)), x], axis=1)
      valid = None if valid is None else jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    x = Transformer(self.depth, self.num_heads, kernel_init=self.kernel_init, remat=self.remat, dtype=compute,
                    name='transformer')(x, valid)
    x = LayerNorm(compute, name='norm')(x[:, -count:])
    return Dense((self.out_dim,), ('embed', 'patch'), True, self.kernel_init, compute, name='predict')(x)
