"""ViT <-> timm's VisionTransformer (timm.models.vision_transformer), by tensor names and shapes alone.

The class is meant with `num_classes=0, global_pool=''`, so that its output is [B, prefix + N, D] after the
final norm, and with `dynamic_img_size=True` where images have other sizes than the native one.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.state_dict import Params, StateDict
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers import positions
from jaxmed.models.layers.tokens import grid_of


def to_timm(model: ViT, params: Params) -> dict[str, np.ndarray]:
  """The state dict of the timm VisionTransformer with the same features.

  `patch_embed.proj.weight` is [D, C, ph, pw]; SwiGLU is in the layout of timm.layers.SwiGLUPacked. Fixed
  positions are written out as a table, absent ones as zeros. With `pre_norm` the class has no bias of patches: the
  model must be `folded`.

  Raises:
    UserError: the class cannot hold the model (rotary positions, three axes, one token a channel).
  """
  check_timm(model)
  p = state_dict.host(params)
  out = {'patch_embed.proj.weight': _convolution(p['patch_embed']['kernel'], model.patch_size),
         'pos_embed': position_table(model, p)[None],
         'norm.weight': p['norm']['scale'], 'norm.bias': p['norm']['bias']}
  if model.class_token:
    out['cls_token'] = p['cls_token'][None]
  if model.num_registers:
    out['reg_token'] = p['register_tokens'][None]
  if not model.pre_norm:
    out['patch_embed.proj.bias'] = p['patch_embed']['bias']
  else:
    out |= {'norm_pre.weight': p['norm_pre']['scale'], 'norm_pre.bias': p['norm_pre']['bias']}
  if model.map_head:
    out |= _write_pool(p['attn_pool'])
  return out | state_dict.write_blocks(p['transformer']['blocks'])


def folded(model: ViT, params: Params) -> tuple[ViT, Params]:
  """The same network without a bias of patches: its positions are a learned table that holds the bias, with rows for
  the tokens before the patches."""
  p = state_dict.host(params)
  table, prefix = position_table(model, p), model.num_prefix_tokens
  if model.no_embed_class:
    table = np.concatenate([np.zeros((prefix, model.embed_dim), np.float32), table])
  patch = p['patch_embed']
  table = np.concatenate([table[:prefix], table[prefix:] + patch['bias']])
  p = p | {'pos_embed': table, 'patch_embed': patch | {'bias': np.zeros_like(patch['bias'])}}
  return model.clone(pos='learned', no_embed_class=False), p


def check_timm(model: ViT) -> None:
  """Raises a UserError where timm's VisionTransformer cannot hold the model."""
  if model.per_channel:
    raise UserError("format 'timm' holds a ViT, not one token a channel: export with --format channelvit")
  if len(model.image_size) != 2:
    raise UserError(f"format 'timm' holds 2D models, not image size {tuple(model.image_size)}: export with "
                    '--format jaxmed')
  if model.pos == 'rope':
    raise UserError("format 'timm' has no rotary positions (pos='rope'): export with --format jaxmed")


def from_timm(tensors: Mapping[str, np.ndarray], num_heads: int | None = None,
              image_size: tuple[int, ...] | None = None) -> tuple[ViT, Params]:
  """The model and parameters of a state dict of timm's VisionTransformer, all of it read off names and
  shapes.

  Prefixes such as 'module.' or 'teacher.backbone.' are stripped, the classifier is left out with a note.

  Args:
    num_heads: None for the registered size of this width and depth, else width // 64 (tiny, small, base,
      large agree).
    image_size: native size [H, W]; None for a square, for rotary positions of 14 patches.
  Raises:
    UserError: a tensor is missing, has another shape, or belongs to a model that this is not (q_norm,
      fc_norm, ...).
  """
  state = StateDict(tensors, 'timm')
  weight = state.take('patch_embed.proj.weight', -1, -1, -1, -1)
  dim, channels, *patch = weight.shape
  bare = 'norm_pre.weight' in state and 'patch_embed.proj.bias' not in state  # as of CLIP
  bias = np.zeros(dim, np.float32) if bare else state.take('patch_embed.proj.bias', dim)
  p: Params = {'patch_embed': {'kernel': weight.transpose(2, 3, 1, 0).reshape(-1, dim), 'bias': bias}}
  registers = 0
  class_token = 'cls_token' in state
  if class_token:
    p['cls_token'] = state.take('cls_token', 1, 1, dim)[0]
  if 'reg_token' in state:
    p['register_tokens'] = state.take('reg_token', 1, -1, dim)[0]
    registers = p['register_tokens'].shape[0]
  fields: dict[str, Any] = {'pos': 'none', 'no_embed_class': False}
  if 'pos_embed' in state:
    table = p['pos_embed'] = state.take('pos_embed', 1, -1, dim)[0]
    fields = {'pos': 'learned'} | _embedded_prefix(table, class_token, registers, tuple(patch), image_size)
  elif 'rope_embed.periods' in state:
    periods = state.take('rope_embed.periods', -1)
    num_heads = _heads_of(periods, dim, num_heads)
    fields |= {'pos': 'rope', 'rope_base': _base_of(periods), 'norm_epsilon': 1e-5}
    fields['image_size'] = tuple(image_size or (14 * n for n in patch))
  elif image_size is not None:
    fields['image_size'] = tuple(image_size)
  blocks, block_fields = state_dict.read_blocks(state, dim, num_heads)
  p['norm'] = {'scale': state.take('norm.weight', dim), 'bias': state.take('norm.bias', dim)}
  p['transformer'] = {'blocks': blocks}
  if 'norm_pre.weight' in state:
    p['norm_pre'] = {'scale': state.take('norm_pre.weight', dim), 'bias': state.take('norm_pre.bias', dim)}
  if 'attn_pool.latent' in state:
    p['attn_pool'] = _read_pool(state, dim, block_fields)
  state.finish()
  if 'image_size' not in fields:
    raise UserError('the weights have no pos_embed, which would tell the image size: pass --image-size')
  model = ViT(patch_size=tuple(patch), in_channels=channels, embed_dim=dim, class_token=class_token,
              num_registers=registers, pre_norm='norm_pre' in p, map_head='attn_pool' in p, **fields, **block_fields)
  return model, p


def _write_pool(pool: Params) -> dict[str, np.ndarray]:
  """The head of SigLIP as timm's AttentionPoolLatent."""
  out = {'latent': pool['probe'][None], 'norm.weight': pool['norm']['scale'], 'norm.bias': pool['norm']['bias']}
  for name, layer in (('q', pool['q']), ('kv', pool['kv']), ('proj', pool['proj']),
                      ('mlp.fc1', pool['mlp']['fc1']), ('mlp.fc2', pool['mlp']['fc2'])):
    kernel = layer['kernel']
    out |= {f'{name}.weight': kernel.reshape(kernel.shape[0], -1).T, f'{name}.bias': layer['bias'].reshape(-1)}
  return {f'attn_pool.{name}': value for name, value in out.items()}


def _read_pool(state: StateDict, dim: int, fields: Mapping[str, Any]) -> Params:
  """The inverse of `_write_pool`, for a head with the MLP's width and the heads of the blocks."""
  heads, hidden = fields['num_heads'], int(dim * fields['mlp_ratio'])

  def linear(name: str, size: int, *features: int) -> Params:
    weight = state.take(f'attn_pool.{name}.weight', int(np.prod(features)), size)
    return {'kernel': weight.T.reshape(size, *features),
            'bias': state.take(f'attn_pool.{name}.bias', int(np.prod(features))).reshape(features)}

  return {'probe': state.take('attn_pool.latent', 1, 1, dim)[0],
          'q': linear('q', dim, 1, heads, dim // heads), 'kv': linear('kv', dim, 2, heads, dim // heads),
          'proj': linear('proj', dim, dim),
          'norm': {'scale': state.take('attn_pool.norm.weight', dim), 'bias': state.take('attn_pool.norm.bias', dim)},
          'mlp': {'fc1': linear('mlp.fc1', dim, hidden), 'fc2': linear('mlp.fc2', hidden, dim)}}


def _heads_of(periods: np.ndarray, dim: int, num_heads: int | None) -> int:
  """The number of heads of rotary positions: each of the two axes has a quarter of a head's features as periods."""
  heads = dim // (4 * max(len(periods), 1))
  if 4 * len(periods) * heads != dim or num_heads not in (None, heads):
    raise UserError(f'rope_embed.periods has {len(periods)} periods, of {heads} heads in a width of {dim}: '
                    f'{"expected a quarter of the width of a head" if num_heads is None else "leave --num-heads out"}')
  return heads


def _base_of(periods: np.ndarray) -> float:
  """The base of rotary periods base**(i / N), i = 0 .. N - 1, which DINOv3 keeps in low precision.

  Raises:
    UserError: the periods follow another law, such as DINOv3's option of a least and a largest period.
  """
  count = len(periods)
  own = float(periods[-1]) ** (count / (count - 1)) if count > 1 and periods[-1] > 0 else 100.0
  for base in (100.0, own):  # 100 in all published models
    if np.allclose(periods, base ** (np.arange(count) / count), rtol=0.01):
      return base
  raise UserError(f'rope_embed.periods are {", ".join(f"{p:.4g}" for p in periods[:3])} ...: expected powers of one '
                  'base')


def position_table(model: ViT, params: Params) -> np.ndarray:
  """Positions as a learned table [N + embedded prefix, D]: fixed ones written out, absent ones zero."""
  if model.pos == 'learned':
    return params['pos_embed']
  grid = grid_of(model.image_size, model.patch_size)
  table = np.zeros((math.prod(grid), model.embed_dim), np.float32)
  if model.pos == 'sincos':
    table = positions.sincos(grid, model.embed_dim)
  prefix = 0 if model.no_embed_class else model.num_prefix_tokens
  return np.concatenate([np.zeros((prefix, model.embed_dim), np.float32), table])


def _embedded_prefix(table: np.ndarray, class_token: bool, registers: int, patch: tuple[int, ...],
                     image_size: tuple[int, ...] | None) -> dict[str, Any]:
  """Whether a table [rows, D] has rows for the prefix tokens, and the image size that is left.

  A square of patches alone may as well be n x (n + 2) patches and a class token, which only the image size tells. With
  registers a square of patches is meant, as timm's models with registers have it, unless the table has their rows.
  """
  rows, prefix = len(table), class_token + registers
  fits: list[dict[str, Any]] = []
  for no_embed_class in (False, True) if prefix else (False,):
    count = rows if no_embed_class else rows - prefix
    try:
      size = state_dict.infer_size('pos_embed', count, patch, image_size)
    except UserError:
      continue
    fits.append({'no_embed_class': no_embed_class, 'image_size': size})
  square = len(fits) == 1 and fits[0]['no_embed_class'] and image_size is None
  zeros = registers and not table[int(class_token):prefix].any()  # as DINOv2's table is read, see `aliases`
  if square and (zeros or (class_token and not registers)):
    side = math.isqrt(rows)
    likely = ((side - 1, side + 1), (side + 1, side - 1)) if not registers else ()
    words = [f'--image-size {a * patch[0]} {b * patch[1]}' for a, b in (*likely, (side, side))]
    raise UserError(f'pos_embed has {rows} rows: positions of {side} x {side} patches, or of other patches and '
                    f'{prefix} tokens before them: pass --image-size, such as {", ".join(words)}')
  if not fits:
    state_dict.infer_size('pos_embed', rows - prefix, patch, image_size)  # raises
  if len(fits) > 1:
    sizes = ' or '.join('x'.join(map(str, f['image_size'])) for f in fits)
    raise UserError(f'pos_embed has {rows} rows, which fits more than one image size: pass --image-size '
                    f'{sizes}')
  return fits[0]


def _convolution(kernel: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
  """[ph * pw * C, D] -> [D, C, ph, pw]."""
  return kernel.reshape(*patch, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)
