"""Encoders of Swin UNETR and ViT <-> MONAI's classes (MONAI 1.6), by tensor names and shapes alone.

Axes keep their order: what MONAI reads as (X, Y, Z) goes in as an array [X, Y, Z, C]. No tensor tells in which order a
SwinUNETR merges places, so each order is a format of its own. Read models have MONAI's bias of small windows and its
padding, see `encoders.swin`; others cannot be written.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.state_dict import Params, StateDict, shapes_of
from jaxmed.interop.timm import position_table
from jaxmed.models.encoders.swin import SwinUNETR
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers import windows
from jaxmed.models.layers.tokens import grid_of

logger = logging.getLogger('jaxmed.interop')

EPSILON = 1e-5  # of MONAI's layer norms
MERGINGS = {'monai_swinunetr': 'corrected', 'monai_swinunetr_legacy': 'legacy', 'monai_swinunetr_mergingv2': 'v2'}
SWIN_ANCHOR, VIT_ANCHOR = 'layers1.0.blocks.0.norm1.weight', 'patch_embedding.position_embeddings'
_PATCHES = 'patch_embedding.patch_embeddings.weight'
_INDEX = 'attn.relative_position_index'
_LINEAR = ('qkv', 'proj', 'fc1', 'fc2')
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias_table': 'relative_position_bias_table'}

# Patterns of our modules' paths, from what MONAI counts their first number, and its names, tried in turn; '#' is the
# block's number.
Patterns = tuple[tuple[str, int, str], ...]
_SWIN: Patterns = (
    (r'stem_conv', 0, 'patch_embed.proj'), (r'stem_norm', 0, 'patch_embed.norm'),
    (r'conv(\d+)/(conv\d)', 1, 'layers{}c.0.layer.{}.conv'),
    (r'down(\d+)_(norm|reduction)', 1, 'layers{}.0.downsample.{}'),
    (r'stage(\d+)/blocks/(norm\d|attn)', 1, 'layers{}.0.blocks.#.{}'),
    (r'stage(\d+)/blocks/attn/(\w+)', 1, 'layers{}.0.blocks.#.attn.{}'),
    (r'stage(\d+)/blocks/fc(\d)', 1, 'layers{}.0.blocks.#.mlp.linear{}'),
)


def _named(patterns: Patterns, path: str) -> str:
  """MONAI's name of our parameter."""
  module, _, leaf = path.rpartition('/')
  for pattern, start, name in patterns:
    match = re.fullmatch(pattern, module)
    if match:
      first, *rest = match.groups() or ('',)
      first = str(int(first) + start) if first.isdigit() else first
      return f'{name.format(first, *rest)}.{_LEAVES.get(leaf, leaf)}'
  raise UserError(f'parameter {path!r} has no place in a network of MONAI')


def _kind(path: str) -> str:
  """What a parameter is: 'linear', 'transposed' or 'conv' kernel, a 1x1 convolution written as 'dense', or 'vector'."""
  *_, module, leaf = ('', *path.split('/'))
  if leaf != 'kernel':
    return 'vector'
  if module in _LINEAR or module.endswith('_reduction'):
    return 'linear'
  return 'dense' if module.startswith('out') else 'transposed' if re.fullmatch(r'up|skip\d+_up\d*', module) else 'conv'


def _outward(path: str, value: np.ndarray, rank: int) -> np.ndarray:
  kind = _kind(path)
  if kind in ('linear', 'dense'):
    weight = value.reshape(value.shape[0], -1).T
    return weight.reshape(*weight.shape, *(1,) * rank) if kind == 'dense' else weight
  if kind == 'vector':
    return value if path.endswith('bias_table') else value.reshape(-1)
  return np.moveaxis(value, (-2, -1) if kind == 'transposed' else (-1, -2), (0, 1))


def _inward(state: StateDict, name: str, path: str, shape: tuple[int, ...], rank: int) -> np.ndarray:
  """The inverse of `_outward`: takes the tensor out of the state."""
  kind = _kind(path)
  if kind in ('linear', 'dense'):
    ones = (1,) * rank if kind == 'dense' else ()
    weight = state.take(name, int(np.prod(shape[1:])), shape[0], *ones)
    return weight.reshape(-1, shape[0]).T.reshape(shape)
  if kind == 'vector':
    return state.take(name, *(shape if path.endswith('bias_table') else (int(np.prod(shape)),))).reshape(shape)
  turned = (shape[-2:] if kind == 'transposed' else shape[:-3:-1]) + shape[:-2]
  return np.moveaxis(state.take(name, *turned), (0, 1), (-2, -1) if kind == 'transposed' else (-1, -2))


def write(patterns: Patterns, params: Params, rank: int) -> dict[str, np.ndarray]:
  """The tensors of a module with `rank` axes by MONAI's names."""
  out = {}
  for path, value in flax.traverse_util.flatten_dict(state_dict.host(params), sep='/').items():
    name = _named(patterns, path)
    for i, part in enumerate(value) if '#' in name else [(0, value)]:
      out[name.replace('#', str(i))] = _outward(path, part, rank)
  return out


def read(patterns: Patterns, shapes: Mapping[str, tuple[int, ...]], state: StateDict, rank: int) -> Params:
  """The inverse of `write`, of parameters with these `shapes` by their paths: takes the tensors out of the state."""
  flat = {}
  for path, shape in shapes.items():
    name = _named(patterns, path)
    flat[path] = _inward(state, name, path, shape, rank) if '#' not in name else np.stack(
        [_inward(state, name.replace('#', str(i)), path, shape[1:], rank) for i in range(shape[0])])
  return flax.traverse_util.unflatten_dict(flat, sep='/')


# Swin UNETR


def to_swinunetr(model: SwinUNETR, params: Params, merging: str = 'corrected') -> dict[str, np.ndarray]:
  """The tensors `swinViT.*` of MONAI's SwinUNETR with the same maps, its index of positions included.

  Raises:
    UserError: another family, or options that MONAI's class does not have.
  """
  check_swinunetr(model, merging)
  rank = len(model.image_size)
  out = write(_SWIN, params, rank)
  index = windows.bias_rows((model.window_size,) * rank, model.window_size).astype(np.float32)
  for i, depth in enumerate(model.depths, 1):
    out |= {f'layers{i}.0.blocks.{j}.{_INDEX}': index for j in range(depth)}
  return {f'swinViT.{name}': value for name, value in out.items()}


def check_swinunetr(model: Any, merging: str) -> None:
  """Raises a UserError where MONAI's SwinUNETR with that order of merging cannot hold the model."""
  if not isinstance(model, SwinUNETR):
    raise UserError(f"the formats {', '.join(MERGINGS)} hold a swin_unetr, not {type(model).__name__}: export with "
                    '--format jaxmed')
  if len(model.depths) != 4 or any(d != model.dims[0] * 2**i for i, d in enumerate(model.dims)):
    raise UserError(f'MONAI has four stages whose width doubles, not dims {model.dims}: export with --format jaxmed')
  if model.bias_slice != 'monai' or model.pad_mask:
    raise UserError('MONAI computes windows on small maps and at borders otherwise: the model would need '
                    'encoder.bias_slice=monai and encoder.pad_mask=False; export with --format jaxmed')
  if model.merging != merging and len(model.image_size) == 3:
    fits = next(name for name, order in MERGINGS.items() if order == model.merging)
    raise UserError(f'the model has encoder.merging={model.merging}: export with --format {fits}')


def from_swinunetr(tensors: Mapping[str, np.ndarray], num_heads: Any = None, image_size: tuple[int, ...] | None = None,
                   merging: str = 'corrected') -> tuple[SwinUNETR, Params]:
  """The encoder of a state dict of MONAI's SwinUNETR, or of its pretraining; other tensors are left out with a note.

  Names of older files are understood: `swin_vit.`, `mlp.fc1`, `module.`.

  Args:
    num_heads: not needed, the tensors tell. image_size: native size; None for three times the total stride.
  Raises:
    UserError: a tensor is missing or has another shape.
  """
  if isinstance(num_heads, int):
    raise UserError(f'--num-heads {num_heads} is for a ViT: the tables of a Swin tell its heads, leave the option out')
  state = StateDict(swin_names(tensors), 'monai_swinunetr', SWIN_ANCHOR)
  outside = [k for k in state.tensors if not re.match(r'patch_embed\.|layers\d', k) or k.endswith(_INDEX)]
  for name in outside:
    del state.tensors[name]
  heads = [name for name in outside if not name.endswith(_INDEX)]
  if heads:
    logger.warning('left out %d tensors that no map depends on: %s', len(heads), ', '.join(sorted(heads)[:3]))
  fields = _swin_fields(state)
  rank = len(state.shape('patch_embed.proj.weight')) - 2
  stride = fields['stem_patch'] * 2 ** len(fields['depths'])
  model = SwinUNETR(image_size=tuple(image_size or (3 * stride,) * rank), merging=merging, bias_slice='monai',
                    pad_mask=False, **fields)
  params = read(_SWIN, shapes_of(model), state, rank)
  state.finish('an encoder of Swin UNETR')
  return model, params


def swin_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors by the names of MONAI's class, which older releases and pretraining scripts call otherwise."""
  out = {}
  for name, value in tensors.items():
    name = re.sub(r'(^|\.)swin_vit\.', r'\1swinViT.', name)
    name = re.sub(r'\.mlp\.fc(\d)\.', r'.mlp.linear\1.', name)
    out[re.sub(r'(^|\.)(layers\d)\.0\.0\.', r'\1\2.0.', name)] = value
  return out


def _swin_fields(state: StateDict) -> dict[str, Any]:
  """Fields of the encoder, from the tensors."""
  depths, dims, heads = [], [], []
  for i in range(1, 5):
    depth = 0
    while f'layers{i}.0.blocks.{depth}.norm1.weight' in state:
      depth += 1
    depths.append(depth)
    dims.append(state.shape(f'layers{i}.0.blocks.0.norm1.weight')[0])
    table = state.shape(f'layers{i}.0.blocks.0.attn.relative_position_bias_table')
    heads.append(table[1])
  patch = state.shape('patch_embed.proj.weight')
  hidden = state.shape('layers1.0.blocks.0.mlp.linear1.weight')[0]
  return {'depths': tuple(depths), 'dims': tuple(dims), 'num_heads': tuple(heads), 'in_channels': patch[1],
          'stem_patch': patch[2], 'window_size': (round(table[0] ** (1 / (len(patch) - 2))) + 1) // 2,
          'mlp_ratio': state_dict.ratio_of(hidden, dims[0]),
          'qkv_bias': 'layers1.0.blocks.0.attn.qkv.bias' in state, 'patch_norm': 'patch_embed.norm.weight' in state,
          'use_v2': 'layers1c.0.layer.conv1.conv.weight' in state}


# ViT


def to_vit(model: ViT, params: Params) -> dict[str, np.ndarray]:
  """The state dict of MONAI's ViT with the same features; of a UNETR it is the part `vit`.

  Raises:
    UserError: a model that the class cannot hold.
  """
  check_vit(model)
  model, params = without_embedded_class(model, params)
  p = state_dict.host(params)
  kernel = p['patch_embed']['kernel'].reshape(*model.patch_size, -1, model.embed_dim)
  out = {_PATCHES: np.moveaxis(kernel, (-1, -2), (0, 1)),
         'patch_embedding.patch_embeddings.bias': p['patch_embed']['bias'],
         VIT_ANCHOR: position_table(model, p)[None],
         'norm.weight': p['norm']['scale'], 'norm.bias': p['norm']['bias']}
  if model.class_token:
    out['cls_token'] = p['cls_token'][None]
  for name, value in state_dict.write_blocks(p['transformer']['blocks']).items():
    out[_block_name(name)] = value
  ones, zeros = np.ones(model.embed_dim, np.float32), np.zeros(model.embed_dim, np.float32)
  for i in range(model.depth):  # which MONAI's class has and does not use
    out |= {f'blocks.{i}.norm_cross_attn.weight': ones, f'blocks.{i}.norm_cross_attn.bias': zeros}
  return out


def without_embedded_class(model: ViT, params: Params) -> tuple[ViT, Params]:
  """The same model with the position of its class token as a part of that: MONAI's table is of patches alone."""
  if model.no_embed_class or not model.class_token:
    return model, params
  p = dict(state_dict.host(params))
  if model.pos == 'learned':
    p |= {'cls_token': p['cls_token'] + p['pos_embed'][:1], 'pos_embed': p['pos_embed'][1:]}
  return model.clone(no_embed_class=True), p


def _block_name(name: str, back: bool = False) -> str:
  for ours, theirs in (('attn.proj.', 'attn.out_proj.'), ('mlp.fc1.', 'mlp.linear1.'), ('mlp.fc2.', 'mlp.linear2.')):
    name = name.replace(theirs, ours) if back else name.replace(ours, theirs)
  return name


def check_vit(model: Any) -> None:
  """Raises a UserError where MONAI's ViT cannot hold the model."""
  if not isinstance(model, ViT) or model.per_channel:
    raise UserError(f"format 'monai_vit' holds a vit, not {type(model).__name__}: export with --format jaxmed")
  lacks = {'rotary positions': model.pos == 'rope', 'registers': model.num_registers, 'LayerScale': model.layer_scale,
           f'encoder.mlp={model.mlp}': model.mlp != 'gelu', 'encoder.pre_norm': model.pre_norm,
           'encoder.map_head': model.map_head}
  for what, there in lacks.items():
    if there:
      raise UserError(f"format 'monai_vit' has no {what}: export with --format jaxmed")


def from_vit(tensors: Mapping[str, np.ndarray], num_heads: int | None = None,
             image_size: tuple[int, ...] | None = None) -> tuple[ViT, Params]:
  """The ViT of a state dict of MONAI's ViT, ViTAutoEnc or UNETR; other tensors are left out with a note.

  Args:
    num_heads: None for the registered size of this width and depth, else width // 64.
    image_size: native size; None for equal sides.
  Raises:
    UserError: a tensor is missing or has another shape, or the sides do not follow from the positions.
  """
  unused = re.compile(r'(^|\.)blocks\.\d+\.(norm_cross_attn|cross_attn)\.|classification_head')
  named = {_block_name(k, True): v for k, v in tensors.items() if not unused.search(k)}
  state = StateDict(named, 'monai_vit', VIT_ANCHOR)
  if _PATCHES not in state:
    raise UserError('the patch embedding is no convolution: expected a ViT of MONAI with proj_type=conv')
  weight = state.take(_PATCHES, *(-1,) * len(state.shape(_PATCHES)))
  dim, channels, *patch = weight.shape
  table = state.take(VIT_ANCHOR, 1, -1, dim)[0]
  p: Params = {'patch_embed': {'kernel': np.moveaxis(weight, (0, 1), (-1, -2)).reshape(-1, dim),
                               'bias': state.take('patch_embedding.patch_embeddings.bias', dim)}, 'pos_embed': table}
  class_token = 'cls_token' in state
  if class_token:
    p['cls_token'] = state.take('cls_token', 1, 1, dim)[0]
  blocks, fields = state_dict.read_blocks(state, dim, num_heads)
  p |= {'norm': {'scale': state.take('norm.weight', dim), 'bias': state.take('norm.bias', dim)},
        'transformer': {'blocks': blocks}}
  for name in [k for k in state.tensors if not k.startswith('blocks.')]:  # what follows a ViT that has no prefix
    logger.warning('left out %s', name)
    del state.tensors[name]
  state.finish()
  size = image_size or _sides(len(table), tuple(patch))
  if len(size) != len(patch) or int(np.prod(grid_of(size, tuple(patch)))) != len(table):
    raise UserError(f'the weights have {len(table)} positions, which image size {size} with patches of {tuple(patch)} '
                    'does not have')
  return ViT(image_size=tuple(size), patch_size=tuple(patch), in_channels=channels, embed_dim=dim, pos='learned',
             class_token=class_token, no_embed_class=True, norm_epsilon=EPSILON, **fields), p


def _sides(count: int, patch: tuple[int, ...]) -> tuple[int, ...]:
  side = round(count ** (1 / len(patch)))
  if side ** len(patch) != count:
    raise UserError(f'the weights have {count} positions, not those of equal sides: pass --image-size')
  return tuple(side * p for p in patch)


# What a card says


def snippet(fmt: str, model: Any, file: str) -> str:
  """Python that makes MONAI's class from the exported file: `encoder`, in evaluation mode, each tensor in its place."""
  rank, tensors = len(model.image_size), f'safetensors.torch.load_file({file!r})'
  common = f'spatial_dims={rank}, qkv_bias={model.qkv_bias}'
  load = f"encoder.load_state_dict({{k.removeprefix('swinViT.'): v for k, v in {tensors}.items()}})\nencoder.eval()\n"
  if fmt in MERGINGS:
    release = {'monai_swinunetr': '1.5 or later', 'monai_swinunetr_legacy': 'before 1.5'}.get(fmt, 'any release')
    down = 'mergingv2' if fmt.endswith('v2') else 'merging'
    return (f'import safetensors.torch, torch\n'
            f'from monai.networks.nets.swin_unetr import SwinTransformer  # {release}\nencoder = SwinTransformer(\n'
            f'    in_chans={model.in_channels}, embed_dim={model.dims[0]}, '
            f'window_size={(model.window_size,) * rank}, patch_size={(model.stem_patch,) * rank},\n'
            f'    depths={model.depths}, num_heads={model.num_heads}, mlp_ratio={model.mlp_ratio!r}, '
            f'patch_norm={model.patch_norm},\n    use_v2={model.use_v2}, downsample={down!r}, {common})\n{load}')
  head = 'encoder.classification_head = torch.nn.Identity()\n' if model.class_token else ''
  hidden = int(model.embed_dim * model.mlp_ratio)
  return (f'import safetensors.torch, torch\nfrom monai.networks.nets.vit import ViT\nencoder = ViT(\n'
          f'    in_channels={model.in_channels}, img_size={tuple(model.image_size)}, '
          f'patch_size={tuple(model.patch_size)}, hidden_size={model.embed_dim},\n    mlp_dim={hidden}, '
          f'num_layers={model.depth}, num_heads={model.num_heads}, classification={model.class_token}, {common})\n'
          f'{head}{load}')


def call_lines(fmt: str, model: Any) -> str:
  """What the class of `snippet` takes and returns."""
  takes = f'`encoder(images)` takes float32 images [B, {model.in_channels}, *size], normalised as below, and returns '
  if fmt in MERGINGS:
    return (takes + f'five maps from [B, {model.dims[0]}, *size / {model.stem_patch}] to [B, {model.embed_dim}, '
            f'*size / {model.patch_size[0]}]. In a SwinUNETR it is `swinViT`.')
  what = 'the class token' if model.class_token else f'patches [B, N, {model.embed_dim}] after the final norm'
  return takes + f'{what}, and a list of the outputs of blocks. In a UNETR it is `vit`.'
