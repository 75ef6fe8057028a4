"""How logical axes become shardings: pure functions of sizes."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxmed.errors import UserError
from jaxmed.parallel import mesh as m
from jaxmed.parallel import process


@pytest.mark.parametrize('sizes', [{'data': 0}, {'data': 1}, {'replica': 1, 'data': 0, 'fsdp': 1, 'tensor': 1}, {}])
def test_one_device(sizes):
  mesh = m.make_mesh(sizes)
  assert dict(mesh.shape) == {'replica': 1, 'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
  assert m.batch_shards(mesh) == 1


@pytest.mark.parametrize('sizes', [
    {'data': 2}, {'data': 0, 'tensor': 0}, {'tensor': 8}, {'data': -1}, {'data': 0, 'fsdp': 3}])
def test_what_does_not_fit(sizes):
  with pytest.raises(UserError, match=r'mesh .* does not fit 1 devices: the sizes must multiply to 1'):
    m.make_mesh(sizes)


def sliced(slices, each):
  """What `make_mesh` asks of devices."""
  return [types.SimpleNamespace(slice_index=n, id=(n, i)) for n in range(slices) for i in range(each)]


@pytest.mark.parametrize('sizes, whole', [
    ({'data': 0}, 'data'), ({'data': 2, 'fsdp': 4}, 'data'), ({'data': 1, 'fsdp': 8}, 'fsdp'),
    ({'replica': 2, 'data': 1, 'fsdp': 2, 'tensor': 2}, 'replica'), ({'data': 2, 'tensor': 4}, 'data')])
def test_one_axis_runs_over_whole_slices(monkeypatch, sizes, whole):
  monkeypatch.setattr(m, '_grid', lambda shape, devices: np.array(devices, object).reshape(shape))
  monkeypatch.setattr(m, 'Mesh', lambda grid, axes, axis_types: (grid, axes))
  grid, axes = m.make_mesh(sizes, sliced(2, 4))
  index = np.vectorize(lambda d: d.slice_index)(grid)
  axis = axes.index(whole)
  for i, part in enumerate(np.split(index, 2, axis=axis)):
    assert (part == i).all()
  assert len({d.id for d in grid.flat}) == 8


@pytest.mark.parametrize('sizes', [{'data': 1, 'tensor': 8}, {'data': 1, 'sequence': 8}])
def test_slices_that_no_axis_can_be_cut_into(sizes):
  with pytest.raises(UserError, match='8 devices in 2 slices: mesh.replica, mesh.data or mesh.fsdp must be a multiple of 2'):
    m.make_mesh(sizes, sliced(2, 4))


def test_activations():
  """Without a mesh nothing is said; with one, axes that divide are cut."""
  x = jnp.ones((8, 6, 4))
  assert m.constrain(x, 'batch', 'tokens', None) is x and m.axis_size('sequence') == 1
  with jax.set_mesh(m.make_mesh({'data': 0})):
    assert m.constrain(x, 'batch', 'tokens', None) is x  # a mesh of one device


def spec(names, shape, **sizes):
  """The sharding of one parameter on a mesh that need not exist."""
  mesh = AbstractMesh(tuple(({a: 1 for a in m.AXES} | sizes).values()), m.AXES)
  boxed = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
  return m.shardings({'x': boxed}, mesh)['x'].spec


@pytest.mark.parametrize('names, shape, sizes, want', [
    (('embed', 'mlp'), (8, 32), dict(fsdp=4, tensor=2), P('fsdp', 'tensor')),
    (('embed', 'mlp'), (8, 32), dict(fsdp=4), P('fsdp', None)),
    (('embed', 'mlp'), (6, 32), dict(fsdp=4, tensor=2), P(None, 'tensor')),  # 6 does not divide by 4
    (('layers', 'embed', 'heads', None), (3, 8, 4, 2), dict(fsdp=4, tensor=4), P(None, 'fsdp', 'tensor', None)),
    (('embed', 'embed'), (8, 8), dict(fsdp=4), P('fsdp', None)),  # an axis is used once
    ((None, 'somewhere'), (8, 8), dict(fsdp=4, tensor=2), P(None, None)),
    (('embed',), (8,), dict(data=8), P(None)),
])
def test_rules(names, shape, sizes, want):
  assert spec(names, shape, **sizes) == want


def test_plain_leaves_are_everywhere():
  mesh = AbstractMesh((1, 2, 2, 1, 1), m.AXES)
  got = m.shardings({'step': jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
  assert got['step'].spec == P()
  assert m.batch_shards(mesh) == 4


def test_put_batch():
  mesh = m.make_mesh({'data': 0})
  batch = {'image': np.arange(24, dtype=np.uint8).reshape(4, 2, 3), 'label': np.arange(4, dtype=np.int32)}
  got = m.put_batch(batch, mesh)
  assert got['image'].sharding == m.batch_sharding(mesh)
  assert got['image'].dtype == np.uint8
  jax.tree.map(np.testing.assert_array_equal, got, batch)


def test_one_process():
  process.start()  # nothing to join
  assert jax.process_count() == 1
  assert process.is_main()
  assert process.any_process(True) is True
  assert process.any_process(False) is False
