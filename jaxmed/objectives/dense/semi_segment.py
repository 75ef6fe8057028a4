"""Segmentation where some records have no mask: a mean teacher, trusted where its masks look like masks.

Adiga, Dolz, Lombaert 2023, Anatomically-aware uncertainty for semi-supervised image segmentation, arXiv 2310.16099.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.contracts import Batch, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.labels import clipped
from jaxmed.objectives.dense.segment import Segment
from jaxmed.objectives.losses import segmentation as losses
from jaxmed.objectives.networks import quiet, with_stats

LABELS = 'labels'  # the tower that makes masks whole
STAIRS = 40  # jumps in which consistency rises: it is set anew every 200 of 8000 steps


@dataclasses.dataclass(frozen=True)
class SemiSegment(Segment):
  """Segment on the masks there are, and agreement with a mean teacher on all records.

  adigasu/Anatomically-aware_Uncertainty_for_Semi-supervised_Segmentation,
  code_DAE_MT/train_Abdomen_meanteacher_DAE_certainty.py. The teacher, an average of the student, sees the same image
  with noise. t are its probabilities, s those of the student, r the sigmoids that a frozen label autoencoder makes of
  the teacher's most probable classes. With u = (r - t)^2 and w = exp(-gamma u), by pixel and class, consistency is
  sum w (s - t)^2 / (2 sum w) over the global batch. A record without a mask has no part in the other terms. Without
  `towers.labels` (a run of method label_autoencoder) w is 1: the mean teacher of Tarvainen and Valpola 2017. As there,
  the teacher's batch norms take the statistics of the batch; it has no dropout or dropped path of its own.

  Attributes:
    gamma: how fast weight falls with the distance of teacher and autoencoder; at 1 it is at least exp(-1).
    consistency: weight of consistency once it has risen, as exp(-5 (1 - t)^2) in 40 jumps.
    rampup: fraction of the run in which it rises.
    ema: share of the teacher that stays after a step k (from 0), at most 1 - 1 / (k + 1).
    noise: deviation of the noise on the teacher's image, normalised, cut at two of them.
    code_noise: the same on the autoencoder's code.
  """

  ce_weight: float = 0.5
  dice_weight: float = 0.5
  batch_dice: bool = True
  squared_dice: bool = True
  gamma: float = 1.0
  consistency: float = 0.1
  rampup: float = 1.0
  ema: float = 0.99
  noise: float = 0.1
  code_noise: float = 0.01
  towers: FrozenDict = FrozenDict()

  TOWERS: ClassVar[tuple[str, ...]] = ('image', LABELS)
  OPTIONAL: ClassVar[tuple[str, ...]] = (LABELS,)
  WHOLE: ClassVar[dict[str, str]] = {LABELS: 'label_autoencoder'}
  REQUIRED: ClassVar[tuple[str, ...]] = ()
  DEFAULTS: ClassVar[dict[str, Any]] = {**Segment.DEFAULTS, 'towers': {LABELS: {'fixed': True}}}

  def __post_init__(self):
    super().__post_init__()
    if min(self.gamma, self.consistency, self.noise, self.code_noise) < 0:
      raise UserError(f'objective.gamma {self.gamma}, consistency {self.consistency}, noise {self.noise} and '
                      f'code_noise {self.code_noise} must be at least 0')
    if not 0 <= self.ema <= 1 or not 0 < self.rampup <= 1:
      raise UserError(f'objective.ema {self.ema} must lie in [0, 1], rampup {self.rampup} in (0, 1]')
    labels = self.towers.get(LABELS)
    for name in ('values', 'image_size') if labels else ():
      mine, its = (x.values if name == 'values' else tuple(x.encoder.image_size) for x in (self, labels))
      if self.values and mine != its:
        raise UserError(f'towers.{LABELS}.init is a label autoencoder of {name} {its}: expected {mine}, as of this run')

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch; the teacher starts as a copy."""
    variables = super().init(rng, batch)
    return variables | {'target': jax.tree.map(jnp.copy, variables['params'])}

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the teacher that stays after a step (update_ema_variables)."""
    return jnp.minimum(1 - 1 / (step + 1), self.ema)

  def truth(self, batch: Batch) -> losses.Truth:
    """The labels of a batch; a sample without a known pixel annotates nothing."""
    truth = super().truth(batch)
    told = truth.known.any(axis=tuple(range(1, truth.known.ndim)))[:, None]
    annotated = told if truth.annotated is None else told & truth.annotated
    return truth._replace(annotated=jnp.broadcast_to(annotated, (len(told), len(self.values))))

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The terms of Segment over known pixels, and consistency over all."""
    student_key, teacher_key, noise_key, code_key = jax.random.split(rng, 4)
    outputs, stats, own = self._outputs(variables, batch, train, {'dropout': student_key})
    loss, metrics = self.supervised(outputs, self.truth(batch), step, own)
    taught: Any = {**batch, 'image': batch['image'] + clipped(noise_key, batch['image'].shape, self.noise)}
    teacher = dataclasses.replace(self, encoder=quiet(self.encoder))
    target, _ = teacher.logits({**variables, 'params': variables['target']}, taught, train, {'dropout': teacher_key})
    t = jax.lax.stop_gradient(jax.nn.softmax(target[0]))
    u = self.uncertainty(t, variables.get('fixed') or {}, batch, code_key)
    w = jnp.exp(-self.gamma * u)
    distance = (w * jnp.square(jax.nn.softmax(outputs[0]) - t)).sum() / (2 * w.sum())
    weight = self.consistency * rise(step, self.rampup * self.clock.steps)
    metrics |= {'consistency': distance, 'consistency_weight': weight, 'uncertainty': u.mean()}
    return loss + weight * distance, (with_stats(metrics, train, **stats), variables['extra'])

  def uncertainty(self, t: jax.Array, fixed: Any, batch: Batch, rng: jax.Array) -> jax.Array:
    """(r - t)^2 of the teacher's probabilities t [B, *size, K], without gradient; 0 without an autoencoder."""
    if LABELS not in self.towers:
      return jnp.zeros_like(t)
    if LABELS not in fixed:
      raise UserError(f'towers.{LABELS}.fixed must be True: the label autoencoder is only read')
    model = dataclasses.replace(self.towers[LABELS], code_noise=self.code_noise)
    logits, _ = model.reconstruct(fixed[LABELS], t.argmax(axis=-1), batch, rng=rng)
    return jax.lax.stop_gradient(jnp.square(jax.nn.sigmoid(logits) - t))


def rise(step: jax.Array, steps: float) -> jax.Array:
  """exp(-5 (1 - e / 40)^2) of the jump e that a step lies in, 40 in so many steps (Laine, Aila 2017)."""
  done = jnp.clip(jnp.floor(STAIRS * step / max(steps, 1e-9)), 0, STAIRS) / STAIRS
  return jnp.exp(-5 * jnp.square(1 - done))
