"""LVM-Med: matches the graphs that two views of a batch make (Nguyen et al. 2023, arXiv 2306.11925)."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses import matching
from jaxmed.objectives.losses.contrast import normalize
from jaxmed.objectives.losses.matching import dot
from jaxmed.objectives.networks import PHOTOMETRIC, Clock, with_stats

PLACES = 64  # most dense features of an image: a ResNet's 7 x 7 at 224 pixels fits, finer grids are averaged


class GraphNetwork(nn.Module):
  """Two graph convolutions with a ReLU between them (Morris et al. 2019): of a vertex and of its neighbours' mean."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, near: jax.Array) -> jax.Array:
    """Maps x [..., N, D], whose vertices have the neighbours near [..., N, K] int, to [..., N, features]."""
    for i in range(2):
      axes = ('mlp', 'embed') if i else ('embed', 'mlp')
      around = jnp.take_along_axis(x[..., None, :], near[..., None], axis=-3).mean(axis=-2)
      own = Dense((self.features,), axes, kernel_init='torch_uniform', name=f'own{i}')(x)
      x = own + Dense((self.features,), axes, False, 'torch_uniform', name=f'around{i}')(around)
      x = x if i else jax.nn.relu(x)
    return x


@dataclasses.dataclass(frozen=True)
class LVMMed(Method):
  """Hamming distance between the best matching of two views' graphs and the true one, where images match themselves.

  Each view of a group of images is a graph: vertices are the images' projected vectors, edges lead to the nearest
  neighbours, and a graph network mixes both. Vertices have the affinity (1 - local_weight) cos of their vectors +
  local_weight times that of their dense features; edges, the cosine of the differences of their ends. A solver
  maximises both (`matching.solve`), and the loss is the number of wrong entries by that of vertices, 2 (1 - accuracy).
  Its gradient is estimated, see `matching.mismatch`. With more than two views, the mean over pairs.

  The authors give their training code on request only. Constants are those of an earlier form of it that is public
  (duyhominhnguyen/Exgra-Med, llava/utils_graph/run_vic.py and config.py, on VICRegL's base); the noise is Exgra-Med's
  (llava/model/llava_pre.py). Differences from it: cosines in place of softplus(inner product) - 0.5, as in Exgra-Med;
  one matching of vertices with global and dense affinities; no dropout in the graph network, and the mean of
  neighbours in place of the sum; dense features are paired by what they show and not also by where the crops lie;
  crops of one size; edges are the directions between unit vectors, in Exgra-Med those between vectors as the graph
  network gives them, which it passes through another ReLU; and a solver that runs on the device in place of LPMP. The
  loss is by the number of vertices, as in Exgra-Med; run_vic.py sums, and its `strength` then also moves by the weight
  of the loss, one over the number of graphs.

  Attributes:
    group: most images a graph has. A batch is cut, in its order, into graphs of equal size (where it does not divide,
      neighbouring ones share images). Memory grows with group^4, so more than 32 is costly.
    neighbors: edges of a vertex.
    edge_weight: factor on the affinities of edges.
    local_weight: share of dense features in the affinity of vertices, 0 to leave them out. 0.25 is the weight that
      VICRegL gives its local loss.
    matches: best pairs of dense features that count for two images.
    margin: what true matches are held back by in training, so that they must win by it (Rolinek et al. 2020).
    noise: scale of the Gumbel noise on affinities in training (I-MLE), 0 for none.
    strength: lambda of the gradient's estimate, 80 as in Rolinek et al. 2020.
    hidden_dim, local_dim: of each layer of the two projectors and of the graph network; 0 for 1024 and 512, at most 12
      times the encoder's width.
    feature: 'cls' or 'mean', what the projector reads.
  """

  encoder: Encoder
  group: int = 10
  neighbors: int = 5
  edge_weight: float = 0.5
  local_weight: float = 0.25
  matches: int = 20
  margin: float = 1.0
  noise: float = 0.05
  strength: float = 80.0
  hidden_dim: int = 0
  local_dim: int = 0
  feature: str = 'mean'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (1.56e-3, 800)  # 5e-4 at 256, scaled to the batch linearly as there
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.05},
      'augment': {'views': 2, 'scale': (0.4, 1.0), **PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, neighbors=self.neighbors, matches=self.matches, strength=self.strength)
    if self.group < 2:
      raise UserError(f'objective.group {self.group} must be at least 2: one image has nothing to be mistaken for')
    if not 0 <= self.local_weight <= 1:
      raise UserError(f'objective.local_weight {self.local_weight} must be from 0 to 1')
    for name in ('edge_weight', 'margin', 'noise'):
      if vars(self)[name] < 0:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least 0')

  @property
  def projector(self) -> MLPHead:
    """Features to the vertices' vectors."""
    width = self.hidden_dim or siamese.width(1024, self.encoder)
    return MLPHead((width, width, width), last_bias=False)

  @property
  def local_projector(self) -> MLPHead:
    """Dense features to the vectors that are paired."""
    width = self.local_dim or siamese.width(512, self.encoder)
    return MLPHead((width, width, width), last_bias=False)

  @property
  def graph(self) -> GraphNetwork:
    """Vectors of vertices to those that are matched."""
    return GraphNetwork(self.projector.features[-1])

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    siamese.count_views(batch)
    keys = jax.random.split(rng, 4)
    width = self.projector.features[-1]
    params = {'encoder': siamese.init_encoder(self.encoder, keys[0], batch),
              'projector': siamese.init_head(self.projector, keys[1], self.encoder.embed_dim),
              'graph': self.graph.init(keys[2], jnp.zeros((2, width)), jnp.zeros((2, 1), jnp.int32))['params']}
    if self.local_weight:
      params['local_projector'] = siamese.init_head(self.local_projector, keys[3], self.encoder.embed_dim)
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Hamming distance a vertex, over the graphs of the global batch; held out, without margin and noise."""
    del step
    if batch['global']['image'].shape[0] < 2:
      raise UserError('batch_size 1 is too small: lvm_med matches at least 2 images')
    keys = jax.random.split(rng)
    graphs, stats = self._graphs(variables['params'], batch, keys[0], train)
    couples = list(itertools.combinations(range(batch['global']['image'].shape[1]), 2))
    results = [self._match(graphs[i], graphs[j], jax.random.fold_in(keys[1], n), train)
               for n, (i, j) in enumerate(couples)]
    loss, accuracy, gap = (sum(part) / len(couples) for part in zip(*results, strict=True))
    metrics = {'lvm_med_loss': loss, 'matching_accuracy': accuracy, 'matching_gap': gap}
    return loss, (with_stats(metrics, train, **stats), variables['extra'])

  def _graphs(self, params: Any, batch: Batch, rng: jax.Array, train: bool) -> tuple[list[dict], dict]:
    """The graphs of each view, and new running statistics.

    A view is {'nodes': [G, N, D] of length 1, 'near': [G, N, K], 'places': [G, N, P, M] of length 1, where used}.
    """
    views, stats = batch['global']['image'].shape[1], {}
    out, stats['encoder'] = networks.run(
        self.encoder, params['encoder'], **networks.flat(batch['global']), train=train, rngs={'dropout': rng})
    x = networks.views(out.pooled(self.feature), views)
    z, stats['projector'] = siamese.head_over_all_views(self.projector, params['projector'], x, train)
    parts = {'z': in_groups(z, self.group)}  # [G, N, V, D]
    if self.local_weight:
      y = pooled_places(out, self.encoder.per_channel)
      y, stats['local_projector'] = siamese.head_over_all_views(
          self.local_projector, params['local_projector'], y, train)
      parts['places'] = in_groups(normalize(networks.views(y, views)), self.group)
    graphs = [{name: part[:, :, v] for name, part in parts.items()} for v in range(views)]
    for g in graphs:
      z = g.pop('z')
      g['near'] = jax.vmap(lambda one: matching.neighbors(one, min(self.neighbors, len(one) - 1)))(z)
      g['nodes'] = normalize(self.graph.apply({'params': params['graph']}, z, g['near']))
    return graphs, stats

  def _match(self, left: dict, right: dict, rng: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, share of vertices matched to themselves, and by how much the solution beats that; means over graphs."""
    vertex, edge = jax.vmap(self._affinities)(left, right)
    if train:
      keys = jax.random.split(rng)
      vertex = vertex - self.margin * jnp.eye(vertex.shape[-1]) + self.noise * jax.random.gumbel(keys[0], vertex.shape)
      centred = jax.random.gumbel(keys[1], edge.shape) - np.euler_gamma  # or each pair of edges would be worth more
      edge = edge + self.edge_weight * self.noise * centred

    def one(vertex, edge, left, right):
      loss, assignment = matching.mismatch(vertex, edge, left, right, self.strength)
      identity = jnp.arange(vertex.shape[0])
      value = lambda p: matching.value(vertex, edge, left, right, p)
      return loss, (assignment == identity).mean(dtype=jnp.float32), value(assignment) - value(identity)

    loss, accuracy, gap = jax.vmap(one)(vertex, edge, left['near'], right['near'])
    return loss.mean(), *jax.lax.stop_gradient((accuracy.mean(), gap.mean()))

  def _affinities(self, left: dict, right: dict) -> tuple[jax.Array, jax.Array]:
    """Affinities of the vertices [N, N] and of the edges [N, K, N, K] of two graphs."""
    a, b = left['nodes'], right['nodes']
    vertex = dot('id,ad->ia', a, b)
    if self.local_weight:
      dense = local_affinity(left['places'], right['places'], self.matches)
      vertex = (1 - self.local_weight) * vertex + self.local_weight * dense
    edge = dot('ird,aqd->iraq', _direction(a, left['near']), _direction(b, right['near']))
    return vertex, self.edge_weight * edge



def _direction(nodes: jax.Array, near: jax.Array) -> jax.Array:
  """Unit vectors [N, K, D] along the edges of nodes [N, D] of length 1; shorter where the ends nearly coincide.

  Between duplicates a direction means nothing: the floor of 0.01 keeps its gradient bounded.
  """
  edge = nodes[:, None] - nodes[near]
  return edge * jax.lax.rsqrt(jnp.maximum(jnp.square(edge).sum(axis=-1, keepdims=True), 1e-4))


def local_affinity(a: jax.Array, b: jax.Array, matches: int) -> jax.Array:
  """How well the dense features of each image of a [N, P, M] find one in each of b [N, P, M], unit vectors: [N, N].

  The mean cosine of the `matches` places that find the nearest one (all P where there are fewer), and of both ways.
  """

  @jax.checkpoint  # [N, N, P, P] cosines are made again in the backward pass
  def compare(a, b):
    cosine = dot('ipm,aqm->iapq', a, b)
    best = lambda found: jax.lax.top_k(found, min(matches, found.shape[-1]))[0].mean(axis=-1)
    return 0.5 * (best(cosine.max(axis=3)) + best(cosine.max(axis=2)))

  return compare(a, b)


def pooled_places(features: Features, per_channel: bool, most: int = PLACES) -> jax.Array:
  """Dense features [B, P, D] float32, P <= `most`: means over blocks of the grid and over channels that are there.

  Blocks are the smallest that will do. A place without any channel is 0.
  """
  x = features.patches.astype(jnp.float32)
  grid = features.grid or x.shape[1:2]
  channels, grid = (grid[0], grid[1:]) if per_channel else (1, grid)
  block = next(k for k in itertools.count(1) if math.prod(-(-n // k) for n in grid) <= most)
  coarse = [-(-n // block) for n in grid]
  place = np.ravel_multi_index(tuple(np.indices(grid).reshape(len(grid), -1) // block), coarse)
  inside = np.eye(math.prod(coarse), dtype=np.float32)[np.tile(place, channels)]  # [tokens, P]
  valid = jnp.ones(x.shape[:2], bool) if features.valid is None else features.valid
  total = dot('bnd,np->bpd', jnp.where(valid[..., None], x, 0), inside)
  return total / jnp.maximum(dot('bn,np->bp', valid.astype(jnp.float32), inside), 1)[..., None]


def in_groups(x: jax.Array, most: int) -> jax.Array:
  """Cuts [B, ...] in its order into the fewest groups of equal size of at most `most`: [G, N, ...].

  Where B does not divide, neighbouring groups share samples, so that all have the same size and none is left out.
  """
  count = x.shape[0]
  groups = -(-count // most)
  size = -(-count // groups)
  if groups * size == count and groups % jax.device_count() == 0:
    return x.reshape(groups, size, *x.shape[1:])  # a batch cut over devices stays where it is
  # Taking rows by index gathers them to every device. Otherwise a graph could lie across devices, and each step of the
  # solver's loops would wait for the others.
  start = np.linspace(0, count - size, groups).round().astype(int)
  return x[start[:, None] + np.arange(size)]
