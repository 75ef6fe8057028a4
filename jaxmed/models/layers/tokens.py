"""What goes into an encoder's blocks and what comes out of them, and how images become patches."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Embedded patches with their positions added.

  x: [B, N, D]. valid: [B, N] bool, False for tokens of missing channels; None when all are there.
  position: [B or 1, N, rank] coordinates in [-1, 1] for rotary positions, else None.
  """

  x: jax.Array
  valid: jax.Array | None = None
  position: jax.Array | None = None

  def take(self, index: jax.Array) -> 'Tokens':
    """The tokens at `index` [B, K] of each sample."""
    pick: Callable = lambda a: jnp.take_along_axis(a, index, axis=1)
    position = self.position
    if position is not None:
      position = jnp.broadcast_to(position, (self.x.shape[0], *position.shape[1:]))
      position = jnp.take_along_axis(position, index[..., None], axis=1)
    return Tokens(jnp.take_along_axis(self.x, index[..., None], axis=1),
                  None if self.valid is None else pick(self.valid), position)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
  """An intermediate map of an encoder: the output of a block or a stage, before any final norm.

  patches: [B, N, D], with the N and D of that level; prefix tokens are left out. grid: the static shape of N, (*grid)
  or (C, *grid) for channel tokens, () where some tokens alone went in. ffn: [B, N, D], the output of the MLP of a
  transformer's block, before LayerScale; None for a stage.
  """

  patches: jax.Array
  grid: tuple[int, ...] = dataclasses.field(default=(), metadata={'static': True})
  ffn: jax.Array | None = None

  @property
  def map(self) -> jax.Array:
    """The patches on their grid: [B, *grid, D], or [B, C, *grid, D] for channel tokens."""
    return self.patches.reshape(self.patches.shape[0], *self.grid, self.patches.shape[-1])


def check_levels(family: str, levels: tuple[int, ...], first: int, last: int) -> None:
  """Whether a family has these levels, numbered from `first` to `last`.

  Raises:
    UserError: a level that does not exist; names the family.
  """
  for level in levels:
    if not first <= level <= last:
      raise UserError(f'{family} has no level {level}: expected {first} to {last}')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
  """An encoder's output after the final norm.

  cls: [B, D] or None. registers: [B, R, D] or None. patches: [B, N, D], of which `valid` [B, N] (or None) tells
  which belong to channels that are there. grid: the static shape of N, (*grid) or (C, *grid) for channel tokens.
  pool: [B, D], the pooled vector of a family that normalises after pooling or attends to pool, else None.
  levels: the intermediate maps that the caller asked for, in that order.
  """

  cls: jax.Array | None
  registers: jax.Array | None
  patches: jax.Array
  valid: jax.Array | None = None
  grid: tuple[int, ...] = dataclasses.field(default=(), metadata={'static': True})
  pool: jax.Array | None = None
  levels: tuple[Level, ...] = ()

  @property
  def mean(self) -> jax.Array:
    """Mean of the valid patch tokens [B, D], float32; `pool` where there is one."""
    if self.pool is not None:
      return self.pool.astype(jnp.float32)
    patches = self.patches.astype(jnp.float32)
    if self.valid is None:
      return patches.mean(axis=1)
    weight = self.valid[..., None].astype(jnp.float32)
    return (patches * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)

  def pooled(self, feature: str) -> jax.Array:
    """One vector a sample [B, D], float32: the class token ('cls') or the mean patch ('mean')."""
    if feature == 'cls' and self.cls is not None:
      return self.cls.astype(jnp.float32)
    return self.mean


def drop_channels(image: jax.Array, channel_mask: jax.Array | None) -> jax.Array:
  """Images [B, *size, C] with the channels that `channel_mask` [B, C] rules out zeroed and the rest scaled by C / n.

  The ViT baseline of ChannelViT's authors, for encoders that see all channels together. None leaves all as they are.
  """
  if channel_mask is None:
    return image
  share = channel_mask.mean(axis=-1).reshape(-1, *[1] * (image.ndim - 1))  # n / C
  return without_missing(image / jnp.maximum(share, 1e-6), channel_mask)


def without_missing(image: jax.Array, channel_mask: jax.Array | None) -> jax.Array:
  """Images [B, *size, C] with zeros where `channel_mask` [B, C] is False: a missing channel may hold anything, NaN
  included. None leaves all as they are."""
  if channel_mask is None:
    return image
  return jnp.where(channel_mask.reshape(image.shape[0], *[1] * (image.ndim - 2), -1), image, 0)


def grid_of(size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
  """The token grid of an image of `size`; both must have one rank and the patch must divide the size.

  Raises:
    ValueError: otherwise, naming both.
  """
  if len(size) != len(patch_size) or any(n % p or n < p for n, p in zip(size, patch_size, strict=False)):
    raise ValueError(f'image size {size} does not divide into patches of {patch_size}')
  return tuple(n // p for n, p in zip(size, patch_size, strict=True))


def patchify(image: jax.Array, patch_size: tuple[int, ...], per_channel: bool = False) -> jax.Array:
  """Cuts images [B, *size, C] into patches.

  Returns:
    [B, N, prod(patch_size) * C], pixels of a patch in (*patch, C) order; or, per channel,
    [B, C, N, prod(patch_size)].
  """
  batch, *size, channels = image.shape
  grid = grid_of(tuple(size), patch_size)
  rank = len(grid)
  split = [n for pair in zip(grid, patch_size, strict=True) for n in pair]
  x = image.reshape(batch, *split, channels)  # [B, g0, p0, g1, p1, ..., C]
  g, p, c = list(range(1, 2 * rank, 2)), list(range(2, 2 * rank + 1, 2)), 2 * rank + 1
  count = math.prod(grid)
  if per_channel:
    return x.transpose(0, c, *g, *p).reshape(batch, channels, count, -1)
  return x.transpose(0, *g, *p, c).reshape(batch, count, -1)


def unpatchify(patches: jax.Array, size: tuple[int, ...], patch_size: tuple[int, ...],
               per_channel: bool = False) -> jax.Array:
  """The inverse of `patchify`: [B, N, P * C] (or [B, C, N, P] per channel) -> [B, *size, C]."""
  grid = grid_of(tuple(size), patch_size)
  rank, batch = len(grid), patches.shape[0]
  if per_channel:
    x = patches.reshape(batch, patches.shape[1], *grid, *patch_size)
    order = [0, *(axis for i in range(rank) for axis in (2 + i, 2 + rank + i)), 1]
  else:
    x = patches.reshape(batch, *grid, *patch_size, -1)
    order = [0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank]
  return x.transpose(order).reshape(batch, *size, -1)
