"""Encoders as folders of Hugging Face's transformers: config.json, model.safetensors, preprocessor_config.json.

Names and arithmetic follow huggingface/transformers, src/transformers/models/{vit,vit_mae,dinov2,dinov2_with_registers,
clip,siglip}/modeling_*.py and configuration_*.py of release 5.24, which renames what files hold
(src/transformers/conversion_mapping.py): files have the names below, as those of the hub. A tensor's name is turned
into timm's and back, so that `timm` reads and writes all of them.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.errors import UserError, choose
from jaxmed.interop import state_dict
from jaxmed.interop.safetensors_io import read_tensors
from jaxmed.interop.state_dict import Params
from jaxmed.interop.timm import folded, from_timm, to_timm
from jaxmed.models import registry
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers.transformer import ACTIVATIONS

CONFIG, PREPROCESSOR, OURS = 'config.json', 'preprocessor_config.json', 'jaxmed'
ACTS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'quick_gelu': 'quick_gelu'}
_SAME_ACTS = {'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh'}

_BERT = {'attn.q': 'attention.attention.query', 'attn.k': 'attention.attention.key',
         'attn.v': 'attention.attention.value', 'attn.proj': 'attention.output.dense'}
_CLIP = {'norm1': 'layer_norm1', 'norm2': 'layer_norm2', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2',
         'attn.proj': 'self_attn.out_proj', **{f'attn.{n}': f'self_attn.{n}_proj' for n in 'qkv'}}


def _blocks(names: Mapping[str, str], at: str) -> dict[str, str]:
  return {f'blocks.#.{ours}': f'{at}.#.{theirs}' for ours, theirs in names.items()}


CLIP_BLOCKS = _blocks(_CLIP, 'encoder.layers')
_STEM = {'cls_token': 'embeddings.cls_token', 'pos_embed': 'embeddings.position_embeddings',
         'patch_embed.proj': 'embeddings.patch_embeddings.projection', 'norm': 'layernorm'}
_VIT = _STEM | _blocks({**_BERT, 'norm1': 'layernorm_before', 'norm2': 'layernorm_after',
                        'mlp.fc1': 'intermediate.dense', 'mlp.fc2': 'output.dense'}, 'encoder.layer')
_DINOV2 = _STEM | {'register_tokens': 'embeddings.register_tokens', 'mask_token': 'embeddings.mask_token'} | _blocks(
    {**_BERT, 'norm1': 'norm1', 'norm2': 'norm2', 'ls1.gamma': 'layer_scale1.lambda1', 'mlp.fc1': 'mlp.fc1',
     'ls2.gamma': 'layer_scale2.lambda1', 'mlp.fc2': 'mlp.fc2', 'mlp.w12': 'mlp.weights_in',
     'mlp.w3': 'mlp.weights_out'}, 'encoder.layer')
_VISION = CLIP_BLOCKS | {'patch_embed.proj': 'embeddings.patch_embedding',
                         'pos_embed': 'embeddings.position_embedding.weight', 'norm': 'post_layernorm'}
_HEAD = {f'attn_pool.{ours}': f'head.{theirs}' for ours, theirs in (
    ('latent', 'probe'), ('in_proj_weight', 'attention.in_proj_weight'), ('in_proj_bias', 'attention.in_proj_bias'),
    ('proj', 'attention.out_proj'), ('norm', 'layernorm'), ('mlp.fc1', 'mlp.fc1'), ('mlp.fc2', 'mlp.fc2'))}
# Of a kind: timm's names and theirs, without what stands before them in a larger class; '#' is a block.
NAMES: dict[str, dict[str, str]] = {
    'vit': _VIT, 'vit_mae': _VIT, 'dinov2': _DINOV2, 'dinov2_with_registers': _DINOV2,
    'clip': _VISION | {'cls_token': 'embeddings.class_embedding', 'norm_pre': 'pre_layrnorm'},
    'siglip': _VISION | _HEAD}
PREFIXES = {'vit': 'vit.', 'vit_mae': 'vit.', 'dinov2': 'dinov2.', 'dinov2_with_registers': 'dinov2_with_registers.',
            'clip': 'vision_model.', 'siglip': 'vision_model.'}
CLASSES = {'vit': 'ViTModel', 'vit_mae': 'ViTMAEModel', 'dinov2': 'Dinov2Model',
           'dinov2_with_registers': 'Dinov2WithRegistersModel', 'clip': 'CLIPVisionModel',
           'siglip': 'SiglipVisionModel'}
# Options that a class has, or has not; of the rest it takes any.
_PLAIN = {'class_token': True, 'num_registers': 0, 'layer_scale': 0, 'pre_norm': False, 'map_head': False}
_NEEDS: dict[str, dict[str, Any]] = {
    'vit': _PLAIN, 'vit_mae': _PLAIN, 'dinov2': {'class_token': True, 'num_registers': 0, 'pre_norm': False,
                                                 'map_head': False},
    'dinov2_with_registers': {'class_token': True, 'pre_norm': False, 'map_head': False},
    'clip': _PLAIN | {'pre_norm': True}, 'siglip': _PLAIN | {'class_token': False, 'map_head': True}}
# What config.json means where it does not say it: the defaults of the classes' configs.
_USUAL: dict[str, dict[str, Any]] = {
    'vit': {'layer_norm_eps': 1e-12, 'hidden_act': 'gelu', 'patch_size': 16},
    'dinov2': {'layer_norm_eps': 1e-6, 'hidden_act': 'gelu', 'patch_size': 14},
    'clip': {'layer_norm_eps': 1e-5, 'hidden_act': 'quick_gelu', 'patch_size': 32},
    'siglip': {'layer_norm_eps': 1e-6, 'hidden_act': 'gelu_pytorch_tanh', 'patch_size': 16}}
_USUAL |= {'vit_mae': _USUAL['vit'], 'dinov2_with_registers': _USUAL['dinov2']}


def kind_of(model: ViT) -> str:
  """The class that holds an encoder, a key of NAMES."""
  if getattr(model, 'num_registers', 0):
    return 'dinov2_with_registers'
  return 'dinov2' if getattr(model, 'layer_scale', 0) or getattr(model, 'mlp', '') == 'swiglu' else 'vit'


def renamed(tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
  """Tensors by other names; `names` are of tensors, or of layers with .weight and .bias. Others stay."""
  out = {}
  for name, value in tensors.items():
    places = re.findall(r'\.(\d+)\.', name)
    plain = re.sub(r'\.\d+\.', '.#.', name, count=1)
    stem, dot, suffix = plain.rpartition('.')
    new = names.get(plain) or (f'{names[stem]}{dot}{suffix}' if stem in names else plain)
    out[new.replace('#', places[0], 1) if places else new] = value
  return out


def split_qkv(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Tensors attn.qkv as attn.q, attn.k and attn.v."""
  out: dict[str, np.ndarray] = {}
  for name, value in tensors.items():
    parts = np.split(value, 3) if '.attn.qkv.' in name else [value]
    out |= {name.replace('.qkv.', f'.{letter}.') if len(parts) == 3 else name: part
            for letter, part in zip('qkv', parts)}
  return out


def fused_qkv(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split_qkv`."""
  out = {name: value for name, value in tensors.items() if not re.search(r'\.attn\.[kv]\.', name)}
  for name in [name for name in out if '.attn.q.' in name]:
    parts = [tensors.get(name.replace('.q.', f'.{letter}.')) for letter in 'qkv']
    if any(part is None for part in parts):
      raise UserError(f'tensor {name!r} has no keys and values beside it')
    out[name.replace('.q.', '.qkv.')] = np.concatenate([part for part in parts if part is not None])
    del out[name]
  return out


def canonical(model: ViT, params: Params, kind: str) -> tuple[ViT, Params]:
  """The same network as a class of that kind has it: learned positions, of the class token too, no bias of patches
  (CLIP), biases of projections (CLIP, SigLIP), LayerScale (DINOv2).

  Raises:
    UserError: the class cannot hold it; names the option.
  """
  _check(model, kind)
  p = state_dict.host(params)
  bias = p['patch_embed']['bias']
  model, p = folded(model, p)
  if kind != 'clip':
    rows = np.arange(len(p['pos_embed']))[:, None] >= model.num_prefix_tokens
    p = p | {'pos_embed': p['pos_embed'] - np.where(rows, bias, 0),
             'patch_embed': p['patch_embed'] | {'bias': bias}}
  blocks, dim = p['transformer']['blocks'], model.embed_dim
  if kind.startswith('dinov2') and not model.layer_scale:
    blocks = blocks | {name: np.ones((model.depth, dim), np.float32) for name in ('ls1', 'ls2')}
    model = model.clone(layer_scale=1.0)
  if kind in ('clip', 'siglip') and not model.qkv_bias:
    qkv = blocks['attn']['qkv']
    zeros = np.zeros((model.depth, *qkv['kernel'].shape[2:]), np.float32)
    blocks = blocks | {'attn': blocks['attn'] | {'qkv': qkv | {'bias': zeros}}}
    model = model.clone(qkv_bias=True)
  if model.num_registers:  # the class adds no positions to them
    n = model.num_prefix_tokens
    table = p['pos_embed'].copy()
    p = p | {'register_tokens': p['register_tokens'] + table[1:n]}
    table[1:n] = 0
    p['pos_embed'] = table
  return model, p | {'transformer': {'blocks': blocks}}


def _check(model: ViT, kind: str) -> None:
  """Raises a UserError where a class cannot hold a model; names what differs."""
  say = lambda what: UserError(f'format hf: {CLASSES[kind]} has {what}; --format jaxmed holds any model')
  if type(model) is not ViT or model.adapter is not None:
    raise say(f'no place for a {registry.family_of(model)}' if type(model) is not ViT else 'no adapters')
  if len(model.image_size) != 2 or len({*model.image_size}) != 1 or len({*model.patch_size}) != 1:
    raise say(f'square images and patches, not image_size={model.image_size} with patches of {model.patch_size}')
  for option, value in _NEEDS[kind].items():
    if bool(getattr(model, option)) != bool(value):
      raise say(f'encoder.{option}={value}, not {getattr(model, option)}')
  if model.pos == 'rope':
    raise say('learned or fixed positions, not encoder.pos=rope')
  if model.mlp == 'swiglu' and not kind.startswith('dinov2'):
    raise say('encoder.mlp=gelu, not swiglu')
  if kind.startswith('dinov2') and _ratio(model) is None:
    raise say(f'encoder.mlp_ratio of a whole number (of swiglu two thirds of it), not {model.mlp_ratio:g}')


def _ratio(model: ViT) -> int | None:
  """DINOv2's whole mlp_ratio, of which SwiGLU has two thirds, rounded up to a multiple of 8; None where none fits."""
  hidden = int(model.embed_dim * model.mlp_ratio)
  width = lambda n: (n * model.embed_dim * 2 // 3 + 7) // 8 * 8 if model.mlp == 'swiglu' else n * model.embed_dim
  return next((n for n in range(1, 33) if width(n) == hidden), None)


def to_tensors(model: ViT, params: Params, kind: str) -> dict[str, np.ndarray]:
  """The state dict of transformers' class for a `canonical` model."""
  named = to_timm(model, params)
  if kind == 'dinov2_with_registers':
    n, table = model.num_prefix_tokens, named['pos_embed']
    named['register_tokens'] = named.pop('reg_token')
    named['pos_embed'] = np.concatenate([table[:, :1], table[:, n:]], axis=1)
  if kind.startswith('dinov2'):
    named['mask_token'] = np.zeros((1, model.embed_dim), np.float32)  # which the class has and no feature depends on
  if kind in ('clip', 'siglip'):
    named['pos_embed'] = named['pos_embed'][0]
  if kind == 'clip':
    named['cls_token'] = named['cls_token'][0, 0]
  if kind == 'siglip':
    for part in ('weight', 'bias'):
      named[f'attn_pool.in_proj_{part}'] = np.concatenate(
          [named.pop(f'attn_pool.{name}.{part}') for name in ('q', 'kv')])
  if model.mlp == 'swiglu':
    named = {name.replace('.mlp.fc1.', '.mlp.w12.').replace('.mlp.fc2.', '.mlp.w3.'): value
             for name, value in named.items()}
  return renamed(split_qkv(named), NAMES[kind])


def from_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], kind: str) -> tuple[ViT, Params]:
  """The encoder of a state dict of transformers; `config` is that of the vision tower. Poolers, classifiers and
  decoders are left out."""
  prefix = PREFIXES[kind]
  some = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)} or tensors
  some = {name: value for name, value in some.items()
          if not name.startswith(('pooler.', 'classifier.', 'decoder.', 'embeddings.mask_token'))}
  named = fused_qkv(renamed(some, {theirs: ours for ours, theirs in NAMES[kind].items()}))
  if kind in ('clip', 'siglip'):
    shape = {'cls_token': lambda x: x.reshape(1, 1, -1), 'pos_embed': lambda x: x[None]}
    named = {name: shape.get(name, lambda x: x)(value) for name, value in named.items()
             if not name.endswith('position_ids')}
  if kind == 'siglip' and 'attn_pool.in_proj_weight' in named:
    for part in ('weight', 'bias'):
      dim = len(named[f'attn_pool.in_proj_{part}']) // 3
      named[f'attn_pool.q.{part}'], named[f'attn_pool.kv.{part}'] = np.split(
          named.pop(f'attn_pool.in_proj_{part}'), [dim])
  told = _USUAL[kind] | dict(config)
  size = told.get('image_size', 224)
  size = (size, size) if isinstance(size, int) else tuple(size)
  model, p = from_timm(named, told.get('num_attention_heads', 12), size)
  act = 'swiglu' if model.mlp == 'swiglu' else activation(told['hidden_act'])
  resampled = 'antialias' if kind == 'dinov2_with_registers' else 'plain'
  return model.clone(norm_epsilon=told['layer_norm_eps'], mlp=act, pos_interpolation=resampled), p


def activation(name: str) -> str:
  """Our name of transformers' `hidden_act`."""
  known = {theirs: ours for ours, theirs in ACTS.items() if ours in ACTIVATIONS} | _SAME_ACTS
  return known[choose('hidden_act', name, known)]


def vision_config(model: ViT, kind: str) -> dict[str, Any]:
  """config.json of the class of a `canonical` model."""
  out = {'model_type': kind, 'hidden_size': model.embed_dim, 'num_hidden_layers': model.depth,
         'num_attention_heads': model.num_heads, 'intermediate_size': int(model.embed_dim * model.mlp_ratio),
         'hidden_act': ACTS.get(model.mlp, 'gelu'), 'layer_norm_eps': model.norm_epsilon,
         'image_size': model.image_size[0], 'patch_size': model.patch_size[0], 'num_channels': model.in_channels,
         'attention_dropout' if kind in ('clip', 'siglip') else 'attention_probs_dropout_prob': 0.0}
  if kind in ('clip', 'siglip'):
    return out | {'model_type': f'{kind}_vision_model'}
  out |= {'architectures': [CLASSES[kind]], 'torch_dtype': 'float32', 'hidden_dropout_prob': 0.0,
          'qkv_bias': model.qkv_bias}
  if kind.startswith('dinov2'):
    out |= {'mlp_ratio': _ratio(model), 'use_swiglu_ffn': model.mlp == 'swiglu', 'layerscale_value': 1.0}
  if kind == 'dinov2_with_registers':
    out['num_register_tokens'] = model.num_registers
  return out


def preprocessor(model: ViT, info: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
  """preprocessor_config.json, and what it cannot say, a sentence each.

  An image is multiplied by 1/255 first, so means and deviations in stored units are divided by 255.
  """
  processor = {'clip': 'CLIPImageProcessor', 'siglip': 'SiglipImageProcessor'}.get(kind, 'ViTImageProcessor')
  height, width = model.image_size
  out: dict[str, Any] = {'image_processor_type': processor, 'do_resize': True, 'resample': 2, 'do_center_crop': False,
                         'size': {'height': height, 'width': width}, 'do_convert_rgb': model.in_channels == 3,
                         'do_rescale': False, 'do_normalize': False}
  notes = []
  if info.get('normalize') == 'corpus':
    out |= {'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True,
            'image_mean': [c['mean'] / 255 for c in info['channels']],
            'image_std': [c['std'] / 255 for c in info['channels']]}
  elif info.get('normalize') != 'none':
    notes.append(f'The processor does not normalise: normalize={info.get("normalize")} standardises each image by '
                 'itself; do so before the model.')
  if model.in_channels not in (1, 3):
    notes.append(f'The processor takes images of 1 or 3 channels, not {model.in_channels}: normalise as the card says '
                 'and give pixel_values to the model.')
  return out, notes


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a path is a folder of transformers: its config.json names a model_type."""
  file = pathlib.Path(path) / CONFIG
  if not file.is_file():
    return False
  config = files.read_json(file)
  return isinstance(config, dict) and 'model_type' in config


def read_encoder(path: str | os.PathLike) -> tuple[ViT, Params, dict[str, Any]]:
  """The encoder of a folder, of CLIP and SigLIP the image tower: model, parameters and info as of an exported file.

  Raises:
    UserError: a model_type or activation that is unknown here, a tensor that is missing or has no place.
  """
  config = files.read_json(pathlib.Path(path) / CONFIG)
  kind = str(config['model_type']).removesuffix('_vision_model')
  choose(f'model_type of {path}', kind, NAMES)
  vision = config.get('vision_config', config)
  try:
    model, params = from_tensors(read_tensors(path)[0], vision, kind)
  except UserError as e:
    raise UserError(f'{path}: {e}') from e
  if OURS in config:
    return registry.rebuild(config[OURS]['model']), params, dict(config[OURS]['info'])
  return model, params, _info(path, model)


def _info(path: str | os.PathLike, model: ViT) -> dict[str, Any]:
  """What preprocessor_config.json says of a model's input, as of an exported file; images as they are without one."""
  file = pathlib.Path(path) / PREPROCESSOR
  told: Any = files.read_json(file) if file.is_file() else {'do_rescale': False, 'do_normalize': False}
  factor = told.get('rescale_factor', 1 / 255) if told.get('do_rescale', True) else 1.0
  whole = told.get('do_normalize', True)
  count = model.in_channels
  mean, std = (told.get(key) if whole else usual for key, usual in (('image_mean', [0.0] * count),
                                                                    ('image_std', [1.0] * count)))
  if mean is None or std is None or len(mean) != count or len(std) != count:
    raise UserError(f'{file} has no image_mean and image_std of {count} channels')
  names = ('R', 'G', 'B') if count == 3 else registry.channel_embed.unnamed(count)
  channels = [{'name': n, 'mean': m / factor, 'std': s / factor} for n, m, s in zip(names, mean, std)]
  plain = factor == 1 and not whole
  return {'channels': channels, 'normalize': 'none' if plain else 'corpus', 'method': 'imported',
          'feature': 'cls' if model.class_token else 'mean'}
