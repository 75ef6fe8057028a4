"""ResNet with the stride in the 3x3 convolution (He et al. 2016; 'v1.5'), and ResNeXt (Xie et al. 2017), as timm and
torchvision have them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmed.errors import UserError
from jaxmed.models.layers.convolution import Conv, Hierarchical, flat_features, keep, normalise, path_rates
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.models.layers.tokens import Features

# timm 1.0.31, resnet.py; 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores.
SIZES: dict[str, dict] = {
    'resnet_micro': dict(depths=(1, 1, 1, 1), dims=(32, 64, 128, 256), stem_width=32, stem_kernel=3, max_pool=False),
    'resnet18': dict(depths=(2, 2, 2, 2)),
    'resnet34': dict(depths=(3, 4, 6, 3)),
    'resnet50': dict(depths=(3, 4, 6, 3), bottleneck=True),
    'resnet101': dict(depths=(3, 4, 23, 3), bottleneck=True),
    'resnet152': dict(depths=(3, 8, 36, 3), bottleneck=True),
    'resnext50_32x4d': dict(depths=(3, 4, 6, 3), bottleneck=True, cardinality=32, base_width=4),
    'resnext101_32x8d': dict(depths=(3, 4, 23, 3), bottleneck=True, cardinality=32, base_width=8),
}


class ResNet(Hierarchical):
  """ResNet in two or three dimensions; batch norms' scales start at one, as torchvision's.

  Attributes:
    bottleneck: blocks of 1x1, 3x3, 1x1 with four times the width outside, instead of two 3x3.
    stem_width, stem_kernel, stem_stride, max_pool: the first convolution, and whether a 3x3 max-pool of stride 2
      follows. The form for small images (CIFAR's in solo-learn) is stem_kernel=3, stem_stride=1, max_pool=False.
    zero_init_residual: the last norm of each block starts at zero (torchvision's option of that name; Goyal et al.
      2017), as Barlow Twins, VICReg, MoCo v3 and SimCLR train.
    cardinality, base_width: groups of the 3x3 convolution of a bottleneck, and channels of a group where `dims` is 64.
  """

  depths: tuple[int, ...] = (2, 2, 2, 2)
  dims: tuple[int, ...] = (64, 128, 256, 512)
  bottleneck: bool = False
  stem_width: int = 64
  stem_kernel: int = 7
  stem_stride: int = 2
  max_pool: bool = True
  zero_init_residual: bool = False
  cardinality: int = 1
  base_width: int = 64

  def __post_init__(self):
    if min(self.cardinality, self.base_width) < 1 or (self.cardinality, self.base_width) != (1, 64) and (
        not self.bottleneck or any(dim * self.base_width % 64 for dim in self.dims)):
      raise UserError(f'encoder.cardinality {self.cardinality} and base_width {self.base_width} need '
                      f'encoder.bottleneck and whole channels a group, dims {self.dims} * base_width / 64')
    super().__post_init__()

  @property
  def embed_dim(self) -> int:
    """Channels of the last map."""
    return self.dims[-1] * (4 if self.bottleneck else 1)

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return (self.stem_stride * (1 + self.max_pool) * 2 ** (len(self.depths) - 1),) * len(self.image_size)

  @property
  def stem_level(self) -> bool:
    """Whether the max-pool makes level 1 coarser than level 0."""
    return self.max_pool

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    half, dtype = self.stem_kernel // 2, self.compute
    x = Conv(self.stem_width, self.stem_kernel, self.stem_stride, half, False, 'fan_out', dtype, name='conv1')(image)
    return jax.nn.relu(normalise(BatchNorm(dtype=dtype, name='bn1'), x, visible, train))

  def pool_stem(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
    return keep(max_pool(x), visible) if self.max_pool else x

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    rates, maps = path_rates(self.drop_path, self.depths), []
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
      for j in range(depth):
        block = Block(dim, 2 if i and not j else 1, self.bottleneck, train and self.drop_path > 0, self.compute,
                      self.zero_init_residual, self.cardinality, self.base_width, name=f'layer{i + 1}_{j}')
        x = block(x, rates[i][j], visible, train)
      maps.append(x)
    return maps

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    return flat_features(x, visible)


class Block(nn.Module):
  """Residual block of two convolutions, or of three with a bottleneck; zero in hidden places throughout."""

  dim: int
  stride: int
  bottleneck: bool
  drop: bool
  dtype: jnp.dtype
  zero_last: bool = False
  groups: int = 1
  base_width: int = 64

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    out = self.dim * (4 if self.bottleneck else 1)
    inner = self.dim * self.base_width // 64 * self.groups

    def unit(y, features, kernel, stride, names, zero=False):
      groups = self.groups if kernel > 1 else 1
      y = Conv(features, kernel, stride, kernel // 2, False, 'fan_out', self.dtype, groups, name=names[0])(y)
      return normalise(BatchNorm(dtype=self.dtype, zero_scale=zero, name=names[1]), y, visible, train)

    layers = [(inner, 1, 1), (inner, 3, self.stride), (out, 1, 1)] if self.bottleneck else [
        (self.dim, 3, self.stride), (out, 3, 1)]
    y = x
    for i, layer in enumerate(layers, 1):
      zero = self.zero_last and i == len(layers)
      y = unit(jax.nn.relu(y) if i > 1 else y, *layer, (f'conv{i}', f'bn{i}'), zero)
    if self.stride > 1 or x.shape[-1] != out:
      x = unit(x, out, 1, self.stride, ('down_conv', 'down_bn'))
    if self.drop:
      y = drop(y, rate, self.make_rng('dropout'))
    return jax.nn.relu(x + y)


def max_pool(x: jax.Array) -> jax.Array:
  """Maximum over 3 x 3 windows with stride 2 and one place of padding: x [B, *size, D] -> [B, *size / 2, D]."""
  rank = x.ndim - 2
  around = [(0, 0), *[(1, 1)] * rank, (0, 0)]
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, *(3,) * rank, 1), (1, *(2,) * rank, 1), around)
