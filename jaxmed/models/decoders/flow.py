"""Decoders of a pair of images: displacements from their features side by side, and an image from features.

YutingHe-list/GEMINI, GEMINI_SS_MIP/models/backbone_unet3d.py:UNet_shallow and GEMINI3d.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers.convolution import Conv
from jaxmed.models.layers.norm import GroupNorm
from jaxmed.models.layers.pyramid import resize
from jaxmed.models.layers.unet_blocks import Plain, Style, pooled_down

SLOPE = 0.2  # of the leaky ReLU below zero


class FlowDecoder(nn.Module):
  """A small U-Net, a convolution a stage: features of two images [B, *size, D] -> a flow [B, *size, rank] in pixels.

  Max-pools halve the axes that are even; the way up is linear. The last convolution starts small, so that flows start
  within a pixel; the published one starts as large as any other, and flows with it.

  Attributes:
    dims: channels of the stages, the finest first; eight divides each.
  """

  dims: tuple[int, ...] = (32, 64, 64)
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    rank, dtype = x.ndim - 2, jnp.dtype(self.dtype)
    style = Style('group', SLOPE, dtype=dtype)
    conv = lambda x, dim, name: Plain(dim, (3,) * rank, (1,) * rank, True, style, name=name)(x, 0.0, None, False)
    skips: list[jax.Array] = []
    for i, dim in enumerate(self.dims):
      if i:
        x = pooled_down(x, tuple(2 if n % 2 == 0 else 1 for n in x.shape[1:-1]), 'max')
      x = conv(x, dim, f'down{i}')
      skips.append(x)
    for i in reversed(range(len(self.dims) - 1)):
      x = conv(jnp.concatenate([resize(x, skips[i].shape[1:-1]), skips[i]], axis=-1), self.dims[i], f'up{i}')
    return Conv(rank, 3, 1, 1, dtype=dtype, name='flow')(x).astype(jnp.float32)


class Restorer(nn.Module):
  """Features [B, *size, D] -> an image [B, *size, channels]: a convolution with group norm, and a linear layer."""

  channels: int
  width: int = 16
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(self.dtype)
    x = Conv(self.width, 3, 1, 1, kernel_init='leaky', dtype=dtype, name='conv')(x)
    x = nn.leaky_relu(GroupNorm(4, dtype=dtype, name='norm')(x), SLOPE)
    return Conv(self.channels, 1, kernel_init='leaky', dtype=dtype, name='out')(x).astype(jnp.float32)
