"""Processes of their own, at most so many at once; shell scripts stand for trainings."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxmed.errors import Stopped
from jaxmed.launch import pool

ROOT = pathlib.Path(__file__).parents[2]


def tasks(tmp_path, *bodies):
  return [pool.Task(f't{i}', ['bash', '-c', body], tmp_path / f't{i}' / 'log.txt') for i, body in enumerate(bodies)]


def ran(tmp_path, bodies, at_once, **kwargs):
  """{name: (code, last words)} in the order in which they ended."""
  found = {}
  pool.run(tasks(tmp_path, *bodies), at_once, lambda t, code, last: found.update({t.name: (code, last)}), **kwargs)
  return found


def test_codes_and_last_words(tmp_path):
  found = ran(tmp_path, ['echo one; echo two', 'echo why >&2; exit 3', 'kill -KILL $$', 'exit 75'], 2)
  assert found == {'t0': (0, 'two'), 't1': (3, 'why'), 't2': (137, ''), 't3': (75, '')}
  assert (tmp_path / 't0' / 'log.txt').read_text() == 'one\ntwo\n'


@pytest.mark.parametrize('at_once', [1, 2, 3])
def test_no_more_than_so_many_at_once(tmp_path, at_once):
  place = tmp_path / 'alive'
  place.mkdir()
  body = f'touch {place}/$$; ls {place} | wc -l; sleep 0.15; rm {place}/$$'
  found = ran(tmp_path, [body] * 5, at_once)
  counts = [int((tmp_path / name / 'log.txt').read_text()) for name in found]
  assert max(counts) <= at_once and len(counts) == 5


def test_each_slot_has_its_own_environment(tmp_path):
  own = pool.environments(2, [['0', '1'], ['2', '3']], {'A': 'b'})
  found = ran(tmp_path, ['echo $CUDA_VISIBLE_DEVICES $A; sleep 0.3'] * 2, 2, environments=own)
  assert sorted(last for _, last in found.values()) == ['0,1 b', '2,3 b']
  assert pool.environments(2, [[], []], {}) == [{}, {}]


def test_cores_are_shared_out(monkeypatch):
  monkeypatch.setattr(pool, 'cores', lambda: 4)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1, 2, 3})
  assert pool._shares(2) == [{0, 2}, {1, 3}]
  assert pool._shares(1) == [] == pool._shares(5)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_starts_no_more(tmp_path, number):
  body = 'trap "echo saved; exit 75" TERM; touch {0}; for i in $(seq 100); do sleep 0.1; done'
  bodies = [body.format(tmp_path / f'up{i}') for i in range(3)]

  def later():
    while not all((tmp_path / f'up{i}').exists() for i in (0, 1)):
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  threading.Thread(target=later).start()
  found = {}
  with pytest.raises(Stopped, match=number.name):
    pool.run(tasks(tmp_path, *bodies), 2, lambda t, code, last: found.update({t.name: (code, last)}))
  assert found == {'t0': (75, 'saved'), 't1': (75, 'saved')} and not (tmp_path / 'up2').exists()


def test_one_that_does_not_end_is_killed(tmp_path):
  body = f'trap "" TERM; touch {tmp_path}/up; for i in $(seq 100); do sleep 0.1; done'

  def later():
    while not (tmp_path / 'up').exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=later).start()
  found = {}
  with pytest.raises(Stopped):
    pool.run(tasks(tmp_path, body), 1, lambda t, code, last: found.update({t.name: code}), grace=0.3)
  assert found == {'t0': 75}


def test_children_end_with_a_parent_that_is_killed(tmp_path):
  """`follow_parent` sends SIGTERM when the other end of the pipe is gone."""
  child = ('import pathlib, signal, sys, time\nfrom jaxmed.launch import pool\n'
           f'place = pathlib.Path({str(tmp_path)!r})\n'
           'def ended(*_):\n  (place / "ended").touch()\n  sys.exit(75)\n'
           'signal.signal(signal.SIGTERM, ended)\npool.follow_parent()\n(place / "up").touch()\ntime.sleep(60)\n')
  parent = ('import pathlib, sys\nfrom jaxmed.launch import pool\n'
            f'pool.run([pool.Task("a", [sys.executable, "-c", {child!r}], pathlib.Path({str(tmp_path)!r}) / "log")], 1, '
            'lambda *_: None)\n')
  process = subprocess.Popen([sys.executable, '-c', parent], cwd=ROOT)
  end = time.monotonic() + 100
  while not (tmp_path / 'up').exists():
    assert time.monotonic() < end and process.poll() is None
    time.sleep(0.02)
  process.kill()
  process.wait()
  while not (tmp_path / 'ended').exists():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_a_child_that_follows_ends_well_by_itself(tmp_path):
  found = {}
  child = 'from jaxmed.launch import pool\npool.follow_parent()\nprint("done")'
  task = pool.Task('a', [sys.executable, '-c', child], tmp_path / 'log')
  pool.run([task], 1, lambda t, code, last: found.update({t.name: (code, last)}),
           environments=[{'PYTHONPATH': str(ROOT)}])
  assert found == {'a': (0, 'done')}


def test_only_a_child_of_a_pool_follows():
  before = threading.active_count()
  pool.follow_parent({})
  assert threading.active_count() == before
