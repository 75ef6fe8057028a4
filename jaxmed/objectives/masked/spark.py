"""SparK and the MAE of U-Nets: hidden blocks of an image are restored, by a decoder with skips (Tian et al. 2023)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.augment.masks import scattered_masks
from jaxmed.contracts import Batch, Decoder, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dense import DECODERS
from jaxmed.models.decoders.densify import Densify
from jaxmed.models.layers.convolution import Hierarchical, enlarge
from jaxmed.objectives.base import Method
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.networks import on_own_grids, with_stats

HIDING = ('auto', 'sparse', 'zeros')


@dataclasses.dataclass(frozen=True)
class SparK(Method):
  """Squared error of the pixels of hidden blocks, all channels alike.

  As MIC-DKFZ/nnssl has it for volumes (arXiv 2410.23132; training/nnsslTrainer/masked_image_modeling/SparkTrainer.py
  and BaseMAETrainer.py): blocks of 16 pixels, three in four hidden, z-scores as they are. With 'sparse' hidden places
  are zero after each layer of the encoder and in no statistic, and tokens take their place before the decoder, see
  `models.decoders.densify`. With 'zeros' hidden pixels are zero and the networks do not know of it, which is nnssl's
  MAE. A channel that a sample lacks, and what lies beyond it, count nowhere.

  Differs: a place of a map whose cells are larger than a block is hidden where all of its blocks are (there never), as
  what no visible pixel reaches would be a constant; keyu-tian/SparK hides cells of the last map, and scores each
  patch by its own mean and deviation.

  Attributes:
    mask_ratio: share of the blocks that is hidden, rounded down.
    mask_size: side of a block in pixels, at most that of the image along an axis; divides its sides.
    hide: 'sparse', 'zeros', or 'auto' for 'sparse' where an encoder can (encoders of stages, encoder.masking=sparse).
    decoder: by name, or 'auto' for that of the encoder's family, see `models.decoders.dense.AUTO`.
    decoder_options: of the decoder: objective.decoder_options.NAME=VALUE.
  """

  encoder: Encoder
  mask_ratio: float = 0.75
  mask_size: int = 16
  hide: str = 'auto'
  decoder: str = decoding.AUTO
  decoder_options: Mapping[str, Any] = FrozenDict()

  LEARNING_RATE: ClassVar = (1e-3, 64)  # AdamW's usual one; the published rate, 1e-2, is SGD's
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'masking': 'sparse'},
      'augment': {'scale': (0.5, 1.0), 'ratio': (1.0, 1.0)},
  }

  def __post_init__(self):
    choose('objective.decoder', self.decoder, (decoding.AUTO, *DECODERS))
    choose('objective.hide', self.hide, HIDING)
    if not 0 < self.mask_ratio < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1')
    if self.mask_size < 1:
      raise UserError(f'objective.mask_size {self.mask_size} must be at least 1 pixel')
    if self.hide == 'sparse' and not self._can_hide:
      raise UserError('objective.hide=sparse needs an encoder of stages with encoder.masking=sparse, such as resenc_l: '
                      'choose hide=zeros, or for a transformer the method mae')

  @property
  def _can_hide(self) -> bool:
    return isinstance(self.encoder, Hierarchical) and self.encoder.masking == 'sparse'

  @property
  def sparse(self) -> bool:
    """Whether hidden places are left out of the encoder."""
    return self.hide == 'sparse' or (self.hide == 'auto' and self._can_hide)

  @property
  def network(self) -> Decoder:
    """The decoder."""
    return decoding.network(self.encoder, self.decoder, self.encoder.in_channels, options=self.decoder_options)

  @property
  def densify(self) -> Densify:
    """What fills hidden places of sparse maps."""
    return Densify(self.encoder.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    keys = jax.random.split(rng)
    params = decoding.init(self.encoder, self.network, keys[0], batch)
    if self.sparse:
      visible = ~self._hidden(keys[1], batch)[..., None]
      whole = lambda p: decoding.maps(self.encoder, self.network, p, batch)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, nn.unbox(params['encoder'])))
      params['densify'] = self.densify.init(keys[1], zeros, visible)['params']
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean squared error over the hidden pixels of the global batch."""
    del step
    keys = jax.random.split(rng)
    restored, clean, hidden, stats = self.restore(variables['params'], batch, keys[0], train, {'dropout': keys[1]})
    there = decoding.there(batch)
    loss = decoding.mean_of(jnp.square(restored - clean), there & hidden)
    axes = tuple(range(1, clean.ndim - 1))
    known = there & ~hidden
    grey = (jnp.where(known, clean, 0).sum(axis=axes, keepdims=True)
            / jnp.maximum(known.sum(axis=axes, keepdims=True), 1))
    worst = decoding.mean_of(jnp.square(grey - clean), there & hidden)
    metrics = {'restoration': loss, 'hidden': decoding.mean_of(hidden.astype(jnp.float32), there),
               'explained': 1 - loss / jnp.maximum(worst, 1e-6)}  # 0 for the mean of what is visible, or worse
    return loss, (with_stats(metrics, train, **stats), variables['extra'])

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """'reconstructions': (the image, what is shown of it, hidden pixels as they are restored), each [B, *size, C]."""
    restored, clean, hidden, _ = self.restore(variables['params'], batch, rng, False, None)
    return {'reconstructions': (clean, jnp.where(hidden, jnp.nan, clean), jnp.where(hidden, restored, clean))}

  def restore(self, params: Any, batch: Batch, rng: jax.Array, train: bool,
              rngs: Any) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
    """(Restored images and images [B, *size, C], 0 where there is nothing; hidden pixels [B, *size, 1] bool;
    running statistics)."""
    blocks = self._hidden(rng, batch)
    visible = ~blocks[..., None]
    clean = jnp.where(decoding.there(batch), batch['image'], 0)
    hidden = ~enlarge(visible, clean.shape[1:-1])
    more: Any = {}
    if self.sparse:
      dense = lambda maps: self.densify.apply({'params': params['densify']}, maps, visible)
      more = {'change': dense, 'hidden': blocks}
    shown: Batch = {**batch, 'image': jnp.where(hidden, 0, clean)}
    (restored, *_), _, stats, _ = decoding.decode(self.encoder, self.network, params, shown, train, rngs, **more)
    return decoding.of_channels(self.encoder, batch, restored), clean, hidden, stats

  def _hidden(self, rng: jax.Array, batch: Batch) -> jax.Array:
    """Hidden blocks [B, *grid] bool, as many of each image."""
    size = batch['image'].shape[1:-1]
    block = tuple(min(self.mask_size, n) for n in size)
    if any(n % b for n, b in zip(size, block, strict=True)):
      raise UserError(f'objective.mask_size {self.mask_size} does not divide the image of {size} pixels')
    grid = tuple(n // b for n, b in zip(size, block, strict=True))
    count = int(self.mask_ratio * math.prod(grid))
    if not count:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} hides none of {math.prod(grid)} blocks: lower mask_size '
                      f'{self.mask_size}')
    hidden = scattered_masks(rng, jnp.full(len(batch['image']), count), math.prod(grid))
    own = -(-batch['sizes'] // jnp.asarray(block)) if 'sizes' in batch else None
    return on_own_grids(hidden, grid, own).reshape(-1, *grid)
