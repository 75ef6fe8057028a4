"""A run whose number of processes and mesh change on the way is the run that was never stopped."""

import signal
import socket

import numpy as np
import pytest

from jaxmed.train.logs import read_rows
from tests.common import saved_steps
from tests.parallel import crew


def losses(run):
  return [(r['step'], r['loss']) for r in read_rows(run / 'metrics.jsonl') if 'loss' in r]


@pytest.fixture(scope='module')
def whole(crews, corpus, tmp_path_factory):
  """One process, one device, never stopped: (run, {step: records})."""
  place = tmp_path_factory.mktemp('whole')
  fork = crew.launch(crews, crew.begin(corpus, place / 'run'), place, 1, hook=crew.RECORD, RECORD=str(place))
  assert crew.ends(fork) == [0], fork[0].err.read_text()
  return place / 'run', crew.recorded(place)


def stop_at(n):
  """A hook: this process signals itself with batch `n`, and takes its time from then on, so that all hear of it."""
  return f'''
import time
_take = loop._batches
def _stopped(run, first):
  for k, batch in enumerate(_take(run, first), first + 1):
    if k == {n}:
      import signal
      signal.raise_signal(signal.SIGTERM)
    if k >= {n}:
      time.sleep(0.5)
    yield batch
loop._batches = _stopped
'''


def test_2_3_1_processes_and_other_meshes(crews, corpus, whole, tmp_path):
  """The signal comes to one process only, another one each time; all stop at one step, with one checkpoint."""
  run, argv, at = tmp_path / 'run', crew.begin(corpus, tmp_path / 'run'), 0
  seen = {}
  for part, (count, mesh, step) in enumerate([(2, {'fsdp': 1}, 4), (3, {'fsdp': 3}, 8), (1, {'fsdp': 1}, 99)]):
    place = tmp_path / str(part)
    place.mkdir()
    given = argv if part == 0 else ['train', '--resume', run]
    forks = crew.launch(crews, [*given, f'mesh.fsdp={mesh["fsdp"]}'], place, count, hook=crew.RECORD,
                        hooks={count - 1: stop_at(step)}, RECORD=str(place))
    codes = crew.ends(forks)
    assert codes == [75 if count > 1 else 0] * count, [f.err.read_text()[-1500:] for f in forks]
    begun, at = at, saved_steps(run)[-1]
    taken = crew.recorded(place)
    assert min(taken) == begun + 1
    seen |= {n: taken[n] for n in range(begun + 1, at + 1)}
    if count > 1:
      assert step <= at < 12
      assert f'stopped by SIGTERM (process {count - 1}); everything is saved' in forks[0].err.read_text()
  assert seen == whole[1]
  assert [n for n, _ in losses(run)] == list(range(1, 13))
  np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in losses(whole[0])], rtol=1e-5)


def test_the_same_devices_in_other_processes(crews, corpus, tmp_path):
  """Four devices in one and in four processes: one mesh, so the same sums in the same order but for gloo's."""
  curves = {}
  for count in (1, 4):
    place = tmp_path / str(count)
    forks = crew.launch(crews, crew.begin(corpus, place / 'run', steps=4), place, count, 4 // count)
    assert crew.ends(forks) == [0] * count, forks[0].err.read_text()
    curves[count] = [x for _, x in losses(place / 'run')]
  np.testing.assert_allclose(curves[4], curves[1], rtol=2e-6)


def test_a_mesh_that_the_batch_does_not_fit(crews, corpus, whole, tmp_path):
  forks = crew.launch(crews, ['train', '--resume', whole[0]], tmp_path, 1, 5)
  assert crew.ends(forks) == [2]
  assert 'batch_size 24 does not divide over 5 devices' in forks[0].err.read_text()


def test_a_folder_that_is_not_shared(crews, corpus, tmp_path):
  """Process 1 has a folder of its own under the same relative name, as on another host."""
  for i in range(2):
    (tmp_path / f'host{i}').mkdir()
  argv = crew.begin(corpus, 'run', steps=4)
  hooks = {i: f'os.chdir({str(tmp_path / f"host{i}")!r})\n' for i in range(2)}
  hooks[0] += 'from jaxmed.parallel import process; process.check_shared.__defaults__ = (1.0,)\n'
  hooks[1] += 'from jaxmed.parallel import process; process.check_shared.__defaults__ = (1.0,)\n'
  forks = crew.launch(crews, argv, tmp_path, 2, hooks=hooks)
  assert crew.ends(forks) == [2, 2]
  for fork in forks:
    last = fork.err.read_text().splitlines()[-1]
    assert f'run is not the same folder for all processes: process 1 on {socket.gethostname()} did not see' in last


def test_a_process_that_never_joins(crews, corpus, tmp_path):
  argv = crew.begin(corpus, tmp_path / 'run')
  hook = 'from jaxmed.parallel import process; process.START_SECONDS = 1\n'
  fork = crew.launch(crews, argv, tmp_path, 1, hook=hook, JAX_NUM_PROCESSES='2', JAX_PROCESS_ID='0',
                     JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{crew.free_port()}')
  assert crew.ends(fork) == [69]
  assert 'process 0 of 2 on' in fork[0].err.read_text()
  assert not (tmp_path / 'run').exists()


def test_a_killed_process_ends_the_others(crews, corpus, tmp_path):
  """Not with JAX's trace after minutes, but with one line, and a code that says: go on with --resume."""
  hook = crew.PLAIN + stop_at(11).replace('SIGTERM', 'SIGKILL')
  forks = crew.launch(crews, crew.begin(corpus, tmp_path / 'run'), tmp_path, 2, hooks={1: hook})
  assert crew.ends(forks) == [69, -signal.SIGKILL], forks[0].err.read_text()
  assert 'another process or a device does not answer' in forks[0].err.read_text().splitlines()[-1]
  assert saved_steps(tmp_path / 'run') in ([4], [4, 8])  # the second one may not have been finished
