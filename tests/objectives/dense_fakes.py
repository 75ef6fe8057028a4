"""What tests of methods that restore images share: tiny encoders of volumes, and batches that lack what they may lack."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models import create_model
from jaxmed.objectives.dense import decoding

COUNT = 3
MODELS = {'swin_unetr': ('swin_unetr_micro', (16, 16, 16), dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2))),
          'unet': ('resenc_micro', (8, 8, 8), dict(depths=(1, 1), dims=(8, 16), stem_width=8)),
          'channel_vit': ('channel_vit_micro/2x4x4', (4, 8, 8), dict(embed_dim=16, depth=1, num_heads=2))}


def encoder(family):
  name, size, options = MODELS[family]
  return create_model(name, size, 2, **options)


def batch(family):
  """Noise; of the channel ViT's records one lacks a channel, one ends early and has another order: the rest is NaN."""
  rng, size = np.random.default_rng(0), MODELS[family][1]
  image = rng.normal(size=(COUNT, *size, 2)).astype(np.float32)
  out = {'channels': np.broadcast_to(np.arange(2), (COUNT, 2))}
  if family == 'channel_vit':
    mask, sizes = np.asarray([[1, 1], [1, 0], [1, 1]], bool), np.asarray([[4, 8, 8], [4, 8, 8], [2, 4, 8]])
    inside = np.stack([np.all(np.moveaxis(np.indices(size), 0, -1) < own, axis=-1) for own in sizes])
    known = inside[..., None] & mask[:, None, None, None]
    out = {'channels': np.asarray([[0, 1], [0, 1], [1, 0]]), 'channel_mask': mask, 'sizes': sizes}
    image = np.where(known, image, np.nan)
  return jax.tree.map(jnp.asarray, out | {'image': image})


@functools.cache
def start(method, family, **options):
  """(objective, unboxed variables, batch)."""
  objective, data = method(encoder(family), **options), batch(family)
  return objective, nn.unbox(jax.jit(objective.init)(jax.random.key(0), data)), data


@functools.partial(jax.jit, static_argnums=(0, 1))
def everything(objective, show, params, data, key):
  """(loss, metrics, gradients), what `show(objective, key, data)` gives, and the outputs and vectors that follow."""
  loss = lambda p: objective.loss({'params': p, 'target': {}, 'extra': {}}, data, key, 0)
  (value, (metrics, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  first, second = jax.random.split(key)
  shown = show(objective, first, data)
  outputs, features, *_ = decoding.decode(objective.encoder, objective.network, params, shown[0], True, {'dropout': second})
  return (value, metrics, grads), shown, outputs[0], features.pooled('mean')
