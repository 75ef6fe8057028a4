"""ResNets of 18 layers on videos and volumes: R3D, MC3 and R(2+1)D (Tran et al. 2018), as torchvision has them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError, choose
from jaxmed.models.layers.convolution import Conv, Hierarchical, flat_features, normalise, path_rates
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.models.layers.tokens import Features

# torchvision 0.29, models/video/resnet.py; 'micro' is ours, for a few CPU cores.
SIZES: dict[str, dict] = {
    'r3d_micro': dict(depths=(1, 1, 1), dims=(16, 32, 64), stem_width=16),
    'r3d_18': dict(),
    'mc3_18': dict(time='first'),
    'r2plus1d_18': dict(time='separate'),
}
TIMES = ('all', 'first', 'separate')


class VideoResNet(Hierarchical):
  """ResNet of basic blocks over [T, H, W]; the first axis is time, or the depth of a volume.

  Attributes:
    time: which convolutions look along time: 'all' (R3D); 'first' (MC3), those of the stem and the first stage, and
      time keeps its length; 'separate' (R(2+1)D), each is one over space, a norm, a ReLU and one over time.
    stem_width: channels of the stem, whose stride is (1, 2, 2).
  """

  image_size: tuple[int, ...] = (16, 112, 112)
  depths: tuple[int, ...] = (2, 2, 2, 2)
  dims: tuple[int, ...] = (64, 128, 256, 512)
  time: str = 'all'
  stem_width: int = 64

  def __post_init__(self):
    choose('encoder.time', self.time, TIMES)
    if len(self.image_size) != 3:
      raise UserError(f'a ResNet of videos takes images of three axes, not {tuple(self.image_size)}: choose resnet18')
    super().__post_init__()

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    steps = 2 ** (len(self.depths) - 1)
    return (1 if self.time == 'first' else steps, 2 * steps, 2 * steps)

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    if self.time == 'separate':  # torchvision's R2Plus1dStem: 45 channels between, whatever the width
      image = _unit(self, image, 45, (1, 7, 7), (1, 2, 2), 'stem_space', visible, train)
      return _unit(self, image, self.stem_width, (3, 1, 1), (1, 1, 1), 'stem', visible, train)
    return _unit(self, image, self.stem_width, (3, 7, 7), (1, 2, 2), 'stem', visible, train)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    rates, maps = path_rates(self.drop_path, self.depths), []
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
      flat = self.time == 'first' and i > 0
      for j in range(depth):
        block = Block(dim, 2 if i and not j else 1, 'none' if flat else self.time, train and self.drop_path > 0,
                      self.compute, name=f'layer{i + 1}_{j}')
        x = block(x, rates[i][j], visible, train)
      maps.append(x)
    return maps

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    return flat_features(x, visible)


class Block(nn.Module):
  """Residual block of two convolutions; `time` is 'none' where neither looks along it."""

  dim: int
  stride: int
  time: str
  drop: bool
  compute: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    between = between_channels(x.shape[-1], self.dim)  # once for both, as torchvision's
    step = self.stride

    def layer(y, stride, name, act):
      along = 1 if self.time == 'none' else stride
      if self.time == 'separate':
        y = _unit(self, y, between, (1, 3, 3), (1, stride, stride), f'{name}_space', visible, train)
        return _unit(self, y, self.dim, (3, 1, 1), (stride, 1, 1), name, visible, train, act)
      kernel = (1 if self.time == 'none' else 3, 3, 3)
      return _unit(self, y, self.dim, kernel, (along, stride, stride), name, visible, train, act)

    y = layer(layer(x, step, 'unit1', True), 1, 'unit2', False)
    if step > 1 or x.shape[-1] != self.dim:
      strides = (1 if self.time == 'none' else step, step, step)
      x = _unit(self, x, self.dim, (1, 1, 1), strides, 'down', visible, train, False)
    if self.drop:
      y = drop(y, rate, self.make_rng('dropout'))
    return jax.nn.relu(x + y)


def between_channels(inward: int, outward: int) -> int:
  """Channels between the two parts of an R(2+1)D convolution, with about the parameters of a full 3x3x3 one."""
  return 27 * inward * outward // (9 * inward + 3 * outward)


def _unit(module: VideoResNet | Block, x: jax.Array, features: int, kernel: tuple[int, ...], stride: tuple[int, ...],
          name: str, visible: jax.Array | None, train: bool, act: bool = True) -> jax.Array:
  """Convolution without bias, batch norm and, with `act`, ReLU, inside of the module's compact method."""
  padding = tuple(k // 2 for k in kernel)
  x = Conv(features, kernel, stride, padding, False, 'fan_out', module.compute, name=f'{name}_conv')(x)
  x = normalise(BatchNorm(dtype=module.compute, name=f'{name}_bn'), x, visible, train)
  return jax.nn.relu(x) if act else x
