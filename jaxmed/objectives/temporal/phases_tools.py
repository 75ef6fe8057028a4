"""Phase and tools of single frames by one encoder: EndoNet, and stage 1 of TeCNO."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.endonet import EndoNet
from jaxmed.objectives.base import Method
from jaxmed.objectives.losses import temporal
from jaxmed.objectives.networks import Clock, encode, inputs, resting, with_stats

JOINTS = ('sum', 'learned')


@dataclasses.dataclass(frozen=True)
class PhasesTools(Method):
  """Cross-entropy of the phase (`loader.label`) and binary cross-entropy of the tools in the first step of the signal.

  The signal of a record is one row: 1 for a tool that is seen, 0 for one that is not, below 0 for unknown. The encoder
  is what `phases` and `anticipate` read of each frame.

  Attributes:
    tools: channels M of the signal.
    tools_first: whether the phase is read of the features beside the probabilities of tools (EndoNet, Twinanda et al.
      2017), or of the features alone (TeCNO, tobiascz/TeCNO, models/cnn.py).
    detach: whether the phase's loss does not train the tools through these probabilities.
    joint: 'sum' of both losses (EndoNet), or 'learned', exp(-s) loss + s of each with a learned s (TeCNO,
      modules/cnn/feature_extraction.py).
    class_weights: of the phase's cross-entropy, one a class; () for none.
    freeze_encoder: whether the encoder stays as it is and runs as in evaluation.
    feature: 'cls' or 'mean', the vector of a frame. num_classes: filled in from the data.
  """

  encoder: Encoder
  tools: int = 7
  tools_first: bool = True
  detach: bool = False
  joint: str = 'sum'
  class_weights: tuple[float, ...] = ()
  freeze_encoder: bool = False
  feature: str = 'cls'
  num_classes: int = 0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (5e-4, 80)  # of TeCNO, its largest batch on one device
  FEATURE: ClassVar[str] = 'cls'
  FIELDS: ClassVar[tuple[str, ...]] = ('image', 'signal')
  REQUIRED: ClassVar[tuple[str, ...]] = ('label',)
  PREDICTS: ClassVar[str] = 'label'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.0},
      'augment': {'scale': (0.5, 1.0)},
      'loader': {'signal_length': 1},
  }

  def __post_init__(self):
    choose('objective.feature', self.feature, ('cls', 'mean'))
    choose('objective.joint', self.joint, JOINTS)
    if self.tools < 1:
      raise UserError(f'objective.tools {self.tools} must be at least 1')
    temporal.check_weights(self.class_weights, self.num_classes)

  @property
  def head(self) -> EndoNet:
    """Of the vector of a frame."""
    return EndoNet(self.num_classes, self.tools, self.detach, self.tools_first)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    if self.num_classes < 2:
      raise UserError('method phases_tools needs loader.label, a column of the manifest with two phases or more')
    keys = jax.random.split(rng)
    params = {'encoder': self.encoder.init(keys[0], **inputs(batch))['params'],
              'head': self.head.init(keys[1], jnp.zeros((1, self.encoder.embed_dim)))['params']}
    if self.joint == 'learned':
      params['log_variances'] = jnp.zeros(2)
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Both losses over the global batch."""
    del step
    if batch['signal'].shape[-1] != self.tools:
      raise UserError(f'objective.tools={self.tools}, but the signals of the corpus have {batch["signal"].shape[-1]} '
                      'channels: expected one a tool')
    params = variables['params']
    features, stats = encode(self.encoder, params['encoder'], batch, train, {'dropout': rng}, self.freeze_encoder)
    said = self.head.apply({'params': params['head']}, features.pooled(self.feature))
    truth = jnp.where(batch['signal_mask'][:, :1], batch['signal'][:, 0], -1.0)
    weights = jnp.asarray(self.class_weights) if self.class_weights else None
    phase = temporal.class_cross_entropy(said.phases, batch['label'], weights)
    tools = temporal.binary_cross_entropy(said.tools, truth)
    loss = phase + tools if self.joint == 'sum' else temporal.weighed_tasks([phase, tools], params['log_variances'])
    share = lambda right, known: (right & known).sum() / jnp.maximum(known.sum(), 1)
    metrics = {'cross_entropy': phase, 'tools_entropy': tools,
               'accuracy': share(said.phases.argmax(axis=-1) == batch['label'], batch['label'] >= 0),
               'tools_accuracy': share((said.tools > 0) == (truth > 0.5), truth >= 0)}
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """Logits [B, K] of the phases of a plain batch."""
    features = encode(self.encoder, variables['params']['encoder'], batch, False, None)[0]
    return self.head.apply({'params': variables['params']['head']}, features.pooled(self.feature)).phases

  def frozen(self, step: jax.Array) -> Mapping[str, Any]:
    """The encoder, where it stays."""
    return resting(self.freeze_encoder, 0.0, step, self.clock.steps)
