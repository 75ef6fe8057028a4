"""Convolutional and hierarchical encoders <-> timm's classes (timm 1.0.31), by tensor names and shapes alone.

One table a family names timm's module for each of ours; what a tensor is there follows from that: a convolution
[O, I, *k] (ours [*k, I, O]), a linear layer [O, I] (ours [I, *O]), in some stages as a 1x1 convolution, or a vector.
timm keeps the count of batches of each batch norm, which changes no feature: zero is written.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.state_dict import Params, StateDict, shapes_of
from jaxmed.models.encoders import convnext, metaformer, pvt, resnet, swin
from jaxmed.models.layers.convolution import Hierarchical

_LINEAR = ('fc1', 'fc2', 'pwconv1', 'pwconv2', 'qkv', 'q', 'kv', 'proj', *(f'down{i}_reduction' for i in range(1, 4)))
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var',
           'bias_table': 'relative_position_bias_table'}
COUNT = 'num_batches_tracked'
_BUFFERS = (COUNT, 'relative_position_index', 'attn_mask')  # which follow from the rest


@dataclasses.dataclass(frozen=True)
class Family:
  """One of timm's classes.

  Attributes:
    anchor: a tensor that the class alone has; what comes before it in a file is a prefix.
    names: patterns of our modules' paths and timm's, tried in turn; '#' is the block's number.
    fields: the model's fields, from the tensors.
    untold: fields that change features and that no tensor tells.
    snippet: (model, arguments common to all) -> the expression that makes timm's class, and lines that change its stem.
  """

  anchor: str
  names: tuple[tuple[str, str], ...]
  fields: Callable[[StateDict, Any], dict[str, Any]]
  untold: tuple[str, ...]
  snippet: Callable[[Any, str], tuple[str, str]]


def to_timm(model: Hierarchical, params: Params) -> dict[str, np.ndarray]:
  """The state dict of the timm class with the same features, strict and without classifier.

  Raises:
    UserError: the class cannot hold the model (three axes, other than four stages).
  """
  check_timm(model)
  flat = flax.traverse_util.flatten_dict(state_dict.host(params), sep='/')
  out = {}
  for path, value in flat.items():
    name = timm_name(model, path)
    for i, part in enumerate(value) if '#' in name else [(0, value)]:
      out[name.replace('#', str(i))] = _outward(path, part, _pointwise(model, path))
  means = [name for name in out if name.endswith('running_mean')]
  return out | {name.replace('running_mean', COUNT): np.zeros((), np.float32) for name in means}


def check_timm(model: Hierarchical) -> None:
  """Raises a UserError where timm's class cannot hold the model."""
  if len(model.image_size) != 2:
    raise UserError(f"format 'timm' holds 2D models, not image size {tuple(model.image_size)}: export with "
                    '--format jaxmed')
  if len(model.depths) != 4:
    raise UserError(f"format 'timm' holds four stages, not depths {model.depths}: export with --format jaxmed")
  if isinstance(model, swin.Swin):
    _check_swin(model)
  if isinstance(model, metaformer.CAFormer) and len(set(model.dims)) < len(model.dims):
    raise UserError(f"format 'timm' shrinks the map only where dims change, not {model.dims}: export with "
                    '--format jaxmed')


def _check_swin(model: swin.Swin) -> None:
  grids = [[n // (model.stem_patch * 2**i) for n in model.image_size] for i in range(4)]
  if type(model) not in FAMILIES or any(d != model.dims[0] * 2**i for i, d in enumerate(model.dims)):
    raise UserError(f"format 'timm' holds a swin whose width doubles at each stage, not {type(model).__name__} of "
                    f'{model.dims}: export with --format jaxmed')
  if any(n % model.window_size for grid in grids for n in grid):
    raise UserError(f"format 'timm' has smaller tables and other borders where windows of {model.window_size} do not "
                    f'divide the maps {grids}: export with --format jaxmed')


def from_timm(tensors: Mapping[str, np.ndarray], num_heads: Any = None,
              image_size: tuple[int, ...] | None = None) -> tuple[Hierarchical, Params]:
  """The model and parameters of a state dict of one of timm's classes, all of it read off names and shapes.

  Prefixes such as 'module.' or 'teacher.backbone.' are stripped, the classifier is left out with a note.

  Args:
    num_heads: heads of each stage (PVT); None for those of the registered size.
    image_size: native size; None for seven times the total stride, as no tensor tells it.
  Raises:
    UserError: a tensor is missing, has another shape, or belongs to a model that this is not.
  """
  kind = family_of(tensors)
  if kind is None:
    raise UserError('not weights in the timm layout: no tensor of a known family')
  family = FAMILIES[kind]
  plain = {k: v for k, v in tensors.items() if not k.endswith(_BUFFERS)}
  state = StateDict(plain, 'timm', family.anchor)
  model = kind(**family.fields(state, num_heads))
  model = model.clone(image_size=image_size or tuple(7 * n for n in model.patch_size))
  flat = {}
  for path, shape in shapes_of(model).items():
    name = timm_name(model, path)
    if '#' in name:
      flat[path] = np.stack([_inward(state, name.replace('#', str(i)), path, shape[1:]) for i in range(shape[0])])
    else:
      flat[path] = _inward(state, name, path, shape)
  state.finish(f'a plain {kind.__name__}')
  return model, flax.traverse_util.unflatten_dict(flat, sep='/')


def with_untold(model: Hierarchical, read: Hierarchical) -> Hierarchical:
  """A model read from tensors, with the fields of the exported one that no tensor tells."""
  untold = FAMILIES[type(model)].untold if type(model) in FAMILIES else ()
  return read.clone(**{name: getattr(model, name) for name in untold})


def family_of(tensors: Mapping[str, Any]) -> type[Hierarchical] | None:
  """The family whose anchor is among the tensors' names, or None."""
  for kind, family in FAMILIES.items():
    if any(name == family.anchor or name.endswith('.' + family.anchor) for name in tensors):
      return kind
  return None


def timm_name(model: Hierarchical, path: str) -> str:
  """timm's name of our parameter, as 'stages.0.blocks.#.norm.weight'."""
  module, _, leaf = path.rpartition('/')
  if leaf.startswith('res_scale'):
    module, leaf = path, 'scale'
  elif not module.endswith('act'):
    leaf = _LEAVES.get(leaf, leaf)
  for pattern, name in FAMILIES[type(model)].names:
    match = re.fullmatch(pattern, module)
    if match:
      return f'{name.format(*match.groups())}.{leaf}'
  raise UserError(f'parameter {path!r} has no place in format timm')


def _module(path: str) -> str:
  return path.split('/')[-2] if '/' in path else path


def _outward(path: str, value: np.ndarray, pointwise: bool) -> np.ndarray:
  if not path.endswith('/kernel'):
    return value if path.endswith('bias_table') else value.reshape(-1)
  if _module(path) in _LINEAR:
    weight = value.reshape(value.shape[0], -1).T
    return weight[:, :, None, None] if pointwise else weight
  return np.moveaxis(value, (-1, -2), (0, 1))


def _inward(state: StateDict, name: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """The inverse of `_outward`; rank distinguishes linear layers from 1x1 convolutions."""
  if path.endswith('bias_table'):
    return state.take(name, *shape)
  if not path.endswith('/kernel'):
    return state.take(name, math.prod(shape)).reshape(shape)
  if _module(path) not in _LINEAR:
    weight = state.take(name, shape[-1], shape[-2], *shape[:-2])
    return np.moveaxis(weight, (0, 1), (-1, -2))
  ones = (1, 1) if len(state.shape(name)) == 4 else ()
  return state.take(name, math.prod(shape[1:]), shape[0], *ones).reshape(-1, shape[0]).T.reshape(shape)


def _pointwise(model: Hierarchical, path: str) -> bool:
  """Whether timm has this linear layer as a 1x1 convolution: in small ConvNeXts, and where CAFormer does not attend."""
  if isinstance(model, convnext.ConvNeXt):
    return _registered(model, convnext.SIZES, 'depths', 'dims') in _CONV_MLP
  return isinstance(model, metaformer.CAFormer) and path.startswith(('stage0', 'stage1'))


_CONV_MLP = ('convnextv2_atto', 'convnextv2_femto', 'convnextv2_pico', 'convnextv2_nano')


def _registered(model: Any, sizes: Mapping[str, Mapping[str, Any]], *keys: str) -> str | None:
  """timm's name of a model with these fields, or None."""
  for name, fields in sizes.items():
    wanted = {f.name: f.default for f in dataclasses.fields(type(model))} | dict(fields)
    if not name.endswith('_micro') and all(getattr(model, key) == wanted[key] for key in keys):
      return name
  return None


def _blocks(state: StateDict, anchors: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(depths, dims) of stages whose blocks have a tensor named as in anchors, '#' for the number; dim is its length."""
  depths, dims = [], []
  for anchor in anchors:
    depth = 0
    while anchor.replace('#', str(depth)) in state:
      depth += 1
    if not depth:
      raise UserError(f'not weights in the {state.layout} layout: tensor {anchor.replace("#", "0")!r} is missing')
    depths.append(depth)
    dims.append(state.shape(anchor.replace('#', '0'))[0])
  return tuple(depths), tuple(dims)


def _stages(state: StateDict, tensor: str, stem: str) -> dict[str, Any]:
  depths, dims = _blocks(state, [f'stages.{i}.blocks.#.{tensor}' for i in range(4)])
  return {'depths': depths, 'dims': dims, 'in_channels': state.shape(stem)[1]}


def _convnext_fields(state: StateDict, num_heads: Any) -> dict[str, Any]:
  del num_heads
  stem = 'stem.0.weight'
  return _stages(state, 'norm.weight', stem) | {'stem_patch': state.shape(stem)[-1]}


def _resnet_fields(state: StateDict, num_heads: Any) -> dict[str, Any]:
  del num_heads
  depths, dims = _blocks(state, [f'layer{i}.#.bn1.weight' for i in range(1, 5)])
  width, channels, kernel, _ = state.shape('conv1.weight')
  fields = {'depths': depths, 'dims': dims, 'bottleneck': 'layer1.0.conv3.weight' in state, 'in_channels': channels,
            'stem_width': width, 'stem_kernel': kernel, 'stem_stride': 2 if kernel == 7 else 1, 'max_pool': kernel == 7}
  if not fields['bottleneck']:
    return fields
  last, (inner, own, *_) = state.shape('layer1.0.conv3.weight')[0] // 4, state.shape('layer1.0.conv2.weight')
  wide = tuple(n * last // inner for n in dims)  # `dims` are those of the first norm, which a ResNeXt widens
  return fields | {'dims': wide, 'cardinality': inner // own, 'base_width': own * 64 // last}


def _caformer_fields(state: StateDict, num_heads: Any) -> dict[str, Any]:
  del num_heads
  stem = 'stem.conv.weight'
  return _stages(state, 'norm1.weight', stem) | _stem(state.shape(stem)[-1])


def _pvt_fields(state: StateDict, num_heads: Any) -> dict[str, Any]:
  stem = 'patch_embed.proj.weight'
  fields = _stages(state, 'norm1.weight', stem) | _stem(state.shape(stem)[-1])
  at = lambda i, name: f'stages.{i}.blocks.0.{name}.weight'
  known = [s for s in pvt.SIZES.values() if (s['depths'], s['dims']) == (fields['depths'], fields['dims'])]
  if isinstance(num_heads, int):
    raise UserError(f'--num-heads {num_heads} is for a ViT: a PVT v2 has a number for each stage, leave the option out')
  heads = num_heads or (known[0].get('num_heads') if known else None) or pvt.PVT.num_heads
  return fields | {
      'num_heads': tuple(heads),
      'reductions': tuple(state.shape(at(i, 'attn.sr'))[-1] if at(i, 'attn.sr') in state else 1 for i in range(4)),
      'mlp_ratios': tuple(state.shape(at(i, 'mlp.fc1'))[0] // fields['dims'][i] for i in range(4))}


def _swin_fields(state: StateDict, num_heads: Any) -> dict[str, Any]:
  if isinstance(num_heads, int):
    raise UserError(f'--num-heads {num_heads} is for a ViT: the tables of a Swin tell its heads, leave the option out')
  depths, dims = _blocks(state, [f'layers.{i}.blocks.#.norm1.weight' for i in range(4)])
  tables = [state.shape(f'layers.{i}.blocks.0.attn.relative_position_bias_table') for i in range(4)]
  if len({rows for rows, _ in tables}) > 1:
    raise UserError('the stages have windows of several sizes: expected a Swin whose windows divide all of its maps')
  _, channels, patch, _ = state.shape('patch_embed.proj.weight')
  hidden = state.shape('layers.0.blocks.0.mlp.fc1.weight')[0]
  return {'depths': depths, 'dims': dims, 'num_heads': tuple(heads for _, heads in tables), 'in_channels': channels,
          'stem_patch': patch, 'window_size': (math.isqrt(tables[0][0]) + 1) // 2,
          'mlp_ratio': state_dict.ratio_of(hidden, dims[0]), 'qkv_bias': 'layers.0.blocks.0.attn.qkv.bias' in state}


def _stem(kernel: int) -> dict[str, int]:
  """timm's strided stem, or the one for small images."""
  return {'stem_kernel': kernel, 'stem_stride': 4 if kernel == 7 else 2}


def _convnext_snippet(model: convnext.ConvNeXt, common: str) -> tuple[str, str]:
  name = _registered(model, convnext.SIZES, 'depths', 'dims')
  sizes = '' if name else f', depths={model.depths}, dims={model.dims}'
  patch = model.stem_patch
  stem = '' if patch == 4 else (
      f'encoder.stem[0] = torch.nn.Conv2d({model.in_channels}, {model.dims[0]}, {patch}, stride={patch})\n')
  return f"timm.create_model('{name or 'convnextv2_tiny'}', {common}{sizes})", stem


def _resnet_snippet(model: resnet.ResNet, common: str) -> tuple[str, str]:
  name = _registered(model, resnet.SIZES, 'depths', 'dims', 'bottleneck', 'cardinality', 'base_width')
  sizes = '' if name else f', layers={model.depths}, channels={model.dims}'
  if not name and model.cardinality > 1:
    sizes += f', cardinality={model.cardinality}, base_width={model.base_width}'
  stem, width = '', model.stem_width
  if width != 64:  # the deep stem has any width; its convolutions are replaced
    sizes += f", stem_type='deep', stem_width={width // 2}"
  if (width, model.stem_kernel, model.stem_stride) != (64, 7, 2):
    stem += (f'encoder.conv1 = torch.nn.Conv2d({model.in_channels}, {width}, {model.stem_kernel}, '
             f'{model.stem_stride}, {model.stem_kernel // 2}, bias=False)\n')
  if not model.max_pool:
    stem += 'encoder.maxpool = torch.nn.Identity()\n'
  return f"timm.create_model('{name or ('resnet50' if model.bottleneck else 'resnet18')}', {common}{sizes})", stem


def _caformer_snippet(model: metaformer.CAFormer, common: str) -> tuple[str, str]:
  name = _registered(model, metaformer.SIZES, 'depths', 'dims')
  if name:
    make = f"timm.create_model('{name}', {common})"
  else:
    make = (f'timm.models.metaformer.MetaFormer(\n    {common}, depths={model.depths}, dims={model.dims},\n'
            '    token_mixers=[timm.models.metaformer.SepConv] * 2 + [timm.models.metaformer.Attention] * 2,\n'
            '    norm_layers=[timm.models.metaformer.LayerNorm2dNoBias] * 2 + '
            '[timm.models.metaformer.LayerNormNoBias] * 2)')
  return make, _strided_stem(model, 'stem.conv', model.around)


def _pvt_snippet(model: pvt.PVT, common: str) -> tuple[str, str]:
  name = _registered(model, pvt.SIZES, 'depths', 'dims', 'num_heads', 'reductions', 'mlp_ratios')
  sizes = '' if name else (f',\n    depths={model.depths}, embed_dims={model.dims}, num_heads={model.num_heads}, '
                           f'sr_ratios={model.reductions}, mlp_ratios={model.mlp_ratios}')
  return (f"timm.create_model('{name or 'pvt_v2_b2'}', {common}{sizes})",
          _strided_stem(model, 'patch_embed.proj', model.stem_kernel // 2))


def _swin_snippet(model: swin.Swin, common: str) -> tuple[str, str]:
  return (f'timm.models.swin_transformer.SwinTransformer(\n    {common}, img_size={tuple(model.image_size)}, '
          f'patch_size={model.stem_patch}, embed_dim={model.dims[0]},\n    depths={model.depths}, '
          f'num_heads={model.num_heads}, window_size={model.window_size}, mlp_ratio={model.mlp_ratio!r}, '
          f'qkv_bias={model.qkv_bias})', '')


def _strided_stem(model: Any, name: str, padding: int) -> str:
  if (model.stem_kernel, model.stem_stride) == (7, 4):
    return ''
  return (f'encoder.{name} = torch.nn.Conv2d({model.in_channels}, {model.dims[0]}, {model.stem_kernel}, '
          f'{model.stem_stride}, {padding})\n')


def architecture(model: Hierarchical) -> str:
  """A line about the model."""
  listed = lambda numbers: '-'.join(map(str, numbers))
  return (f'{type(model).__name__}, {listed(model.depths)} blocks of width {listed(model.dims)}, '
          f'total stride {model.patch_size[0]}')


def call_lines(model: Hierarchical) -> str:
  """What the class of `snippet` takes and returns."""
  if isinstance(model, swin.Swin):
    return (f'`encoder(images)` takes float32 images [B, {model.in_channels}, {model.image_size[0]}, '
            f'{model.image_size[1]}], normalised as below, and returns the mean-pooled vector [B, {model.embed_dim}]; '
            '`encoder.forward_features(images)` returns the last map, channels last, after the final norm.')
  late = isinstance(model, convnext.ConvNeXt | metaformer.CAFormer)
  return (f'`encoder(images)` takes float32 images [B, {model.in_channels}, H, W], normalised as below, and returns '
          f'the mean-pooled vector [B, {model.embed_dim}]'
          + (' after the final norm' if late else '') + '; `encoder.forward_features(images)` returns the last map '
          f'[B, {model.embed_dim}, H / {model.patch_size[0]}, W / {model.patch_size[0]}]'
          + (' before that norm (`encoder.head.norm`).' if late else '.'))


def snippet(model: Hierarchical, file: str) -> str:
  """Python that makes timm's class from the exported file: `encoder`, in evaluation mode, every tensor in its place."""
  make, stem = FAMILIES[type(model)].snippet(model, f'num_classes=0, in_chans={model.in_channels}')
  return (f'import safetensors.torch, timm, torch\nencoder = {make}\n{stem}'
          f'encoder.load_state_dict(safetensors.torch.load_file({file!r}))\nencoder.eval()\n')


FAMILIES: dict[type[Hierarchical], Family] = {
    resnet.ResNet: Family('layer1.0.conv1.weight', (
        (r'(conv1|bn1)', '{}'), (r'layer(\d+)_(\d+)/((?:conv|bn)\d)', 'layer{}.{}.{}'),
        (r'layer(\d+)_(\d+)/down_conv', 'layer{}.{}.downsample.0'),
        (r'layer(\d+)_(\d+)/down_bn', 'layer{}.{}.downsample.1'),
    ), _resnet_fields, ('stem_stride', 'max_pool'), _resnet_snippet),
    convnext.ConvNeXt: Family('stages.0.blocks.0.conv_dw.weight', (
        (r'stem_conv', 'stem.0'), (r'stem_norm', 'stem.1'), (r'norm', 'head.norm'),
        (r'down(\d+)_norm', 'stages.{}.downsample.0'), (r'down(\d+)_conv', 'stages.{}.downsample.1'),
        (r'stage(\d+)/blocks/(conv_dw|norm)', 'stages.{}.blocks.#.{}'),
        (r'stage(\d+)/blocks/(fc1|fc2|grn)', 'stages.{}.blocks.#.mlp.{}'),
    ), _convnext_fields, (), _convnext_snippet),
    metaformer.CAFormer: Family('stages.0.blocks.0.token_mixer.dwconv.weight', (
        (r'stem_(conv|norm)', 'stem.{}'), (r'norm', 'head.norm'), (r'down(\d+)_(conv|norm)', 'stages.{}.downsample.{}'),
        (r'stage(\d+)/blocks/(norm1|norm2|res_scale\d)', 'stages.{}.blocks.#.{}'),
        (r'stage(\d+)/blocks/(fc1|fc2|act)', 'stages.{}.blocks.#.mlp.{}'),
        (r'stage(\d+)/blocks/mixer/act', 'stages.{}.blocks.#.token_mixer.act1'),
        (r'stage(\d+)/blocks/mixer/(\w+)', 'stages.{}.blocks.#.token_mixer.{}'),
    ), _caformer_fields, ('stem_stride',), _caformer_snippet),
    pvt.PVT: Family('stages.0.blocks.0.mlp.dwconv.weight', (
        (r'stem_conv', 'patch_embed.proj'), (r'stem_norm', 'patch_embed.norm'), (r'norm(\d+)', 'stages.{}.norm'),
        (r'down(\d+)_conv', 'stages.{}.downsample.proj'), (r'down(\d+)_norm', 'stages.{}.downsample.norm'),
        (r'stage(\d+)/blocks/(norm1|norm2)', 'stages.{}.blocks.#.{}'),
        (r'stage(\d+)/blocks/attn/(\w+)', 'stages.{}.blocks.#.attn.{}'),
        (r'stage(\d+)/blocks/(fc1|fc2|dwconv)', 'stages.{}.blocks.#.mlp.{}'),
    ), _pvt_fields, ('num_heads', 'stem_stride'), _pvt_snippet),
    swin.Swin: Family('layers.0.blocks.0.attn.relative_position_bias_table', (
        (r'stem_conv', 'patch_embed.proj'), (r'stem_norm', 'patch_embed.norm'), (r'norm', 'norm'),
        (r'down(\d+)_(norm|reduction)', 'layers.{}.downsample.{}'),
        (r'stage(\d+)/blocks/(norm\d|attn)', 'layers.{}.blocks.#.{}'),
        (r'stage(\d+)/blocks/attn/(qkv|proj)', 'layers.{}.blocks.#.attn.{}'),
        (r'stage(\d+)/blocks/(fc\d)', 'layers.{}.blocks.#.mlp.{}'),
    ), _swin_fields, (), _swin_snippet),
}
