"""Pyramid Vision Transformer v2 (Wang et al. 2022), as timm has it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.models.layers.convolution import (
  Conv,
  Depthwise,
  Hierarchical,
  Norm,
  Stage,
  flat_features,
  flatten,
  keep,
  path_rates,
)
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense

# timm 1.0.31, pvt_v2.py; 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores.
_WIDE = dict(dims=(64, 128, 320, 512))
SIZES: dict[str, dict] = {
    'pvt_v2_micro': dict(depths=(1, 1, 2, 1), dims=(32, 64, 128, 192), num_heads=(1, 2, 4, 6), mlp_ratios=(4, 4, 4, 4),
                         stem_kernel=3, stem_stride=2),
    'pvt_v2_b0': dict(depths=(2, 2, 2, 2), dims=(32, 64, 160, 256)),
    'pvt_v2_b1': dict(depths=(2, 2, 2, 2), **_WIDE),
    'pvt_v2_b2': dict(depths=(3, 4, 6, 3), **_WIDE),
    'pvt_v2_b3': dict(depths=(3, 4, 18, 3), **_WIDE),
    'pvt_v2_b4': dict(depths=(3, 8, 27, 3), **_WIDE),
    'pvt_v2_b5': dict(depths=(3, 6, 40, 3), **_WIDE, mlp_ratios=(4, 4, 4, 4)),
}

PATCH_EPSILON = 1e-5  # of the norms that follow a strided convolution; the others have 1e-6


class PVT(Hierarchical):
  """PVT v2: overlapping patches, attention to keys reduced to the last map's size, an MLP with a depthwise 3x3 inside.

  Attributes:
    num_heads, reductions, mlp_ratios: of each stage; keys and values are strided by the reduction.
    stem_kernel, stem_stride: of the first convolution, padded by kernel // 2; the total stride is eight times that.
  """

  depths: tuple[int, ...] = (3, 4, 6, 3)
  dims: tuple[int, ...] = (64, 128, 320, 512)
  num_heads: tuple[int, ...] = (1, 2, 5, 8)
  reductions: tuple[int, ...] = (8, 4, 2, 1)
  mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
  stem_kernel: int = 7
  stem_stride: int = 4

  def __post_init__(self):
    lengths = {len(self.num_heads), len(self.reductions), len(self.mlp_ratios), len(self.depths)}
    if len(lengths) > 1 or any(d % h for d, h in zip(self.dims, self.num_heads, strict=False)):
      raise UserError(f'encoder.num_heads {self.num_heads}, reductions {self.reductions} and mlp_ratios '
                      f'{self.mlp_ratios} need one number a stage, heads that divide dims {self.dims}')
    last = len(self.depths) - 1
    if any(2 ** (last - i) % r for i, r in enumerate(self.reductions)):
      most = tuple(2 ** (last - i) for i in range(last + 1))
      raise UserError(f'encoder.reductions {self.reductions} must divide the strides that are left, {most}')
    super().__post_init__()

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return (self.stem_stride * 2 ** (len(self.depths) - 1),) * len(self.image_size)

  def _patches(self, x: jax.Array, dim: int, kernel: int, stride: int, visible: jax.Array | None,
               name: str) -> jax.Array:
    x = Conv(dim, kernel, stride, kernel // 2, True, 'fan_out', self.compute, name=f'{name}_conv')(x)
    return keep(Norm(True, PATCH_EPSILON, self.compute, name=f'{name}_norm')(x), visible)

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    del train
    return self._patches(image, self.dims[0], self.stem_kernel, self.stem_stride, visible, 'stem')

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    rates, maps = path_rates(self.drop_path, self.depths), []
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
      if i:
        x = self._patches(x, dim, 3, 2, visible, f'down{i}')
      shape = (self.num_heads[i], self.reductions[i], self.mlp_ratios[i])
      x = Stage(Block, depth, train and self.drop_path > 0, self.compute, shape, name=f'stage{i}')(x, rates[i], visible)
      x = keep(Norm(dtype=self.compute, name=f'norm{i}')(x), visible)
      maps.append(x)
    return maps

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    return flat_features(x, visible)


class Block(nn.Module):
  """Pre-norm attention and MLP; zero in hidden places throughout. Shaped for nn.scan."""

  drop: bool
  dtype: jnp.dtype
  num_heads: int
  reduction: int
  mlp_ratio: int

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None):
    dim, dtype = x.shape[-1], self.dtype
    y = keep(Norm(dtype=dtype, name='norm1')(x), visible)
    x = x + self._branch(Attention(self.num_heads, self.reduction, dtype, name='attn')(y, visible), rate, visible)
    y = Dense((dim * self.mlp_ratio,), ('embed', 'mlp'), dtype=dtype, name='fc1')(Norm(dtype=dtype, name='norm2')(x))
    y = kernels.gelu(Depthwise(3, True, 'fan_out', dtype, name='dwconv')(keep(y, visible)))
    return x + self._branch(Dense((dim,), ('mlp', 'embed'), dtype=dtype, name='fc2')(y), rate, visible), None

  def _branch(self, y: jax.Array, rate: jax.Array, visible: jax.Array | None) -> jax.Array:
    return keep(drop(y, rate, self.make_rng('dropout')) if self.drop else y, visible)


class Attention(nn.Module):
  """Attention of all places of [B, *size, D] to the visible ones of a map strided by `reduction`."""

  num_heads: int
  reduction: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
    dim, dtype = x.shape[-1], self.dtype
    head = (self.num_heads, dim // self.num_heads)
    tokens = lambda y: y.reshape(y.shape[0], -1, dim)
    q = Dense(head, ('embed', 'heads', 'head_dim'), dtype=dtype, name='q')(tokens(x))
    y = x
    if self.reduction > 1:
      y = Conv(dim, self.reduction, self.reduction, 0, True, 'fan_out', dtype, name='sr')(x)
      y = Norm(True, PATCH_EPSILON, dtype, name='norm')(y)
    kv = Dense((2, *head), ('embed', None, 'heads', 'head_dim'), dtype=dtype, name='kv')(tokens(y))
    out = kernels.attention(q, kv[:, :, 0], kv[:, :, 1], flatten(visible, y.shape[1:-1]))
    return Dense((dim,), ('heads', 'embed'), dtype=dtype, fold=2, name='proj')(out).reshape(x.shape)
