"""Several processes decide together, and none is left waiting for another."""


import errno

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.train.logs import read_rows
from jaxmed.train.monitor import agree
from tests.common import saved_steps
from tests.parallel import crew

# This process signals itself in the middle of something.
COMPILING = '''
_compile = loop.assemble.Trainer.compile
def _slow(*a):
  import signal, time
  os.kill(os.getpid(), signal.{0})
  time.sleep(60)
loop.assemble.Trainer.compile = _slow
'''
SLOW_COMPILER = '''
from time import sleep as _sleep
loop.assemble.Trainer.compile = lambda *a: _sleep(60)
'''
EVALUATING = '''
_put = probe.mesh_lib.put_batch
def _signalled(*a):
  import signal, time
  signal.raise_signal(signal.{0})
  time.sleep(1)  # so much slower are real ones
  return _put(*a)
_loss = probe.Probe._loss
def _with_signal(self, *a):
  probe.mesh_lib = type('m', (), {{**vars(probe.mesh_lib), 'put_batch': staticmethod(_signalled)}})
  return _loss(self, *a)
probe.Probe._loss = _with_signal
'''
STEPPING = '''
_take = loop._batches
def _stopped(run, first):
  for k, batch in enumerate(_take(run, first), first + 1):
    import signal, time
    time.sleep(0.1)
    if k == 1:
      signal.raise_signal(signal.{0})
    yield batch
loop._batches = _stopped
'''


@pytest.mark.parametrize('where, number, hook, other', [
    ('compilation', 'SIGUSR1', COMPILING, SLOW_COMPILER), ('evaluation', 'SIGTERM', EVALUATING, ''),
    ('first step', 'SIGINT', STEPPING, '')])
def test_a_signal_to_one_process(crews, corpus, tmp_path, where, number, hook, other):
  """Nobody waits for the 60 seconds of compilation; all save one step and exit with 75."""
  env = {'PROBE': '1'} if where == 'evaluation' else {}
  argv = crew.begin(corpus, tmp_path / 'run', eval_every=5, checkpoint_every=99, log_every=50)
  forks = crew.launch(crews, argv, tmp_path, 2, hooks={1: hook.format(number), 0: other}, **env)
  assert crew.ends(forks) == [75, 75], [f.err.read_text()[-2000:] for f in forks]
  for fork in forks:
    assert f'stopped by {number} (process 1); everything is saved' in fork.err.read_text().splitlines()[-1]
  steps = saved_steps(tmp_path / 'run')
  assert len(steps) == 1
  assert steps[0] == 0 if where == 'compilation' else steps[0] == 5 if where == 'evaluation' else 1 <= steps[0] < 12


def test_saving_by_the_clock_is_one_decision(crews, corpus, tmp_path):
  """Process 1 would never save by its own clock: it saves with process 0."""
  argv = crew.begin(corpus, tmp_path / 'run', checkpoint_every=99, checkpoint={'minutes': 0.02, 'keep': 9})
  slow = '''
_take = loop._batches
def _slowly(run, first):
  import time
  for batch in _take(run, first):
    time.sleep(0.5)
    yield batch
loop._batches = _slowly
from jaxmed.train.monitor.agree import Agreement
Agreement._late = lambda self: False
'''
  forks = crew.launch(crews, argv, tmp_path, 2, hooks={1: slow})
  assert crew.ends(forks) == [0, 0], [f.err.read_text()[-2000:] for f in forks]
  steps = saved_steps(tmp_path / 'run')
  assert len(steps) >= 3
  assert steps[-1] == 12


def test_a_stuck_process_is_shown(crews, corpus, tmp_path):
  """Process 1 hangs in its loader: both write their stacks and exit with 69."""
  stuck = '''
_take = loop._batches
def _stuck(run, first):
  import time
  for n, batch in enumerate(_take(run, first), 1):
    time.sleep(0.3 if n < 10 else 1000)
    yield batch
loop._batches = _stuck
'''
  argv = crew.begin(corpus, tmp_path / 'run', watchdog={'minutes': 0.1})
  forks = crew.launch(crews, argv, tmp_path, 2, hooks={1: stuck})
  assert crew.ends(forks) == [69, 69], [f.err.read_text()[-2000:] for f in forks]
  stacks = [(tmp_path / 'run' / 'stacks' / f'{i}.txt').read_text() for i in range(2)]
  assert '_stuck' in stacks[1] and '_stuck' not in stacks[0]
  for text in stacks:
    assert '_loop' in text and 'no progress for' in text
  said = forks[0].err.read_text()
  assert 'process 0 keeps' not in said  # whether process 1 is named depends on how busy the machine is: see test_vitals
  rows = [r for r in read_rows(tmp_path / 'run' / 'metrics.jsonl') if 'data_wait_max' in r]
  assert rows
  assert all(r['host_gb'] > 0.1 and r['open_files'] > 3 for r in rows)


def test_an_error_of_one_process_ends_all(crews, corpus, tmp_path):
  """With its text and its exit code, although the other one waits in a collective."""
  broken = '''
_take = loop._batches
def _broken(run, first):
  for n, batch in enumerate(_take(run, first), 1):
    if n == 5:
      from jaxmed.errors import UserError
      raise UserError('record 17 is damaged')
    yield batch
loop._batches = _broken
'''
  forks = crew.launch(crews, crew.begin(corpus, tmp_path / 'run'), tmp_path, 2, hooks={1: broken})
  codes = crew.ends(forks)
  assert codes[1] == 2
  assert codes[0] in (2, 69), forks[0].err.read_text()  # told by process 1, or by the broken connection
  assert forks[1].err.read_text().splitlines()[-1] == 'jaxmed: record 17 is damaged'


def test_a_partly_blank_batch_of_held_out_records(crews, corpus, tmp_path):
  """Its blanks lie in one process's part alone: all leave it out, and the loss is that of one process."""
  rows = len(open_source(corpus).select(split='val'))
  size = next(n for n in range(4, rows, 2) if n / 2 <= rows % n)
  losses = []
  for count in (2, 1):
    place = tmp_path / str(count)
    argv = crew.begin(corpus, place / 'run', batch_size=size, steps=1, eval_every=1, checkpoint_every=1)
    forks = crew.launch(crews, argv, place, count, 2 // count, PROBE='1')
    assert crew.ends(forks) == [0] * count, [f.err.read_text()[-2000:] for f in forks]
    losses += [r['val_loss'] for r in read_rows(place / 'run' / 'metrics.jsonl') if 'val_loss' in r]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_full_disk_is_the_users_to_mend():
  """All processes end with the code of the one whose log could not be written."""
  assert agree._exit_code(OSError(errno.ENOSPC, 'No space left on device')) == 2
  assert agree._exit_code(OSError(errno.EBADF, 'no')) == agree._exit_code(ValueError()) == 1
