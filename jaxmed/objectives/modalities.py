"""What methods of several modalities share: a tower for each, which records have it, and one vector a modality.

A record always has an image. Of the others, a text is missing without an id, a signal without a step and a row of a
table without a number; a run has those whose towers its config names.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.augment.channels import hierarchical_channel_sampling
from jaxmed.contracts import Batch, Encoder
from jaxmed.errors import UserError, choose
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method

NAMES = ('image', 'text', 'signal', 'table')  # towers, and the fields that they take
SAMPLING = ('none', 'hcs')


@dataclasses.dataclass(frozen=True)
class Modal(Method):
  """Base of methods whose towers are some of NAMES, 'image' always; without any named there is one of texts.

  Attributes:
    encoder: of images. towers: of the other modalities; the run fills both in.
    feature: 'cls' or 'mean', the vector of an image or signal.
    lead_sampling: which leads of signals a step shows to a tower with tokens of leads: 'none' for all, or 'hcs'.
  """

  encoder: Encoder
  feature: str = 'cls'
  lead_sampling: str = 'none'
  towers: FrozenDict = FrozenDict()

  TOWERS: ClassVar[tuple[str, ...]] = NAMES
  OPTIONAL: ClassVar[tuple[str, ...]] = NAMES[1:]
  FIELDS: ClassVar[tuple[str, ...]] = NAMES
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'towers': {'text': {'model': 'text_micro'}},
      'augment': {'scale': (0.9, 1.0), 'flip': (0.0,)}}  # texts tell left from right

  def __post_init__(self):
    choose('objective.feature', self.feature, ('cls', 'mean'))
    choose('objective.lead_sampling', self.lead_sampling, SAMPLING)
    signal = self.towers.get('signal')
    if self.lead_sampling != 'none' and signal is not None and not signal.per_channel:
      raise UserError(f'objective.lead_sampling={self.lead_sampling} needs a tower with tokens of leads: '
                      'towers.signal.model=channel_vit_micro/25')

  @property
  def modalities(self) -> tuple[str, ...]:
    """The M modalities of the run, in the order of NAMES."""
    return ('image', *(name for name in NAMES[1:] if name in self.towers))

  @property
  def widths(self) -> tuple[int, ...]:
    """Width of the features of each modality."""
    return (self.encoder.embed_dim, *(self.towers[name].embed_dim for name in self.modalities[1:]))

  def init_towers(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """Boxed parameters of all towers, from the shapes of a batch."""
    keys = jax.random.split(rng, len(self.modalities))
    params = {'encoder': self.encoder.init(keys[0], **networks.inputs(batch))['params']}
    return params | {name: self.towers[name].init(key, *_taken(batch, name))['params']
                     for name, key in zip(self.modalities[1:], keys[1:], strict=True)}

  def encoded(self, params: Any, batch: Batch, rng: jax.Array | None, train: bool
              ) -> tuple[tuple[Features, ...], jax.Array, dict[str, Any]]:
    """Features of each modality, whether a record has it [B, M], and new running statistics by tower."""
    drop, leads = (None, None) if rng is None else jax.random.split(rng)
    rngs = None if drop is None else {'dropout': drop}
    image, stats = networks.encode(self.encoder, params['encoder'], batch, train, rngs)
    found, new = [image], {'encoder': stats}
    for name in self.modalities[1:]:
      more: dict[str, Any] = {}
      if name == 'signal' and train and self.lead_sampling == 'hcs' and leads is not None:
        shape = (batch['signal'].shape[0], batch['signal'].shape[2])
        more['channel_mask'] = hierarchical_channel_sampling(leads, jnp.ones(shape, bool))
      taken = _taken(batch, name)
      out, new[name] = networks.run(self.towers[name], params[name], *taken, train=train, rngs=rngs, **more)
      found.append(out)
    return tuple(found), jnp.stack([present(batch, name) for name in self.modalities], axis=1), new

  def vectors(self, features: tuple[Features, ...]) -> tuple[jax.Array, ...]:
    """A vector [B, D] of each modality, float32."""
    return tuple(f.pooled(self.feature) if name in ('image', 'signal') else f.mean
                 for name, f in zip(self.modalities, features, strict=True))


def present(batch: Batch, name: str) -> jax.Array:
  """Whether each record of a batch has a modality, [B] bool."""
  if name == 'text':
    return (batch['text'] != 0).any(axis=1)
  if name == 'signal':
    return batch['signal_mask'].any(axis=1)
  if name == 'table':
    return (~jnp.isnan(batch['table'])).any(axis=1)
  return batch['channel_mask'].any(axis=1) if 'channel_mask' in batch else jnp.ones(len(batch['image']), bool)


def real(batch: Batch) -> jax.Array:
  """Which rows of a batch are records and not padding, [B] bool."""
  return batch['index'] >= 0 if 'index' in batch else jnp.ones(len(batch['image']), bool)


def _taken(batch: Batch, name: str) -> tuple[jax.Array, ...]:
  """What a tower takes of a batch."""
  return (batch['signal'], batch['signal_mask']) if name == 'signal' else (batch[name],)  # type: ignore[literal-required]
