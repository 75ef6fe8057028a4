"""ConVIRT: images and a sentence of their reports (Zhang et al. 2020, arXiv 2010.00747)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.objectives.paired.clip import CLIP


@dataclasses.dataclass(frozen=True)
class ConVIRT(CLIP):
  """CLIP's loss with unlike weights of its directions, a fixed temperature, and one sentence a step.

  No code of its authors is public; the constants are the paper's as others tell them. Differs: projections are linear
  (there a hidden layer); tokens of texts are pooled as towers.text.options.pool says (there their maximum); the whole
  tower of texts is trained (there the last half of ClinicalBERT). HKU-MedAI/MGCA's version of that name has another
  loss: the sum of both directions at 0.07, of whole reports.

  Attributes:
    weight: lambda, of the search from images to texts. temperature: of cosines; it is not trained.
  """

  weight: float = 0.75
  temperature: float = 0.1
  max_scale: float = 0.0

  LEARNING_RATE: ClassVar = (1e-4, 32)
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'towers': {'text': {'model': 'text_micro', 'options': {'pool': 'mean'}}},
      'augment': {'scale': (0.6, 1.0), 'flip': (0.5,), 'jitter_probability': 0.8, 'brightness': 0.4, 'contrast': 0.4,
                  },
      'loader': {'text_draw': 'sentence'},
  }

  def similarity(self) -> dict[str, jax.Array]:
    """Nothing is trained of the logits."""
    return {}

  def scale_of(self, similarity: Any) -> jax.Array:
    """The logarithm of 1 / temperature."""
    del similarity
    return jnp.asarray(-math.log(self.temperature), jnp.float32)
