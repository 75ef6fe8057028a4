"""The decoder of Swin UNETR (Hatamizadeh et al. 2022): residual blocks on the levels of a hierarchical encoder."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.models.layers.pyramid import all_levels
from jaxmed.models.layers.residual import ResidualConv, UpBlock
from jaxmed.models.layers.transformer import Dense


class SwinUNETR(nn.Module):
  """A U-Net of residual blocks with instance norm on the image and all levels (Project-MONAI/MONAI, swin_unetr.py).

  Residual blocks go before the skips of the image and the levels, and on the last map; the level before the last is a
  skip as it is.

  Attributes:
    num_classes: of the logits. deep_supervision: whether each level but the last has logits too.
    feature_size: width of the block on the image; 0 for the width of the finest level.
  """

  num_classes: int
  deep_supervision: bool = False
  feature_size: int = 0
  dtype: Any = 'float32'

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """All stages, and the stem where it is finer than they.

    Raises:
      UserError: an encoder whose levels have one grid.
    """
    return all_levels(encoder, 'swin_unetr', 'a model such as swin_unetr_48, or the decoder unetr')

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K], ...) float32 of an image [B, *size, C] and maps [B, *grid_i, D_i], the finest first."""
    del train
    compute = jnp.dtype(self.dtype)
    block = lambda x, width, name: ResidualConv(width, compute, name=name)(x.astype(compute))
    names = ['image', *(str(i) for i in range(len(maps) - 1))]
    skips = [block(image, self.feature_size or maps[0].shape[-1], 'skip_image')]
    skips += [block(x, x.shape[-1], f'skip{i}') for i, x in enumerate(maps[:-2])]
    skips.append(maps[-2].astype(compute))
    outs: list[jax.Array] = []
    x = block(maps[-1], maps[-1].shape[-1], 'bottom')
    for name, skip in reversed(list(zip(names, skips, strict=True))):
      x = UpBlock(skip.shape[-1], compute, name=f'up_{name}')(x, skip)
      if name == 'image' or self.deep_supervision:
        out = Dense((self.num_classes,), ('embed', None), True, 'torch_uniform', compute, name=f'out_{name}')(x)
        outs.insert(0, out.astype(jnp.float32))
    return tuple(outs)
