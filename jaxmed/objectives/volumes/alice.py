"""Alice: views of the same anatomy in two people, of which the student learns what a teacher says (Jiang et al. 2023).

Anatomical invariance modeling and semantic alignment for self-supervised learning in 3D medical image analysis, ICCV
2023, arXiv 2302.05615.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from jaxmed.augment import geometry
from jaxmed.augment.masks import scattered_masks
from jaxmed.contracts import Batch, Variables, Views
from jaxmed.errors import UserError
from jaxmed.models.decoders.casa import CASA, TokenDecoder
from jaxmed.models.decoders.heads import DINOHead
from jaxmed.models.layers.norm import normalize
from jaxmed.models.layers.tokens import Features, grid_of, unpatchify, without_missing
from jaxmed.objectives import networks
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.distillation.self_distillation import (
  SelfDistillation,
  centred,
  cross_entropy,
  cross_view,
  entropy,
  update_centre,
)
from jaxmed.objectives.losses.matching import dot
from jaxmed.objectives.losses.ncc import mean_of
from jaxmed.objectives.networks import views, with_stats

MATCHER = 'matcher'  # the tower whose tokens say which places are the same anatomy
AVERAGED = ('encoder', 'decoder', 'head', 'patch_head')  # what the teacher has its own of


@dataclasses.dataclass(frozen=True)
class Alice(SelfDistillation):
  """Two crops of each pair of records, one around a place in a record, one around its match in the next of the batch.

  Images are whole records, or large parts. Places are tokens of a frozen encoder, the tower `matcher` (a run in
  `towers.matcher.init`), or without one of the teacher itself, which matches better as it learns. Of `tries` random
  places on the first record's foreground the first counts whose token's greatest cosine to those of the second exceeds
  `threshold`; where none does, the best of them is a fall-back, and counted. The student sees crops with hidden
  columns, the teacher, its moving average, whole ones. Losses:
    class: the teacher's distribution of a crop against the student's of its match, over prototypes of mean tokens.
    patch: the same of each token of one crop after CASA, where the student's tokens look at the tokens decoded by the
      student, and at those by the teacher.
    reconstruction: half the mean squared error of the whole crop, hidden or not.
  Definition: alibaba-damo-academy/alice, engine_pretrain.py, loss.py, CASA/CASA_Module.py, models/head.py.

  Differs: places are tokens of our own encoders (there voxels, by the mean of two maps of SAM v2 at a stride of 2 mm);
  the best fall-back (there the last); a crop that meets a border moves as its match does; records of one batch (there
  of two steps); masks are each crop's own (there one for a batch); a transformer decodes tokens of any encoder (there
  nnFormer), and an MLP for tokens of its own (there one with that of class vectors, but for the last layer); the
  teacher drops no path; class and patch distributions have one temperature, as there. The published head does not run.

  Attributes:
    crop_size: of the crops, one number or one for each axis; () for half of each side, in whole patches.
    tries, threshold: see above. Cosines depend on the matcher; 0.7 is of SAM v2.
    mask_ratio: share of the columns of a crop that is hidden (their pixels are 0), rounded up. mask_parts: columns
      along each axis, or along the last two: by default none differs along the first, so that a hidden place cannot be
      copied from the slices next to it.
    class_weight, patch_weight, reconstruct_weight: of the losses; 10 is of images in 0 .. 1.
    centre_momentum: of the averages of the teacher's logits, of class vectors and of tokens after CASA.
    decoder_dim, decoder_depth, decoder_heads: of the token decoder. casa_heads, casa_hidden, casa_dropout: of CASA.
    norm_last_layer: whether the prototypes keep length 1.
  The other options are those of SelfDistillation; `out_dim` is of both heads.
  """

  crop_size: tuple[int, ...] = ()
  tries: int = 100
  threshold: float = 0.7
  mask_ratio: float = 0.75
  mask_parts: tuple[int, ...] = (4, 4)
  class_weight: float = 1.0
  patch_weight: float = 1.0
  reconstruct_weight: float = 10.0
  centre_momentum: float = 0.9
  decoder_dim: int = 384
  decoder_depth: int = 2
  decoder_heads: int = 6
  casa_heads: int = 8
  casa_hidden: int = 2048
  casa_dropout: float = 0.1
  norm_last_layer: bool = True
  out_dim: int = 512
  start_temperature: float = 0.008
  teacher_temperature: float = 0.01
  start_momentum: float = 0.996
  towers: FrozenDict = FrozenDict()

  LEARNING_RATE: ClassVar = (1e-4, 16)  # --min_lr 1e-4, above what the README's --lr 5e-5 gives; 8 devices of a pair
  FEATURE: ClassVar[str] = 'mean'
  TOWERS: ClassVar[tuple[str, ...]] = ('image', MATCHER)
  OPTIONAL: ClassVar[tuple[str, ...]] = (MATCHER,)
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'towers': {MATCHER: {'fixed': True}},
      'optimizer': {'weight_decay': 0.04, 'final_weight_decay': 0.4, 'clip': 3.0, 'clip_scope': 'tensor'},
      'augment': {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.0,)},
  }

  def __post_init__(self):
    super().__post_init__()
    rank = len(self.encoder.image_size)
    if not 0 < self.mask_ratio < 1 or not -1 <= self.threshold <= 1 or not 0 <= self.casa_dropout < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1, threshold {self.threshold} in '
                      f'-1 .. 1, casa_dropout {self.casa_dropout} in [0, 1)')
    if self.tries < 1 or min(self.class_weight, self.patch_weight, self.reconstruct_weight) < 0:
      raise UserError(f'objective.tries {self.tries} must be at least 1, and no weight of a loss negative')
    if len(self.mask_parts) not in (2, rank) or min(self.mask_parts) < 1 or math.prod(self.mask_parts) < 2:
      raise UserError(f'objective.mask_parts {self.mask_parts} must be two positive numbers, or {rank}, and two parts')
    if self.decoder_dim % self.decoder_heads:
      raise UserError(f'objective.decoder_heads {self.decoder_heads} does not divide decoder_dim {self.decoder_dim}')
    crop, patch = self.crop, self.encoder.patch_size
    if len(crop) != rank or any(n < p or n % p or n > whole for n, p, whole in
                                zip(crop, patch, self.encoder.image_size, strict=False)):
      raise UserError(f'objective.crop_size {self.crop_size} must be whole patches of {patch} within images of '
                      f'{tuple(self.encoder.image_size)}')
    matcher = self.towers.get(MATCHER)
    if matcher is not None and (len(matcher.image_size), matcher.in_channels) != (rank, self.encoder.in_channels):
      raise UserError(f'towers.{MATCHER}.init has {matcher.in_channels} channels and {len(matcher.image_size)} axes: '
                      f'expected {self.encoder.in_channels} and {rank}, as of this run')

  @property
  def crop(self) -> tuple[int, ...]:
    """Pixels of a crop along each axis."""
    size, patch = self.encoder.image_size, self.encoder.patch_size
    if self.crop_size:
      return self.crop_size * len(size) if len(self.crop_size) == 1 else self.crop_size
    return tuple(max(n // 2 // p, 1) * p for n, p in zip(size, patch, strict=True))

  @property
  def heads(self) -> dict[str, DINOHead]:
    """Heads of class vectors and of tokens."""
    last = 'fixed_norm' if self.norm_last_layer else 'weight_norm'
    return {'head': self.head(last=last), 'patch_head': self.head(last=last)}

  @property
  def decoder(self) -> TokenDecoder:
    """Tokens to decoded tokens and pixels."""
    pixels = math.prod(self.encoder.patch_size) * (1 if self.encoder.per_channel else self.encoder.in_channels)
    return TokenDecoder(pixels, self.decoder_dim, self.decoder_depth, self.decoder_heads, self.encoder.dtype)

  @property
  def casa(self) -> CASA:
    """The alignment, which both networks share."""
    return CASA(self.casa_heads, self.casa_hidden, self.casa_dropout, self.encoder.dtype)

  def extra(self, params: dict) -> dict:
    """Centres [K] of class vectors and of aligned tokens."""
    return super().extra(params) | {'patch_centre': jnp.zeros(self.count)}

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch; the teacher starts as the student."""
    keys, width = jax.random.split(rng, 5), self.encoder.embed_dim
    part = (slice(None), *(slice(0, n) for n in self.crop))
    cropped: Any = {k: v for k, v in networks.inputs(batch).items() if k != 'sizes'}
    params = {'encoder': self.encoder.init(keys[0], **cropped | {'image': batch['image'][part]})['params'],
              'decoder': self.decoder.init(keys[1], jnp.zeros((1, 2, width)))['params'],
              'casa': self.casa.init(keys[2], *[jnp.zeros((1, 2, self.count))] * 2)['params']}
    for key, (name, head) in zip(keys[3:], self.heads.items(), strict=True):
      params[name] = head.init(key, jnp.zeros((1, width)))['params']
    return {'params': params, 'target': jax.tree.map(jnp.copy, {name: params[name] for name in AVERAGED}),
            'extra': self.extra(params)}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Weighted sum of the three losses over the global batch."""
    if len(batch['image']) < 2:
      raise UserError('method alice pairs each record with the next one of the batch: batch_size must be at least 2')
    params, target, extra = variables['params'], variables['target'], variables['extra']
    match_key, mask_key, drop_key, casa_key, more_key = jax.random.split(rng, 5)
    group, found = self.matched_views(variables, batch, match_key)
    whole: Any = networks.flat(group)  # [2B, *crop, C]
    hidden = self.masks(mask_key, len(whole['image']))[..., None]
    student, stats = networks.run(self.encoder, params['encoder'], **whole | {
        'image': jnp.where(hidden, 0, whole['image'])}, train=train, rngs={'dropout': drop_key})
    teacher = self.teacher_features(target['encoder'], group, train)
    teacher_logits = self.project('head', target, teacher.pooled('mean'))
    probs = views(centred(teacher_logits, extra['centre'], self.temperature(step)), 2)  # [B, 2, K]
    dino = cross_view(views(self.project('head', params, student.pooled('mean')), 2), probs, self.student_temperature)
    query = self.project('patch_head', params, student.patches)  # [2B, N, K]
    decoded, pixels = self.decoded(params, student)
    aligned = self.aligned(params, query, decoded, student, train, casa_key)
    taught = jax.lax.stop_gradient(self.aligned(params, query, self.decoded(target, teacher)[0], teacher, train,
                                                more_key))
    patch_probs = centred(taught, extra['patch_centre'], self.temperature(step))
    exist = jnp.ones(aligned.shape[:2], bool) if student.valid is None else student.valid
    patch = (jnp.where(exist, cross_entropy(aligned, patch_probs, self.student_temperature), 0).sum()
             / jnp.maximum(exist.sum(), 1))
    if self.encoder.per_channel:
      pixels = pixels.reshape(len(pixels), whole['image'].shape[-1], -1, pixels.shape[-1])
    restored = unpatchify(pixels, self.crop, self.encoder.patch_size, self.encoder.per_channel)
    reconstruction = mean_of(jnp.square(restored - whole['image']), decoding.there(whole)).mean() / 2
    loss = self.class_weight * dino + self.patch_weight * patch + self.reconstruct_weight * reconstruction
    used = entropy(jnp.where(exist[..., None], patch_probs, 0).sum(axis=(0, 1)) / jnp.maximum(exist.sum(), 1))
    metrics = self.report(step, dino, probs) | found | {
        'patch_loss': patch, 'reconstruction': reconstruction, 'patch_entropy_share': used / math.log(self.count)}
    if train:
      metrics = with_stats(metrics, train, encoder=stats)
      extra = {'centre': update_centre(extra['centre'], teacher_logits, self.centre_momentum),
               'patch_centre': update_centre(extra['patch_centre'], taught, self.centre_momentum, exist)}
    return loss, (metrics, extra)

  def decoded(self, params: Any, features: Features) -> tuple[jax.Array, jax.Array]:
    """Logits [B, N, K] of decoded tokens, and pixels [B, N, P]."""
    tokens, pixels = self.decoder.apply({'params': params['decoder']}, features.patches, features.valid)
    return self.project('patch_head', params, tokens), pixels

  def aligned(self, params: Any, query: jax.Array, context: jax.Array, features: Features, train: bool,
              rng: jax.Array) -> jax.Array:
    """CASA of a student's tokens [B, N, K] and decoded ones [B, N, K], of which `features` say which exist."""
    return self.casa.apply({'params': params['casa']}, query, context, features.valid, train, rngs={'dropout': rng})

  def masks(self, rng: jax.Array, count: int) -> jax.Array:
    """Pixels of crops that are hidden from the student, [count, *crop] bool."""
    parts = (1,) * (len(self.crop) - len(self.mask_parts)) + self.mask_parts
    most = math.ceil(math.prod(parts) * self.mask_ratio)
    hidden = scattered_masks(rng, jnp.full(count, most), math.prod(parts)).reshape(count, *parts)
    for axis, (n, k) in enumerate(zip(self.crop, parts, strict=True), 1):
      hidden = jnp.take(hidden, np.arange(n) * k // n, axis=axis)
    return hidden

  def matched_views(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[Views, dict[str, jax.Array]]:
    """(Two crops [B, 2, *crop, C] of each record and the next one, what is told of the matches)."""
    match_key, shift_key = jax.random.split(rng)
    known: Any = networks.inputs(batch)
    size, patch = jnp.asarray(batch['image'].shape[1:-1]), jnp.asarray(self.encoder.patch_size)
    own = networks.own_sizes(batch)
    within = geometry.filled(own, batch['image'].shape[1:-1])[..., None]
    image = jnp.where(within, without_missing(batch['image'].astype(jnp.float32), batch.get('channel_mask')), 0)
    known |= {'image': image}
    tokens, valid, grid = self.places(variables, known)  # [B, N, D], [B, N]
    following = lambda x: jnp.roll(x, -1, axis=0)
    ground = valid & _foreground(image, within, grid)
    first, second, score, passed = match(match_key, tokens, following(tokens), jnp.where(
        ground.any(axis=1, keepdims=True), ground, valid), following(valid), self.tries, self.threshold)
    cells = lambda index: jnp.stack(jnp.unravel_index(index, grid), axis=-1)  # [B, rank]
    unit = size // jnp.asarray(grid)
    room = jnp.maximum(own - jnp.asarray(self.crop), 0)
    loose = jax.random.randint(shift_key, own.shape, 0, unit)
    apart = (cells(second) - cells(first)) * unit
    least, most = jnp.maximum(-apart, 0), jnp.minimum(following(room) - apart, room)  # where both lie within
    start = jnp.clip(cells(first) * unit + loose - jnp.asarray(self.crop) // 2, least, jnp.maximum(most, least))
    start = jnp.clip(start, 0, room)
    cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (*self.crop, x.shape[-1])))
    starts = start, jnp.clip(start + apart, 0, following(room))
    both = lambda a, b: jnp.stack([a, b], axis=1)
    group: Any = {k: both(known[k], following(known[k])) for k in ('channels', 'channel_mask') if k in known}
    group['image'] = both(cut(image, starts[0]), cut(following(image), starts[1]))
    if 'sizes' in batch:
      group['sizes'] = jnp.minimum(both(own, following(own)) - both(*starts), jnp.asarray(self.crop)) // patch * patch
    told = {'match_score': score.mean(), 'fallbacks': (~passed).sum(),
            'match_distance': jnp.abs(apart / unit).sum(axis=-1).mean()}
    return group, told

  def places(self, variables: Variables, known: Any) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """Tokens [B, N, D] of whole images by the matcher, which exist [B, N], and their grid; without gradient."""
    if MATCHER in self.towers and MATCHER not in (variables.get('fixed') or {}):
      raise UserError(f'towers.{MATCHER}.fixed must be True: the matcher is only read')
    own = MATCHER not in self.towers
    encoder = networks.quiet(self.encoder) if own else self.towers[MATCHER]
    params = variables['target']['encoder'] if own else variables['fixed'][MATCHER]
    features, _ = networks.run(encoder, jax.lax.stop_gradient(params), **known)
    x, grid = features.patches, grid_of(known['image'].shape[1:-1], tuple(encoder.patch_size))
    x = x.reshape(len(x), -1, math.prod(grid), x.shape[-1]).astype(jnp.float32)  # [B, C or 1, N, D]
    exist = jnp.ones(x.shape[:3], bool) if features.valid is None else features.valid.reshape(x.shape[:3])
    count = exist.sum(axis=1)
    mean = jnp.where(exist[..., None], x, 0).sum(axis=1) / jnp.maximum(count, 1)[..., None]
    return jax.lax.stop_gradient(mean), count > 0, grid


def match(rng: jax.Array, a: jax.Array, b: jax.Array, eligible: jax.Array, valid: jax.Array, tries: int,
          threshold: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """A place of each first image, the most alike one of the second, their cosine, whether it passes: [B] each.

  Args:
    a, b: tokens [B, N, D] and [B, M, D]. eligible: [B, N] bool, places to draw from. valid: [B, M] bool.
    tries: places that are drawn. The first whose best cosine exceeds `threshold` counts, or the best of all.
  """
  logits = jnp.where(eligible, 0.0, -jnp.inf)
  drawn = jax.random.categorical(rng, logits[:, None], shape=(len(a), tries))  # [B, T]
  query = jnp.take_along_axis(normalize(a), drawn[..., None], axis=1)
  cosine = jnp.where(valid[:, None], dot('btd,bnd->btn', query, normalize(b)), -jnp.inf)
  score, place = cosine.max(axis=-1), cosine.argmax(axis=-1)
  passed = score > threshold
  which = jnp.where(passed.any(axis=1), passed.argmax(axis=1), score.argmax(axis=1))[:, None]
  pick = lambda x: jnp.take_along_axis(x, which, axis=1)[:, 0]
  return pick(drawn), pick(place), pick(score), pick(passed)


def _foreground(image: jax.Array, within: jax.Array, grid: tuple[int, ...]) -> jax.Array:
  """Cells [B, prod(grid)] half of whose pixels are above the least value of images [B, *size, C] in some channel."""
  axes = tuple(range(1, image.ndim - 1))
  low = jnp.min(image, axis=axes, keepdims=True, where=within, initial=jnp.inf)
  above = ((image > low) & within).any(axis=-1)
  split = [n for size, g in zip(above.shape[1:], grid, strict=True) for n in (g, size // g)]
  share = above.reshape(len(above), *split).mean(axis=tuple(range(2, 2 * len(grid) + 1, 2)))
  return share.reshape(len(above), -1) >= 0.5
