"""The layouts that a model can be exported to and imported from, and the files that carry them.

A file is safetensors. Its metadata has one entry, 'jaxmed': JSON with the layout, the model
(`registry.describe`) and `info`, what a user of the encoder must know: 'channels' [{'name', 'mean', 'std'}],
'normalize' ('corpus', 'image' or 'none'), 'feature' ('mean' or 'cls'), 'method'. So a file written here needs
no other file and no further argument.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.interop import conv, folders, inflate, monai, nnunet, state_dict, stunet, torchvision
from jaxmed.interop.channelvit import from_channelvit, to_channelvit
from jaxmed.interop.safetensors_io import read_tensors, write_tensors
from jaxmed.interop.state_dict import Params
from jaxmed.interop.timm import folded, from_timm, to_timm
from jaxmed.models import registry
from jaxmed.models.encoders.bag import BagOfChannels
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers.channel_embed import unnamed
from jaxmed.models.layers.convolution import Hierarchical
from jaxmed.models.registry import Encoder

METADATA = 'jaxmed'


@dataclasses.dataclass(frozen=True)
class Format:
  """One layout. `write(model, params)` gives its tensors; `read(tensors, num_heads, image_size)` the model
  and parameters, None where tensors alone do not tell the model; `about` is a line for a list.
  """

  about: str
  write: Callable[[Any, Params], dict[str, np.ndarray]]
  read: Callable[..., tuple[Any, Params]] | None = None


def to_flat(model: Encoder, params: Params) -> dict[str, np.ndarray]:
  """The format `jaxmed`: parameter names joined by '/', as 'transformer/blocks/mlp/fc1/kernel' [L, D, F]."""
  del model
  return flax.traverse_util.flatten_dict(state_dict.host(params), sep='/')


def _to_timm(model: Encoder, params: Params) -> dict[str, np.ndarray]:
  if isinstance(model, Hierarchical):
    return conv.to_timm(model, params)
  model = model.single if isinstance(model, BagOfChannels) else model
  if model.mlp not in ('gelu', 'swiglu'):
    raise UserError(f"format 'timm' has encoder.mlp gelu and swiglu, not {model.mlp}: export with --format hf")
  return to_timm(model, params)


def _from_timm(tensors: Mapping[str, np.ndarray], num_heads: Any, image_size: Any) -> tuple[Encoder, Params]:
  read: Callable = conv.from_timm if conv.family_of(tensors) else from_timm
  return read(tensors, num_heads, image_size)


def _of_network(read: Callable[..., nnunet.Network]) -> Callable[..., tuple[Encoder, Params]]:
  """The reader of a format whose files may hold a decoder too, which is left out."""
  def encoder(tensors: Mapping[str, np.ndarray], num_heads: Any, image_size: Any) -> tuple[Encoder, Params]:
    del num_heads
    network = read(tensors, image_size)
    return network.encoder, network.params

  return encoder


def _swin(merging: str, about: str) -> Format:
  return Format(f"the encoder of a Swin UNETR as MONAI's SwinUNETR.swinViT, {about}",
                functools.partial(monai.to_swinunetr, merging=merging),
                functools.partial(monai.from_swinunetr, merging=merging))


FORMATS: dict[str, Format] = {
    'timm': Format("as timm's class: VisionTransformer, ResNet, ConvNeXt, MetaFormer, PVT v2", _to_timm, _from_timm),
    'channelvit': Format('ChannelViT as the official ChannelVisionTransformer', to_channelvit,
                          from_channelvit),
    'nnunet': Format("the encoders of nnU-Net's PlainConvUNet and ResidualEncoderUNet",
                     lambda model, params: nnunet.to_nnunet(nnunet.Network(model, params)),
                     _of_network(nnunet.from_nnunet)),
    'stunet': Format('the encoder of STU-Net', lambda model, params: stunet.to_stunet(nnunet.Network(model, params)),
                     _of_network(stunet.from_stunet)),
    'torchvision': Format("torchvision's VideoResNet", torchvision.to_torchvision, torchvision.from_torchvision),
    'monai_swinunetr': _swin('corrected', 'downsample=merging of release 1.5 and later'),
    'monai_swinunetr_legacy': _swin('legacy', 'downsample=merging of releases before 1.5, with all public weights'),
    'monai_swinunetr_mergingv2': _swin('v2', 'downsample=mergingv2'),
    'monai_vit': Format("as MONAI's ViT, and UNETR.vit", monai.to_vit, monai.from_vit),
    'jaxmed': Format('any model, with the names of its own parameters', to_flat),
}


def export_file(path: str | os.PathLike, fmt: str, model: Encoder, params: Params,
                info: Mapping[str, Any]) -> None:
  """Writes model, parameters and info as one safetensors file in the layout `fmt`; whole or not at all.

  Raises:
    UserError: unknown format, a model that the layout cannot hold, NaN weights, a place that cannot be
      written.
  """
  layout = FORMATS[choose('format', fmt, FORMATS)]
  if model.adapter is not None and fmt != 'jaxmed':
    raise UserError(f'format {fmt!r} has no place for adapters of {model.adapter.name}, which no weights can take up: '
                    'export with --format jaxmed')
  check_params(model, params)
  if fmt == 'channelvit':  # whose class has a table
    model, params = inflate.as_table(model, params)
  if fmt == 'timm' and type(model) is ViT and model.pre_norm:  # whose patches have no bias then
    model, params = folded(model, params)
  if fmt == 'monai_vit' and isinstance(model, ViT):  # whose table has no class token
    model, params = monai.without_embedded_class(model, params)
  text = json.dumps({'format': fmt, 'model': registry.describe(model), 'info': dict(info)}, sort_keys=True)
  write_tensors(path, layout.write(model, params), {METADATA: text})


def load_file(path: str | os.PathLike, fmt: str | None = None, num_heads: int | None = None,
              image_size: tuple[int, ...] | None = None) -> tuple[Encoder, Params, dict[str, Any]]:
  """Reads an encoder: (model, params as jax arrays, info). Info is empty for a file that was not written
  here.

  A file written here gives back exactly the exported model and parameters. For any other, `fmt` names the
  layout and the rest is read off the tensors; `num_heads` and `image_size` say what they cannot.

  Raises:
    UserError: missing, damaged or foreign file without `fmt`, arguments that contradict the file.
  """
  if fmt is None and folders.is_folder(path):
    return _of_folder(path)
  return _loaded(path, *read_tensors(path), fmt, num_heads, image_size)


def _of_folder(path: str | os.PathLike) -> tuple[Encoder, Params, dict[str, Any]]:
  """`load_file` of a folder of transformers or open_clip, which says what tensors do not."""
  model, params, info = folders.read_encoder(path)
  check_params(model, params)
  return model, jax.tree.map(jnp.asarray, params), info


def _loaded(path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str], fmt: str | None,
            num_heads: int | None, image_size: tuple[int, ...] | None) -> tuple[Encoder, Params, dict[str, Any]]:
  """`load_file` of what was read."""
  if fmt is not None:
    choose('format', fmt, FORMATS)
  if METADATA in metadata:
    return _load_own(path, tensors, metadata[METADATA], fmt, num_heads, image_size)
  if fmt is None:
    likely = guess_format(tensors)
    hint = f'--format {likely} (its tensors look like it)' if likely else '--format'
    choices = ', '.join(sorted(FORMATS))
    raise UserError(f'{path} does not say its layout: pass {hint}; choose one of {choices}')
  read = FORMATS[fmt].read
  if read is None:
    raise UserError(f'{path} has no {METADATA} metadata, which format {fmt!r} needs: expected a file '
                    'written by export')
  try:
    model, params = read(tensors, num_heads, image_size)
    check_params(model, params)
  except UserError as e:
    likely = guess_format(tensors)
    hint = f' (its tensors look like --format {likely})' if likely not in (None, fmt) else ''
    raise UserError(f'{path}: {e}{hint}') from e
  return model, jax.tree.map(jnp.asarray, params), {}


def import_file(src: str | os.PathLike, fmt: str | None, out: str | os.PathLike, num_heads: int | None = None,
                image_size: tuple[int, ...] | None = None, channels: Sequence[Any] | None = None,
                how: str | None = None, kind: str | None = None, positions: str | None = None,
                weights: str | None = None) -> Encoder:
  """Rewrites a foreign file with the metadata that makes it load without arguments.

  Args:
    channels: one entry for each input channel, a name or {'name', 'mean', 'std'}; None for 'channel_0', ... .
      Names alone mean that images are used as they are (mean 0, std 1, normalize 'none').
    how: makes a model of the `channels`, which may be others and another number, see `inflate.inflate`; None where
      they name those of the file. Three unnamed channels are R, G and B.
    kind: 'vit' or 'channel_vit', which the model becomes, see `inflate`; None leaves it.
    weights: of a checkpoint that holds both, 'ema' (which None takes, too) or 'plain'.
    positions: how a table of positions is resampled to other sizes, 'antialias' or 'offset'; None for `positions_of`.
  Returns:
    The model.
  """
  if fmt is not None:
    choose('format', fmt, FORMATS)
  model, params, info, tensors, fmt = _read_any(src, fmt, num_heads, image_size, weights)
  if isinstance(model, ViT) and model.pos == 'learned' and not model.per_channel and (positions or not info):
    model = model.clone(pos_interpolation=positions or positions_of(tensors))
  if isinstance(model, ViT) and model.pos == 'rope':
    fmt = 'jaxmed'  # no class of the other formats has rotary positions
  if kind is not None and kind != ('channel_vit' if model.per_channel else 'vit'):
    convert = {'vit': inflate.to_vit, 'channel_vit': inflate.to_channel_vit}[choose('--to', kind, inflate.KINDS)]
    model, params = convert(model, params)
    fmt = 'jaxmed'  # the only layout that holds every option of both
  if how is not None:
    names = [c if isinstance(c, str) else c['name'] for c in channels or ()]
    model, params = inflate.inflate(model, params, _names(model, info), names, how)
  if channels is not None or 'channels' not in info:
    info = info | _channel_info(model, channels)
  info = {'feature': 'cls' if model.class_token else 'mean', 'method': 'imported'} | info
  export_file(out, fmt, model, params, info)
  return model


def _read_any(src: str | os.PathLike, fmt: str | None, num_heads: int | None, image_size: tuple[int, ...] | None,
              weights: str | None) -> tuple[Encoder, Params, dict[str, Any], dict[str, np.ndarray], str]:
  """Model, parameters, info, tensors and format of what `import_file` reads; of a folder no tensors."""
  if fmt is None and folders.is_folder(src):
    for option, value in (('--num-heads', num_heads), ('--image-size', image_size), ('--weights', weights)):
      if value is not None:
        raise UserError(f'{src} says its sizes in a config: leave {option} out')
    return *_of_folder(src), {}, 'jaxmed'
  tensors, metadata = read_tensors(src)
  try:
    tensors = state_dict.of_weights(tensors, weights)
  except UserError as e:
    raise UserError(f'{src}: {e}') from e
  fmt = fmt or (json.loads(metadata[METADATA])['format'] if METADATA in metadata else guess_format(tensors))
  model, params, info = _loaded(src, tensors, metadata, fmt, num_heads, image_size)
  assert fmt is not None  # or there was no telling what it is
  return model, params, info, tensors, fmt


def positions_of(tensors: Mapping[str, np.ndarray]) -> str:
  """How the code that wrote these weights resamples a table of positions, by the names of the tensors.

  'offset', bicubic with 0.1 added to the size, of DINO's and iBOT's checkpoints (facebookresearch/dino,
  vision_transformer.py:interpolate_pos_encoding) and of DINOv2 without registers (facebookresearch/dinov2,
  hub/backbones.py); 'antialias' of DINOv2 with registers, timm and all else.
  """
  ends = lambda *names: any(key.endswith(names) for key in tensors)
  dino = any(key.startswith(('teacher.backbone.', 'teacher.module.backbone.')) for key in tensors)
  masked = ends('mask_token') and not any('decoder' in key for key in tensors)
  return 'offset' if (dino or masked) and not ends('register_tokens', 'reg_token') else 'antialias'


def guess_format(tensors: Mapping[str, np.ndarray]) -> str | None:
  """The layout that the tensors' names and ranks suggest, or None."""
  ends = lambda name: any(key == name or key.endswith('.' + name) for key in tensors)
  if ends(monai.SWIN_ANCHOR):
    return 'monai_swinunetr'
  if ends(monai.VIT_ANCHOR):
    return 'monai_vit'
  for name, value in tensors.items():
    if name.endswith(state_dict.ANCHOR):
      return {4: 'timm', 5: 'channelvit'}.get(np.ndim(value))
  for name, told in (('nnunet', nnunet.is_nnunet), ('stunet', stunet.is_stunet),
                     ('torchvision', torchvision.is_torchvision), ('timm', conv.family_of)):
    if told(tensors):
      return name
  return 'jaxmed' if any('/' in name for name in tensors) else None


def check_params(model: Encoder, params: Params) -> None:
  """Raises a UserError that names the first parameter which is missing, too many, or of another shape."""
  want = state_dict.shapes_of(model)
  have = flax.traverse_util.flatten_dict(nn.meta.unbox(dict(params)), sep='/')
  have = {k: np.shape(v) for k, v in have.items()}
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      shape = lambda s: 'nothing' if s is None else list(s)
      raise UserError(f'parameter {name!r} is {shape(have.get(name))}, expected {shape(want.get(name))} for '
                      'this model')


def _load_own(path, tensors, text: str, fmt, num_heads, image_size) -> tuple[Encoder, Params, dict[str, Any]]:
  """The exported model itself: described by the metadata, its parameters out of the layout's tensors."""
  try:
    meta = json.loads(text)
    stored, info = choose('format', meta['format'], FORMATS), dict(meta['info'])
    model = registry.rebuild(meta['model'])
  except (UserError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{path}: its {METADATA} metadata is damaged or of another version: {e}') from e
  given = {'--format': (fmt, stored), '--num-heads': (num_heads, getattr(model, 'num_heads', None)),
           '--image-size': (image_size and tuple(image_size), tuple(model.image_size))}
  for option, (value, have) in given.items():
    if value is not None and value != have:
      raise UserError(f'{path} says {option} {have}, not {value}: leave the option out')
  read = FORMATS[stored].read
  try:
    if read is None:
      params = flax.traverse_util.unflatten_dict(tensors, sep='/')
    else:
      params = _as_described(model, read(tensors, getattr(model, 'num_heads', None), model.image_size)[1])
    check_params(model, params)
  except UserError as e:
    raise UserError(f'{path}: {e}') from e
  return model, jax.tree.map(jnp.asarray, params), info


def _as_described(model: Encoder, params: Params) -> Params:
  """Undoes what a layout had to write out: positions that are no parameters or that no class token has."""
  if isinstance(model, Hierarchical):
    return params
  if model.pos != 'learned':
    params.pop('pos_embed', None)
  elif model.supports.channel_vectors and model.no_embed_class:
    params['pos_embed'] = params['pos_embed'][1:]
  return params


def _names(model: Encoder, info: Mapping[str, Any]) -> Sequence[str]:
  """The channel names of a file; three unnamed channels are R, G, B."""
  if 'channels' in info:
    return [c['name'] for c in info['channels']]
  return ['R', 'G', 'B'] if model.in_channels == 3 else unnamed(model.in_channels)


def _channel_info(model: Encoder, channels: Sequence[Any] | None) -> dict[str, Any]:
  if channels is None:
    channels = unnamed(model.in_channels)
  if len(channels) != model.in_channels:
    raise UserError(f'--channels names {len(channels)} channels, expected {model.in_channels}')
  entries = [{'name': c, 'mean': 0.0, 'std': 1.0} if isinstance(c, str) else dict(c) for c in channels]
  names = [e['name'] for e in entries]
  if len(set(names)) != len(names):
    twice = next(n for n in names if names.count(n) > 1)
    raise UserError(f'--channels names {twice!r} twice: expected {model.in_channels} different names')
  plain = all(isinstance(c, str) for c in channels)
  return {'channels': entries, 'normalize': 'none' if plain else 'corpus'}
