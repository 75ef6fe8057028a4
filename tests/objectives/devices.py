"""Losses, gradients and state of every method on one device and over meshes of simulated ones; run as a process."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmed.models import create_model
from jaxmed.models.registry import default_options
from jaxmed.objectives import METHODS, filled
from jaxmed.parallel import mesh as mesh_lib

COUNT, STEP = 8, 1000  # a sample a device; a step at which queues, clusters and the Gram loss are in use
MESHES = {'data=2': {'data': 2}, 'data=8': {'data': 8}, 'fsdp=2 data=4': {'fsdp': 2, 'data': 4}}
TRANSFORMER = ('channel_vit_micro/4', 16, dict(embed_dim=16, depth=1, num_heads=2))
RESNET = ('resnet_micro', 16, dict(depths=(1, 1), dims=(8, 16), stem_width=8))
CONVNEXT = ('convnextv2_micro', 16, dict(depths=(1, 1), dims=(8, 16)))
# One method of each kind with batch norm in the encoder or with hidden places.
CONVOLUTIONAL = {'mae': CONVNEXT, 'simmim': RESNET, 'data2vec': RESNET, 'dino': RESNET, 'simclr': RESNET,
                 'supervised': CONVNEXT}
CASES = {name: (name, TRANSFORMER) for name in METHODS} | {
    f'{name} {model[0]}': (name, model) for name, model in CONVOLUTIONAL.items()}
# Options by name, for every method that has them.
OPTIONS = dict(
    rows=COUNT, num_classes=3, out_dim=8, patch_out_dim=6, hidden_dim=16, bottleneck_dim=6, num_prototypes=5, num_sets=2,
    queue_length=7, queue_start=0, slices=8, chunk=5, gram_weight=1.0, mask_size=8, masks=2, mask_ratio=0.5, decoder_dim=16,
    decoder_depth=1, decoder_heads=2, decoder_groups=4, predictor_dim=16, predictor_depth=1, predictor_heads=2,
    start_temperature=0.2, teacher_temperature=0.3)
RNG = np.random.default_rng(0)


def start(name, model):
  """(objective, boxed shapes of its variables, random variables, batch) of a method on a tiny encoder."""
  method, (family, size, sizes) = METHODS[name], model
  encoder_options = {k: v for k, v in method.DEFAULTS.get('encoder', {}).items() if k in default_options(family)}
  encoder = create_model(family, size, 2, **encoder_options | sizes)
  known = filled(method, **OPTIONS)
  if isinstance(getattr(method, 'mask_ratio', None), tuple):
    known['mask_ratio'] = (0.2, 0.6)
  if not getattr(method, 'separate_head', False):
    known.pop('patch_out_dim', None)
  objective, batch = method(encoder, **known), batch_of(method, size)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
  return objective, shapes, jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes)), batch


def draw(path, x):
  """A random value of a leaf around its usual size."""
  name, noise = str(getattr(path[-1], 'key', '')), RNG.normal(size=x.shape)
  if x.dtype == bool:
    return np.ones(x.shape, bool)
  if jnp.issubdtype(x.dtype, jnp.integer):
    return np.arange(noise.size, dtype=x.dtype).reshape(x.shape) % 2 if x.shape else np.array(7, x.dtype)
  if path[0].key == 'extra' and noise.ndim > 1 and len(path) == 2:  # vectors of length 1
    return np.float32(noise / np.linalg.norm(noise, axis=-1, keepdims=True))
  if name == 'kernel':
    return np.float32(noise / np.prod(x.shape[-2:-1]) ** 0.5)
  base = float(name in ('scale', 'var', 'length') or name.startswith('ls'))
  return np.float32(base + (0.2 * np.abs(noise) if name == 'var' else 0.2 * noise))


def group(views, size):
  """Noise of two channels with some missing, whose pixels are NaN; the teacher may see more than the student."""
  there = RNG.random((COUNT, 1, 2)) < 0.7
  there[..., 0] |= ~there.any(axis=-1)
  there = np.broadcast_to(there, (COUNT, views, 2))
  seen = there & (RNG.random(there.shape) < 0.7)
  seen = np.where(seen.any(axis=-1, keepdims=True), seen, there)
  image = RNG.normal(size=(COUNT, 1, 1, 1, 2)) + RNG.normal(size=(COUNT, views, size, size, 2))
  return {'image': np.float32(np.where(there[:, :, None, None], image, np.nan)), 'channel_mask': seen,
          'teacher_mask': there, 'channels': np.broadcast_to(np.arange(2, dtype=np.int32), (COUNT, views, 2))}


def batch_of(method, size):
  """What the method's view maker gives: groups of views, or one view a sample."""
  augment = method.DEFAULTS.get('augment', {})
  rest = {'label': np.arange(COUNT, dtype=np.int32) % 3, 'index': np.arange(COUNT, dtype=np.int32)}
  if augment.get('views', 1) == 1 and not augment.get('local_views'):
    return {k: v[:, 0] for k, v in group(1, size).items() if k != 'teacher_mask'} | rest
  batch = rest | {'global': group(augment.get('views', 2), size)}
  if augment.get('local_views'):
    batch['local'] = {k: v for k, v in group(2, size // 2).items() if k != 'teacher_mask'}
  if hasattr(method, 'gram_weight'):
    batch['gram'] = {k: v for k, v in group(augment['views'], 2 * size).items() if k != 'teacher_mask'}
  return batch


def outcome(objective, mesh, shapes, variables, batch):
  """(loss, gradients, (metrics, extra)) with the state laid out as a run does, and the batch sharded over the mesh."""
  variables = jax.device_put(variables, mesh_lib.shardings(shapes, mesh))
  batch = jax.tree.map(lambda x: mesh_lib.put_batch({'x': x}, mesh)['x'], batch)

  def loss(params, variables, batch, key):
    return objective.loss(variables | {'params': params}, batch, key, STEP)

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, aux), grads = gradient(variables['params'], variables, batch, jax.random.key(3))
  return jax.tree.map(lambda x: np.asarray(x, np.float64), (value, grads, aux))


def largest(tree):
  """The largest absolute value; NaN where something is not finite."""
  return float(max((np.abs(x).max(initial=0.0) for x in jax.tree.leaves(tree)), key=lambda v: (np.isnan(v), v),
                   default=0.0))


@functools.cache
def mesh_of(name):
  sizes = MESHES.get(name, {})
  shape = [sizes.get(axis, 1) for axis in mesh_lib.AXES]
  return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), mesh_lib.AXES)


def compare(name, model):
  """By mesh: relative error of the loss, error of gradients by the largest one, error of metrics, statistics, extra."""
  objective, *rest = start(name, model)
  one = outcome(objective, mesh_of('one'), *rest)
  out = {'loss': float(one[0]), 'gradient': largest(one[1])}
  for mesh in MESHES:
    many = outcome(objective, mesh_of(mesh), *rest)
    loss, gradient, aux = jax.tree.map(lambda a, b: a - b, one, many)
    scale = jax.tree.map(lambda a, b: a / (1 + np.abs(b).max(initial=0.0)), aux, one[2])
    out[mesh] = [largest(loss) / abs(one[0]), largest(gradient) / largest(one[1]), largest(scale)]
  return out


def main():
  """Prints JSON {case: comparison}."""
  print(json.dumps({case: compare(*what) for case, what in CASES.items()} | {'devices': jax.device_count()}))


if __name__ == '__main__':
  main()
