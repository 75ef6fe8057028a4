"""A causal transformer over the features of a video that says the current phase and what comes: SuPRA and SWAG.

Boels et al. 2024, arXiv 2403.06200 and 2412.18849 (maxboels/SWAG-surgical-workflow-anticipative-generation,
models/skit_future.py and R2A2/model/r2a2.py; of the papers the abstracts were read): attention among the last frames,
"key pooling" (a narrow projection whose maximum over all frames so far is added back), the current phase, and a decoder
whose learned queries are one future token each, every `stride` seconds of the horizon, with a class K for the end of
the video.

Differs: a frame looks at the `window` frames up to itself, so that one pass gives every frame's output and the model
runs frame by frame; the published encoder cuts the context into windows whose frames look at each other, and is read
at the last one. Blocks normalise before they compute, and distances in time have a learned bias where the published
code adds sinusoids. The maximum is over every frame, the published one over every tenth of those before the window. The
decoder has one layer, there 2 to 4.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.models.layers.transformer import MLP, Dense, LayerNorm

EPSILON = 1e-5  # of all layer norms, PyTorch's
Cache = dict[str, Any]


class Anticipation(NamedTuple):
  """What is said, float32: logits of the current phase [B, T, K] and of future tokens [B, A, F, K + 1] at A frames, and
  minutes [B, T, K + 1] until each phase begins (0 while it goes on) and the video ends, at most the horizon."""

  current: jax.Array
  future: jax.Array
  remaining: jax.Array


class LocalAttention(nn.Module):
  """Attention of each frame to the `window` frames up to itself, with a learned bias of each head by distance."""

  num_heads: int
  window: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, cache: Cache | None, time: jax.Array) -> tuple[jax.Array, Cache | None]:
    """A whole video x [B, T, D] without a cache, or its frame `time` [B, 1, D] with one: ([B, T or 1, D], cache)."""
    dim, heads = x.shape[-1], self.num_heads
    qkv = Dense((3, heads, dim // heads), ('embed', None, 'heads', 'head_dim'), dtype=self.dtype, name='qkv')(x)
    q, k, v = (qkv[:, :, i] for i in range(3))
    boxed = nn.with_logical_partitioning(nn.initializers.zeros_init(), ('heads', None))
    bias = self.param('distance', boxed, (heads, self.window), jnp.float32)
    if cache is None:
      out = self._blocks(q, k, v, bias)
    else:
      k, v = (jax.lax.dynamic_update_index_in_dim(cache[n], y[:, 0], time % self.window, 1)
              for n, y in (('k', k), ('v', v)))
      cache, ago = {'k': k, 'v': v}, (time - jnp.arange(self.window)) % self.window
      out = _attend(q, k, v, bias[:, ago][:, None], ago <= time)
    return Dense((dim,), ('heads', 'embed'), dtype=self.dtype, fold=2, name='proj')(out), cache

  def _blocks(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Blocks of `window` queries that look at their own block and the one before it: memory grows with T * window."""
    batch, length, heads, width = q.shape
    w, count = self.window, -(-length // self.window)
    tail = (0, count * w - length)
    split = lambda x: jnp.pad(x, ((0, 0), tail, (0, 0), (0, 0))).reshape(batch, count, w, heads, width)
    before = lambda x: jnp.concatenate([jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1], x], axis=2)
    q, k, v = split(q), before(split(k)), before(split(v))
    ago = w + jnp.arange(w)[:, None] - jnp.arange(2 * w)  # [W, 2W]
    place = (jnp.arange(count)[:, None] - 1) * w + jnp.arange(2 * w)  # [N, 2W]
    seen = ((ago >= 0) & (ago < w)) & (place >= 0)[:, None]  # [N, W, 2W]
    out = _attend(q, k, v, bias[:, ago.clip(0, w - 1)], seen[:, None])
    return out.reshape(batch, count * w, heads, width)[:, :length]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, seen: jax.Array) -> jax.Array:
  """Attention [..., N, H, Dh] with a bias [H, N, M] where `seen` (to broadcast with [..., H, N, M])."""
  logits = jnp.einsum('...nhd,...mhd->...hnm', q.astype(jnp.float32), k.astype(jnp.float32)) * q.shape[-1] ** -0.5
  weights = nn.softmax(jnp.where(seen, logits + bias, -1e30))
  return jnp.einsum('...hnm,...mhd->...nhd', weights.astype(v.dtype), v)


class Block(nn.Module):
  """Local attention and an MLP, each after a layer norm and added."""

  num_heads: int
  window: int
  hidden: int
  dropout: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, cache: Cache | None, time: jax.Array, train: bool):
    drop = lambda y: nn.Dropout(self.dropout)(y, deterministic=not train)
    norm = lambda name: LayerNorm(self.dtype, EPSILON, name=name)
    y, cache = LocalAttention(self.num_heads, self.window, self.dtype, name='attn')(norm('norm1')(x), cache, time)
    x = x + drop(y)
    return x + drop(MLP(self.hidden, dtype=self.dtype, name='mlp')(norm('norm2')(x))), cache


class Queries(nn.Module):
  """Learned queries, one a future token, that look at each other and at a window of frames."""

  count: int
  num_heads: int
  hidden: int
  dropout: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, memory: jax.Array, valid: jax.Array, train: bool) -> jax.Array:
    """[N, count, D] of memory [N, W, D], of which frames `valid` [N, W] exist."""
    dim, heads = memory.shape[-1], self.num_heads
    boxed = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, 'embed'))
    x = self.param('queries', boxed, (self.count, dim), jnp.float32).astype(self.dtype)
    x = jnp.broadcast_to(x, (len(memory), *x.shape))
    axes = ('embed', None, 'heads', 'head_dim')
    dense = lambda parts, name: Dense((parts, heads, dim // heads), axes, dtype=self.dtype, name=name)
    out = lambda y, name: Dense((dim,), ('heads', 'embed'), dtype=self.dtype, fold=2, name=name)(y)
    drop = lambda y: nn.Dropout(self.dropout)(y, deterministic=not train)
    norm = lambda name, y: LayerNorm(self.dtype, EPSILON, name=name)(y)
    x = x + drop(out(kernels.self_attention(dense(3, 'qkv')(norm('norm1', x))), 'proj'))
    q, kv = dense(1, 'q')(norm('norm2', x))[:, :, 0], dense(2, 'kv')(memory)
    x = x + drop(out(kernels.attention(q, kv[:, :, 0], kv[:, :, 1], valid), 'cross'))
    x = x + drop(MLP(self.hidden, dtype=self.dtype, name='mlp')(norm('norm3', x)))
    return norm('norm', x)


class Anticipator(nn.Module):
  """Features of the frames of a video to the current phase, future tokens and remaining times.

  Attributes:
    num_classes: K phases; class K of a future token is the end of the video.
    tokens, stride: F future tokens, the first `stride` seconds ahead: 30 of 60 s as published, a horizon of 30 minutes.
    dim, depth, num_heads, hidden: of the encoder, and of the one layer of the decoder.
    window: frames that a frame looks at. pooled: width of the key pooling.
  """

  num_classes: int
  tokens: int = 30
  stride: float = 60.0
  dim: int = 512
  depth: int = 2
  num_heads: int = 8
  hidden: int = 1024
  window: int = 20
  pooled: int = 64
  dropout: float = 0.1
  dtype: Any = 'float32'

  def __post_init__(self):
    if self.dim % self.num_heads:
      raise UserError(f'anticipator: num_heads {self.num_heads} does not divide dim {self.dim}')
    super().__post_init__()

  @property
  def horizon(self) -> float:
    """Minutes that the future tokens reach ahead."""
    return self.tokens * self.stride / 60

  def __call__(self, x: jax.Array, at: jax.Array | None = None, train: bool = False) -> Anticipation:
    """Of features [B, T, D]; `at` [A] int are the frames with future tokens, by default the last one alone."""
    at = jnp.array([x.shape[1] - 1]) if at is None else at
    return self._run(x, None, at, train)[0]

  def cache(self, batch: int) -> Cache:
    """What `step` remembers before the first frame of videos [B]."""
    kv = jnp.zeros((batch, self.window, self.num_heads, self.dim // self.num_heads), self.dtype)
    return {'time': jnp.zeros((), jnp.int32), 'top': jnp.full((batch, self.pooled), -jnp.inf, self.dtype),
            'fused': jnp.zeros((batch, self.window, self.dim), self.dtype),
            'blocks': [{'k': kv, 'v': kv} for _ in range(self.depth)]}

  def step(self, cache: Cache, frame: jax.Array) -> tuple[Cache, Anticipation]:
    """(cache, what is said at the next frame [B, D], T = A = 1): `module.apply(v, cache, frame, method='step')`."""
    said, cache = self._run(frame[:, None], cache, jnp.array([0]), False)
    return cache, said

  @nn.compact
  def _run(self, x: jax.Array, cache: Cache | None, at: jax.Array, train: bool) -> tuple[Anticipation, Any]:
    dtype = jnp.dtype(self.dtype)
    dense = lambda width, name: Dense((width,), ('embed', None), dtype=dtype, name=name)
    norm = lambda name, y: LayerNorm(dtype, EPSILON, name=name)(y)
    time, blocks = jnp.zeros((), jnp.int32) if cache is None else cache['time'], []
    h = dense(self.dim, 'project')(x)
    for i in range(self.depth):
      block = Block(self.num_heads, self.window, self.hidden, self.dropout, dtype, name=f'block{i}')
      h, state = block(h, None if cache is None else cache['blocks'][i], time, train)
      blocks.append(state)
    h = norm('norm', h)
    keys = norm('key_norm', nn.relu(dense(self.pooled, 'key')(h)))
    top = jax.lax.cummax(keys, axis=1) if cache is None else jnp.maximum(keys, cache['top'][:, None])
    y = norm('fuse_norm1', norm('wide_norm', nn.relu(dense(self.dim, 'wide')(top))) + h)
    y = norm('fuse_norm2', norm('fuse_norm', nn.relu(dense(self.dim, 'fuse')(y))) + y)  # [B, T, dim]
    current = dense(self.num_classes, 'current')(y).astype(jnp.float32)
    ahead = dense(self.num_classes + 1, 'remaining')(y).astype(jnp.float32)
    memory, ago, fused = self._memory(y, at, time, cache)
    table = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, 'embed'))
    places = self.param('distance', table, (self.window, self.dim), jnp.float32)
    valid = (ago >= 0) & (ago <= (time if cache is not None else at[:, None]))  # [A, W]
    memory = (memory + places[ago].astype(dtype)).reshape(-1, self.window, self.dim)
    queries = Queries(self.tokens, self.num_heads, self.hidden, self.dropout, dtype, name='future')
    found = queries(memory, jnp.tile(valid, (len(x), 1)), train)
    future = dense(self.num_classes + 1, 'future_head')(found).astype(jnp.float32)
    said = Anticipation(current, future.reshape(len(x), len(at), self.tokens, -1), self.horizon * nn.sigmoid(-ahead))
    return said, cache and {'time': time + 1, 'top': top[:, 0], 'fused': fused, 'blocks': blocks}

  def _memory(self, y: jax.Array, at: jax.Array, time: jax.Array, cache: Cache | None):
    """([B, A, W, D] the frames up to each of `at`, how long ago [A, W] each is, the ring of a cache)."""
    slots = jnp.arange(self.window)
    if cache is None:
      ago = jnp.broadcast_to(slots, (len(at), self.window))
      return y[:, (at[:, None] - slots).clip(0)], ago, None
    ring = jax.lax.dynamic_update_index_in_dim(cache['fused'], y[:, 0], time % self.window, 1)
    return ring[:, None], ((time - slots) % self.window)[None], ring
