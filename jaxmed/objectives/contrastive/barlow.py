"""Barlow Twins: makes the cross-correlation of two views the identity (Zbontar et al. 2021)."""

import dataclasses
import itertools
from typing import Any, ClassVar

import jax

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.contrast import cross_correlation, redundancy
from jaxmed.objectives.networks import PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class BarlowTwins(Method):
  """Sum of (1 - c_ii)^2 and of lambda c_ij^2 for the correlations c (facebookresearch/barlowtwins, main.py).

  Correlations are over the global batch, of projections that are batch-normalised view by view without scale and bias;
  a held-out batch is normalised by itself too. With more than two views, the mean over pairs.

  Attributes:
    off_diagonal: lambda, the weight of the terms off the diagonal.
    scale: factor on the loss. 1 as in the published code.
    hidden_dim: of each of the projector's layers, output included; 0 for 8192, at most 12 times the encoder's width.
    feature: 'cls' or 'mean', what the projector reads.
    encoder_norm: whether the encoder's batch norm is over all views 'together' or over each one 'apart', as in the
      official code, which runs the encoder once a view. Encoders without batch norm are better off with 'together'.
  """

  encoder: Encoder
  off_diagonal: float = 0.0051
  scale: float = 1.0
  hidden_dim: int = 0
  feature: str = 'cls'
  encoder_norm: str = 'together'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # MoCo v3's for ViTs with AdamW; the published rate is LARS's
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.05},
      'augment': {'views': 2, 'scale': (0.08, 1.0), **PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, self.encoder_norm, scale=self.scale)
    if self.off_diagonal < 0:
      raise UserError(f'objective.off_diagonal {self.off_diagonal} must be at least 0')

  @property
  def projector(self) -> MLPHead:
    """Features to the vectors whose dimensions are correlated."""
    width = self.hidden_dim or siamese.width(8192, self.encoder)
    return MLPHead((width, width, width), last_bias=False)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    return siamese.init_with_projector(self.encoder, self.projector, rng, batch)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Distance of the cross-correlations over the global batch from the identity."""
    del step
    params = variables['params']
    x, encoder_stats = siamese.encode(self.encoder, params['encoder'], batch['global'], rng, train, self.feature,
                                      self.encoder_norm)
    z, projector_stats = siamese.view_by_view(self.projector, params['projector'], x, train)
    couples = list(itertools.combinations(range(z.shape[1]), 2))
    terms = [redundancy(cross_correlation(z[:, i], z[:, j])) for i, j in couples]
    on, off = (sum(part) / len(couples) for part in zip(*terms, strict=True))
    loss = self.scale * (on + self.off_diagonal * off)
    metrics = {'barlow_loss': loss, 'on_diagonal': on, 'off_diagonal': off}
    return loss, (with_stats(metrics, train, encoder=encoder_stats, projector=projector_stats), variables['extra'])
