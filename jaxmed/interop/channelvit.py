"""ChannelViT <-> the official ChannelVisionTransformer (insitro/ChannelViT), by tensor names and shapes.

Two official classes share the name: channelvit/backbone/hcs_channel_vit.py keeps the channel embedding as
`patch_embed.channel_embed.weight` [V, D], channelvit/backbone/channel_vit.py as `patch_embed.channel_embed`
[1, D, V, 1, 1]. Both are read; the former is written. They compute the same, up to one rule: at the size
where C * N equals the number of native patches (four channels at half the native size) both skip the
resampling of positions and give each channel another part of the table. That is not repeated here: positions
are always shared.
"""

from collections.abc import Mapping

import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.state_dict import Params, StateDict
from jaxmed.interop.timm import position_table
from jaxmed.models.encoders.channel_vit import ChannelViT
from jaxmed.models.encoders.vit import ViT


def to_channelvit(model: ViT, params: Params) -> dict[str, np.ndarray]:
  """The state dict of the official class (HCS) with the same features.

  `patch_embed.proj.weight` is [D, 1, 1, p, p]. Fixed positions are written out as a table, absent ones as
  zeros.

  Raises:
    UserError: the class cannot hold the model; the text says what and which format can.
  """
  check_channelvit(model)
  p = state_dict.host(params)
  patch = tuple(model.patch_size)
  table = position_table(model, p)
  if model.no_embed_class:  # the class always adds a position to the class token
    table = np.concatenate([np.zeros_like(table[:1]), table])
  kernel = p['patch_embed']['kernel']  # [p * p, D]
  return {
      'cls_token': p['cls_token'][None],
      'pos_embed': table[None],
      'patch_embed.proj.weight': kernel.T.reshape(-1, 1, 1, *patch),
      'patch_embed.proj.bias': p['patch_embed']['bias'],
      'patch_embed.channel_embed.weight': p['channel_embed'],
      'norm.weight': p['norm']['scale'],
      'norm.bias': p['norm']['bias'],
  } | state_dict.write_blocks(p['transformer']['blocks'])


def check_channelvit(model: ViT) -> None:
  """Raises a UserError where the official class cannot hold the model."""
  if not model.per_channel:
    raise UserError("format 'channelvit' holds one token a channel, not a ViT: export with --format timm")
  if not model.supports.channel_vectors:
    raise UserError("format 'channelvit' holds a ChannelViT, not a bag of channels: export with --format timm")
  size, patch = set(model.image_size), set(model.patch_size)
  wrong = None
  if len(model.image_size) != 2 or len(size) != 1 or len(patch) != 1:
    wrong = f'square 2D images and patches only, not {tuple(model.image_size)} with {tuple(model.patch_size)}'
  elif model.pos == 'rope':
    wrong = "no rotary positions (pos='rope')"
  elif model.pos != 'none' and model.pos_interpolation != 'offset':
    wrong = f"pos_interpolation 'offset' only, not {model.pos_interpolation!r}"
  elif not model.class_token or model.num_registers:
    wrong = f'one class token and no registers, not {int(model.class_token)} and {model.num_registers}'
  elif model.channel_attention != 'joint':
    wrong = f'joint attention only, not channel_attention={model.channel_attention!r}'
  elif model.layer_scale or model.mlp != 'gelu':
    wrong = f'no LayerScale and a GELU MLP, not layer_scale={model.layer_scale}, mlp={model.mlp!r}'
  elif model.pre_norm or model.map_head:
    wrong = 'no norm before the first block and no pooling by attention (encoder.pre_norm, encoder.map_head)'
  if wrong:
    raise UserError(f"format 'channelvit' has {wrong}: export with --format jaxmed")


def from_channelvit(tensors: Mapping[str, np.ndarray], num_heads: int | None = None,
                    image_size: tuple[int, ...] | None = None) -> tuple[ChannelViT, Params]:
  """The model and parameters of a state dict of either official class, all of it read off names and shapes.

  Prefixes such as 'module.' or 'teacher.backbone.' are stripped, the classifier is left out with a note.

  Args:
    num_heads: None for the registered size of this width and depth, else width // 64 (tiny, small, base
      agree).
    image_size: native size [H, W], only to be checked: the class is square.
  Raises:
    UserError: a tensor is missing, has another shape, or has no place.
  """
  state = StateDict(tensors, 'channelvit')
  weight = state.take('patch_embed.proj.weight', -1, 1, 1, -1, -1)
  dim, patch = weight.shape[0], weight.shape[3:]
  if 'patch_embed.channel_embed' in state:
    embed = state.take('patch_embed.channel_embed', 1, dim, -1, 1, 1)[0, :, :, 0, 0].T
  else:
    embed = state.take('patch_embed.channel_embed.weight', -1, dim)
  table = state.take('pos_embed', 1, -1, dim)[0]
  size = state_dict.infer_size('pos_embed', len(table) - 1, patch, image_size)
  if len(set(size)) != 1 or len(set(patch)) != 1:
    raise UserError(f'image size {size} with patches {tuple(patch)}: the official class is square')
  p: Params = {
      'cls_token': state.take('cls_token', 1, 1, dim)[0], 'pos_embed': table, 'channel_embed': embed,
      'patch_embed': {'kernel': weight.reshape(dim, -1).T, 'bias': state.take('patch_embed.proj.bias', dim)},
      'norm': {'scale': state.take('norm.weight', dim), 'bias': state.take('norm.bias', dim)}}
  blocks, fields = state_dict.read_blocks(state, dim, num_heads)
  p['transformer'] = {'blocks': blocks}
  state.finish()
  model = ChannelViT(image_size=size, patch_size=tuple(patch), in_channels=len(embed), embed_dim=dim,
                     **fields)
  return model, p
