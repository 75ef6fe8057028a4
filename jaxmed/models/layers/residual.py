"""Residual convolutions with plain instance norm, of which MONAI's decoders of volumes are made.

Maps are [B, *size, D]. Definitions: Project-MONAI/MONAI, monai/networks/blocks/dynunet_block.py and unetr_block.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers.convolution import LEAK, Conv, keep, normalise
from jaxmed.models.layers.norm import GroupNorm
from jaxmed.models.layers.unet_blocks import Up


class ResidualConv(nn.Module):
  """Two 3^d convolutions with instance norm without scale and bias, and a shortcut: [B, *size, D] -> [.., features].

  Leaky ReLU after the first norm and after the sum; where the width changes the shortcut is a normalised 1^d one.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    norm = lambda y: normalise(GroupNorm(affine=False, dtype=self.dtype), y, visible, False)
    conv = lambda kernel, name: Conv(self.features, kernel, 1, kernel // 2, False, 'torch', self.dtype, name=name)
    y = nn.leaky_relu(norm(conv(3, 'conv1')(x)), LEAK)
    y = norm(conv(3, 'conv2')(y))
    x = x.astype(self.dtype) if x.shape[-1] == self.features else norm(conv(1, 'conv3')(x))
    return keep(nn.leaky_relu(y + x, LEAK), visible)


def raised(features: int, factor: tuple[int, ...], dtype: Any, name: str) -> Up:
  """A transposed convolution without bias whose windows do not overlap."""
  return Up(features, factor, 'transposed', dtype, False, 'torch', name=name)


class UpBlock(nn.Module):
  """A transposed convolution to a finer map, that map beside it, and a residual convolution of both.

  [B, *size, D] and a skip [B, *size * factor, E] -> [B, *size * factor, features].
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
    factor = tuple(n // m for n, m in zip(skip.shape[1:-1], x.shape[1:-1], strict=True))
    x = raised(self.features, factor, self.dtype, 'up')(x)
    return ResidualConv(self.features, self.dtype, name='conv')(jnp.concatenate([x, skip.astype(x.dtype)], axis=-1))
