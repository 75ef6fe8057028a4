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
