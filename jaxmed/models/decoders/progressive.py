"""The decoder of progressive upsampling (Zheng et al. 2021, SETR-PUP), of the last map alone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.errors import UserError
from jaxmed.models.layers.convolution import LEAK, Conv
from jaxmed.models.layers.norm import GroupNorm
from jaxmed.models.layers.pyramid import doublings, resize


class Progressive(nn.Module):
  """Steps of a 3^d convolution, an instance norm without scale and bias, leaky ReLU and linear interpolation by two.

  Each step halves the width, to a sixteenth of the map's at least, and a linear layer follows: the decoder that Swin
  UNETR is pretrained with (Project-MONAI/research-contributions, SwinUNETR/Pretrain/models/ssl_head.py, 'vae'). It has
  no skips and does not see the image, so that all that it makes went through the last map.

  Attributes:
    num_classes: of the logits. deep_supervision: of no effect, there is one output.
  """

  num_classes: int
  deep_supervision: bool = False
  dtype: Any = 'float32'

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """The last one."""
    return (encoder.num_levels,)

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K],) float32 of an image [B, *size, C] and one map [B, *grid, D].

    Raises:
      UserError: a map of one place, which has no instance norm, or cells that are no powers of two.
    """
    del train
    compute, x = jnp.dtype(self.dtype), maps[-1]
    if x[0, ..., 0].size == 1:
      raise UserError('the decoder progressive normalises maps, and that of this image has one place: choose larger '
                      'images or smaller patches')
    for i, factor in enumerate(reversed(doublings(image.shape[1:-1], x.shape[1:-1])), 1):
      width = max(maps[-1].shape[-1] // 2 ** min(i, 4), 1)
      x = Conv(width, 3, 1, 1, True, 'torch', compute, name=f'conv{i}')(x.astype(compute))
      x = nn.leaky_relu(GroupNorm(affine=False, dtype=compute)(x), LEAK)
      x = resize(x, tuple(n * f for n, f in zip(x.shape[1:-1], factor, strict=True)))
    return (Conv(self.num_classes, 1, 1, 0, True, 'torch', compute, name='out')(x).astype(jnp.float32),)
