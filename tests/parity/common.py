"""What the parity tests share: random weights worth comparing, and both sides' features of the same image."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models import create_model


def build(name, size, channels, **options):
  """A model with every tensor random around its usual scale, so that a swapped or forgotten one shows."""
  model = create_model(name, size, channels, **options)
  example = jax.ShapeDtypeStruct((1, *model.image_size, channels), jnp.float32)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
  rng = np.random.default_rng(0)

  def draw(path, s):
    name = path[-1].key
    if name == 'scale' or name.startswith('ls'):
      return jnp.asarray(1 + 0.2 * rng.normal(size=s.shape), jnp.float32)
    if name == 'kernel':
      fan_in = np.prod(s.shape[1:2] if path[0].key == 'transformer' else s.shape[:1])
      return jnp.asarray(rng.normal(size=s.shape) / fan_in**0.5, jnp.float32)
    return jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32)

  return model, jax.tree_util.tree_map_with_path(draw, shapes)


def image(shape, seed=1):
  """float32 [B, *size, C] standard normal."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, *args):
  return model.apply({'params': params}, *args)


def tokens(model, params, x, channels=None):
  """All tokens of the JAX model [B, prefix + N, D], as timm orders them."""
  f = features(model, params, jnp.asarray(x), channels)
  parts = [p for p in (None if f.cls is None else f.cls[:, None], f.registers, f.patches) if p is not None]
  return np.asarray(jnp.concatenate(parts, axis=1))


def assert_same(have, want):
  """The bar: 1e-4 for the largest absolute difference, 1e-5 for the mean one relative to the mean size."""
  assert have.shape == want.shape
  difference = np.abs(have.astype(np.float64) - want.astype(np.float64))
  assert difference.max() <= 1e-4, difference.max()
  assert difference.mean() <= 1e-5 * np.abs(want).mean(), difference.mean() / np.abs(want).mean()
  assert want.std() > 0.1  # not comparing zeros with zeros
