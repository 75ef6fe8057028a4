"""BYOL: predicts a slowly moving copy's view of the same image (Grill et al. 2020; deepmind-research/byol)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.contrast import cosine_distance, pairs
from jaxmed.objectives.networks import PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class BYOL(Method):
  """Squared distance of normalised predictions and target projections (byol_experiment.py, utils/networks.py).

  Both directions are summed; with more than two views it is twice the mean over ordered pairs. Projector and predictor
  are Dense, batch norm over each view by itself, ReLU, Dense. The target network starts as a copy; the official one is
  drawn anew, and its authors saw no difference.

  Attributes:
    momentum_start: of the target network, to 1 along a cosine: 0.996 for 1000 epochs, 0.99 for 100 or 300 and 0.97
      for 40 (configs/byol.py).
    hidden_dim: of projector and predictor; 0 for 4096, at most 12 times the encoder's width.
    out_dim: of projector and predictor.
    feature: 'cls' or 'mean', what the projector reads.
    encoder_norm: whether the encoder's batch norm is over all views 'together' or over each one 'apart', as in the
      official code, which runs the encoder once a view. Encoders without batch norm are better off with 'together'.
  """

  encoder: Encoder
  momentum_start: float = 0.996
  hidden_dim: int = 0
  out_dim: int = 256
  feature: str = 'cls'
  encoder_norm: str = 'together'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # MoCo v3's for ViTs with AdamW; the published rate is LARS's
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.1},
      'augment': {'views': 2, 'scale': (0.08, 1.0), **PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, self.encoder_norm, out_dim=self.out_dim)
    if not 0 <= self.momentum_start <= 1:
      raise UserError(f'objective.momentum_start {self.momentum_start} must lie in [0, 1]')

  @property
  def head(self) -> MLPHead:
    """The MLP of projector and predictor."""
    hidden = self.hidden_dim or siamese.width(4096, self.encoder)
    return MLPHead((hidden, self.out_dim), use_bias=True, last_bias=False)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    siamese.count_views(batch)
    keys = jax.random.split(rng, 3)
    params = {'encoder': siamese.init_encoder(self.encoder, keys[0], batch),
              'projector': siamese.init_head(self.head, keys[1], self.encoder.embed_dim),
              'predictor': siamese.init_head(self.head, keys[2], self.out_dim)}
    target = {name: jax.tree.map(jnp.copy, params[name]) for name in ('encoder', 'projector')}
    return {'params': params, 'target': target, 'extra': {}}

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the target network that stays (utils/schedules.py:target_ema)."""
    return networks.cosine(self.momentum_start, 1.0, step, self.clock.steps)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Symmetric normalised squared error over the global batch, between 0 and 8."""
    del step
    params, target, group = variables['params'], variables['target'], batch['global']
    x, encoder_stats = siamese.encode(self.encoder, params['encoder'], group, rng, train, self.feature,
                                      self.encoder_norm)
    z, projector_stats = siamese.view_by_view(self.head, params['projector'], x, train)
    q, predictor_stats = siamese.view_by_view(self.head, params['predictor'], z, train)
    teacher_group = networks.seen_by_teacher(group)
    t, _ = siamese.encode(networks.quiet(self.encoder), target['encoder'], teacher_group, rng, train, self.feature,
                          self.encoder_norm)
    t, _ = siamese.view_by_view(self.head, target['projector'], t, train)
    t = jax.lax.stop_gradient(t)
    one = [cosine_distance(q[:, i], t[:, j]) for i, j in pairs(q.shape[1])]
    loss = 2 * sum(one) / len(one)
    stats = dict(encoder=encoder_stats, projector=projector_stats, predictor=predictor_stats)
    return loss, (with_stats({'byol_loss': loss}, train, **stats), variables['extra'])
