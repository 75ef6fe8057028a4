"""Joint clustering of slices and of volumes of slices (Nguyen et al. 2023, AAAI, "Joint Self-Supervised Image-Volume
Representation Learning with Intra-Inter Contrastive Clustering", arXiv 2212.01893)."""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.models.layers.initial import normal
from jaxmed.models.layers.norm import normalize
from jaxmed.models.layers.positions import sincos
from jaxmed.models.layers.transformer import Dense, LayerNorm, Transformer
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.clustering.deepcluster import DeepCluster
from jaxmed.objectives.clustering.swav import SwAV
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.networks import Clock, with_stats

CLUSTERINGS = ('swav', 'deepcluster')


class SliceMixer(nn.Module):
  """A transformer over the slices of a volume, which knows their places.

  Attributes:
    dim, depth, num_heads, mlp_ratio: of the transformer. out_dim: of what it predicts for each slice.
  """

  dim: int
  depth: int
  num_heads: int
  mlp_ratio: float
  out_dim: int
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, there: jax.Array, hidden: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Slices x [B, K, D] -> their mixed vectors [B, K, dim] and predictions [B, K, out_dim], float32.

    No slice looks at those that are not `there` [B, K]; those that are `hidden` [B, K] are seen as a token.
    """
    compute = jnp.dtype(self.dtype)
    token = self.param('mask_token', nn.with_logical_partitioning(normal(), ('embed',)), (self.dim,), jnp.float32)
    x = Dense((self.dim,), (None, 'embed'), dtype=compute, name='embed')(x.astype(compute))
    x = x if hidden is None else jnp.where(hidden[..., None], token.astype(compute), x)
    x = x + jnp.asarray(sincos((x.shape[1],), self.dim), compute)
    x = Transformer(self.depth, self.num_heads, self.mlp_ratio, dtype=compute, name='transformer')(x, there)
    x = LayerNorm(compute, name='norm')(x)
    return x.astype(jnp.float32), Dense((self.out_dim,), ('embed', None), name='predict')(x.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class JointClustering(Method):
  """Clusters slices, clusters volumes, and predicts hidden slices of a volume from the others.

  A sample is a window of slices (`loader.window` records of one `loader.window_group`, in order); the encoder, of any
  family, sees each slice by itself. An image of no volume, a group of one, is a volume of one slice: it is among the
  slices and among the volumes, and no slice of it is hidden. Slices are clustered by what a projector makes of the
  encoder's vectors, volumes by the mean over slices of what a transformer makes of these vectors: both by SwAV, or both
  by DeepCluster-v2, which label a view by the other view or by the epoch before. For the third term a share of the
  slices is replaced by a token, and the transformer predicts the encoder's vectors of these, each with mean 0 and
  variance 1. It trains no encoder, for which vectors that are all alike would be easiest.

  Differs from the code (duyhominhnguyen/Self-supervised-Image-Volume-Intra-Inter-Contrastive), by what the paper means:
  attention is along slices and knows their places, where the code's runs along features; the error is of hidden slices
  alone, where the code's is of all. By choice: full attention, as some tens of slices need no deformable one; the three
  terms are trained together, where the code trains slices first, then the transformer with the encoder at rest, then
  volumes (the weights, `freeze` and `init` give such stages); the encoder's last vector through a trained map, in place
  of pooled maps of all stages through a random one; hidden slices are drawn at each step; no dropout.

  Attributes:
    rows: training records; the run fills it in.
    clustering: 'swav' or 'deepcluster'. temperature, epsilon, sinkhorn_iterations, freeze_prototypes, num_sets,
      kmeans_iterations: see these.
    num_prototypes: of volumes; 0 for 3000 as of SwAV, or one for 160 records (ten windows of 16) as of DeepCluster.
    slice_prototypes: of slices; 0 for num_prototypes, or where that is 0 for what each of these takes.
    queue_length: of volumes, as of SwAV; -1 where a batch has fewer volumes than there are prototypes.
    slice_weight, volume_weight, masked_weight: of the terms.
    mask_ratio: share of a volume's slices that is hidden, rounded up; at least one slice is shown.
    dim, depth, num_heads, mlp_ratio: of the transformer; dim 0 for 640, at most the encoder's width.
    hidden_dim, out_dim: of the slices' projector; hidden_dim 0 as of SwAV.
    feature: 'cls' or 'mean', the encoder's vector of a slice.
  """

  encoder: Encoder
  rows: int = 0
  clustering: str = 'swav'
  num_prototypes: int = 0
  slice_prototypes: int = 0
  temperature: float = 0.1
  epsilon: float = 0.05
  sinkhorn_iterations: int = 3
  freeze_prototypes: int = -1
  queue_length: int = -1
  num_sets: int = 3
  kmeans_iterations: int = 10
  slice_weight: float = 1.0
  volume_weight: float = 1.0
  masked_weight: float = 1.0
  mask_ratio: float = 0.1
  dim: int = 0
  depth: int = 4
  num_heads: int = 8
  mlp_ratio: float = 1.125
  hidden_dim: int = 0
  out_dim: int = 128
  feature: str = 'mean'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # as of SwAV; the published rate is of SGD
  FEATURE: ClassVar[str] = 'mean'
  WINDOWS: ClassVar[bool] = True
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.1},
      'augment': {'views': 2, 'scale': (0.5, 1.0), 'gamma': 0.35, 'gamma_probability': (0.5,), 'brightness': 0.2,
                  'contrast': 0.2},
      'loader': {'window': 16, 'window_group': 'path', 'window_order': 'id'},
  }

  def __post_init__(self):
    siamese.check(self.feature, depth=self.depth, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio)
    choose('objective.clustering', self.clustering, CLUSTERINGS)
    for name in ('slice_weight', 'volume_weight', 'masked_weight'):
      if vars(self)[name] < 0:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least 0')
    if not 0 < self.mask_ratio < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1')
    if self._width % self.num_heads:
      raise UserError(f'objective.num_heads {self.num_heads} does not divide objective.dim {self._width}')
    for level in ('slices', 'volumes'):  # which check the options of their own
      self._clusters(level)

  @property
  def _width(self) -> int:
    return self.dim or min(640, self.encoder.embed_dim)

  @property
  def mixer(self) -> SliceMixer:
    """From the encoder's vectors of slices to those that are averaged to volumes."""
    return SliceMixer(self._width, self.depth, self.num_heads, self.mlp_ratio, self.encoder.embed_dim,
                      self.encoder.dtype)

  @property
  def projector(self) -> MLPHead:
    """From the encoder's vectors of slices to those that are clustered."""
    return MLPHead((self.hidden_dim or siamese.width(2048, self.encoder), self.out_dim), use_bias=True)

  def _clusters(self, level: str) -> Any:
    """The method that clusters 'slices' or 'volumes'."""
    volumes = level == 'volumes'
    count = self.num_prototypes if volumes else self.slice_prototypes or self.num_prototypes
    if volumes and self.clustering == 'deepcluster':
      count = count or max(self.rows // 160, 2)
    shared: Any = dict(out_dim=self._width if volumes else self.out_dim, temperature=self.temperature, clock=self.clock)
    if self.clustering == 'swav':
      return SwAV(self.encoder, count or SwAV.num_prototypes, epsilon=self.epsilon, **shared,
                  sinkhorn_iterations=self.sinkhorn_iterations, freeze_prototypes=self.freeze_prototypes,
                  queue_length=self.queue_length if volumes else 0)
    return DeepCluster(self.encoder, self.rows, count, self.num_sets, kmeans_iterations=self.kmeans_iterations,
                       **shared)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views of windows."""
    group = self._checked(batch)
    (size, slices, views), keys = group['image'].shape[:3], jax.random.split(rng, 6)
    known: Any = networks.inputs(group)
    flat = {name: x.reshape(-1, *x.shape[3:]) for name, x in known.items()}
    x = jnp.zeros((1, slices, self.encoder.embed_dim))
    params = {'encoder': self.encoder.init(keys[0], **flat)['params'],
              'projector': siamese.init_head(self.projector, keys[1], self.encoder.embed_dim),
              'mixer': self.mixer.init(keys[2], x, jnp.ones((1, slices), bool))['params']}
    swav, extra = self.clustering == 'swav', {}
    for key, level, count in ((keys[3], 'slices', size * slices), (keys[4], 'volumes', size)):
      clusters = self._clusters(level)
      extra[level] = clusters.extra(views, count) if swav else clusters.extra(views)
      if swav:
        params[f'{level}_prototypes'] = siamese.init_head(clusters.prototypes, key, clusters.out_dim)
    return {'params': params, 'target': {}, 'extra': extra}

  def _checked(self, batch: Batch) -> Any:
    """The views of a batch of windows."""
    group = batch.get('global')
    if group is None or group['image'].ndim != len(self.encoder.image_size) + 4:
      raise UserError('method joint_clustering takes windows of slices: set loader.window to the slices of a sample '
                      'and loader.window_group to the column that says which volume they are of')
    return group

  def frozen(self, step: jax.Array) -> dict[str, jax.Array]:
    """Prototypes in the first steps; of DeepCluster all, until the first clustering."""
    if self.clustering == 'swav':
      rest = self._clusters('slices').frozen(step)['prototypes']
      return {f'{level}_prototypes': rest for level in ('slices', 'volumes')}
    return dict.fromkeys(('encoder', 'projector', 'mixer'), step < self._clusters('slices').period)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Weighted sum of the loss over slices, over volumes, and over hidden slices, of the global batch."""
    params, there = variables['params'], batch['index'] >= 0  # [B, K]
    known: Any = networks.inputs(self._checked(batch))
    group, keys = {name: networks.last_again(x, there) for name, x in known.items()}, jax.random.split(rng, 4)
    size, slices, views = group['image'].shape[:3]
    merged: Any = {name: a.reshape(-1, *a.shape[2:]) for name, a in group.items()}
    x, stats = siamese.encode(self.encoder, params['encoder'], merged, keys[0], train, self.feature)  # [B * K, V, D]
    z, head_stats = siamese.head_over_all_views(self.projector, params['projector'], x, train)
    by_volume = x.reshape(size, slices, views, -1).swapaxes(1, 2).reshape(size * views, slices, -1)  # [B * V, K, D]
    own = jnp.repeat(there, views, axis=0)  # [B * V, K]
    volumes = self._mean(self._mix(params, by_volume, own)[0], own).reshape(size, views, -1)
    vectors = {'slices': (normalize(z), batch['index'].reshape(-1), self.slice_weight),
               'volumes': (normalize(volumes), batch['index'][:, 0], self.volume_weight)}
    metrics: dict[str, Any] = {}
    loss, extra = jnp.zeros(()), {}
    for key, (level, (vector, index, weight)) in zip(keys[1:3], vectors.items(), strict=True):
      value, seen, extra[level] = self._clustered(level, key, variables, vector, index, views, step, train)
      loss = loss + weight * value
      metrics |= {f'{level}_{name}': number for name, number in seen.items()}
      metrics[f'{level}_spread'] = _spread(vector, index >= 0)
    if self.masked_weight:
      error, plain = self._masked(keys[3], params, jax.lax.stop_gradient(by_volume), own)
      loss = loss + self.masked_weight * error
      metrics |= {'masked_loss': error, 'masked_gain': 1 - error / jnp.maximum(plain, 1e-6)}
    return loss, (with_stats(metrics, train, encoder=stats, projector=head_stats), extra)

  def _mix(self, params: Any, x: jax.Array, there: jax.Array, hidden: jax.Array | None = None):
    return self.mixer.apply({'params': params['mixer']}, x, there, hidden)

  def _mean(self, x: jax.Array, there: jax.Array) -> jax.Array:
    """The mean [B, D] over the slices of x [B, K, D] that are there."""
    weight = there[..., None].astype(x.dtype)
    return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)

  def _clustered(self, level: str, rng: jax.Array, variables: Variables, z: jax.Array, index: jax.Array, views: int,
                 step: jax.Array, train: bool) -> tuple[jax.Array, dict, dict]:
    """Loss, metrics and new state of vectors z [N, V, D] of length 1, of which those without an index do not count."""
    clusters, extra = self._clusters(level), variables['extra'][level]
    if self.clustering == 'deepcluster':
      return clusters.cluster(rng, extra, z, index, views, step, train)
    counts = index >= 0 if level == 'slices' else None
    return clusters.cluster(variables['params'][f'{level}_prototypes'], extra, z, views, step, train, counts)

  def hide(self, rng: jax.Array, there: jax.Array) -> jax.Array:
    """Which slices of `there` [B, K] are hidden, [B, K] bool: ceil(mask_ratio n) of n, at most n - 1."""
    noise = jnp.where(there, jax.random.uniform(rng, there.shape), 2.0)
    own = there.sum(axis=1)
    shares = jnp.asarray([min(math.ceil(self.mask_ratio * n - 1e-9), max(n - 1, 0)) for n in range(there.shape[1] + 1)])
    return jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < shares[own][:, None]

  def _masked(self, rng: jax.Array, params: Any, x: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of predicted hidden slices, and of the mean of the shown slices in their place."""
    hidden = self.hide(rng, there)
    target = jax.nn.standardize(x, axis=-1, epsilon=1e-6)
    predicted = self._mix(params, x, there, hidden)[1]
    plain = self._mean(target, there & ~hidden)[:, None]
    over = lambda error: (jnp.square(error).mean(axis=-1) * hidden).sum() / jnp.maximum(hidden.sum(), 1)
    return over(predicted - target), over(plain - target)


def _spread(z: jax.Array, counts: jax.Array) -> jax.Array:
  """1 - |mean|^2 of vectors z [N, V, D] of length 1: one minus the mean cosine of all pairs, 0 where all are alike."""
  weight = counts[:, None, None].astype(z.dtype)
  mean = (z * weight).sum(axis=(0, 1)) / jnp.maximum(weight.sum() * z.shape[1], 1)
  return 1 - jnp.square(mean).sum()
