"""Fusion: classes from several modalities of a record, of which some may be missing."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders import fusion
from jaxmed.models.layers.linear import Dense
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives.modalities import Modal
from jaxmed.objectives.networks import Clock, with_stats


@dataclasses.dataclass(frozen=True)
class Fusion(Modal):
  """Cross-entropy of the batch's `label` (-1 counts as no label) from towers that a head fuses.

  The modalities are the image and those whose towers the config names: towers.text, .signal, .table; with none named,
  the text. See models/decoders/fusion.py for the kinds. With `staged`, the first part of a run trains each modality
  with a linear head of its own, the rest all together (the staged training of surgical feedback, arXiv 2312.03231,
  which has no code; there the categories are several to a record, here one).

  Attributes:
    num_classes: filled in from the data.
    kind: 'early', 'late', 'attention', 'tensor' or 'graph'.
    dim, hidden: width of each modality in the head, and of its MLPs.
    depth, num_heads: blocks of 'attention', rounds of 'graph', and their heads.
    tensor_dim: width of each factor of 'tensor'.
    pooled: whether the head reads one vector a modality, or all tokens ('attention' and 'graph' tell them apart).
    label_smoothing: share of the target that is spread over all classes.
    staged: fraction of the run, from its beginning, in which modalities are trained one by one.
  """

  num_classes: int = 0
  kind: str = 'attention'
  dim: int = 128
  hidden: int = 256
  depth: int = 2
  num_heads: int = 4
  tensor_dim: int = 16
  pooled: bool = False
  label_smoothing: float = 0.0
  staged: float = 0.0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (5e-4, 256)  # that of `supervised`
  REQUIRED: ClassVar[tuple[str, ...]] = ('label',)
  PREDICTS: ClassVar[str] = 'label'

  def __post_init__(self):
    super().__post_init__()
    choose('objective.kind', self.kind, fusion.KINDS)
    if self.kind in ('attention', 'graph') and self.dim % self.num_heads:
      raise UserError(f'objective.num_heads {self.num_heads} does not divide objective.dim {self.dim}')
    if self.kind == 'tensor' and len(self.modalities) > fusion.MOST:
      raise UserError(f'objective.kind=tensor multiplies {len(self.modalities)} modalities: expected at most '
                      f'{fusion.MOST}, or another kind')
    if not 0 <= self.label_smoothing < 1 or not 0 <= self.staged < 1:
      raise UserError(f'objective.label_smoothing {self.label_smoothing} and staged {self.staged} must lie in [0, 1)')

  @property
  def head(self) -> fusion.Fusion:
    """What fuses."""
    return fusion.Fusion(self.kind, self.num_classes, self.dim, self.hidden, self.depth, self.num_heads,
                         self.tensor_dim)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    if self.num_classes < 2:
      raise UserError('method fusion needs loader.label, a manifest column with at least two classes')
    keys = jax.random.split(rng, 3)
    params = self.init_towers(keys[0], batch)
    tokens = [jnp.zeros((1, 1, width)) for width in self.widths]
    params['head'] = self.head.init(keys[1], tokens, jnp.ones((1, len(tokens)), bool))['params']
    if self.staged:
      params['alone'] = {name: self._alone.init(key, jnp.zeros((1, width)))['params'] for name, width, key in zip(
          self.modalities, self.widths, jax.random.split(keys[2], len(tokens)), strict=True)}
    return {'params': params, 'target': {}, 'extra': {}}

  @property
  def _alone(self) -> Dense:
    """The linear head of one modality."""
    return Dense((self.num_classes,), ('embed', None))

  def fused(self, params: Any, features: tuple[Features, ...], there: jax.Array, train: bool) -> jax.Array:
    """Logits [B, K] of features of each modality, where `there` [B, M]."""
    valid: tuple[jax.Array | None, ...] = ()
    if self.pooled:
      tokens = [x[:, None] for x in self.vectors(features)]
    else:
      tokens, valid = [f.patches.astype(jnp.float32) for f in features], tuple(f.valid for f in features)
    return self.head.apply({'params': params['head']}, tokens, there, valid, train)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean cross-entropy over the labelled records of the global batch."""
    params, known = variables['params'], (batch['label'] >= 0)
    features, there, stats = self.encoded(params, batch, rng, train)
    target = jax.nn.one_hot(batch['label'], self.num_classes)
    target = target * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
    logits = self.fused(params, features, there, train)
    loss = _entropy(logits, target, known)
    right = jnp.where(known, logits.argmax(axis=-1) == batch['label'], False).sum() / jnp.maximum(known.sum(), 1)
    metrics = {'cross_entropy': loss, 'accuracy': right}
    if self.staged and train:
      alone = {name: _entropy(self._alone.apply({'params': params['alone'][name]}, x), target, known & there[:, m])
               for m, (name, x) in enumerate(zip(self.modalities, self.vectors(features), strict=True))}
      metrics |= {f'{name}_cross_entropy': value for name, value in alone.items()}
      loss = jnp.where(step < self.staged * self.clock.steps, sum(alone.values()) / len(alone), loss)
    return loss, (with_stats(metrics, train, **stats), variables['extra'])

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """Logits [B, K] of a plain batch."""
    features, there, _ = self.encoded(variables['params'], batch, None, False)
    return self.fused(variables['params'], features, there, False)


def _entropy(logits: jax.Array, target: jax.Array, known: jax.Array) -> jax.Array:
  """Mean cross-entropy over the records that are known [B]."""
  entropy = -(target * nn.log_softmax(logits)).sum(axis=-1)
  return jnp.where(known, entropy, 0).sum() / jnp.maximum(known.sum(), 1)
