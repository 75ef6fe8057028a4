"""Fusion: tokens of several modalities, of which some are missing, to one vector of logits.

One interface, `fuse(tokens ([B, T_m, D_m] each), mask [B, M]) -> [B, K]`; what a missing modality's tokens hold, NaN
included, has no part in any kind. Kinds (reviewed in Stahlschmidt et al. 2022; tensor as Zadeh et al. 2017, arXiv
1707.07250, and Pathomic Fusion, Chen et al. 2020, arXiv 1912.08937, without its gates; none is a port of a code):

  early      mean vectors side by side, zeros where one is missing; an MLP
  late       an MLP of each modality; its logits weighted by a softmax over the modalities that are there
  attention  tokens of all, told which modality they are of, and a class token in a transformer
  tensor     the product of all [z_m; 1], so z_m = 0 leaves the products of the others; an MLP
  graph      nodes are tokens, edges have the types of both ends: attention with keys and values of each type; then the
             mean of the nodes of each modality, the mean over these, and an MLP
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.decoders.heads import MLPHead
from jaxmed.models.layers import initial, kernels
from jaxmed.models.layers.transformer import Dense, LayerNorm, Transformer

KINDS = ('early', 'late', 'attention', 'tensor', 'graph')
MOST = 4  # modalities of a tensor, whose width is (tensor_dim + 1)^M


class Fusion(nn.Module):
  """Tokens of M modalities to logits.

  Attributes:
    kind: one of KINDS. num_outputs: K.
    dim: width that each modality is brought to. hidden: of the MLPs.
    depth, num_heads: blocks of 'attention' and rounds of 'graph', and attention heads.
    tensor_dim: width of each factor of 'tensor'.
    prompts: of 'graph', nodes that stand for a missing modality, see `Completion`; 0 for none.
    threshold: cosine from which a node that exists is linked to them.
  """

  kind: str
  num_outputs: int
  dim: int = 128
  hidden: int = 256
  depth: int = 2
  num_heads: int = 4
  tensor_dim: int = 16
  prompts: int = 0
  threshold: float = 0.0
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, tokens: Sequence[jax.Array], mask: jax.Array,
               valid: Sequence[jax.Array | None] = (), train: bool = False) -> jax.Array:
    """Logits [B, K] float32 of tokens [B, T_m, D_m], where mask [B, M] says which modalities a record has.

    `valid` [B, T_m] bool or None: tokens that count.
    """
    compute = jnp.dtype(self.dtype)
    width = self.tensor_dim if self.kind == 'tensor' else self.dim
    nodes, there = [], []
    for m, x in enumerate(tokens):
      counted = valid[m] if valid else None
      own = jnp.broadcast_to(mask[:, m, None], x.shape[:2])
      own = own if counted is None else own & counted
      x = Dense((width,), ('embed', None), dtype=compute, name=f'project{m}')(jnp.where(own[..., None], x, 0))
      nodes.append(jnp.where(own[..., None], x, 0))
      there.append(own)
    return getattr(self, f'_{self.kind}')(nodes, there, mask, train).astype(jnp.float32)

  def _head(self, name: str) -> MLPHead:
    return MLPHead((self.hidden, self.num_outputs), norm=False, use_bias=True, dtype=self.dtype, name=name)

  def _early(self, nodes, there, mask, train) -> jax.Array:
    del mask
    return self._head('head')(jnp.concatenate(list(map(mean, nodes, there)), axis=-1), train)

  def _late(self, nodes, there, mask, train) -> jax.Array:
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
    weights = self.param('weights', zeros, (len(nodes),), jnp.float32)
    share = jax.nn.softmax(jnp.where(mask, weights, -1e30), axis=1)  # [B, M]
    logits = [self._head(f'head{m}')(mean(x, own), train) for m, (x, own) in enumerate(zip(nodes, there, strict=True))]
    return sum(share[:, m, None] * x for m, x in enumerate(logits))

  def _tensor(self, nodes, there, mask, train) -> jax.Array:
    del mask
    ones = jnp.ones((len(nodes[0]), 1), nodes[0].dtype)
    factors = [jnp.concatenate([mean(x, own).astype(ones.dtype), ones], axis=1)
               for x, own in zip(nodes, there, strict=True)]
    outer = lambda a, b: (a[:, :, None] * b[:, None]).reshape(len(a), -1)
    return self._head('head')(functools.reduce(outer, factors), train)

  def _attention(self, nodes, there, mask, train) -> jax.Array:
    del mask
    table = nn.with_logical_partitioning(initial.normal(), (None, 'embed'))
    kinds = self.param('modalities', table, (len(nodes) + 1, self.dim), jnp.float32).astype(nodes[0].dtype)
    first = jnp.broadcast_to(kinds[-1], (len(nodes[0]), 1, self.dim))
    x = jnp.concatenate([first, *(x + kinds[m] for m, x in enumerate(nodes))], axis=1)
    seen = jnp.concatenate([jnp.ones((len(x), 1), bool), *there], axis=1)
    blocks = Transformer(self.depth, self.num_heads, dtype=x.dtype, name='transformer')
    x = LayerNorm(x.dtype, name='norm')(blocks(x, seen, train=train)[:, 0])
    return self._head('head')(x, train)

  def _graph(self, nodes, there, mask, train) -> jax.Array:
    if self.prompts:
      nodes, there = Completion(self.prompts, self.threshold, self.dtype, name='completion')(nodes, there, mask)
      mask = jnp.ones_like(mask)
    for i in range(self.depth):
      nodes = TypedAttention(self.num_heads, self.dtype, name=f'round{i}')(nodes, there)
    each = jnp.stack(list(map(mean, nodes, there)), axis=1)  # [B, M, dim]
    share = mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    x = LayerNorm(each.dtype, name='norm')((each * share[..., None]).sum(axis=1))
    return self._head('head')(x, train)


class TypedAttention(nn.Module):
  """A round of messages: each node looks at all nodes, with keys and values by the types (to, from) of the edge.

  x_n + proj_n(sum_m softmax over all m and j of q_n . k_nm[j] times v_nm[j]), of layer-normalised nodes.
  """

  num_heads: int
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, nodes: Sequence[jax.Array], there: Sequence[jax.Array]) -> list[jax.Array]:
    """Nodes [B, T_m, D] to the same, zeros where `there` [B, T_m] is False."""
    compute, dim = jnp.dtype(self.dtype), nodes[0].shape[-1]
    shape, axes = (self.num_heads, dim // self.num_heads), ('embed', 'heads', 'head_dim')
    heads = lambda name, x: Dense(shape, axes, dtype=compute, name=name)(x)
    normed = [LayerNorm(compute, name=f'norm{m}')(x) for m, x in enumerate(nodes)]
    seen, out = jnp.concatenate(there, axis=1), []
    for n, x in enumerate(normed):
      keys = jnp.concatenate([heads(f'key{n}_{m}', y) for m, y in enumerate(normed)], axis=1)
      values = jnp.concatenate([heads(f'value{n}_{m}', y) for m, y in enumerate(normed)], axis=1)
      found = kernels.attention(heads(f'query{n}', x), keys, values, seen, 'auto')  # [B, T_n, H, Dh]
      new = nodes[n] + Dense((dim,), ('heads', 'embed'), dtype=compute, fold=2, name=f'proj{n}')(found)
      out.append(jnp.where(there[n][..., None], new, 0))
    return out


class Completion(nn.Module):
  """Nodes for the modalities that a record lacks, from learned prompts and the nodes that it has (GTP-4o's idea).

  Each of P prompts of a missing modality is linked to the nodes whose cosine to it, after a linear layer each, is at
  least `threshold`, takes their mean by a softmax over 10 times these cosines, and is added to it. A prompt without a
  link stays as it is. The modality's own input has no part, nor have prompts where nothing is missing.
  """

  prompts: int
  threshold: float = 0.0
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, nodes: Sequence[jax.Array], there: Sequence[jax.Array], mask: jax.Array
               ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Nodes [B, T_m + P, D] and which of them exist: a modality's own where mask [B, M] is True, else its prompts."""
    compute, dim, count = jnp.dtype(self.dtype), nodes[0].shape[-1], len(nodes[0])
    table = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, None, 'embed'))
    prompts = self.param('prompts', table, (len(nodes), self.prompts, dim), jnp.float32).astype(compute)
    every, seen = jnp.concatenate(nodes, axis=1), jnp.concatenate(there, axis=1)
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12))
    dense = lambda name, x: Dense((dim,), ('embed', None), dtype=compute, name=name)(x)
    keys, out, real = unit(dense('key', every)), [], []
    for m, x in enumerate(nodes):
      cosine = jnp.einsum('pd,bnd->bpn', unit(dense(f'query{m}', prompts[m])), keys)
      linked = seen[:, None] & (cosine >= self.threshold)
      share = jnp.where(linked, jax.nn.softmax(jnp.where(linked, 10 * cosine, -1e30), axis=-1), 0)
      made = prompts[m] + jnp.einsum('bpn,bnd->bpd', share, dense(f'value{m}', every))
      lacks = jnp.broadcast_to(~mask[:, m, None], (count, self.prompts))
      out.append(jnp.concatenate([x, jnp.where(lacks[..., None], made, 0)], axis=1))
      real.append(jnp.concatenate([there[m], lacks], axis=1))
    return out, real


def mean(x: jax.Array, there: jax.Array) -> jax.Array:
  """The mean [B, D] of tokens x [B, T, D] that are there [B, T]; zeros without one."""
  weight = there[..., None].astype(x.dtype)
  return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
