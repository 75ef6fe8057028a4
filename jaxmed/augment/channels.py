"""Which channels of a sample a view shows."""

import jax
import jax.numpy as jnp

CHANNEL_SAMPLING = ('none', 'hcs')


def hierarchical_channel_sampling(rng: jax.Array, mask: jax.Array) -> jax.Array:
  """Hierarchical channel sampling (insitro/ChannelViT, hcs_channel_vit.py), with static shapes.

  Per batch: first the number of channels n ~ U{1 .. C}, then n channels without replacement; a sample that lacks
  some of the C slots draws min(n, its own number) of its own channels. When all samples have all channels, they all
  keep the same ones, as in the official class.

  Args:
    mask: [B, C] bool, the channels that are there.
  Returns:
    [B, C] bool, a subset of `mask` with at least one channel wherever there is one.
  """
  count_key, order_key = jax.random.split(rng)
  size = mask.shape[1]
  count = jax.random.randint(count_key, (), 1, size + 1)
  priority = jax.random.permutation(order_key, size)  # one order for the whole batch
  rank = jnp.argsort(jnp.argsort(jnp.where(mask, priority, size + priority), axis=1), axis=1)
  return mask & (rank < count)


def by_name(image: jax.Array, channels: jax.Array, mask: jax.Array, size: int) -> jax.Array:
  """Puts each channel into the place of its id, for encoders that take one fixed list of channels.

  Args:
    image: [B, *grid, C]. channels: [B, C] ids below `size`. mask: [B, C] bool, the channels that are there.
  Returns:
    [B, *grid, size], zero where a sample has no such channel.
  """
  shown = jnp.where(mask.reshape(mask.shape[0], *[1] * (image.ndim - 2), -1), image, 0.0)  # NaN must not spread
  return jnp.einsum('b...c,bcv->b...v', shown, _places(channels, mask, size))


def mask_by_name(channels: jax.Array, mask: jax.Array, size: int) -> jax.Array:
  """[B, size] bool: which ids are among the channels [B, C] that are there [B, C]."""
  return _places(channels, mask, size).sum(axis=1) > 0


def _places(channels: jax.Array, mask: jax.Array, size: int) -> jax.Array:
  return jax.nn.one_hot(channels, size) * mask[..., None]  # [B, C, size]
