"""Adapters: a few parameters beside the frozen ones of a transformer, which alone are trained.

Each is a part of the encoder under a name that begins with MARK, so that checkpoints, averages, teachers and shardings
hold them as all parameters. At the start every kind leaves the features as they were: what ends a branch begins at
zero, and attention to prompts has a gate that does.

  lora         W x + (alpha / rank) B A x for the projections `targets`, A uniform and B zero (Hu et al. 2021, arXiv
               2106.09685; microsoft/LoRA, loralib/layers.py). Linear: `merged` folds it into W.
  houlsby      x + up(gelu(down(x))) on what attention and MLP give, before their residuals (Houlsby et al. 2019,
               arXiv 1902.00751).
  adaptformer  SCALE * up(relu(down(x))) beside the MLP, on its input before the norm (Chen et al. 2022, arXiv
               2205.13535; ShoufaChen/AdaptFormer, models/adapter.py and custom_modules.py).
  vpt          prompts, tokens that are learned, before the others (Jia et al. 2022, arXiv 2203.12119; KMnP/vpt,
               src/models/vit_prompt/vit.py). vpt_deep: each block has its own in their place.
  dvpt         prompts that ask what a bottleneck makes of the tokens, by cross-attention, and beside each MLP that
               bottleneck; one for `share` blocks (He et al. 2023, arXiv 2307.09787; NKUhealong/DVPT, code/model.py).
  depthwise    x + up(relu(conv(relu(down(x))))) of patches before each block, where conv is a 3x3x3 convolution of each
               channel by itself: how a 2D network sees along the third axis (Gong et al. 2023, arXiv 2306.13465;
               med-air/3DSAM-adapter, modeling/image_encoder.py).

What differs from the published codes: `houlsby` begins at exactly zero (adapter-bert: near it); prompts have the
zero-initialised gate of LLaMA-Adapter (arXiv 2303.16199), and with `gate` False none, as published; the
cross-attention of `dvpt` is used (its ViT file computes it and drops it) and is taken in the width of the bottleneck;
`depthwise` has no relu at its end, which would have no slope at zero, and leaves the class token alone (SAM has none).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers.linear import Dense

MARK = 'adapter'  # how the names of adapters' parameters begin
# What each kind reads of the config, beside `also`.
KINDS: dict[str, tuple[str, ...]] = {
    'lora': ('rank', 'alpha', 'targets', 'dropout'), 'houlsby': ('rank', 'dropout'),
    'adaptformer': ('rank', 'dropout'), 'vpt': ('prompts', 'gate', 'dropout'),
    'vpt_deep': ('prompts', 'gate', 'dropout'), 'dvpt': ('rank', 'prompts', 'share', 'gate'), 'depthwise': ('rank',)}
ABOUT = {
    'lora': 'products of two thin matrices on chosen projections; merged into the weights of a product',
    'houlsby': 'bottlenecks after attention and MLP', 'adaptformer': 'bottlenecks beside the MLP',
    'vpt': 'prompt tokens before the first block', 'vpt_deep': 'prompt tokens of each block',
    'dvpt': 'prompts that look at the features through a shared bottleneck',
    'depthwise': 'bottlenecks with a depthwise convolution over the grid: 2D networks for volumes'}
TARGETS = {'q': ('qkv', 0), 'k': ('qkv', 1), 'v': ('qkv', 2), 'proj': ('proj', None), 'fc1': ('fc1', None),
           'fc2': ('fc2', None)}  # the projection, and which part of it
# Of microsoft/LoRA (8 is the rank of its table 6), Houlsby and AdaptFormer, DVPT; 3DSAM-adapter halves the width.
RANKS = {'lora': 8, 'houlsby': 64, 'adaptformer': 64, 'dvpt': 20}
ALPHA = 2.0  # alpha over rank in microsoft/LoRA's examples (16 and 32)
PROMPTS = {'vpt': 5, 'vpt_deep': 5, 'dvpt': 50}  # KMnP/vpt, src/configs/config.py; DVPT, model.py
SCALE = 0.1  # of AdaptFormer (ffn_adapter_scalar)
NORMS = ('norm1', 'norm2', 'norm')
TRAINS = {'houlsby': NORMS, 'depthwise': NORMS}  # what papers train of the encoder beside adapters
PROMPT_STD = 0.02  # of DVPT's prompts, as in its Swin and SegFormer files


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What an encoder's adapters are.

  Attributes:
    name: one of KINDS. rank: their inner width. alpha: of lora, over rank the factor on what it adds.
    targets: projections that lora has, of TARGETS.
    dropout: rate on the input of lora, inside of bottlenecks, on prompts.
    prompts: tokens that are learned. gate: whether attention to them begins at zero. share: blocks that share a
      bottleneck of dvpt. fan_in: numbers of a patch, for the first values of vpt.
  """

  name: str
  rank: int = 0
  alpha: float = 0.0
  targets: tuple[str, ...] = ('q', 'v')
  dropout: float = 0.0
  prompts: int = 0
  gate: bool = True
  share: int = 3
  fan_in: int = 0

  @property
  def linear(self) -> bool:
    """Whether it can be merged into the weights."""
    return self.name == 'lora'


def is_adapter(path: tuple[str, ...]) -> bool:
  """Whether a parameter is an adapter's."""
  return any(name.startswith(MARK) for name in path)


def inner_width(name: str, dim: int) -> int:
  """The rank that a kind has by default in a network of width `dim`; 0 where it has none."""
  return dim // 2 if name == 'depthwise' else RANKS.get(name, 0)


class LowRank(nn.Module):
  """LoRA of one projection: [..., D] -> [..., *features], zero at first; `axes` as of the projection."""

  adapter: Adapter
  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  dtype: Any
  fold: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    rank = self.adapter.rank
    down = Dense((rank,), (self.axes[0], None), False, 'torch_uniform', self.dtype, self.fold, name='down')
    up = Dense(self.features, (None, *self.axes[1:]), False, 'zeros', self.dtype, name='up')
    return (self.adapter.alpha / rank) * up(down(dropped(self, self.adapter.dropout, x)))


class Bottleneck(nn.Module):
  """[B, N, D] -> [B, N, D], zero at first: down to the rank, `act`, dropout, up."""

  adapter: Adapter
  act: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    down = Dense((self.adapter.rank,), ('embed', None), True, 'torch_uniform', self.dtype, name='down')(x)
    hidden = kernels.gelu(down) if self.act == 'gelu' else jax.nn.relu(down)
    hidden = dropped(self, self.adapter.dropout, hidden)
    return Dense((x.shape[-1],), (None, 'embed'), True, 'zeros', self.dtype, name='up')(hidden)


class Depthwise(nn.Module):
  """Patches [B, M, D] of one or several grids, one after the other -> what is added to them, zero at first."""

  adapter: Adapter
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, grid: tuple[int, ...], valid: jax.Array | None) -> jax.Array:
    rank, axes = self.adapter.rank, len(grid)
    hidden = jax.nn.relu(Dense((rank,), ('embed', None), True, 'torch_uniform', self.dtype, name='down')(x))
    if valid is not None:  # which may be anything
      hidden = jnp.where(valid[..., None], hidden, 0)
    law = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=-2, out_axis=-1)
    kernel = self.param('kernel', nn.with_logical_partitioning(law, (None,) * (axes + 2)), (*(3,) * axes, 1, rank))
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,)), (rank,))
    maps = hidden.reshape(-1, *grid, rank)
    letters = 'DHW'[3 - axes:]
    out = jax.lax.conv_general_dilated(maps, kernel.astype(self.dtype), (1,) * axes, 'SAME', feature_group_count=rank,
                                       dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'))
    hidden = jax.nn.relu(out + bias.astype(self.dtype)).reshape(hidden.shape)
    return Dense((x.shape[-1],), (None, 'embed'), True, 'zeros', self.dtype, name='up')(hidden)


def in_training(adapter: Adapter | None, train: bool) -> Adapter | None:
  """The adapter, without its dropout outside of training."""
  return adapter if adapter is None or train else dataclasses.replace(adapter, dropout=0.0)


def dropped(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
  """Dropout where the module is given a stream of that name, as in training."""
  if not rate or not module.has_rng('dropout'):
    return x
  keep = jax.random.bernoulli(module.make_rng('dropout'), 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0)


def first_prompts(adapter: Adapter, dim: int) -> nn.initializers.Initializer:
  """The law of prompts: of vpt Xavier's of a patch embedding, of dvpt normal."""
  if adapter.name == 'dvpt':
    law = nn.initializers.normal(PROMPT_STD)
  else:
    bound = math.sqrt(6 / (adapter.fan_in + dim))
    law = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
  return nn.with_logical_partitioning(law, (None, 'embed'))


def shared_bottlenecks(module: nn.Module, adapter: Adapter, depth: int, dim: int) -> dict[str, jax.Array]:
  """Of dvpt the parameters [L, ...] of the bottleneck of each block, those of `share` blocks in a row being one."""
  count, rank = -(-depth // adapter.share), adapter.rank
  near = lambda fan_in: lambda key, shape, dtype=jnp.float32: jax.random.uniform(
      key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)
  zeros = nn.initializers.zeros_init()
  laws: dict[str, Any] = {
      'down': (near(dim), ('embed', None), (dim, rank)), 'down_bias': (near(dim), (None,), (rank,)),
      'up': (near(rank), (None, 'embed'), (rank, dim)), 'up_bias': (near(rank), ('embed',), (dim,)),
      'gate': (zeros, (None,), (1,))}
  out = {}
  for name, (law, axes, shape) in laws.items():
    boxed = nn.with_logical_partitioning(law, (None, *axes))
    each = module.param(f'{MARK}_{name}', boxed, (count, *shape), jnp.float32)
    out[name] = jnp.repeat(each, adapter.share, axis=0)[:depth]
  return out


def dynamic_prompts(p: Mapping[str, jax.Array], x: jax.Array, prompts: int, valid: jax.Array | None) -> jax.Array:
  """What dvpt adds to prompts and tokens [B, P + N, D] beside a block's MLP, zero while its gate is.

  z = quick_gelu(x down); a prompt takes softmax(z_p z^T / sqrt(rank)) z over the tokens too; all go up and by the gate.
  p: of one block, see `shared_bottlenecks`. valid: [B, P + N] bool, tokens that are there; None for all.
  """
  p = {name: value.astype(x.dtype) for name, value in p.items()}
  z = x @ p['down'] + p['down_bias']
  z = z * jax.nn.sigmoid(1.702 * z)
  ask, answer = z[:, :prompts], z[:, prompts:]
  one_head = lambda a: a[:, :, None]
  mask = None if valid is None else valid[:, prompts:]
  found = kernels.attention(one_head(ask), one_head(answer), one_head(answer), mask)[:, :, 0]
  z = jnp.concatenate([ask + found, answer], axis=1)
  return p['gate'] * (z @ p['up'] + p['up_bias'])


def merged(adapter: Adapter, params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of the encoder alone with the same features: kernel + (alpha / rank) down up, and no adapters.

  Raises:
    ValueError: adapters that are not linear.
  """
  if not adapter.linear:
    raise ValueError(f'{adapter.name} is not linear: it has no weights to be merged into')
  out = {name: merged(adapter, part) if isinstance(part, Mapping) else part for name, part in params.items()
         if not name.startswith(MARK)}
  for name, part in params.items():
    if name.startswith(MARK):
      projection, place = TARGETS[name.removeprefix(MARK + '_')]
      kernel = out[projection]['kernel']
      where = (slice(None),) * 2 + (() if place is None else (place,))  # after blocks and inputs
      down, up = part['down']['kernel'], part['up']['kernel']
      more = jnp.einsum('ldr,lrf->ldf', down, up.reshape(*up.shape[:2], -1), precision='highest')
      more = (adapter.alpha / adapter.rank) * more
      kernel = jnp.asarray(kernel).at[where].add(more.reshape(kernel[where].shape))
      out[projection] = out[projection] | {'kernel': kernel}
  return out
