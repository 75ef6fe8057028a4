"""DeepCluster-v2: classifies views into clusters of the whole data set (Caron et al. 2020; facebookresearch/swav)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.clustering import spherical_kmeans
from jaxmed.objectives.losses.contrast import normalize
from jaxmed.objectives.networks import STRONG_PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class DeepCluster(Method):
  """Cross-entropy of all views with their image's cluster of the last epoch (main_deepclusterv2.py).

  A bank keeps the projections of each image's global views as they were when the image was last seen. At the end of
  each epoch they are clustered by spherical k-means, one global view for each set of prototypes in turn; the
  centroids are the classifier of the next epoch and take no gradient, as in the published runs. In the first epoch
  the bank is filled and nothing is trained, as the official code does before it starts. A run of fewer than ten epochs
  clusters ten times nevertheless, then without the images that it has not seen yet. The bank belongs to rows of the
  training data by `index`; held-out images are labelled by the nearest centroid of a global view instead.

  Extra, the same on every device: `bank` [V, R, D] float32 of R training images, `seen` [R], `assignments` [S, R]
  int32, `centroids` [S, K, D], `clusterings` so far. That is 4 R (V D + S) bytes: 1 GB for a million images, with two
  global views and 128 dimensions, and while the step runs about twice that. Clustering takes 64 MB and a copy of one
  view's bank.

  Attributes:
    rows: training images; the run fills it in, it is no option.
    num_prototypes: clusters of each set; 0 for 3000, at most one for ten images.
    num_sets: sets of prototypes, over which the loss is averaged; 3 as published.
    temperature: of the cosines.
    kmeans_iterations: of each clustering.
    hidden_dim: of the projector; 0 for 2048, at most 12 times the encoder's width.
    out_dim: of the projector.
    feature: 'cls' or 'mean', what the projector reads.
  """

  encoder: Encoder
  rows: int = 0
  num_prototypes: int = 0
  num_sets: int = 3
  temperature: float = 0.1
  kmeans_iterations: int = 10
  hidden_dim: int = 0
  out_dim: int = 128
  feature: str = 'cls'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # MoCo v3's for ViTs with AdamW; the published rate is LARS's
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.1},
      'augment': {'views': 2, 'local_views': 6,
                  'scale': (0.14, 1.0), 'local_scale': (0.05, 0.14), **STRONG_PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, temperature=self.temperature, num_sets=self.num_sets, out_dim=self.out_dim,
                  kmeans_iterations=self.kmeans_iterations)
    if self.rows and self._clusters > self.rows:
      raise UserError(f'objective.num_prototypes {self.num_prototypes} is more than the {self.rows} training '
                      f'images: nearest is {self.rows}')

  @property
  def _clusters(self) -> int:
    return self.num_prototypes or min(3000, max(self.rows // 10, 2))

  @property
  def period(self) -> float:
    """Steps between clusterings."""
    return self.clock.warmup(1, share=0.1)

  @property
  def projector(self) -> MLPHead:
    """Features to the vectors that are clustered."""
    hidden = self.hidden_dim or siamese.width(2048, self.encoder)
    return MLPHead((hidden, self.out_dim), use_bias=True)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    count = siamese.count_views(batch, 1)
    if self.rows < 2:
      raise UserError(f'deepcluster needs at least 2 training images, not {self.rows}')
    keys = jax.random.split(rng)
    params = {'encoder': siamese.init_encoder(self.encoder, keys[0], batch),
              'projector': siamese.init_head(self.projector, keys[1], self.encoder.embed_dim)}
    return {'params': params, 'target': {}, 'extra': self.extra(count)}

  def extra(self, count: int) -> dict:
    """The empty bank of `count` global views."""
    return {
        'bank': jnp.zeros((count, self.rows, self.out_dim)), 'seen': jnp.zeros(self.rows, bool),
        'assignments': jnp.full((self.num_sets, self.rows), -1, jnp.int32),
        'centroids': jnp.zeros((self.num_sets, self._clusters, self.out_dim)),
        'clusterings': jnp.zeros((), jnp.int32),
    }

  def frozen(self, step: jax.Array) -> dict[str, jax.Array]:
    """Encoder and projector rest until the first clustering."""
    return {name: step < self.period for name in ('encoder', 'projector')}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Cross-entropy over the images of the global batch that have a cluster, mean over views and sets."""
    drop_key, cluster_key = jax.random.split(rng)
    params = variables['params']
    x, encoder_stats = siamese.encode_all(self.encoder, params['encoder'], batch, drop_key, train, self.feature)
    z, projector_stats = siamese.head_over_all_views(self.projector, params['projector'], x, train)
    count = batch['global']['image'].shape[1]
    loss, metrics, extra = self.cluster(
        cluster_key, variables['extra'], normalize(z), batch['index'], count, step, train)
    return loss, (with_stats(metrics, train, encoder=encoder_stats, projector=projector_stats), extra)

  def cluster(self, rng: jax.Array, extra: dict, z: jax.Array, index: jax.Array, count: int, step: jax.Array,
              train: bool) -> tuple[jax.Array, dict, dict]:
    """Loss, metrics and new bank of vectors z [B, V, D] of length 1, the `count` global views first.

    `index` [B] has their rows in the bank; -1 for vectors that do not count.
    """
    if train:
      due = jnp.floor(step / self.period).astype(jnp.int32)
      again = lambda old: self._cluster(old, rng, due)
      extra = jax.lax.cond(due > extra['clusterings'], again, lambda old: old, extra)
    seen, there = jax.lax.stop_gradient(z[:, :count]), index >= 0
    row = jnp.where(there, index, self.rows)  # beyond the bank, where nothing is written
    if train:
      labels = extra['assignments'][:, jnp.minimum(row, self.rows - 1)]  # [S, B]
    else:
      labels = jnp.stack([_cosines(seen[:, s % count], extra['centroids'][s]).argmax(axis=-1)
                          for s in range(self.num_sets)])
    labels = jnp.where(there, labels, -1)
    losses = [self._cross_entropy(z, *pair) for pair in zip(extra['centroids'], labels, strict=True)]
    loss = jnp.stack(losses).mean()
    if train:
      bank = extra['bank'].at[:, row].set(seen.swapaxes(0, 1), mode='drop')
      extra = extra | {'bank': bank, 'seen': extra['seen'].at[row].set(True, mode='drop')}
    metrics = {'deepcluster_loss': loss, 'assigned': (labels >= 0).mean(), 'images_seen': extra['seen'].mean()}
    return loss, metrics, extra

  def _cross_entropy(self, z: jax.Array, centroids: jax.Array, label: jax.Array) -> jax.Array:
    """Mean over views and labelled images, for z [B, V, D], centroids [K, D] and label [B] int (-1 none)."""
    log_p = jax.nn.log_softmax(_cosines(z, centroids) / self.temperature)  # [B, V, K]
    picked = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None, None], axis=-1)[..., 0].mean(axis=1)
    known = label >= 0
    return -(picked * known).sum() / jnp.maximum(known.sum(), 1)

  def _cluster(self, extra: dict, rng: jax.Array, due: jax.Array) -> dict:
    """New centroids and assignments of the images seen so far."""
    keys, views = jax.random.split(rng, self.num_sets), extra['bank'].shape[0]
    found = [spherical_kmeans(extra['bank'][s % views], self._clusters, keys[s], extra['seen'], self.kmeans_iterations)
             for s in range(self.num_sets)]
    centroids, assignments = (jnp.stack(part) for part in zip(*found, strict=True))
    return extra | {'centroids': centroids, 'assignments': assignments, 'clusterings': due}


def _cosines(z: jax.Array, centroids: jax.Array) -> jax.Array:
  """[..., D], [K, D] -> [..., K] in full float32, as the clustering has them."""
  return jnp.dot(z, centroids.T, precision=jax.lax.Precision.HIGHEST)
