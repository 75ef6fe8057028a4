"""The table of what lies where: bytes against sums by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxmed.models import create_model
from jaxmed.objectives import MAE
from jaxmed.parallel import mesh as m
from jaxmed.parallel import sharding_table
from jaxmed.train.optimizer import Optimizer
from jaxmed.train.step import Trainer


def trainer_of(model):
  objective = MAE(model, decoder_dim=32, decoder_depth=1, decoder_heads=2)
  batch = {'image': jnp.zeros((2, 16, 16, 3)), 'channels': jnp.zeros((2, 3), int)}
  return Trainer(objective, Optimizer(1e-3, 10), lambda rng, batch: batch), batch


def abstract(model, **sizes):
  """Shapes and shardings of a run's state on a mesh that need not exist."""
  mesh = AbstractMesh(tuple(({a: 1 for a in m.AXES} | sizes).values()), m.AXES)
  trainer, batch = trainer_of(model)
  return trainer.abstract(batch, mesh)


def size(tree):
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_bytes():
  model = create_model('vit_micro/8', 16, 3, embed_dim=32, depth=2, num_heads=2)
  one, many = abstract(model), abstract(model, fsdp=4, tensor=2)
  assert sharding_table.bytes_per_device(one.params) == size(one.params)
  found = {r.name: r for r in sharding_table.rows(many.params)}
  qkv = found['encoder/transformer/blocks/attn/qkv/kernel']
  assert (qkv.shape, qkv.sharding) == ((2, 32, 3, 2, 16), '-, fsdp, -, tensor, -')
  assert qkv.bytes == 4 * 2 * 32 * 3 * 2 * 16 // 8
  bias = found['encoder/transformer/blocks/attn/qkv/bias']
  assert (bias.sharding, bias.bytes) == ('-, -, tensor, -', 4 * 2 * 3 * 2 * 16 // 2)
  assert found['encoder/transformer/blocks/mlp/fc1/kernel'].sharding == '-, fsdp, tensor'
  assert sum(r.bytes for r in sharding_table.rows(many.params)) == sharding_table.bytes_per_device(many.params)
  assert sharding_table.bytes_per_device(many.moments['mu']) == sharding_table.bytes_per_device(many.params)
  share = sharding_table.bytes_per_device(many.params) / size(many.params)
  assert 1 / 8 < share < 1 / 4


def test_text():
  many = abstract(create_model('vit_micro/8', 16, 3, embed_dim=32, depth=2, num_heads=2), fsdp=2)
  text = sharding_table.table(many, 10**9)
  params, moments = (sharding_table.bytes_per_device(x) / 1e6 for x in (many.params, many.moments))
  assert f'params {params:.1f} MB, moments {moments:.1f} MB; {params + moments:.1f} MB of 1.0 GB' in text
  assert 'encoder/norm/bias' in text and 'fsdp' in text
  assert sharding_table.device_memory() > 10**8


def test_alike_arrays_are_one_row():
  arrays = {f'block{i}': {'kernel': jnp.ones((4, i // 2 + 1), np.float32)} for i in range(4)}
  arrays = jax.device_put(arrays, m.replicated(m.make_mesh({})))
  assert [dataclasses.astuple(r) for r in sharding_table.rows(arrays)] == [
      ('block*/kernel', (4, 1), '', 2, 32), ('block*/kernel', (4, 2), '', 2, 64)]


def test_the_state_decides_how_many_devices_share_it():
  """The fewest for which each device's part takes at most 40 % of its memory; all of them where none is enough."""
  model = create_model('vit_micro/8', 16, 3, embed_dim=32, depth=2, num_heads=2)
  trainer, batch = trainer_of(model)
  boxed, whole = jax.eval_shape(trainer.create, batch), {a: 1 for a in m.AXES} | {'data': 12, 'tensor': 2}
  bytes_of = {n: sharding_table.bytes_per_device(abstract(model, data=12 // n, fsdp=n, tensor=2)) for n in (1, 2, 3, 4, 6, 12)}
  chosen = lambda memory: sharding_table.fitted(boxed, whole, memory)
  assert chosen(bytes_of[1] / 0.4 + 1) == whole
  assert bytes_of[2] < bytes_of[1] and bytes_of[4] < bytes_of[2]
  assert chosen(bytes_of[1] / 0.4 - 1)['fsdp'] == 2
  # No axis of width 32 divides by 3, 6 or 12, so these cut nothing.
  assert chosen(bytes_of[2] / 0.4 - 1) == whole | {'data': 3, 'fsdp': 4}
  assert chosen(1.0)['fsdp'] == 12
