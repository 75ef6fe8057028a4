"""GEMINI: features of two people's images that a smooth flow brings together (He et al. 2025, arXiv 2502.05282).

It extends Geometric Visual Similarity Learning (He et al. 2023, CVPR).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.augment import corrupt, geometry, warp
from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.dense import DECODERS
from jaxmed.models.decoders.flow import FlowDecoder, Restorer
from jaxmed.objectives.base import Method
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.dense.decoding import AUTO
from jaxmed.objectives.dense.segment import Segment
from jaxmed.objectives.losses import ncc
from jaxmed.objectives.networks import own_sizes, placed, with_stats


@dataclasses.dataclass(frozen=True)
class GEMINI(Method):
  """Records in pairs, each with the next one of the batch: a flow warps the one, A, onto the other, B.

  f are features of every pixel, of an encoder and a dense decoder; a small U-Net on f_A and f_B beside each other gives
  the flow. Per pair, over the pixels that come from within A and lie within B:
    visual: 1 - squared local correlation of the warped A and B, channel by channel.
    semantic: `feature_weight` (1 - cosine of warped f_A and f_B), whose flow has no gradient, and `flow_weight` times
      the same, whose features have none: features follow slowly, and the flow follows features.
    smoothness: mean squared forward difference of the flow, in pixels.
    restoration: squared error of an image in 0 .. 1 from the features of its distorted copy.
  Loss: 2 (visual + semantic + smoothness) + restoration, each with its weight. In a batch each record is once A and
  once B; the 2 is for the published sum of both directions, which two records have exactly. Definition:
  YutingHe-list/GEMINI, GEMINI_SS_MIP/GEMINI_SS_MIP_3d.py and utils/. Images should show the same part of the body in
  the same pose; by default whole records are seen, not turned over.

  Differs: windows at a border have the pixels that there are (there 729 with zeros, so that an image is unlike its own
  multiple); a flow of zeros is the identity (there it shrinks an image, as two conventions of corners meet), and flows
  start within a pixel; both losses are one step (there two, one after the other); nothing else than the weight of
  smoothness keeps flows from folding, as there, unless `squarings` is set, and `folded_share` says how much of a flow
  folds; one pose for all records of a batch, with one zoom for all axes, repeats the border (there zeros);
  pixels are shuffled within windows that tile the array (there many small blocks that overlap).

  Attributes:
    feature_dim: of f. flow_dims: channels of the stages of the flow's U-Net, the finest first.
    decoder, decoder_options: of the features, see Segment.
    ncc_window: pixels along each axis in which images are correlated, odd.
    squarings: 0 for a flow as the network gives it; else that is a velocity, integrated by so many squarings
      (7 is usual), and the flow is a diffeomorphism up to interpolation.
    visual_weight, semantic_weight, smooth_weight, restore_weight, feature_weight, flow_weight: see above.
    rotation: greatest angle of the batch's pose about each axis, in degrees. zoom: range of its factor.
    shuffle, curve: probability that pixels are shuffled, in windows of at most 1/20 of a side, and that intensities
      go through a random rising Bezier curve. paint: probability of each next one of at most 30 boxes of noise, with
      sides of 1/10 to 1/5.
  """

  encoder: Encoder
  feature_dim: int = 32
  flow_dims: tuple[int, ...] = (32, 64, 64)
  decoder: str = AUTO
  decoder_options: Mapping[str, Any] = FrozenDict()
  ncc_window: int = 9
  squarings: int = 0
  visual_weight: float = 1.0
  semantic_weight: float = 0.8
  smooth_weight: float = 0.4
  restore_weight: float = 100.0
  feature_weight: float = 0.1
  flow_weight: float = 1.0
  rotation: float = 20.0
  zoom: tuple[float, float] = (0.75, 1.25)
  shuffle: float = 0.8
  curve: float = 0.9
  paint: float = 0.95

  LEARNING_RATE: ClassVar = (1e-4, 2)  # Adam at 1e-4, one pair
  DEFAULTS: ClassVar[dict[str, Any]] = {'augment': {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.0,)}}

  def __post_init__(self):
    choose('objective.decoder', self.decoder, (AUTO, *DECODERS))
    if self.ncc_window < 1 or self.ncc_window % 2 == 0:
      raise UserError(f'objective.ncc_window {self.ncc_window} must be an odd number of pixels')
    if not self.flow_dims or any(n < 8 or n % 8 for n in self.flow_dims):
      raise UserError(f'objective.flow_dims {self.flow_dims} must be numbers that 8 divides')
    if self.feature_dim < 2:
      raise UserError(f'objective.feature_dim {self.feature_dim} must be at least 2')
    for name in ('squarings', 'visual_weight', 'semantic_weight', 'smooth_weight', 'restore_weight', 'feature_weight',
                 'flow_weight', 'rotation'):
      if vars(self)[name] < 0:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least 0')
    for name in ('shuffle', 'curve', 'paint'):
      if not 0 <= vars(self)[name] <= 1:
        raise UserError(f'objective.{name} {vars(self)[name]} must be a probability')
    if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1]:
      raise UserError(f'objective.zoom {self.zoom} must be two numbers with 0 < low <= high')

  @property
  def dense(self) -> Segment:
    """Encoder and decoder, whose logits are the features."""
    return Segment(self.encoder, self.decoder, self.decoder_options, values=tuple(range(self.feature_dim)))

  @property
  def deformer(self) -> FlowDecoder:
    """Features of both images of a pair to a flow, or to a velocity."""
    return FlowDecoder(self.flow_dims, self.encoder.dtype)

  @property
  def restorer(self) -> Restorer:
    """Features to the image."""
    return Restorer(self.encoder.in_channels, dtype=self.encoder.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    keys, lead = jax.random.split(rng, 3), batch['image'].shape[:-1]
    params = self.dense.init(keys[0], batch)['params']
    params['deformer'] = self.deformer.init(keys[1], jnp.zeros((*lead, 2 * self.feature_dim)))['params']
    params['restorer'] = self.restorer.init(keys[2], jnp.zeros((*lead, self.feature_dim)))['params']
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Weighted terms of the pairs and of restoration, mean over the global batch."""
    del step
    if len(batch['image']) < 2:
      raise UserError('method gemini pairs each record with the next one of the batch: batch_size must be at least 2')
    pose_key, distort_key, *drops = jax.random.split(rng, 4)
    batch = self.posed(pose_key, batch) if train else batch
    unit, low, span = _unit(batch)
    images = decoding.image(self.encoder, {**batch, 'image': unit})  # [B, *size, V]
    shown = self._shown(batch)
    features, stats = self._features(variables, batch, drops[0], train)
    following = lambda x: jnp.roll(x, -1, axis=0)
    own = own_sizes(batch)
    flow = self.flow(variables['params'], features, following(features), own)
    pair, metrics = self.pairs(images, features, shown, flow, own)
    distorted = self.distorted(distort_key, unit, decoding.there(batch))
    again, more = self._features(variables, {**batch, 'image': distorted * span + low}, drops[1], train)
    restored = self.restorer.apply({'params': variables['params']['restorer']}, again)
    counts = geometry.filled(own, flow.shape[1:-1])[..., None] & shown.reshape(len(shown), *[1] * len(own[0]), -1)
    restoration = ncc.mean_of(jnp.square(restored - images), counts).mean()
    metrics |= {'restoration': restoration}
    stats = jax.tree.map(lambda a, b: (a + b) / 2, stats, more)
    return pair + self.restore_weight * restoration, (with_stats(metrics, train, **stats), variables['extra'])

  def flow(self, params: Any, a: jax.Array, b: jax.Array, own: jax.Array) -> jax.Array:
    """Displacements [B, *size, rank] in pixels from places in B to those in A, of features [B, *size, F]."""
    flow = self.deformer.apply({'params': params['deformer']}, jnp.concatenate([a, b], axis=-1))
    if not self.squarings:
      return flow
    return jax.vmap(lambda v, n: warp.integrated(v, self.squarings, n))(flow, jnp.roll(own, -1, axis=0))

  def pairs(self, images: jax.Array, features: jax.Array, shown: jax.Array, flow: jax.Array,
            own: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(Loss, metrics) of images [B, *size, V] in 0 .. 1 whose channels are `shown` [B, V], of features and flows."""
    following, size, still = lambda x: jnp.roll(x, -1, axis=0), flow.shape[1:-1], jax.lax.stop_gradient
    places = warp.centres(size) + flow
    inside = jax.vmap(lambda at, n: warp.nearest(jnp.ones(size, jnp.int32), at, 0, n))(still(places), own)
    there = geometry.filled(following(own), size)[..., None]  # of B
    counts = (there & (inside > 0)[..., None]).astype(jnp.float32)
    warped = jax.vmap(warp.linear)
    other = following(features)
    alike = ncc.ncc(warped(images, places, own), following(images), counts, self.ncc_window)
    both = (shown & following(shown)).reshape(len(shown), *[1] * len(size), -1)
    visual = jnp.where(both.any(axis=tuple(range(1, both.ndim))), 1 - ncc.mean_of(alike, counts * both), 0)
    slow = ncc.apart(warped(features, still(places), own), other, counts)
    fast = ncc.apart(warped(still(features), places, own), still(other), counts)
    smooth = ncc.smoothness(flow, there.astype(jnp.float32))
    semantic = self.feature_weight * slow + self.flow_weight * fast
    loss = 2 * (self.visual_weight * visual + self.semantic_weight * semantic + self.smooth_weight * smooth)
    folds = jax.vmap(warp.jacobian_determinant)(still(flow))[..., None] <= 0
    elsewhere = jnp.roll(other, [n // 2 for n in size], axis=tuple(range(1, other.ndim - 1)))
    metrics = {'visual': visual, 'semantic': semantic, 'smoothness': smooth, 'feature_cosine': 1 - slow,
               'cosine_elsewhere': 1 - ncc.apart(features, elsewhere, counts), 'overlap': ncc.mean_of(counts, there),
               'folded_share': ncc.mean_of(folds, there), 'flow_length': ncc.mean_of(_length(flow), there)}
    return loss.mean(), {name: x.mean() for name, x in metrics.items()}

  def posed(self, rng: jax.Array, batch: Batch) -> Batch:
    """The batch with all images rotated and zoomed alike, each about its own centre."""
    size = batch['image'].shape[1:-1]
    drawn = geometry.draw_warp(rng, 1, size, ((self.rotation,) * len(size), 1.0), (self.zoom, 1.0), None)

    def one(image, own):
      middle = (own - 1) / 2
      places = jnp.einsum('ij,...j->...i', drawn['matrix'][0], warp.centres(size) - middle, precision='highest')
      return warp.linear(image, places + middle, own)

    return {**batch, 'image': jax.vmap(one)(batch['image'].astype(jnp.float32), own_sizes(batch))}

  def distorted(self, rng: jax.Array, unit: jax.Array, there: jax.Array) -> jax.Array:
    """Images [B, *size, C] in 0 .. 1 with shuffled pixels, other intensities and boxes of noise (Zhou et al. 2019)."""
    keys, sides = jax.random.split(rng, 5), [(n // 10, n // 5) for n in unit.shape[1:-1]]
    points = jax.random.uniform(keys[4], (len(unit), unit.shape[-1], 2, 2))
    some = lambda key, chance: jax.random.bernoulli(key, chance, (len(unit), *[1] * (unit.ndim - 1)))
    image = jnp.where(some(keys[0], self.shuffle), corrupt.shuffle_locally(keys[1], unit, there, 1 / 20), unit)
    curved = corrupt.bezier(image, there, points, jnp.zeros(points.shape[:2], bool))
    image = jnp.where(some(keys[2], self.curve), curved, image)
    return corrupt.paint(keys[3], image, there, sides, most=30, again=self.paint)

  def _features(self, variables: Variables, batch: Batch, rng: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    """Features [B, *size, F] float32 and running statistics."""
    outputs, stats = self.dense.logits(variables, batch, train, {'dropout': rng})
    return outputs[0], stats

  def _shown(self, batch: Batch) -> jax.Array:
    """Channels that images show, [B, V] bool at their places."""
    mask = batch.get('channel_mask', jnp.ones(batch['channels'].shape, bool))
    if not self.encoder.per_channel:
      return mask
    return placed(mask[:, None].astype(jnp.float32), batch['channels'], self.encoder.in_channels)[:, 0] > 0


def _unit(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Images [B, *size, C] scaled to 0 .. 1 by channel, least values and ranges [B, 1.., C]; 0 beyond an image."""
  image = batch['image'].astype(jnp.float32)
  within = geometry.filled(own_sizes(batch), image.shape[1:-1])[..., None] & jnp.isfinite(image)
  low, high = corrupt.value_range(image, within)
  span = jnp.maximum(high - low, 1e-6)
  return jnp.where(within, (image - low) / span, 0), low, span


def _length(flow: jax.Array) -> jax.Array:
  """Lengths of displacements [B, *size, rank], [B, *size, 1]."""
  return jnp.sqrt(jnp.square(jax.lax.stop_gradient(flow)).sum(axis=-1, keepdims=True))
