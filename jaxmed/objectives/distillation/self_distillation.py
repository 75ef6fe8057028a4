"""Self-distillation: what DINO, iBOT, DINOv2 and DINOv3 share. A student learns a teacher's softmax over prototypes.

The teacher is the moving average of the student and sees the global crops; the student sees global and local ones.
Every function works on the global batch, in float32; K is the number of prototypes.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables, Views
from jaxmed.errors import UserError, choose
from jaxmed.models.decoders.heads import DINOHead
from jaxmed.models.layers.positions import resample
from jaxmed.models.layers.tokens import Features, grid_of
from jaxmed.objectives.base import Method
from jaxmed.objectives.networks import Clock, cosine, flat, on_own_grids, own_grids, quiet, ramp, run, views

# Prototypes by the number of training images: lightly-train, _methods/dino/dino.py.
PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
KOLEO_EPSILON = 1e-8
DUPLICATE = 1e-6  # distance of unit vectors below which rounding in float32 makes up most of it
MASK_CHANNELS = ('shared', 'independent')


def prototypes(rows: int) -> int:
  """How many prototypes suit so many training images; 65536, the published number, where the count is not known."""
  return next((count for limit, count in PROTOTYPES if 0 < rows < limit), 65536)


def by_rows(rows: int, small: float, large: float) -> float:
  """A value that suits so many training images: linear from 20,000 to 1,000,000; `large`, the published one, for 0."""
  share = (rows - 20_000) / (1_000_000 - 20_000) if rows else 1.0
  return small + (large - small) * min(max(share, 0.0), 1.0)


def centred(logits: jax.Array, centre: jax.Array | float, temperature: float | jax.Array) -> jax.Array:
  """The teacher's distributions softmax((logits - centre) / temperature) [..., K], without gradient."""
  return jax.lax.stop_gradient(jax.nn.softmax((logits.astype(jnp.float32) - centre) / temperature, axis=-1))


def update_centre(centre: jax.Array, logits: jax.Array, momentum: float, weights: jax.Array | None = None) -> jax.Array:
  """Moving average [K] of the mean of logits [..., K] over everything before the last axis, without gradient.

  weights: [...] the share of each row in the mean; None for equal ones. Without any row the centre stays.
  """
  rows = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
  weight = jnp.ones(rows.shape[0]) if weights is None else weights.astype(jnp.float32).reshape(-1)
  total = weight.sum()
  mean = (rows * weight[:, None]).sum(axis=0) / jnp.maximum(total, 1e-9)
  fresh = momentum * centre + (1 - momentum) * mean
  return jax.lax.stop_gradient(jnp.where(total > 0, fresh, centre))


def cross_entropy(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """-sum_k teacher_k log softmax(student / temperature)_k, [...] for student logits and teacher distributions."""
  return -(teacher * jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)).sum(axis=-1)


def cross_view(student: jax.Array, teacher: jax.Array, temperature: float,
               local_weight: float | jax.Array = 1.0) -> jax.Array:
  """Cross-entropy between the teacher's view t and the student's view s, mean over samples and pairs with s != t.

  Args:
    student: logits [B, S, K]; the first V views are those of the teacher, in its order.
    teacher: distributions [B, V, K].
    local_weight: factor on the pairs whose student view is not one of the teacher's (DINOv3's local loss weight).
  """
  _, views_t, _ = teacher.shape
  views_s = student.shape[1]
  log = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
  pairs = -jnp.einsum('bsk,btk->st', log, teacher, precision='highest') / student.shape[0]  # [S, V]
  same = jnp.arange(views_s)[:, None] == jnp.arange(views_t)
  weight = jnp.where(jnp.arange(views_s) < views_t, 1.0, local_weight)[:, None]
  return jnp.where(same, 0.0, pairs * weight).sum() / max(views_s * views_t - min(views_s, views_t), 1)


def entropy(distribution: jax.Array) -> jax.Array:
  """Mean entropy in nats of distributions [..., K]."""
  return -jax.scipy.special.xlogy(distribution, distribution).sum(axis=-1).mean()


def koleo(x: jax.Array, group: int = 0) -> jax.Array:
  """Kozachenko-Leonenko estimate of how little x [B, D] spreads on the sphere (Sablayrolles et al. 2019).

  -mean log(|x_i - x_nearest + 1e-8| + 1e-8) of the L2-normalised rows (facebookresearch/dinov2, loss/koleo_loss.py).
  Duplicates keep that value, but pass no gradient: theirs has a chance direction and a size of up to 1e8. A single row
  has no neighbour: 0.

  Args:
    group: rows among which neighbours are sought, one group after the other; 0 for all. The official code takes
      those of one device.
  """
  size = group or x.shape[0]
  if x.shape[0] % size:
    raise UserError(f'objective.koleo_group {size} does not divide the batch of {x.shape[0]}')
  if size < 2:
    return jnp.zeros(())
  x = x.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), KOLEO_EPSILON**2))
  x = x.reshape(-1, size, x.shape[-1])  # [G, size, D]
  fixed = jax.lax.stop_gradient(x)
  dots = jnp.einsum('gid,gjd->gij', fixed, fixed, precision='highest') - 3.0 * jnp.eye(size)  # no one's own neighbour
  nearest = jnp.take_along_axis(x, dots.argmax(axis=-1)[..., None], axis=1)
  apart = x - nearest
  same = jnp.square(jax.lax.stop_gradient(apart)).sum(axis=-1) < DUPLICATE**2
  squared = jnp.square(apart + KOLEO_EPSILON).sum(axis=-1)
  squared = jnp.where(same, jax.lax.stop_gradient(squared), squared)
  return -jnp.log(jnp.sqrt(squared) + KOLEO_EPSILON).mean()


def chosen(mask: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
  """The marked tokens of each crop as a fixed number of places: index [B, bound], and whether each is a marked one.

  mask: [B, N] bool with at most `bound` marks a row; the places that are left over point to other tokens.
  """
  index = jnp.argsort(~mask, axis=1, stable=True)[:, :bound]
  return index, jnp.take_along_axis(mask, index, axis=1)


def patch_loss(student: jax.Array, teacher: jax.Array, marked: jax.Array, temperature: float) -> jax.Array:
  """iBOT's loss: cross-entropy at the masked tokens, mean over the tokens of a crop, then over all crops.

  A crop without marked tokens counts as 0 in the second mean, as in bytedance/ibot, main_ibot.py:iBOTLoss, and
  facebookresearch/dinov2, loss/ibot_patch_loss.py.

  Args:
    student: logits [B, M, K]. teacher: distributions [B, M, K]. marked: [B, M] bool.
  """
  each = jnp.where(marked, cross_entropy(student, teacher, temperature), 0.0)
  return (each.sum(axis=1) / jnp.maximum(marked.sum(axis=1), 1)).mean()


def gram_loss(student: jax.Array, teacher: jax.Array, valid: jax.Array | None = None) -> jax.Array:
  """Mean squared difference of the cosine similarities between a crop's patches [B, N, D], over all crops.

  facebookresearch/dinov3, loss/gram_loss.py, at the level of images and with negative similarities kept. Pairs with a
  token that is not `valid` [B, N] do not count.
  """
  unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
  similarity = lambda x: jnp.einsum('bnd,bmd->bnm', x, x, precision='highest')
  error = jnp.square(similarity(unit(student.astype(jnp.float32)))
                     - jax.lax.stop_gradient(similarity(unit(teacher.astype(jnp.float32)))))
  if valid is None:
    return error.mean()
  pair = valid[:, :, None] & valid[:, None, :]
  return jnp.where(pair, error, 0.0).sum() / jnp.maximum(pair.sum(), 1)


def resized(patches: jax.Array, old: tuple[int, ...], new: tuple[int, ...]) -> jax.Array:
  """Patch tokens [B, prod(old), D] on another grid by plain bicubic interpolation; a first axis of channels stays."""
  if old == new:
    return patches
  if len(old) != len(new):
    raise ValueError(f'grids {old} and {new} differ in rank')
  return jax.vmap(lambda x: resample(x, old, new, 'plain'))(patches.astype(jnp.float32))


def both_valid(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
  """Tokens [B, N] that are there for both; None when all are."""
  return b if a is None else a if b is None else a & b


@dataclasses.dataclass(frozen=True)
class SelfDistillation(Method):
  """The networks and schedules of a student and its teacher; the methods add their losses.

  Attributes:
    rows: training images, from which `out_dim` follows. Filled in by the run like `clock`; no options.
    out_dim: prototypes; 0 chooses 1024 (below 20,000 images) .. 65536 (from 500,000).
    hidden_dim, bottleneck_dim: of the projection head.
    student_temperature: of the student's softmax.
    start_temperature, teacher_temperature: of the teacher's, linear from the one to the other in
      `temperature_epochs` epochs, at most 30 % of the run, and constant then. A teacher_temperature of 0 is chosen from
      the number of images, 0.02 (up to 20,000) to 0.07 (from a million), and bounds the start.
    freeze_epochs: epochs, at most 10 % of the run, in which the heads' last layers keep their initial values.
    start_momentum, final_momentum: of the teacher's moving average, by a cosine over the run; equal for a constant. A
      start of 0 is chosen likewise, 0.99 to 0.996.

  The rules by number of images are lightly-train's (_methods/dino/dino.py).
  """

  encoder: Encoder
  clock: Clock = Clock()
  rows: int = 0
  out_dim: int = 0
  hidden_dim: int = 2048
  bottleneck_dim: int = 256
  student_temperature: float = 0.1
  start_temperature: float = 0.04
  teacher_temperature: float = 0.0
  temperature_epochs: float = 30.0
  freeze_epochs: float = 1.0
  start_momentum: float = 0.0
  final_momentum: float = 1.0

  FEATURE: ClassVar[str] = 'cls'

  def __post_init__(self):
    for name in ('student_temperature', 'start_temperature', 'teacher_temperature'):
      if not vars(self)[name] > 0 and (name != 'teacher_temperature' or self.teacher_temperature < 0):
        raise UserError(f'objective.{name} {vars(self)[name]} must be positive, for example 0.1')
    for name in ('start_momentum', 'final_momentum'):
      if not 0 <= vars(self)[name] <= 1:
        raise UserError(f'objective.{name} {vars(self)[name]} must lie in 0 .. 1')

  @classmethod
  def shaped_by(cls, rows: int) -> int:
    """The number of prototypes."""
    return prototypes(rows)

  @property
  def heads(self) -> dict[str, DINOHead]:
    """The projection heads by their names in the parameters."""
    raise NotImplementedError

  @property
  def count(self) -> int:
    """Prototypes of the class token's head."""
    return self.out_dim or prototypes(self.rows)

  def head(self, **changes: Any) -> DINOHead:
    """A projection head of the options' sizes."""
    sizes = dict(out_dim=self.count, hidden_dim=self.hidden_dim, bottleneck_dim=self.bottleneck_dim)
    return DINOHead(**(sizes | changes), dtype=self.encoder.dtype)

  def extra(self, params: dict) -> dict:
    """Initial state besides the weights: centres [K]."""
    del params
    return {'centre': jnp.zeros(self.count)}

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views; the teacher starts as the student."""
    keys = jax.random.split(rng, 1 + len(self.heads))
    params = {'encoder': self.encoder.init(keys[0], **flat(batch['global']))['params']}
    for key, (name, head) in zip(keys[1:], self.heads.items(), strict=True):
      params[name] = head.init(key, jnp.zeros((1, self.encoder.embed_dim)))['params']
    return {'params': params, 'target': jax.tree.map(jnp.copy, params), 'extra': self.extra(params)}

  def encoder_params(self, variables: Variables) -> Any:
    """The teacher's weights."""
    return variables['target']['encoder']

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the old teacher that stays after this step."""
    start = self.start_momentum or by_rows(self.rows, 0.99, 0.996)
    return cosine(start, self.final_momentum, step, self.clock.steps)

  def frozen(self, step: jax.Array) -> dict[str, jax.Array]:
    """The heads' last layers stand still at first (facebookresearch/dino, utils.py:cancel_gradients_last_layer)."""
    still = jnp.asarray(step < self.clock.warmup(self.freeze_epochs, share=0.1))
    return {f'{name}/last': still for name in self.heads}

  def temperature(self, step: jax.Array, start: float | None = None, end: float | None = None) -> jax.Array:
    """The teacher's temperature at a step."""
    if end is None:
      end = self.teacher_temperature or by_rows(self.rows, 0.02, 0.07)
    if start is None:
      start = self.start_temperature if self.teacher_temperature else min(self.start_temperature, end)
    return ramp(start, end, step, self.clock.warmup(self.temperature_epochs))

  def student_features(self, params: dict, group: Views, train: bool, rng: jax.Array,
                       **kwargs: Any) -> tuple[Features, Any]:
    """The student's features of all views of a group [B * V, ...], and new running statistics."""
    return run(self.encoder, params['encoder'], **flat(group), train=train, rngs={'dropout': rng}, **kwargs)

  def teacher_features(self, params: Any, group: Views, train: bool) -> Features:
    """Features [B * V, ...] of a teacher with these weights of the encoder, without gradient.

    It drops nothing; batch normalisation takes the statistics of the batch, as in facebookresearch/dino.
    """
    features, _ = run(quiet(self.encoder), jax.lax.stop_gradient(params), **flat(group), train=train)
    return jax.lax.stop_gradient(features)

  def student_crops(self, params: dict, batch: Batch, train: bool, rng: jax.Array,
                    **kwargs: Any) -> tuple[Features, jax.Array, Any]:
    """The student's features of the global crops, class vectors [B, S, D] of all S crops, running statistics.

    The statistics are those of the global crops. kwargs go to the encoder with the global crops. A transformer sees
    both kinds in one pass over its blocks.
    """
    groups, options = [batch['global']], [kwargs]
    if 'local' in batch:
      groups.append(batch['local'])
      options.append({'local': True} if self.encoder.local_norm else {})
    stats: Any = {}
    if self.encoder.supports.one_pass:
      student = self._one_pass(params, groups, options, train, rng)
    else:
      keys = jax.random.split(rng)
      found = [self.student_features(params, g, train, key, **o) for g, key, o in zip(groups, keys, options)]
      student, stats = [features for features, _ in found], found[0][1]
    class_tokens = [views(features.pooled('cls'), group['image'].shape[1])  # [B, V, D]
                    for features, group in zip(student, groups, strict=True)]
    return student[0], jnp.concatenate(class_tokens, axis=1), stats  # [B * V, ...], [B, S, D]

  def _one_pass(self, params: dict, groups: list[Views], options: list[dict], train: bool,
                rng: jax.Array) -> list[Features]:
    """The student's features of each group, in one pass over the blocks."""
    inputs = [flat(group) | more for group, more in zip(groups, options, strict=True)]
    return self.encoder.apply({'params': params['encoder']}, inputs, groups[0]['image'].shape[0], train,
                              method='one_pass', rngs={'dropout': rng})

  def project(self, name: str, params: dict, x: jax.Array) -> jax.Array:
    """Logits [..., K] of vectors [..., D] by the head of that name."""
    return self.heads[name].apply({'params': params[name]}, x)

  def report(self, step: jax.Array, loss: jax.Array, teacher: jax.Array) -> dict[str, Any]:
    """What every method logs of its class token loss and the teacher's distributions [B, V, K]."""
    spread, most = entropy(teacher), math.log(teacher.shape[-1])
    used = entropy(teacher.reshape(-1, teacher.shape[-1]).mean(axis=0))  # of the prototypes over all images
    return {'dino_loss': loss, 'teacher_entropy': spread, 'teacher_entropy_share': spread / most,
            'prototype_entropy_share': used / most, 'teacher_kl': loss - spread,
            'teacher_temperature': self.temperature(step), 'momentum': self.momentum(step)}


@dataclasses.dataclass(frozen=True)
class MaskedDistillation(SelfDistillation):
  """Adds iBOT's task: the student sees global crops with hidden patches and predicts the teacher's distributions there.

  Attributes:
    separate_head: whether patch tokens have a head of their own, with `patch_out_dim` prototypes, `patch_hidden_dim`
      and `patch_bottleneck_dim`, each 0 for that of the class token's head.
    mask_probability: share of the global crops in which patches are hidden.
    mask_ratio: least and greatest share of a crop's patches that is hidden.
    mask_channels: for channel tokens, 'shared' hides the same places in all channels, 'independent' draws them for
      each.
  """

  separate_head: bool = False
  patch_out_dim: int = 0
  patch_hidden_dim: int = 0
  patch_bottleneck_dim: int = 0
  mask_probability: float = 0.5
  mask_ratio: tuple[float, float] = (0.1, 0.5)
  mask_channels: str = 'shared'

  def __post_init__(self):
    super().__post_init__()
    choose('objective.mask_channels', self.mask_channels, MASK_CHANNELS)
    if not self.encoder.mask_token:
      raise UserError('this method hides patches from the encoder: encoder.mask_token must be True')
    if self.encoder.masking != 'token':
      raise UserError("this method predicts hidden patches from the encoder: encoder.masking must be 'token'")
    if len(self.mask_ratio) != 2 or not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must be two shares in order, for example 0.1,0.5')
    if not 0 <= self.mask_probability <= 1:
      raise UserError(f'objective.mask_probability {self.mask_probability} must lie in 0 .. 1')
    if not self.separate_head and (self.patch_out_dim or self.patch_hidden_dim or self.patch_bottleneck_dim):
      raise UserError('objective.patch_* sizes need objective.separate_head=True')

  def masks(self, rng: jax.Array, crops: int, grid: tuple[int, ...], repeat: int) -> jax.Array:
    """Places to hide [crops * repeat, prod(grid)] bool; a crop's `repeat` masks hide as many places each."""
    raise NotImplementedError

  def last(self) -> str:
    """The form of the heads' last layers, see DINOHead."""
    return 'weight_norm'

  @property
  def heads(self) -> dict[str, DINOHead]:
    """One head, or one for class tokens and one for patches."""
    heads = {'head': self.head(last=self.last())}
    if self.separate_head:
      heads['patch_head'] = self.head(
          last=self.last(), out_dim=self.patch_count, hidden_dim=self.patch_hidden_dim or self.hidden_dim,
          bottleneck_dim=self.patch_bottleneck_dim or self.bottleneck_dim)
    return heads

  @property
  def patch_count(self) -> int:
    """Prototypes of the patches' head."""
    return self.patch_out_dim or self.count

  @property
  def patch_name(self) -> str:
    """The head that patches go through."""
    return 'patch_head' if self.separate_head else 'head'

  def extra(self, params: dict) -> dict:
    """Centres [K] of class tokens and of patches."""
    return super().extra(params) | {'patch_centre': jnp.zeros(self.patch_count)}

  def hide(self, rng: jax.Array, group: Views) -> jax.Array:
    """Tokens to hide from the student [B * V, N], or [B * V, C * N] for channel tokens."""
    grid, crops = token_grid(self.encoder, group), math.prod(group['image'].shape[:2])
    if most_hidden(math.prod(grid), self.mask_ratio[1]) < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} hides none of {math.prod(grid)} patches: take larger '
                      'images or smaller patches')
    channels = group['image'].shape[-1] if self.encoder.per_channel else 1
    own = channels if self.mask_channels == 'independent' else 1
    hidden = self.masks(rng, crops, grid, own).reshape(crops, own, -1)  # [B * V, 1 or C, N]
    hidden = on_own_grids(hidden, grid, own_grids(self.encoder, flat(group)))  # [B * V, 1 or C, N]
    return jnp.broadcast_to(hidden, (crops, channels, hidden.shape[-1])).reshape(crops, -1)

  def marked(self, hidden: jax.Array, student: Features, teacher: Features) -> tuple[jax.Array, jax.Array]:
    """The hidden tokens that student and teacher both have, as `chosen` gives them: [B * V, M] each."""
    there = both_valid(student.valid, teacher.valid)  # [B * V, N]
    groups = student.grid[0] if self.encoder.per_channel else 1
    bound = groups * most_hidden(hidden.shape[1] // groups, self.mask_ratio[1])
    return chosen(hidden if there is None else hidden & there, bound)


def most_hidden(patches: int, ratio: float) -> int:
  """The whole number of patches in such a share of them, forgiving the error of float32."""
  return int(patches * ratio + 1e-4)


def token_grid(encoder: Encoder, group: Views) -> tuple[int, ...]:
  """The patch grid of a group's crops, without an axis of channels."""
  return grid_of(tuple(group['image'].shape[2:-1]), tuple(encoder.patch_size))
