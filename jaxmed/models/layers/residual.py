"""Residual convolutions with instance norm, and transposed ones that tile: what decoders of volumes are made of.

Maps are [B, *size, D]. Definitions: Project-MONAI/MONAI, monai/networks/blocks/dynunet_block.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers.convolution import Conv, conv_init, enlarge, keep
from jaxmed.models.layers.tokens import unpatchify

EPSILON = 1e-5  # PyTorch's InstanceNorm
SLOPE = 0.01  # of the leaky ReLU


def instance_norm(x: jax.Array, visible: jax.Array | None = None) -> jax.Array:
  """x [B, *size, D] with mean 0 and variance 1 (the biased one) over the places of each sample and channel, float32.

  `visible` [B, *grid, 1] bool: only these places count, and the others become zero.
  """
  axes, x = tuple(range(1, x.ndim - 1)), x.astype(jnp.float32)
  where = jnp.ones((1,) * x.ndim) if visible is None else enlarge(visible, x.shape[1:-1]).astype(jnp.float32)
  where = jnp.broadcast_to(where, (*x.shape[:-1], 1))
  count = jnp.maximum(where.sum(axis=axes, keepdims=True), 1.0)
  mean = (x * where).sum(axis=axes, keepdims=True) / count
  apart = (x - mean) * where
  return apart * jax.lax.rsqrt(jnp.square(apart).sum(axis=axes, keepdims=True) / count + EPSILON)


class ResidualConv(nn.Module):
  """Two 3^d convolutions with instance norm without scale and bias, and a shortcut: [B, *size, D] -> [.., features].

  Leaky ReLU after the first norm and after the sum; where the width changes the shortcut is a normalised 1^d one.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    norm = lambda y: instance_norm(y, visible).astype(self.dtype)
    conv = lambda kernel, name: Conv(self.features, kernel, 1, kernel // 2, False, 'torch', self.dtype, name=name)
    y = nn.leaky_relu(norm(conv(3, 'conv1')(x)), SLOPE)
    y = norm(conv(3, 'conv2')(y))
    x = x.astype(self.dtype) if x.shape[-1] == self.features else norm(conv(1, 'conv3')(x))
    return keep(nn.leaky_relu(y + x, SLOPE), visible)


class TransposedConv(nn.Module):
  """Transposed convolution whose kernel is its stride, so that outputs tile: [B, *size, D] -> [B, *size * stride, F].

  kernel_init: a law of `convolution.conv_init`, of the kernel [*stride, D, F] seen as PyTorch sees it, whose fan-in of
  a transposed convolution is F * prod(stride).
  """

  features: int
  stride: tuple[int, ...]
  use_bias: bool = False
  kernel_init: str = 'torch'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    boxed, rank = nn.with_logical_partitioning, len(self.stride)
    law = conv_init(self.kernel_init)
    turned = lambda key, shape, dtype=jnp.float32: law(key, (*shape[:-2], shape[-1], shape[-2]), dtype).swapaxes(-1, -2)
    shape = (*self.stride, x.shape[-1], self.features)
    kernel = self.param('kernel', boxed(turned, (None,) * (rank + 1) + ('embed',)), shape, jnp.float32)
    kernel = jnp.moveaxis(kernel.astype(self.dtype), -2, 0)  # [D, *stride, F]
    out = kernels.dense(x.astype(self.dtype), kernel).reshape(x.shape[0], -1, kernel.size // x.shape[-1])
    out = unpatchify(out, tuple(n * s for n, s in zip(x.shape[1:-1], self.stride, strict=True)), self.stride)
    if self.use_bias:
      zeros = boxed(nn.initializers.zeros_init(), ('embed',))
      out = out + self.param('bias', zeros, (self.features,), jnp.float32).astype(self.dtype)
    return out


class UpBlock(nn.Module):
  """A transposed convolution to a finer map, that map beside it, and a residual convolution of both.

  [B, *size, D] and a skip [B, *size * stride, E] -> [B, *size * stride, features].
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
    stride = tuple(n // m for n, m in zip(skip.shape[1:-1], x.shape[1:-1], strict=True))
    x = TransposedConv(self.features, stride, dtype=self.dtype, name='up')(x)
    return ResidualConv(self.features, self.dtype, name='conv')(jnp.concatenate([x, skip.astype(x.dtype)], axis=-1))
