"""Segmentation: an encoder and a decoder of dense outputs, trained on masks by cross-entropy and soft Dice."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.contracts import Batch, Decoder, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dense import DECODERS
from jaxmed.objectives.base import Method
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.losses import segmentation as losses
from jaxmed.objectives.losses.boundary import boundary
from jaxmed.objectives.networks import Clock, ramp, resting, with_stats


@dataclasses.dataclass(frozen=True)
class Segment(Method):
  """Trains encoder and decoder on masks; the loss is that of nnU-Net v2 by default (nnUNetTrainer._build_loss).

  Cross-entropy minus soft Dice of the classes but the background, weights 1 and 1, so that -1 is the optimum. A pixel
  of -1 counts nowhere. Where a sample has `annotated` [K], the other classes are merged into the background there, see
  `losses.segmentation.log_probabilities`. Parameters: {'encoder', 'decoder'}.

  Attributes:
    decoder: by name, or 'auto' for that of the encoder's family, see `models.decoders.dense.AUTO`.
    decoder_options: of the decoder: objective.decoder_options.NAME=VALUE.
    deep_supervision: whether coarser outputs are trained too, with weights 1, 1/2, 1/4 ..., the coarsest 0, or
      the decoder's own; the fine-tuning of nnssl has it off, in both arms.
    values: stored values of masks that are classes, rising; 0 is the background. Filled in from the training records.
    ignore: stored values that are no class, as -1 never is.
    ce_weight, dice_weight, focal_weight: of cross-entropy, soft Dice and focal loss. focal_gamma: its exponent.
    boundary_weight: of the boundary loss at the last step, reached linearly from 0 (the schedule 'increase' of
      Kervadec et al. 2019).
    batch_dice: whether soft Dice has the sums of the whole batch and not of each sample; nnU-Net takes it for images
      and for crops of volumes that a coarser network sees whole.
    squared_dice: whether the sums below the line of soft Dice are of squares (V-Net, Milletari et al. 2016).
    freeze_encoder: whether the encoder's weights stay as they are; it then runs as in evaluation.
    head_first: fraction of the run, from its beginning, in which the decoder alone is trained.
  """

  encoder: Encoder
  decoder: str = decoding.AUTO
  decoder_options: Mapping[str, Any] = FrozenDict()
  deep_supervision: bool = False
  values: tuple[int, ...] = ()
  ignore: tuple[int, ...] = ()
  ce_weight: float = 1.0
  dice_weight: float = 1.0
  focal_weight: float = 0.0
  focal_gamma: float = 2.0
  boundary_weight: float = 0.0
  batch_dice: bool = False
  squared_dice: bool = False
  freeze_encoder: bool = False
  head_first: float = 0.0
  names: tuple[str, ...] = ()  # of `values`
  stored: tuple[int, ...] = ()  # values of all classes of the corpus, which `annotated` goes by; () for `values`
  clock: Clock = Clock()

  # nnssl's rate from scratch for its transformers (Primus). Its batch, 2 volumes of 160^3 in patches of 8^3, has the
  # tokens of 80 images of 14 x 14; 16 lies between.
  LEARNING_RATE: ClassVar = (3e-4, 16)
  FEATURE: ClassVar[str] = 'mean'
  FIELDS: ClassVar[tuple[str, ...]] = ('image', 'mask', 'annotated')
  REQUIRED: ClassVar[tuple[str, ...]] = ('mask',)
  PREDICTS: ClassVar[str] = 'mask'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'checkpoint': {'best': 'dice', 'best_mode': 'max'},
      # Strengths and probabilities of nnU-Net's augmentation, as far as a view has them: sides of 0.7 to 1 of a record.
      'augment': {'scale': (0.5, 1.0), 'ratio': (1.0, 1.0), 'contrast': 0.25, 'brightness': 0.25,
                  'jitter_probability': (0.15,), 'gamma': 0.5, 'gamma_probability': (0.3,), 'blur': 1.0,
                  'blur_probability': (0.1,)},
  }

  def __post_init__(self):
    choose('objective.decoder', self.decoder, (decoding.AUTO, *DECODERS))
    check_values(self.values, self.ignore)
    weights = (self.ce_weight, self.dice_weight, self.focal_weight, self.boundary_weight)
    if min(*weights, self.focal_gamma) < 0 or not any(weights):
      raise UserError(f'objective.*_weight {weights} must be at least 0, one above, and focal_gamma too')
    if not 0 <= self.head_first < 1:
      raise UserError(f'objective.head_first {self.head_first} must lie in [0, 1)')

  @property
  def network(self) -> Decoder:
    """The decoder."""
    if len(self.values) < 2:
      raise UserError('segmentation needs masks of at least two classes; objective.values says which')
    return decoding.network(self.encoder, self.decoder, len(self.values), self.deep_supervision, self.decoder_options)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    params = decoding.init(self.encoder, self.network, rng, batch)
    return {'params': params, 'target': {}, 'extra': {}}

  def logits(self, variables: Variables, batch: Batch, train: bool = False,
             rngs: Any = None) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """(([B, *size, K], ...) float32, the finest first; running statistics of 'encoder' and 'decoder')."""
    return self._outputs(variables, batch, train, rngs)[:2]

  def _outputs(self, variables: Variables, batch: Batch, train: bool, rngs: Any) -> tuple[Any, dict[str, Any], Any]:
    """`logits`, and terms of the loss that are the decoder's own."""
    outputs, _, stats, own = decoding.decode(self.encoder, self.network, variables['params'], batch, train, rngs,
                                             self.freeze_encoder)
    return outputs, stats, own

  def truth(self, batch: Batch) -> losses.Truth:
    """The labels of a batch."""
    return losses.of_batch(batch, self.values, self.stored)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The weighted terms over outputs and the known pixels of the global batch."""
    outputs, stats, own = self._outputs(variables, batch, train, {'dropout': rng})
    loss, metrics = self.supervised(outputs, self.truth(batch), step, own)
    return loss, (with_stats(metrics, train, **stats), variables['extra'])

  def supervised(self, outputs: tuple[jax.Array, ...], truth: losses.Truth, step: jax.Array,
                 own: Any = ()) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of the logits of all outputs, the finest first, and of the decoder's own terms."""
    terms = self._terms(step)
    parts = dict.fromkeys(terms, jnp.zeros(()))
    weights = getattr(self.network, 'output_weights', losses.output_weights)(len(outputs))
    for share, logits in zip(weights, outputs, strict=True):
      if share:
        coarse = losses.coarser(truth, logits.shape[1:-1])
        found = self._parts(losses.log_probabilities(logits, coarse), coarse, terms)
        parts = {name: value + share * found[name] for name, value in parts.items()}
    loss = sum(weight * parts[name] for name, weight in terms.items())
    if own:
      parts |= {'decoder_penalty': sum(jax.tree.leaves(own), jnp.zeros(()))}
      loss = loss + parts['decoder_penalty']
    return loss, parts | {'batch_dice': losses.hard_dice(jax.lax.stop_gradient(outputs[0]), truth),
                          'known_pixels': truth.known.mean()}

  def frozen(self, step: jax.Array) -> Mapping[str, Any]:
    """The encoder, at all steps or at the first ones."""
    return resting(self.freeze_encoder, self.head_first, step, self.clock.steps)

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """'segmentation': the image, its mask and that predicted [B, *size], -1 where the label is unknown."""
    del rng
    truth = self.truth(batch)
    found = losses.log_probabilities(self.logits(variables, batch)[0][0], truth).argmax(axis=-1)
    stored = jnp.asarray(self.values)
    return {'segmentation': (batch['image'], jnp.where(truth.known, stored[truth.classes], -1), stored[found])}

  def _terms(self, step: jax.Array) -> dict[str, Any]:
    """{term: weight} of those that count."""
    weights = {'cross_entropy': self.ce_weight, 'negative_dice': self.dice_weight, 'focal': self.focal_weight,
               'boundary': self.boundary_weight}
    rising = {'boundary': ramp(0.0, self.boundary_weight, step, self.clock.steps)}
    return {name: rising.get(name, weight) for name, weight in weights.items() if weight}

  def _parts(self, logp: jax.Array, truth: losses.Truth, terms: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The terms of one output."""
    make = {'cross_entropy': losses.cross_entropy, 'boundary': boundary,
            'negative_dice': lambda logp, truth: -losses.soft_dice(logp, truth, self.batch_dice,
                                                                   squared=self.squared_dice),
            'focal': lambda logp, truth: losses.focal(logp, truth, self.focal_gamma)}
    return {name: make[name](logp, truth) for name in terms}


def check_values(values: tuple[int, ...], ignore: tuple[int, ...]) -> None:
  """Raises a UserError where classes of masks do not rise, or are ignored."""
  if any(a >= b for a, b in zip(values, values[1:])) or not {int(v) for v in values} == {*values}:
    raise UserError(f'objective.values {values} must be whole numbers that rise')
  both = sorted({*values} & {*ignore, -1})
  if both:
    raise UserError(f'objective.values has {both[0]}, which is ignored (objective.ignore, and -1)')
