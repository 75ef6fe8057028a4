"""Whole networks <-> MONAI's SwinUNETR and UNETR: an encoder with its decoder; see `monai` for the encoders alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import monai
from jaxmed.interop.state_dict import Params, StateDict
from jaxmed.models.decoders import dense
from jaxmed.models.encoders.swin import SwinUNETR

_OUT = 'out.conv.conv.weight'
_SWIN_DECODER: monai.Patterns = (
    (r'skip_image/(\w+)', 0, 'encoder1.layer.{}.conv'), (r'bottom/(\w+)', 0, 'encoder10.layer.{}.conv'),
    (r'skip(\d+)/(\w+)', 2, 'encoder{}.layer.{}.conv'), (r'out_image', 0, 'out.conv.conv'),
    (r'up_image/up', 0, 'decoder1.transp_conv.conv'), (r'up_image/conv/(\w+)', 0, 'decoder1.conv_block.{}.conv'),
    (r'up_(\d+)/up', 2, 'decoder{}.transp_conv.conv'), (r'up_(\d+)/conv/(\w+)', 2, 'decoder{}.conv_block.{}.conv'),
)
_UNETR_DECODER: monai.Patterns = (
    (r'norm', 0, 'vit.norm'), (r'out0', 0, 'out.conv.conv'), (r'skip(\d+)/(\w+)', 1, 'encoder{}.layer.{}.conv'),
    (r'skip(\d+)_up', 1, 'encoder{}.transp_conv_init.conv'), (r'skip(\d+)_up(\d+)', 1, 'encoder{}.blocks.{}.0.conv'),
    (r'skip(\d+)_conv(\d+)/(\w+)', 1, 'encoder{}.blocks.{}.1.{}.conv'),
    (r'up(\d+)/up', 2, 'decoder{}.transp_conv.conv'), (r'up(\d+)/conv/(\w+)', 2, 'decoder{}.conv_block.{}.conv'),
)


@dataclasses.dataclass(frozen=True)
class Network:
  """An encoder with its decoder, and the parameters {'encoder': ..., 'decoder': ...} of both."""

  encoder: Any
  decoder: Any
  params: Params


def to_monai(network: Network) -> dict[str, np.ndarray]:
  """The state dict of MONAI's SwinUNETR or UNETR with the same logits.

  Raises:
    UserError: networks that MONAI's classes cannot hold.
  """
  encoder, decoder, params, rank = network.encoder, network.decoder, network.params, len(network.encoder.image_size)
  if decoder.deep_supervision:
    raise UserError('the networks of MONAI have one output: expected deep_supervision=False')
  if isinstance(encoder, SwinUNETR):
    swin = monai.to_swinunetr(encoder, params['encoder'], encoder.merging)
    return swin | monai.write(_SWIN_DECODER, params['decoder'], rank)
  if encoder.class_token or tuple(encoder.patch_size) != (16,) * rank or decoder.taps != 'monai' or encoder.depth != 12:
    raise UserError('a UNETR of MONAI has 12 blocks, patches of 16, no class token and the taps monai')
  vit = {f'vit.{k}': v for k, v in monai.to_vit(encoder, params['encoder']).items()}
  return vit | monai.write(_UNETR_DECODER, params['decoder'], rank)


def from_monai(tensors: Mapping[str, np.ndarray], image_size: tuple[int, ...] | None = None,
                 merging: str = 'corrected', num_heads: int | None = None) -> Network:
  """The network of a state dict of MONAI's SwinUNETR or UNETR.

  Args:
    image_size, num_heads: as of `from_swinunetr` and `from_vit`. merging: the order of merging of a SwinUNETR.
  Raises:
    UserError: a tensor is missing or has another shape.
  """
  swin = any(k.endswith(monai.SWIN_ANCHOR) for k in tensors)
  encoder, params = monai.from_swinunetr(tensors, None, image_size, merging) if swin else monai.from_vit(
      tensors, num_heads, image_size)
  state, rank = StateDict(tensors, 'monai', _OUT), len(encoder.image_size)
  options: dict[str, Any] = {'feature_size': state.shape('encoder1.layer.conv1.conv.weight')[0]}
  options |= {} if swin else {'taps': 'monai'}
  name, patterns = ('swin_unetr', _SWIN_DECODER) if swin else ('unetr', _UNETR_DECODER)
  decoder = dense.create_decoder(name, encoder, state.shape(_OUT)[0], **options)
  return Network(encoder, decoder, {'encoder': params,
                                    'decoder': monai.read(patterns, decoder_shapes(encoder, decoder), state, rank)})


def decoder_shapes(encoder: Any, decoder: Any) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter of a decoder by its path, as 'up_image/up/kernel'."""
  image = jax.ShapeDtypeStruct((1, *encoder.image_size, encoder.in_channels), jnp.float32)
  levels = decoder.levels(encoder)

  def initial(image):
    features, _ = encoder.init_with_output(jax.random.key(0), image, levels=levels)
    return decoder.init(jax.random.key(0), image, dense.maps_of(encoder, features))

  params = nn.meta.unbox(jax.eval_shape(initial, image)['params'])
  return {k: v.shape for k, v in flax.traverse_util.flatten_dict(params, sep='/').items()}
