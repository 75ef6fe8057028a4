"""Rows of numbers, such as laboratory values, of which some are missing."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import initial, kernels
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense, LayerNorm, Transformer


class TableEncoder(nn.Module):
  """Numbers [B, K] with NaN where one is missing to features; the fields are the config.

  Without `depth` it is the MLP of Symile-MIMIC (rajesh-lab/symile, experiments/models/symile_mimic_model.py): values,
  0 where missing, beside 0/1 of which are there, 2K -> hidden -> D with GELU, and one token. Differs: values are
  standardised by the training records (there percentiles of them). With `depth` each column is a token, value times a
  vector plus a vector, or a vector of its own where it is missing, in a transformer (as FT-Transformer's tokens,
  Gorishniy et al. 2021, arXiv 2106.11959); missing columns are tokens too, as which were not measured says something.

  Attributes:
    embed_dim: width D of the features.
    hidden: widths of the MLP's other layers.
    depth, num_heads: blocks and attention heads; 0 blocks for the MLP.
    dtype: 'float32' or 'bfloat16' compute; parameters are float32.
    columns: names of the K columns. mean, std: of each among the training records.
  """

  embed_dim: int = 256
  hidden: tuple[int, ...] = (256, 1024)
  depth: int = 0
  num_heads: int = 4
  dtype: Any = 'float32'
  columns: tuple[str, ...] = ()
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()

  @nn.compact
  def __call__(self, table: jax.Array, train: bool = False) -> Features:
    """Features of numbers [B, K] as they are stored: a token [B, 1, D], or one a column [B, K, D]."""
    compute, there = jnp.dtype(self.dtype), ~jnp.isnan(table)  # [B, K]
    x = (jnp.where(there, table, 0) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    x = jnp.where(there, x, 0).astype(compute)
    if self.depth:
      return Features(None, None, self._tokens(x, there, train))
    x = jnp.concatenate([x, there.astype(compute)], axis=-1)
    for i, width in enumerate((*self.hidden, self.embed_dim)):
      x = kernels.gelu(x) if i else x
      x = Dense((width,), ('embed', 'mlp') if i % 2 == 0 else ('mlp', 'embed'), True, 'torch_uniform', compute,
                name=f'dense{i}')(x)
    return Features(None, None, x[:, None])

  def _tokens(self, x: jax.Array, there: jax.Array, train: bool) -> jax.Array:
    own = lambda name: self.param(name, nn.with_logical_partitioning(initial.normal(), (None, 'embed')),
                                  (len(self.columns), self.embed_dim), jnp.float32).astype(x.dtype)
    tokens = x[..., None] * own('slope') + own('offset')
    tokens = jnp.where(there[..., None], tokens, own('missing'))
    blocks = Transformer(self.depth, self.num_heads, dtype=x.dtype, name='transformer')
    return LayerNorm(x.dtype, name='norm')(blocks(tokens, train=train))
