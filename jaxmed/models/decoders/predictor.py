"""Predictors of latent targets at hidden places, of I-JEPA and data2vec 2.0; no part of the product."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers import positions as pos
from jaxmed.models.layers.initial import normal
from jaxmed.models.layers.transformer import Dense, LayerNorm, Transformer


class BlockPredictor(nn.Module):
  """Predicts latents of target blocks from context tokens (facebookresearch/ijepa, src/models/vision_transformer.py).

  Attributes:
    grid: token grid of one channel. vocabulary: rows of the channel embedding, 0 for patch tokens.
    out_dim: width of the encoder; embed_dim: of the predictor.
  """

  grid: tuple[int, ...]
  out_dim: int
  vocabulary: int = 0
  embed_dim: int = 384
  depth: int = 6
  num_heads: int = 12
  remat: str = 'none'
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, latent: jax.Array, shown: jax.Array, visible: jax.Array, wanted: jax.Array, asked: jax.Array,
               channels: jax.Array) -> jax.Array:
    """Predicts each block by itself.

    Args:
      latent: [B, K, D] of the context. shown: [B, K] their places among N tokens; visible: [B, K] bool, not padding.
      wanted: [B, M, T] places of M blocks; asked: [B, M, T] bool, not padding. channels: [B, C] ids.
    Returns:
      [B, M, T, out_dim].
    """
    compute, dim = jnp.dtype(self.dtype), self.embed_dim
    batch, blocks, size = wanted.shape
    places = self._places(channels, compute)  # [B, N, dim]
    at = lambda index: jnp.take_along_axis(places, index.reshape(batch, -1, 1), axis=1)
    named = nn.with_logical_partitioning(normal(), (None, 'embed'))
    token = self.param('mask_token', named, (1, dim), jnp.float32).astype(compute)
    context = Dense((dim,), (None, 'embed'), dtype=compute, name='embed')(latent) + at(shown)
    context = jnp.broadcast_to(context[:, None], (batch, blocks, *context.shape[1:]))
    x = jnp.concatenate([context, token + at(wanted).reshape(batch, blocks, size, dim)], axis=2)
    there = jnp.concatenate([jnp.broadcast_to(visible[:, None], (batch, blocks, visible.shape[1])), asked], axis=2)
    x = Transformer(self.depth, self.num_heads, remat=self.remat, dtype=compute, name='transformer')(
        x.reshape(batch * blocks, -1, dim), there.reshape(batch * blocks, -1))
    x = LayerNorm(compute, name='norm')(x[:, -size:])
    x = Dense((self.out_dim,), ('embed', None), dtype=compute, name='predict')(x)
    return x.reshape(batch, blocks, size, self.out_dim)

  def _places(self, channels: jax.Array, dtype: Any) -> jax.Array:
    """What tells the tokens' places apart: positions [B, N, dim], and the channel's embedding for channel tokens."""
    table = jnp.asarray(pos.sincos(self.grid, self.embed_dim))[None]
    if not self.vocabulary:
      return jnp.broadcast_to(table, (channels.shape[0], *table.shape[1:])).astype(dtype)
    named = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('channels', 'embed'))
    names = self.param('channel_embed', named, (self.vocabulary, self.embed_dim), jnp.float32)[channels]
    places = names[:, :, None] + table[:, None]  # [B, C, cells, dim]
    return places.reshape(channels.shape[0], -1, self.embed_dim).astype(dtype)


class ConvPredictor(nn.Module):
  """Fills a grid in by grouped convolutions (fairseq, examples/data2vec/models/modalities/modules.py:Decoder2d).

  Each of `depth` layers: convolution, layer norm without weights, GELU, plus its input. Any rank; channel tokens pass
  channel by channel.
  """

  grid: tuple[int, ...]
  out_dim: int
  embed_dim: int = 768
  depth: int = 6
  groups: int = 16
  kernel: int = 3
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Maps x [B, C * cells, D] to [B, C * cells, out_dim]; to cells that are not `valid` [B, C * cells] no other looks,
    as to those beyond the border."""
    compute, shape = jnp.dtype(self.dtype), x.shape
    x = x.reshape(-1, *self.grid, shape[-1]).astype(compute)
    inside: Any = 1 if valid is None else valid.reshape(*x.shape[:-1], 1).astype(compute)
    for i in range(self.depth):
      y = GroupedConv(self.embed_dim, self.kernel, self.groups, compute, name=f'conv{i}')(x * inside)
      y = kernels.layer_norm(y, jnp.ones(self.embed_dim), jnp.zeros(self.embed_dim), 1e-5).astype(compute)
      y = kernels.gelu(y)
      x = x + y if x.shape == y.shape else y
    x = x.reshape(*shape[:-1], self.embed_dim)
    return Dense((self.out_dim,), ('embed', None), dtype=compute, name='predict')(x)


class GroupedConv(nn.Module):
  """Convolution [B, *grid, D] -> [B, *grid, features] in groups of features, zero-padded to keep the grid.

  Written as one product a group over the stacked neighbours: XLA's grouped convolutions are many times slower on a CPU.
  """

  features: int
  kernel: int
  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    grid, size = x.shape[1:-1], x.shape[-1] // self.groups
    taps = list(itertools.product(range(self.kernel), repeat=len(grid)))
    boxed = nn.with_logical_partitioning
    bound = (len(taps) * size) ** -0.5  # PyTorch's: a uniform of one over the root of the fan-in
    uniform = lambda key, s, dtype: jax.random.uniform(key, s, dtype, -bound, bound)
    kernel = self.param('kernel', boxed(uniform, ('stack', None, 'embed')),
                        (self.groups, len(taps) * size, self.features // self.groups), jnp.float32)
    bias = self.param('bias', boxed(nn.initializers.zeros_init(), ('embed',)), (self.features,), jnp.float32)
    before = (self.kernel - 1) // 2
    wide = jnp.pad(x, ((0, 0), *((before, self.kernel - 1 - before),) * len(grid), (0, 0)))
    shifted = [wide[(slice(None), *(slice(t, t + n) for t, n in zip(tap, grid, strict=True)))] for tap in taps]
    stacked = jnp.stack([s.reshape(-1, self.groups, size) for s in shifted], axis=2)  # [B * cells, G, taps, D / G]
    stacked = stacked.reshape(-1, self.groups, len(taps) * size).astype(self.dtype)
    out = jnp.einsum('ngi,gio->ngo', stacked, kernel.astype(self.dtype))
    return out.reshape(*x.shape[:-1], self.features) + bias.astype(self.dtype)
