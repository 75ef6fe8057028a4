"""The decoder of UNETR (Hatamizadeh et al. 2022): a U-Net on blocks of a transformer, each raised to its own stride."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.errors import UserError, choose
from jaxmed.models.layers.pyramid import doublings, evenly, of_one_grid
from jaxmed.models.layers.residual import ResidualConv, UpBlock, raised
from jaxmed.models.layers.transformer import Dense, LayerNorm

TAPS = ('paper', 'monai')
EPSILON = 1e-5  # MONAI's final norm


class UNETR(nn.Module):
  """Transposed convolutions raise three blocks to strides 2, 4 and 8; a U-Net joins them with the last and the image.

  For patches of 16; smaller ones have fewer strides, and blocks at equal distances. The last map is layer-normalised
  here (MONAI's ViT does so itself). Definition: Project-MONAI/MONAI, monai/networks/nets/unetr.py.

  Attributes:
    num_classes: of the logits. deep_supervision: whether the maps of the U-Net but the coarsest have logits too.
    feature_size: width at the stride of the image; each coarser stride has twice as much.
    taps: blocks that are taken of 12: 'paper' 3, 6, 9 and 12; 'monai' 4, 7, 10 and 12, as MONAI counts from 0.
  """

  num_classes: int
  deep_supervision: bool = False
  feature_size: int = 16
  taps: str = 'paper'
  dtype: Any = 'float32'

  def __post_init__(self):
    choose('taps', self.taps, TAPS)
    super().__post_init__()

  def levels(self, encoder: Encoder) -> tuple[int, ...]:
    """Blocks at equal distances, as many as the patch has steps of two.

    Raises:
      UserError: an encoder whose levels have several strides, or patches that are no powers of two.
    """
    if not of_one_grid(encoder):
      raise UserError(f'the decoder unetr needs levels of one grid, which {type(encoder).__name__} lacks: choose a '
                      'model such as vit_base/16, or the decoder swin_unetr')
    grid = tuple(n // p for n, p in zip(encoder.image_size, encoder.patch_size, strict=True))
    steps = len(doublings(tuple(encoder.image_size), grid))
    later = int(self.taps == 'monai')
    found = evenly(encoder.num_levels, steps)
    return (*(min(i + later, encoder.num_levels) for i in found[:-1]), found[-1])

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K], ...) float32 of an image [B, *size, C] and maps [B, *grid, D] of `levels`."""
    del train
    compute = jnp.dtype(self.dtype)
    steps = doublings(image.shape[1:-1], maps[-1].shape[1:-1])
    width = lambda stride: self.feature_size * 2**stride
    skips = [ResidualConv(width(0), compute, name='skip0')(image.astype(compute))]
    skips += [self._raised(x.astype(compute), j, width(j), steps[j:]) for j, x in enumerate(maps[:-1], 1)]
    outs: list[jax.Array] = []
    x = LayerNorm(compute, EPSILON, name='norm')(maps[-1].astype(compute))
    for j in reversed(range(len(steps))):
      x = UpBlock(width(j), compute, name=f'up{j}')(x, skips[j])
      if not j or (self.deep_supervision and j < len(steps) - 1):
        out = Dense((self.num_classes,), ('embed', None), True, 'torch_uniform', compute, name=f'out{j}')(x)
        outs.insert(0, out.astype(jnp.float32))
    return tuple(outs)

  def _raised(self, x: jax.Array, j: int, width: int, steps: list[tuple[int, ...]]) -> jax.Array:
    """A map raised to stride 2^j: a transposed convolution, then one and a residual block for each further step."""
    compute, (*rest, first) = jnp.dtype(self.dtype), steps
    x = raised(width, first, compute, f'skip{j}_up')(x)
    for i, stride in enumerate(reversed(rest)):
      x = raised(width, stride, compute, f'skip{j}_up{i}')(x)
      x = ResidualConv(width, compute, name=f'skip{j}_conv{i}')(x)
    return x
