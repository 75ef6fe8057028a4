"""What DiChaViT adds to a loss: channels and their tokens are kept unlike (arXiv 2405.16419; diverse_channel_vit,
models/loss_fn.py, models/dichavit.py)."""

import jax
import jax.numpy as jnp

from jaxmed.objectives.contrast import normalize


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


def token_diversity(tokens: jax.Array, there: jax.Array, same: float, other: float) -> jax.Array:
  """`same` times the mean cosine of tokens of one channel plus `other` times that of tokens of two, a scalar.

  Each mean is over the ordered pairs of an image, a token with itself left out, and then over images. Sums of unit
  vectors give them without a matrix of all pairs.

  Args:
    tokens: [B, C, N, D], projected patches before embeddings are added. there: [B, C] bool.
  """
  x = jnp.where(there[..., None, None], normalize(tokens), 0.0)
  count = x.shape[2]
  of_channel = x.sum(axis=2)  # [B, C, D]
  within = jnp.square(of_channel).sum(axis=(1, 2))
  total = jnp.square(of_channel.sum(axis=1)).sum(axis=1)
  alone = jnp.square(x).sum(axis=(1, 2, 3))
  channels = there.sum(axis=1)
  pairs = channels * count * (count - 1)
  between = channels * (channels - 1) * count**2
  mean = lambda value, n: value / (n + 1e-6)
  return (same * mean(within - alone, pairs) + other * mean(total - within, between)).mean()
