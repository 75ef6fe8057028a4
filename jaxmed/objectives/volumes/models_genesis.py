"""Models Genesis: restores what curves, shuffled pixels and painting did to an image (Zhou et al. 2021, 2004.07882)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.augment import corrupt
from jaxmed.augment.intensity import chosen, select, sometimes
from jaxmed.contracts import Batch, Decoder, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dense import DECODERS
from jaxmed.objectives.base import Method
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.networks import with_stats

RATES = ('shuffle', 'nonlinear', 'paint', 'outpaint')


@dataclasses.dataclass(frozen=True)
class ModelsGenesis(Method):
  """Squared error of all pixels of an image that was corrupted, in this order, by up to three changes.

  Pixels are shuffled in small windows; each channel takes a curve of its intensities, rising or falling; and boxes
  become noise, or all but boxes (MrGiovanni/ModelsGenesis, pytorch/utils.py, config.py; see `augment.corrupt`). The
  fourth change there, flips of image and target, is `augment.flip`. A channel that a sample lacks, and what lies
  beyond it, count nowhere.

  Differs: intensities are scaled by the range of each channel of the view, there by one window for all, whose 0 .. 1
  nnssl's port of the code cuts its z-scores to; the output is linear, there a sigmoid; windows of shuffled pixels, see
  `augment.corrupt.shuffle_locally`.

  Attributes:
    shuffle, nonlinear, paint: probability of each change. outpaint: of painting, the share that leaves boxes.
    decoder: by name, or 'auto' for that of the encoder's family, see `models.decoders.dense.AUTO`.
    decoder_options: of the decoder: objective.decoder_options.NAME=VALUE.
  """

  encoder: Encoder
  shuffle: float = 0.5
  nonlinear: float = 0.9
  paint: float = 0.9
  outpaint: float = 0.8
  decoder: str = decoding.AUTO
  decoder_options: Mapping[str, Any] = FrozenDict()

  LEARNING_RATE: ClassVar = (1e-3, 64)  # AdamW's usual one; the published rate, 1, is SGD's
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'augment': {'scale': (0.5, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.15,)},
  }

  def __post_init__(self):
    choose('objective.decoder', self.decoder, (decoding.AUTO, *DECODERS))
    for name in RATES:
      if not 0 <= vars(self)[name] <= 1:
        raise UserError(f'objective.{name} {vars(self)[name]} is a probability: it must lie in [0, 1]')
    if not self.shuffle + self.nonlinear + self.paint:
      raise UserError('objective.shuffle, nonlinear and paint are all 0: nothing is left to restore')

  @property
  def network(self) -> Decoder:
    """The decoder."""
    return decoding.network(self.encoder, self.decoder, self.encoder.in_channels, options=self.decoder_options)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    return {'params': decoding.init(self.encoder, self.network, rng, batch), 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean squared error over the pixels of the global batch."""
    del step
    keys = jax.random.split(rng)
    shown, clean = self.corrupted(keys[0], batch)
    restored, stats = self._restored(variables['params'], shown, train, {'dropout': keys[1]})
    mean = lambda x: decoding.mean_of(jnp.square(x - clean), decoding.there(batch))
    loss = mean(restored)
    # 0 for copying the input, or worse.
    metrics = {'restoration': loss, 'restored': 1 - loss / jnp.maximum(mean(shown['image']), 1e-6)}
    return loss, (with_stats(metrics, train, **stats), variables['extra'])

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """'reconstructions': (the image, what is shown of it, what is made of that), each [B, *size, C]."""
    shown, clean = self.corrupted(rng, batch)
    return {'reconstructions': (clean, shown['image'], self._restored(variables['params'], shown, False, None)[0])}

  def corrupted(self, rng: jax.Array, batch: Batch) -> tuple[Batch, jax.Array]:
    """(The batch with corrupted images; the images as they were, 0 where there is nothing)."""
    keys, there = jax.random.split(rng, 6), decoding.there(batch)
    clean = jnp.where(there, batch['image'], 0)
    apply = lambda change: lambda key, x: change(key, x, there)
    x = sometimes(keys[0], clean, self.shuffle, apply(corrupt.shuffle_locally))
    x = sometimes(keys[1], x, self.nonlinear, apply(corrupt.random_bezier))
    out = chosen(keys[2], self.outpaint, len(x))
    painted = select(out, corrupt.paint_out(keys[3], x, there), corrupt.paint_in(keys[4], x, there))
    return {**batch, 'image': select(chosen(keys[5], self.paint, len(x)), painted, x)}, clean

  def _restored(self, params: Any, shown: Batch, train: bool, rngs: Any) -> tuple[jax.Array, dict[str, Any]]:
    """(Images [B, *size, C], running statistics)."""
    (restored, *_), _, stats, _ = decoding.decode(self.encoder, self.network, params, shown, train, rngs)
    return decoding.of_channels(self.encoder, shown, restored), stats
