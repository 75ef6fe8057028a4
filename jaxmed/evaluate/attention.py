"""What a transformer looks at, channel by channel: attention, rollout and relevance as maps over patches."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.encoder import in_batches
from jaxmed.errors import UserError
from jaxmed.models.layers.tokens import grid_of
from jaxmed.models.layers.transformer import LOOK, LOOK_SLOPES

MOST_BYTES = 1 << 28  # of the weights of the images that are looked at together; their slopes take as many


def attention_maps(encoder: Any, images: np.ndarray, channels: Sequence[str] | None = None,
                   target: np.ndarray | None = None) -> dict[str, np.ndarray]:
  """How much of an image's feature comes from each patch of each channel.

  The feature is the encoder's own, its class token or mean patch. `attention` is its row of the last block's
  weights, the mean over heads (of each head in `heads`). `rollout` multiplies the weights of all blocks, each with as
  much of the identity for the residual path (Abnar and Zuidema, arXiv 2005.00928). `relevance` adds up weights times
  positive slopes block by block (Chefer, Gur, Wolf, arXiv 2103.15679, equations 5 and 6): slopes of the feature's
  product with `target`, such as a row of a classifier; by default with the feature itself.

  Args:
    encoder: what `jaxmed.load` returned, with a ViT or ChannelViT of joint attention.
    images: [N, *size, C] stored intensities; channels: their C names, by default the vocabulary's first C.
    target: [D] or [N, D].
  Returns:
    float32 'attention', 'rollout', 'relevance' [N, C, *grid] (of a ViT [N, *grid]), 'heads' [N, H, C, *grid], and
    'share' [N, C]: the part of each image's relevance that each channel has (a ChannelViT only).
  Raises:
    UserError: a model without attention weights, or as of `Encoder.embed`.
  """
  model = encoder.model
  if not model.supports.attention_maps or model.channel_attention != 'joint':
    raise UserError('attention maps need a vit or channel_vit with encoder.channel_attention=joint, whose tokens look '
                    'at all others')
  if model.adapter is not None and model.adapter.prompts:
    raise UserError(f'attention maps are of tokens of images, and {model.adapter.name} adds prompts to them')
  images = encoder.checked(images)
  ids = encoder.channel_ids(channels, images.shape[-1])
  targets = () if target is None else (np.broadcast_to(np.asarray(target, np.float32), (len(images), model.embed_dim)),)
  view = encoder.view(images.shape[1:-1])

  def look(some, *targets):
    batch = {'image': some, 'channels': np.tile(ids, (len(some), 1))}
    return _looked(model, view, encoder.feature, encoder.params, batch, *targets)

  together = max(MOST_BYTES // weight_bytes(model, images.shape[1:]), 1)
  out = in_batches(look, together, images, *targets)
  if model.per_channel:
    total = out['relevance'].reshape(*out['relevance'].shape[:2], -1).sum(axis=2)
    out['share'] = total / np.maximum(total.sum(axis=1, keepdims=True), 1e-30)
  return out


def weight_bytes(model: Any, shape: Sequence[int]) -> int:
  """Bytes of the attention weights of all blocks for an image of the shape (*size, C)."""
  *size, channels = shape
  patches = math.prod(grid_of(tuple(size), model.patch_size)) * (channels if model.per_channel else 1)
  return 4 * model.depth * model.num_heads * (patches + model.num_prefix_tokens) ** 2


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _looked(model, view, feature, params, batch, target=None):
  """The maps of a batch of stored intensities."""
  batch, variables = view.plain(batch), {'params': params}
  apply = functools.partial(model.apply, image=batch['image'], channels=batch['channels'],
                            channel_mask=batch.get('channel_mask'))
  shape = jax.eval_shape(lambda: apply(variables, mutable=[LOOK, LOOK_SLOPES])[1])

  def product(slopes):
    features, state = apply(variables | {LOOK_SLOPES: slopes}, mutable=[LOOK])
    vector = features.pooled(feature)
    along = jax.lax.stop_gradient(vector) if target is None else target
    return (vector * along).sum(), (jax.tree.leaves(state[LOOK])[0], features)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape[LOOK_SLOPES])
  slopes, (weights, features) = jax.grad(product, has_aux=True)(zeros)
  slopes = jax.tree.leaves(slopes)[0]  # [L, B, H, N, N], as the weights
  prefix, grid = model.num_prefix_tokens, features.grid
  token = jnp.arange(weights.shape[-1])
  asks = token == 0 if feature == 'cls' and model.class_token else token >= prefix
  asks = asks / asks.sum()  # [N]: which tokens the feature is the mean of
  rows = {'heads': jnp.einsum('n,bhnm->bhm', asks, weights[-1]), 'rollout': asks @ rollout(weights),
          'relevance': asks @ relevance(weights, slopes)}
  rows['attention'] = rows['heads'].mean(axis=1)
  return {k: v[..., prefix:].reshape(*v.shape[:-1], *grid) for k, v in rows.items()}


def rollout(weights: jax.Array) -> jax.Array:
  """Attention rollout [B, N, N] of weights [L, B, H, N, N]: how tokens at the end are made of those at the start."""
  identity = jnp.eye(weights.shape[-1])
  step = lambda total, block: ((0.5 * block.mean(axis=1) + 0.5 * identity) @ total, None)
  return jax.lax.scan(step, jnp.broadcast_to(identity, weights.shape[1:2] + identity.shape), weights)[0]


def relevance(weights: jax.Array, slopes: jax.Array) -> jax.Array:
  """Relevance [B, N, N] less the identity that it begins with, of weights and their slopes [L, B, H, N, N]."""
  identity = jnp.broadcast_to(jnp.eye(weights.shape[-1]), weights.shape[1:2] + weights.shape[-2:])
  step = lambda total, block: (total + jnp.maximum(block[0] * block[1], 0).mean(axis=1) @ total, None)
  return jax.lax.scan(step, identity, (weights, slopes))[0] - identity
