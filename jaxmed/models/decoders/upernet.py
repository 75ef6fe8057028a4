"""UPerNet (Xiao et al. 2018): a pyramid of pooled regions on the coarsest map, and a feature pyramid on all four."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Encoder
from jaxmed.models.layers.convolution import Conv
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.models.layers.pyramid import Pyramid, four_levels, pool, resize
from jaxmed.models.layers.transformer import Dense, LayerNorm


class UPerNet(nn.Module):
  """UPerNet's head on four maps (open-mmlab/mmsegmentation, mmseg/models/decode_heads/uper_head.py and psp_head.py).

  Blocks of a transformer become a pyramid first, see `pyramid.Pyramid`. The last layer starts with deviation 0.02, that
  of mmseg with 0.01; there is no auxiliary head.

  Attributes:
    num_classes: of the logits. deep_supervision: of no effect, there is one output.
    width: channels of every map of the head.
    pool_scales: parts along an axis over which the coarsest map is averaged.
    dropout: probability of dropping a channel before the last layer, in training.
    map_norm: whether each map is layer-normalised first, as mmseg's Swin and ConvNeXt do themselves.
  """

  num_classes: int
  deep_supervision: bool = False
  width: int = 512
  pool_scales: tuple[int, ...] = (1, 2, 3, 6)
  dropout: float = 0.1
  map_norm: bool = False
  dtype: Any = 'float32'

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """The last four stages, or four blocks at equal distances."""
    return four_levels(encoder)

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K],) float32 of an image [B, *size, C] and maps [B, *grid_i, D_i] of `levels`."""
    compute = jnp.dtype(self.dtype)
    maps = tuple(x.astype(compute) for x in maps)
    if self.map_norm:
      maps = tuple(LayerNorm(compute, 1e-5, name=f'norm{i}')(x) for i, x in enumerate(maps))
    if len(maps) == 4 and len({x.shape[1:-1] for x in maps}) == 1:
      maps = Pyramid(compute, name='pyramid')(maps, train)
    conv = lambda x, kernel, name: ConvNorm(self.width, kernel, compute, name=name)(x, train)
    laterals = [conv(x, 1, f'lateral{i}') for i, x in enumerate(maps[:-1])]
    laterals.append(self._pooled(maps[-1], conv))
    for i in reversed(range(len(laterals) - 1)):
      laterals[i] = laterals[i] + resize(laterals[i + 1], laterals[i].shape[1:-1])
    outs = [*(conv(x, 3, f'fpn{i}') for i, x in enumerate(laterals[:-1])), laterals[-1]]
    x = conv(jnp.concatenate([resize(y, outs[0].shape[1:-1]) for y in outs], axis=-1), 3, 'fuse')
    if self.dropout:  # of whole channels
      x = nn.Dropout(self.dropout, broadcast_dims=tuple(range(1, x.ndim - 1)))(x, deterministic=not train)
    logits = Dense((self.num_classes,), ('embed', None), dtype=compute, name='out')(x).astype(jnp.float32)
    return (resize(logits, image.shape[1:-1]),)

  def _pooled(self, x: jax.Array, conv: Any) -> jax.Array:
    """The coarsest map beside its means over regions."""
    regions = [resize(conv(pool(x, n), 1, f'pool{n}'), x.shape[1:-1]) for n in self.pool_scales]
    return conv(jnp.concatenate([x, *regions], axis=-1), 3, 'bottleneck')


class ConvNorm(nn.Module):
  """Convolution without bias, batch norm, ReLU (mmcv's ConvModule): [B, *size, D] -> [B, *size, features]."""

  features: int
  kernel: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = Conv(self.features, self.kernel, 1, self.kernel // 2, False, 'fan_out', self.dtype, name='conv')(x)
    return jax.nn.relu(BatchNorm(dtype=self.dtype, name='norm')(x, train))
