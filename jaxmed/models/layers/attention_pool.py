"""Pooling of tokens by attention of a learned query: the MAP head of SigLIP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import initial, kernels
from jaxmed.models.layers.transformer import MLP, NORM_EPSILON, Dense, LayerNorm


class AttentionPool(nn.Module):
  """Tokens [B, N, D] -> [B, D]: a learned query attends to them; then x + MLP(norm(x)).

  google-research/big_vision, models/vit.py:MAPHead; timm's AttentionPoolLatent and transformers'
  SiglipMultiheadAttentionPoolingHead are the same. Only `valid` [B, N] tokens are attended to; None for all.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  mlp: str = 'gelu'
  kernel_init: str = 'trunc_normal'
  norm_epsilon: float = NORM_EPSILON
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    dim, heads = x.shape[-1], self.num_heads
    named = lambda law: nn.with_logical_partitioning(law, (None, 'embed'))
    probe = self.param('probe', named(initial.normal(self.kernel_init)), (1, dim), jnp.float32)
    project = lambda n, name: Dense((n, heads, dim // heads), ('embed', None, 'heads', 'head_dim'), True,
                                    self.kernel_init, self.dtype, name=name)
    q = project(1, 'q')(jnp.broadcast_to(probe, (x.shape[0], 1, dim)))[:, :, 0]
    kv = project(2, 'kv')(x)
    out = kernels.attention(q, kv[:, :, 0], kv[:, :, 1], valid)  # [B, 1, H, Dh]
    out = Dense((dim,), ('heads', 'embed'), True, self.kernel_init, self.dtype, fold=2, name='proj')(out)
    y = LayerNorm(self.dtype, self.norm_epsilon, name='norm')(out)
    return (out + MLP(int(dim * self.mlp_ratio), self.mlp, self.kernel_init, self.dtype, name='mlp')(y))[:, 0]
