"""One vector of the tokens of a text."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import initial

POOLS = ('eot', 'last', 'mean', 'max', 'cls', 'attention')


def lengths(text: jax.Array) -> jax.Array:
  """How many ids [B] each text of ids [B, L] has: ids 0 after the last other one are padding."""
  count = text.shape[1] - jnp.argmax(text[:, ::-1] != 0, axis=1)
  return jnp.where((text != 0).any(axis=1), count, 0)


class Pool(nn.Module):
  """Tokens [B, L, D], of which the first `count` [B] are there, to vectors [B, D].

  Attributes:
    kind: 'eot', the last token that is there; 'last', that of the last place; 'cls', that of the first; 'mean' and
      'max' over the tokens that are there, special ones among them; 'attention', their mean weighted by the softmax of
      q x / sqrt(D) with a trained q. A text without tokens has 0 by 'mean', 'max' and 'attention'.
  """

  kind: str

  @nn.compact
  def __call__(self, x: jax.Array, count: jax.Array) -> jax.Array:
    if self.kind in ('eot', 'last', 'cls'):
      place = {'eot': jnp.maximum(count - 1, 0), 'last': jnp.full(count.shape, x.shape[1] - 1),
               'cls': jnp.zeros(count.shape, jnp.int32)}[self.kind]
      return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
    x, valid = x.astype(jnp.float32), (jnp.arange(x.shape[1]) < count[:, None])[..., None]  # [B, L, 1]
    if self.kind == 'mean':
      return jnp.where(valid, x, 0).sum(axis=1) / jnp.maximum(count, 1)[:, None]
    if self.kind == 'max':
      return jnp.where(valid.any(axis=1), jnp.where(valid, x, -jnp.inf).max(axis=1), 0)
    law = nn.with_logical_partitioning(initial.normal(std=initial.STD), ('embed',))
    query = self.param('query', law, (x.shape[-1],), jnp.float32)
    logits = jnp.where(valid, (x @ query / x.shape[-1] ** 0.5)[..., None], -1e30)
    return jnp.where(valid, jax.nn.softmax(logits, axis=1) * x, 0).sum(axis=1)
