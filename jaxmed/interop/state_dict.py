"""PyTorch state dicts of vision transformers, read with every tensor accounted for, and their block layout.

timm's VisionTransformer and the official ChannelViT both descend from DeiT and name a block's tensors alike:
`blocks.{i}.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.{weight,bias}`. A linear weight is [out, in]
there and [in, *out] here.
"""

import functools
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.interop.aliases import timm_names
from jaxmed.models.registry import SIZES

logger = logging.getLogger('jaxmed.interop')

ANCHOR = 'patch_embed.proj.weight'
WEIGHTS = ('ema', 'plain')
# timm's names (timm/models/_helpers.py: state_dict_ema, model_ema), other trainers', teachers of self-distillation.
_AVERAGE = re.compile(r'(^|[._])(ema|teacher)[._]')
Params = dict[str, Any]


class StateDict:
  """Tensors that are taken out by name, so that what nobody asked for is seen at the end."""

  def __init__(self, tensors: Mapping[str, np.ndarray], layout: str, anchor: str = ANCHOR):
    self.layout = layout
    self.tensors = {k: np.asarray(v, np.float32) for k, v in timm_names(strip_prefix(tensors, layout, anchor)).items()}

  def __contains__(self, name: str) -> bool:
    return name in self.tensors

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of the tensor `name`, which stays."""
    if name not in self.tensors:
      raise UserError(f'not weights in the {self.layout} layout: tensor {name!r} is missing')
    return self.tensors[name].shape

  def take(self, name: str, *shape: int) -> np.ndarray:
    """Removes and returns the tensor `name`; -1 in `shape` fits any length."""
    self.shape(name)
    value = self.tensors.pop(name)
    if value.ndim != len(shape) or any(a not in (-1, b) for a, b in zip(shape, value.shape, strict=True)):
      want = [n if n >= 0 else 'any' for n in shape]
      raise UserError(f'tensor {name!r} has shape {list(value.shape)}, expected {want}')
    return value

  def finish(self, expected: str = 'a plain pre-norm transformer with one final norm') -> None:
    """Drops the classifier with a note; any other tensor left over would change the features: an error."""
    heads = sorted(k for k in self.tensors if k.startswith(('head.', 'head_dist.', 'fc.')))
    rest = sorted(self.tensors.keys() - set(heads))
    if rest:
      raise UserError(f'tensor {rest[0]!r} ({len(rest)} such) has no place in a {self.layout} model here: '
                      f'expected {expected}')
    if heads:
      logger.warning('left out the classifier: %s', ', '.join(heads))


def is_average(name: str) -> bool:
  """Whether a tensor is of averaged weights (EMA), by the words before its own name, as in state_dict_ema."""
  return bool(_AVERAGE.search(name))


def of_weights(tensors: Mapping[str, np.ndarray], weights: str | None) -> dict[str, np.ndarray]:
  """The averaged ('ema') or other ('plain') tensors of a checkpoint; all for None, of which `strip_prefix` chooses.

  Raises:
    UserError: an unknown word, or there are none of these.
  """
  if weights is None:
    return dict(tensors)
  wanted = choose('weights', weights, WEIGHTS) == 'ema'
  found = {k: v for k, v in tensors.items() if is_average(k) == wanted}
  if not found:
    raise UserError(f'has no {weights} weights: it has {"plain" if wanted else "EMA"} ones alone, leave --weights out')
  return found


def strip_prefix(tensors: Mapping[str, np.ndarray], layout: str, anchor: str = ANCHOR) -> dict[str, np.ndarray]:
  """The encoder's tensors without what wraps it: 'module.', 'backbone.', 'teacher.backbone.', 'model.', ...

  Of plain and averaged weights (EMA) the averaged ones are taken, as timm's load_state_dict(use_ema=True) does; the
  teacher is the average of a student. What lies outside the encoder is left out with a note.
  """
  prefixes = [k[: -len(anchor)] for k in tensors if k == anchor or k.endswith('.' + anchor)]
  if not prefixes:
    raise UserError(f'not weights in the {layout} layout: tensor {anchor!r} is missing')
  prefixes.sort(key=lambda p: (not is_average(p), p != '', len(p), p))
  prefix = prefixes[0]
  if len(prefixes) > 1:
    both = {is_average(p) for p in prefixes} == {True, False}
    logger.warning('several encoders (%s): took %r%s', ', '.join(map(repr, prefixes)), prefix,
                   ', the EMA weights (--weights plain takes the others)' if both else '')
  outside = sum(not k.startswith(prefix) for k in tensors)
  if outside:
    logger.warning('left out %d tensors outside %r', outside, prefix)
  return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def host(params: Params) -> Params:
  """Parameters as nested dicts of float32 numpy arrays, without Flax's logical-axis boxes."""
  return jax.tree.map(lambda a: np.asarray(jax.device_get(a), np.float32), nn.meta.unbox(dict(params)))


@functools.lru_cache(maxsize=64)
def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter of a model by its path, as 'transformer/blocks/mlp/fc1/kernel'."""
  image = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
  params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)['params'])
  return {k: v.shape for k, v in flax.traverse_util.flatten_dict(params, sep='/').items()}


def infer_heads(dim: int, depth: int, num_heads: int | None) -> int:
  """Number of heads, which no shape shows: as given; else of the registered size with this width and depth
  (giant 16, huge 16, ...); else dim // 64, noted.
  """
  if num_heads is None:
    known = [s['num_heads'] for s in SIZES.values() if (s['embed_dim'], s['depth']) == (dim, depth)]
    if not known and dim % 64:
      raise UserError(f'the weights do not tell the number of heads of width {dim}: pass --num-heads')
    num_heads = known[0] if known else dim // 64
    logger.info('width %d, depth %d: took %d heads', dim, depth, num_heads)
  if num_heads < 1 or dim % num_heads:
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]
    near = min(divisors, key=lambda n: abs(n - num_heads))
    raise UserError(f'num_heads {num_heads} does not divide the width {dim}: nearest is {near}')
  return num_heads


def infer_size(name: str, count: int, patch: tuple[int, ...],
               image_size: tuple[int, ...] | None) -> tuple[int, ...]:
  """Image size of `count` patches: the given one, checked, or a square."""
  if image_size is None:
    side = math.isqrt(count)
    if side * side != count or not count:
      raise UserError(f'{name} has {count} patch positions, not a square: pass --image-size')
    return tuple(side * p for p in patch)
  if len(image_size) != len(patch) or any(n % p for n, p in zip(image_size, patch, strict=True)) or math.prod(
      n // p for n, p in zip(image_size, patch, strict=True)) != count:
    raise UserError(f'{name} has {count} patch positions, which image size {tuple(image_size)} with '
                    f'patches of {patch} does not have')
  return tuple(image_size)


def ratio_of(hidden: int, dim: int) -> float:
  """The mlp_ratio for which int(dim * mlp_ratio) is `hidden` in floating point too."""
  ratio = hidden / dim
  return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def write_blocks(blocks: Params) -> dict[str, np.ndarray]:
  """Stacked blocks [L, ...] -> tensors of each block; SwiGLU as timm's SwiGLUPacked (gate, then value)."""
  depth = blocks['norm1']['scale'].shape[0]
  out = {}
  for i in range(depth):
    at = f'blocks.{i}.'
    for norm in ('norm1', 'norm2'):
      out[f'{at}{norm}.weight'] = blocks[norm]['scale'][i]
      out[f'{at}{norm}.bias'] = blocks[norm]['bias'][i]
    for room, name in (('attn', 'qkv'), ('attn', 'proj'), ('mlp', 'fc1'), ('mlp', 'fc2')):
      layer = blocks[room][name]
      kernel = layer['kernel'][i]
      out[f'{at}{room}.{name}.weight'] = kernel.reshape(kernel.shape[0], -1).T
      if 'bias' in layer:
        out[f'{at}{room}.{name}.bias'] = layer['bias'][i].reshape(-1)
    for scale in ('ls1', 'ls2'):
      if scale in blocks:
        out[f'{at}{scale}.gamma'] = blocks[scale][i]
  return out


def read_blocks(state: StateDict, dim: int, num_heads: int | None) -> tuple[Params, dict[str, Any]]:
  """The inverse of `write_blocks`: stacked parameters, and the model fields that they imply.

  SwiGLU is recognised packed (`mlp.fc1` twice as wide as `mlp.fc2` reads) and split (`mlp.fc1_g`,
  `mlp.fc1_x`).
  """
  depth = 0
  while f'blocks.{depth}.norm1.weight' in state:
    depth += 1
  if not depth:
    raise UserError(f"not weights in the {state.layout} layout: tensor 'blocks.0.norm1.weight' is missing")
  heads = infer_heads(dim, depth, num_heads)
  blocks = [_read_block(state, f'blocks.{i}.', dim, heads) for i in range(depth)]
  structures = [jax.tree.map(np.shape, b) for b in blocks]
  for i, structure in enumerate(structures):
    if structure != structures[0]:
      raise UserError(f'blocks.{i} has other tensors or shapes than blocks.0: expected equal blocks')
  fields = {'depth': depth, 'num_heads': heads, 'qkv_bias': 'bias' in blocks[0]['attn']['qkv'],
            'layer_scale': 1e-5 if 'ls1' in blocks[0] else 0.0,
            'mlp': 'swiglu' if blocks[0]['mlp']['fc1']['kernel'].ndim == 3 else 'gelu',
            'mlp_ratio': ratio_of(blocks[0]['mlp']['fc2']['kernel'].shape[0], dim)}
  return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks), fields


def _read_block(state: StateDict, at: str, dim: int, heads: int) -> Params:
  norm = lambda name: {'scale': state.take(f'{at}{name}.weight', dim),
                       'bias': state.take(f'{at}{name}.bias', dim)}
  shape = (3, heads, dim // heads)
  qkv = {'kernel': state.take(f'{at}attn.qkv.weight', 3 * dim, dim).T.reshape(dim, *shape)}
  if f'{at}attn.qkv.bias' in state:
    qkv['bias'] = state.take(f'{at}attn.qkv.bias', 3 * dim).reshape(shape)
  block = {'norm1': norm('norm1'), 'norm2': norm('norm2'),
           'attn': {'qkv': qkv, 'proj': _linear(state, f'{at}attn.proj', dim, dim)},
           'mlp': _read_mlp(state, f'{at}mlp.', dim)}
  if f'{at}ls1.gamma' in state:
    block |= {name: state.take(f'{at}{name}.gamma', dim) for name in ('ls1', 'ls2')}
  return block


def _read_mlp(state: StateDict, at: str, dim: int) -> Params:
  fc2 = _linear(state, f'{at}fc2', -1, dim)
  hidden = fc2['kernel'].shape[0]
  if f'{at}fc1_g.weight' in state:  # timm's SwiGLU
    parts = [_linear(state, f'{at}{name}', dim, hidden) for name in ('fc1_g', 'fc1_x')]
    return {'fc1': {'kernel': np.stack([p['kernel'] for p in parts], axis=1),  # [D, 2, hidden]
                    'bias': np.stack([p['bias'] for p in parts])}, 'fc2': fc2}
  fc1 = _linear(state, f'{at}fc1', dim, -1)
  width = fc1['kernel'].shape[1]
  if width == 2 * hidden:  # timm's SwiGLUPacked: the gate first
    fc1 = {'kernel': fc1['kernel'].reshape(dim, 2, hidden), 'bias': fc1['bias'].reshape(2, hidden)}
  elif width != hidden:
    raise UserError(f'tensor {at}fc1.weight makes {width} features and {at}fc2.weight reads {hidden}: '
                    f'expected {hidden} (GELU) or {2 * hidden} (SwiGLU)')
  return {'fc1': fc1, 'fc2': fc2}


def _linear(state: StateDict, name: str, features_in: int, features_out: int) -> Params:
  return {'kernel': state.take(f'{name}.weight', features_out, features_in).T,
          'bias': state.take(f'{name}.bias', features_out)}
