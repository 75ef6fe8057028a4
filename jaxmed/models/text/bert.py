"""BERT, a transformer whose norms come after its branches, and its sizes by name.

Devlin et al. 2019 (arXiv 1810.04805; huggingface/transformers, src/transformers/models/bert/modeling_bert.py).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.layers import adapters, initial
from jaxmed.models.layers.adapters import Adapter
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import LOOK, LOOK_SLOPES, MLP, Attention, Dense, LayerNorm, rematerialised
from jaxmed.models.text.pooling import Pool, lengths
from jaxmed.models.text.transformer import BYTES

EPSILON = 1e-12  # of transformers' BertConfig


class PostNormBlock(nn.Module):
  """LN(x + attention(x)), then LN(x + MLP(x)): tokens [B, L, D] -> (the same, None or with `collect` these again).

  Shaped for nn.scan.
  """

  num_heads: int
  mlp_ratio: float
  dropout: float
  norm_epsilon: float
  dtype: Any
  adapter: Adapter | None
  collect: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    norm = lambda name: LayerNorm(self.dtype, self.norm_epsilon, name=name)
    y = Attention(self.num_heads, dtype=self.dtype, adapter=self.adapter, name='attn')(x, (mask,), (None,))
    x = norm('norm1')(x + adapters.dropped(self, self.dropout, y))
    y = MLP(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, adapter=self.adapter, name='mlp')(x)
    x = norm('norm2')(x + adapters.dropped(self, self.dropout, y))
    return x, x if self.collect else None


class PostNormTransformer(nn.Module):
  """`depth` blocks under one scan (parameters stacked [depth, ...]): tokens [B, L, D] to the sum of those of the last
  `layers` blocks. `mask` [B, L] says which tokens are there."""

  depth: int
  num_heads: int
  mlp_ratio: float
  dropout: float
  norm_epsilon: float
  remat: str
  dtype: Any
  adapter: Adapter | None
  layers: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    scanned = nn.scan(
        rematerialised(PostNormBlock, self.remat),
        variable_axes=dict.fromkeys(('params', 'intermediates', LOOK, LOOK_SLOPES), 0),
        split_rngs={'params': True, 'dropout': True}, in_axes=nn.broadcast, length=self.depth,
        metadata_params={nn.PARTITION_NAME: 'layers'})
    out, each = scanned(self.num_heads, self.mlp_ratio, self.dropout, self.norm_epsilon, self.dtype, self.adapter,
                        self.layers > 1, name='blocks')(x, mask)
    return out if each is None else each[-self.layers:].sum(axis=0)


class Bert(nn.Module):
  """Ids of texts to a vector each; the fields are the config.

  Ids 0 after the last other one are padding ([PAD] of BERT's vocabularies), which nothing looks at.

  Differs: weights of attention have no dropout; there is no dense layer with tanh after the class token (BertModel's
  pooler), which no published image-text method reads.

  Attributes:
    vocab_size: rows of the table of ids, id 0 among them.
    embed_dim, depth, num_heads: width, blocks and attention heads. Fewer blocks are the first ones of a deeper model.
    mlp_ratio: width of the MLP over embed_dim.
    types: rows of the table of token types; a text of one part has type 0.
    pool: the vector of a text: 'cls', of its first id; 'mean' (MiniLM), 'max' (ConVIRT) or 'attention' (a trained
      query) over all of its ids; 'eot', of its last id; 'last', of the last place.
    layers: how many of the last blocks are summed to the tokens; 4 in GLoRIA.
    dropout: rate after the embeddings and on each branch, in training. BERT's is 0.1.
    norm_epsilon: what layer norms add to the variance.
    remat: what the backward pass computes again: 'none' or a policy, to save memory.
    dtype: 'float32' or 'bfloat16' compute; parameters are float32.
    context: the most ids of a text. out_dim: of the projection of a text's vector, 0 for none. out_bias: whether that
      has a bias.
    adapter: what is trained beside frozen weights, of kinds TEXT_KINDS.
  """

  vocab_size: int = BYTES
  embed_dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: float = 4.0
  types: int = 2
  pool: str = 'cls'
  layers: int = 1
  dropout: float = 0.0
  norm_epsilon: float = EPSILON
  remat: str = 'none'
  dtype: Any = 'float32'
  context: int = 512
  out_dim: int = 0
  out_bias: bool = False
  adapter: Adapter | None = None

  @nn.compact
  def __call__(self, text: jax.Array, train: bool = False, types: jax.Array | None = None) -> Features:
    """Features of ids [B, L], L at most `context`: the vector as `pool`, tokens as `patches`; `types` [B, L] of token
    types, None for 0."""
    length, compute = text.shape[1], jnp.dtype(self.dtype)
    if length > self.context:
      raise UserError(f'a text of {length} ids is longer than the {self.context} of the model')
    table = lambda name, axis, rows: self.param(
        name, nn.with_logical_partitioning(initial.normal(std=initial.STD), (axis, 'embed')), (rows, self.embed_dim),
        jnp.float32)
    x = table('token_embed', 'vocabulary', self.vocab_size)[text]
    x = x + table('pos_embed', 'positions', self.context)[:length]
    kinds = table('type_embed', None, self.types)
    x = (x + (kinds[0] if types is None else kinds[types])).astype(compute)  # [B, L, D]
    rate = self.dropout if train else 0.0
    x = adapters.dropped(self, rate, LayerNorm(compute, self.norm_epsilon, name='embed_norm')(x))
    count = lengths(text)
    valid = jnp.arange(length) < count[:, None]
    blocks = PostNormTransformer(self.depth, self.num_heads, self.mlp_ratio, rate, self.norm_epsilon, self.remat,
                                 compute, adapters.in_training(self.adapter, train), self.layers, name='transformer')
    x = blocks(x, valid)
    vector = Pool(self.pool, name='pool')(x, count)
    if self.out_dim:
      vector = Dense((self.out_dim,), ('embed', None), self.out_bias, dtype=compute, name='head')(vector)
    return dataclasses.replace(Features(None, None, x, valid), pool=vector.astype(jnp.float32))


# Sizes of google-research/bert and of sentence-transformers/all-MiniLM-L6-v2; vocabularies 30,522 (uncased) and 28,996.
MODELS: dict[str, dict[str, Any]] = {
    'bert_micro': dict(embed_dim=128, depth=4, num_heads=4),
    'minilm_l6': dict(vocab_size=30522, embed_dim=384, depth=6, num_heads=12, pool='mean'),
    'bert_base': dict(vocab_size=30522, embed_dim=768, depth=12, num_heads=12),
    'bert_base_cased': dict(vocab_size=28996, embed_dim=768, depth=12, num_heads=12),
}
