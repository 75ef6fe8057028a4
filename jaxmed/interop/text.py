"""Text towers of transformers' CLIP and SigLIP and of open_clip, both ways.

huggingface/transformers, src/transformers/models/{clip,siglip}/modeling_*.py; mlfoundations/open_clip,
src/open_clip/transformer.py (TextTransformer, text_global_pool) and model.py (CLIPTextCfg).

A text of ours ends with its last id that is not 0, and 0 is padding. transformers' CLIP takes the first id
`eos_token_id`, open_clip the largest id: the same where texts end with that id and are padded with 0, as by open_clip's
tokenizer. transformers' own pads with `eos_token_id`: write 0 there.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.errors import UserError, choose
from jaxmed.interop import state_dict
from jaxmed.interop.huggingface import CLIP_BLOCKS, CONFIG, activation, fused_qkv, renamed
from jaxmed.interop.safetensors_io import read_tensors
from jaxmed.interop.state_dict import Params, StateDict
from jaxmed.models.text.transformer import SIGLIP, TextTransformer

OPEN_CONFIG = 'open_clip_config.json'
_OPEN = {'norm1': 'ln_1', 'norm2': 'ln_2', 'attn.proj': 'attn.out_proj', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
         'attn.qkv.weight': 'attn.in_proj_weight', 'attn.qkv.bias': 'attn.in_proj_bias', 'ls1': 'ls_1', 'ls2': 'ls_2'}
OPEN_BLOCKS = {f'blocks.#.{ours}': f'transformer.resblocks.#.{theirs}' for ours, theirs in _OPEN.items()}
# Ours and theirs, without what stands before them in a larger class; '#' is a block. `to_head`: [D, out] kernel.
NAMES: dict[str, dict[str, str]] = {
    'clip': CLIP_BLOCKS | {'token_embed': 'embeddings.token_embedding.weight', 'norm': 'final_layer_norm',
                           'pos_embed': 'embeddings.position_embedding.weight'},
    'open_clip': OPEN_BLOCKS | {'token_embed': 'token_embedding.weight', 'pos_embed': 'positional_embedding',
                                'norm': 'ln_final'}}
NAMES['siglip'] = NAMES['clip']
_USUAL = {'clip': {'layer_norm_eps': 1e-5, 'hidden_act': 'quick_gelu', 'num_attention_heads': 8},
          'siglip': {'layer_norm_eps': 1e-6, 'hidden_act': 'gelu_pytorch_tanh', 'num_attention_heads': 12}}
_OPEN_POOLS = {'argmax': 'eot', 'eos': 'eot', 'last': 'last'}


def to_named(params: Params) -> dict[str, np.ndarray]:
  """Tensors of a text tower by names as timm's; its projection is `to_head.weight` [out, D] and `to_head.bias`."""
  p = state_dict.host(params)
  out = {'token_embed': p['token_embed'], 'pos_embed': p['pos_embed'], 'norm.weight': p['norm']['scale'],
         'norm.bias': p['norm']['bias']} | state_dict.write_blocks(p['transformer']['blocks'])
  if 'head' in p:
    out['to_head.weight'] = p['head']['kernel'].T
    if 'bias' in p['head']:
      out['to_head.bias'] = p['head']['bias']
  return out


def from_named(named: Mapping[str, np.ndarray], num_heads: int, **options: Any) -> tuple[TextTransformer, Params]:
  """The inverse of `to_named`; `options` are fields that no tensor tells."""
  state = StateDict(named, 'text', 'token_embed')
  table = state.take('token_embed', -1, -1)
  vocabulary, dim = table.shape
  p: Params = {'token_embed': table, 'pos_embed': state.take('pos_embed', -1, dim)}
  p['norm'] = {'scale': state.take('norm.weight', dim), 'bias': state.take('norm.bias', dim)}
  blocks, fields = state_dict.read_blocks(state, dim, num_heads)
  p['transformer'] = {'blocks': blocks}
  if fields['layer_scale'] or fields['mlp'] == 'swiglu' or not fields['qkv_bias']:
    raise UserError('a text tower with LayerScale, SwiGLU or without biases has no place here')
  if 'to_head.weight' in state:
    p['head'] = {'kernel': state.take('to_head.weight', -1, dim).T}
    options |= {'out_dim': p['head']['kernel'].shape[1], 'out_bias': 'to_head.bias' in state}
    if options['out_bias']:
      p['head']['bias'] = state.take('to_head.bias', options['out_dim'])
  state.finish('a text transformer of CLIP or SigLIP')
  return TextTransformer(vocab_size=vocabulary, embed_dim=dim, context=len(p['pos_embed']), num_heads=num_heads,
                         depth=fields['depth'], mlp_ratio=fields['mlp_ratio'], **options), p


def named_of(tensors: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
  """Tensors of a text tower by the names of `to_named`, out of those of its class or of both towers."""
  if kind == 'open_clip':
    inner = any(name.startswith('text.') for name in tensors)  # CustomTextCLIP
    some = {n.removeprefix('text.'): x for n, x in tensors.items() if not inner or n.startswith('text.')}
    some = {n: x for n, x in some.items() if not n.startswith('visual.') and n not in ('logit_scale', 'logit_bias')}
    if 'text_projection' in some:
      some['to_head.weight'] = some.pop('text_projection').T
  else:
    some = {n.removeprefix('text_model.'): x for n, x in tensors.items()
            if n.startswith(('text_model.', 'text_projection.')) and not n.endswith('position_ids')} or dict(tensors)
  names = {theirs: ours for ours, theirs in NAMES[kind].items()}
  return fused_qkv(renamed(some, names | {'text_projection': 'to_head', 'head': 'to_head'}))


def from_huggingface(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], kind: str
                     ) -> tuple[TextTransformer, Params]:
  """The text tower of transformers' CLIP or SigLIP; `config` is that of the text tower."""
  told: dict[str, Any] = {**_USUAL[kind], **config}
  options = {'causal': True, 'pool': 'eot'} if kind == 'clip' else {k: SIGLIP[k] for k in ('causal', 'pool')}
  return from_named(named_of(tensors, kind), told['num_attention_heads'], mlp=activation(told['hidden_act']),
                    norm_epsilon=told['layer_norm_eps'], mask_padding=kind == 'clip', **options)


def open_activation(config: Mapping[str, Any], part: str) -> str:
  """The activation of a tower by open_clip's model config."""
  options = config[part].get('act_kwargs') or {}
  if options not in ({}, {'approximate': 'tanh'}):
    raise UserError(f'{part}.act_kwargs {options} is unknown here: expected approximate=tanh')
  return 'quick_gelu' if config.get('quick_gelu') else 'gelu_tanh' if options else 'gelu'


def from_open_clip(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[TextTransformer, Params]:
  """The text tower of open_clip's CLIP or CustomTextCLIP; `config` is its model config."""
  told = config['text_cfg']
  for key in ('hf_model_name', 'embed_cls', 'final_ln_after_pool', 'qk_norm'):
    if told.get(key):
      raise UserError(f'text_cfg.{key}={told[key]} has no place here: expected a text transformer of open_clip itself')
  pool = _OPEN_POOLS[choose('text_cfg.pool_type', told.get('pool_type', 'argmax'), _OPEN_POOLS)]
  causal = not told.get('no_causal_mask', False)
  return from_named(named_of(tensors, 'open_clip'), told.get('heads', 8), mlp=open_activation(config, 'text_cfg'),
                    norm_epsilon=(told.get('norm_kwargs') or {}).get('eps', 1e-5), causal=causal, pool=pool,
                    mask_padding=causal)


def read_text(path: str | os.PathLike, like: TextTransformer | None = None) -> tuple[TextTransformer, Params]:
  """The text tower of a folder of transformers or open_clip, or of a file of either's tensors.

  Args:
    like: the model that a file without a config is of; it says heads, activation and what else no tensor tells.
  Raises:
    UserError: no such weights, an activation that is unknown here, or a file without `like`.
  """
  folder = pathlib.Path(path)
  tensors = read_tensors(path)[0]
  try:
    if (folder / OPEN_CONFIG).is_file():
      return from_open_clip(tensors, files.read_json(folder / OPEN_CONFIG)['model_cfg'])
    if (folder / CONFIG).is_file():
      config = files.read_json(folder / CONFIG)
      kind = str(config.get('model_type')).removesuffix('_text_model')
      choose('model_type', kind, _USUAL)
      return from_huggingface(tensors, config.get('text_config', config), kind)
    if like is None:
      raise UserError('does not say its heads and activation: name towers.text.model and its options, or give a folder '
                      f'with {CONFIG} or {OPEN_CONFIG}')
    kind = 'open_clip' if any(n.endswith('transformer.resblocks.0.ln_1.weight') for n in tensors) else 'clip'
    return from_named(named_of(tensors, kind), like.num_heads, **{
        k: getattr(like, k) for k in ('mlp', 'norm_epsilon', 'causal', 'pool', 'mask_padding')})
  except UserError as e:
    raise UserError(f'{path}: {e}') from e
