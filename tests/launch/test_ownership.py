"""Which GPUs a process takes: environments as SLURM, Open MPI and launchers make them."""

import pytest

from jaxmed.errors import UserError
from jaxmed.parallel import devices as d


def slurm(rank, tasks, seen=None, node=0, nodes=1, **more):
  """The environment of a task: its place, the tasks of each node, the GPUs that it sees."""
  env = {'SLURM_STEP_NUM_TASKS': str(tasks * nodes), 'SLURM_STEP_TASKS_PER_NODE': f'{tasks}(x{nodes})',
         'SLURM_LOCALID': str(rank), 'SLURM_NODEID': str(node)}
  return env | ({'CUDA_VISIBLE_DEVICES': seen} if seen is not None else {}) | more


@pytest.mark.parametrize('env, want', [
    # One task a machine with four GPUs: jax alone would take the first.
    (slurm(0, 1, '0,1,2,3', nodes=2), [0, 1, 2, 3]),
    # All tasks see all four of the machine.
    (slurm(0, 4, '0,1,2,3', SLURM_GPUS_ON_NODE='4'), [0]),
    (slurm(3, 4, '0,1,2,3', SLURM_GPUS_ON_NODE='4'), [3]),
    (slurm(1, 2, '0,1,2,3', SLURM_GPUS_ON_NODE='4'), [2, 3]),
    (slurm(1, 2, '0,1,2,3', node=1, nodes=2, SLURM_GPUS_ON_NODE='4', SLURM_GPUS_PER_TASK='2'), [2, 3]),
    # Each task sees its own, numbered from 0 or as on the machine: jax alone would look for number 1.
    (slurm(1, 2, '0', SLURM_GPUS_ON_NODE='2', SLURM_GPUS_PER_TASK='1'), [0]),
    (slurm(1, 2, '2,3', SLURM_GPUS_ON_NODE='4', SLURM_GPUS_PER_TASK='a100:2'), [0, 1]),
    (slurm(1, 2, '0,1', SLURM_GPUS_ON_NODE='4'), [0, 1]),
    (slurm(1, 2, '1', SLURM_GPUS_ON_NODE='4', SLURM_GPU_BIND='per_task:1'), [0]),
    # No variable of CUDA: what SLURM gave on this machine.
    (slurm(1, 2, SLURM_GPUS_ON_NODE='8'), [4, 5, 6, 7]),
    # Five GPUs for two tasks: two each, one stays idle (and is named).
    (slurm(1, 2, '0,1,2,3,4', SLURM_GPUS_ON_NODE='5'), [2, 3]),
    # Machines with different numbers of tasks.
    (slurm(0, 1, '0,1') | {'SLURM_STEP_NUM_TASKS': '3', 'SLURM_STEP_TASKS_PER_NODE': '2,1', 'SLURM_NODEID': '1'}, [0, 1]),
    # Open MPI.
    ({'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
      'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [2, 3]),
    # A launcher that gave each process its own takes precedence over the SLURM around it.
    (slurm(0, 2, 'GPU-a,GPU-b') | {'JAX_PROCESS_ID': '1'}, [0, 1]),
    ({'JAX_PROCESS_ID': '1'}, None),
    # Nothing to decide.
    ({'CUDA_VISIBLE_DEVICES': '0,1'}, None),
    (slurm(0, 2), None), (slurm(0, 2, ''), None), (slurm(0, 2, '-1'), None),
    (slurm(0, 2, '0,1', JAX_PLATFORMS='cpu'), None),
    (slurm(0, 2, '0,1', JAX_LOCAL_DEVICE_IDS='1'), None),
])
def test_what_a_process_takes(env, want):
  assert d.local_device_ids(env) == want
  assert d.initialize_arguments(env) == ({} if want is None else {'local_device_ids': want})


@pytest.mark.parametrize('env, words', [
    (slurm(0, 4, '0,1', SLURM_GPUS_ON_NODE='2'), '4 tasks on a machine with 2 GPUs.* start 2 tasks'),
    (slurm(0, 3, '0,1,2,3', SLURM_GPUS_ON_NODE='4', SLURM_GPUS_PER_TASK='2'), '4 GPUs, 2 a task.* start 2 tasks'),
])
def test_gpus_that_do_not_go_round(env, words):
  with pytest.raises(UserError, match=words):
    d.local_device_ids(env)


@pytest.mark.parametrize('text, want', [('2(x3),1', [2, 2, 2, 1]), ('4', [4]), ('1,2(x2)', [1, 2, 2]), ('', [1])])
def test_tasks_per_node(text, want):
  assert d.tasks_per_node(text) == want


def owners(envs, host='a', kind='H100', machine=()):
  return [d.owner(env, i, host, kind, d.local_device_ids(env) or [], machine) for i, env in enumerate(envs)]


def test_all_used_is_silent():
  for everyone in (
      owners([slurm(i, 2, '0,1,2,3', SLURM_GPUS_ON_NODE='4') for i in range(2)]),
      owners([slurm(i, 2, '0', SLURM_GPUS_ON_NODE='2', SLURM_GPUS_PER_TASK='1') for i in range(2)]),
      owners([slurm(0, 2), slurm(1, 2)], kind='1 cpu')):
    assert d.idle(everyone) == []


def test_lines_name_the_gpus_of_the_machine():
  everyone = owners([slurm(i, 2, '4,5,6,7', SLURM_GPUS_ON_NODE='4') for i in range(2)])
  assert d.lines(everyone) == ['process 0 on a: GPU 4, 5 (H100)', 'process 1 on a: GPU 6, 7 (H100)']
  many = [dict(everyone[0], process=i, host=f'n{i // 4}') for i in range(40)]
  assert len(d.lines(many)) == 17
  assert d.lines(many)[-1] == 'and 24 more processes on 6 machines'


def test_idle_gpus_are_named():
  # One of five is left over; a second machine uses all of its own.
  first = owners([slurm(i, 2, '0,1,2,3,4', SLURM_GPUS_ON_NODE='5') for i in range(2)])
  second = owners([slurm(i, 2, '0,1', SLURM_GPUS_ON_NODE='2') for i in range(2)], host='b')
  said, = d.idle([*first, *second])
  assert said.startswith('GPU 4 of a is used by no process')
  # Each task sees one of four, so the others have no names.
  said, = d.idle(owners([slurm(i, 2, '0', SLURM_GPUS_ON_NODE='4', SLURM_GPUS_PER_TASK='1') for i in range(2)]))
  assert said.startswith('2 of 4 GPUs of a are used by no process')


def test_a_jax_without_gpus_is_told():
  said, = d.idle([d.owner({}, 0, 'a', '1 cpu', [], ['0', '1'])])
  assert said.startswith('GPU 0, 1 of a are used by no process') and 'jax[cuda13]' in said
  assert d.idle([d.owner({'JAX_PLATFORMS': 'cpu'}, 0, 'a', '1 cpu', [], ['0', '1'])]) == []
  assert d.idle([d.owner({'CUDA_VISIBLE_DEVICES': ''}, 0, 'a', '1 cpu', [], [])]) == []


def test_the_report_of_this_process(monkeypatch):
  monkeypatch.setattr(d, 'machine_gpus', lambda: ['0'])
  alone = lambda name, said: [said]
  assert d.report({'JAX_PLATFORMS': 'cpu'}, 'a', alone) == []
  said, = d.report({}, 'a', alone)
  assert said.startswith('warning: GPU 0 of a is used by no process')
  two = d.report({'JAX_PLATFORMS': 'cpu'}, 'a', lambda name, said: [said, dict(said, process=1, host='b')])
  assert two == ['process 0 on a: 1 cpu', 'process 1 on b: 1 cpu']
