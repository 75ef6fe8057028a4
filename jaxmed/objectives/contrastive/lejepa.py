"""LeJEPA: views agree, and embeddings are an isotropic Gaussian (Balestriero, LeCun 2025; rbalestr-lab/lejepa)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.contrast import sigreg
from jaxmed.objectives.networks import PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class LeJEPA(Method):
  """(1 - lambda) prediction + lambda SIGReg; no target network, no stopped gradient (README.md, MINIMAL.md).

  Prediction: mean squared distance of every view, global or local, from the mean of the sample's global views. SIGReg:
  the Epps-Pulley statistic of random one-dimensional projections, drawn anew each step, of each view's global batch.

  Attributes:
    sigreg_weight: lambda, in [0, 1]; 0.05, and 0.02 in the minimal example.
    slices: projections a step, 1024 (256 in the minimal example).
    knots, limit: points and end of the quadrature over [0, limit].
    hidden_dim: of the projector's two hidden layers; 0 for 2048, at most 12 times the encoder's width.
    out_dim: of the projector; 128, and 16 in the minimal example.
    feature: 'cls' or 'mean', what the projector reads.
  """

  encoder: Encoder
  sigreg_weight: float = 0.05
  slices: int = 1024
  knots: int = 17
  limit: float = 3.0
  hidden_dim: int = 0
  out_dim: int = 128
  feature: str = 'cls'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (5e-4, 256)  # the README's rate for AdamW; it names no batch, the minimal example uses 256
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'drop_path': 0.1},
      'optimizer': {'weight_decay': 0.05, 'final_learning_rate': 5e-7},
      'augment': {'views': 2, 'local_views': 6, 'scale': (0.3, 1.0), 'local_scale': (0.05, 0.3), **PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, slices=self.slices, limit=self.limit, out_dim=self.out_dim)
    if not 0 <= self.sigreg_weight <= 1:
      raise UserError(f'objective.sigreg_weight {self.sigreg_weight} must lie in [0, 1]')
    if self.knots < 2:
      raise UserError(f'objective.knots {self.knots} must be at least 2')

  @property
  def projector(self) -> MLPHead:
    """Features to the embeddings that are compared."""
    hidden = self.hidden_dim or siamese.width(2048, self.encoder)
    return MLPHead((hidden, hidden, self.out_dim), use_bias=True)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    return siamese.init_with_projector(self.encoder, self.projector, rng, batch, 1)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Prediction and SIGReg over the global batch."""
    del step
    drop_key, slice_key = jax.random.split(rng)
    params = variables['params']
    x, encoder_stats = siamese.encode_all(self.encoder, params['encoder'], batch, drop_key, train, self.feature)
    z, projector_stats = siamese.head_over_all_views(self.projector, params['projector'], x, train)
    centre = z[:, :batch['global']['image'].shape[1]].mean(axis=1, keepdims=True)
    prediction = jnp.square(z - centre).mean()
    gaussian = sigreg(z.swapaxes(0, 1), slice_key, self.slices, self.knots, self.limit)
    loss = (1 - self.sigreg_weight) * prediction + self.sigreg_weight * gaussian
    metrics = {'lejepa_loss': loss, 'prediction': prediction, 'sigreg': gaussian}
    return loss, (with_stats(metrics, train, encoder=encoder_stats, projector=projector_stats), variables['extra'])
