"""The decoder of masked autoencoders as transformers' ViTMAEForPreTraining (models/vit_mae/modeling_vit_mae.py)."""

import math
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.huggingface import NAMES, renamed, split_qkv
from jaxmed.interop.state_dict import Params
from jaxmed.models.decoders.mae import Decoder
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers import positions
from jaxmed.models.layers.transformer import NORM_EPSILON

_LAYERS = {name: place.replace('encoder.layer.', 'decoder.decoder_layers.') for name, place in NAMES['vit_mae'].items()
           if name.startswith('blocks.')}


def to_decoder(model: ViT, decoder: Decoder, params: Params, mask_ratio: float, norm_pixels: bool
               ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Tensors of the decoder [names begin with 'decoder.'] and what config.json says of it.

  Raises:
    UserError: the class cannot hold it; names the option.
  """
  if decoder.vocabulary or decoder.channels != 'together':
    raise UserError('ViTMAEForPreTraining has objective.decoder_channels=together: export with --format hf_vit')
  if model.norm_epsilon != NORM_EPSILON:
    raise UserError(f'ViTMAEForPreTraining has one epsilon for encoder and decoder, {NORM_EPSILON:g}, not '
                    f'encoder.norm_epsilon={model.norm_epsilon:g}: export with --format hf_vit')
  p = state_dict.host(params)
  dim = decoder.embed_dim
  table = positions.sincos(decoder.grid, dim)
  out = {f'decoder.{name}.{part}': value for name, layer in (('decoder_embed', 'embed'), ('decoder_pred', 'predict'))
         for part, value in (('weight', p[layer]['kernel'].T), ('bias', p[layer]['bias']))}
  out |= {'decoder.mask_token': p['mask_token'][None], 'decoder.decoder_norm.weight': p['norm']['scale'],
          'decoder.decoder_norm.bias': p['norm']['bias'],
          'decoder.decoder_pos_embed': np.concatenate([np.zeros((1, dim), np.float32), table])[None]}
  out |= renamed(split_qkv(state_dict.write_blocks(p['transformer']['blocks'])), _LAYERS)
  config = {'architectures': ['ViTMAEForPreTraining'], 'decoder_hidden_size': dim,
            'decoder_num_hidden_layers': decoder.depth, 'decoder_num_attention_heads': decoder.num_heads,
            'decoder_intermediate_size': 4 * dim, 'mask_ratio': mask_ratio, 'norm_pix_loss': norm_pixels}
  assert decoder.out_dim == math.prod(model.patch_size) * model.in_channels
  return out, config
