"""The decoder of a label autoencoder: a short code of a whole map, and the classes of every pixel from that code alone.

That of a V-Net without skips (adigasu/Anatomically-aware_Uncertainty_for_Semi-supervised_Segmentation,
code_DAE/networks/vnet.py:VNetDAE).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.layers.convolution import Conv
from jaxmed.models.layers.linear import Dense
from jaxmed.models.layers.unet_blocks import Plain, Style, Up

NARROWEST = 16  # channels that stages are halved to


class LabelDecoder(nn.Module):
  """Linear to the code and back to the map, then stages that are twice as large and half as wide, to the classes.

  Each stage is a transposed convolution and layers of convolution, batch norm and ReLU. The linear layers bind the size
  of the image.

  Attributes:
    num_classes: of the logits.
    size: of the image.
    code: numbers of the code.
    depths: layers of each stage after its transposed convolution, from the code on; the last one of those that follow.
  """

  num_classes: int
  size: tuple[int, ...]
  code: int = 512
  depths: tuple[int, ...] = (3, 3, 2, 1)
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False, noise: float = 0.0) -> jax.Array:
    """Logits [B, *size, K] float32 of a map [B, *grid, D].

    Args:
      noise: deviation of what is added to the code, cut at two of them; it needs an rng `dropout`.
    Raises:
      UserError: a grid that does not divide the size.
    """
    grid, width, rank, dtype = x.shape[1:-1], x.shape[-1], len(self.size), jnp.dtype(self.dtype)
    if any(n % g for n, g in zip(self.size, grid, strict=True)):
      raise UserError(f'a label autoencoder cannot enlarge a map of {grid} to {self.size}: expected whole factors')
    style, total = Style('batch', 0.0, dtype=dtype), tuple(n // g for n, g in zip(self.size, grid, strict=True))
    z = Dense((self.code,), ('embed', None), dtype=dtype, name='to_code')(x.reshape(len(x), -1))
    if noise:
      z = z + clipped(self.make_rng('dropout'), z.shape, noise).astype(z.dtype)
    x = Dense((math.prod(grid) * width,), (None, 'embed'), dtype=dtype, name='from_code')(z).reshape(x.shape)
    i = 0
    while max(total) > 1:
      i += 1
      factor = tuple(2 if n % 2 == 0 else n for n in total)
      total = tuple(n // f for n, f in zip(total, factor, strict=True))
      width = max(width // 2, NARROWEST)
      x = style.act(style.normed(Up(width, factor, dtype=dtype, name=f'up{i}')(x), None, train, f'up_norm{i}'))
      for j in range((*self.depths, *self.depths[-1:] * i)[i - 1]):
        x = Plain(width, (3,) * rank, (1,) * rank, not j, style, name=f'stage{i}_{j}')(x, 0.0, None, train)
    return Conv(self.num_classes, 1, kernel_init='leaky', dtype=dtype, name='head')(x).astype(jnp.float32)


def clipped(rng: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
  """Normal noise [*shape], cut at two deviations."""
  return jnp.clip(deviation * jax.random.normal(rng, shape), -2 * deviation, 2 * deviation)
