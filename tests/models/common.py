"""Small models with every parameter away from its initial value, made without compiling an initialiser."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models import create_model


def build(name, size, channels=3, seed=0, **options):
  model = create_model(name, size, channels, **({'depth': 2, 'embed_dim': 48, 'num_heads': 3} | options))
  example = jax.ShapeDtypeStruct((1, *model.image_size, channels), jnp.float32)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
  rng = np.random.default_rng(seed)

  def draw(path, s):
    if path[-1].key == 'kernel':
      return jnp.asarray(rng.normal(size=s.shape) * 0.15, jnp.float32)
    return jnp.asarray((path[-1].key == 'scale') + 0.3 * rng.normal(size=s.shape), jnp.float32)

  return model, jax.tree_util.tree_map_with_path(draw, shapes)


def normal(shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def features(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)
