"""Bag of channels: a one-channel ViT sees each channel by itself, and features are put together.

De Lorenci et al. 2025, Scaling Channel-Adaptive Self-Supervised Learning (facebookresearch/dinov2,
docs/README_CHANNEL_ADAPTIVE_DINO.md).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmed.contracts import Supports
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers.tokens import Features, Tokens, grid_of, patchify, without_missing

POOLINGS = ('mean', 'concat')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BagTokens(Tokens):
  """Tokens that know their channel.

  place: [B, N], where in the whole grid each of some tokens lies; None where all are here in their order.
  grid: (C, *grid) of all tokens, static.
  """

  place: jax.Array | None = None
  grid: tuple[int, ...] = dataclasses.field(default=(), metadata={'static': True})

  def take(self, index: jax.Array) -> 'BagTokens':
    """The tokens at `index` [B, K] of each sample, of all."""
    some = super().take(index)
    return BagTokens(some.x, some.valid, some.position, index, self.grid)


class BagOfChannels(ViT):
  """ViT of one channel, whose rows are the channels of images: no token looks at another channel.

  Parameters are those of `single`, whatever channels there are. Tokens are channel-major, as ChannelViT's. The class
  token and registers of an image are the means over its channels; a method trains on those.

  Attributes:
    in_channels: size of the vocabulary; an input may hold any number of its channels in any order.
    pooling: what a trained encoder gives for a vector: 'mean', over the channels that are there, or 'concat', one
      after the other by their places in the vocabulary, zeros for those that are missing: [B, V * D].

  Where a method shows some tokens alone, each channel still has a row as long as its grid, so that hidden tokens save
  no time.
  """

  pooling: str = 'mean'

  per_channel = True
  supports = Supports(one_pass=True, embed_patches=True, project=True, concatenated=True, levels=True)

  @property
  def single(self) -> ViT:
    """The one-channel ViT that has the same parameters."""
    fields = {k: getattr(self, k) for k in ViT.__dataclass_fields__ if k not in ('parent', 'name', 'in_channels')}
    return ViT(**fields, in_channels=1)

  def project(self, image: jax.Array) -> jax.Array:
    """Projected patches [B, C, N, D] of images [B, *size, C], before anything is added."""
    return self.patch_embed(patchify(image, self.patch_size, per_channel=True))

  def embed_patches(self, image: jax.Array, channels: jax.Array | None = None,
                    channel_mask: jax.Array | None = None, hidden: jax.Array | None = None,
                    sizes: jax.Array | None = None) -> BagTokens:
    """Embeds images [B, *size, C], normalised float, as C * N patch tokens with positions.

    Arguments as of `ChannelViT.embed_patches`, without `sizes`; a channel's name makes no difference.
    """
    del channels
    if sizes is not None:
      raise ValueError('a bag of channels takes images of one size')
    batch, *size, count = image.shape
    grid = grid_of(tuple(size), self.patch_size)
    image = without_missing(image, channel_mask)
    x = self.project(image)
    x = self._hide(x, None if hidden is None else hidden.reshape(x.shape[:3]))
    x = x + self._position_table(grid).astype(x.dtype)
    tokens = x.shape[2]
    valid = None if channel_mask is None else jnp.repeat(channel_mask, tokens, axis=1)
    where = self._coordinates(grid)
    position = None if where is None else jnp.tile(where, (1, count, 1))
    return BagTokens(x.reshape(batch, -1, x.shape[-1]), valid, position, None, (count, *grid))

  def concatenated(self, image: jax.Array, channels: jax.Array | None = None, channel_mask: jax.Array | None = None,
                   levels: tuple[int, ...] = ()) -> Features:
    """Features whose vectors `cls` and `mean` are [B, V * D]: each channel at the place of its id, zeros elsewhere."""
    tokens = self.embed_patches(image, channels, channel_mask)
    x, found = self._through(tokens, False, tokens.grid, levels)
    each, there = self._each(x, tokens, False)
    batch, count = there.shape
    ids = jnp.broadcast_to(jnp.arange(count), there.shape) if channels is None else channels
    places = jax.nn.one_hot(ids, self.in_channels) * there[..., None]  # [B, C, V]
    spread: Callable = lambda a: jnp.einsum('bcv,bcd->bvd', places, a.astype(jnp.float32)).reshape(batch, -1)
    vectors = each.patches.reshape(batch, count, -1, self.embed_dim).mean(axis=2, dtype=jnp.float32)
    cls = None if each.cls is None else spread(each.cls)
    return dataclasses.replace(each, cls=cls, registers=None, pool=spread(vectors), levels=found)

  def _with_prefix(self, tokens: Tokens, train: bool) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """As ViT's, of [B * C, N] tokens: each channel by itself."""
    assert isinstance(tokens, BagTokens)
    (batch, _, dim), count, cells = tokens.x.shape, tokens.grid[0], math.prod(tokens.grid[1:])
    x, valid = tokens.x, tokens.valid
    if tokens.place is not None:  # back to where each came from; padding goes nowhere
      here = jnp.ones(x.shape[:2], bool) if valid is None else valid
      rows, place = jnp.arange(batch)[:, None], jnp.where(here, tokens.place, count * cells)
      x = jnp.zeros((batch, count * cells, dim), x.dtype).at[rows, place].set(x, mode='drop')
      valid = jnp.zeros((batch, count * cells), bool).at[rows, place].set(True, mode='drop')
    valid = None if valid is None else valid.reshape(batch * count, cells)
    if valid is not None and not self.num_prefix_tokens:  # an empty channel looks at itself, and nobody at it
      valid = valid | ~valid.any(axis=1, keepdims=True)
    where = None if tokens.position is None else self._coordinates(tokens.grid[1:])
    return super()._with_prefix(Tokens(x.reshape(batch * count, cells, dim), valid, where), train)

  def _features(self, x: jax.Array, tokens: Tokens, grid: tuple[int, ...], local: bool) -> Features:
    """Splits the blocks' output [B * C, N, D] after the final norm; means over the channels that are there."""
    each, there = self._each(x, tokens, local)
    weight = there / jnp.maximum(there.sum(axis=1, keepdims=True), 1)  # [B, C]
    mean: Callable = lambda a: jnp.einsum('bc,bc...->b...', weight, a.astype(jnp.float32)).astype(a.dtype)
    cls, registers = (None if a is None else mean(a) for a in (each.cls, each.registers))
    return dataclasses.replace(each, cls=cls, registers=registers, grid=grid)

  def _each(self, x: jax.Array, tokens: Tokens, local: bool) -> tuple[Features, jax.Array]:
    """Features with `cls` [B, C, D] and `registers` [B, C, R, D] of each channel, and which are there [B, C]."""
    assert isinstance(tokens, BagTokens)
    rows = super()._features(x, tokens, tokens.grid, local)
    batch, count = len(tokens.x), tokens.grid[0]
    apart: Callable = lambda a: None if a is None else a.reshape(batch, count, *a.shape[1:])
    patches = _by_image(rows.patches, tokens)
    there = jnp.ones((batch, count), bool)
    if tokens.place is not None:
      here = jnp.ones(tokens.place.shape, bool) if tokens.valid is None else tokens.valid
      owner = tokens.place // math.prod(tokens.grid[1:])
      there = (jax.nn.one_hot(owner, count, dtype=bool) & here[..., None]).any(axis=1)
    elif tokens.valid is not None:
      there = tokens.valid.reshape(batch, count, -1).any(axis=2)
    return dataclasses.replace(rows, cls=apart(rows.cls), registers=apart(rows.registers), patches=patches), there

  def _patches(self, x: jax.Array, tokens: Tokens) -> jax.Array:
    """The patches [B, N, D] of a block's output [B * C, N, D]."""
    assert isinstance(tokens, BagTokens)
    return _by_image(super()._patches(x, tokens), tokens)


def _by_image(patches: jax.Array, tokens: BagTokens) -> jax.Array:
  """Patches [B * C, N, D] of channels as patches of images [B, C * N, D], or the tokens among them."""
  patches = patches.reshape(len(tokens.x), -1, patches.shape[-1])
  return patches if tokens.place is None else jnp.take_along_axis(patches, tokens.place[..., None], axis=1)


def bag_of(model: ViT, in_channels: int, pooling: str = 'mean') -> BagOfChannels:
  """The bag with a vocabulary of `in_channels` that has the parameters of a one-channel ViT."""
  fields = {k: getattr(model, k) for k in ViT.__dataclass_fields__ if k not in ('parent', 'name', 'in_channels')}
  return BagOfChannels(**fields, in_channels=in_channels, pooling=pooling)
