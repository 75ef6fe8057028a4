"""Phases of videos by stages of dilated convolutions over the features of frames: TeCNO and MS-TCN."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.temporal import SIZES, MultiStage
from jaxmed.objectives.base import Method
from jaxmed.objectives.losses import temporal
from jaxmed.objectives.networks import Clock, resting, with_stats
from jaxmed.objectives.temporal import frames

SUMS = ('mean', 'sum')


@dataclasses.dataclass(frozen=True)
class Phases(Method):
  """The class of each frame of a window, of the features of all frames (of a causal head, of those up to it).

  A sample is a window of frames, `loader.window` records of one `loader.window_group` in order: a whole video where it
  is as long as the longest one. Classes are those of `loader.label`, in the order of their names. The loss is
  the cross-entropy of every stage, weighted by class, and with `smoothing` the truncated squared change of log
  probabilities from frame to frame (Farha and Gall 2019), over the frames of videos.

  Attributes:
    head: 'tecno' (Czempiel et al. 2020: causal), 'ms_tcn' (Farha and Gall 2019) or 'ms_tcn_causal'.
    stages, layers, width: of the head; 0 as published.
    dropout: of each layer of the head.
    smoothing: weight of the truncated change; 0.15 of MS-TCN, 0 of TeCNO.
    stage_sum: whether the losses of stages are averaged ('mean', TeCNO) or added ('sum', MS-TCN).
    class_weights: of the cross-entropy, one a class; () for none.
    double_softmax: whether a softmax comes before that of the loss, as in the published code of TeCNO: the loss then
      has a floor above 1 and small gradients.
    freeze_encoder: whether the encoder stays as it is and runs as in evaluation.
    frames_at_once: frames of a window that a frozen encoder computes at once, 0 for all.
    feature: 'cls' or 'mean', the vector of a frame. num_classes: filled in from the data.
  """

  encoder: Encoder
  head: str = 'tecno'
  stages: int = 0
  layers: int = 0
  width: int = 0
  dropout: float = 0.5
  smoothing: float = 0.0
  stage_sum: str = 'mean'
  class_weights: tuple[float, ...] = ()
  double_softmax: bool = False
  freeze_encoder: bool = True
  frames_at_once: int = 64
  feature: str = 'cls'
  num_classes: int = 0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (7e-5, 1)  # of TeCNO, batches of one video
  FEATURE: ClassVar[str] = 'cls'
  WINDOWS: ClassVar[bool] = True
  PREDICTS: ClassVar[str] = 'phases'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.0},
      'augment': {'scale': (1.0, 1.0), 'flip': (0.0, 0.0)},
      'loader': frames.LOADER,
  }

  def __post_init__(self):
    choose('objective.head', self.head, SIZES)
    choose('objective.feature', self.feature, ('cls', 'mean'))
    choose('objective.stage_sum', self.stage_sum, SUMS)
    if min(self.stages, self.layers, self.width, self.frames_at_once) < 0 or self.smoothing < 0:
      raise UserError('objective.stages, layers, width, frames_at_once and smoothing must be at least 0')
    if not 0 <= self.dropout < 1:
      raise UserError(f'objective.dropout {self.dropout} must lie in [0, 1)')
    temporal.check_weights(self.class_weights, self.num_classes)

  @property
  def network(self) -> MultiStage:
    """The stages over the vectors of frames."""
    sizes: dict[str, Any] = {name: vars(self)[name] or value for name, value in SIZES[self.head].items()
                             if name != 'causal'}
    return MultiStage(self.num_classes, **sizes, causal=SIZES[self.head]['causal'], dropout=self.dropout,
                      features=self.encoder.embed_dim)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of windows."""
    frames.checked('phases', self.encoder, batch)
    if self.num_classes < 2:
      raise UserError('method phases needs loader.label, a column of the manifest with two phases or more')
    encoder_key, head_key = jax.random.split(rng)
    x = jnp.zeros((1, 2, self.encoder.embed_dim))
    return {'params': {'encoder': self.encoder.init(encoder_key, **frames.one(batch))['params'],
                       'head': self.network.init(head_key, x)['params']}, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Cross-entropy over the labelled frames of the global batch, over stages, and smoothing."""
    del step
    valid, labels = batch['index'] >= 0, frames.labels(batch)
    logits, stats = self._logits(variables, batch, rng, train)
    weights = jnp.asarray(self.class_weights) if self.class_weights else None
    entropy = [temporal.class_cross_entropy(x, labels, weights, self.double_softmax) for x in logits]
    smooth = [temporal.truncated_mse(x, valid) for x in logits]
    count = len(entropy) if self.stage_sum == 'mean' else 1
    loss = (sum(entropy) + self.smoothing * sum(smooth)) / count
    known = labels >= 0
    right = ((logits[-1].argmax(axis=-1) == labels) & known).sum() / jnp.maximum(known.sum(), 1)
    metrics = {'cross_entropy': entropy[-1], 'smoothness': smooth[-1], 'accuracy': right}
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])

  def _logits(self, variables: Variables, batch: Batch, rng: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    """Logits [S, B, K, classes] of every stage, and the encoder's new running statistics."""
    frames.checked('phases', self.encoder, batch)
    keys, params = jax.random.split(rng), variables['params']
    x, stats = frames.encode(self.encoder, params['encoder'], batch, self.feature, train, {'dropout': keys[0]},
                             self.freeze_encoder, self.frames_at_once)
    return self.network.apply({'params': params['head']}, x, batch['index'] >= 0, train,
                              rngs={'dropout': keys[1]}), stats

  def phases(self, variables: Variables, batch: Batch) -> jax.Array:
    """Logits [B, K, classes] of the frames of windows, of the last stage."""
    return self._logits(variables, batch, jax.random.key(0), False)[0][-1]

  def frozen(self, step: jax.Array) -> dict[str, Any]:
    """The encoder, where it stays."""
    return resting(self.freeze_encoder, 0.0, step, self.clock.steps)
