"""Attention within groups of a map, of neighbours or of places at equal distances: the blocks of D-Former.

Definition: Wu et al. 2022, arXiv 2201.00462; kkk55596/D-Former (dc3deb7), model.py. Maps are [B, *size, D]. A global
group takes one place of each cell of `size / group` places, so that it spans the map. Where the published code is not
what it says, the intended definition is here; both agree where groups divide the maps, as at the published sizes:

- Maps are padded to whole groups in both kinds of blocks. The published code pads global ones to multiples of a listed
  interval (8, 4, 2, 1), so that groups of other sizes come out.
- Nothing looks at padding. The published global blocks look at it where depth alone is padded.
- A map that is smaller than a group along one of its last two axes is one group. The published code looks at the height
  alone, and a block that has seen such a map once keeps its size for all later ones.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels, windows
from jaxmed.models.layers.convolution import Depthwise, Norm, Stage, enlarge, keep
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.transformer import Dense, rematerialised

EPSILON = 1e-5  # of all layer norms

Size = tuple[int, ...]


def group_of(size: Size, group: Size) -> Size:
  """The sides of a group on a map: those of `group`, at most the map's; the whole map where that is small."""
  if any(n < g for n, g in zip(size[-2:], group[-2:], strict=True)):
    return size
  return tuple(min(n, g) for n, g in zip(size, group, strict=True))


def divided(x: jax.Array, group: Size, dilated: jax.Array | bool) -> jax.Array:
  """x [B, *size, D], whose sides are whole groups, in groups [B, G, N, D], of neighbours or spread over the map."""
  size = x.shape[1:-1]
  near = windows.partition(x, group)
  if group == size:
    return near
  stride = tuple(n // g for n, g in zip(size, group, strict=True))
  return jnp.where(dilated, windows.partition(x, stride).swapaxes(1, 2), near)


def joined(x: jax.Array, size: Size, group: Size, dilated: jax.Array | bool) -> jax.Array:
  """The inverse of `divided`: [B, G, N, D] -> [B, *size, D]."""
  near = windows.joined(x, size, group)
  if group == size:
    return near
  stride = tuple(n // g for n, g in zip(size, group, strict=True))
  return jnp.where(dilated, windows.joined(x.swapaxes(1, 2), size, stride), near)


class GroupAttention(nn.Module):
  """Attention among the visible places of each group of [B, *size, D], without a bias of position."""

  num_heads: int
  group: Size
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, dilated: jax.Array | bool, visible: jax.Array | None = None) -> jax.Array:
    """`dilated` [] bool: whether groups are spread over the map."""
    size, dim, heads = x.shape[1:-1], x.shape[-1], self.num_heads
    group = group_of(size, self.group)
    seen = None
    if visible is not None or windows.padded(size, group) != size:
      there = jnp.ones((1, *size, 1), bool) if visible is None else enlarge(visible, size)
      seen = divided(windows.pad(there.astype(jnp.int32), group), group, dilated)[..., 0]
    x = windows.pad(x, group)
    axes = ('embed', None, 'heads', 'head_dim')
    qkv = Dense((3, heads, dim // heads), axes, dtype=self.dtype, name='qkv')(divided(x, group, dilated))
    q, k, v = qkv.transpose(3, 0, 1, 4, 2, 5)  # [B, G, H, N, Dh] each
    out = windows.attend(q, k, v, jnp.zeros((1, 1, 1)), seen).transpose(0, 1, 3, 2, 4)
    out = Dense((dim,), ('heads', 'embed'), dtype=self.dtype, fold=2, name='proj')(out)
    return joined(out, x.shape[1:-1], group, dilated)[(slice(None), *(slice(n) for n in size))]


class Block(nn.Module):
  """Pre-norm attention within groups, and an MLP; zero in hidden places throughout. Shaped for nn.scan.

  Called with (rate of stochastic depth, whether groups are spread over the map) in place of the rate alone.
  """

  drop: bool
  dtype: jnp.dtype
  num_heads: int
  group: Size
  mlp_ratio: float

  @nn.compact
  def __call__(self, x: jax.Array, turn: tuple[jax.Array, jax.Array], visible: jax.Array | None):
    rate, dilated = turn
    dim, dtype = x.shape[-1], self.dtype
    y = keep(Norm(True, EPSILON, dtype, name='norm1')(x), visible)
    y = GroupAttention(self.num_heads, self.group, dtype, name='attn')(y, dilated, visible)
    x = x + self._branch(y, rate, visible)
    y = Norm(True, EPSILON, dtype, name='norm2')(x)
    y = Dense((int(dim * self.mlp_ratio),), ('embed', 'mlp'), dtype=dtype, name='fc1')(y)
    y = Dense((dim,), ('mlp', 'embed'), dtype=dtype, name='fc2')(kernels.gelu(y))
    return x + self._branch(y, rate, visible), None

  def _branch(self, y: jax.Array, rate: jax.Array, visible: jax.Array | None) -> jax.Array:
    return keep(drop(y, rate, self.make_rng('dropout')) if self.drop else y, visible)


def stage(x: jax.Array, rates: jax.Array, visible: jax.Array | None, drops: bool, dtype: Any, shape: tuple,
          name: str, remat: str = 'none') -> jax.Array:
  """A stage inside of a compact method: the dynamic position encoding, then a block for each of `rates`.

  The position encoding is a depthwise 3^d convolution beside the identity. Every second block is dilated. `shape` is
  (num_heads, group, mlp_ratio).
  """
  x = keep(x + Depthwise(3, True, 'torch', dtype, name=f'{name}_pos')(x), visible)
  turns: Any = (rates, jnp.arange(len(rates)) % 2 == 1)
  return Stage(rematerialised(Block, remat), len(rates), drops, dtype, shape, name=name)(x, turns, visible)
