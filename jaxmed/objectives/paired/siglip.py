"""SigLIP: an image and a text belong to each other or not, asked of every two (Zhai et al. 2023, arXiv 2303.15343)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch
from jaxmed.objectives.losses import paired
from jaxmed.objectives.paired.clip import Paired, worded


@dataclasses.dataclass(frozen=True)
class SigLIP(Paired):
  """Logistic loss of each image with each text of the batch, summed and divided by the number of pairs.

  Differs from google-research/big_vision: the image's vector is the mean of its tokens (there attention of a trained
  query, without a projection), projected; weights of embeddings do not decay; the tower of texts is CLIP's unless
  towers.text.model is one of text_siglip_*, which learn more slowly from few texts.

  Attributes:
    bias: of the logits in the beginning: at -10, as of the paper, no two belong together. The released example has
      -2.71 (configs/proj/image_text/siglip_lit_coco.py).
  """

  out_dim: int = 768
  temperature: float = 0.1
  max_scale: float = 0.0
  feature: str = 'mean'
  bias: float = -10.0

  TEXT_BIAS: ClassVar[bool] = True
  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      **Paired.DEFAULTS,
      'optimizer': {'b2': 0.95, 'weight_decay': 0.1}}  # 1e-4 of the weights a step at a rate of 1e-3

  def similarity(self) -> dict[str, jax.Array]:
    """What is trained of the logits: {'scale': s, 'bias'}."""
    return super().similarity() | {'bias': jnp.asarray(self.bias, jnp.float32)}

  def compared(self, image: jax.Array, text: jax.Array, similarity: Any, batch: Batch
               ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The logistic loss of all pairs."""
    return paired.siglip(image, text, self.scale_of(similarity), similarity['bias'], worded(batch), self.chunk)
