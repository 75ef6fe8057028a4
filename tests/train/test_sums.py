"""A checkpoint is whole or passed over: each single bit, each file."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmed.errors import UserError
from jaxmed.train import sums
from jaxmed.train.checkpoint import Checkpoints
from tests.parallel.crew import free_port

STATE = {'x': jnp.arange(3000.0), 'n': jnp.zeros((), jnp.int32)}
ABSTRACT = {'x': jax.ShapeDtypeStruct((3000,), jnp.float32), 'n': jax.ShapeDtypeStruct((), jnp.int32)}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of steps 1 and 2; 'n' is the step."""
  run = tmp_path_factory.mktemp('saved') / 'run'
  run.mkdir()
  checkpoints = Checkpoints(run)
  for step in (1, 2):
    checkpoints.save(step, STATE | {'n': jnp.asarray(step, jnp.int32)}, {'loss': 1.0 / step})
  checkpoints.close()
  return run


def latest(run):
  checkpoints = Checkpoints(run)
  state = checkpoints.restore(ABSTRACT)
  checkpoints.close()
  assert state['x'].tolist() == list(range(3000))
  return int(state['n'])


def names(run):
  folder = run / 'checkpoints' / '2'
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


def flip(file, bit):
  data = bytearray(file.read_bytes())
  data[bit // 8 % len(data)] ^= 1 << bit % 8
  file.write_bytes(bytes(data))


def test_every_file_has_its_sum(saved):
  listed = json.loads((saved / 'checkpoints.sums' / '2.json').read_text())
  free = {'_CHECKPOINT_METADATA'} | {n for n in names(saved) if n.endswith('commit_success.txt')}
  assert set(listed) == set(names(saved)) - free
  assert {n: (saved / 'checkpoints' / '2' / n).stat().st_size for n in listed} == {n: v[0] for n, v in listed.items()}
  assert latest(saved) == 2


@pytest.mark.parametrize('what', ['flip', 'truncate', 'remove'])
def test_damage_to_each_file_in_turn(saved, tmp_path, what, capfd):
  """Only marks of time may change: never is another state loaded, and what is passed over is named."""
  passed = set()
  for i, name in enumerate(names(saved)):
    run = shutil.copytree(saved, tmp_path / str(i))
    file = run / 'checkpoints' / '2' / name
    if what == 'flip':
      flip(file, 12345 + i)
    elif what == 'truncate':
      file.write_bytes(file.read_bytes()[:-1])
    else:
      file.unlink()
    step, said = latest(run), capfd.readouterr().err
    warnings = [line for line in said.splitlines() if line.startswith('warning: checkpoint')]
    if step == 2:
      passed.add(name)
      assert not warnings
    else:
      assert len(warnings) == 1
      assert f'{run / "checkpoints" / "2"} is not readable' in warnings[0]
      assert name in warnings[0]
      assert list((run / 'damaged').glob('2-*'))
  listed = set(json.loads((saved / 'checkpoints.sums' / '2.json').read_text()))
  assert not passed & listed
  assert all(n == '_CHECKPOINT_METADATA' or n.endswith('commit_success.txt') for n in passed)


def test_a_state_of_before_there_were_sums(saved, tmp_path, capfd):
  run = shutil.copytree(saved, tmp_path / 'run')
  shutil.rmtree(run / 'checkpoints.sums')
  assert latest(run) == 2
  assert 'warning' not in capfd.readouterr().err


def test_damaged_sums(saved, tmp_path, capfd):
  run = shutil.copytree(saved, tmp_path / 'run')
  (run / 'checkpoints.sums' / '2.json').write_text('{"state')
  assert latest(run) == 1
  assert '2.json is damaged' in capfd.readouterr().err


def test_sums_of_what_is_gone_go(saved, tmp_path):
  run = shutil.copytree(saved, tmp_path / 'run')
  checkpoints = Checkpoints(run, keep=1, best='none')
  for step in (3, 4, 5):
    checkpoints.save(step, STATE, {})
  checkpoints.close()
  left = sorted(int(p.stem) for p in (run / 'checkpoints.sums').iterdir())
  assert left in ([4, 5], [5])  # those of the last one removed may still be there
  assert (run / 'checkpoints' / '5').is_dir()


def test_kept_for_ever(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, best='none', keep_every=3)
  for step in range(1, 9):
    checkpoints.save(step, STATE, {})
  checkpoints.wait()
  assert checkpoints.steps() == [3, 6, 8]
  checkpoints.close()


def test_read_only_with_bad_metrics_names_the_file(saved, tmp_path):
  run = shutil.copytree(saved, tmp_path / 'run')
  (run / 'checkpoints' / '2' / 'metrics' / 'metrics').write_text('{')
  with pytest.raises(UserError, match='2/metrics/metrics is damaged'):
    Checkpoints(run, read_only=True)


def test_shares_of_the_files(saved, tmp_path):
  """Whoever finds the damage: each file is looked at by one of the processes."""
  run = shutil.copytree(saved, tmp_path / 'run')
  flip(run / 'checkpoints' / '2' / 'state' / '_METADATA', 80)
  found = [sums.damage(run / 'checkpoints', 2, p, 3) for p in range(3)]
  assert sum(map(bool, found)) == 1
  assert 'state/_METADATA has another checksum' in ''.join(found)


TWO = '''
import json, pathlib, sys
import jax, jax.numpy as jnp
from jaxmed.parallel import process
process.start()
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxmed.train.checkpoint import Checkpoints
mesh = jax.make_mesh((2,), ('x',))
cut, whole = NamedSharding(mesh, P('x')), NamedSharding(mesh, P())
abstract = {'x': jax.ShapeDtypeStruct((3000,), jnp.float32, sharding=cut),
            'n': jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)}
made = jax.jit(lambda n: {'x': jnp.arange(3000.0) * n, 'n': n}, out_shardings={'x': cut, 'n': whole})
run, out = pathlib.Path(sys.argv[1]), []
checkpoints = Checkpoints(run, keep=20)
for step in range(1, int(sys.argv[2])):
  checkpoints.save(step, made(jnp.asarray(step, jnp.int32)), {})
checkpoints.wait()
for i in range(int(sys.argv[3])):
  step = checkpoints.steps()[-1]
  files = sorted(p for p in (run / 'checkpoints' / str(step) / 'state').rglob('*')
                 if p.is_file() and p.name != 'commit_success.txt')
  file = files[i * len(files) // int(sys.argv[3])]
  process.gather('seen', True)
  if process.is_main():
    data = bytearray(file.read_bytes()); data[len(data) // 2] ^= 4; file.write_bytes(bytes(data))
  process.gather('flipped', True)
  out.append([step, int(checkpoints.restore(abstract)['n'])])
print(json.dumps([len(files), out, len(list((run / 'damaged').iterdir()))]))
checkpoints.close()
'''


def test_two_processes_pass_over_the_same(tmp_path):
  """Both write a checkpoint together; whichever file has a flipped bit, both take the one before it."""
  env = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}', 'JAX_NUM_PROCESSES': '2'}
  root = pathlib.Path(__file__).parent.parent.parent
  both = [subprocess.Popen([sys.executable, '-c', TWO, str(tmp_path), '10', '8'], cwd=root, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.PIPE, env=os.environ | env | {'JAX_PROCESS_ID': str(i)}) for i in range(2)]
  said = [p.communicate(timeout=200) for p in both]
  assert [p.returncode for p in both] == [0, 0], said
  one, other = (json.loads(o.splitlines()[-1]) for o, _ in said)
  assert one == other
  assert one[0] > 8  # both wrote files
  assert one[1] == [[9 - i, 8 - i] for i in range(8)]
  assert one[2] == 8
  assert sum('warning: checkpoint' in line for _, err in said for line in err.splitlines()) == 8
