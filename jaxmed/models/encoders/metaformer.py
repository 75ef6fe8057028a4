"""CAFormer: separable convolutions in two stages, attention in two (Yu et al. 2023, MetaFormer baselines), as timm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

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
  pooled,
)
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense

HEAD_DIM = 32

# timm 1.0.31, metaformer.py; 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores.
SIZES: dict[str, dict] = {
    'caformer_micro': dict(depths=(1, 1, 2, 1), dims=(32, 64, 128, 192), stem_kernel=3, stem_stride=2),
    'caformer_s18': dict(depths=(3, 3, 9, 3), dims=(64, 128, 320, 512)),
    'caformer_s36': dict(depths=(3, 12, 18, 3), dims=(64, 128, 320, 512)),
    'caformer_m36': dict(depths=(3, 12, 18, 3), dims=(96, 192, 384, 576)),
    'caformer_b36': dict(depths=(3, 12, 18, 3), dims=(128, 256, 512, 768)),
}


class CAFormer(Hierarchical):
  """CAFormer: the last two stages attend in heads of 32 and scale their residuals.

  Only strided convolutions and the final norm have biases. timm normalises after pooling (`head.norm`):
  `Features.pool`, hence `mean`, is that vector. The patches are the same norm of each place.

  Attributes:
    stem_kernel, stem_stride: of the first convolution; the total stride is eight times stem_stride.
  """

  depths: tuple[int, ...] = (3, 3, 9, 3)
  dims: tuple[int, ...] = (64, 128, 320, 512)
  stem_kernel: int = 7
  stem_stride: int = 4

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return (self.stem_stride * 2 ** (len(self.depths) - 1),) * len(self.image_size)

  @property
  def around(self) -> int:
    """Padding of the stem."""
    return (self.stem_kernel - self.stem_stride + 1) // 2

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    del train
    x = Conv(self.dims[0], self.stem_kernel, self.stem_stride, self.around, dtype=self.compute, name='stem_conv')(image)
    return keep(Norm(False, dtype=self.compute, name='stem_norm')(x), visible)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    rates, maps = path_rates(self.drop_path, self.depths), []
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
      if i:
        x = keep(Norm(False, dtype=self.compute, name=f'down{i}_norm')(x), visible)
        x = keep(Conv(dim, 3, 2, 1, dtype=self.compute, name=f'down{i}_conv')(x), visible)
      attends = i >= len(self.depths) - 2
      x = Stage(Block, depth, train and self.drop_path > 0, self.compute, (attends,), name=f'stage{i}')(
          x, rates[i], visible)
      maps.append(x)
    return maps

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    norm = Norm(dtype=self.compute, name='norm')
    return flat_features(keep(norm(x), visible), visible, norm(pooled(x, visible)))


class Block(nn.Module):
  """Token mixer and MLP, pre-norm; zero in hidden places throughout. Shaped for nn.scan."""

  drop: bool
  dtype: jnp.dtype
  attends: bool

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None):
    mixer = SelfAttention if self.attends else SeparableConv
    y = keep(Norm(False, dtype=self.dtype, name='norm1')(x), visible)
    x = self._add(x, mixer(self.dtype, name='mixer')(y, visible), rate, visible, 'res_scale1')
    y = Norm(False, dtype=self.dtype, name='norm2')(x)
    y = Dense((4 * x.shape[-1],), ('embed', 'mlp'), False, dtype=self.dtype, name='fc1')(y)
    y = Dense((x.shape[-1],), ('mlp', 'embed'), False, dtype=self.dtype, name='fc2')(StarReLU(name='act')(y))
    return self._add(x, y, rate, visible, 'res_scale2'), None

  def _add(self, x: jax.Array, y: jax.Array, rate: jax.Array, visible: jax.Array | None, name: str) -> jax.Array:
    if self.drop:
      y = drop(y, rate, self.make_rng('dropout'))
    if self.attends:
      ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ('embed',))
      x = x * self.param(name, ones, (x.shape[-1],), jnp.float32).astype(x.dtype)
    return x + keep(y, visible)


class StarReLU(nn.Module):
  """scale * relu(x)^2 + bias with one scale and one bias, from 1 and 0."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    boxed = nn.with_logical_partitioning
    scale = self.param('scale', boxed(nn.initializers.ones_init(), (None,)), (1,), jnp.float32).astype(x.dtype)
    bias = self.param('bias', boxed(nn.initializers.zeros_init(), (None,)), (1,), jnp.float32).astype(x.dtype)
    return scale * jnp.square(jax.nn.relu(x)) + bias


class SeparableConv(nn.Module):
  """Inverted separable convolution: twice as wide inside, StarReLU, depthwise 7x7; [B, *size, D] -> the same."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
    y = Dense((2 * x.shape[-1],), ('embed', 'mlp'), False, dtype=self.dtype, name='pwconv1')(x)
    y = Depthwise(7, False, dtype=self.dtype, name='dwconv')(keep(StarReLU(name='act')(y), visible))
    return Dense((x.shape[-1],), ('mlp', 'embed'), False, dtype=self.dtype, name='pwconv2')(y)


class SelfAttention(nn.Module):
  """Attention among the visible places of [B, *size, D], without biases."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
    heads = x.shape[-1] // HEAD_DIM
    qkv = Dense((3, heads, HEAD_DIM), ('embed', None, 'heads', 'head_dim'), False, dtype=self.dtype, name='qkv')(
        x.reshape(x.shape[0], -1, x.shape[-1]))
    out = kernels.self_attention(qkv, flatten(visible, x.shape[1:-1]))
    out = Dense((x.shape[-1],), ('heads', 'embed'), False, dtype=self.dtype, fold=2, name='proj')(out)
    return out.reshape(x.shape)
