"""UniCL: CLIP where pairs of one label are no negatives of each other (Yang et al. 2022, arXiv 2204.03610)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch
from jaxmed.objectives.losses import paired
from jaxmed.objectives.paired.clip import Paired, worded

SALTS = (0x9E3779B9, 0x7F4A7C15)


@dataclasses.dataclass(frozen=True)
class UniCL(Paired):
  """Cross-entropy to all pairs of the same label or the same text; what MedImageInsight trains (arXiv 2410.06542).

  Pairs with a label (loader.label) belong to those of their label, pairs without one to those of the very same ids of
  text. Differs from MedImageInsight's config: s begins at ln(1 / 0.07), as of CLIP (there at 1); the tower of texts is
  causal (there it looks both ways: towers.text.options.causal=false).

  Attributes:
    by_text: whether pairs without a label are compared by their texts; otherwise each stands for itself.
  """

  by_text: bool = True

  def classes(self, batch: Batch) -> jax.Array:
    """The class of each pair, [B, 3] int32: its label, or two sums over its text, alike once in 2^62 by chance."""
    label, text = batch['label'], batch['text'].astype(jnp.uint32)
    place = jnp.arange(1, text.shape[1] + 1, dtype=jnp.uint32)
    keyed = (_mixed(text * (2 * place + 1) + place * jnp.uint32(salt)) for salt in SALTS)
    number = jnp.stack([x.sum(axis=1, dtype=jnp.uint32) for x in keyed], axis=1)
    if not self.by_text:
      number = jnp.broadcast_to(jnp.arange(len(label), dtype=jnp.uint32)[:, None], number.shape)
    number = jnp.where(label[:, None] >= 0, 0, number)
    return jnp.concatenate([label[:, None], jax.lax.bitcast_convert_type(number, jnp.int32)], axis=1)

  def compared(self, image: jax.Array, text: jax.Array, similarity: Any, batch: Batch
               ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The label-aware contrast; the accuracies are CLIP's, of the very pair."""
    scale, counts = self.scale_of(similarity), worded(batch)
    u, v, s = jax.lax.stop_gradient((image, text, scale))
    _, right = paired.clip(u, v, s, counts, 0.5, self.chunk)
    return paired.unicl(image, text, scale, self.classes(batch), counts, self.chunk), right


def _mixed(x: jax.Array) -> jax.Array:
  """Bits of uint32 spread over all places (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
