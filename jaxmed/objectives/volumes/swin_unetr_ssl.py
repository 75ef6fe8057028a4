"""Swin UNETR's pretraining: what was cut out, how it was turned, and whether two are one (Tang et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.augment import corrupt, warp
from jaxmed.contracts import Batch, Decoder, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dense import DECODERS
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.losses.contrast import nt_xent
from jaxmed.objectives.networks import Clock, with_stats

AXES = ('z', 'y', 'x')  # of arrays [D, H, W]; images have z alone
QUARTERS = 4


@dataclasses.dataclass(frozen=True)
class SwinUNETRSSL(Method):
  """Two copies of a record, turned by quarters and cut out, are restored, told apart by turn, and found again.

  Project-MONAI/research-contributions, SwinUNETR/Pretrain (main.py, utils/ops.py, losses/loss.py, models/ssl_head.py;
  arXiv 2111.14791). Each copy is turned by 0 to 3 quarters. Then boxes of it become noise, and other boxes those of
  another record's copy, see `augment.corrupt.cut_out`. The loss is the mean absolute error of all pixels of the turned
  copies, cross-entropy of the four turns, and NT-Xent of the two copies against all others of the global batch. The
  default decoder sees the last map alone, as there. A channel that a sample lacks, and what lies beyond it, count
  nowhere.

  Differs: boxes come from the record before in the batch, before that has boxes of its own (there a random one,
  possibly the same, possibly cut already); turns are about z, as the paper has it, where the code turns about x;
  rotation and contrast read the pooled vector, where the code reads the first two tokens, of two places in a corner;
  noise has one law for all boxes, see `augment.corrupt.noise_like`; negatives are of all devices, there of one.

  Attributes:
    axis: the axis of turns: 'z', 'y' or 'x' (as published) of arrays [D, H, W]; the plane across it must be square.
    corner_tokens: whether the heads read the first two tokens (as published) and not `feature`.
    feature: 'cls' or 'mean', the vector that the heads read.
    cut: most of the pixels that boxes of noise take, and as many again boxes of the other record.
    rotation_weight, contrast_weight, restoration_weight: of the terms.
    temperature: of NT-Xent. out_dim: of the vectors that are compared.
    decoder: by name, or 'auto', see `models.decoders.dense`. decoder_options: objective.decoder_options.NAME=VALUE.
    chunk: see `losses.contrast.log_partition`.
  """

  encoder: Encoder
  axis: str = 'z'
  corner_tokens: bool = False
  feature: str = 'mean'
  cut: float = 0.3
  rotation_weight: float = 1.0
  contrast_weight: float = 1.0
  restoration_weight: float = 1.0
  temperature: float = 0.5
  out_dim: int = 512
  decoder: str = 'progressive'
  decoder_options: Mapping[str, Any] = FrozenDict()
  chunk: int = -1
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (4e-4, 16)  # main.py's default; README.md pretrains 8 devices of 2 crops, at 6e-6
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.1},
      'augment': {'scale': (0.5, 1.0), 'ratio': (1.0, 1.0)},
  }

  def __post_init__(self):
    siamese.check(self.feature, temperature=self.temperature, out_dim=self.out_dim)
    choose('objective.decoder', self.decoder, (decoding.AUTO, *DECODERS))
    choose('objective.axis', self.axis, AXES if len(self.encoder.image_size) == 3 else AXES[:1])
    weights = (self.rotation_weight, self.contrast_weight, self.restoration_weight)
    if min(weights) < 0 or not any(weights):
      raise UserError(f'objective.*_weight {weights} must be at least 0, one above')
    if not 0 <= self.cut < 1:
      raise UserError(f'objective.cut {self.cut} must lie in [0, 1)')
    if self.corner_tokens and self.encoder.per_channel:
      raise UserError('objective.corner_tokens reads the tokens of two places, and a channel_vit or bag has one a '
                      'channel: leave it out')

  @property
  def plane(self) -> tuple[int, int]:
    """The two axes of an array [B, *size, C] that turns swap, from the end."""
    return {'z': (-3, -2), 'y': (-4, -2), 'x': (-4, -3)}[self.axis]

  @property
  def network(self) -> Decoder:
    """The decoder."""
    return decoding.network(self.encoder, self.decoder, self.encoder.in_channels, options=self.decoder_options)

  @property
  def heads(self) -> dict[str, Dense]:
    """Linear layers from a vector to logits of the turns, and to the vector that is compared."""
    layer = lambda size: Dense((size,), ('embed', None), True, 'torch_uniform')
    return {'rotation': layer(QUARTERS), 'contrast': layer(self.out_dim)}

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    self._check(batch)
    keys = jax.random.split(rng, 3)
    vector = jnp.zeros((1, self.encoder.embed_dim))
    heads = {name: head.init(key, vector)['params']
             for (name, head), key in zip(self.heads.items(), keys[1:], strict=True)}
    return {'params': decoding.init(self.encoder, self.network, keys[0], batch) | heads, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The weighted terms over two copies of each record of the global batch."""
    del step
    self._check(batch)
    params, keys = variables['params'], jax.random.split(rng)
    copies, clean, there, turns = self.copies(keys[0], batch)
    (restored, *_), features, stats, _ = decoding.decode(self.encoder, self.network, params, copies, train,
                                                         {'dropout': keys[1]})
    restored = decoding.of_channels(self.encoder, copies, restored)
    restoration = decoding.mean_of(jnp.abs(restored - clean), there)
    copying = decoding.mean_of(jnp.abs(copies['image'] - clean), there)
    told, compared = (head.apply({'params': params[name]}, x)
                      for (name, head), x in zip(self.heads.items(), self._vectors(features), strict=True))
    logp = jax.nn.log_softmax(told.astype(jnp.float32))
    rotation = -jnp.take_along_axis(logp, turns[:, None], axis=1).mean()
    contrast, found = nt_xent(compared.reshape(-1, 2, self.out_dim), self.temperature, self.chunk)
    loss = (self.rotation_weight * rotation + self.contrast_weight * contrast
            + self.restoration_weight * restoration)
    metrics = {'restoration': restoration, 'rotation': rotation, 'nt_xent': contrast, 'contrast_accuracy': found,
               'rotation_accuracy': (told.argmax(axis=-1) == turns).mean(),
               'restored': 1 - restoration / jnp.maximum(copying, 1e-6)}  # 0 for copying the input, or worse
    return loss, (with_stats(metrics, train, **stats), variables['extra'])

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """'reconstructions': (a turned copy of each record, what is shown of it, what is made of that) [B, *size, C]."""
    copies, clean, *_ = self.copies(rng, batch)
    restored = decoding.decode(self.encoder, self.network, variables['params'], copies, False, None)[0][0]
    restored = decoding.of_channels(self.encoder, copies, restored)
    return {'reconstructions': (clean[::2], copies['image'][::2], restored[::2])}

  def copies(self, rng: jax.Array, batch: Batch) -> tuple[Batch, jax.Array, jax.Array, jax.Array]:
    """(What is shown of two copies of each record, one after the other; the turned copies; their pixels; turns).

    Images and pixels are [2 * B, *size, C], float32 and bool, turns [2 * B] int in 0 .. 3.
    """
    keys, known = jax.random.split(rng, 5), decoding.there(batch)
    twice = lambda x: jnp.repeat(x, 2, axis=0)
    shown: Any = {name: twice(batch[name]) for name in ('channels', 'channel_mask', 'sizes') if name in batch}
    clean = twice(jnp.where(known, batch['image'], 0))
    turns = jax.random.randint(keys[0], (len(clean),), 0, QUARTERS)
    if 'sizes' in shown:
      clean, shown['sizes'] = warp.quarter_turns_in_corner(clean, shown['sizes'], turns, self.plane)
    else:
      clean = warp.quarter_turns(clean, turns, self.plane)
    there = decoding.there({**shown, 'image': clean})
    boxes = lambda key: corrupt.cut_out(key, len(clean), clean.shape[1:-1], self.cut)[..., None]
    noisy = jnp.where(boxes(keys[1]) & there, corrupt.noise_like(keys[2], clean, there), clean)
    other = lambda x: jnp.roll(x, 2, axis=0)
    same = (shown['channels'] == other(shown['channels'])).reshape(len(clean), *[1] * (clean.ndim - 2), -1)
    swapped = boxes(keys[3]) & there & other(there) & same
    return {**shown, 'image': jnp.where(swapped, other(clean), noisy)}, clean, there, turns

  def _vectors(self, features: Features) -> tuple[jax.Array, jax.Array]:
    """What the heads of rotation and contrast read, [2 * B, D] each."""
    if self.corner_tokens:
      return features.patches[:, 0].astype(jnp.float32), features.patches[:, 1].astype(jnp.float32)
    return (features.pooled(self.feature),) * 2

  def _check(self, batch: Batch) -> None:
    size = batch['image'].shape
    if size[self.plane[0]] != size[self.plane[1]]:
      raise UserError(f'method swin_unetr_ssl turns by quarters about {self.axis}: image_size {size[1:-1]} must be '
                      'square across that axis, objective.axis')
    if len(batch['image']) < 2:
      raise UserError('method swin_unetr_ssl compares records and swaps their boxes: batch_size must be at least 2')
