"""What Alice puts on an encoder: a decoder of tokens, and the alignment of two networks' tokens by the same queries.

Jiang et al. 2023; alibaba-damo-academy/alice, CASA/CASA_Module.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers.transformer import Dense, LayerNorm, Transformer

EPSILON = 1e-6  # of the norms
HEAD_DIM = 64


class TokenDecoder(nn.Module):
  """Blocks of a transformer on an encoder's tokens: decoded tokens of the encoder's width, and the pixels of each.

  Attributes:
    out_dim: pixels of a token.
  """

  out_dim: int
  embed_dim: int = 384
  depth: int = 2
  num_heads: int = 6
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, N, D], of which `valid` [B, N] exist (None for all) -> [B, N, D], and [B, N, out_dim] float32."""
    compute, width = jnp.dtype(self.dtype), x.shape[-1]
    dense = lambda size, axes, name: Dense((size,), axes, dtype=compute, name=name)
    y = dense(self.embed_dim, (None, 'embed'), 'embed')(x.astype(compute))
    y = Transformer(self.depth, self.num_heads, dtype=compute, name='transformer')(y, valid)
    y = LayerNorm(compute, name='norm')(y)
    return dense(width, ('embed', None), 'tokens')(y), dense(self.out_dim, ('embed', 'patch'), 'pixels')(y).astype(
        jnp.float32)


class CASA(nn.Module):
  """Cross-attention and an MLP, each added to its input and layer-normalised, [B, N, K] float32.

  Dropout is of what both give and not of the weights of attention, which are never all in memory.

  Attributes:
    num_heads: of 64 numbers each. hidden_dim: of the MLP. dropout: of the outputs of attention and MLP.
  """

  num_heads: int = 8
  hidden_dim: int = 2048
  dropout: float = 0.1
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, query: jax.Array, context: jax.Array, valid: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    """Queries [B, N, K] look at a context [B, M, K], of which `valid` [B, M] exist; None for all."""
    compute, width = jnp.dtype(self.dtype), query.shape[-1]
    wide = lambda x, name: Dense((self.num_heads, HEAD_DIM), ('embed', 'heads', 'head_dim'), False, dtype=compute,
                                 name=name)(x.astype(compute))
    drop = lambda x: nn.Dropout(self.dropout, deterministic=not train)(x)
    norm = lambda x, name: LayerNorm(compute, EPSILON, name=name)(x)
    y = kernels.attention(wide(query, 'q'), wide(context, 'k'), wide(context, 'v'), valid)
    y = Dense((width,), ('heads', 'embed'), False, dtype=compute, fold=2, name='proj')(y)
    x = norm(query.astype(compute) + drop(y), 'norm1')
    y = jax.nn.relu(Dense((self.hidden_dim,), ('embed', 'mlp'), dtype=compute, name='fc1')(x))
    y = Dense((width,), ('mlp', 'embed'), dtype=compute, name='fc2')(y)
    return norm(x + drop(y), 'norm2').astype(jnp.float32)
