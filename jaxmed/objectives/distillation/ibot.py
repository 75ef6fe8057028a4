"""iBOT: DINO with masked image modelling under the teacher (Zhou et al. 2022; bytedance/ibot, main_ibot.py)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.augment.masks import block_masks
from jaxmed.contracts import Batch, Variables
from jaxmed.objectives.distillation.self_distillation import (
  MaskedDistillation,
  centred,
  cross_view,
  patch_loss,
  update_centre,
)
from jaxmed.objectives.networks import PHOTOMETRIC, seen_by_teacher, views, with_stats


@dataclasses.dataclass(frozen=True)
class IBOT(MaskedDistillation):
  """DINO's loss on class tokens plus the same cross-entropy at hidden patches, for the teacher's patch of that place.

  Each global crop is masked with probability `mask_probability`, by blocks of at least (shortest side // 3)^2 patches,
  its share uniform in `mask_ratio` (the README's pred_ratio 0 0.3 with pred_ratio_var 0 0.2). Defaults are those of
  the README's ViT-S/16. A separate head is a whole head; the official one shares all but its last layer.

  Attributes:
    out_dim: prototypes; 0 chooses them by the number of images, at most the published 8192.
    centre_momentum, patch_centre_momentum: of the averages of the teacher's logits of class tokens and of all patches.
    start_patch_temperature, patch_temperature: the teacher's temperature for patches, in the same epochs; 0 for that
      of class tokens.
    dino_weight, ibot_weight: of the two losses (lambda1, lambda2).
    norm_last_layer: whether the prototypes keep length 1.
  The other options are those of SelfDistillation and MaskedDistillation.
  """

  centre_momentum: float = 0.9
  patch_centre_momentum: float = 0.9
  start_patch_temperature: float = 0.04
  patch_temperature: float = 0.0
  dino_weight: float = 1.0
  ibot_weight: float = 1.0
  norm_last_layer: bool = False

  LEARNING_RATE: ClassVar = (2e-3, 1024)  # 5e-4 * B / 256 at the published batch of 1024
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'drop_path': 0.1, 'patch_init': 'torch', 'mask_token': True, 'mask_std': 0.0, 'masking': 'token'},
      'optimizer': {'weight_decay': 0.04, 'final_weight_decay': 0.4, 'decay_lengths': True, 'clip': 3.0,
                    'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
      'augment': {'views': 2, 'local_views': 10, 'scale': (0.25, 1.0), 'local_scale': (0.05, 0.25), **PHOTOMETRIC},
  }

  @property
  def count(self) -> int:
    """Prototypes of the class token's head."""
    return self.out_dim or min(super().count, 8192)

  def last(self) -> str:
    """The form of the heads' last layers."""
    return 'fixed_norm' if self.norm_last_layer else 'weight_norm'

  def masks(self, rng: jax.Array, crops: int, grid: tuple[int, ...], repeat: int) -> jax.Array:
    """Places to hide [crops * repeat, prod(grid)] bool (bytedance/ibot, loader.py)."""
    which_key, share_key, block_key = jax.random.split(rng, 3)
    low, high = self.mask_ratio
    share = jax.random.uniform(share_key, (crops,), minval=low, maxval=high)
    masked = jax.random.bernoulli(which_key, self.mask_probability, (crops,))
    patches = jnp.prod(jnp.array(grid))
    count = jnp.repeat(masked * share * patches, repeat)
    return block_masks(block_key, count, grid, float((min(grid[-2:]) // 3) ** 2))

  def _patch_temperature(self, step: jax.Array) -> jax.Array:
    """The teacher's temperature for patches at a step."""
    if not self.patch_temperature:
      return self.temperature(step)
    return self.temperature(step, self.start_patch_temperature, self.patch_temperature)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Weighted sum of the class token loss and the patch loss."""
    params, target, extra = variables['params'], variables['target'], variables['extra']
    group, crops = batch['global'], batch['global']['image'].shape[1]
    mask_key, drop_key = jax.random.split(rng)
    hidden = self.hide(mask_key, group)
    student, student_cls, stats = self.student_crops(params, batch, train, drop_key, hidden=hidden)  # [B, S, D]
    teacher = self.teacher_features(target['encoder'], seen_by_teacher(group), train)
    teacher_logits = jax.lax.stop_gradient(self.project('head', target, teacher.pooled('cls')))  # [B * V, K]
    teacher_probs = views(centred(teacher_logits, extra['centre'], self.temperature(step)), crops)  # [B, V, K]
    dino = cross_view(self.project('head', params, student_cls), teacher_probs, self.student_temperature)
    index, marked = self.marked(hidden, student, teacher)  # [B * V, M]
    pick = lambda x: jnp.take_along_axis(x, index[..., None], axis=1)  # [B * V, N, K] -> [B * V, M, K]
    teacher_patch_logits = jax.lax.stop_gradient(self.project(self.patch_name, target, teacher.patches))
    teacher_patch_probs = centred(pick(teacher_patch_logits), extra['patch_centre'], self._patch_temperature(step))
    student_patch_logits = self.project(self.patch_name, params, pick(student.patches))  # [B * V, M, K]
    ibot = patch_loss(student_patch_logits, teacher_patch_probs, marked, self.student_temperature)
    loss = self.dino_weight * dino + self.ibot_weight * ibot
    metrics = self.report(step, dino, teacher_probs) | {'ibot_loss': ibot, 'hidden_tokens': marked.sum(axis=1).mean()}
    if train:
      metrics = with_stats(metrics, train, encoder=stats)
      extra = extra | {
          'centre': update_centre(extra['centre'], teacher_logits, self.centre_momentum),
          'patch_centre': update_centre(
              extra['patch_centre'], teacher_patch_logits, self.patch_centre_momentum, teacher.valid)}
    return loss, (metrics, extra)
