"""Regression of a number, such as an age: absolute error or Huber loss of a standardised column."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.layers.transformer import Dense
from jaxmed.objectives.base import Method
from jaxmed.objectives.networks import Clock, encode, inputs, resting, with_stats


@dataclasses.dataclass(frozen=True)
class Regress(Method):
  """Trains encoder and a linear head on the batch's `number`, in standard deviations (NaN counts as no number).

  Attributes:
    mean, std: of the number, by which it is standardised; filled in from the training records where std is 0.
    huber: error in standard deviations from which on the Huber loss is linear (Huber 1964); 0 for the absolute error.
    feature: 'cls' or 'mean', what the head reads.
    freeze_encoder: whether the encoder's weights stay as they are; it then runs as in evaluation.
    head_first: fraction of the run, from its beginning, in which the head alone is trained.
  """

  encoder: Encoder
  mean: float = 0.0
  std: float = 0.0
  huber: float = 0.0
  feature: str = 'mean'
  freeze_encoder: bool = False
  head_first: float = 0.0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (1e-3, 256)
  FIELDS: ClassVar[tuple[str, ...]] = ('image', 'number')
  REQUIRED: ClassVar[tuple[str, ...]] = ('number',)
  PREDICTS: ClassVar[str] = 'number'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'drop_path': 0.1},
      'optimizer': {'weight_decay': 0.05},
      'augment': {'scale': (0.4, 1.0)},
      'checkpoint': {'best': 'val_mae', 'best_mode': 'min'},
  }

  def __post_init__(self):
    choose('objective.feature', self.feature, ('cls', 'mean'))
    if self.huber < 0 or self.std < 0:
      raise UserError(f'objective.huber {self.huber} and std {self.std} must be at least 0')
    if not 0 <= self.head_first < 1:
      raise UserError(f'objective.head_first {self.head_first} must lie in [0, 1)')

  @property
  def head(self) -> Dense:
    """Linear, to one number."""
    return Dense((1,), ('embed', None))

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    encoder_key, head_key = jax.random.split(rng)
    encoder = self.encoder.init(encoder_key, **inputs(batch))['params']
    head = self.head.init(head_key, jnp.zeros((1, self.encoder.embed_dim)))['params']
    return {'params': {'encoder': encoder, 'head': head}, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean loss over the samples of the global batch that have a number."""
    del step
    known = jnp.isfinite(batch['number'])
    told, stats = self._told(variables, batch, train, {'dropout': rng})
    error = jnp.where(known, told - (jnp.where(known, batch['number'], 0) - self.mean) / self.std, 0)
    size = jnp.abs(error)
    bent = jnp.where(size <= self.huber, 0.5 * jnp.square(error), self.huber * (size - 0.5 * self.huber))
    mean = lambda x: jnp.where(known, x, 0).sum() / jnp.maximum(known.sum(), 1)
    loss = mean(bent if self.huber else size)
    return loss, (with_stats({'mae': self.std * mean(size)}, train, encoder=stats), variables['extra'])

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """Numbers [B] of a plain batch, in the units of the column."""
    return self.mean + self.std * self._told(variables, batch, False, None)[0]

  def frozen(self, step: jax.Array) -> Mapping[str, Any]:
    """The encoder, at all steps or at the first ones."""
    return resting(self.freeze_encoder, self.head_first, step, self.clock.steps)

  def _told(self, variables: Variables, batch: Batch, train: bool, rngs: Any) -> tuple[jax.Array, Any]:
    """Standardised numbers [B], and running statistics."""
    features, stats = encode(self.encoder, variables['params']['encoder'], batch, train, rngs, self.freeze_encoder)
    return self.head.apply({'params': variables['params']['head']}, features.pooled(self.feature))[:, 0], stats
