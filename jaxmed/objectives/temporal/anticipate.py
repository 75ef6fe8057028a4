"""The current phase of a video, its future phases and the time until each: the losses of SWAG."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.anticipator import Anticipation, Anticipator
from jaxmed.objectives.base import Method
from jaxmed.objectives.losses import temporal
from jaxmed.objectives.networks import Clock, resting, with_stats
from jaxmed.objectives.temporal import frames


@dataclasses.dataclass(frozen=True)
class Anticipate(Method):
  """A causal transformer over the features of the frames of a window says what is and what comes.

  A sample is a window of frames, `loader.window` records of one `loader.window_group` in order. Where a window has room
  behind the last frame, the video ends there, and what is later is the end. A full window may go on: what lies behind
  it is unknown and does not count, so that windows should be whole videos or much longer than the horizon.

  The loss is the weighted sum of cross-entropy of the current phase, of cross-entropy of future tokens at `anchors`
  frames, drawn in training and at equal distances otherwise, and of the error of the remaining times (SWAG,
  func/train_eval_ops.py and R2A2/train/losses/remaining_time_loss.py, 'mae' with exponential weights).

  Attributes:
    tokens, stride: future tokens, and seconds between them. fps: frames of a window in a second.
    dim: width of the transformer, 0 for the encoder's, 512 at most. depth, num_heads, hidden_dim: of it; the decoder
      has one layer of the same sizes.
    look_back: frames that a frame looks at; what is earlier goes through the maximum of `pooled_dim` features.
    dropout: of its blocks.
    current_weight, future_weight, time_weight: of the three losses.
    anchors: frames of a window whose future is trained.
    class_weights: of the current phase's cross-entropy, one a class; () for none.
    freeze_encoder, frames_at_once, feature, num_classes: as of method phases.
  """

  encoder: Encoder
  tokens: int = 30
  stride: float = 60.0
  fps: float = 1.0
  dim: int = 0
  depth: int = 2
  num_heads: int = 8
  hidden_dim: int = 1024
  look_back: int = 20
  pooled_dim: int = 64
  dropout: float = 0.1
  current_weight: float = 0.5
  future_weight: float = 0.5
  time_weight: float = 0.005
  anchors: int = 8
  class_weights: tuple[float, ...] = ()
  freeze_encoder: bool = True
  frames_at_once: int = 64
  feature: str = 'cls'
  num_classes: int = 0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (1e-4, 64)
  FEATURE: ClassVar[str] = 'cls'
  WINDOWS: ClassVar[bool] = True
  PREDICTS: ClassVar[str] = 'phases'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'augment': {'scale': (1.0, 1.0), 'flip': (0.0, 0.0)},
      'loader': frames.LOADER,
  }

  def __post_init__(self):
    choose('objective.feature', self.feature, ('cls', 'mean'))
    least = dict(tokens=1, depth=1, num_heads=1, hidden_dim=1, look_back=1, pooled_dim=1, anchors=1, dim=0,
                 frames_at_once=0, current_weight=0, future_weight=0, time_weight=0)
    for name, value in least.items():
      if vars(self)[name] < value:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least {value}')
    if self._step < 1:
      raise UserError(f'objective.stride {self.stride} s are less than a frame at objective.fps {self.fps}')
    if not 0 <= self.dropout < 1:
      raise UserError(f'objective.dropout {self.dropout} must lie in [0, 1)')
    if self._width % self.num_heads:
      raise UserError(f'objective.num_heads {self.num_heads} does not divide objective.dim {self._width}')
    temporal.check_weights(self.class_weights, self.num_classes)

  @property
  def _step(self) -> int:
    """Frames between future tokens."""
    return round(self.stride * self.fps)

  @property
  def _width(self) -> int:
    return self.dim or min(512, self.encoder.embed_dim)

  @property
  def network(self) -> Anticipator:
    """The transformer over the vectors of frames."""
    return Anticipator(self.num_classes, self.tokens, self.stride, self._width, self.depth, self.num_heads,
                       self.hidden_dim, self.look_back, self.pooled_dim, self.dropout)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of windows."""
    frames.checked('anticipate', self.encoder, batch)
    if self.num_classes < 2:
      raise UserError('method anticipate needs loader.label, a column of the manifest with two phases or more')
    encoder_key, head_key = jax.random.split(rng)
    x = jnp.zeros((1, 2, self.encoder.embed_dim))
    return {'params': {'encoder': self.encoder.init(encoder_key, **frames.one(batch))['params'],
                       'head': self.network.init(head_key, x)['params']}, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Weighted sum of the three losses over the frames of the global batch."""
    del step
    valid, labels, k = batch['index'] >= 0, frames.labels(batch), self.num_classes
    length, ended = labels.shape[1], ~valid[:, -1]
    anchor_key, net_key = jax.random.split(rng)
    spread = (jnp.arange(self.anchors) * length) // self.anchors
    at = jax.random.randint(anchor_key, (self.anchors,), 0, length) if train else spread
    said, stats = self._said(variables, batch, at, net_key, train)
    current = temporal.class_cross_entropy(said.current, labels,
                                           jnp.asarray(self.class_weights) if self.class_weights else None)
    tokens = temporal.future_tokens(labels, valid, self.tokens, self._step, k, ended)[:, at]  # [B, A, F]
    future = temporal.class_cross_entropy(said.future, tokens)
    horizon = self.network.horizon
    minutes, told = temporal.remaining_time(labels, valid, k, horizon, 60 * self.fps, ended)
    error = temporal.time_error(said.remaining, minutes, horizon, told)
    loss = self.current_weight * current + self.future_weight * future + self.time_weight * error
    share = lambda x, y: ((x.argmax(axis=-1) == y) & (y >= 0)).sum() / jnp.maximum((y >= 0).sum(), 1)
    metrics = {'cross_entropy': current, 'future_entropy': future, 'time_error': error,
               'accuracy': share(said.current, labels), 'future_accuracy': share(said.future, tokens)}
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])

  def _said(self, variables: Variables, batch: Batch, at: jax.Array, rng: jax.Array, train: bool):
    """(what the transformer says, the encoder's new running statistics)."""
    frames.checked('anticipate', self.encoder, batch)
    keys, params = jax.random.split(rng), variables['params']
    x, stats = frames.encode(self.encoder, params['encoder'], batch, self.feature, train, {'dropout': keys[0]},
                             self.freeze_encoder, self.frames_at_once)
    return self.network.apply({'params': params['head']}, x, at, train, rngs={'dropout': keys[1]}), stats

  def anticipated(self, variables: Variables, batch: Batch, at: jax.Array) -> Anticipation:
    """What is said of the frames of windows, future tokens at the frames `at` [A]."""
    return self._said(variables, batch, at, jax.random.key(0), False)[0]

  def phases(self, variables: Variables, batch: Batch) -> jax.Array:
    """Logits [B, K, classes] of the current phase of the frames of windows."""
    return self.anticipated(variables, batch, jnp.array([0])).current

  def frozen(self, step: jax.Array) -> dict[str, Any]:
    """The encoder, where it stays."""
    return resting(self.freeze_encoder, 0.0, step, self.clock.steps)
