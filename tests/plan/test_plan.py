"""Plans of tiny models: memory, least communication, bounds, the search, mistakes, and one real TPU compilation."""

import dataclasses
import importlib.util
import json
import math

import jax
import pytest

from jaxmed import cli
from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.parallel import chips, sharding_table
from jaxmed.plan import plan, roofline, search, tables, worker
from jaxmed.plan.hlo import Collective
from jaxmed.plan.roofline import Bounds, Width
from jaxmed.train.build import assemble
from tests.common import words
from tests.conftest import TINY

MESH = {'replica': 1, 'data': 4, 'fsdp': 2, 'sequence': 1, 'tensor': 1}


def request(topology, rows=1000, **changes):
  return plan.Request(merge(TINY, changes), chips.parse(topology), 3, rows)


def test_the_model_decides_the_mesh():
  """A giant's 13.7 GB of weights and moments do not fit 40 % of 16 GB, nor do halves."""
  small = {'mesh': {'data': 0, 'fsdp': 0}, 'batch_size': 16}
  giant = small | {'model': 'vit_giant2/16', 'image_size': 64, 'encoder': {'embed_dim': 1536, 'depth': 40, 'num_heads': 24}}
  meshes = [plan.prepare(request(pod, **what)).mesh for pod, what in (
      ('v5e:4x4', small), ('v5e:4x4', giant), ('v5p:2x2x4', giant))]
  assert [m['fsdp'] for m in meshes] == [1, 4, 1]
  assert meshes[1] == MESH | {'data': 4, 'fsdp': 4}


@pytest.fixture(scope='module')
def traced():
  """The jaxpr of TINY's step, looked at once."""
  job = plan.prepare(request('h100:1'))
  return plan.trace(job.config, job.spec)


@pytest.fixture
def alone(traced):
  """TINY on one GPU."""
  return plan.analyse(plan.prepare(request('h100:1')), traced)


def test_memory_of_one_device(alone):
  memory = alone['memory']
  assert 0 < memory['optimizer'] - 2 * memory['parameters'] < 1000  # two moments, and a count of steps each
  assert memory['target'] == memory['average'] == 0
  # 32 wide: the blocks alone have 12 D^2 + 13 D numbers each, of 4 bytes; two in the encoder, one in the decoder.
  assert 3 * (12 * 32**2 + 13 * 32) * 4 < memory['parameters'] < 4 * (12 * 32**2 + 13 * 32) * 4
  assert memory['peak'] == 2 * memory['parameters'] + memory['optimizer'] + memory['activations']
  assert memory['fits'] and alone['how'] == 'analytic'
  assert alone['network'] == {'moved': None, 'least': 0}


def test_fsdp_halves_the_state_and_leaves_the_flops(alone, traced):
  two = plan.analyse(plan.prepare(request('h100:2', mesh={'fsdp': 2})), traced)
  assert two['flops'] == alone['flops']
  shared = alone['memory']['parameters'] - two['memory']['parameters']  # half of what is sharded
  assert 0.45 < shared / alone['memory']['parameters'] <= 0.5
  # float32: gathers forward and backward and a reduce-scatter of what is sharded, an all-reduce of the rest, all 1/2
  whole = alone['memory']['parameters'] - 2 * shared
  assert two['network']['least'] == pytest.approx(3 / 2 * 2 * shared + whole)


def test_data_parallel_sends_the_gradients(alone, traced):
  got = plan.analyse(plan.prepare(request('h100:8')), traced)
  assert got['mesh']['data'] == 8
  assert got['network']['least'] == pytest.approx(2 * 7 / 8 * alone['memory']['parameters'])
  assert got['network']['least'] / 450e9 == pytest.approx(got['seconds']['network'])


def test_model_flops_do_not_know_of_remat(alone):
  again = plan.plan(request('h100:1', encoder={'remat': 'full'}))
  assert again['flops']['model'] == alone['flops']['model']
  assert again['seconds']['compute'] > 1.1 * alone['seconds']['compute']
  assert alone['seconds']['compute'] == alone['flops']['model'] / 989.4e12


def test_time_to_finish(alone):
  step = alone['seconds']['step']
  assert step == max(alone['seconds'][k] for k in ('compute', 'memory', 'network'))
  assert alone['days'] == pytest.approx(20 * step / 86400)
  assert alone['samples'] == 160
  assert alone['images_per_second'] == pytest.approx(8 / step)
  assert alone['input']['bytes_per_second'] == pytest.approx(8 / step * 16 * 16 * 3)
  assert alone['mfu'] == pytest.approx(alone['flops']['model'] / 989.4e12 / step)


def test_network_in_two_levels():
  """Eight GPUs of a node reduce first, then an eighth of the bytes goes between nodes."""
  cluster = chips.parse('h100:16')
  mesh = {'data': 16, 'tensor': 1}
  one = [Collective('all-reduce', 8e9, 16, ('data',), 1)]
  want = 2 * 8e9 * 7 / 8 / 450e9 + 2 * 1e9 * 1 / 2 / 50e9
  assert roofline.network_seconds(one, mesh, cluster) == pytest.approx(want)
  # over data, whose neighbours are two chips apart, four of a node take part
  mesh = {'data': 8, 'tensor': 2}
  one = [Collective('all-gather', 8e9, 8, ('data',), 3)]
  assert roofline.network_seconds(one, mesh, cluster) == pytest.approx(3 * (8e9 * 3 / 4 / 450e9 + 2e9 / 2 / 50e9))
  assert roofline.network_seconds(one, mesh, chips.parse('v5e:4x4')) == pytest.approx(3 * 8e9 * 7 / 8 / 200e9)


def test_tensor_parallel_sends_activations(traced):
  job = plan.prepare(request('h100:4', mesh={'data': 2, 'tensor': 2}))
  width = plan.width(job, 6 * 1000 * job.shards * 2 * 12 * 32**2)
  assert width == Width(1000, 32, 2)
  last = roofline.least(sharding_table.on_mesh(traced.boxed, job.mesh), job.mesh, 4, width)[-1]
  assert (last.axes, last.times, last.size) == (('tensor',), 8, 1000 * 32 * 4)


def test_bounds():
  got = Bounds(0.2, 0.5, 0.3)
  assert (got.step, got.by) == (0.5, 'memory')
  assert got.mfu(197e12 * 4 * 0.1, chips.parse('v5e:2x2')) == pytest.approx(0.2)


def test_search_takes_the_fastest_that_fits():
  small = dataclasses.replace(chips.CHIPS['h100'], memory=7e5)
  cluster = dataclasses.replace(chips.parse('h100:8'), chip=small)
  found = search.search(dataclasses.replace(request('h100:8'), cluster=cluster), 0)
  fits = [p for p in found['tried'] if p['memory']['fits'] and p['memory']['peak'] < search.HEADROOM * 7e5]
  assert 0 < len(fits) < len(found['tried'])
  assert found['best']['images_per_second'] >= 0.97 * max(p['images_per_second'] for p in fits)
  assert found['words'][-2:] == [f'batch_size={found["best"]["batch_size"]}', f'encoder.remat={found["best"]["remat"]}']
  assert {p['mesh']['tensor'] for p in found['tried']} == {1, 2}  # two heads
  assert 'take: mesh.data=' in tables.render_search(found)


@pytest.mark.parametrize('topology, text', [
    ('v5e:16x15', "unknown topology 'v5e:16x15': did you mean 'v5e:16x16'"),
    ('v5q:8x8x8', "unknown chip of --topology 'v5q': did you mean 'v5"),
    ('v5p:8x8', "unknown topology 'v5p:8x8'"), ('h100:12', 'did you mean h100:16?'), ('h100:many', 'h100:64'),
    ('h100:8*2', 'slices are for TPUs'), ('v5e:4x4*x', 'number of slices must be a whole number'),
])
def test_unknown_topologies(topology, text):
  with pytest.raises(UserError) as e:
    chips.parse(topology)
  assert text in str(e.value)


@pytest.mark.parametrize('topology, chips_, hosts, slices', [
    ('v5e:16x16', 256, 32, 1), ('v5p:8x8x8', 512, 128, 1), ('v5e:4x4*2', 32, 4, 2), ('a100:16', 16, 2, 1)])
def test_topologies(topology, chips_, hosts, slices):
  got = chips.parse(topology)
  assert (got.chips, got.hosts, got.slices, got.name) == (chips_, hosts, slices, topology)


@pytest.mark.parametrize('changes, text', [
    ({'mesh': {'fsdp': 3}}, 'mesh.fsdp=3 x mesh.sequence=1 x mesh.tensor=1 does not fit 8 devices'),
    ({'mesh': {'data': 2}}, 'the sizes must multiply to 8'),
    ({'batch_size': 12}, 'batch_size 12 does not divide over 8 devices x 1 microbatches: nearest is 16'),
    ({'model': ''}, 'a plan needs the model'), ({'modle': 'x'}, 'model')])
def test_mistakes(changes, text):
  with pytest.raises(UserError) as e:
    plan.prepare(request('h100:8', **changes))
  assert text in str(e.value)


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(worker.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"libtpu.* is not installed: pip install 'jaxmed\[tpu-plan\]'"):
    plan.plan(request('v5e:2x2'))


def test_what_does_not_fit_is_said(capsys, monkeypatch):
  tight = dataclasses.replace(chips.CHIPS['h100'], memory=1e6)
  monkeypatch.setitem(chips.CHIPS, 'h100', tight)
  assert cli.main(['plan', *words(TINY), '--topology', 'h100:1']) == 0
  out = capsys.readouterr().out
  assert 'DOES NOT FIT' in out and 'ANALYTIC' in out and 'float32' in out


@pytest.mark.parametrize('text', [
    'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.01G of 15.75G hbm. Exceeded',
    'Ran out of memory on HBM, the total memory required for HLO temporaries (20.01G) exceeds available HBM (15.75G).'])
def test_too_much_for_the_compiler(text):
  assert plan._exhausted(f'RESOURCE_EXHAUSTED: {text}') == {'used': 20.01 * 2**30, 'has': 15.75 * 2**30}


# A U-Net of volumes with its decoder, of which all weights are trained on masks.
MASKS = {'method': 'segment', 'model': 'stunet_micro', 'image_size': (8, 8, 8), 'batch_size': 8, 'steps': 20,
         'encoder': {'depths': (1, 1), 'dims': (8, 16), 'strides': (1, 2)}}


def test_a_segmentation_of_volumes():
  """The state is encoder and decoder: two moments, and a count of steps each."""
  job = plan.prepare(plan.Request(MASKS, chips.parse('h100:1'), 1, 1000))
  shapes = jax.tree.leaves(jax.eval_shape(job.trainer.create, assemble.batch_shapes(job.config, job.spec)).params)
  count, got = sum(math.prod(x.shape) for x in shapes), plan.analyse(job)
  assert job.spec.mask_values and got['memory']['parameters'] == 4 * count
  assert 0 < got['memory']['optimizer'] - 8 * count < 1000
  assert 'segment stunet_micro at 8x8x8 on h100:1' in tables.render(got)
  # The last convolutions on the image's grid, forwards and twice backwards, are the least of it: 27 x 8 x 8 each.
  assert got['flops']['model'] > 8 * 8**3 * 3 * 2 * 2 * 27 * 8 * 8


@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu: pip install jaxmed[tpu-plan]')
def test_the_real_compiler(capsys):
  """A supervised ViT on a slice of four chips: the compiler's products are the model's."""
  user = {k: v for k, v in TINY.items() if k != 'objective'} | {'method': 'supervised', 'model': 'vit_micro/8',
                                                               'encoder': {'embed_dim': 128, 'depth': 2, 'num_heads': 2}}
  assert cli.main(['plan', *words(user), 'mesh.fsdp=2', '--topology', 'v5e:2x2', '--json']) == 0
  got = json.loads(capsys.readouterr().out)
  assert got['how'] == 'compiled' and got['memory']['fits'] and got['unknown_loops'] == []
  assert 0.99 < got['flops']['ratio'] < 1.01
  assert got['memory']['peak'] > got['memory']['parameters'] + got['memory']['optimizer']
  assert {'data', 'fsdp'} >= {a for c in got['collectives'] for a in c['axes']}
  # Weights outside the loop over layers (patches, head) are gathered once, not again for the backward pass.
  assert 0.9 < got['network']['moved'] / got['network']['least'] < 1.1
  assert 'compiled by XLA:TPU' in tables.render(got)
