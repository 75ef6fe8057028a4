"""What methods that compare views share: features of all views, projectors view by view, widths of heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables, Views
from jaxmed.errors import UserError, choose
from jaxmed.objectives import networks

NORMS = ('together', 'apart')  # over which views an encoder's batch norm takes its statistics


def width(published: int, encoder: Encoder) -> int:
  """A head's published width, but at most 12 times the encoder's (so that ViT-S keeps MoCo v3's 4096)."""
  return min(published, 12 * encoder.embed_dim)


def check(feature: str, encoder_norm: str = 'together', **positive: float) -> None:
  """Raises a UserError for an unknown feature or norm, or an option that is not positive."""
  choose('objective.feature', feature, ('cls', 'mean'))
  choose('objective.encoder_norm', encoder_norm, NORMS)
  for name, value in positive.items():
    if value <= 0:
      raise UserError(f'objective.{name} {value} must be positive')


def count_views(batch: Batch, least: int = 2) -> int:
  """The number of global views; a UserError for fewer than two."""
  count = batch['global']['image'].shape[1]
  if count < least:
    raise UserError(f'augment.views {count} is too few: this method compares at least {least} views of an image')
  return count


def init_encoder(encoder: Encoder, rng: jax.Array, batch: Batch) -> Any:
  """Boxed parameters, from the shapes of the global views."""
  return encoder.init(rng, **networks.flat(batch['global']))['params']


def init_head(head: nn.Module, rng: jax.Array, size: int) -> Any:
  """Boxed parameters of a head on vectors of `size`."""
  return head.init(rng, jnp.zeros((1, size)))['params']


def init_with_projector(encoder: Encoder, projector: nn.Module, rng: jax.Array, batch: Batch,
                        least: int = 2) -> Variables:
  """Boxed variables of a method that is an encoder and a projector, without a target."""
  count_views(batch, least)
  keys = jax.random.split(rng)
  params = {'encoder': init_encoder(encoder, keys[0], batch),
            'projector': init_head(projector, keys[1], encoder.embed_dim)}
  return {'params': params, 'target': {}, 'extra': {}}


def encode(encoder: Encoder, params: Any, group: Views, rng: jax.Array, train: bool, feature: str,
           norm: str = 'together') -> tuple[jax.Array, Any]:
  """Features [B, V, D] float32 of the views of a group, and the encoder's new running statistics.

  With `norm` 'apart' the encoder runs once a view, so that its batch norm sees one view at a time; the new running
  statistics are then the mean of those of the views.
  """
  if norm == 'apart':
    known: Any = networks.inputs(group)
    keys = jax.random.split(rng, known['image'].shape[1])
    alone: list[Any] = [{name: x[:, v:v + 1] for name, x in known.items()} for v in range(len(keys))]
    each = [encode(encoder, params, view, key, train, feature) for view, key in zip(alone, keys, strict=True)]
    x, stats = zip(*each, strict=True)
    return jnp.concatenate(x, axis=1), jax.tree.map(lambda *s: sum(s) / len(s), *stats)
  out, stats = networks.run(encoder, params, **networks.flat(group), train=train, rngs={'dropout': rng})
  return networks.views(out.pooled(feature), group['image'].shape[1]), stats  # [B, V, D]


def encode_all(encoder: Encoder, params: Any, batch: Batch, rng: jax.Array, train: bool,
               feature: str) -> tuple[jax.Array, Any]:
  """Features [B, V, D] of the global views, then of local views if any.

  Running statistics are those of the global views, whose size is the one that the encoder is used at.
  """
  keys = jax.random.split(rng)
  x, stats = encode(encoder, params, batch['global'], keys[0], train, feature)
  if 'local' not in batch:
    return x, stats
  return jnp.concatenate([x, encode(encoder, params, batch['local'], keys[1], train, feature)[0]], axis=1), stats


def head_over_all_views(head: nn.Module, params: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
  """A head on x [B, V, D] with batch statistics over all views; new running statistics."""
  out, stats = networks.run(head, params, x.reshape(-1, x.shape[-1]), train=train)  # [B * V, K]
  return networks.views(out, x.shape[1]).astype(jnp.float32), stats  # [B, V, K]


def view_by_view(head: nn.Module, params: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
  """A head on x [B, V, D] with batch statistics of each view by itself; the mean of the new running statistics."""
  apply = lambda one: networks.run(head, params, one, train=train)
  out, stats = jax.vmap(apply, in_axes=1, out_axes=(1, 0))(x)  # [B, V, K]; statistics [V, ...]
  return out.astype(jnp.float32), jax.tree.map(lambda s: s.mean(axis=0), stats)
