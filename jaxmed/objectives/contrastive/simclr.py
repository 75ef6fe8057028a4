"""SimCLR: contrasts the views of an image with those of all others (Chen et al. 2020; google-research/simclr)."""

import dataclasses
from typing import Any, ClassVar

import jax

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.contrast import nt_xent
from jaxmed.objectives.networks import STRONG_PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class SimCLR(Method):
  """NT-Xent between projected views (google-research/simclr, objective.py and model_util.py).

  The projector is Dense, batch norm, ReLU, and at last Dense and batch norm, over all views together; the official
  last norm has a scale, this one has none (as MoCo v3 has it). The loss is the mean over views (eq. 1). The global
  batch gives the negatives. Any number of views of at least 2.

  Attributes:
    temperature: of the cosines; 0.1 as published, 0.5 suits small batches (the paper's CIFAR-10 setting).
    layers: of the projector, 3 as in the official code (2 in the paper).
    hidden_dim: of the projector; 0 for the encoder's width, as published.
    out_dim: of the projector.
    sum_views: the loss is the sum over the views, as in the official code, and not their mean: twice as large for two.
      Under LARS and SGD it says how much weight decay counts, and how far biases and norms move.
    feature: 'cls' or 'mean', what the projector reads.
    chunk: keys that are compared at a time, 0 for all at once, -1 chooses (see contrast.log_partition).
  """

  encoder: Encoder
  temperature: float = 0.1
  layers: int = 3
  hidden_dim: int = 0
  out_dim: int = 128
  sum_views: bool = False
  feature: str = 'cls'
  chunk: int = -1
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # MoCo v3's for ViTs with AdamW; the published rate is LARS's
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.1},
      'augment': {'views': 2, 'scale': (0.08, 1.0), **STRONG_PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, temperature=self.temperature, out_dim=self.out_dim)
    if self.layers < 1:
      raise UserError(f'objective.layers {self.layers} must be at least 1')
    if self.chunk < -1:
      raise UserError(f'objective.chunk {self.chunk} must be -1 (chosen), 0 (all at once) or a number of keys')

  @property
  def projector(self) -> MLPHead:
    """Features to the vectors that are compared."""
    hidden = self.hidden_dim or self.encoder.embed_dim
    return MLPHead((*(hidden,) * (self.layers - 1), self.out_dim), last_norm='plain', last_bias=False)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    return siamese.init_with_projector(self.encoder, self.projector, rng, batch)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """NT-Xent over all global views of the global batch."""
    del step
    params = variables['params']
    x, encoder_stats = siamese.encode(self.encoder, params['encoder'], batch['global'], rng, train, self.feature)
    z, projector_stats = siamese.head_over_all_views(self.projector, params['projector'], x, train)
    loss, accuracy = nt_xent(z, self.temperature, self.chunk)
    metrics = {'nt_xent': loss, 'contrast_accuracy': accuracy}
    loss = loss * (z.shape[1] if self.sum_views else 1)
    return loss, (with_stats(metrics, train, encoder=encoder_stats, projector=projector_stats), variables['extra'])
