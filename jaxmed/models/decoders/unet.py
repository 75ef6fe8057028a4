"""The decoder of a U-Net (Ronneberger et al. 2015) on the maps of any encoder of stages.

With a U-Net's encoder it is nnU-Net's (dynamic-network-architectures, unet_decoder.py:UNetDecoder) or STU-Net's
(uni-medical/STU-Net, STUNet.py); `create_decoder` takes their options from the encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.errors import choose
from jaxmed.models.layers.convolution import Conv
from jaxmed.models.layers.pyramid import all_levels, each_level, growth
from jaxmed.models.layers.unet_blocks import BLOCKS, NORMS, UPS, Style, Up, each_stage, stages_text

NARROWEST = 16  # channels that stages without a skip are halved to


class UNet(nn.Module):
  """From the last map up: enlarged, beside the next finer map, through blocks; and a linear layer to the classes.

  Where the finest map is coarser than the image, stages without a skip follow, each twice as large and half as wide.
  Options of stages are in the encoder's order, the finest first.

  Attributes:
    num_classes: of the logits.
    deep_supervision: whether each stage has logits, on its own grid.
    block: 'plain', 'residual' or 'residual_d', see `layers.unet_blocks`.
    depths: blocks of each stage; () for two.
    dims: channels of each stage; () for those of the map beside it.
    kernels: kernel of each stage, a number, or one for each axis: '1x3x3,3,3'; '' for 3.
    up: 'transposed' convolution, or 'nearest' or 'linear' interpolation.
    norm: 'instance', 'group' (of eight channels) or 'batch'.
    slope: of the leaky ReLU below zero.
  """

  num_classes: int
  deep_supervision: bool = False
  dtype: Any = 'float32'
  block: str = 'plain'
  depths: tuple[int, ...] = ()
  dims: tuple[int, ...] = ()
  kernels: str = ''
  up: str = 'transposed'
  norm: str = 'instance'
  slope: float = 0.01

  def __post_init__(self):
    for option, choices in (('block', BLOCKS), ('up', UPS), ('norm', NORMS)):
      choose(f'decoder.{option}', getattr(self, option), choices)
    super().__post_init__()

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """All stages, and the stem where it is finer than they.

    Raises:
      UserError: an encoder whose maps are all of one size.
    """
    return all_levels(encoder, 'unet', 'linear')

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K], ...) float32 of an image [B, *size, C] and maps [B, *grid, D], the finest first."""
    rank, count, dtype = image.ndim - 2, len(maps) - 1, jnp.dtype(self.dtype)
    style = Style(self.norm, self.slope, dtype=dtype)
    depths = each_level('depths', self.depths, count) or (2,) * count
    dims = each_level('dims', self.dims, count) or tuple(x.shape[-1] for x in maps[:-1])
    kernels = each_stage(stages_text('decoder.kernels', self.kernels, count, rank), count, rank, 3)
    x, outs = maps[-1].astype(dtype), []

    def stage(x, skip, factor, name, dim, depth, kernel):
      x = Up(skip.shape[-1] if skip is not None else dim, factor, self.up, dtype, name=f'up{name}')(x)
      x = x if skip is None else jnp.concatenate([x, skip.astype(dtype)], axis=-1)
      for j in range(depth):
        block = BLOCKS[self.block](dim, kernel, (1,) * rank, not j, style, name=f'stage{name}_{j}')
        x = block(x, 0.0, None, train)
      outs.append((name, x))
      return x

    for i in reversed(range(count)):
      x = stage(x, maps[i], growth(maps[i], x, 'unet'), str(i + 1), dims[i], depths[i], kernels[i])
    total, step = growth(image, x, 'unet'), 0
    while max(total) > 1:
      step += 1
      factor = tuple(2 if n % 2 == 0 else n for n in total)
      total = tuple(n // f for n, f in zip(total, factor, strict=True))
      x = stage(x, None, factor, f'_fine{step}', max(x.shape[-1] // 2, NARROWEST), (*depths, 1)[0], (3,) * rank)
    outs = outs[::-1] if self.deep_supervision else outs[-1:]
    head = lambda name: Conv(self.num_classes, 1, kernel_init='leaky', dtype=dtype, name=f'head{name}')
    return tuple(head(name)(x).astype(jnp.float32) for name, x in outs)
