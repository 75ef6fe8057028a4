"""An encoder's weights for other channels than it was trained on, and between one token a patch and one a channel.

Only what touches channels changes: the patch projection, [*patch, C, D] flattened, and the table of channel embeddings
[C, D]. The scale rule is timm's (timm/models/_manipulate.py, adapt_input_conv): weights times C / C', so that the
projection of the same picture in every channel stays as it was. It is that of the ViT baseline of ChannelViT's authors
too, for which missing channels are zeroed and the rest scaled.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.interop import state_dict
from jaxmed.interop.state_dict import Params
from jaxmed.models.encoders.bag import BagOfChannels
from jaxmed.models.encoders.channel_vit import ChannelViT
from jaxmed.models.encoders.vit import ViT

HOW = ('name', 'mean', 'repeat')
KINDS = ('vit', 'channel_vit')


def inflate(model: ViT, params: Params, old: Sequence[str], new: Sequence[str],
            how: str = 'name') -> tuple[Any, Params]:
  """The model and parameters for the channels `new` instead of `old`.

  Args:
    how: what a channel gets; hashed embeddings are made of names anyway. 'name': what the channel of its name has, and
      the mean of all where there is none; 'mean': the mean for each; 'repeat': what the (i mod C)-th has, for the i-th.
  Raises:
    UserError: another `how`, names given twice, a model that is no vision transformer.
  """
  choose('inflate', how, HOW)
  _check_transformer(model)
  if len(set(new)) != len(new) or not new:
    raise UserError(f'the channels {", ".join(new)} must be different names, at least one')
  take = _weights(old, new, how)  # [C', C]
  p = state_dict.host(params)
  fields: dict[str, Any] = {'in_channels': len(new)}
  if isinstance(model, BagOfChannels):  # to which all channels are one
    return model.clone(**fields), p
  if model.per_channel and model.channel_embedding == 'hashed':  # which holds any names
    return model.clone(**fields, channel_names=tuple(new)), p
  if model.per_channel:
    return model.clone(**fields), p | {'channel_embed': take @ p['channel_embed']}
  kernel = p['patch_embed']['kernel'].reshape(-1, len(old), model.embed_dim)  # [P, C, D]
  kernel = np.einsum('pcd,nc->pnd', kernel, take) * (len(old) / len(new))
  return model.clone(**fields), p | {'patch_embed': p['patch_embed'] | {'kernel': _flat(kernel)}}


def to_channel_vit(model: ViT, params: Params) -> tuple[ChannelViT, Params]:
  """A ViT as ChannelViT: each channel is projected as a picture that is the same in every channel was.

  With one such channel the features are the ViT's. Channel embeddings begin at zero.
  """
  _check_transformer(model)
  if model.per_channel:
    raise UserError(f'the model is a {type(model).__name__}: expected a ViT')
  p = state_dict.host(params)
  kernel = p['patch_embed']['kernel'].reshape(-1, model.in_channels, model.embed_dim).sum(axis=1)
  fields = {k: getattr(model, k) for k in ViT.__dataclass_fields__ if k not in ('parent', 'name', 'pos_interpolation')}
  return (ChannelViT(**fields, pos_interpolation=model.pos_interpolation),
          p | {'patch_embed': p['patch_embed'] | {'kernel': kernel},
               'channel_embed': np.zeros((model.in_channels, model.embed_dim), np.float32)})


def to_vit(model: ViT, params: Params) -> tuple[ViT, Params]:
  """A ChannelViT as ViT of its channels, as far as that is linear: a patch's token is the mean of its channels' tokens.

  Their projections, embeddings and positions are linear, so that mean is exact; what the blocks make of one token is
  not what they make of C, unless C is 1.
  """
  _check_transformer(model)
  if not model.supports.channel_vectors:
    raise UserError(f'the model is a {type(model).__name__}: expected a ChannelViT')
  model, params = as_table(model, params)
  p = state_dict.host(params)
  count = model.in_channels
  kernel = np.repeat(p['patch_embed']['kernel'][:, None] / count, count, axis=1)  # [P, C, D]
  bias = p['patch_embed']['bias'] + p['channel_embed'].mean(axis=0)
  fields = {k: getattr(model, k) for k in ViT.__dataclass_fields__ if k not in ('parent', 'name')}
  rest = {k: v for k, v in p.items() if k != 'channel_embed'}
  return ViT(**fields), rest | {'patch_embed': {'kernel': _flat(kernel), 'bias': bias}}


def as_table(model: ViT, params: Params) -> tuple[Any, Params]:
  """The same model with a table of embeddings, where they are hashed; others as they are."""
  if getattr(model, 'channel_embedding', 'table') == 'table':
    return model, params
  vectors = model.apply({'params': nn.meta.unbox(dict(params))}, method='channel_vectors')
  rest = {k: v for k, v in params.items() if k != 'channel_hash'}
  return model.clone(channel_embedding='table', channel_names=()), rest | {'channel_embed': vectors}


def _weights(old: Sequence[str], new: Sequence[str], how: str) -> np.ndarray:
  """[C', C]: row i says of which old channels the new channel i is made."""
  mean, one = np.full(len(old), 1 / len(old), np.float32), np.eye(len(old), dtype=np.float32)
  if how == 'repeat':
    return np.stack([one[i % len(old)] for i in range(len(new))])
  place = {name: i for i, name in enumerate(old)} if how == 'name' else {}
  return np.stack([one[place[name]] if name in place else mean for name in new])


def _flat(kernel: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(kernel.reshape(math.prod(kernel.shape[:2]), kernel.shape[2]))


def _check_transformer(model: Any) -> None:
  if not isinstance(model, ViT):
    raise UserError(f'{type(model).__name__} is no vision transformer: expected a vit or channel_vit')
