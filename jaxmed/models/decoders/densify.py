"""From the maps of a sparse encoder to whole ones for a decoder (SparK, Tian et al. 2023)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers.convolution import Conv, enlarge, normalise
from jaxmed.models.layers.initial import normal
from jaxmed.models.layers.norm import GroupNorm


class Densify(nn.Module):
  """Each map through an instance norm over its visible places, a token in the hidden ones, and a 3^d convolution.

  The finest map has no convolution (MIC-DKFZ/nnssl, architectures/spark_model.py:SparK3D; keyu-tian/SparK, spark.py,
  leaves it out at the coarsest one).
  """

  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, maps: tuple[jax.Array, ...], visible: jax.Array) -> tuple[jax.Array, ...]:
    """Maps [B, *size, D], the finest first, and visible places [B, *grid, 1] bool: maps of the same shapes."""
    compute, out = jnp.dtype(self.dtype), []
    for i, x in enumerate(maps):
      init = nn.with_logical_partitioning(normal(), ('embed',))
      token = self.param(f'token{i}', init, (x.shape[-1],), jnp.float32)
      x = normalise(GroupNorm(dtype=compute, name=f'norm{i}'), x, visible, False)
      x = jnp.where(enlarge(visible, x.shape[1:-1]), x, token.astype(compute))
      out.append(Conv(x.shape[-1], 3, 1, 1, True, 'torch', compute, name=f'conv{i}')(x) if i else x)
    return tuple(out)
