"""Encoders of residual and plain U-Nets in two or three dimensions: nnU-Net's (Isensee et al. 2021, 2024) and STU-Net's
(Huang et al. 2023). With the decoder `unet` each is the whole published network."""

from typing import Any

import jax

from jaxmed.errors import UserError, choose
from jaxmed.models.layers.convolution import Hierarchical, flat_features, keep, path_rates
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.unet_blocks import (
  BLOCKS,
  DOWNS,
  GROUP,
  NORMS,
  Plain,
  Style,
  each_stage,
  pooled_down,
  stages_text,
)

_NNUNET = dict(dims=(32, 64, 128, 256, 320, 320))
_RESENC = dict(block='residual_d', depths=(1, 3, 4, 6, 6, 6), stem_width=32, zero_init_residual=True, **_NNUNET)
_MICRO = dict(dims=(16, 32, 64, 128))


def _stunet(width: int, depth: int) -> dict[str, Any]:
  dims = tuple(width * n for n in (1, 2, 4, 8, 16, 16))
  return dict(block='residual', depths=(depth,) * 6, dims=dims)


# nnUNet default_experiment_planner.py, residual_encoder_unet_planners.py: widths 32 * 2**i up to 320, blocks a stage.
# The presets M, L and XL are one network, planned for 8, 24 and 40 GB. STU-Net: STUNetTrainer.py. 'micro' is ours, for
# images of 32 to 96 pixels on a few CPU cores.
SIZES: dict[str, dict] = {
    'nnunet_micro': dict(depths=(2, 2, 2, 2), **_MICRO),
    'nnunet_plain': dict(depths=(2,) * 6, **_NNUNET),
    'resenc_micro': dict(block='residual_d', depths=(1, 2, 2, 2), stem_width=16, zero_init_residual=True, **_MICRO),
    'resenc_m': _RESENC, 'resenc_l': _RESENC, 'resenc_xl': _RESENC,
    'stunet_micro': dict(block='residual', depths=(1, 1, 1, 1), **_MICRO),
    'stunet_s': _stunet(16, 1), 'stunet_b': _stunet(32, 1), 'stunet_l': _stunet(64, 2), 'stunet_h': _stunet(96, 3),
}


class UNet(Hierarchical):
  """The encoder of a U-Net: level 1 has the stride of the image, and each later stage begins with a stride.

  A map of one place has no instance norm, so images have at least two places of the last map.

  Attributes:
    depths, dims: blocks and channels of each stage.
    block: 'plain' (convolution, norm, leaky ReLU), 'residual' (STU-Net) or 'residual_d' (nnU-Net's ResEnc).
    kernels: kernel of each stage, a number, or one for each axis: '1x3x3,3,3'; '' for 3.
    strides: stride of each stage, likewise; '' for 1, then 2.
    norm: 'instance', 'group' (of eight channels) or 'batch'.
    down: what strides: the first 'conv' of a stage, or a 'mean' or 'max' before it.
    stem_width: channels of a convolution before the stages; 0 for none. Level 0 is then the image.
    slope: of the leaky ReLU below zero.
    zero_init_residual: the last norm of each block starts at zero (nnU-Net's init_last_bn_before_add_to_0).
  """

  depths: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
  dims: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
  block: str = 'plain'
  kernels: str = ''
  strides: str = ''
  norm: str = 'instance'
  down: str = 'conv'
  stem_width: int = 0
  slope: float = 0.01
  zero_init_residual: bool = False

  def __post_init__(self):
    for option, choices in (('block', BLOCKS), ('norm', NORMS), ('down', DOWNS)):
      choose(f'encoder.{option}', getattr(self, option), choices)
    for option in ('kernels', 'strides'):
      text = stages_text(f'encoder.{option}', getattr(self, option), len(self.depths), len(self.image_size))
      object.__setattr__(self, option, text)
    if self.drop_path and self.block == 'plain':
      raise UserError('encoder.drop_path needs a block with a shortcut: residual or residual_d, not plain')
    if self.norm == 'group' and any(n % GROUP for n in (*self.dims, self.stem_width)):
      raise UserError(f'encoder.norm=group needs encoder.dims that {GROUP} divides, not {self.dims}')
    super().__post_init__()

  @property
  def stage_strides(self) -> list[tuple[int, ...]]:
    """The stride of each stage along each axis."""
    steps = self.strides or ','.join('1' + '2' * (len(self.depths) - 1))
    return each_stage(steps, len(self.depths), len(self.image_size), 1)

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    total = [1] * len(self.image_size)
    for stride in self.stage_strides:
      total = [n * step for n, step in zip(total, stride, strict=True)]
    return tuple(total)

  @property
  def decoder_options(self) -> dict[str, dict[str, Any]]:
    """Options of the decoder `unet` with which this is the published network.

    nnU-Net decodes by plain layers, two a stage or one after residual blocks; STU-Net as it encodes.
    """
    depths = {'plain': (2,), 'residual_d': (1,), 'residual': self.depths[:-1]}[self.block]
    depths = depths if len(depths) > 1 else depths * (len(self.depths) - 1)
    own = self.block == 'residual'
    return {'unet': dict(block='residual' if own else 'plain', up='nearest' if own else 'transposed', depths=depths,
                         kernels=self.kernels.rpartition(',')[0], norm=self.norm, slope=self.slope)}

  def _style(self, train: bool) -> Style:
    return Style(self.norm, self.slope, self.zero_init_residual, train and self.drop_path > 0, self.compute)

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    if not self.stem_width:
      return image
    rank = len(self.image_size)
    kernel = each_stage(self.kernels, 1, rank, 3)[0]
    layer = Plain(self.stem_width, kernel, (1,) * rank, True, self._style(train), name='stem')
    return layer(image, 0.0, visible, train)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    rank, rates, maps = len(self.image_size), path_rates(self.drop_path, self.depths), []
    kernels = each_stage(self.kernels, len(self.depths), rank, 3)
    ones, style = (1,) * rank, self._style(train)
    for i, (depth, dim, stride) in enumerate(zip(self.depths, self.dims, self.stage_strides, strict=True)):
      if self.down != 'conv':
        x, stride = keep(pooled_down(x, stride, self.down), visible), ones
      for j in range(depth):
        block = BLOCKS[self.block](dim, kernels[i], ones if j else stride, not j, style, name=f'stage{i + 1}_{j}')
        x = block(x, rates[i][j], visible, train)
      maps.append(x)
    return maps

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    if self.norm == 'instance' and x[0, ..., 0].size == 1:
      near = 'x'.join(str(2 * n) for n in self.patch_size)
      raise UserError('an image of one place of the last map has no instance norm: choose larger images or crops, such '
                      f'as {near}, or fewer encoder.depths, dims and strides')
    return flat_features(x, visible)
