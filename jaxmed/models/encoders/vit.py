"""Vision transformer on a token grid of any rank (Dosovitskiy et al. 2021), in timm's vocabulary."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Supports
from jaxmed.errors import UserError
from jaxmed.models.layers import initial
from jaxmed.models.layers import positions as pos
from jaxmed.models.layers.adapters import Adapter
from jaxmed.models.layers.attention_pool import AttentionPool
from jaxmed.models.layers.channel_attention import TokenOrder
from jaxmed.models.layers.defaults import EncoderDefaults
from jaxmed.models.layers.tokens import Features, Level, Tokens, check_levels, drop_channels, grid_of, patchify
from jaxmed.models.layers.transformer import NORM_EPSILON, Dense, LayerNorm, Transformer

POSITIONS = ('learned', 'sincos', 'rope', 'none')


class ViT(EncoderDefaults, nn.Module):
  """One token a patch; the fields are the config.

  Attributes:
    image_size: native size, (H, W), (D, H, W) or (T, H, W); its rank is the rank of every input.
    patch_size: same rank; need not be the same along each axis.
    in_channels: channels of the input, in one fixed order.
    embed_dim, depth, num_heads: width, blocks and attention heads.
    mlp_ratio: width of the MLP over embed_dim.
    mlp: 'gelu' or 'swiglu'; 'gelu_tanh' and 'quick_gelu' for public weights, see `transformer.MLP`.
    qkv_bias: whether queries, keys and values have biases.
    class_token: whether there is a class token.
    drop_path: probability of leaving out a residual branch, of the last block.
    drop_path_law: 'linear', rising from 0 in the first block; 'uniform', the same in all; 'exact', the same in all and
      for an exact share of each kind of crops (DINOv2, DINOv3).
    rope_base: base of the rotary frequencies.
    kernel_init: initial weights of linear layers, see `initial.initializer`.
    patch_init: of the patch embedding: '' as `kernel_init` with biases of 0, 'torch' for PyTorch's convolution (DINO,
      ChannelViT), 'torch_bias' for its biases alone (MAE), 'xavier' for these and Xavier's kernels (data2vec).
    norm_epsilon: what layer norms add to the variance (DINOv3's large models: 1e-5).
    token_std, mask_std: deviation of the first values of class token and registers, and of the mask token.
    remat: what the backward pass computes again: 'none' or a policy, to save memory.
    num_registers, no_embed_class: as timm's `reg_tokens` and `no_embed_class`.
    layer_scale: initial LayerScale, 0 for none (timm's `init_values`).
    pos: 'learned' | 'sincos' (fixed) | 'rope' (axial rotary) | 'none'.
    pos_interpolation: how a learned or fixed table follows other sizes, see `positions.resample`.
    pre_norm: whether tokens are normalised before the first block, too (CLIP; timm's option of that name).
    map_head: whether the vector 'mean' is attention of a learned query to the patches, see `attention_pool` (SigLIP).
    mask_token: whether there is a learned token that `hidden` patches are replaced by; methods that hide patches
      from the encoder set it.
    rope_shift, rope_jitter, rope_rescale: random changes of rotary coordinates in training, see
      `positions.augment`; 0 for none.
    local_norm: whether the class token and registers of `local` crops have a final norm of their own; of use in
      training only, so no product has one (DINOv3).
    attention: 'auto', or 'flash' for the accelerator's own kernel where there is one, see `kernels.attention`.
    packing: 0, or how many rows hold the tokens of samples that have fewer than others (channels, image size), as a
      share of the samples, see `Transformer.one_pass`.
    dtype: 'float32' or 'bfloat16' compute; parameters are float32.
    adapter: what is trained beside frozen weights; None for nothing. The run's section `adapter` sets it.
  """

  image_size: tuple[int, ...] = (224, 224)
  patch_size: tuple[int, ...] = (16, 16)
  in_channels: int = 3
  embed_dim: int = 384
  depth: int = 12
  num_heads: int = 6
  mlp_ratio: float = 4.0
  mlp: str = 'gelu'
  qkv_bias: bool = True
  class_token: bool = True
  num_registers: int = 0
  no_embed_class: bool = False
  layer_scale: float = 0.0
  drop_path: float = 0.0
  drop_path_law: str = 'linear'
  pos: str = 'learned'
  pos_interpolation: str = 'antialias'
  rope_base: float = 100.0
  rope_shift: float = 0.0
  rope_jitter: float = 0.0
  rope_rescale: float = 0.0
  kernel_init: str = 'trunc_normal'
  patch_init: str = ''
  token_std: float = initial.STD
  mask_std: float = initial.STD
  norm_epsilon: float = NORM_EPSILON
  pre_norm: bool = False
  map_head: bool = False
  mask_token: bool = False
  local_norm: bool = False
  remat: str = 'none'
  attention: str = 'auto'
  packing: float = 0.0
  dtype: Any = 'float32'
  adapter: Adapter | None = None  # type: ignore[assignment]

  supports = Supports(one_pass=True, embed_patches=True, sizes=True, attention_maps=True, levels=True)

  def setup(self):
    compute = jnp.dtype(self.dtype)
    name = nn.with_logical_partitioning
    inputs = math.prod(self.patch_size) * (1 if self.per_channel else self.in_channels)
    kernel_init, bias_init = initial.patch_laws(self.patch_init, self.kernel_init, inputs)
    self.patch_embed = Dense((self.embed_dim,), ('patch', 'embed'), True, kernel_init, compute, bias_init=bias_init)
    table = lambda axis, std=initial.STD: name(initial.normal(self.kernel_init, std), (axis, 'embed'))
    if self.class_token:
      self.cls_token = self.param('cls_token', table(None, self.token_std), (1, self.embed_dim), jnp.float32)
    if self.num_registers:
      self.register_tokens = self.param(
          'register_tokens', table(None, self.token_std), (self.num_registers, self.embed_dim), jnp.float32)
    if self.mask_token:
      self.mask = self.param('mask_token', table(None, self.mask_std), (1, self.embed_dim), jnp.float32)
    if self.pos == 'learned':
      count = math.prod(grid_of(self.image_size, self.patch_size))
      self.pos_embed = self.param(
          'pos_embed', table('positions'), (count + self._embedded_prefix, self.embed_dim), jnp.float32)
    self.transformer = Transformer(
        self.depth, self.num_heads, self.mlp_ratio, self.qkv_bias, self.mlp, self.layer_scale, self.drop_path,
        self.kernel_init, self.remat, compute, self.attention, self.packing, self.num_prefix_tokens,
        self.drop_path_law, self.norm_epsilon, self.adapter)
    self.norm = LayerNorm(compute, self.norm_epsilon)
    if self.pre_norm:
      self.norm_pre = LayerNorm(compute, self.norm_epsilon)
    if self.map_head:
      self.attn_pool = AttentionPool(self.num_heads, self.mlp_ratio, self.mlp, self.kernel_init, self.norm_epsilon,
                                     compute)
    if self.local_norm:
      self.norm_local = LayerNorm(compute, self.norm_epsilon)

  @property
  def num_levels(self) -> int:
    """Blocks."""
    return self.depth

  @property
  def _embedded_prefix(self) -> int:
    return 0 if self.no_embed_class else self.num_prefix_tokens

  def _position_table(self, grid: tuple[int, ...]) -> jax.Array:
    """Positions [N, D] of the patches of a grid; zeros where positions are not added to tokens."""
    if self.pos not in ('learned', 'sincos'):
      return jnp.zeros((1, self.embed_dim))
    native = grid_of(self.image_size, self.patch_size)
    if self.pos == 'learned':
      table = self.pos_embed[self._embedded_prefix :]
    else:
      table = jnp.asarray(pos.sincos(native, self.embed_dim))
    return table if grid == native else pos.resample(table, native, grid, self.pos_interpolation)

  def _own_positions(self, grid: tuple[int, ...], own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [B, N, D] of samples whose grids [B, rank] differ and lie in the corner of `grid`.

    Twice: as they are resampled, and as they are at the native size (which is not resampled everywhere).
    """
    if self.pos not in ('learned', 'sincos'):
      return self._position_table(grid)[None], self._position_table(grid)[None]
    native = grid_of(self.image_size, self.patch_size)
    table = self._position_table(native)
    resampled = pos.resample_each(table, native, own, grid, self.pos_interpolation)
    corner = tuple(min(a, b) for a, b in zip(native, grid, strict=True))
    kept = table.reshape(*native, -1)[tuple(slice(n) for n in corner)]
    kept = jnp.pad(kept, [(0, b - a) for a, b in zip(corner, grid, strict=True)] + [(0, 0)])
    kept = kept.reshape(resampled.shape[1:])
    return resampled, jnp.where((own == jnp.asarray(native)).all(axis=1)[:, None, None], kept, resampled)

  def _coordinates(self, grid: tuple[int, ...], own: jax.Array | None = None) -> jax.Array | None:
    if self.pos != 'rope':
      return None
    return jnp.asarray(pos.coordinates(grid))[None] if own is None else pos.own_coordinates(own, grid)

  def embed_patches(self, image: jax.Array, channels: jax.Array | None = None,
                    channel_mask: jax.Array | None = None, hidden: jax.Array | None = None,
                    sizes: jax.Array | None = None) -> Tokens:
    """Embeds images [B, *size, C], normalised float, as patch tokens with positions.

    `channels` is not used: the order is fixed. Channels that `channel_mask` [B, C] rules out are zeroed and the
    rest scaled by C / n, the ViT baseline of ChannelViT's authors. Patches that are `hidden` [B, N] become the mask
    token, at their own positions. `sizes` [B, rank] are pixels of each image, multiples of the patch, in the corner of
    its array: its tokens are those that it would have alone.
    """
    del channels
    image = drop_channels(image, channel_mask)
    grid = grid_of(image.shape[1:-1], self.patch_size)
    image, own, valid = self._cropped(image, grid, sizes)
    x = self._hide(self.patch_embed(patchify(image, self.patch_size)), hidden)  # [B, N, D]
    where = self._position_table(grid) if own is None else self._own_positions(grid, own)[1]
    return Tokens(x + where.astype(x.dtype), valid, self._coordinates(grid, own))

  def _cropped(self, image: jax.Array, grid: tuple[int, ...], sizes: jax.Array | None
               ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Images without what lies outside of their `sizes`, their grids [B, rank], and the cells in those [B, N]."""
    if sizes is None:
      return image, None, None
    own = jnp.asarray(sizes, jnp.int32) // jnp.asarray(self.patch_size)
    for axis in range(len(grid)):  # which may hold anything, NaN included
      place = jnp.arange(image.shape[1 + axis]).reshape(-1, *[1] * (image.ndim - 2 - axis))
      image = jnp.where(place < sizes[:, axis].reshape(-1, *[1] * (image.ndim - 1)), image, 0)
    return image, own, pos.inside(own, grid)

  def _hide(self, x: jax.Array, hidden: jax.Array | None) -> jax.Array:
    """x [..., D] with the mask token where `hidden` [...]."""
    return x if hidden is None else jnp.where(hidden[..., None], self.mask.astype(x.dtype), x)

  def encode(self, tokens: Tokens, train: bool = False, grid: tuple[int, ...] = (), local: bool = False,
             levels: tuple[int, ...] = ()) -> Features:
    """Runs prefix and patch tokens through the blocks and the final norm.

    Args:
      grid: the shape of the tokens, () where they are some of it.
      local: whether they are of local crops, which have `local_norm`.
      levels: blocks whose outputs are wanted, from 1 to `depth`; these are never packed.
    """
    x, found = self._through(tokens, train, grid, levels)
    features = self._features(x, tokens, grid, local)
    return dataclasses.replace(features, levels=found) if found else features

  def _through(self, tokens: Tokens, train: bool, grid: tuple[int, ...], levels: tuple[int, ...]
               ) -> tuple[jax.Array, tuple[Level, ...]]:
    """Prefix and patch tokens after all blocks [B, N, D], and the levels that are asked for."""
    x, valid, angles = self._with_prefix(tokens, train)
    if not levels:
      return self.transformer(x, valid, angles, train, self._token_order(grid), self._grids(grid)), ()
    check_levels(type(self).__name__, levels, 1, self.depth)
    x, blocks = self.transformer.with_levels(x, valid, angles, levels, train, self._token_order(grid),
                                             self._grids(grid))
    return x, tuple(Level(self._patches(out, tokens), grid, self._patches(ffn, tokens)) for out, ffn in blocks)

  def _patches(self, x: jax.Array, tokens: Tokens) -> jax.Array:
    """The patches [B, N, D] of a block's output."""
    del tokens
    return x[:, self.num_prefix_tokens:]

  def _token_order(self, grid: tuple[int, ...]) -> TokenOrder | None:
    """How tokens of that grid attend to each other; None for all to all."""
    del grid
    return None

  def _grids(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The spatial grid of tokens for adapters that look at neighbours; () where none does."""
    if self.adapter is None or self.adapter.name != 'depthwise':
      return ()
    if not grid:
      raise UserError('adapter.name=depthwise needs all patches, but the method leaves some out: take another adapter, '
                      'or a method that hides patches by a token (simmim, ibot, dinov2)')
    return (grid[-len(self.image_size):],)

  def one_pass(self, groups: Sequence[dict], batch: int, train: bool = False) -> list[Features]:
    """Features of several groups of images in one pass over the blocks, see `Transformer.one_pass`.

    groups: keyword arguments of `__call__`, of images [batch * V, *size, C], each sample's V views together.
    """
    embedded, starts, places = [], [], []
    for group in groups:
      known = {k: v for k, v in group.items() if k != 'local'}
      embedded.append(self.embed_patches(**known))
      starts.append(self._with_prefix(embedded[-1], train))
      places.append((self._grid(group['image']), group.get('local', False)))
    grids = sum((self._grids(grid) for grid, _ in places), ())
    out = self.transformer.one_pass(*zip(*starts, strict=True), batch, train, self._token_order(places[0][0]), grids)
    return [self._features(x, tokens, *place) for x, tokens, place in zip(out, embedded, places, strict=True)]

  def _grid(self, image: jax.Array) -> tuple[int, ...]:
    grid = grid_of(image.shape[1:-1], self.patch_size)
    return (image.shape[-1], *grid) if self.per_channel else grid

  def _with_prefix(self, tokens: Tokens, train: bool) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Class token, registers and patches [B, N, D], which are valid [B, N], and their rotary angles."""
    x, batch = tokens.x, tokens.x.shape[0]
    prefix = [t for t in (self.cls_token if self.class_token else None,
                          self.register_tokens if self.num_registers else None) if t is not None]
    count = self.num_prefix_tokens
    valid, angles = tokens.valid, None
    if count:
      start = jnp.concatenate(prefix)
      if self.pos == 'learned' and self._embedded_prefix:
        start = start + self.pos_embed[:count]
      start = jnp.broadcast_to(start.astype(x.dtype), (batch, count, x.shape[-1]))
      x = jnp.concatenate([start, x], axis=1)
      valid = None if valid is None else jnp.pad(valid, ((0, 0), (count, 0)), constant_values=True)
    if self.pre_norm:
      x = self.norm_pre(x)
    if tokens.position is not None:
      where = tokens.position
      if train and (self.rope_shift or self.rope_jitter or self.rope_rescale):
        where = pos.augment(self.make_rng('dropout'), where, batch, self.rope_shift, self.rope_jitter,
                            self.rope_rescale)
      angles = pos.rotary_angles(where, self.embed_dim // self.num_heads, self.rope_base)
      angles = jnp.pad(angles, ((0, 0), (count, 0), (0, 0)))  # prefix tokens are not rotated
    return x, valid, angles

  def _features(self, x: jax.Array, tokens: Tokens, grid: tuple[int, ...], local: bool) -> Features:
    """Splits the blocks' output [B, N, D] after the final norm."""
    x, count = self._final_norm(x, local), self.num_prefix_tokens
    cls = x[:, 0] if self.class_token else None
    registers = x[:, count - self.num_registers : count] if self.num_registers else None
    pool = self.attn_pool(x[:, count:], tokens.valid) if self.map_head else None
    return Features(cls, registers, x[:, count:], tokens.valid, grid, pool)

  def _final_norm(self, x: jax.Array, local: bool) -> jax.Array:
    if not self.local_norm or not (local or self.is_initializing()):
      return self.norm(x)
    prefix, patches = jnp.split(x, [self.num_prefix_tokens], axis=1)
    return jnp.concatenate([self.norm_local(prefix), self.norm(patches)], axis=1)

  def __call__(self, image: jax.Array, channels: jax.Array | None = None,
               channel_mask: jax.Array | None = None, train: bool = False,
               hidden: jax.Array | None = None, local: bool = False, sizes: jax.Array | None = None,
               levels: tuple[int, ...] = ()) -> Features:
    """Features of images [B, *size, C]; see `embed_patches` and `encode`."""
    more = {} if sizes is None else {'sizes': sizes}
    tokens = self.embed_patches(image, channels, channel_mask, hidden, **more)
    return self.encode(tokens, train, self._grid(image), local, levels)


def at_size(model: ViT, params: dict, image_size: tuple[int, ...]) -> dict:
  """A ViT's parameters for another native size: a learned table of positions is resampled as it is for such inputs."""
  if 'pos_embed' not in params or len(image_size) != len(model.image_size):
    return params
  old, new = grid_of(model.image_size, model.patch_size), grid_of(image_size, model.patch_size)
  if old == new:
    return params
  table = params['pos_embed']
  prefix = table.shape[0] - math.prod(old)
  grid = pos.resample(table[prefix:], old, new, model.pos_interpolation)
  return params | {'pos_embed': jnp.concatenate([table[:prefix], grid])}


def as_volume(model: ViT, params: dict, volume: ViT) -> dict:
  """A 2D network's parameters for volumes.

  The kernel of the patch embedding is spread evenly over the slices of a patch, a table of positions is the same in
  each (Carreira, Zisserman 2017, arXiv 1705.07750, inflate filters that way). A volume that is the same in every slice
  has the features of its slice where no class token or register stands beside the patches, of which there are more.

  Raises:
    UserError: other patches in the plane, or positions that are not a learned table.
  """
  slices, *patch = volume.patch_size
  if tuple(patch) != tuple(model.patch_size):
    near = f'{slices}x{"x".join(map(str, model.patch_size))}'
    raise UserError(f'a 2D encoder with patches of {model.patch_size} gives weights to patches of {near}, not of '
                    f'{volume.patch_size}')
  if model.pos not in ('learned', 'none') or volume.pos != model.pos:
    raise UserError(f'weights of a 2D encoder serve volumes with encoder.pos=learned in both, not {model.pos} there '
                    f'and {volume.pos} here')
  kernel = jnp.tile(params['patch_embed']['kernel'], (slices, 1)) / slices  # [slices * patch * C, D]
  params = params | {'patch_embed': params['patch_embed'] | {'kernel': kernel}}
  if model.pos == 'none':
    return params
  depth, *size = volume.image_size
  table = at_size(model, params, tuple(size))['pos_embed']
  prefix = model._embedded_prefix
  grid = jnp.tile(table[prefix:], (depth // slices, 1))  # slices come first in the order of tokens
  return params | {'pos_embed': jnp.concatenate([table[:prefix], grid])}
