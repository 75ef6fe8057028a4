"""MoRE: a report is the anchor of an X-ray and of an ECG, which are not compared with each other (arXiv 2410.16239)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.contracts import Batch, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives import modalities
from jaxmed.objectives.losses import paired
from jaxmed.objectives.modalities import Modal
from jaxmed.objectives.networks import run, with_stats


@dataclasses.dataclass(frozen=True)
class MoRE(Modal):
  """The sum over modalities of InfoNCE both ways, half each, with the text (svthapa/MoRE, pretrain_multimodel.py).

  The modalities are the text, the image and those whose towers the config names: towers.signal, .table. A record
  without a text, or without a modality, is no pair of that term. One projector a modality: linear, batch norm, ReLU,
  linear, batch norm. The temperature is fixed: the published code declares it trained and never gives it to the
  optimizer.

  Differs: no DropKey in attention (there 0.3 of the logits are dropped in training); the tower of texts begins fresh
  and is trained whole (there RoBERTa with LoRA of rank 16), and its vector is that of its ids (there the mean over
  padding too); the ECG's patches are one linear layer (there two convolutions of 5 steps with batch norm).

  Attributes:
    out_dim, hidden_dim: widths of the projectors.
    temperature: of the cosines.
    chunk: candidates that are compared at a time, 0 for all at once, -1 chooses.
  """

  out_dim: int = 128
  hidden_dim: int = 768
  temperature: float = 0.02
  chunk: int = -1

  REQUIRED: ClassVar[tuple[str, ...]] = ('text',)
  OPTIONAL: ClassVar[tuple[str, ...]] = ('signal', 'table')
  LEARNING_RATE: ClassVar = (3e-5, 100)  # pretrain_multimodel.py: --learning_rate and --batch_size
  DEFAULTS: ClassVar[dict[str, Any]] = {**Modal.DEFAULTS, 'optimizer': {'weight_decay': 0.1}}

  def __post_init__(self):
    super().__post_init__()
    if min(self.out_dim, self.hidden_dim) < 1 or self.temperature <= 0:
      raise UserError(f'objective.out_dim {self.out_dim}, hidden_dim {self.hidden_dim} and temperature '
                      f'{self.temperature} must be positive')

  @property
  def projector(self) -> MLPHead:
    """The projector of a modality."""
    return MLPHead((self.hidden_dim, self.out_dim), last_bias=False, last_norm='affine')

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    keys = jax.random.split(rng, 1 + len(self.modalities))
    heads = {name: self.projector.init(key, jnp.zeros((2, width)))['params']
             for name, width, key in zip(self.modalities, self.widths, keys[1:], strict=True)}
    return {'params': self.init_towers(keys[0], batch) | {'projectors': heads}, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The sum of the terms over the pairs of the global batch."""
    del step
    params = variables['params']
    features, there, stats = self.encoded(params, batch, rng, train)
    z, own = {}, {}
    for name, x in zip(self.modalities, self.vectors(features), strict=True):
      z[name], own[name] = run(self.projector, params['projectors'][name], x, train=train)
    text, scale = self.modalities.index('text'), jnp.asarray(-np.log(self.temperature), jnp.float32)
    there, terms = there & modalities.real(batch)[:, None], []
    metrics: dict[str, jax.Array] = {}
    for m, name in enumerate(self.modalities):
      if m != text:
        term, right = paired.clip(z[name], z['text'], scale, there[:, m] & there[:, text], 0.5, self.chunk)
        terms.append(term)
        metrics |= {f'{name}_to_text': right[0], f'text_to_{name}': right[1]}
    return sum(terms), (with_stats(metrics, train, **stats, projectors=own), variables['extra'])
