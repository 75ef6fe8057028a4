"""EndoNet's head: tools of a frame, and its phase from the features and the tools (Twinanda et al. 2017).

There is no official code and the paper's text was not read: sizes are those of secondary sources (4096 features and 7
tools give the phase layer 4103 inputs). Online phases come of a temporal head or of `evaluate.hmm` on its answers.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers.transformer import Dense


class Tasks(NamedTuple):
  """Logits [..., K] of phases (softmax) and [..., M] of tools (sigmoid), and what the phases read, [..., D (+ M)]."""

  phases: jax.Array
  tools: jax.Array
  features: jax.Array


class EndoNet(nn.Module):
  """Tools by a linear layer; phases by one of the features beside the probabilities of tools.

  Attributes:
    num_classes: K phases. tools: M tools.
    detach: whether the loss of phases does not train the layer of tools through these probabilities.
    tools_first: whether phases see them at all; without, both layers read the features alone.
  """

  num_classes: int
  tools: int = 7
  detach: bool = False
  tools_first: bool = True
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> Tasks:
    """Of features [..., D], float32."""
    dtype = jnp.dtype(self.dtype)
    tools = Dense((self.tools,), ('embed', None), kernel_init='torch_uniform', dtype=dtype, name='tools')(x)
    seen = nn.sigmoid(jax.lax.stop_gradient(tools) if self.detach else tools)
    both = jnp.concatenate([x.astype(dtype), seen], axis=-1) if self.tools_first else x.astype(dtype)
    phases = Dense((self.num_classes,), ('embed', None), kernel_init='torch_uniform', dtype=dtype, name='phases')(both)
    return Tasks(phases.astype(jnp.float32), tools.astype(jnp.float32), both)
