"""The encoder of SWTR-Unet (Hille et al. 2023, arXiv 2201.10981): a ResNet whose last map goes through Swin's blocks.

No code is published. From the paper: a pretrained ResNet, transformer blocks, a decoder as a U-Net's, slices of liver
MR and CT. Ours, since they are not published: the ResNet-50, Swin's blocks at the width of the ResNet's last map with
heads of 64 channels, two of them (windows, and shifted ones) of 7 places, a layer norm after them, and a decoder of two
convolutions a stage with batch norm and ReLU, as the ResNet has. The ResNet is `encoders.resnet` under its names.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.encoders import resnet, swin
from jaxmed.models.layers.convolution import Norm, Stage, keep
from jaxmed.models.layers.transformer import rematerialised

# 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores.
SIZES: dict[str, dict] = {
    'swtr_unet_micro': resnet.SIZES['resnet_micro'] | dict(num_heads=4, window_size=4),
    'swtr_unet_34': resnet.SIZES['resnet34'],
    'swtr_unet_50': resnet.SIZES['resnet50'] | dict(num_heads=32),
}
BOTTLENECK = ('transformer', 'norm')  # parameters that a ResNet has not


class SWTRUNet(resnet.ResNet):
  """A ResNet and a bottleneck of transformer blocks; the last level is what they make of the last map.

  Attributes:
    transformer_depth: blocks of the bottleneck; every second one has shifted windows.
    num_heads, window_size, mlp_ratio: of these, as of a Swin.
    remat: what the backward pass computes again of the blocks: 'none' or a policy, to save memory.
  """

  transformer_depth: int = 2
  num_heads: int = 8
  window_size: int = 7
  mlp_ratio: float = 4.0
  remat: str = 'none'

  def __post_init__(self):
    if min(self.transformer_depth, self.num_heads, self.window_size) < 1 or self.embed_dim % self.num_heads:
      raise UserError(f'encoder.transformer_depth {self.transformer_depth}, num_heads {self.num_heads} and window_size '
                      f'{self.window_size} must be positive, with heads that divide the width {self.embed_dim}')
    super().__post_init__()

  @property
  def decoder_options(self) -> dict[str, dict[str, Any]]:
    """Options of the decoder `unet` with which it is as the ResNet."""
    return {'unet': dict(norm='batch', slope=0.0)}

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    maps, depth = super().stages(x, visible, train), self.transformer_depth
    drops = train and self.drop_path > 0
    shape = (self.num_heads, self.window_size, self.mlp_ratio, True, 'exact', True, 'trunc_normal')
    blocks = Stage(rematerialised(swin.Block, self.remat), depth, drops, self.compute, shape, name='transformer')
    turns: Any = (jnp.full(depth, self.drop_path), jnp.arange(depth) % 2 == 1)
    x = blocks(maps[-1], turns, visible)
    return [*maps[:-1], keep(Norm(True, swin.EPSILON, self.compute, name='norm')(x), visible)]
