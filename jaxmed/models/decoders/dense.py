"""Decoders of dense outputs by name: logits of every pixel from the maps of an encoder.

A decoder is a Flax module, see `contracts.Decoder`: it says which levels of an encoder it wants, takes their maps
beside the image, and gives logits, the finest first. DECODERS has them by name; a new one is one file and one line
here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Decoder, Encoder
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dformer import DFormer
from jaxmed.models.decoders.fpn import FPN
from jaxmed.models.decoders.msa import MSA
from jaxmed.models.decoders.primus import Primus
from jaxmed.models.decoders.progressive import Progressive
from jaxmed.models.decoders.swin_unetr import SwinUNETR
from jaxmed.models.decoders.unet import UNet
from jaxmed.models.decoders.unetr import UNETR
from jaxmed.models.decoders.upernet import UPerNet
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense, LayerNorm


class Linear(nn.Module):
  """A layer norm and a linear layer on the last map, resized linearly to the image: the least that a decoder can be.

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
    x = LayerNorm(compute, name='norm')(maps[-1].astype(compute))
    logits = Dense((self.num_classes,), ('embed', None), dtype=compute, name='out')(x).astype(jnp.float32)
    return (jax.image.resize(logits, (*image.shape[:-1], self.num_classes), 'linear'),)


DECODERS: dict[str, Any] = {
    'linear': Linear,
    'unet': UNet,
    'swin_unetr': SwinUNETR,
    'unetr': UNETR,
    'primus': Primus,
    'progressive': Progressive,
    'upernet': UPerNet,
    'fpn': FPN,
    'dformer': DFormer,
    'msa': MSA,
}
# The decoder of each family of encoders where none is named; the linear one of a family that is not here, or whose
# decoder is not there.
AUTO = {
    'vit': 'unetr', 'channel_vit': 'unetr', 'bag': 'unetr', 'swin': 'unet', 'unet': 'unet', 'resnet': 'unet',
    'convnextv2': 'unet', 'caformer': 'unet', 'pvt_v2': 'unet',
    'swin_unetr': 'swin_unetr', 'video_resnet': 'unet', 'dformer': 'dformer', 'swtr_unet': 'unet'}
FILLED = ('parent', 'name', 'num_classes', 'deep_supervision', 'dtype')  # fields that are no options


def decoder_for(family: str, patch_size: tuple[int, ...] = ()) -> str:
  """The decoder that goes with a family of encoders, see AUTO; unetr only where patches are powers of two."""
  name = AUTO.get(family, 'linear')
  odd = name == 'unetr' and any(n & (n - 1) for n in patch_size)
  return name if name in DECODERS and not odd else 'linear'


def create_decoder(name: str, encoder: Encoder, num_classes: int, deep_supervision: bool = False,
                   **options: Any) -> Decoder:
  """Makes a decoder for an encoder, in the encoder's compute type.

  Options that are not given are those that the encoder has in `decoder_options`, if any: its published network's.

  Raises:
    UserError: an unknown name or option, or an encoder without levels.
  """
  decoder = DECODERS[choose('decoder', name, DECODERS)]
  if not encoder.supports.levels:
    raise UserError(f'{type(encoder).__name__} has no intermediate maps, which the decoder {name} needs')
  known = [field for field in decoder.__dataclass_fields__ if field not in FILLED]
  for option in options:
    choose(f'option of the decoder {name}', option, known)
  options = getattr(encoder, 'decoder_options', {}).get(name, {}) | options
  return decoder(num_classes=num_classes, deep_supervision=deep_supervision, dtype=encoder.dtype, **options)


def maps_of(encoder: Encoder, features: Features, channel_mask: jax.Array | None = None) -> tuple[jax.Array, ...]:
  """The maps [B, *grid, D] of the levels of an encoder's features, in their order.

  Those of channel tokens [B, C, *grid, D] are averaged over the channels that are there, [B, C] bool; None for all.
  """
  maps = tuple(level.map for level in features.levels)
  if not encoder.per_channel:
    return maps
  return tuple(_over_channels(x, jnp.ones(x.shape[:2], bool) if channel_mask is None else channel_mask) for x in maps)


def _over_channels(x: jax.Array, mask: jax.Array) -> jax.Array:
  """[B, C, *grid, D] -> [B, *grid, D]: the mean over the channels of `mask` [B, C]."""
  there = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
  total = jnp.where(there, x, 0).astype(jnp.float32).sum(axis=1)
  return (total / jnp.maximum(there.sum(axis=1), 1)).astype(x.dtype)
