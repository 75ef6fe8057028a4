"""Volume Fusion: tells for each pixel how much of another record was mixed in (Wang et al. 2023, arXiv 2306.16925)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.augment import corrupt
from jaxmed.contracts import Batch, Decoder, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dense import DECODERS
from jaxmed.objectives.base import Method
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.losses import segmentation as losses
from jaxmed.objectives.networks import with_stats


@dataclasses.dataclass(frozen=True)
class VolumeFusion(Method):
  """Segments a map of K + 1 fusion coefficients 0, 1/K .. 1, by cross-entropy plus 1 minus soft Dice of all of them.

  Boxes, the later over the earlier, each have a coefficient k/K of 1 .. K; there a record becomes that share of the
  record before it in the batch (HiLab-git/PyMIC, net_run/self_sup/util.py:volume_fusion). A box has its centre
  anywhere and is cut at the border. Where either record has no pixel, or they have different channels, the coefficient
  is 0; what lies beyond an image is no class.

  Differs: sides of boxes are shares of each axis, 1/16 to 5/8, as the paper's 8 to 80 of 128 pixels (there also 8 to 40
  of 64); MIC-DKFZ/nnssl, which places whole boxes, reads it so too. There boxes may have coefficient 0.

  Attributes:
    classes: K, of the coefficients above 0.
    boxes: fewest and most boxes of a record, both included.
    sides: smallest and largest side of a box, as a share of each axis.
    decoder: by name, or 'auto' for that of the encoder's family, see `models.decoders.dense.AUTO`.
    decoder_options: of the decoder: objective.decoder_options.NAME=VALUE.
  """

  encoder: Encoder
  classes: int = 4
  boxes: tuple[int, ...] = (10, 40)
  sides: tuple[float, ...] = (0.0625, 0.625)
  decoder: str = decoding.AUTO
  decoder_options: Mapping[str, Any] = FrozenDict()

  LEARNING_RATE: ClassVar = (1e-3, 4)  # the paper's, of Adam
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'augment': {'scale': (0.5, 1.0), 'ratio': (1.0, 1.0)},
  }

  def __post_init__(self):
    choose('objective.decoder', self.decoder, (decoding.AUTO, *DECODERS))
    if self.classes < 1:
      raise UserError(f'objective.classes {self.classes} must be at least 1')
    if len(self.boxes) != 2 or not 0 < self.boxes[0] <= self.boxes[1]:
      raise UserError(f'objective.boxes {self.boxes} must be two numbers from 1, the fewest and the most')
    if len(self.sides) != 2 or not 0 < self.sides[0] <= self.sides[1] <= 1:
      raise UserError(f'objective.sides {self.sides} must be two shares of an axis, in (0, 1], that do not fall')

  @property
  def network(self) -> Decoder:
    """The decoder."""
    return decoding.network(self.encoder, self.decoder, self.classes + 1, options=self.decoder_options)

  @property
  def values(self) -> tuple[int, ...]:
    """Classes of the map that is segmented, for pictures."""
    return tuple(range(self.classes + 1))

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the classes: the coefficients."""
    return tuple(f'{k}/{self.classes}' for k in self.values)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    self._check(batch)
    return {'params': decoding.init(self.encoder, self.network, rng, batch), 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Cross-entropy plus 1 minus soft Dice, over the pixels of the global batch."""
    del step
    self._check(batch)
    keys = jax.random.split(rng)
    fused, truth = self.fused(keys[0], batch)
    (logits, *_), _, stats, _ = decoding.decode(self.encoder, self.network, variables['params'], fused, train,
                                                {'dropout': keys[1]})
    logp = losses.log_probabilities(logits, truth)
    entropy, dice = losses.cross_entropy(logp, truth), losses.soft_dice(logp, truth)
    share = lambda right: decoding.mean_of(right.astype(jnp.float32), truth.known)
    accuracy = share(logp.argmax(axis=-1) == truth.classes)
    common = jnp.stack([share(truth.classes == k) for k in range(self.classes + 1)]).max()
    metrics = {'cross_entropy': entropy, 'soft_dice': dice, 'accuracy': accuracy,
               'above_common': accuracy - common,  # 0 for always the most common class, or worse
               'fused': share(truth.classes > 0)}
    return entropy + 1 - dice, (with_stats(metrics, train, **stats), variables['extra'])

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """'segmentation': the fused image, its coefficients k and those predicted [B, *size], -1 beyond an image."""
    fused, truth = self.fused(rng, batch)
    logits = decoding.decode(self.encoder, self.network, variables['params'], fused, False, None)[0][0]
    return {'segmentation': (fused['image'], jnp.where(truth.known, truth.classes, -1), logits.argmax(axis=-1))}

  def fused(self, rng: jax.Array, batch: Batch) -> tuple[Batch, losses.Truth]:
    """(The batch with fused images, 0 where there is nothing; the coefficients k [B, *size], known within images)."""
    there = decoding.there(batch)
    x, grid, other = jnp.where(there, batch['image'], 0), there.shape[1:-1], lambda x: jnp.roll(x, 1, axis=0)
    same = (batch['channels'] == other(batch['channels'])).reshape(len(x), *[1] * len(grid), -1)
    both = there & other(there) & same
    keys, shape = jax.random.split(rng, 4), (len(x), self.boxes[1])
    low, high = (tuple(int(share * n) for n in grid) for share in self.sides)
    side = corrupt.random_sides(keys[0], shape, low, high)
    start = jax.random.randint(keys[1], side.shape, 0, jnp.asarray(grid)) - side // 2
    used = jnp.arange(shape[1]) < jax.random.randint(keys[2], (len(x), 1), self.boxes[0], self.boxes[1] + 1)
    value = jax.random.randint(keys[3], shape, 1, self.classes + 1)
    end = jnp.where(used[..., None], start + side, start)  # a box that is not used is empty
    classes = jnp.where(both.any(axis=-1), corrupt.painted(value, start, end, grid), 0)
    share = jnp.where(both, (classes / self.classes)[..., None], 0)
    known = there.any(axis=-1)
    return {**batch, 'image': (1 - share) * x + share * other(x)}, losses.Truth(classes, known, None, -1)

  def _check(self, batch: Batch) -> None:
    if len(batch['image']) < 2:
      raise UserError('method volume_fusion mixes records: batch_size must be at least 2')
