"""Losses, gradients and state of every method on one device and over meshes of simulated ones; run as a process."""

import concurrent.futures
import dataclasses
import functools
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import AxisType, Mesh

from jaxmed.augment.channels import CHANNEL_SAMPLING
from jaxmed.augment.views import ViewMaker
from jaxmed.models import create_model
from jaxmed.models.layers import packing
from jaxmed.models.layers.channel_attention import KINDS
from jaxmed.models.registry import default_options
from jaxmed.models.text.registry import create_text
from jaxmed.objectives import METHODS, filled
from jaxmed.parallel import mesh as mesh_lib

COUNT, STEP = 8, 1000  # a sample a device; a step at which queues, clusters and the Gram loss are in use
MESHES = {'one': {}, 'data=8': {'data': 8}, 'fsdp=2 data=4': {'fsdp': 2, 'data': 4},
          'replica=2 sequence=2 tensor=2': {'replica': 2, 'sequence': 2, 'tensor': 2},
          'fsdp=2 data=2': {'fsdp': 2, 'data': 2}, 'fsdp=2 tensor=2': {'fsdp': 2, 'tensor': 2}}
TRANSFORMER = ('channel_vit_micro/4', 16, dict(embed_dim=16, depth=1, num_heads=2))
RESNET = ('resnet_micro', 16, dict(depths=(1, 1), dims=(8, 16), stem_width=8))
CONVNEXT = ('convnextv2_micro', 16, dict(depths=(1, 1), dims=(8, 16)))
# One method of each kind with batch norm in the encoder or with hidden places.
CONVOLUTIONAL = {'mae': CONVNEXT, 'simmim': RESNET, 'data2vec': RESNET, 'dino': RESNET, 'simclr': RESNET,
                 'supervised': CONVNEXT, 'segment': RESNET, 'spark': RESNET}
# Networks of masks: tokens of images, a U-Net of volumes, windows of volumes that are shifted in the second block.
SEGMENTERS = (('vit_micro/4', 16, dict(embed_dim=16, depth=1, num_heads=2)),
              ('stunet_micro', (8, 8, 8), dict(depths=(1, 1), dims=(8, 16), strides=(1, 2))),
              ('swin_unetr_micro', (16, 16, 16), dict(depths=(2, 1), dims=(8, 16), num_heads=(2, 4), window_size=3)))
EIGHT = ('data=8', 'fsdp=2 data=4', 'replica=2 sequence=2 tensor=2')
# Meshes that have every axis between them; the cases take turns, so that each family of methods meets both.
EVERY_AXIS = ('fsdp=2 data=4', 'replica=2 sequence=2 tensor=2')
# On meshes with this word samples share rows of tokens; the one device they are compared with has them padded.
PACKED = 'packed '
ROWS = tuple(PACKED + mesh for mesh in ('one', 'fsdp=2 data=2', 'replica=2 sequence=2 tensor=2'))
ALL = {name: (name, TRANSFORMER, (PACKED + EVERY_AXIS[i % 2],)) for i, name in enumerate(METHODS)}
HIDING = {f'{name} {model[0]}': (name, model, ('data=8', EVERY_AXIS[i % 2]))
          for i, (name, model) in enumerate(CONVOLUTIONAL.items())}
CASES = ALL | HIDING | {f'{name} packed': (name, TRANSFORMER, ROWS) for name in ('mae', 'dino')} | {
    f'simmim {kind}': ('simmim', (*TRANSFORMER[:2], TRANSFORMER[2] | {'channel_attention': kind}),
                       ('data=8', ('fsdp=2 data=4', 'fsdp=2 tensor=2')[i % 2]))
    for i, kind in enumerate(kind for kind in KINDS if kind != 'joint')} | {
    f'segment {model[0]}': ('segment', model, EIGHT) for model in SEGMENTERS}
FAST = ('mae', 'simclr')  # of the first tier
SAMPLINGS = tuple(kind for kind in CHANNEL_SAMPLING if kind != 'none')
MISSING = np.nan
# Options by name, for every method that has them.
OPTIONS = dict(
    rows=COUNT, num_classes=3, out_dim=8, patch_out_dim=6, hidden_dim=16, bottleneck_dim=6, num_prototypes=5,
    num_sets=2, queue_length=7, queue_start=0, slices=8, chunk=5, gram_weight=1.0, mask_size=8, masks=2, mask_ratio=0.5,
    decoder_dim=16, decoder_depth=1, decoder_heads=2, decoder_groups=4, predictor_dim=16, predictor_depth=1,
    predictor_heads=2,
    start_temperature=0.2, code=8, depths=(1, 0), code_noise=0.0, teacher_temperature=0.3, values=(0, 1, 2), bases=9,
    boundary_weight=0.1, mean=1.0, std=2.0, feature_dim=8, flow_dims=(8, 8), casa_heads=2,
    casa_hidden=16, casa_dropout=0.0, tries=20, patch_slices=2, layers=3, tokens=4, anchors=2,
    dim=16)


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
  rng = np.random.default_rng(0)
  objective, batch = method(encoder, **known), batch_of(rng, method, size)
  if encoder.supports.sizes and 'gram' not in batch:
    batch = sized(rng, batch, (size // 2, size * 3 // 4, size))
  if 'text' in method.TOWERS:
    words = create_text(method.DEFAULTS['towers']['text']['model'], 7, embed_dim=16, depth=1, num_heads=2)
    objective = dataclasses.replace(objective, towers=FrozenDict({'text': words}))
  shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
  if method.WHOLE:  # a frozen run of another method on the same encoder
    wholes = {tower: METHODS[other](encoder, **filled(METHODS[other], **OPTIONS)) for tower, other in method.WHOLE.items()}
    objective = dataclasses.replace(objective, towers=FrozenDict(wholes))
    shapes |= {'fixed': {tower: jax.eval_shape(whole.init, jax.random.key(0), batch)['params']
                         for tower, whole in wholes.items()}}
  variables = jax.tree_util.tree_map_with_path(lambda path, x: draw(rng, path, x), nn.unbox(shapes))
  return objective, shapes, variables, batch


def draw(rng, path, x):
  """A random value of a leaf around its usual size."""
  name, noise = path[-1].key, rng.normal(size=x.shape)
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


def group(rng, views, size):
  """Noise of two channels, of which some are missing; the teacher may see more than the student."""
  there = rng.random((COUNT, 1, 2)) < 0.7
  there[..., 0] |= ~there.any(axis=-1)
  there = np.broadcast_to(there, (COUNT, views, 2))
  seen = there & (rng.random(there.shape) < 0.7)
  seen = np.where(seen.any(axis=-1, keepdims=True), seen, there)
  grid = grid_of(size)
  image = rng.normal(size=(COUNT, 1, *(1,) * len(grid), 2)) + rng.normal(size=(COUNT, views, *grid, 2))
  there_at = there.reshape(COUNT, views, *(1,) * len(grid), 2)
  return {'image': np.float32(np.where(there_at, image, MISSING)), 'channel_mask': seen,
          'teacher_mask': there, 'channels': np.broadcast_to(np.arange(2, dtype=np.int32), (COUNT, views, 2))}


def grid_of(size):
  """The grid of an image; one number is a square."""
  return size if isinstance(size, tuple) else (size, size)


def sized(rng, batch, sides):
  """The batch with (global) images that have one of these sides each; what lies beyond may be anything."""
  own = batch.get('global', batch)
  lead, size = own['channels'].shape[:-1], own['image'].shape[-2]
  sizes = rng.choice(sides, size=(*lead, 2)).astype(np.int32)
  if batch['index'].ndim == 2:  # a window, whose records are cut alike
    sizes[:] = sizes[:, :1]
  along = lambda axis: np.arange(size) < sizes[..., axis, None]
  inside = along(0)[..., :, None, None] & along(1)[..., None, :, None]
  own = own | {'image': np.where(inside, own['image'], np.float32(MISSING)), 'sizes': sizes}
  return batch | {'global': own} if 'global' in batch else own


def batch_of(rng, method, size):
  """What the method's view maker gives: groups of views, or one view a sample."""
  augment = method.DEFAULTS.get('augment', {})
  rest = {'label': np.arange(COUNT, dtype=np.int32) % 3, 'index': np.arange(COUNT, dtype=np.int32)}
  if augment.get('views', 1) == 1 and not augment.get('local_views'):
    batch = {k: v[:, 0] for k, v in group(rng, 1, size).items() if k != 'teacher_mask'} | rest
    if method.WINDOWS:
      return windows(batch, lambda: {k: v[:, 0] for k, v in group(rng, 1, size).items() if k in batch})
    wanted = {*method.FIELDS, *(['signal_mask'] if 'signal' in method.FIELDS else [])}
    return batch | {name: value for name, value in _told(rng, size).items() if name in wanted}
  batch = rest | {'global': group(rng, augment.get('views', 2), size)}
  if method.WINDOWS:
    return rest | {'global': windows(batch['global'], lambda: group(rng, augment['views'], size))} | blank(4)
  if 'tiles' in augment:
    start = rng.integers(0, size // 2, (COUNT, augment['views'], 2))
    batch['global']['view_box'] = np.float32(np.concatenate([start, start + size], axis=-1))
  if augment.get('local_views'):
    batch['local'] = {k: v for k, v in group(rng, 2, size // 2).items() if k != 'teacher_mask'}
  if hasattr(method, 'gram_weight'):
    batch['gram'] = {k: v for k, v in group(rng, augment['views'], 2 * size).items() if k != 'teacher_mask'}
  return batch


def windows(record, more):
  """Four records a sample, with the channels of the first."""
  records = [record | {'image': more()['image']} for _ in range(4)]
  for other in records:
    there = record['channel_mask']
    other['image'] = np.where(there.reshape(*there.shape[:-1], *[1] * (other['image'].ndim - there.ndim), -1),
                              np.nan_to_num(other['image']), MISSING)
  return {k: np.stack([r[k] for r in records], axis=1) if k not in ('label', 'index') else v
          for k, v in record.items()} | (blank(4) if 'index' in record else {})


def blank(length):
  """Rows of windows, of which the first has one record and the second three."""
  index = np.arange(length * COUNT, dtype=np.int32).reshape(COUNT, length)
  index[0, 1:], index[1, 3:] = -1, -1
  return {'index': index, 'label': index % 3}


def _told(rng, size):
  """Masks of three classes with pixels that are not annotated, classes that are not, numbers and texts, of which some lack."""
  return {'mask': rng.integers(-1, 3, (COUNT, *grid_of(size)), np.int32), 'annotated': rng.random((COUNT, 3)) < 0.7,
          'text': np.where(rng.random((COUNT, 7)) < 0.8, rng.integers(1, 257, (COUNT, 7)), 0) * (np.arange(COUNT) > 0)[:, None],
          'signal': np.float32(rng.integers(-1, 2, (COUNT, 1, 7))), 'signal_mask': np.arange(COUNT)[:, None] > 0,
          'number': np.float32(np.where(rng.random(COUNT) < 0.3, np.nan, rng.normal(size=COUNT)))}


def largest(tree):
  """The largest absolute value; NaN where one is."""
  return float(np.max([np.abs(x).max(initial=0.0) for x in jax.tree.leaves(tree)], initial=0.0))


def mesh_of(name):
  """The mesh of that name, over as many devices as it needs."""
  shape = [MESHES[name].get(axis, 1) for axis in mesh_lib.AXES]
  return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), mesh_lib.AXES,
              axis_types=(AxisType.Auto,) * len(shape))


def compare(name, model, meshes):
  """By mesh: relative error of the loss, error of gradients by the largest one, error of metrics, statistics, extra."""
  objective, shapes, variables, batch = start(name, model)

  def loss(objective, params, variables, batch, key):
    return objective.loss(variables | {'params': params}, batch, key, STEP)

  padded, packed = (jax.jit(jax.value_and_grad(functools.partial(loss, known), has_aux=True)) for known in (
      objective, dataclasses.replace(objective, encoder=objective.encoder.clone(**filling(objective.encoder)))))

  def outcome(name):
    """(loss, gradients, (metrics, extra)) with the state laid out as in a run, and the batch cut over the mesh."""
    mesh, gradient = mesh_of(name.removeprefix(PACKED)), packed if name.startswith(PACKED) else padded
    state = jax.device_put(variables, mesh_lib.shardings(shapes, mesh))
    data = jax.tree.map(lambda x: mesh_lib.put_batch({'x': x}, mesh)['x'], batch)
    with jax.set_mesh(mesh):
      (value, aux), grads = gradient(state['params'], state, data, jax.random.key(3))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (value, grads, aux))

  one = outcome('one')
  out = {'loss': float(one[0]), 'gradient': largest(one[1])}
  for mesh in meshes:
    value, grads, aux = jax.tree.map(lambda a, b: a - b, one, outcome(mesh))
    aux = jax.tree.map(lambda error, x: error / (1 + np.abs(x).max(initial=0.0)), aux, one[2])
    out[mesh] = [largest(value) / abs(one[0]), largest(grads) / largest(one[1]), largest(aux)]
  return out


def filling(encoder):
  """The option that packs tokens, in as many rows as there are samples, so that they fit for sure."""
  return {'packing': 1.0} if encoder.supports.one_pass else {}


def sampled(kind):
  """The largest difference between views of a sampling of channels on one device and over a mesh, as a share of the
  largest number in them, and how many channels it left of how many."""
  rng = np.random.default_rng(3)
  there = rng.random((COUNT, 4)) < 0.7
  there[:, 0] = True
  batch = {'image': rng.integers(0, 255, (COUNT, 12, 12, 4), np.uint8), 'channel_mask': there,
           'channels': np.stack([rng.permutation(5)[:4] for _ in range(COUNT)]).astype(np.int32)}
  vectors = rng.normal(size=(5, 5))
  known = {'similarity': np.float32(vectors @ vectors.T)} if kind == 'diverse' else {}
  maker = jax.jit(ViewMaker((8, 8), (1.0,) * 5, (2.0,) * 5, views=2, local_views=2, local_size=(4, 4),
                            channel_sampling=kind))

  def views(name):
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
      return jax.tree.map(np.asarray, maker(jax.random.key(1), mesh_lib.put_batch(batch, mesh) | known))

  one, many = views('one'), views('fsdp=2 data=4')
  off = jax.tree.map(lambda a, b: np.abs(a.astype(np.float64) - b).max(), one, many)
  return [largest(off) / largest(one), float(one['global']['channel_mask'].mean()), float(there.mean())]


def moved():
  """How many times tokens cross devices when they are packed and come back, forwards and backwards."""
  mesh, rng = mesh_of('fsdp=2 data=4'), np.random.default_rng(0)
  data = mesh_lib.put_batch({'x': np.float32(rng.normal(size=(32, 10, 8))), 'valid': rng.random((32, 10)) < 0.5}, mesh)

  def total(x, valid):
    plan = packing.plan(valid, packing.groups(32), 0.75, 2)
    return jnp.square(plan.unpack(jnp.sin(plan.pack(x)))).sum()

  with jax.set_mesh(mesh):
    text = jax.jit(jax.value_and_grad(total)).lower(data['x'], data['valid']).compile().as_text()
  return sum(text.count(f' {name}(') for name in ('all-gather', 'all-to-all', 'collective-permute'))


def main(names):
  """Prints JSON {case: comparison} of these cases; two at a time, as compiling takes one core each."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = pool.map(lambda name: compare(*CASES[name]), names)
    out = dict(zip(names, found, strict=True))
  views = {kind: sampled(kind) for kind in SAMPLINGS}
  print(json.dumps(out | {'devices': jax.device_count(), 'sampled': views, 'moved': moved()}))


if __name__ == '__main__':
  main(sys.argv[1:])
