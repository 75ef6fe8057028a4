"""What DiChaViT adds to a loss: channels and their tokens are kept unlike (arXiv 2405.16419; diverse_channel_vit,
models/loss_fn.py, models/dichavit.py)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.augment.channels import mask_by_name
from jaxmed.errors import UserError
from jaxmed.models.layers.tokens import without_missing
from jaxmed.objectives.losses.contrast import normalize
from jaxmed.objectives.networks import own_cells


def check(objective: Any) -> None:
  """Options of the two losses, which an objective has by the names of `Supervised`."""
  o = objective
  if min(o.channel_diversity, o.token_diversity) < 0 or o.diversity_temperature <= 0:
    raise UserError('objective.channel_diversity and token_diversity must be at least 0, diversity_temperature above '
                    f'0, not {o.channel_diversity}, {o.token_diversity} and {o.diversity_temperature}')
  if (o.channel_diversity or o.token_diversity) and not o.encoder.per_channel:
    raise UserError('objective.channel_diversity and token_diversity need one token a channel: a channel_vit')
  if o.channel_diversity and not hasattr(o.encoder, 'channel_vectors'):
    raise UserError('objective.channel_diversity looks at channel embeddings: it needs a channel_vit')


def init_proxies(objective: Any, rng: jax.Array) -> dict[str, Any]:
  """{'proxies': [V, D], boxed}, where the first loss has a weight."""
  if not objective.channel_diversity:
    return {}
  draw = jax.random.normal(rng, (objective.encoder.in_channels, objective.encoder.embed_dim))
  return {'proxies': nn.LogicallyPartitioned(draw / 8, ('channels', 'embed'))}


def losses(objective: Any, params: Any, batch: dict, shown: jax.Array | None = None) -> dict[str, jax.Array]:
  """The losses that have a weight, by the names of these; `shown` [B, C * N] as `token_diversity` wants it."""
  encoder, channels = objective.encoder, batch['channels']
  there = batch.get('channel_mask', jnp.ones(channels.shape, bool))
  out = {}
  if objective.channel_diversity:
    present = mask_by_name(channels, there, encoder.in_channels).any(axis=0)
    vectors = encoder.apply({'params': params['encoder']}, method='channel_vectors')
    out['channel_diversity'] = channel_diversity(vectors, params['proxies'], present, objective.diversity_temperature)
  if objective.token_diversity:
    tokens = encoder.apply({'params': params['encoder']}, without_missing(batch['image'], there), method='project')
    shown = None if shown is None else shown.reshape(tokens.shape[:3])
    out['token_diversity'] = token_diversity(tokens, there, objective.same_channel, objective.other_channels, shown,
                                             own_cells(encoder, batch))
  return out


def channel_diversity(vectors: jax.Array, proxies: jax.Array, present: jax.Array, temperature: float) -> jax.Array:
  """Cross-entropy of telling each channel's embedding by the proxies of all channels, a scalar.

  The logits are minus the squared distances of unit vectors that are scaled by sqrt(1 / temperature); the mean is over
  the channels that are `present`, and so are the classes.

  Args:
    vectors, proxies: [V, D]. present: [V] bool.
  """
  squares = (2 - 2 * normalize(vectors) @ normalize(proxies).T) / temperature  # [V, V]
  log_p = jax.nn.log_softmax(jnp.where(present[None], -squares, -1e30), axis=1)
  own = jnp.where(present, jnp.diagonal(log_p), 0.0)
  return -own.sum() / jnp.maximum(present.sum(), 1)


def token_diversity(tokens: jax.Array, there: jax.Array, same: float, other: float,
                    shown: jax.Array | None = None, cells: jax.Array | None = None) -> jax.Array:
  """`same` times the mean cosine of tokens of one channel plus `other` times that of tokens of two, a scalar.

  Each mean is over the ordered pairs of an image, a token with itself left out, and then over images. Sums of unit
  vectors give them without a matrix of all pairs.

  Args:
    tokens: [B, C, N, D], projected patches before embeddings are added. there: [B, C] bool.
    shown: [B, C, N] bool, which tokens are the first of a pair; None for all (cha_mae_vit, models/loss_func.py, where
      a method hides the others; second ones may be hidden there too).
    cells: [B, N] bool, which tokens of a channel belong to the image; None for all.
  """
  exist = there[..., None] & (jnp.ones((1, 1, tokens.shape[2]), bool) if cells is None else cells[:, None])
  x = jnp.where(exist[..., None], normalize(tokens), 0.0)
  count = exist.sum(axis=2).max(axis=1)  # [B], tokens of a channel
  first = exist if shown is None else shown & exist
  y = jnp.where(first[..., None], x, 0.0)
  of_channel, of_first = x.sum(axis=2), y.sum(axis=2)  # [B, C, D]
  within = (of_first * of_channel).sum(axis=(1, 2))
  total = (of_first.sum(axis=1) * of_channel.sum(axis=1)).sum(axis=1)
  alone = jnp.square(y).sum(axis=(1, 2, 3))
  firsts, channels = first.sum(axis=(1, 2)), there.sum(axis=1)
  pairs = firsts * (count - 1)
  between = firsts * (channels - 1) * count
  mean = lambda value, n: value / (n + 1e-6)
  return (same * mean(within - alone, pairs) + other * mean(total - within, between)).mean()
