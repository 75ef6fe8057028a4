"""The light decoder of Primus (Wald et al. 2025): transposed convolutions from the last map of a transformer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.contracts import Encoder
from jaxmed.models.layers import kernels
from jaxmed.models.layers.pyramid import doublings
from jaxmed.models.layers.transformer import LayerNorm
from jaxmed.models.layers.unet_blocks import Up

EPSILON = 1e-5  # of the final norm, PyTorch's default; those between the convolutions have 1e-6


class Primus(nn.Module):
  """Steps of two from the last map to the image, with layer norm and GELU between them; widths fall geometrically.

  The last map is layer-normalised first, which Primus's transformer does itself. Definition: MIC-DKFZ/
  dynamic-network-architectures, architectures/primus.py and building_blocks/patch_encode_decode.py.

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
    """Logits ([B, *size, K],) float32 of an image [B, *size, C] and one map [B, *grid, D]."""
    del train
    compute = jnp.dtype(self.dtype)
    x = LayerNorm(compute, EPSILON, name='norm')(maps[-1].astype(compute))
    steps = doublings(image.shape[1:-1], x.shape[1:-1])
    widths = channels(x.shape[-1], self.num_classes, len(steps))
    for i, (width, stride) in enumerate(zip(widths, reversed(steps), strict=True)):
      if i:
        x = kernels.gelu(LayerNorm(compute, name=f'norm{i}')(x))
      x = Up(width, stride, dtype=compute, name=f'up{i}')(x)
    return (x.astype(jnp.float32),)


def channels(dim: int, classes: int, steps: int) -> list[int]:
  """Widths after each step: by equal factors from dim towards 2 * classes, in multiples of 8; the last is classes."""
  factor = (dim / (2 * classes)) ** (1 / steps)
  return [*(int(max(8, np.round((dim / factor ** (i + 1) + 1e-6) / 8) * 8)) for i in range(steps - 1)), classes]
