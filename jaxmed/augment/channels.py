"""Which channels of a sample a view shows."""

import jax
import jax.numpy as jnp

CHANNEL_SAMPLING = ('none', 'hcs', 'hcs_sample', 'diverse', 'single')


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


def sampled_each(rng: jax.Array, mask: jax.Array) -> jax.Array:
  """Hierarchical channel sampling, drawn for each sample separately; arguments as above."""
  count_key, order_key = jax.random.split(rng)
  there = mask.sum(axis=1, keepdims=True)
  count = 1 + jnp.floor(jax.random.uniform(count_key, there.shape) * there)  # U{1 .. its own number}
  noise = jnp.where(mask, jax.random.uniform(order_key, mask.shape), 2.0)
  return mask & (jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < count)


def single_channel(rng: jax.Array, mask: jax.Array) -> jax.Array:
  """One channel of each sample (IC-ViT, arXiv 2503.09826; bags of channels): a subset of `mask` [B, C]."""
  noise = jnp.where(mask, jax.random.uniform(rng, mask.shape), 2.0)
  return mask & (jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < 1)


def diverse_channel_sampling(rng: jax.Array, mask: jax.Array, channels: jax.Array, similarity: jax.Array,
                             temperature: float) -> jax.Array:
  """Diverse channel sampling (DiChaViT, arXiv 2405.16419; diverse_channel_vit, models/dichavit.py).

  Per batch: the number n ~ U{1 .. C} and a first channel at random; then n - 1 others without replacement, with
  probabilities softmax((1 - cos(first, other)) / temperature). A channel's noise goes by its id, so that samples of the
  same channels keep the same ones; samples of other channels begin with another first.

  Args:
    mask: [B, C] bool, the channels that are there. channels: [B, C] ids.
    similarity: [V, V] cosine between the channels of the vocabulary.
  Returns:
    [B, C] bool, as of `hierarchical_channel_sampling`.
  """
  count_key, first_key, other_key = jax.random.split(rng, 3)
  count = jax.random.randint(count_key, (), 1, mask.shape[1] + 1)
  size = similarity.shape[0]
  chance = jnp.where(mask, jax.random.uniform(first_key, (size,))[channels], -1.0)
  first = jnp.argmax(chance, axis=1)  # [B] slots
  near = similarity[jnp.take_along_axis(channels, first[:, None], axis=1), channels]  # [B, C]
  # Gumbel noise and the largest scores are draws without replacement, one after the other.
  score = (1 - near) / temperature + jax.random.gumbel(other_key, (size,))[channels]
  score = jnp.where(mask, score, -jnp.inf).at[jnp.arange(len(first)), first].set(jnp.inf)
  return mask & (jnp.argsort(jnp.argsort(-score, axis=1), axis=1) < count)


def cosines(table: jax.Array) -> jax.Array:
  """[V, V] cosine between the rows of a table [V, D], without a gradient."""
  table = jax.lax.stop_gradient(table).astype(jnp.float32)
  unit = table / jnp.maximum(jnp.linalg.norm(table, axis=1, keepdims=True), 1e-12)
  return unit @ unit.T


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
