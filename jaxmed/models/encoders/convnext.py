"""ConvNeXt V2: depthwise convolutions with global response normalisation (Woo et al. 2023), in timm's vocabulary."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers.convolution import (
  Conv,
  Depthwise,
  Hierarchical,
  Stage,
  flat_features,
  keep,
  path_rates,
  pooled,
)
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense, LayerNorm

# timm 1.0.31, convnext.py; 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores.
SIZES: dict[str, dict] = {
    'convnextv2_micro': dict(depths=(1, 1, 2, 1), dims=(24, 48, 96, 192), stem_patch=2),
    'convnextv2_atto': dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    'convnextv2_femto': dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    'convnextv2_pico': dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    'convnextv2_nano': dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    'convnextv2_tiny': dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    'convnextv2_small': dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    'convnextv2_base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    'convnextv2_large': dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    'convnextv2_huge': dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816)),
}


class ConvNeXt(Hierarchical):
  """ConvNeXt V2 in two or three dimensions.

  timm normalises after pooling (`head.norm`): `Features.pool`, hence `mean`, is that vector. The patches are the same
  norm of each place.

  Attributes:
    stem_patch: patch and stride of the stem; the total stride is eight times that.
  """

  depths: tuple[int, ...] = (3, 3, 9, 3)
  dims: tuple[int, ...] = (96, 192, 384, 768)
  stem_patch: int = 4

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return (self.stem_patch * 2 ** (len(self.depths) - 1),) * len(self.image_size)

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    del train
    x = Conv(self.dims[0], self.stem_patch, self.stem_patch, dtype=self.compute, name='stem_conv')(image)
    return keep(LayerNorm(self.compute, name='stem_norm')(x), visible)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    rates, maps = path_rates(self.drop_path, self.depths), []
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
      if i:
        x = keep(LayerNorm(self.compute, name=f'down{i}_norm')(x), visible)
        x = keep(Conv(dim, 2, 2, dtype=self.compute, name=f'down{i}_conv')(x), visible)
      x = Stage(Block, depth, train and self.drop_path > 0, self.compute, name=f'stage{i}')(x, rates[i], visible)
      maps.append(x)
    return maps

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    norm = LayerNorm(self.compute, name='norm')
    return flat_features(keep(norm(x), visible), visible, norm(pooled(x, visible)))


class Block(nn.Module):
  """Depthwise 7x7, norm, GELU MLP with response normalisation; zero in hidden places throughout. Shaped for nn.scan."""

  drop: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None):
    dim, dtype = x.shape[-1], self.dtype
    y = LayerNorm(dtype, name='norm')(Depthwise(7, dtype=dtype, name='conv_dw')(x))
    y = kernels.gelu(Dense((4 * dim,), ('embed', 'mlp'), dtype=dtype, name='fc1')(y))
    y = ResponseNorm(dtype, name='grn')(keep(y, visible))
    y = keep(Dense((dim,), ('mlp', 'embed'), dtype=dtype, name='fc2')(y), visible)
    if self.drop:
      y = drop(y, rate, self.make_rng('dropout'))
    return x + y, None


class ResponseNorm(nn.Module):
  """Global response normalisation of x [B, *size, D]: x + scale * x * N(x) + bias, both parameters from zero.

  N(x) is the L2 norm of a channel over the places of a sample, divided by its mean over channels.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ('mlp',))
    scale = self.param('scale', zeros, (x.shape[-1],), jnp.float32)
    bias = self.param('bias', zeros, (x.shape[-1],), jnp.float32)
    energy = jnp.square(x.astype(jnp.float32)).sum(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
    norm = jnp.sqrt(jnp.maximum(energy, 1e-24))  # the root has no derivative at zero, where all is hidden
    factor = 1 + scale * norm / (norm.mean(axis=-1, keepdims=True) + 1e-6)
    return x * factor.astype(self.dtype) + bias.astype(self.dtype)
