"""The transformer block that every encoder and decoder here is made of, scanned over depth.

Parameters are float32 and carry logical axis names ('layers', 'embed', 'heads', 'head_dim', 'mlp', ...), which
jaxmed.parallel alone turns into shardings.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models.layers import adapters, channel_attention, kernels, packing
from jaxmed.models.layers import positions as pos
from jaxmed.models.layers.adapters import Adapter
from jaxmed.models.layers.linear import Dense
from jaxmed.parallel.mesh import axis_size, constrain

NORM_EPSILON = 1e-6
LOOK, LOOK_SLOPES = 'attention', 'attention_slopes'  # collections that `evaluate.looking` asks for
Crops = tuple[tuple[int, int], ...]  # of each kind in a row of tokens: views, and tokens of a view
Parts = tuple[jax.Array, ...]  # tokens of each kind
Each = tuple[jax.Array | None, ...]  # something for each kind
Grids = tuple[tuple[int, ...], ...]  # of each kind, the axes of space; () where nobody asks
Plans = tuple[packing.Plan | None, ...]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': kernels.gelu, 'gelu_tanh': jax.nn.gelu, 'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x)}
MLPS = (*ACTIVATIONS, 'swiglu')
REMAT_POLICIES = ('none', 'full', 'dots', 'dots_no_batch')


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, statistics in float32."""

  dtype: Any = jnp.float32
  epsilon: float = NORM_EPSILON

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    name = nn.with_logical_partitioning
    scale = self.param('scale', name(nn.initializers.ones_init(), ('embed',)), (x.shape[-1],), jnp.float32)
    bias = self.param('bias', name(nn.initializers.zeros_init(), ('embed',)), (x.shape[-1],), jnp.float32)
    return kernels.layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class Attention(nn.Module):
  """Multi-head self-attention [B, N, D] -> [B, N, D] with a fused qkv projection.

  A row may hold several crops one after the other (see Transformer): each attends to itself alone. `order` says where
  channels lie in a row and how they attend to each other, see `channel_attention`; None for all to all.
  """

  num_heads: int
  qkv_bias: bool = True
  kernel_init: str = 'trunc_normal'
  dtype: Any = jnp.float32
  form: str = 'auto'
  crops: Crops = ()
  order: channel_attention.TokenOrder | None = None
  adapter: Adapter | None = None

  @nn.compact
  def __call__(self, x: jax.Array, masks: Each, angles: Each) -> jax.Array:
    dim = x.shape[-1]
    head_dim = dim // self.num_heads
    qkv = Dense((3, self.num_heads, head_dim), ('embed', None, 'heads', 'head_dim'), self.qkv_bias,
                self.kernel_init, self.dtype, name='qkv')(x)  # [B, N, 3, H, Dh]
    qkv = self._adapted(qkv, x)
    qkv = constrain(qkv, 'batch', 'tokens', None, 'heads', None)
    operands = zip(_split(qkv, self.crops), masks, angles, strict=True)
    looked = self.is_mutable_collection(LOOK) and not self.is_initializing()
    gated = self.adapter is not None and self.adapter.prompts and self.adapter.gate
    attend = self._looked_at if looked else self._gated() if gated else _attend
    parts = (attend(*part, self.form, self.order) for part in operands)
    out = constrain(_joined(parts, self.crops), 'batch', 'tokens', 'heads', None)  # [B, N, H, Dh]
    y = Dense((dim,), ('heads', 'embed'), True, self.kernel_init, self.dtype, fold=2, name='proj')(out)
    return _with_low_rank(self.adapter, 'proj', y, out, (dim,), ('heads', 'embed'), self.dtype, 2)

  def _adapted(self, qkv: jax.Array, x: jax.Array) -> jax.Array:
    """Projections [B, N, 3, H, Dh] with LoRA's parts of queries, keys and values."""
    if self.adapter is None or self.adapter.name != 'lora':
      return qkv
    features, axes = qkv.shape[3:], ('embed', 'heads', 'head_dim')
    parts = [_with_low_rank(self.adapter, name, qkv[:, :, i], x, features, axes, self.dtype)
             for i, name in enumerate('qkv')]
    return jnp.stack(parts, axis=2)

  def _gated(self) -> Callable:
    """`_attend` to tokens, and by a gate of each head to prompts before them (LLaMA-Adapter); the gate begins at 0."""
    assert self.adapter is not None
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ('heads',))
    gate = jnp.tanh(self.param(f'{adapters.MARK}_gate', zeros, (self.num_heads,), jnp.float32)).astype(self.dtype)
    count = self.adapter.prompts

    def attend(qkv, mask, angles, form, order):
      del order
      q, k, v = _rotated(qkv, angles)
      k, v = (constrain(a, 'batch', None, 'heads', None) for a in (k, v))
      tokens = kernels.attention(q, k[:, count:], v[:, count:], None if mask is None else mask[:, count:], form)
      return tokens + gate[:, None] * kernels.attention(q, k[:, :count], v[:, :count], None, form)

    return attend

  def _looked_at(self, qkv: jax.Array, mask: jax.Array | None, angles: jax.Array | None, *_: Any) -> jax.Array:
    """`_attend` in plain form: its weights [B, H, N, N] can be read (LOOK) and differentiated by (LOOK_SLOPES)."""
    q, k, v = _rotated(qkv, angles)
    weights = self.perturb('weights', kernels.weights_of(q, k, mask), LOOK_SLOPES)
    self.sow(LOOK, 'weights', weights)
    return jnp.einsum('bhnm,bmhd->bnhd', weights.astype(v.dtype), v)


def _rotated(qkv: jax.Array, angles: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values [B, N, H, Dh]; rotated where positions are rotary."""
  q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
  return (q, k, v) if angles is None else (pos.rotate(q, angles), pos.rotate(k, angles), v)


def _attend(qkv: jax.Array, mask: jax.Array | None, angles: jax.Array | None, form: str,
            order: channel_attention.TokenOrder | None) -> jax.Array:
  """Attention [B, N, H, Dh] of each row of qkv [B, N, 3, H, Dh] to itself."""
  if angles is None and order is None and axis_size('sequence') == 1:
    return kernels.self_attention(qkv, mask, form)
  q, k, v = _rotated(qkv, angles)
  if order is not None:
    return channel_attention.attend(q, k, v, mask, form, order)
  k, v = (constrain(x, 'batch', None, 'heads', None) for x in (k, v))  # each device sees all keys of its samples
  return kernels.attention(q, k, v, mask, form)


def _split(x: jax.Array, crops: Crops) -> list[jax.Array]:
  """Rows [B, T, ...] of crops as one batch [B * V, N, ...] for each kind of crop; the inverse of `_joined`."""
  if len(crops) < 2:
    return [x]
  ends = np.cumsum([views * tokens for views, tokens in crops])
  return [x[:, end - views * tokens:end].reshape(-1, tokens, *x.shape[2:])
          for end, (views, tokens) in zip(ends, crops, strict=True)]


def _joined(parts: Iterable[jax.Array], crops: Crops) -> jax.Array:
  """Batches [B * V, N, ...] of crops, each sample's V views together, as rows [B, T, ...]."""
  if len(crops) < 2:
    return next(iter(parts))
  return jnp.concatenate([x.reshape(-1, views * tokens, *x.shape[2:])
                          for x, (views, tokens) in zip(parts, crops, strict=True)], axis=1)


class MLP(nn.Module):
  """Two-layer perceptron with exact GELU, or SwiGLU (silu(gate) * value, as timm's SwiGLU).

  'gelu_tanh' and 'quick_gelu' (x * sigmoid(1.702 x)) are approximations of GELU that public weights were trained with:
  those of SigLIP and of OpenAI's CLIP.
  """

  hidden: int
  kind: str = 'gelu'
  kernel_init: str = 'trunc_normal'
  dtype: Any = jnp.float32
  adapter: Adapter | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.kind in ACTIVATIONS:
      hidden = ACTIVATIONS[self.kind](self._layer('fc1', x, (self.hidden,), ('embed', 'mlp')))
    elif self.kind == 'swiglu':
      both = self._layer('fc1', x, (2, self.hidden), ('embed', None, 'mlp'))
      hidden = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
    else:
      raise ValueError(f'unknown mlp {self.kind!r}')
    hidden = constrain(hidden, 'batch', 'tokens', 'mlp')
    return self._layer('fc2', hidden, x.shape[-1:], ('mlp', 'embed'))

  def _layer(self, name: str, x: jax.Array, features: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    y = Dense(features, axes, True, self.kernel_init, self.dtype, name=name)(x)
    return _with_low_rank(self.adapter, name, y, x, features, axes, self.dtype)


def _with_low_rank(adapter: Adapter | None, name: str, y: jax.Array, x: jax.Array, features: tuple[int, ...],
                   axes: tuple[str | None, ...], dtype: Any, fold: int = 1) -> jax.Array:
  """A projection y of x with its LoRA, in the module that calls; y itself where it has none."""
  if adapter is None or adapter.name != 'lora' or name not in adapter.targets:
    return y
  return y + adapters.LowRank(adapter, features, axes, dtype, fold, name=f'{adapters.MARK}_{name}')(x)


class Block(nn.Module):
  """Pre-norm transformer block; LayerScale is optional. Shaped for nn.scan."""

  num_heads: int
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  mlp: str = 'gelu'
  layer_scale: float = 0.0
  kernel_init: str = 'trunc_normal'
  dtype: Any = jnp.float32
  attention: str = 'auto'
  crops: Crops = ()
  order: channel_attention.TokenOrder | None = None
  collect: bool = False
  norm_epsilon: float = NORM_EPSILON
  adapter: Adapter | None = None
  prefix: int = 0
  grids: Grids = ()

  @nn.compact
  def __call__(self, x: jax.Array, keep: jax.Array | None = None, masks: Each = (None,), angles: Each = (None,),
               shared: dict[str, jax.Array] | None = None):
    """Tokens [B, N, D] -> (the same, None), or with `collect` (the same, (these again, the output of the MLP)).

    keep: [2, B, V or N] factors of the two branches of each crop or token (see `stochastic_depth`); None for 1.
    shared: what blocks share of an adapter, for this block.
    """
    dim = x.shape[-1]
    x = self._before(x, masks)
    y = LayerNorm(self.dtype, self.norm_epsilon, name='norm1')(x)
    y = Attention(self.num_heads, self.qkv_bias, self.kernel_init, self.dtype, self.attention, self.crops,
                  self.order, self.adapter, name='attn')(y, masks, angles)
    x = x + self._residual(self._after(y, 'attn'), None if keep is None else keep[0], 'ls1')
    y = LayerNorm(self.dtype, self.norm_epsilon, name='norm2')(x)
    y = MLP(int(dim * self.mlp_ratio), self.mlp, self.kernel_init, self.dtype, self.adapter, name='mlp')(y)
    y = self._after(y, 'mlp')
    out = self._beside(x, x + self._residual(y, None if keep is None else keep[1], 'ls2'), masks, shared)
    out = constrain(out, 'batch', 'tokens', None)
    return out, (out, y) if self.collect else None

  def _before(self, x: jax.Array, masks: Each) -> jax.Array:
    """Tokens with the block's own prompts, or after a convolution over their grid."""
    adapter, name = self.adapter, adapters.MARK
    if adapter is None or adapter.name not in ('vpt_deep', 'depthwise'):
      return x
    parts = _split(x, self.crops)
    if adapter.name == 'vpt_deep':
      prompts = self.param(f'{name}_prompts', adapters.first_prompts(adapter, x.shape[-1]),
                           (adapter.prompts, x.shape[-1]), jnp.float32)
      parts = [jnp.concatenate([_prompts_of(self, adapter, prompts, part), part[:, adapter.prompts:]], axis=1)
               for part in parts]
    else:
      conv = adapters.Depthwise(adapter, self.dtype, name=f'{name}_conv')
      n = self.prefix
      parts = [part.at[:, n:].add(conv(part[:, n:], grid, None if mask is None else mask[:, n:]))
               for part, grid, mask in zip(parts, self.grids, masks, strict=True)]
    return _joined(parts, self.crops)

  def _after(self, y: jax.Array, branch: str) -> jax.Array:
    """What a branch gives, after the bottleneck of Houlsby."""
    if self.adapter is None or self.adapter.name != 'houlsby':
      return y
    return y + adapters.Bottleneck(self.adapter, 'gelu', self.dtype, name=f'{adapters.MARK}_{branch}')(y)

  def _beside(self, x: jax.Array, out: jax.Array, masks: Each, shared: dict[str, jax.Array] | None) -> jax.Array:
    """The block's output with what an adapter makes of the input x of its second half."""
    if self.adapter is None or self.adapter.name not in ('adaptformer', 'dvpt'):
      return out
    if shared is None:
      beside = adapters.Bottleneck(self.adapter, 'relu', self.dtype, name=f'{adapters.MARK}_beside')
      return out + adapters.SCALE * beside(x)
    return out + _joined((adapters.dynamic_prompts(shared, part, self.adapter.prompts, mask)
                    for part, mask in zip(_split(x, self.crops), masks, strict=True)), self.crops)

  def _residual(self, y: jax.Array, keep: jax.Array | None, name: str) -> jax.Array:
    """Applies LayerScale, then the factors [B, V or N] of the crops or tokens."""
    if self.layer_scale:
      init = nn.with_logical_partitioning(nn.initializers.constant(self.layer_scale), ('embed',))
      y = y * self.param(name, init, (y.shape[-1],), jnp.float32).astype(y.dtype)
    if keep is None:
      return y
    if keep.shape[1] not in (1, y.shape[1]):
      keep = jnp.repeat(keep, np.repeat([n for _, n in self.crops], [v for v, _ in self.crops]), axis=1,
                        total_repeat_length=y.shape[1])
    return y * keep[..., None].astype(y.dtype)


DROP_LAWS = ('linear', 'uniform', 'exact')


def stochastic_depth(rng: jax.Array, rates: jax.Array, count: int) -> jax.Array:
  """Factors [L, 2, count] of the branches of `count` crops: 0 with the rate [L] of a layer, else 1 / (1 - rate).

  They are drawn for all layers at once, so they depend on no way of computing the layers.
  """
  rates = rates[:, None, None]
  return jax.random.bernoulli(rng, 1 - rates, (rates.shape[0], 2, count)) / (1 - rates)


def exact_depth(rng: jax.Array, depth: int, rate: float, count: int) -> jax.Array:
  """Factors [L, 2, count] as of `stochastic_depth`, where exactly floor(count (1 - rate)) crops keep each branch.

  At least one does, and they are scaled by the inverse of their share (facebookresearch/dinov2, layers/block.py).
  """
  kept = max(int(count * (1 - rate)), 1)
  place = jax.random.uniform(rng, (depth, 2, count)).argsort(axis=-1).argsort(axis=-1)
  return (place < kept) * (count / kept)


class Transformer(nn.Module):
  """`depth` blocks under one scan (parameters stacked [depth, ...]), without the final norm.

  `remat`: 'none', 'full' (keep block inputs only), 'dots' (keep matrix products), 'dots_no_batch' (keep products
  with weights, recompute attention). `drop_path` is the rate of the last block; with `drop_path_law` 'linear' rates
  grow from 0, with 'uniform' each block has it, with 'exact' too, and an exact share of each kind of crops is kept.
  `attention`: a form of `kernels.attention`. `packing`: 0, or how many rows hold the samples' tokens that are there, as
  a share of the samples, see `packing.plan`; `prefix`: the tokens before a sample's patches. `adapter`: what is trained
  beside frozen weights.
  """

  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  mlp: str = 'gelu'
  layer_scale: float = 0.0
  drop_path: float = 0.0
  kernel_init: str = 'trunc_normal'
  remat: str = 'none'
  dtype: Any = jnp.float32
  attention: str = 'auto'
  packing: float = 0.0
  prefix: int = 0
  drop_path_law: str = 'linear'
  norm_epsilon: float = NORM_EPSILON
  adapter: Adapter | None = None

  def __call__(self, x: jax.Array, mask: jax.Array | None = None, angles: jax.Array | None = None,
               train: bool = False, order: channel_attention.TokenOrder | None = None, grids: Grids = ()) -> jax.Array:
    """Tokens [B, N, D] -> [B, N, D]; `mask` [B, N], or [B, N, N] of what each token looks at; `angles` [B or 1, N,
    head_dim / 2] of rotary positions."""
    return self.one_pass([x], [mask], [angles], x.shape[0], train, order, grids)[0]

  def with_levels(self, x: jax.Array, mask: jax.Array | None, angles: jax.Array | None, levels: Sequence[int],
                  train: bool = False, order: channel_attention.TokenOrder | None = None, grids: Grids = ()
                  ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """`__call__`, and for each block in `levels` (1 is the first) its output and the output of its MLP, [B, N, D] each.

    The scan keeps both of every block until those in `levels` are taken out of them. Nothing is packed.
    """
    tokens, keep = x.shape[1], self._factors([x], x.shape[0], train)[0]
    x, mask, angles = _filled(x, mask, angles, self._lacking(tokens))
    x, blocks = self._blocks(x, keep, (), (mask,), (angles,), order, grids, collect=True)
    return x[:, :tokens], [(blocks[0][i - 1, :, :tokens], blocks[1][i - 1, :, :tokens]) for i in levels]

  def one_pass(self, parts: Sequence[jax.Array], masks: Sequence[jax.Array | None],
               angles: Sequence[jax.Array | None], batch: int, train: bool = False,
               order: channel_attention.TokenOrder | None = None, grids: Grids = ()) -> list[jax.Array]:
    """Several kinds of crops [batch * V, N, D], each sample's V views together, in one pass over the blocks.

    A sample's crops stand in one row, so each layer multiplies all tokens by its weights at once: over devices they
    are gathered once and their gradients summed once, for all kinds of crops. Attention stays within a crop. Where
    tokens are divided over devices each kind goes alone.

    With `packing` the crops of a kind that has a mask share rows. A batch that does not fit its rows is computed as
    without, some of it again going back so that nothing has to be kept for it; so is one whose intermediates or
    attention are wanted. What comes out where `masks` are False means nothing. `grids` are for adapters that look at
    neighbours.
    """
    keeps = self._factors(parts, batch, train)
    operands = tuple(parts), tuple(masks), tuple(angles), keeps
    every = all(mask is None for mask in masks) or order is not None or self.is_initializing()
    if not self.packing or every or any(map(self.is_mutable_collection, ('intermediates', LOOK, LOOK_SLOPES))):
      return self._padded(*operands, batch, order, grids)
    count = packing.groups(batch)
    plans = tuple(None if mask is None else packing.plan(mask, count, self.packing, 2 * self.prefix) for mask in masks)
    fits = jnp.stack([plan.fits for plan in plans if plan is not None]).all()
    remat = self.remat.replace('none', 'full')
    again = nn.remat(lambda self, *operands: self._padded(*operands, batch, order, grids, remat))
    packed = lambda self, *operands: self._packed(plans, *operands, count)
    return nn.cond(fits, packed, again, self, *operands)

  def _factors(self, parts: Sequence[jax.Array], batch: int, train: bool) -> Each:
    """Factors of stochastic depth [L, 2, B * V, 1] of each kind of crops; None without it."""
    if not train or not self.drop_path:
      return (None,) * len(parts)
    counts = [x.shape[0] // batch for x in parts]
    if self.drop_path_law == 'exact':
      keys = jax.random.split(self.make_rng('dropout'), len(parts))
      drawn = [exact_depth(key, self.depth, self.drop_path, x.shape[0]) for key, x in zip(keys, parts, strict=True)]
      return tuple(k.reshape(self.depth, 2, -1, 1) for k in drawn)
    rates = jnp.linspace(0.0 if self.drop_path_law == 'linear' else self.drop_path, self.drop_path, self.depth)
    keep = stochastic_depth(self.make_rng('dropout'), rates, batch * sum(counts))
    of_kinds = jnp.split(keep.reshape(self.depth, 2, batch, -1), np.cumsum(counts)[:-1], axis=3)
    return tuple(k.reshape(self.depth, 2, -1, 1) for k in of_kinds)

  def _padded(self, parts: Parts, masks: Each, angles: Each, keeps: Each, batch: int,
              order: channel_attention.TokenOrder | None = None, grids: Grids = (), remat: str = ''
              ) -> list[jax.Array]:
    """`one_pass` with factors [depth, 2, B, 1 or N] of stochastic depth: every part as rows [B, N, D]."""
    crops = tuple((x.shape[0] // batch, x.shape[1]) for x in parts)
    if len(parts) > 1 and axis_size('sequence') == 1:
      keep = None if keeps[0] is None else jnp.concatenate(
          [k.reshape(self.depth, 2, batch, -1) for k in _alike(keeps, parts)], axis=3)
      return _split(self._blocks(_joined(parts, crops), keep, crops, masks, angles, order, grids, remat)[0], crops)
    out = []
    for i, (x, mask, angle, keep) in enumerate(zip(parts, masks, angles, keeps, strict=True)):
      tokens = x.shape[1]
      x, mask, angle = _filled(x, mask, angle, self._lacking(tokens))
      out.append(self._blocks(x, keep, (), (mask,), (angle,), order, grids[i : i + 1], remat)[0][:, :tokens])
    return out

  def _lacking(self, tokens: int) -> int:
    """Tokens that fill a row, prompts included, up so that it divides over devices."""
    return -(tokens + self._prompts) % axis_size('sequence')

  @property
  def _prompts(self) -> int:
    return 0 if self.adapter is None else self.adapter.prompts

  def _packed(self, plans: Plans, parts: Parts, masks: Each, angles: Each, keeps: Each, count: int) -> list[jax.Array]:
    """`_padded` of the rows of those parts that have a plan, for so many groups of samples."""
    pack = lambda plan, x: x if plan is None or x is None else plan.pack(x)
    whole = lambda angle, x: None if angle is None else jnp.broadcast_to(angle, (len(x), *angle.shape[1:]))
    rows = tuple(map(pack, plans, parts))
    angles = tuple(map(pack, plans, map(whole, angles, parts)))
    segments = tuple(mask if plan is None else plan.segments() for plan, mask in zip(plans, masks, strict=True))
    keeps = tuple(k if plan is None or k is None else plan.spread(k[..., 0])
                  for plan, k in zip(plans, keeps, strict=True))
    out = self._padded(rows, segments, angles, keeps, count)
    return [x if plan is None else plan.unpack(x) for plan, x in zip(plans, out, strict=True)]

  @nn.compact
  def _blocks(self, x: jax.Array, keep: jax.Array | None, crops: Crops, masks: Each, angles: Each,
              order: channel_attention.TokenOrder | None, grids: Grids = (), remat: str = '', collect: bool = False
              ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Tokens after all blocks and, with `collect`, the outputs of all blocks and of their MLPs [L, B, N, D]."""
    adapter, count, shared = self.adapter, self._prompts, None
    drops = adapter is not None and adapter.dropout > 0
    scanned = nn.scan(
        rematerialised(Block, remat or self.remat),
        variable_axes=dict.fromkeys(('params', 'intermediates', LOOK, LOOK_SLOPES), 0),
        split_rngs={'params': True} | ({'dropout': True} if drops else {}),
        in_axes=(0, nn.broadcast, nn.broadcast, 0), length=self.depth, metadata_params={nn.PARTITION_NAME: 'layers'})
    if adapter is not None and adapter.name == 'dvpt':
      shared = adapters.shared_bottlenecks(self, adapter, self.depth, x.shape[-1])
    if count:
      x, masks, angles = self._with_prompts(x, masks, angles, crops)
    wider = tuple((views, tokens + count) for views, tokens in crops)
    blocks = scanned(self.num_heads, self.mlp_ratio, self.qkv_bias, self.mlp, self.layer_scale, self.kernel_init,
                     self.dtype, self.attention, wider, order, collect, self.norm_epsilon, adapter, self.prefix, grids,
                     name='blocks')
    out, kept = blocks(constrain(x, 'batch', 'tokens', None), keep, masks, angles, shared)
    if self.kernel_init == 'beit' and self.is_initializing():
      _shrink_ends(blocks, self.depth)
    if not count:
      return out, kept
    out = _joined((part[:, count:] for part in _split(out, wider)), crops)
    return out, None if kept is None else tuple(a[:, :, count:] for a in kept)

  def _with_prompts(self, x: jax.Array, masks: Each, angles: Each, crops: Crops) -> tuple[jax.Array, Each, Each]:
    """The operands of blocks with prompts before the tokens of each crop, where positions do not turn them."""
    adapter, dim = self.adapter, x.shape[-1]
    assert adapter is not None
    if adapter.name == 'vpt_deep':  # of which each block has its own
      prompts = jnp.zeros((adapter.prompts, dim))
    else:
      prompts = self.param(f'{adapters.MARK}_prompts', adapters.first_prompts(adapter, dim), (adapter.prompts, dim),
                           jnp.float32)
    parts = (jnp.concatenate([_prompts_of(self, adapter, prompts, part), part], axis=1) for part in _split(x, crops))
    wider = tuple((views, tokens + adapter.prompts) for views, tokens in crops)
    first = lambda a, fill: None if a is None else jnp.pad(
        a, [(0, 0), (adapter.prompts, 0)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
    return _joined(parts, wider), tuple(first(m, True) for m in masks), tuple(first(a, 0) for a in angles)


def _prompts_of(module: nn.Module, adapter: Adapter, prompts: jax.Array, x: jax.Array) -> jax.Array:
  """Prompts [P, D] for rows x [B, N, D]: [B, P, D], with dropout in training."""
  rows = jnp.broadcast_to(prompts.astype(x.dtype), (x.shape[0], *prompts.shape))
  return adapters.dropped(module, adapter.dropout, rows)


def _shrink_ends(blocks: nn.Module, depth: int) -> None:
  """Divides the stacked kernels that end a residual branch by sqrt(2 * layer) (BEiT's fix_init_weight)."""
  share = (2.0 * np.arange(1, depth + 1)) ** -0.5
  for part, name in (('attn', 'proj'), ('mlp', 'fc2')):
    params = blocks.get_variable('params', part)
    kernel = jax.tree.map(lambda k: k * jnp.float32(share).reshape(-1, *[1] * (k.ndim - 1)), params[name]['kernel'])
    blocks.put_variable('params', part, params | {name: params[name] | {'kernel': kernel}})


def _alike(keeps: Sequence[Any], parts: Parts) -> list[jax.Array]:
  """Factors [L, 2, B, 1 or N] of parts [B, N, D]: for each crop, or where one has them for tokens, for all tokens."""
  if all(k.shape[3] == 1 for k in keeps):
    return list(keeps)
  return [jnp.broadcast_to(k, (*k.shape[:3], x.shape[1])) for k, x in zip(keeps, parts, strict=True)]


def _filled(x: jax.Array, mask: jax.Array | None, angles: jax.Array | None, more: int):
  """The operands of a block with `more` tokens at the end that no other looks at, so that they divide over devices."""
  if not more:
    return x, mask, angles
  grow = lambda a: jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2))
  mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
  mask = jnp.pad(mask, [(0, 0)] + [(0, more)] * (mask.ndim - 1))  # of each query, it has tokens on two axes
  return grow(x), mask, None if angles is None else grow(angles)


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
  """The block with a policy of REMAT_POLICIES, for use under a scan."""
  if policy == 'none':
    return block
  policies = {
      'full': None,
      'dots': jax.checkpoint_policies.dots_saveable,
      'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  }
  return nn.remat(block, prevent_cse=False, policy=policies[policy])
