"""Supervised classification: cross-entropy with label smoothing, mixup, CutMix, and DiChaViT's diverse channels."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.augment.mix import mix
from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.layers.transformer import Dense
from jaxmed.objectives.base import Method
from jaxmed.objectives.losses.diversity import Diversity
from jaxmed.objectives.networks import Clock, encode, inputs, resting, with_stats


@dataclasses.dataclass(frozen=True)
class Supervised(Diversity, Method):
  """Trains encoder and a linear head on the batch's `label` (-1 counts as no label).

  Attributes:
    num_classes: filled in from the data. feature: 'cls' or 'mean', what the head reads.
    label_smoothing: share of the target that is spread over all classes.
    mixup, cutmix: alpha of their Beta distributions, 0 for none.
    freeze_encoder: whether the encoder's weights stay as they are; it then runs as in evaluation.
    head_first: fraction of the run, from its beginning, in which the head alone is trained.
  """

  encoder: Encoder
  num_classes: int = 0
  feature: str = 'cls'
  label_smoothing: float = 0.1
  mixup: float = 0.0
  cutmix: float = 0.0
  freeze_encoder: bool = False
  head_first: float = 0.0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (5e-4, 256)  # insitro/ChannelViT: 5e-4 * B / 256 at a batch of 256
  FEATURE: ClassVar[str] = 'cls'
  REQUIRED: ClassVar[tuple[str, ...]] = ('label',)
  PREDICTS: ClassVar[str] = 'label'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'drop_path': 0.1},
      'optimizer': {'weight_decay': 0.04, 'final_learning_rate': 1e-6},
      'augment': {'scale': (0.4, 1.0)},
  }

  def __post_init__(self):
    choose('objective.feature', self.feature, ('cls', 'mean'))
    if not 0 <= self.label_smoothing < 1:
      raise UserError(f'objective.label_smoothing {self.label_smoothing} must lie in [0, 1)')
    if not 0 <= self.head_first < 1:
      raise UserError(f'objective.head_first {self.head_first} must lie in [0, 1)')
    self.check_diversity(self.encoder)

  @property
  def head(self) -> Dense:
    """Linear classifier."""
    return Dense((self.num_classes,), ('embed', None))

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    if self.num_classes < 2:
      raise UserError('supervised training needs loader.label, a manifest column with at least two classes')
    encoder_key, head_key = jax.random.split(rng)
    encoder = self.encoder.init(encoder_key, **inputs(batch))['params']
    head = self.head.init(head_key, jnp.zeros((1, self.encoder.embed_dim)))['params']
    params = {'encoder': encoder, 'head': head}
    params |= self.init_proxies(self.encoder, jax.random.fold_in(head_key, 1))
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean cross-entropy over the labelled samples of the global batch."""
    del step
    mix_key, drop_key = jax.random.split(rng)
    known = (batch['label'] >= 0).astype(jnp.float32)
    target = jax.nn.one_hot(batch['label'], self.num_classes)
    target = target * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
    image = batch['image']
    if train:
      if 'sizes' in batch and (self.mixup or self.cutmix):
        raise UserError('objective.mixup and cutmix mix images of one size: set them to 0, or leave '
                        'augment.sample_sizes out')
      image, target = mix(mix_key, image, target, batch['channels'], self.mixup, self.cutmix)
    features, stats = encode(self.encoder, variables['params']['encoder'], {**batch, 'image': image}, train,
                             {'dropout': drop_key}, self.freeze_encoder)
    logits = self.head.apply({'params': variables['params']['head']}, features.pooled(self.feature))
    entropy = -(target * nn.log_softmax(logits)).sum(axis=-1)
    total = jnp.maximum(known.sum(), 1.0)
    loss = (entropy * known).sum() / total
    right = ((logits.argmax(axis=-1) == batch['label']) * known).sum() / total
    apart = self.diversity_losses(self.encoder, variables['params'], batch) if train else {}
    metrics = with_stats({'cross_entropy': loss, 'accuracy': right} | apart, train, encoder=stats)
    return loss + self.weighted_diversity(apart), (metrics, variables['extra'])

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """Logits [B, K] of a plain batch."""
    features = encode(self.encoder, variables['params']['encoder'], batch, False, None)[0]
    return self.head.apply({'params': variables['params']['head']}, features.pooled(self.feature))

  def frozen(self, step: jax.Array) -> Mapping[str, Any]:
    """The encoder, at all steps or at the first ones."""
    return resting(self.freeze_encoder, self.head_first, step, self.clock.steps)
