"""A feature pyramid whose four maps are laid side by side (Kirillov et al. 2019), as SurgeNet has it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.errors import UserError
from jaxmed.models.layers.convolution import Conv
from jaxmed.models.layers.norm import GroupNorm
from jaxmed.models.layers.pyramid import Pyramid, four_levels, nearest, resize_corners


class FPN(nn.Module):
  """Maps at one stride from a pyramid with nearest upsampling, side by side (TimJaspers0801/SurgeNet, metaformer.py).

  It differs from segmentation_models.pytorch in that maps are laid side by side, not added, and in its interpolation,
  which leaves corners where they are. Blocks of a transformer become a pyramid first, see `pyramid.Pyramid`.

  Attributes:
    num_classes: of the logits. deep_supervision: of no effect, there is one output.
    pyramid_width, width: channels of the pyramid, and of each map that is laid beside the others.
    groups: of the group norms.
  """

  num_classes: int
  deep_supervision: bool = False
  pyramid_width: int = 256
  width: int = 128
  groups: int = 32
  dtype: Any = 'float32'

  def __post_init__(self):
    if self.groups < 1 or self.width % self.groups:
      raise UserError(f'groups {self.groups} do not divide the width {self.width} of the decoder fpn')
    super().__post_init__()

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """The last four stages, or four blocks at equal distances."""
    return four_levels(encoder)

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K],) float32 of an image [B, *size, C] and maps [B, *grid_i, D_i] of `levels`."""
    compute = jnp.dtype(self.dtype)
    maps = tuple(x.astype(compute) for x in maps)
    if len(maps) == 4 and len({x.shape[1:-1] for x in maps}) == 1:
      maps = Pyramid(compute, name='pyramid')(maps, train)
    conv = lambda x, width, kernel, name: Conv(width, kernel, 1, kernel // 2, True, 'torch', compute, name=name)(x)
    pyramid = [conv(maps[-1], self.pyramid_width, 1, f'lateral{len(maps) - 1}')]
    for i in reversed(range(len(maps) - 1)):
      skip = conv(maps[i], self.pyramid_width, 1, f'lateral{i}')
      pyramid.insert(0, nearest(pyramid[0], skip.shape[1:-1]) + skip)
    sizes = [x.shape[1:-1] for x in pyramid]
    x = jnp.concatenate([self._block(y, i, sizes[:i], compute) for i, y in enumerate(pyramid)], axis=-1)
    logits = conv(x, self.num_classes, 3, 'out').astype(jnp.float32)
    return (resize_corners(logits, image.shape[1:-1]),)

  def _block(self, x: jax.Array, i: int, sizes: list[tuple[int, ...]], compute: Any) -> jax.Array:
    """Map i of the pyramid at the stride of the finest: a convolution before each of its `sizes`, or one."""
    for j, size in enumerate(reversed(sizes or [x.shape[1:-1]])):
      x = Conv(self.width, 3, 1, 1, False, 'torch', compute, name=f'conv{i}_{j}')(x)
      x = resize_corners(jax.nn.relu(GroupNorm(self.width // self.groups, dtype=compute, name=f'norm{i}_{j}')(x)), size)
    return x
