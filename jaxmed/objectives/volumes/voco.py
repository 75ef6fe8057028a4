"""VoCo: says where a crop lies in a volume by its likeness to crops that tile it (Wu et al. 2024, arXiv 2402.17300)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.augment import geometry
from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses import overlap
from jaxmed.objectives.networks import Clock, with_stats

TEACHERS = ('head', 'whole')
DROPS = ('features', 'samples')


@dataclasses.dataclass(frozen=True)
class VoCo(Method):
  """Likeness of crops at random places to the bases, crops that tile the record, against the share that overlaps.

  The first views of a record are its bases (`augment.tiles`), the others slide. Likeness is max(0, cosine) of
  projected vectors, and `losses.overlap.position` compares it with the overlap. The likeness to the bases of another
  record, the next one of the batch, should be what the teacher says, and bases should differ from each other. Defaults
  are those of the second release (Luffy03/Large-Scale-Medical, Self-supervised/models/voco_head.py); the recipe
  experiments/voco.py has the first one's. There the loss is not that of the papers, which is over all bases at once.

  Differs: the teacher starts as a copy (there as other weights, which 0.9 forgets in some tens of steps); batch norm of
  the projector is over all devices' crops, and in evaluation of running statistics; the encoder's own vector in place
  of pooled maps of all stages through four residual blocks; crops of nothing but one value, as of air, count in no
  pair of the last term, where they cannot differ.

  Attributes:
    momentum_rate: share of the teacher that stays after a step.
    teacher: 'head', an average of the projector alone, on the student's vectors, or 'whole' (first release).
    both_ways: predictions are the mean of student to teacher and teacher to student (first release).
    negative: 'log' or 'square' (first release), see `losses.overlap.position`.
    inter_weight, base_weight: of the terms of the other record and of the bases' likeness; the first release has no
      other record.
    dropout: of the student's vectors before the projector.
    dropout_of: 'features', or 'samples', whole vectors, as the release drops by a 1D dropout of a matrix.
    hidden_dim, out_dim: of the projector.
    feature: 'cls' or 'mean', what the projector reads.
    bases: number of the first views that are bases; the run fills it in.
  """

  encoder: Encoder
  momentum_rate: float = 0.9
  teacher: str = 'head'
  both_ways: bool = False
  negative: str = 'log'
  inter_weight: float = 1.0
  base_weight: float = 1.0
  dropout: float = 0.2
  dropout_of: str = 'features'
  hidden_dim: int = 1024
  out_dim: int = 1024
  feature: str = 'mean'
  bases: int = 1
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (1e-4, 16)  # voco_train.py: --lr 1e-4; dist_B.sh: 8 devices of 2 volumes
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'optimizer': {'weight_decay': 0.01},
      'augment': {'tiles': (3,), 'views': 11, 'scale': (1.0, 1.0), 'flip': (0.2,), 'brightness': 0.1,
                  'jitter_probability': (0.5,)},
  }

  def __post_init__(self):
    siamese.check(self.feature, hidden_dim=self.hidden_dim, out_dim=self.out_dim)
    choose('objective.teacher', self.teacher, TEACHERS)
    choose('objective.negative', self.negative, overlap.NEGATIVES)
    choose('objective.dropout_of', self.dropout_of, DROPS)
    for name in ('momentum_rate', 'dropout'):
      if not 0 <= vars(self)[name] < 1:
        raise UserError(f'objective.{name} {vars(self)[name]} must lie in [0, 1)')

  @property
  def projector(self) -> MLPHead:
    """Features to the vectors that are compared; hidden norms without scale and bias."""
    return MLPHead((self.hidden_dim, self.hidden_dim, self.out_dim), affine=False, use_bias=True)

  @property
  def averaged(self) -> tuple[str, ...]:
    """Parts of the parameters that the teacher has its own of."""
    return ('projector',) if self.teacher == 'head' else ('encoder', 'projector')

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    variables = siamese.init_with_projector(self.encoder, self.projector, rng, batch)
    return variables | {'target': {name: jax.tree.map(jnp.copy, variables['params'][name]) for name in self.averaged}}

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the teacher that stays: constant."""
    del step
    return jnp.asarray(self.momentum_rate)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean over the records of the batch of position, agreement with the teacher on another record, and likeness."""
    del step
    group, params = batch['global'], variables['params']
    if self.inter_weight and len(group['image']) < 2:
      raise UserError('method voco compares records: batch_size must be at least 2, or objective.inter_weight 0')
    x, stats = siamese.encode(self.encoder, params['encoder'], group, rng, train, self.feature)  # [B, V, D]
    student, head_stats = siamese.head_over_all_views(self.projector, params['projector'],
                                                      self._dropped(rng, x, train), train)
    teacher = self._teacher(variables, group, x, rng, train)
    boxes, n = group['view_box'], self.bases
    wanted = overlap.shares(boxes[:, n:], boxes[:, :n])  # [B, Q, K]
    predicted = overlap.likeness(student[:, n:], teacher[:, :n])
    if self.both_ways:
      predicted = (predicted + overlap.likeness(teacher[:, n:], student[:, :n])) / 2
    near, far = overlap.position(predicted, wanted, self.negative)
    filled = _varied(group)[:, :n]
    alike = overlap.alike(student[:, :n], filled)
    inter = self._inter(student, teacher) if self.inter_weight else jnp.zeros_like(near)
    loss = (near + far + self.inter_weight * inter + self.base_weight * alike).mean()
    metrics = {'position_near': near.mean(), 'position_far': far.mean(), 'inter': inter.mean(),
               'base_likeness': alike.mean(), 'position_error': jnp.abs(predicted - wanted).mean(),
               'empty_crops': 1 - filled.astype(jnp.float32).mean()}
    return loss, (with_stats(metrics, train, encoder=stats, projector=head_stats), variables['extra'])

  def _dropped(self, rng: jax.Array, x: jax.Array, train: bool) -> jax.Array:
    """x [B, V, D] with some features, or whole vectors, zeroed and the others enlarged."""
    if not train or not self.dropout:
      return x
    shape = x.shape if self.dropout_of == 'features' else (*x.shape[:2], 1)
    kept = jax.random.bernoulli(jax.random.fold_in(rng, 1), 1 - self.dropout, shape)
    return jnp.where(kept, x / (1 - self.dropout), 0)

  def _teacher(self, variables: Variables, group: Any, x: jax.Array, rng: jax.Array, train: bool) -> jax.Array:
    """The teacher's projected vectors [B, V, out_dim], without gradient."""
    target = variables['target']
    if self.teacher == 'whole':
      quiet, seen = networks.quiet(self.encoder), networks.seen_by_teacher(group)
      x, _ = siamese.encode(quiet, target['encoder'], seen, rng, train, self.feature)
    return jax.lax.stop_gradient(siamese.head_over_all_views(self.projector, target['projector'], x, train)[0])

  def _inter(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Loss [B] of the likeness of a record's crops to the bases of the next record, wanted as the teacher has it."""
    n, following = self.bases, lambda z: jnp.roll(z[:, :self.bases], -1, axis=0)
    wanted = overlap.likeness(teacher[:, n:], following(teacher))
    near, far = overlap.position(overlap.likeness(student[:, n:], following(student)), wanted, self.negative)
    return near + far


def _varied(group: Any) -> jax.Array:
  """Views [B, V] bool whose pixels are not all one value, in any channel that is there."""
  image, places = group['image'], tuple(range(2, group['image'].ndim - 1))
  if 'sizes' in group:  # what lies beyond an image is as its first pixel
    size, own = image.shape[2:-1], group['sizes'].reshape(-1, len(places))
    within = geometry.filled(own, size).reshape(*image.shape[:2], *size, 1)
    image = jnp.where(within, image, image[(slice(None),) * 2 + (slice(0, 1),) * len(places)])
  varied = image.max(axis=places) > image.min(axis=places)  # [B, V, C]
  return (varied if 'channel_mask' not in group else varied & group['channel_mask']).any(axis=-1)
