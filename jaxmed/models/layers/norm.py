"""Norms of maps: batch norm, whose running statistics are parameters that no gradient trains, and group norm."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STATS = 'stats'  # the collection that holds the new running statistics after a training pass
FLOOR = 1e-12  # smallest squared length that is divided by, so that a zero vector has a finite gradient


class BatchNorm(nn.Module):
  """Normalises over every axis but the last, with the statistics of the global batch, in float32 (Ioffe, Szegedy 2015).

  The running statistics are the parameters `mean` and `var`. In training the new ones are put into the collection
  'stats', and the training step writes them into the parameters; so a tree of parameters is a whole network. A norm
  that is called several times in a pass takes up the statistics of each call in turn.
  `momentum` is the share of the old statistics that stays (1 - PyTorch's); the running variance is the unbiased one.
  """

  use_scale: bool = True
  use_bias: bool = True
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  zero_scale: bool = False  # the scale starts at 0, so that a branch which ends in it begins as nothing

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False, where: jax.Array | None = None) -> jax.Array:
    """Normalises x [..., D].

    Args:
      where: bool or 0/1, broadcastable to x [..., 1]; only these places count in the statistics.
    """
    size, boxed = x.shape[-1], nn.with_logical_partitioning
    own = lambda name, init: self.param(name, boxed(init, ('embed',)), (size,), jnp.float32)
    zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
    mean, var = jax.lax.stop_gradient((own('mean', zeros), own('var', ones)))
    wide = x.astype(jnp.float32)
    if train:
      axes = tuple(range(x.ndim - 1))
      weight = None if where is None else jnp.broadcast_to(where, (*x.shape[:-1], 1)).astype(jnp.float32)
      count = math.prod(x.shape[:-1]) if weight is None else jnp.maximum(weight.sum(), 1.0)
      average = lambda y: (y if weight is None else y * weight).sum(axis=axes) / count
      new_mean = average(wide)
      new_var = average(jnp.square(wide - new_mean))
      if self.is_mutable_collection(STATS):
        keep = lambda name, old, new: self.put_variable(
            STATS, name, jax.lax.stop_gradient(self.momentum * old + (1 - self.momentum) * new))
        last = lambda name, old: self.get_variable(STATS, name, old)  # of an earlier call in this pass
        keep('mean', last('mean', mean), new_mean)
        keep('var', last('var', var), new_var * count / jnp.maximum(count - 1, 1))
      mean, var = new_mean, new_var
    y = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
    if self.use_scale:
      y = y * own('scale', zeros if self.zero_scale else ones)
    if self.use_bias:
      y = y + own('bias', zeros)
    return y.astype(self.dtype)


class GroupNorm(nn.Module):
  """Normalises each sample's groups of channels over all places (Wu, He 2018), in float32 with the biased variance.

  With `channels` of 1 it is the instance norm of Ulyanov et al. (2016). A map of one place is then the bias alone.

  Attributes:
    channels: of a group, neighbours; they divide D.
    affine: whether there are a scale and a bias.
    zero_scale: the scale starts at 0, so that a branch which ends in it begins as nothing.
  """

  channels: int = 1
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  zero_scale: bool = False
  affine: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False, where: jax.Array | None = None) -> jax.Array:
    """Normalises x [B, *size, D]; `train` changes nothing. Only places of `where` [B, *size, 1] count, if given."""
    del train
    size, boxed = x.shape[-1], nn.with_logical_partitioning
    scale_init = nn.initializers.zeros_init() if self.zero_scale else nn.initializers.ones_init()
    scale, bias = jnp.ones(()), jnp.zeros(())
    if self.affine:
      scale = self.param('scale', boxed(scale_init, ('embed',)), (size,), jnp.float32)
      bias = self.param('bias', boxed(nn.initializers.zeros_init(), ('embed',)), (size,), jnp.float32)
    wide, axes = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))

    def average(y):
      if where is None:
        y = y.mean(axis=axes, keepdims=True)
      else:
        count = jnp.maximum(where.sum(axis=axes, keepdims=True), 1)
        y = jnp.where(where, y, 0).sum(axis=axes, keepdims=True) / count
      if self.channels == 1:
        return y
      grouped = y.reshape(*y.shape[:-1], -1, self.channels).mean(axis=-1)
      return jnp.repeat(grouped, self.channels, axis=-1)

    mean = average(wide)
    factor = scale * jax.lax.rsqrt(average(jnp.square(wide - mean)) + self.epsilon)
    return ((wide - mean) * factor + bias).astype(self.dtype)


def normalize(x: jax.Array) -> jax.Array:
  """Vectors [..., D] with length 1, float32; a zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), FLOOR))
