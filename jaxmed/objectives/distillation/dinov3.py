"""DINOv3: DINOv2 with Sinkhorn, linear prototypes and Gram anchoring (Simeoni et al. 2025; facebookresearch/dinov3)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Variables
from jaxmed.errors import UserError
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives.distillation.dinov2 import DINOv2
from jaxmed.objectives.distillation.self_distillation import both_valid, gram_loss, resized
from jaxmed.objectives.networks import cosine, seen_by_teacher


@dataclasses.dataclass(frozen=True)
class DINOv3(DINOv2):
  """DINOv2's losses with Sinkhorn and separate heads, and optionally a loss on the patches' similarities.

  Losses and weights are those of train/ssl_meta_arch.py; defaults are those of vitl_im1k_lin834.yaml, and of the
  encoder those of the 7B model (registers, rescaled rotary coordinates, an own norm for the class token of local
  crops). Every masked crop hides the upper end of its bin of `mask_ratio` (data/collate.py).

  The Gram loss compares the student's global patches with those of a Gram teacher: an earlier teacher, which sees the
  crops of batch['gram'], at a higher resolution and not distorted, where there are some, and the global crops
  otherwise. Its patches are resized to the student's grid by plain bicubic interpolation.

  Attributes:
    gram_weight: of the Gram loss (published: 2.0 in its stage); 0 leaves it and the Gram teacher's memory out.
    gram_start: step at which the teacher becomes the Gram teacher and the loss begins.
    gram_warmup: steps from gram_start in which that weight rises from 0, by half a cosine; 0 for at once.
    start_local_weight, local_warmup: in so many steps from gram_start the factor on the class token loss of local crops
      goes from the one, its value until then, to `local_weight`, by half a cosine; 0 steps for `local_weight` always.
    gram_every, gram_updates: after so many steps each, at most so many times, it is taken anew; gram_every 0 for never.
  The other options are those of DINOv2, SelfDistillation and MaskedDistillation.
  """

  separate_head: bool = True
  centering: str = 'sinkhorn'
  gram_weight: float = 0.0
  gram_start: int = 0
  gram_warmup: int = 0
  start_local_weight: float = 1.0
  local_warmup: int = 0
  gram_every: int = 10_000
  gram_updates: int = 3

  LEARNING_RATE: ClassVar = (4e-3, 1024)  # the yaml's 1e-3, times 4 in configs/config.py
  DEFAULTS: ClassVar[dict[str, Any]] = DINOv2.DEFAULTS | {
      'encoder': {'pos': 'rope', 'num_registers': 4, 'rope_rescale': 2.0, 'local_norm': True, 'layer_scale': 1e-5,
                  'drop_path': 0.3, 'drop_path_law': 'exact', 'patch_init': 'torch', 'mask_token': True,
                  'mask_std': 0.0, 'masking': 'token'},
  }
  EXACT_MASKS: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    for name in ('gram_weight', 'gram_start', 'gram_warmup', 'gram_every', 'gram_updates', 'start_local_weight',
                 'local_warmup'):
      if vars(self)[name] < 0:
        raise UserError(f'objective.{name} {vars(self)[name]} must be at least 0')

  def last(self) -> str:
    """Plain linear prototypes (layers/dino_head.py)."""
    return 'linear'

  def extra(self, params: dict) -> dict:
    """The Gram teacher's encoder, where it is used."""
    gram = {'gram': jax.tree.map(jnp.copy, params['encoder'])} if self.gram_weight else {}
    return super().extra(params) | gram

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """DINOv2's loss, plus the Gram loss from its first step on."""
    loss, metrics, extra, student = self.forward(variables, batch, rng, step, train)
    if not self.gram_weight:
      return loss, (metrics, extra)
    old = variables['extra']['gram']
    fresh = self.refreshes(step) if train else jnp.zeros((), bool)
    anchor = jax.tree.map(lambda teacher, gram: jnp.where(fresh, jax.lax.stop_gradient(teacher), gram),
                          variables['target']['encoder'], old)
    gram = jax.lax.cond(
        step >= self.gram_start, lambda: self.gram(anchor, batch, student, train), lambda: jnp.zeros(()))
    weight = jnp.asarray(self.since_start(step, 0.0, self.gram_weight, self.gram_warmup))
    return loss + weight * gram, (metrics | {'gram_loss': gram, 'gram_weight': weight}, extra | {'gram': anchor})

  def local_factor(self, step: jax.Array) -> jax.Array | float:
    """The factor on the class token loss of local crops at a step."""
    return self.since_start(step, self.start_local_weight, self.local_weight, self.local_warmup)

  def since_start(self, step: jax.Array, start: float, end: float, steps: int) -> jax.Array | float:
    """From start to end in so many steps from gram_start (train/cosine_lr_scheduler.py:linear_warmup_cosine_decay)."""
    return cosine(start, end, jnp.asarray(step) - self.gram_start, steps - 1) if steps else end

  def refreshes(self, step: jax.Array) -> jax.Array:
    """Whether the teacher becomes the Gram teacher before this step (train/train.py)."""
    since = jnp.asarray(step) - self.gram_start
    if not self.gram_every:
      return since == 0
    return (since >= 0) & (since % self.gram_every == 0) & (since // self.gram_every <= self.gram_updates)

  def gram(self, anchor: dict, batch: Batch, student: Features, train: bool) -> jax.Array:
    """The Gram loss of the student's features of the global crops against a Gram teacher of these weights."""
    group = batch.get('gram', batch['global'])
    if group['image'].shape[:2] != batch['global']['image'].shape[:2]:
      raise ValueError("batch['gram'] must have as many crops as batch['global']")
    teacher = self.teacher_features(anchor, seen_by_teacher(group), train)
    valid = student.valid  # [B * V, N]
    if student.grid == teacher.grid:
      valid = both_valid(student.valid, teacher.valid)
    elif teacher.valid is not None:  # by channel
      channels = teacher.valid.reshape(*teacher.valid.shape[:1], teacher.grid[0], -1).any(axis=-1)  # [B * V, C]
      of_channels = jnp.repeat(channels, student.patches.shape[1] // teacher.grid[0], axis=1)  # [B * V, N]
      valid = of_channels if valid is None else valid & of_channels
    return gram_loss(student.patches, resized(teacher.patches, teacher.grid, student.grid), valid)
