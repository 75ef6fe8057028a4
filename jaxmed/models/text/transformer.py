"""The text transformers of CLIP and SigLIP, and their sizes by name.

Radford et al. 2021 (arXiv 2103.00020; mlfoundations/open_clip, src/open_clip/transformer.py) and Zhai et al. 2023
(arXiv 2303.15343; google-research/big_vision, models/proj/image_text/text_transformer.py).
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
from jaxmed.models.layers.transformer import Dense, LayerNorm, Transformer
from jaxmed.models.text.pooling import Pool, lengths

BYTES = 257  # padding and the 256 bytes: the ids of texts without a tokenizer


class TextTransformer(nn.Module):
  """Ids of texts to a vector each; the fields are the config.

  Ids 0 after the last other one are padding. One before it is not: tokenizers have words of that number (CLIP's '!').

  Differs: kernels are drawn as those of other transformers here, with a deviation of 0.02 (CLIP's follow width and
  depth), and positions with 0.01 (SigLIP's with 1 / sqrt(width)); GELU is exact (OpenAI's weights are trained with
  mlp='quick_gelu', SigLIP's with 'gelu_tanh').

  Attributes:
    vocab_size: rows of the table of ids, id 0 among them.
    embed_dim, depth, num_heads: width, blocks and attention heads.
    mlp_ratio: width of the MLP over embed_dim.
    mlp: 'gelu'; 'gelu_tanh' and 'quick_gelu' for public weights, see `transformer.MLP`.
    causal: whether an id looks only at itself and those before it (CLIP).
    pool: the vector of a text: 'eot', of its last id (CLIP); 'last', of the last place, padding or not (SigLIP);
      'cls', of its first id; 'mean', 'max' or 'attention' (a trained query) over all of its ids.
    mask_padding: whether nothing looks at padding. SigLIP's weights are trained with texts that do.
    norm_epsilon: what layer norms add to the variance.
    remat: what the backward pass computes again: 'none' or a policy, to save memory.
    dtype: 'float32' or 'bfloat16' compute; parameters are float32.
    context: the most ids of a text. out_dim: of the projection of a text's vector, 0 for none. out_bias: whether that
      has a bias (SigLIP).
    adapter: what is trained beside frozen weights.
  """

  vocab_size: int = BYTES
  embed_dim: int = 512
  depth: int = 12
  num_heads: int = 8
  mlp_ratio: float = 4.0
  mlp: str = 'gelu'
  causal: bool = True
  pool: str = 'eot'
  mask_padding: bool = True
  norm_epsilon: float = 1e-5
  remat: str = 'none'
  dtype: Any = 'float32'
  context: int = 77
  out_dim: int = 0
  out_bias: bool = False
  adapter: Adapter | None = None

  @nn.compact
  def __call__(self, text: jax.Array, train: bool = False) -> Features:
    """Features of ids [B, L], L at most `context`: the vector as `pool`, tokens after the final norm as `patches`."""
    length = text.shape[1]
    if length > self.context:
      raise UserError(f'a text of {length} ids is longer than the {self.context} of the model')
    compute, table = jnp.dtype(self.dtype), lambda std, axis: nn.with_logical_partitioning(
        initial.normal(std=std), (axis, 'embed'))
    size = self.embed_dim
    tokens = self.param('token_embed', table(initial.STD, 'vocabulary'), (self.vocab_size, size), jnp.float32)
    places = self.param('pos_embed', table(0.01, 'positions'), (self.context, size), jnp.float32)
    x = (tokens[text] + places[:length]).astype(compute)  # [B, L, D]
    count = lengths(text)
    valid = jnp.arange(length) < count[:, None]
    mask = valid if self.mask_padding else None
    if self.causal:
      before = jnp.tril(jnp.ones((length, length), bool))[None]
      mask = jnp.broadcast_to(before, (len(text), length, length)) if mask is None else before & valid[:, None]
    blocks = Transformer(self.depth, self.num_heads, self.mlp_ratio, mlp=self.mlp, remat=self.remat, dtype=compute,
                         norm_epsilon=self.norm_epsilon, adapter=adapters.in_training(self.adapter, train),
                         name='transformer')
    x = LayerNorm(compute, self.norm_epsilon, name='norm')(blocks(x, mask, train=train))
    found = Features(None, None, x, valid)
    vector = Pool(self.pool, name='pool')(x, count)
    if self.out_dim:
      vector = Dense((self.out_dim,), ('embed', None), self.out_bias, dtype=compute, name='head')(vector)
    return dataclasses.replace(found, pool=vector.astype(jnp.float32))


SIGLIP = dict(causal=False, pool='last', mask_padding=False, norm_epsilon=1e-6)
MODELS: dict[str, dict[str, Any]] = {
    'text_micro': dict(embed_dim=128, depth=4, num_heads=4),
    'text_clip_base': dict(embed_dim=512, depth=12, num_heads=8),
    'text_siglip_micro': dict(embed_dim=128, depth=4, num_heads=4) | SIGLIP,
    'text_siglip_base': dict(embed_dim=768, depth=12, num_heads=12) | SIGLIP,
}
