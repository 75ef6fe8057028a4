"""SwAV: swaps cluster assignments between views (Caron et al. 2020; facebookresearch/swav)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead, Prototypes
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.clustering import sinkhorn
from jaxmed.objectives.losses.contrast import normalize
from jaxmed.objectives.networks import STRONG_PHOTOMETRIC, Clock, with_stats

QUEUED_BATCHES = 15  # the official 3840 vectors at a batch of 256


@dataclasses.dataclass(frozen=True)
class SwAV(Method):
  """Sinkhorn codes of each global view, predicted from every other view, global and local (main_swav.py).

  Prototypes are normalised in the forward pass. The official code normalises the weights before each step instead: the
  scores are the same, and so is the step to first order, since the part of the gradient along a prototype that its
  normalisation takes away here is taken away there when the weights are normalised again.

  Extra: `queue` [V, Q, D] float32, the latest projections of each global view, and `queued`, how many are real. Codes
  use them, as in the official code, once the queue is full.

  Attributes:
    num_prototypes: 3000 as published.
    temperature: of the predictions. epsilon: of the codes.
    sinkhorn_iterations: of the codes.
    queue_length: vectors of earlier batches that codes are computed with, per view; 0 for none, -1 for 15 batches
      where a batch has fewer images than there are prototypes, else none (3840 at 256, none at 4096, as published).
    queue_start: steps before it is filled; -1 for 15 epochs, at most 30% of the run.
    freeze_prototypes: steps in which prototypes stay; -1 for one epoch (the published 313 and 5005 steps).
    hidden_dim: of the projector; 0 for 2048, at most 12 times the encoder's width.
    out_dim: of the projector.
    feature: 'cls' or 'mean', what the projector reads.
  """

  encoder: Encoder
  num_prototypes: int = 3000
  temperature: float = 0.1
  epsilon: float = 0.05
  sinkhorn_iterations: int = 3
  queue_length: int = -1
  queue_start: int = -1
  freeze_prototypes: int = -1
  hidden_dim: int = 0
  out_dim: int = 128
  feature: str = 'cls'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # MoCo v3's for ViTs with AdamW; the published rate is LARS's
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.1},
      'augment': {'views': 2, 'local_views': 6,
                  'scale': (0.14, 1.0), 'local_scale': (0.05, 0.14), **STRONG_PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, temperature=self.temperature, epsilon=self.epsilon, out_dim=self.out_dim,
                  num_prototypes=self.num_prototypes, sinkhorn_iterations=self.sinkhorn_iterations)
    for name in ('queue_length', 'queue_start', 'freeze_prototypes'):
      if vars(self)[name] < -1:
        raise UserError(f'objective.{name} {vars(self)[name]} must be -1 (chosen here) or at least 0')

  @property
  def projector(self) -> MLPHead:
    """Features to the vectors that are compared with prototypes."""
    hidden = self.hidden_dim or siamese.width(2048, self.encoder)
    return MLPHead((hidden, self.out_dim), use_bias=True)

  @property
  def prototypes(self) -> Prototypes:
    """Vectors of length 1 to their cosines with the prototypes."""
    return Prototypes(self.num_prototypes, 'fixed_norm')

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    count, size = siamese.count_views(batch, 1), batch['global']['image'].shape[0]
    keys = jax.random.split(rng, 3)
    params = {'encoder': siamese.init_encoder(self.encoder, keys[0], batch),
              'projector': siamese.init_head(self.projector, keys[1], self.encoder.embed_dim),
              'prototypes': siamese.init_head(self.prototypes, keys[2], self.out_dim)}
    return {'params': params, 'target': {}, 'extra': self.extra(count, size)}

  def extra(self, count: int, size: int) -> dict:
    """The empty queue of `count` global views of `size` samples a batch; {} for none."""
    length = self.queue_length
    if length < 0:
      length = QUEUED_BATCHES * size if size < self.num_prototypes else 0
    return {'queue': jnp.zeros((count, length, self.out_dim)), 'queued': jnp.zeros((), jnp.int32)} if length else {}

  def frozen(self, step: jax.Array) -> dict[str, jax.Array]:
    """The prototypes, in the first steps."""
    steps = self.clock.warmup(1) if self.freeze_prototypes < 0 else self.freeze_prototypes
    return {'prototypes': step < steps}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Cross-entropy of the swapped predictions over the global batch."""
    params, extra = variables['params'], variables['extra']
    x, encoder_stats = siamese.encode_all(self.encoder, params['encoder'], batch, rng, train, self.feature)
    z, projector_stats = siamese.head_over_all_views(self.projector, params['projector'], x, train)
    count = batch['global']['image'].shape[1]
    loss, metrics, extra = self.cluster(params['prototypes'], extra, normalize(z), count, step, train)
    return loss, (with_stats(metrics, train, encoder=encoder_stats, projector=projector_stats), extra)

  def cluster(self, params: Any, extra: dict, z: jax.Array, count: int, step: jax.Array, train: bool,
              counts: jax.Array | None = None) -> tuple[jax.Array, dict, dict]:
    """Loss, metrics and new queue of vectors.

    Args:
      params: of the prototypes. extra: of `extra`.
      z: [B, V, D] of length 1, the `count` global views first.
      counts: [B] bool, the rows that count; None for all. Not with a queue.
    """
    score = lambda v: self.prototypes.apply({'params': params}, v)
    scores = score(z)  # [B, V, K]
    codes = jnp.stack([self._codes(scores[:, i], score, extra, i, counts) for i in range(count)], axis=1)  # [B, Vg, K]
    loss = swapped(codes, scores / self.temperature, counts)
    if train and extra:
      extra = self._enqueue(extra, jax.lax.stop_gradient(z[:, :count]), step)
    usage = codes.mean(axis=(0, 1)) if counts is None else codes.sum(axis=(0, 1)) / jnp.maximum(codes.sum(), 1)
    return loss, {'swav_loss': loss, 'prototype_entropy': -(usage * jnp.log(usage + 1e-12)).sum()}, extra

  def _codes(self, scores: jax.Array, score: Any, extra: dict, view: int, counts: jax.Array | None) -> jax.Array:
    """Codes [B, K] of a view, computed together with its queue once that is full."""
    if not extra:
      return sinkhorn(scores, self.epsilon, self.sinkhorn_iterations, counts)
    size, length = scores.shape[0], extra['queue'].shape[1]
    full = jnp.broadcast_to(extra['queued'] >= length, length)
    rows = jnp.concatenate([scores, score(extra['queue'][view])])
    weights = jnp.concatenate([jnp.ones(size, bool), full])
    return sinkhorn(rows, self.epsilon, self.sinkhorn_iterations, weights)[:size]

  def _enqueue(self, extra: dict, z: jax.Array, step: jax.Array) -> dict:
    """The queue with z [B, V, D] before it and its oldest vectors gone, from the step on where it starts."""
    start = self.clock.warmup(15) if self.queue_start < 0 else self.queue_start
    length, on = extra['queue'].shape[1], step >= start
    queue = jnp.concatenate([z.swapaxes(0, 1), extra['queue']], axis=1)[:, :length]
    queued = jnp.minimum(extra['queued'] + z.shape[0], length)
    return {'queue': jnp.where(on, queue, extra['queue']), 'queued': jnp.where(on, queued, extra['queued'])}


def swapped(codes: jax.Array, logits: jax.Array, counts: jax.Array | None = None) -> jax.Array:
  """Mean over global views i, and over the other views v, of the cross-entropy of softmax(logits_v) with codes_i.

  Args:
    codes: [B, Vg, K] of the global views, which come first in logits [B, V, K].
    counts: [B] bool, the rows that the mean is over, where codes are 0 in the others; None for all.
  """
  log_p = jax.nn.log_softmax(logits)
  count, views = codes.shape[1], logits.shape[1]
  others = log_p.sum(axis=1, keepdims=True) - log_p[:, :count]
  mean = -(codes * others).sum(axis=-1).mean() / max(views - 1, 1)
  return mean if counts is None else mean * counts.size / jnp.maximum(counts.sum(), 1)
