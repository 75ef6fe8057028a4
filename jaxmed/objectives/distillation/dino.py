"""DINO: self-distillation without labels (Caron et al. 2021; facebookresearch/dino, main_dino.py)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Variables
from jaxmed.models.decoders.heads import DINOHead
from jaxmed.objectives.distillation.self_distillation import SelfDistillation, centred, cross_view, update_centre
from jaxmed.objectives.networks import PHOTOMETRIC, seen_by_teacher, views, with_stats


@dataclasses.dataclass(frozen=True)
class DINO(SelfDistillation):
  """The class token of every crop predicts the teacher's distribution for the other global crops of its image.

  The published teacher temperature rises once an epoch, here at every step.

  Attributes:
    centre_momentum: of the moving average of the teacher's logits, which is subtracted from them.
    norm_last_layer: whether the prototypes keep length 1; without, their lengths are trained.
  The other options are those of SelfDistillation.
  """

  centre_momentum: float = 0.9
  norm_last_layer: bool = True

  LEARNING_RATE: ClassVar = (2e-3, 1024)  # 5e-4 * B / 256 at the published batch of 1024
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'drop_path': 0.1, 'patch_init': 'torch'},
      'optimizer': {'weight_decay': 0.04, 'final_weight_decay': 0.4, 'decay_lengths': True, 'clip': 3.0,
                    'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
      'augment': {'views': 2, 'local_views': 8, 'scale': (0.4, 1.0), 'local_scale': (0.05, 0.4), **PHOTOMETRIC},
  }

  @property
  def heads(self) -> dict[str, DINOHead]:
    """One head."""
    return {'head': self.head(last='fixed_norm' if self.norm_last_layer else 'weight_norm')}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Cross-entropy over all pairs of a teacher's view and another view of the student."""
    params, target, centre = variables['params'], variables['target'], variables['extra']['centre']
    crops = batch['global']['image'].shape[1]
    teacher_cls = self.teacher_features(target['encoder'], seen_by_teacher(batch['global']), train).pooled('cls')
    teacher_logits = jax.lax.stop_gradient(self.project('head', target, teacher_cls))  # [B * V, K]
    teacher_probs = views(centred(teacher_logits, centre, self.temperature(step)), crops)  # [B, V, K]
    _, student_cls, stats = self.student_crops(params, batch, train, rng)  # [B, S, D]
    student_logits = self.project('head', params, student_cls)  # [B, S, K]
    loss = cross_view(student_logits, teacher_probs, self.student_temperature)
    metrics = self.report(step, loss, teacher_probs)
    if train:
      metrics = with_stats(metrics, train, encoder=stats)
      centre = update_centre(centre, teacher_logits, self.centre_momentum)
    metrics['centre_norm'] = jnp.linalg.norm(centre)
    return loss, (metrics, {'centre': centre})
