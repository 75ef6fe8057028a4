"""The decoder of D-Former (Wu et al. 2022, arXiv 2201.00462): maps enlarged by linear layers, and stages as it encodes.

Definition: kkk55596/D-Former (dc3deb7), model.py; `layers.dilated` says where it differs.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.models.layers import dilated
from jaxmed.models.layers.convolution import Norm
from jaxmed.models.layers.pyramid import all_levels, each_level, growth
from jaxmed.models.layers.tokens import unpatchify
from jaxmed.models.layers.transformer import Dense

HEAD = 32  # channels of a head where nothing says how many there are: the published network's


class DFormer(nn.Module):
  """From the last map up: enlarged, beside the next finer map through a linear layer, then a stage of D-Former.

  Coarse outputs are of what is enlarged, before the finer map comes in; every output is enlarged by the strides of the
  finest map. No stochastic depth.

  Attributes:
    num_classes: of the logits. deep_supervision: whether each level but the last has logits too.
    depths, num_heads: of each stage, the finest first; () for two blocks, and for heads of 32 channels.
    group_size: places of a group along each axis of a volume; images have the last two.
    mlp_ratio: width of the MLP over that of the stage.
  """

  num_classes: int
  deep_supervision: bool = False
  dtype: Any = 'float32'
  depths: tuple[int, ...] = ()
  num_heads: tuple[int, ...] = ()
  group_size: tuple[int, ...] = (2, 8, 8)
  mlp_ratio: float = 4.0

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """All levels of an encoder of stages, and the stem where it is finer than they.

    Raises:
      UserError: an encoder whose maps are all of one size.
    """
    return all_levels(encoder, 'dformer', 'a model such as dformer, or the decoder unetr')

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K], ...) float32 of an image [B, *size, C] and maps [B, *grid, D], the finest first."""
    del train
    dtype, skips = jnp.dtype(self.dtype), maps[:-1]
    depths = each_level('depths', self.depths, len(skips)) or (2,) * len(skips)
    heads = each_level('num_heads', self.num_heads, len(skips)) or tuple(_heads(s.shape[-1]) for s in skips)
    patch = growth(image, maps[0], 'dformer')
    x, outs = maps[-1].astype(dtype), []
    for i, skip in reversed(list(enumerate(skips))):
      dim = skip.shape[-1]
      x = Expand(dim, growth(skip, x, 'dformer'), dtype, name=f'up{i}')(x)
      if i and self.deep_supervision:
        outs.append(self._logits(x, patch, i))
      x = jnp.concatenate([x, skip.astype(dtype)], axis=-1)
      x = Dense((dim,), ('mlp', 'embed'), dtype=dtype, name=f'fuse{i}')(x)
      shape = (heads[i], self.group_size[-len(patch):], self.mlp_ratio)
      x = dilated.stage(x, jnp.zeros(depths[i]), None, False, dtype, shape, f'stage{i}')
    x = Norm(True, dilated.EPSILON, dtype, name='norm')(x)
    return (self._logits(x, patch, 0), *outs[::-1])

  def _logits(self, x: jax.Array, patch: tuple[int, ...], i: int) -> jax.Array:
    x = Expand(x.shape[-1], patch, jnp.dtype(self.dtype), name=f'head{i}_up')(x)
    out = Dense((self.num_classes,), ('embed', None), False, 'torch_uniform', x.dtype, name=f'head{i}')(x)
    return out.astype(jnp.float32)


def _heads(dim: int) -> int:
  """Heads of about 32 channels that divide a width."""
  return next(n for n in range(max(1, dim // HEAD), 0, -1) if dim % n == 0)


class Expand(nn.Module):
  """A linear layer to all places that a place becomes, and a norm: [B, *size, C] -> [B, *size * factor, features]."""

  features: int
  factor: tuple[int, ...]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = tuple(n * f for n, f in zip(x.shape[1:-1], self.factor, strict=True))
    wide = math.prod(self.factor) * self.features
    x = Dense((wide,), ('embed', 'mlp'), False, dtype=self.dtype, name='expand')(x)
    x = unpatchify(x.reshape(x.shape[0], -1, wide), size, self.factor)
    return Norm(True, dilated.EPSILON, self.dtype, name='norm')(x)
