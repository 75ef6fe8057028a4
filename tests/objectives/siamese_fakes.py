"""What tests of methods with several views share: tiny encoders of every kind, batches of views, NumPy heads."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models import create_model
from jaxmed.models.layers.defaults import EncoderDefaults
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.models.layers.tokens import Features, patchify
from jaxmed.models.layers.transformer import Dense

TINY = dict(embed_dim=16, depth=1, num_heads=2)


class Conv(EncoderDefaults, nn.Module):
  """A convolution of stride 4 with batch norm: no class token, running statistics, no stochastic depth."""

  image_size: tuple[int, ...] = (8, 8)
  patch_size: tuple[int, ...] = (4, 4)
  in_channels: int = 2
  embed_dim: int = 16
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, image, channels=None, channel_mask=None, train=False, hidden=None):
    if channel_mask is not None:
      image = jnp.where(channel_mask[:, None, None, :], image, 0)
    x = Dense((self.embed_dim,), ('patch', 'embed'), name='dense')(patchify(image, self.patch_size))
    return Features(None, None, jax.nn.relu(BatchNorm(name='norm')(x, train)))


def encoder(kind, **options):
  if kind == 'conv':
    return Conv()
  name, size = {'vit': ('vit_micro/4', (8, 8)), 'channel': ('channel_vit_micro/4', (8, 8)),
                'channel 3D': ('channel_vit_micro/2x4x4', (4, 8, 8))}[kind]
  return create_model(name, size, 2, **(TINY | options))


def group(rng, count, views, size, masked):
  out = {'image': jnp.asarray(rng.normal(size=(count, views, *size, 2)), jnp.float32),
         'channels': jnp.broadcast_to(jnp.arange(2), (count, views, 2))}
  if masked:
    mask = rng.random((count, views, 2)) < 0.6
    mask[..., 0] |= ~mask.any(axis=-1)
    out['channel_mask'] = jnp.asarray(mask)
    out['image'] = jnp.where(jnp.asarray(mask).reshape(count, views, *[1] * len(size), 2), out['image'], jnp.nan)
  return out


def batch(kind='vit', count=6, views=2, local=0, seed=0):
  """Views of noise; a channel ViT's miss channels, whose pixels are NaN."""
  rng = np.random.default_rng(seed)
  size = encoder(kind).image_size
  out = {'global': group(rng, count, views, size, kind.startswith('channel')),
         'label': jnp.zeros(count, jnp.int32), 'index': jnp.arange(count)}
  if local:
    small = (*size[:-2], 4, 4)
    out['local'] = group(rng, count, local, small, kind.startswith('channel'))
  return out


@functools.partial(jax.jit, static_argnums=0)
def _init(objective, data):
  return objective.init(jax.random.key(0), data)


@functools.partial(jax.jit, static_argnums=0)
def _extra(objective, data):
  return objective.init(jax.random.key(0), data)['extra']


def start(method, kind='vit', data=None, **options):
  """(objective, unboxed variables with every parameter random, batch); traced once for equal objectives and shapes."""
  data = batch(kind) if data is None else data
  objective = method(encoder(kind), **options)
  shapes = nn.unbox(_init.eval_shape(objective, data))
  rng = np.random.default_rng(1)

  def draw(path, x):
    name, noise = path[-1].key, rng.normal(size=x.shape)
    if name in ('mean', 'var'):
      return jnp.full(x.shape, float(name == 'var'))
    return jnp.asarray(noise / max(x.shape[0], 1) ** 0.5 if name == 'kernel' else (name == 'scale') + 0.2 * noise, x.dtype)

  drawn = {name: jax.tree_util.tree_map_with_path(draw, shapes[name]) for name in ('params', 'target')}
  extra = _extra(objective, data) if jax.tree.leaves(shapes['extra']) else shapes['extra']
  return objective, drawn | {'extra': extra}, data


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vectors(encoder, feature, params, image, channels, mask):
  return encoder.apply({'params': params}, image, channels, mask, False).pooled(feature)


def features(objective, params, views, feature='cls'):
  """Vectors [B, V, D] in float64, one view at a time."""
  out = []
  for v in range(views['image'].shape[1]):
    mask = views['channel_mask'][:, v] if 'channel_mask' in views else None
    out.append(_vectors(objective.encoder, feature, params, views['image'][:, v], views['channels'][:, v], mask))
  return np.stack([np.asarray(x, np.float64) for x in out], axis=1)


def numpy_norm(x):
  return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)


def numpy_head(params, x):
  """Dense layers with batch norm and ReLU on x [N, D] by the batch's statistics, as the names of params say."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  last = sum(name.startswith('dense') for name in params) - 1
  for i in range(last + 1):
    x = x @ params[f'dense{i}']['kernel'] + params[f'dense{i}'].get('bias', 0)
    if f'norm{i}' in params:
      x = numpy_norm(x) * params[f'norm{i}'].get('scale', 1) + params[f'norm{i}'].get('bias', 0)
    x = np.maximum(x, 0) if i < last else x
  return x


def each_view(params, x):
  return np.stack([numpy_head(params, x[:, v]) for v in range(x.shape[1])], axis=1)


def all_views(params, x):
  return numpy_head(params, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def _loss(objective, variables, data, key, step, train):
  return objective.loss(variables, data, key, step, train=train)


def evaluate(objective, variables, data, step=0, train=True, seed=3):
  """(loss, (metrics, extra)); compiled once for equal objectives and shapes."""
  return _loss(objective, variables, data, jax.random.key(seed), step, train=train)


def close(have, want, relative=1e-5):
  assert abs(float(have) - want) <= relative * max(abs(want), 1e-3), (float(have), want)


def check_gradient(loss, reference, *arrays, relative=1e-4):
  """The gradient of a JAX loss along random directions is the difference quotient of its float64 reference."""
  rng = np.random.default_rng(7)
  arrays = [np.asarray(a, np.float64) for a in arrays]
  grads = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))(*(jnp.asarray(a, jnp.float32) for a in arrays))
  for _ in range(3):
    along = [rng.normal(size=a.shape) for a in arrays]
    h = 1e-5
    up = reference(*(a + h * d for a, d in zip(arrays, along)))
    down = reference(*(a - h * d for a, d in zip(arrays, along)))
    want = (up - down) / (2 * h)
    have = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(grads, along))
    size = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads))
    assert abs(have - want) <= relative * max(abs(want), size), (have, want)


def options_of(method):
  return {f.name for f in dataclasses.fields(method)}
