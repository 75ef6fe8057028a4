"""VICReg: invariance between views, variance and decorrelation of dimensions (Bardes, Ponce, LeCun 2022)."""

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.contrast import covariance, variance
from jaxmed.objectives.networks import PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class VICReg(Method):
  """Weighted sum of three terms over the global batch (facebookresearch/vicreg, main_vicreg.py).

  Invariance: mean squared difference of two views. Variance: hinge at a standard deviation of 1, mean of the views.
  Covariance: squares off the diagonal by the width, summed over both views. With more than two views: means over pairs
  and views, the covariance twice its mean. The expander is batch-normalised view by view.

  Attributes:
    invariance, variance, covariance: weights, 25, 25 and 1 as published.
    hidden_dim: of each of the expander's layers, output included; 0 for 8192, at most 12 times the encoder's width.
    feature: 'cls' or 'mean', what the expander reads.
    encoder_norm: whether the encoder's batch norm is over all views 'together' or over each one 'apart', as in the
      official code, which runs the encoder once a view. Encoders without batch norm are better off with 'together'.
  """

  encoder: Encoder
  invariance: float = 25.0
  variance: float = 25.0
  covariance: float = 1.0
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
    siamese.check(self.feature, self.encoder_norm)
    for name in ('invariance', 'variance', 'covariance'):
      if vars(self)[name] < 0:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least 0')

  @property
  def projector(self) -> MLPHead:
    """The expander: features to the vectors that are compared."""
    width = self.hidden_dim or siamese.width(8192, self.encoder)
    return MLPHead((width, width, width), use_bias=True, last_bias=False)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    return siamese.init_with_projector(self.encoder, self.projector, rng, batch)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The weighted terms over the global batch."""
    del step
    params = variables['params']
    x, encoder_stats = siamese.encode(self.encoder, params['encoder'], batch['global'], rng, train, self.feature,
                                      self.encoder_norm)
    z, projector_stats = siamese.view_by_view(self.projector, params['projector'], x, train)
    couples = list(itertools.combinations(range(z.shape[1]), 2))
    invariance = sum(jnp.square(z[:, i] - z[:, j]).mean() for i, j in couples) / len(couples)
    spread = jax.vmap(variance, in_axes=1)(z).mean()
    redundant = 2 * jax.vmap(covariance, in_axes=1)(z).mean()
    loss = self.invariance * invariance + self.variance * spread + self.covariance * redundant
    metrics = {'vicreg_loss': loss, 'invariance': invariance, 'variance': spread, 'covariance': redundant}
    return loss, (with_stats(metrics, train, encoder=encoder_stats, projector=projector_stats), variables['extra'])
