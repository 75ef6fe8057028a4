"""DINOv2: DINO and iBOT with KoLeo and optional Sinkhorn centring (Oquab et al. 2024; facebookresearch/dinov2)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.augment.masks import block_masks, scattered_masks, spread_counts
from jaxmed.contracts import Batch, Variables
from jaxmed.errors import choose
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives.distillation.self_distillation import (
  MaskedDistillation,
  centred,
  cross_view,
  koleo,
  patch_loss,
  update_centre,
)
from jaxmed.objectives.losses.clustering import sinkhorn
from jaxmed.objectives.networks import PHOTOMETRIC, seen_by_teacher, views, with_stats

CENTERING = ('softmax', 'sinkhorn')


@dataclasses.dataclass(frozen=True)
class DINOv2(MaskedDistillation):
  """DINO's loss on class tokens, iBOT's on hidden patches, KoLeo on the student's global class tokens before the head.

  Losses and weights are those of train/ssl_meta_arch.py with two global crops; defaults, of ssl_default_config.yaml.
  A share `mask_probability` of the batch's global crops is masked, the i-th of them with a share from the i-th of equal
  bins of `mask_ratio` (data/collate.py). The batch here is the global one; there, masks and KoLeo are drawn from one
  device's.

  Attributes:
    centering: how the teacher's distributions are made: 'softmax' of centred logits, or 'sinkhorn' over the batch's
      class tokens, and over its hidden patches.
    centre_momentum: of the averages of the teacher's logits, of class tokens and of hidden patches.
    dino_weight, ibot_weight, koleo_weight: of the losses; KoLeo's is summed over the global crops.
    koleo_group: samples among which KoLeo seeks neighbours; 0 for the whole batch.
    local_weight: factor on the class token loss of local crops.
    scattered: hidden patches are drawn one by one (AICONSlab/3DINO, dinov2/data/masking.py), in place of blocks.
  The other options are those of SelfDistillation and MaskedDistillation.
  """

  start_momentum: float = 0.992
  centering: str = 'softmax'
  centre_momentum: float = 0.9
  dino_weight: float = 1.0
  ibot_weight: float = 1.0
  koleo_weight: float = 0.1
  koleo_group: int = 0
  local_weight: float = 1.0
  scattered: bool = False

  LEARNING_RATE: ClassVar = (4e-3, 1024)
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'drop_path': 0.3, 'drop_path_law': 'exact', 'layer_scale': 1e-5, 'patch_init': 'torch',
                  'token_std': 1e-6, 'mask_token': True, 'mask_std': 0.0, 'masking': 'token'},
      'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4,
                    'decay_lengths': True, 'frozen_moments': True, 'clip': 3.0, 'clip_scope': 'module',
                    'final_learning_rate': 1e-6, 'layer_decay': 0.9, 'patch_embed_scale': 0.2},
      'augment': {'views': 2, 'local_views': 8, 'scale': (0.32, 1.0), 'local_scale': (0.05, 0.32), **PHOTOMETRIC},
  }
  EXACT_MASKS: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    choose('objective.centering', self.centering, CENTERING)

  def extra(self, params: dict) -> dict:
    """Centres [K], where logits are centred."""
    return super().extra(params) if self.centering == 'softmax' else {}

  def masks(self, rng: jax.Array, crops: int, grid: tuple[int, ...], repeat: int) -> jax.Array:
    """Places to hide [crops * repeat, prod(grid)] bool (data/collate.py, data/masking.py)."""
    count_key, block_key = jax.random.split(rng)
    patches = math.prod(grid)
    count = spread_counts(count_key, crops, patches, self.mask_probability, self.mask_ratio, self.EXACT_MASKS)
    if self.scattered:
      return scattered_masks(block_key, jnp.repeat(count, repeat), patches)
    return block_masks(block_key, jnp.repeat(count, repeat), grid, 4.0, 0.5 * patches)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Weighted sum of the three losses."""
    loss, metrics, extra, _ = self.forward(variables, batch, rng, step, train)
    return loss, (metrics, extra)

  def forward(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array,
              train: bool) -> tuple[jax.Array, dict, dict, Features]:
    """Loss, metrics, new extra state, and the student's features of the global crops [B * V, ...]."""
    params, target, extra = variables['params'], variables['target'], variables['extra']
    group, crops = batch['global'], batch['global']['image'].shape[1]
    mask_key, drop_key = jax.random.split(rng)
    hidden = self.hide(mask_key, group)
    student, student_cls, stats = self.student_crops(params, batch, train, drop_key, hidden=hidden)  # [B, S, D]
    teacher = self.teacher_features(target['encoder'], seen_by_teacher(group), train)
    temperature = self.temperature(step)
    teacher_logits = jax.lax.stop_gradient(self.project('head', target, teacher.pooled('cls')))  # [B * V, K]
    teacher_probs = views(self.distribution(teacher_logits, extra.get('centre', 0.0), temperature), crops)  # [B, V, K]
    dino = cross_view(self.project('head', params, student_cls), teacher_probs, self.student_temperature,
                      self.local_factor(step))
    ibot, teacher_patch_logits, marked = self.patches(params, target, student, teacher, hidden, extra, temperature)
    spread = jnp.stack([koleo(student_cls[:, v], self.koleo_group) for v in range(crops)]).sum()
    loss = self.dino_weight * dino + self.ibot_weight * ibot + self.koleo_weight * spread
    metrics = self.report(step, dino, teacher_probs) | {
        'ibot_loss': ibot, 'koleo_loss': spread / crops, 'hidden_tokens': marked.sum(axis=1).mean()}
    if train:
      metrics = with_stats(metrics, train, encoder=stats)
      extra = extra | self.centres(extra, teacher_logits, teacher_patch_logits, marked)
    return loss, metrics, extra, student

  def local_factor(self, step: jax.Array) -> jax.Array | float:
    """The factor on the class token loss of local crops at a step."""
    del step
    return self.local_weight

  def distribution(self, logits: jax.Array, centre: jax.Array | float, temperature: jax.Array,
                   weights: jax.Array | None = None) -> jax.Array:
    """The teacher's distributions [..., K] of logits; rows with weight 0 do not count in Sinkhorn's."""
    if self.centering == 'softmax':
      return centred(logits, centre, temperature)
    rows = logits.reshape(-1, logits.shape[-1])
    weights = None if weights is None else weights.reshape(-1)
    return sinkhorn(rows, temperature, weights=weights).reshape(logits.shape)

  def patches(self, params: dict, target: dict, student: Features, teacher: Features, hidden: jax.Array, extra: dict,
              temperature: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """iBOT's loss, the teacher's logits [B * V, M, K] at hidden tokens, and which of those M places are used."""
    index, marked = self.marked(hidden, student, teacher)  # [B * V, M]
    pick = lambda x: jnp.take_along_axis(x, index[..., None], axis=1)  # [B * V, M, D]
    teacher_logits = jax.lax.stop_gradient(self.project(self.patch_name, target, pick(teacher.patches)))
    teacher_probs = self.distribution(teacher_logits, extra.get('patch_centre', 0.0), temperature, marked)
    student_logits = self.project(self.patch_name, params, pick(student.patches))  # [B * V, M, K]
    return patch_loss(student_logits, teacher_probs, marked, self.student_temperature), teacher_logits, marked

  def centres(self, extra: dict, logits: jax.Array, patch_logits: jax.Array, marked: jax.Array) -> dict:
    """The centres after this batch; none with Sinkhorn."""
    if self.centering != 'softmax':
      return {}
    return {'centre': update_centre(extra['centre'], logits, self.centre_momentum),
            'patch_centre': update_centre(extra['patch_centre'], patch_logits, self.centre_momentum, marked)}
