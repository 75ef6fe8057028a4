"""What DiChaViT adds to a loss: channels and their tokens are kept unlike (arXiv 2405.16419; diverse_channel_vit,
models/loss_fn.py, models/dichavit.py)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.augment.channels import mask_by_name
from jaxmed.contracts import Batch, Encoder
from jaxmed.errors import UserError, choose
from jaxmed.models.layers.tokens import without_missing
from jaxmed.objectives.losses.contrast import normalize
from jaxmed.objectives.networks import own_cells

CLASSES = ('present', 'all')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diversity:
  """A base of methods that add the two losses, with their weights and constants as options.

  Attributes:
    channel_diversity: weight of the first of DiChaViT's losses, 0 for none; of a channel_vit.
    token_diversity: weight of the second, 0 for none; of a channel_vit. Where a method hides tokens, of those that are
      shown with all others.
    diversity_temperature: of the first.
    same_channel, other_channels: factors of the two parts of the second.
    diversity_classes: of the first: the channels that are 'present', whose proxies begin at random (DiChaViT), or
      'all', whose proxies begin orthogonal (cha_mae_vit, models/cha_mae_vit.py).
  """

  channel_diversity: float = 0.0
  token_diversity: float = 0.0
  diversity_temperature: float = 0.07
  same_channel: float = 1.0
  other_channels: float = 4.0
  diversity_classes: str = 'present'

  def check_diversity(self, encoder: Encoder) -> None:
    """Raises a UserError for an option out of range, or that the encoder does not go with."""
    choose('objective.diversity_classes', self.diversity_classes, CLASSES)
    if min(self.channel_diversity, self.token_diversity) < 0 or self.diversity_temperature <= 0:
      raise UserError('objective.channel_diversity and token_diversity must be at least 0, diversity_temperature above '
                      f'0, not {self.channel_diversity}, {self.token_diversity} and {self.diversity_temperature}')
    if (self.channel_diversity or self.token_diversity) and not encoder.per_channel:
      raise UserError('objective.channel_diversity and token_diversity need one token a channel: a channel_vit')
    if self.channel_diversity and not encoder.supports.channel_vectors:
      raise UserError('objective.channel_diversity looks at channel embeddings: it needs a channel_vit')

  def init_proxies(self, encoder: Encoder, rng: jax.Array) -> dict[str, Any]:
    """{'proxies': [V, D], boxed}, where the first loss has a weight."""
    if not self.channel_diversity:
      return {}
    init = nn.initializers.orthogonal() if self.diversity_classes == 'all' else nn.initializers.normal(1 / 8)
    draw = init(rng, (encoder.in_channels, encoder.embed_dim), jnp.float32)
    return {'proxies': nn.LogicallyPartitioned(draw, ('channels', 'embed'))}

  def diversity_losses(self, encoder: Encoder, params: Any, batch: Batch,
                       shown: jax.Array | None = None) -> dict[str, jax.Array]:
    """The losses that have a weight, by the names of these; `shown` [B, C * N] as `token_diversity` wants it."""
    channels = batch['channels']
    there = batch.get('channel_mask', jnp.ones(channels.shape, bool))  # [B, C]
    out = {}
    if self.channel_diversity:
      present = mask_by_name(channels, there, encoder.in_channels).any(axis=0)  # [V]
      vectors = encoder.apply({'params': params['encoder']}, method='channel_vectors')  # [V, D]
      classes = None if self.diversity_classes == 'present' else jnp.ones_like(present)
      out['channel_diversity'] = channel_diversity(vectors, params['proxies'], present, self.diversity_temperature,
                                                   classes)
    if self.token_diversity:
      image = without_missing(batch['image'], there)
      tokens = encoder.apply({'params': params['encoder']}, image, method='project')  # [B, C, N, D]
      shown = None if shown is None else shown.reshape(tokens.shape[:3])  # [B, C, N]
      out['token_diversity'] = token_diversity(tokens, there, self.same_channel, self.other_channels, shown,
                                               own_cells(encoder, batch))
    return out

  def weighted_diversity(self, losses: dict[str, jax.Array]) -> jax.Array | float:
    """The sum of what `diversity_losses` gave, by the weights."""
    return sum(vars(self)[name] * value for name, value in losses.items())


def channel_diversity(vectors: jax.Array, proxies: jax.Array, present: jax.Array, temperature: float,
                      classes: jax.Array | None = None) -> jax.Array:
  """Cross-entropy of telling each channel's embedding by the proxies of all channels, a scalar.

  The logits are minus the squared distances of unit vectors that are scaled by sqrt(1 / temperature); the mean is over
  the channels that are `present`.

  Args:
    vectors, proxies: [V, D]. present: [V] bool. classes: [V] bool, whose proxies are classes; None for those present.
  """
  squares = (2 - 2 * normalize(vectors) @ normalize(proxies).T) / temperature  # [V, V]
  log_p = jax.nn.log_softmax(jnp.where((present if classes is None else classes)[None], -squares, -1e30), axis=1)
  own = jnp.where(present, jnp.diagonal(log_p), 0.0)
  return -own.sum() / jnp.maximum(present.sum(), 1)


def token_diversity(tokens: jax.Array, there: jax.Array, same: float, other: float,
                    shown: jax.Array | None = None, cells: jax.Array | None = None) -> jax.Array:
  """`same` times the mean cosine of tokens of one channel plus `other` times the mean cosine across channels, a scalar.

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
