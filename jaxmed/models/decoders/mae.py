"""The light decoder of masked autoencoders, over patch or channel tokens."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers import positions as pos
from jaxmed.models.layers.transformer import MLP, Dense, LayerNorm, Transformer

SHARES = ('together', 'separate')


class Decoder(nn.Module):
  """Fills mask tokens in and predicts `out_dim` pixels for each token.

  Attributes:
    grid: token grid of one channel. vocabulary: rows of the channel embedding, 0 for patch tokens.
    channels: 'together', all tokens through the same blocks with the class token (facebookresearch/mae, models_mae.py;
      cha_mae_vit, models/mae_modules.py); or 'separate': they look at each other once, by cross-attention without a
      residual, and then each channel of the vocabulary has blocks of its own (CA-MAE; recursionpharma/maes_microscopy,
      mae_modules.py:CAMAEDecoder). Those blocks run once for every name of the vocabulary, whatever a batch holds.
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
  channels: str = 'together'

  @nn.compact
  def __call__(self, prefix: jax.Array | None, latent: jax.Array, visible: jax.Array, ids_restore: jax.Array,
               channels: jax.Array, valid: jax.Array | None,
               shared: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """Predicts pixels.

    Args:
      prefix: [B, D] or [B, P, D], class token and registers of the encoder, or None. latent: [B, K, D] of the shown
        tokens.
      visible: [B, K] bool, False where `latent` is padding. ids_restore: [B, N], rank of each token; token n is
        latent[ids_restore[n]] if ids_restore[n] < K and visible there.
      channels: [B, C] ids. valid: [B, N] bool or None.
      shared: (positions [N / C, dim], channel embeddings [B, C, dim]) in place of own ones.
    Returns:
      [B, N, out_dim] float of the compute type.
    """
    compute, batch, count = jnp.dtype(self.dtype), latent.shape[0], ids_restore.shape[1]
    embed = Dense((self.embed_dim,), (None, 'embed'), True, self.kernel_init, compute, name='embed')
    x = self._filled(embed(latent), visible, ids_restore)
    table, names = shared or (jnp.asarray(pos.sincos(self.grid, self.embed_dim)), self._names(channels))
    x = x + jnp.tile(table, (count // table.shape[0], 1)).astype(compute)
    if names is not None:
      x = x + jnp.repeat(names, count // channels.shape[1], axis=1).astype(compute)
    if self.channels == 'separate':
      x = self._separate(x, channels, valid)
    else:
      if prefix is not None:
        prefix = embed(prefix.reshape(batch, -1, prefix.shape[-1]))
        x = jnp.concatenate([prefix, x], axis=1)
        more = ((0, 0), (prefix.shape[1], 0))
        valid = None if valid is None else jnp.pad(valid, more, constant_values=True)
      x = LayerNorm(compute, name='norm')(self._blocks(Transformer)(x, valid)[:, -count:])
    return Dense((self.out_dim,), ('embed', 'patch'), True, self.kernel_init, compute, name='predict')(x)

  def _filled(self, latent: jax.Array, visible: jax.Array, ids_restore: jax.Array) -> jax.Array:
    """Tokens [B, N, dim] in the order of the grid, the mask token where none was shown."""
    batch, shown, dim = latent.shape
    hole = self.param('mask_token', _named(None), (1, dim), jnp.float32).astype(latent.dtype)
    x = jnp.where(visible[..., None], latent, hole)  # [B, K, dim]
    x = jnp.concatenate([x, jnp.broadcast_to(hole, (batch, ids_restore.shape[1] - shown, dim))], axis=1)
    return jnp.take_along_axis(x, ids_restore[..., None], axis=1)

  def _names(self, channels: jax.Array) -> jax.Array | None:
    """Own channel embeddings [B, C, dim]."""
    if not self.vocabulary:
      return None
    return self.param('channel_embed', _named('channels'), (self.vocabulary, self.embed_dim), jnp.float32)[channels]

  def _blocks(self, kind: Callable) -> Any:
    return kind(self.depth, self.num_heads, kernel_init=self.kernel_init, remat=self.remat,
                dtype=jnp.dtype(self.dtype), name='transformer')

  def _separate(self, x: jax.Array, channels: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Tokens [B, C * N, dim] by the blocks of their channels, [B, C * N, dim]."""
    (batch, count, dim), compute = x.shape, jnp.dtype(self.dtype)
    norm = lambda name: LayerNorm(compute, name=name)
    x = self._look(norm('query_norm')(x), norm('context_norm')(x), valid)
    x = x + MLP(4 * dim, 'gelu', self.kernel_init, compute, name='mlp')(norm('out_norm')(x))
    x = x.reshape(batch, channels.shape[1], -1, dim)  # [B, C, N, dim]
    places = jax.nn.one_hot(channels, self.vocabulary, dtype=compute)  # [B, C, V]
    if valid is not None:  # an empty slot may have any name
      places = places * valid.reshape(x.shape[:3]).any(axis=2, keepdims=True)
    rows = jnp.einsum('bcv,bcnd->vbnd', places, x)
    cells = None if valid is None else valid.reshape(x.shape[:3]).any(axis=1)  # [B, N]
    each = nn.vmap(Transformer, in_axes=(0, None), out_axes=0, variable_axes={'params': 0}, split_rngs={'params': True},
                   metadata_params={nn.PARTITION_NAME: 'channels'})
    return jnp.einsum('bcv,vbnd->bcnd', places, self._blocks(each)(rows, cells)).reshape(batch, count, dim)

  def _look(self, query: jax.Array, context: jax.Array, valid: jax.Array | None, heads: int = 8) -> jax.Array:
    """Cross-attention [B, N, dim] of 8 heads, whose projections have no bias."""
    dim = query.shape[-1]
    heads = heads if dim % heads == 0 else self.num_heads
    make = lambda n, name: Dense((n, heads, dim // heads), ('embed', None, 'heads', 'head_dim'), False,
                                 self.kernel_init, query.dtype, name=name)
    q, kv = make(1, 'look_q')(query), make(2, 'look_kv')(context)
    out = kernels.attention(q[:, :, 0], kv[:, :, 0], kv[:, :, 1], valid)
    return Dense((dim,), ('heads', 'embed'), True, self.kernel_init, query.dtype, fold=2, name='look_proj')(out)


def _named(axis: str | None) -> Any:
  return nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, 'embed'))
