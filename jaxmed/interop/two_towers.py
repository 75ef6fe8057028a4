"""An image and a text tower that are compared, as transformers' CLIPModel and SiglipModel and as open_clip's classes.

huggingface/transformers, src/transformers/models/{clip,siglip}; mlfoundations/open_clip, src/open_clip/model.py (CLIP,
CustomTextCLIP), transformer.py (VisionTransformer), timm_model.py and factory.py (`local-dir:`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import huggingface, state_dict, text
from jaxmed.interop.huggingface import ACTS, PREFIXES, canonical, renamed, split_qkv, vision_config
from jaxmed.interop.state_dict import Params
from jaxmed.interop.timm import from_timm, to_timm
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.text.transformer import TextTransformer

_VISUAL = {**text.OPEN_BLOCKS, 'patch_embed.proj': 'conv1', 'cls_token': 'class_embedding',
           'pos_embed': 'positional_embedding', 'norm_pre': 'ln_pre', 'norm': 'ln_post'}
_WIDTHS = {768: 'base', 1024: 'large'}  # timm's vit_*_siglip_*, with 12 and 24 blocks


@dataclasses.dataclass(frozen=True)
class Towers:
  """Two towers and what compares them.

  Attributes:
    image, params: the encoder. projection: [D, out] of its vector `feature`, None for none.
    text, text_params: the tower of texts with its projection `head`.
    scale, bias: logits are exp(scale) cosine + bias; no bias in CLIP.
    end: id that ends a text, -1 for none.
  """

  image: ViT
  params: Params
  text: TextTransformer
  text_params: Params
  projection: np.ndarray | None
  scale: float
  bias: float | None = None
  feature: str = 'cls'
  end: int = -1


def vectors(towers: Towers, image: jax.Array, ids: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Vectors [B, out] float32 of images [B, H, W, C], normalised float, and of texts [B, L], not of length 1."""
  plain, words_of = towers.image.clone(dtype='float32', remat='none'), towers.text.clone(dtype='float32', remat='none')
  found, words = _vectors(plain, words_of, towers.feature, towers.params, towers.text_params, image, ids)
  found = found if towers.projection is None else found @ towers.projection
  return np.asarray(found), np.asarray(words)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal models are not compiled again
def _vectors(image_model, text_model, feature, params, text_params, image, ids):
  features = image_model.apply({'params': params}, image)
  return features.pooled(feature), text_model.apply({'params': text_params}, ids).pool


def kind_of(towers: Towers) -> str:
  """'siglip' for towers with a bias of logits, else 'clip'."""
  return 'clip' if towers.bias is None else 'siglip'


def _check(towers: Towers, name: str, wanted: Mapping[str, tuple[Any, Any]]) -> None:
  """Raises a UserError for the first option {name: (value, that of the class)} that differs."""
  for option, (have, want) in wanted.items():
    if have != want:
      raise UserError(f'{name} has {option}={want}, not {have}: export the encoder alone with --format hf_vit, or with '
                      '--format jaxmed')
  if towers.text.pool == 'eot' and (towers.end < 0 or (name == 'CLIPModel' and towers.end == 2)):
    raise UserError(f'{name} takes the state of the id that ends a text, which loader.tokenizer lacks here: train with '
                    'loader.tokenizer=clip, or with towers.text.options.pool=last')


def _check_huggingface(towers: Towers) -> str:
  """The kind of transformers' class that holds the towers, or a UserError that names what differs."""
  words = towers.text
  if kind_of(towers) == 'clip':
    _check(towers, 'CLIPModel', {
        'objective.feature': (towers.feature, 'cls'), 'towers.text.options.causal': (words.causal, True),
        'towers.text.options.pool': (words.pool, 'eot')})
    return 'clip'
  _check(towers, 'SiglipModel', {
      'encoder.map_head': (towers.image.map_head, True), 'objective.feature': (towers.feature, 'mean'),
      'objective.project': (towers.projection is not None, False),
      'towers.text.options.causal': (words.causal, False), 'towers.text.options.pool': (words.pool, 'last'),
      'towers.text.options.mask_padding': (words.mask_padding, False)})
  return 'siglip'


def to_huggingface(towers: Towers) -> tuple[dict[str, np.ndarray], dict[str, Any], Towers]:
  """Tensors and config.json of CLIPModel or SiglipModel, and the towers as they are in it."""
  kind = _check_huggingface(towers)
  image, params = canonical(towers.image, towers.params, kind)
  out = {PREFIXES[kind] + name: x for name, x in huggingface.to_tensors(image, params, kind).items()}
  words = split_qkv(text.to_named(towers.text_params))
  head = {name: words.pop(name) for name in list(words) if name.startswith('to_head.')}
  out |= {f'text_model.{name}': x for name, x in renamed(words, text.NAMES[kind]).items()}
  place = 'text_projection' if kind == 'clip' else 'text_model.head'
  out |= {name.replace('to_head', place): x for name, x in head.items()}
  shape = (1,) if kind == 'siglip' else ()
  out['logit_scale'] = np.full(shape, towers.scale, np.float32)
  if towers.bias is not None:
    out['logit_bias'] = np.full(shape, towers.bias, np.float32)
  size = towers.text.out_dim
  if towers.projection is not None:
    out['visual_projection.weight'] = np.asarray(towers.projection).T
  config: dict[str, Any] = {'architectures': ['CLIPModel' if kind == 'clip' else 'SiglipModel'], 'model_type': kind,
            'torch_dtype': 'float32', 'vision_config': vision_config(image, kind), 'text_config': _text_config(towers)}
  if kind == 'clip':
    config |= {'projection_dim': size, 'logit_scale_init_value': towers.scale}
  return out, config, dataclasses.replace(towers, image=image, params=params)


def _text_config(towers: Towers) -> dict[str, Any]:
  words, kind = towers.text, kind_of(towers)
  end = towers.end if towers.end >= 0 else words.vocab_size - 1
  out = {'model_type': f'{kind}_text_model', 'hidden_size': words.embed_dim, 'num_hidden_layers': words.depth,
         'num_attention_heads': words.num_heads, 'intermediate_size': int(words.embed_dim * words.mlp_ratio),
         'hidden_act': ACTS[words.mlp], 'layer_norm_eps': words.norm_epsilon, 'vocab_size': words.vocab_size,
         'max_position_embeddings': words.context, 'attention_dropout': 0.0, 'bos_token_id': max(end - 1, 0),
         'eos_token_id': end, 'pad_token_id': 0}
  return out | ({'projection_dim': words.out_dim} if kind == 'clip' else {'projection_size': words.out_dim})


def from_huggingface(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Towers:
  """The towers of CLIPModel or SiglipModel."""
  kind = config['model_type']
  image, params = huggingface.from_tensors(tensors, config['vision_config'], kind)
  words, text_params = text.from_huggingface(tensors, config['text_config'], kind)
  number = lambda name: float(np.ravel(tensors[name])[0])
  if kind == 'clip':
    end = config['text_config'].get('eos_token_id', 49407)
    return Towers(image, params, words, text_params, tensors['visual_projection.weight'].T, number('logit_scale'),
                  end=words.vocab_size - 1 if end == 2 else end)  # of old folders, which say 2 and mean the largest
  return Towers(image, params, words, text_params, None, number('logit_scale'), number('logit_bias'), 'mean')


def to_open_clip(towers: Towers) -> tuple[dict[str, np.ndarray], dict[str, Any], Towers]:
  """Tensors and model config of open_clip's CLIP or, with a MAP head, CustomTextCLIP, and the towers as in it."""
  words, trunk = towers.text, towers.image.map_head
  pools = {'eot': 'argmax', 'last': 'last'}
  _check(towers, 'open_clip', {
      'objective.project': (towers.projection is not None, not trunk),
      'the number of channels': (towers.image.in_channels, 3)} | (
          {} if words.causal else {'towers.text.options.mask_padding': (words.mask_padding, False)}))
  if words.pool not in pools:
    raise UserError('open_clip has towers.text.options.pool eot and last, not mean: export the encoder alone')
  if 'quick_gelu' in (words.mlp, towers.image.mlp) and words.mlp != towers.image.mlp:
    raise UserError(f'open_clip has quick_gelu in both towers or in none, not encoder.mlp={towers.image.mlp} and '
                    f'towers.text.options.mlp={words.mlp}')
  image, params, out, vision = _to_visual(towers)
  named = renamed(text.to_named(towers.text_params), text.NAMES['open_clip'])
  if 'to_head.bias' in named:
    named |= {f'text_projection.{part}': named.pop(f'to_head.{part}') for part in ('weight', 'bias')}
  else:
    named['text_projection'] = named.pop('to_head.weight').T
  out |= {('text.' if trunk else '') + name: x for name, x in named.items()}
  out['logit_scale'] = np.asarray(towers.scale, np.float32)
  config: dict[str, Any] = {'embed_dim': words.out_dim, 'vision_cfg': vision,
                            'text_cfg': _open_text(words, pools, towers.end)}
  if trunk:
    config['custom_text'] = True
  if words.mlp == 'quick_gelu':
    config['quick_gelu'] = True
  if towers.bias is not None:
    out['logit_bias'] = np.asarray(towers.bias, np.float32)
    config['init_logit_bias'] = towers.bias
  return out, config, dataclasses.replace(towers, image=image, params=params)


def _open_text(words: TextTransformer, pools: Mapping[str, str], end: int) -> dict[str, Any]:
  out = {'context_length': words.context, 'vocab_size': words.vocab_size, 'width': words.embed_dim,
         'heads': words.num_heads, 'layers': words.depth, 'mlp_ratio': words.mlp_ratio,
         'norm_kwargs': {'eps': words.norm_epsilon}, 'pool_type': pools[words.pool],
         'no_causal_mask': not words.causal, 'proj_bias': words.out_bias}
  if words.pool == 'eot' and end != words.vocab_size - 1:  # 'argmax' takes the largest id
    out |= {'pool_type': 'eos', 'eos_id': end}
  return out | ({'act_kwargs': {'approximate': 'tanh'}} if words.mlp == 'gelu_tanh' else {})


def _to_visual(towers: Towers) -> tuple[ViT, Params, dict[str, np.ndarray], dict[str, Any]]:
  """The encoder as open_clip has it, its tensors under `visual.`, and vision_cfg."""
  model = towers.image
  if model.map_head:
    image, params = canonical(model, towers.params, 'siglip')
    return image, params, {f'visual.trunk.{n}': x for n, x in to_timm(image, params).items()}, {
        'image_size': image.image_size[0], 'timm_model_name': _timm_name(image), 'timm_model_pretrained': False,
        'timm_pool': 'map', 'timm_proj': 'none'}
  # `canonical` has no class without a norm before its first block, which open_clip has by no_ln_pre.
  bare = model.clone(layer_scale=0.0, pre_norm=True)
  image, params = canonical(bare, towers.params, 'clip')
  image = image.clone(layer_scale=model.layer_scale, pre_norm=model.pre_norm)
  named = to_timm(image, params)
  named.pop('patch_embed.proj.bias', None)  # which is 0
  named = {**named, 'cls_token': named['cls_token'][0, 0], 'pos_embed': named['pos_embed'][0]}
  out = {f'visual.{n}': x for n, x in renamed(named, _VISUAL).items()}
  out['visual.proj'] = np.asarray(towers.projection)
  vision = {'image_size': image.image_size[0], 'layers': image.depth, 'width': image.embed_dim,
            'head_width': image.embed_dim // image.num_heads, 'mlp_ratio': image.mlp_ratio,
            'patch_size': image.patch_size[0], 'no_ln_pre': not image.pre_norm,
            'pool_type': 'tok' if towers.feature == 'cls' else 'avg', 'norm_kwargs': {'eps': image.norm_epsilon}}
  if image.layer_scale:
    vision['ls_init_value'] = image.layer_scale
  if image.mlp == 'gelu_tanh':
    vision['act_kwargs'] = {'approximate': 'tanh'}
  return image, params, out, vision


def _timm_name(model: ViT) -> str:
  """timm's name of a SigLIP tower, which open_clip makes it by; a UserError where timm has none of these sizes."""
  size, depth = _WIDTHS.get(model.embed_dim, ''), {768: 12, 1024: 24}.get(model.embed_dim)
  shape = (model.depth, model.num_heads, model.mlp_ratio, model.mlp, model.norm_epsilon)
  if not size or shape != (depth, model.embed_dim // 64, 4.0, 'gelu', 1e-6):
    raise UserError('open_clip makes an encoder with encoder.map_head=True by its name in timm, which has '
                    f'vit_base and vit_large with gelu and epsilon 1e-6 alone, not width {model.embed_dim}, depth '
                    f'{model.depth}, mlp={model.mlp}: export with --format hf')
  return f'vit_{size}_patch{model.patch_size[0]}_siglip_{model.image_size[0]}'


def from_open_clip(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Towers:
  """The towers of open_clip's CLIP or CustomTextCLIP; `config` is its model config."""
  image, params = from_visual(tensors, config)
  words, text_params = text.from_open_clip(tensors, config)
  projection = tensors.get('visual.proj', tensors.get('visual.head.proj.weight', np.zeros((0, 0))).T)
  bias = float(np.ravel(tensors['logit_bias'])[0]) if 'logit_bias' in tensors else None
  pool = config['vision_cfg'].get('pool_type', 'tok')
  mean = image.map_head or pool == 'avg'
  ends = config['text_cfg'].get('eos_id', 2) if config['text_cfg'].get('pool_type') == 'eos' else words.vocab_size - 1
  return Towers(image, params, words, text_params, projection if projection.size else None,
                float(np.ravel(tensors['logit_scale'])[0]), bias, 'mean' if mean else 'cls',
                ends if words.pool == 'eot' else -1)


def from_visual(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[ViT, Params]:
  """The encoder of open_clip's CLIP or CustomTextCLIP."""
  told = config['vision_cfg']
  some = {n.removeprefix('visual.'): x for n, x in tensors.items() if n.startswith('visual.') and n != 'visual.proj'}
  size = told.get('image_size', 224)
  size = (size, size) if isinstance(size, int) else tuple(size)
  if told.get('timm_model_name'):
    trunk = {n.removeprefix('trunk.'): x for n, x in some.items() if n.startswith('trunk.')}
    model, p = from_timm(trunk, None if 'so400m' not in told['timm_model_name'] else 16, size)
    return model.clone(mlp='gelu_tanh' if 'so400m' in told['timm_model_name'] else model.mlp), p
  for key in ('attentional_pool', 'final_ln_after_pool', 'qk_norm'):
    if told.get(key):
      raise UserError(f'vision_cfg.{key}={told[key]} has no place here: expected a vision transformer of CLIP')
  named = renamed(some, {theirs: ours for ours, theirs in _VISUAL.items()})
  if 'cls_token' not in named:
    raise UserError('visual.class_embedding is missing: expected a vision transformer, not a ResNet')
  named |= {'cls_token': named['cls_token'].reshape(1, 1, -1), 'pos_embed': named['pos_embed'][None]}
  if 'norm_pre.weight' not in named:
    named['patch_embed.proj.bias'] = np.zeros(named['cls_token'].shape[-1], np.float32)
  heads = named['cls_token'].shape[-1] // told.get('head_width', 64)
  model, p = from_timm(named, heads, size)
  return model.clone(norm_epsilon=(told.get('norm_kwargs') or {}).get('eps', 1e-5), pos_interpolation='antialias',
                     mlp=text.open_activation(config, 'vision_cfg')), p


def on_host(towers: Towers) -> Towers:
  """The towers with weights on the host, as the layouts write them."""
  projection = None if towers.projection is None else np.asarray(towers.projection, np.float32)
  return dataclasses.replace(towers, params=state_dict.host(towers.params), projection=projection,
                             text_params=state_dict.host(towers.text_params))
