"""MindEye's contrast: inputs mixed of two, then soft targets (Scotti et al. 2023, arXiv 2305.18274)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch
from jaxmed.errors import UserError
from jaxmed.objectives.losses import paired
from jaxmed.objectives.networks import Clock, cosine
from jaxmed.objectives.paired.clip import Paired, worded


@dataclasses.dataclass(frozen=True)
class MindEye(Paired):
  """BiMixCo in the first part of a run, SoftCLIP after it (MedARC-AI/fMRI-reconstruction-NSD, src/utils.py).

  The first tower's inputs are mixed, beta x_i + (1 - beta) x_other with beta of Beta(a, a), for half of the samples;
  then the texts' own cosines are the targets. There the first tower reads voxels of fMRI, the second is a frozen CLIP
  whose tokens are compared; here it is the tower of texts (freeze=text), of one vector. The diffusion prior is not
  built. Images are mixed with those of the same channels alone.

  Attributes:
    mix_share: fraction of the run with mixed inputs. mix_temperature: of cosines meanwhile.
    mix_beta: a. temperature, final_temperature: of SoftCLIP, cosine in between; nothing of the logits is trained.
  """

  temperature: float = 0.004
  final_temperature: float = 0.0075
  mix_share: float = 0.33
  mix_temperature: float = 0.006
  mix_beta: float = 0.15
  max_scale: float = 0.0
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (3e-4, 32)
  DEFAULTS: ClassVar[dict[str, Any]] = {**Paired.DEFAULTS, 'optimizer': {'weight_decay': 0.01}}

  def __post_init__(self):
    super().__post_init__()
    for name in ('final_temperature', 'mix_temperature', 'mix_beta'):
      if getattr(self, name) <= 0:
        raise UserError(f'objective.{name} {getattr(self, name)} must be positive')
    if not 0 <= self.mix_share <= 1:
      raise UserError(f'objective.mix_share {self.mix_share} must lie in [0, 1]')

  def similarity(self) -> dict[str, jax.Array]:
    """Nothing is trained of the logits."""
    return {}

  def scale_of(self, similarity: Any) -> jax.Array:
    """The logarithm of 1 / temperature."""
    del similarity
    return jnp.asarray(-math.log(self.temperature), jnp.float32)

  def loss(self, variables: Any, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The loss over the pairs of the global batch; of held-out ones nothing is mixed."""
    mixing, rest = jax.random.split(rng)
    share, other = self.drawn(mixing, batch, (step < self.mix_share * self.clock.steps) & train)
    image = batch['image'].astype(jnp.float32)
    wide = share.reshape(-1, *[1] * (image.ndim - 1))
    mixed = jnp.where(wide < 1, wide * image + (1 - wide) * image[other], image)  # what is missing may be NaN
    told: Any = {**batch, 'image': mixed, 'mix_share': share, 'mix_other': other,
                 'step': jnp.broadcast_to(step, share.shape)}
    return super().loss(variables, told, rest, step, train)

  def drawn(self, rng: jax.Array, batch: Batch, mixing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """beta [B] float32, 1 where an image stays as it is, and the partner of each [B] int32."""
    size = len(batch['label'])
    keys = jax.random.split(rng, 3)
    other = jax.random.permutation(keys[0], size)
    beta = jax.random.beta(keys[1], self.mix_beta, self.mix_beta, (size,))
    same = jnp.ones(size, bool)
    for name in ('channels', 'channel_mask', 'sizes'):
      if name in batch:
        same &= (batch[name] == batch[name][other]).all(axis=-1)
    half = jax.random.uniform(keys[2], (size,)) <= 0.5
    return jnp.where(mixing & half & same, beta, 1.0).astype(jnp.float32), other

  def compared(self, image: jax.Array, text: jax.Array, similarity: Any, batch: Any
               ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """BiMixCo or SoftCLIP, as the step says; accuracies are those of the loss's own temperature."""
    counts, steps = worded(batch), self.clock.steps
    step, first = batch['step'][0], self.mix_share * steps
    soft = cosine(self.temperature, self.final_temperature, step - first, max(steps - first, 1.0))
    mixed = paired.mixed(image, text, self.mix_temperature, batch['mix_share'], batch['mix_other'], counts, self.chunk)
    softened = paired.softened(image, text, soft, counts, self.chunk)
    u, v = jax.lax.stop_gradient((image, text))
    _, right = paired.clip(u, v, self.scale_of(similarity), counts, 0.5, self.chunk)
    return jnp.where(step < first, mixed, softened), right
