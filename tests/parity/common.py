"""What the parity tests share: random weights worth comparing, and both sides' features of the same image."""

import jax
import jax.numpy as jnp
import numpy as np


def randomise(params, seed=0):
  """Every tensor random around its usual scale, so that a swapped or forgotten one shows (biases, norms, gammas)."""
  rng = np.random.default_rng(seed)

  def draw(path, a):
    name = path[-1].key
    if name == 'scale' or name.startswith('ls'):
      return jnp.asarray(1 + 0.2 * rng.normal(size=a.shape), jnp.float32)
    if name == 'kernel':
      fan_in = np.prod(a.shape[1:2] if path[0].key == 'transformer' else a.shape[:1])
      return jnp.asarray(rng.normal(size=a.shape) / fan_in**0.5, jnp.float32)
    return jnp.asarray(0.2 * rng.normal(size=a.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, params)


def image(shape, seed=1):
  """float32 [B, *size, C] standard normal."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(model, params, x, channels=None):
  """All tokens of the JAX model [B, prefix + N, D], as timm orders them."""
  f = jax.jit(model.apply)({'params': params}, jnp.asarray(x), channels)
  parts = [p for p in (None if f.cls is None else f.cls[:, None], f.registers, f.patches) if p is not None]
  return np.asarray(jnp.concatenate(parts, axis=1))


def assert_same(have, want):
  """The bar: 1e-4 for the largest absolute difference, 1e-5 for the mean difference relative to the mean size."""
  assert have.shape == want.shape
  difference = np.abs(have.astype(np.float64) - want.astype(np.float64))
  assert difference.max() <= 1e-4, difference.max()
  assert difference.mean() <= 1e-5 * np.abs(want).mean(), difference.mean() / np.abs(want).mean()
  assert want.std() > 0.1  # not comparing zeros with zeros
