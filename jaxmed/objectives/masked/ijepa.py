"""I-JEPA: latents of target blocks, predicted from a context block (Assran et al. 2023; facebookresearch/ijepa)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.predictor import BlockPredictor
from jaxmed.models.layers.tokens import grid_of
from jaxmed.objectives.base import Method
from jaxmed.objectives.networks import (
  Clock,
  encode_shown,
  inputs,
  on_own_grids,
  own_grids,
  ramp,
  token_slots,
  with_stats,
)

# Most tokens of a context, as a share: a block of 0.85 to 1 without four targets leaves 0.47 on average, or 0.43 by the
# published blocks; the shortest of 128 of these have 0.26, and of 400 batches none had more than 0.37.
CONTEXT, CUT_CONTEXT = 0.6, 0.4
BLOCKS = ('uniform', 'published')


@dataclasses.dataclass(frozen=True)
class IJEPA(Method):
  """Predicts a moving-average encoder's features of a few blocks from the features of their context.

  Follows src/train.py and src/masks/multiblock.py: the sizes of target and context blocks are drawn once a batch, their
  places for each sample, the context leaves out every target; smooth L1 loss to layer-normalised features. Channel
  tokens share the blocks: a block is a place in all channels. Contexts of more than CONTEXT of the tokens are thinned
  out at random.

  Attributes:
    blocks: 'uniform' places, up to the whole grid; or 'published': each side of a block is below the grid's, that of a
      context too, and its corner is drawn without the last place, so no block reaches the last row or column.
    context_group: samples whose contexts are cut to the shortest of them, in raster order; 0 for no cut. The official
      code cuts those of a GPU, 128 in its configs, and draws a context of 10 tokens or fewer again; not done here.
    num_targets: blocks a sample. target_scale, context_scale: share of the tokens that a block covers.
    target_aspect: height over width of target blocks.
    momentum_start, momentum_end: of the target encoder, linear over the run.
    predictor_*: width, blocks and heads of the predictor. 0 follows the encoder: 384 wide, 6 blocks (12 from a width
      of 1280 on), heads of width 32 (the official code takes the encoder's: 16 for ViT-H); narrower encoders get half
      their own width, at least 64, and 2 blocks below 384.
  """

  encoder: Encoder
  num_targets: int = 4
  target_scale: tuple[float, float] = (0.15, 0.2)
  target_aspect: tuple[float, float] = (0.75, 1.5)
  context_scale: tuple[float, float] = (0.85, 1.0)
  blocks: str = 'uniform'
  context_group: int = 0
  momentum_start: float = 0.996
  momentum_end: float = 1.0
  predictor_dim: int = 0
  predictor_depth: int = 0
  predictor_heads: int = 0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (1e-3, 2048)
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'pos': 'sincos', 'class_token': False, 'masking': 'sparse', 'patch_init': ''},
      'optimizer': {'weight_decay': 0.04, 'final_weight_decay': 0.4, 'final_learning_rate': 1e-6},
      'augment': {'scale': (0.3, 1.0)},
  }

  def __post_init__(self):
    for name in ('target_scale', 'context_scale'):
      low, high = vars(self)[name]
      if not 0 < low <= high <= 1:
        raise UserError(f'objective.{name} {vars(self)[name]} must be two numbers with 0 < low <= high <= 1')
    choose('objective.blocks', self.blocks, BLOCKS)
    if self.num_targets < 1:
      raise UserError(f'objective.num_targets {self.num_targets} must be at least 1')
    dim, _, heads = self._size
    if dim % heads:
      raise UserError(f'objective.predictor_heads {heads} does not divide predictor_dim {dim}')

  @property
  def _size(self) -> tuple[int, int, int]:
    width = self.encoder.embed_dim
    dim = self.predictor_dim or (384 if width >= 768 else max(width // 2, 64))
    depth = self.predictor_depth or (12 if width >= 1280 else 6 if width >= 384 else 2)
    return dim, depth, self.predictor_heads or max(dim // 32, 1)

  @property
  def predictor(self) -> BlockPredictor:
    """The predictor that goes with the encoder."""
    e = self.encoder
    dim, depth, heads = self._size
    return BlockPredictor(grid_of(e.image_size, e.patch_size), e.embed_dim, e.in_channels if e.per_channel else 0, dim,
                          depth, heads, e.remat, e.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    keys = jax.random.split(rng, 3)
    encoder = self.encoder.init(keys[0], **inputs(batch))['params']
    shown, visible, wanted, asked = self._blocks(keys[1], batch)
    latent = jnp.zeros((*shown.shape, self.encoder.embed_dim))
    predictor = self.predictor.init(keys[2], latent, shown, visible, wanted, asked, batch['channels'])['params']
    return {'params': {'encoder': encoder, 'predictor': predictor},
            'target': {'encoder': jax.tree.map(jnp.copy, encoder)}, 'extra': {}}

  def encoder_params(self, variables: Variables) -> Any:
    """Weights of the target encoder."""
    return variables['target']['encoder']

  def momentum(self, step: jax.Array) -> jax.Array:
    """EMA factor of the target encoder."""
    return ramp(self.momentum_start, self.momentum_end, step, self.clock.steps)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean smooth L1 loss over the tokens of all target blocks of the global batch."""
    predicted, target, asked, stats = self._predict(variables, batch, rng, train)
    off = jnp.abs(predicted.astype(jnp.float32) - target)
    error = jnp.where(off < 1, 0.5 * jnp.square(off), off - 0.5).mean(axis=-1)  # [B, M, T]
    loss = jnp.where(asked, error, 0.0).sum() / jnp.maximum(asked.sum(), 1)
    spread = jnp.where(asked[..., None], target, 0.0).std(axis=(0, 1, 2)).mean()
    metrics = {'ijepa_loss': loss, 'target_std': spread, 'momentum': self.momentum(step)}
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])

  def _predict(self, variables: Variables, batch: Batch, rng: jax.Array, train: bool):
    """Predictions and targets [B, M, T, D] float32, which of them count [B, M, T], new running statistics."""
    block_key, drop_key = jax.random.split(rng)
    shown, visible, wanted, asked = self._blocks(block_key, batch)
    params = variables['params']
    context, stats = encode_shown(self.encoder, params['encoder'], batch, shown, visible, train, {'dropout': drop_key})
    predicted = self.predictor.apply({'params': params['predictor']}, context.patches, shown, visible, wanted, asked,
                                     batch['channels'])
    whole = self.encoder.apply({'params': variables['target']['encoder']}, **inputs(batch))
    target = jax.lax.stop_gradient(_standardised(whole.patches))
    target = jnp.take_along_axis(target, wanted.reshape(wanted.shape[0], -1, 1), axis=1)
    return predicted, target.reshape(*wanted.shape, -1), asked, stats

  def _blocks(self, rng: jax.Array, batch: Batch):
    """Places among the N tokens: context [B, K] and which of it is no padding, targets [B, M, T] and likewise."""
    grid, count, valid = token_slots(self.encoder, batch)
    size, cells = batch['image'].shape[0], math.prod(grid)
    channels = count // cells
    keys = jax.random.split(rng, 5)
    number = (size, self.num_targets)
    inner = self.blocks == 'published'
    targets = place_blocks(keys[0], keys[1], number, grid, self.target_scale, self.target_aspect, True, inner)
    context = place_blocks(keys[2], keys[3], (size, 1), grid, self.context_scale, (1.0, 1.0), inner, inner)[:, 0]
    own = own_grids(self.encoder, batch)
    targets, context = on_own_grids(targets, grid, own), on_own_grids(context & ~targets.any(axis=1), grid, own)
    share = CONTEXT
    if self.context_group:
      share, context = CUT_CONTEXT, cut_to_shortest(context, self.context_group, math.ceil(CUT_CONTEXT * cells))
    spread = lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (channels,))  # every channel has the same blocks
    exists = jnp.ones((size, count), bool) if valid is None else valid
    first = lambda mask, most, key: _first(mask, most, None if key is None else jax.random.uniform(key, mask.shape))
    shown, visible = first(spread(context) & exists, max(1, math.ceil(share * count)), keys[4])
    most = channels * largest_block(grid, self.target_scale, self.target_aspect)
    wanted, asked = first(spread(targets) & exists[:, None], most, None)
    return shown, visible, wanted, asked


def _standardised(x: jax.Array) -> jax.Array:
  """Layer normalisation without weights, float32."""
  x = x.astype(jnp.float32)
  return (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def _first(mask: jax.Array, most: int, noise: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Indices [..., most] of True places of mask [..., N], in order or by `noise`, and which are no padding."""
  rank = jnp.arange(mask.shape[-1]) / mask.shape[-1] if noise is None else noise
  index = jnp.argsort(jnp.where(mask, rank, 2.0), axis=-1)[..., :most]
  return index, jnp.take_along_axis(mask, index, axis=-1)


def block_sides(draw: Any, grid: tuple[int, ...], scale: tuple[float, float], aspect: tuple[float, float], less: bool,
                np: Any = jnp) -> list[Any]:
  """Sides of a block for a uniform `draw`; one number sets both share and aspect, as in the official code.

  The last two axes are stretched by the aspect (height over width), other axes are not. `less` keeps each side below
  the grid's.
  """
  rank, cells = len(grid), math.prod(grid)
  share = np.floor(cells * (scale[0] + draw * (scale[1] - scale[0])))
  ratio = aspect[0] + draw * (aspect[1] - aspect[0])
  side = np.maximum(share, 1.0) ** (1 / rank)
  stretch = [1.0] * (rank - 2) + [np.sqrt(ratio), 1 / np.sqrt(ratio)]
  return [np.clip(np.round(side * s), 1, max(n - 1, 1) if less else n) for n, s in zip(grid, stretch, strict=True)]


def largest_block(grid: tuple[int, ...], scale: tuple[float, float], aspect: tuple[float, float]) -> int:
  """Most cells that a target block can have."""
  sides = block_sides(np.linspace(0, 1, 2001), grid, scale, aspect, True, np)
  return int(np.prod(np.stack(np.broadcast_arrays(*sides)), axis=0).max())


def cut_to_shortest(context: jax.Array, group: int, most: int) -> jax.Array:
  """Contexts [B, cells] bool with as many cells as the shortest of their group (and `most`), the first in raster order.

  Raises:
    UserError: the group does not divide the batch. A batch that is smaller is one group.
  """
  size = min(group, context.shape[0])
  if context.shape[0] % size:
    raise UserError(f'objective.context_group {group} does not divide the batch of {context.shape[0]}')
  shortest = context.sum(axis=1).reshape(-1, size).min(axis=1)
  allowed = jnp.minimum(jnp.repeat(shortest, size), most)[:, None]
  return context & (jnp.cumsum(context, axis=1) <= allowed)


def place_blocks(size_key: jax.Array, place_key: jax.Array, shape: tuple[int, ...], grid: tuple[int, ...],
                 scale: tuple[float, float], aspect: tuple[float, float], less: bool, inner: bool = False) -> jax.Array:
  """Blocks [*shape, cells] bool: one size for all, each at a uniform place; `inner` ones never at the far border."""
  sides = block_sides(jax.random.uniform(size_key, ()), grid, scale, aspect, less)
  inside = jnp.ones((*shape, *[1] * len(grid)), bool)
  for axis, (n, side, key) in enumerate(zip(grid, sides, jax.random.split(place_key, len(grid)), strict=True)):
    start = jnp.floor(jax.random.uniform(key, shape) * (n - side + (0 if inner else 1)))[..., None]  # [*shape, 1]
    along = (jnp.arange(n) >= start) & (jnp.arange(n) < start + side)  # [*shape, n]
    inside = inside & along.reshape(*shape, *[n if a == axis else 1 for a in range(len(grid))])
  return inside.reshape(*shape, -1)
