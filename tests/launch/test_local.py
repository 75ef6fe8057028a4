"""Processes of this machine: how they are started, watched and ended. Some are shell scripts in the place of Python, which
end as the test wants; the last test trains."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from jaxmed import cli
from jaxmed.errors import UserError
from jaxmed.launch import local, options
from jaxmed.train.logs import read_rows
from tests.common import saved_state, words
from tests.conftest import TINY

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def launch(tmp_path, capfd, corpus):
  """Launches processes that run `body`, a shell script that has their number in $i and their start in $n."""
  def run(body, *argv):
    python = tmp_path / 'python'
    python.write_text('#!/bin/bash\ni=${JAX_PROCESS_ID:-0}\n'
                      f'cd {tmp_path}; n=$(cat n$i 2> /dev/null || echo 0); echo $((n + 1)) > n$i\n{body}\n')
    python.chmod(0o755)
    capfd.readouterr()
    code = cli.main(['launch', 'local', '--data', str(corpus), '--out', str(tmp_path / 'run'), '--python', str(python),
                     '--grace', '1', *argv])
    out, err = capfd.readouterr()
    return code, err
  return run


def test_output_has_the_number_of_its_process_and_goes_to_files(launch, tmp_path):
  code, err = launch('echo "I am $i of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS, $A"; echo bad >&2',
                     '--processes', '2', '--env', 'A=a b')
  assert code == 0
  lines = sorted(line for line in err.splitlines() if 'I am' in line)
  assert [line.partition(' at ')[0] for line in lines] == ['[0] I am 0 of 2', '[1] I am 1 of 2']
  where = {line.split()[-3].rstrip(',') for line in lines}
  assert len(where) == 1 and where.pop().startswith('127.0.0.1:') and lines[0].endswith(', a b')
  assert (tmp_path / 'run.launch' / 'log-1.txt').read_text().startswith('I am 1')
  assert 'bad' in (tmp_path / 'run.launch' / 'log-1.txt').read_text()


def test_one_process_needs_no_coordinator(launch):
  code, err = launch('echo "[$JAX_COORDINATOR_ADDRESS$JAX_NUM_PROCESSES] $JAX_COMPILATION_CACHE_DIR"', '--cache', '/c')
  assert (code, err) == (0, '[] /c\n')


def test_one_that_dies_takes_the_others_down(launch, tmp_path):
  body = ('if [ $i = 1 ]; then until [ -e ready0 -a -e ready2 ]; do sleep 0.05; done; echo "no such corpus"; exit 3; fi; '
          'trap "echo ended; exit 75" TERM; touch ready$i; sleep 60 & wait')
  begin = time.monotonic()
  code, err = launch(body, '--processes', '3', '--restarts', '5')
  assert code == 3 and time.monotonic() - begin < 40
  assert 'process 1 died with exit code 3 (no such corpus); its output is in ' in err
  assert err.count('ended') == 2 and (tmp_path / 'n0').read_text() == '1\n'


def test_one_that_is_killed_is_told_as_a_shell_does(launch):
  code, err = launch('[ $i = 0 ] && kill -KILL $$; sleep 60 & wait', '--processes', '2')
  assert code == 137 and 'process 0 died with exit code 137' in err


def test_one_that_does_not_end_is_killed(launch):
  code, err = launch('[ $i = 0 ] && exit 1; trap "" TERM; for k in $(seq 300); do sleep 0.2; done', '--processes', '2')
  assert code == 1 and 'killing process 1, which did not end within --grace 1 s' in err


@pytest.mark.parametrize('again, restarts, want, starts', [(75, 3, 0, 3), (69, 3, 0, 3), (75, 1, 75, 2), (75, 0, 75, 1)])
def test_restarts(launch, tmp_path, again, restarts, want, starts):
  code, err = launch(f'[ $n -ge 2 ] || exit {again}', '--processes', '2', '--restarts', str(restarts))
  assert code == want
  assert (tmp_path / 'n0').read_text() == (tmp_path / 'n1').read_text() == f'{starts}\n'
  assert err.count('starting again') == starts - 1


def test_gpus_are_shared_out(monkeypatch):
  assert local.share(['0', '1', '2', '3'], options.Local(processes=2)) == [['0', '1'], ['2', '3']]
  assert local.share(['4', '5', '6'], options.Local(processes=2, gpus=1)) == [['4'], ['5']]
  assert local.share([], options.Local(processes=2)) == [[], []]
  with pytest.raises(UserError, match='--processes 3 needs 3 GPUs, this machine shows 2'):
    local.share(['0', '1'], options.Local(processes=3))
  with pytest.raises(UserError, match='--processes 2 x --gpus 2 needs 4 GPUs, this machine shows 0'):
    local.share([], options.Local(processes=2, gpus=2))
  assert local.visible_gpus({'CUDA_VISIBLE_DEVICES': '2,3'}) == ['2', '3']
  assert local.visible_gpus({'JAX_PLATFORMS': 'cpu'}) == []


def test_mistakes(capfd, corpus, tiles, tmp_path):
  def said(*argv):
    assert cli.main(['launch', 'local', *map(str, argv), '--out', str(tmp_path / 'run')]) == 2
    return capfd.readouterr().err
  assert 'is not a corpus: jaxmed prepare' in said('--data', tiles)
  assert 'does not exist' in said('--data', tmp_path / 'none')
  assert 'does not fit 2 processes = 2 devices' in said('--data', corpus, '--processes', '2', 'mesh.tensor=4')
  assert not (tmp_path / 'run.launch').exists()


def test_dry_run(capfd, corpus, tmp_path):
  assert cli.main(['launch', 'local', '--data', str(corpus), '--out', str(tmp_path / 'run'), '--processes', '2',
                   '--dry-run', '--json']) == 0
  lines = json.loads(capfd.readouterr().out)['script'].splitlines()
  assert len(lines) == 2 and 'JAX_PROCESS_ID=1' in lines[1] and lines[1].endswith(' --auto-resume')
  assert list(tmp_path.iterdir()) == []


def wait(condition, seconds=150.0):
  """The first true value of `condition`."""
  end = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < end, 'waited too long'
    time.sleep(0.01)
  return value


def begin(folder, *argv):
  """Starts `jaxmed launch local` with two processes: (the launcher, their ids)."""
  command = [sys.executable, '-m', 'jaxmed', 'launch', 'local', *map(str, argv), '--out', str(folder / 'run'),
             '--processes', '2', '--grace', '60']
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
  record = folder / 'run.launch' / 'launch.json'
  wait(record.exists)
  pids = [int(p[0]) for p in json.loads(record.read_text())['processes']]
  assert len(pids) == 2
  return process, pids


def test_status_and_stop(corpus, tmp_path, capfd):
  python = tmp_path / 'python'
  python.write_text('#!/bin/bash\ntrap "echo saved; exit 75" TERM\necho ready\nfor k in $(seq 600); do sleep 0.1; done')
  python.chmod(0o755)
  process, pids = begin(tmp_path, '--data', corpus, '--python', python, '--restarts', 9)
  log = tmp_path / 'run.launch' / 'log-1.txt'
  wait(lambda: log.exists() and 'ready' in log.read_text())

  def told():
    assert cli.main(['status', str(tmp_path / 'run'), '--json']) == 0
    return json.loads(capfd.readouterr().out)

  now = told()
  assert now['alive'] and now['progress'] == 'training has not begun'
  assert now['state'] == f'2 of 2 processes run on this machine: {pids[0]}, {pids[1]}'
  assert cli.main(['launch', 'local', '--data', str(corpus), '--out', str(tmp_path / 'run')]) == 2
  assert 'was launched already (2 of 2 processes run' in capfd.readouterr().err
  assert cli.main(['stop', str(tmp_path / 'run')]) == 0
  assert capfd.readouterr().out == 'asked to save and end\n'
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and err.count('saved') == 2 and 'starting again' not in err
  assert told()['alive'] is False
  assert cli.main(['stop', str(tmp_path / 'run')]) == 0
  assert 'has ended already' in capfd.readouterr().out


@pytest.mark.timeout(600)
def test_a_run_whose_process_was_killed_goes_on_with_the_same_command(corpus, trained, tmp_path, capfd):
  """And ends as one process ends that nothing disturbed."""
  run, log = tmp_path / 'run', tmp_path / 'run.launch' / 'log-0.txt'
  argv = [*words(TINY), '--data', corpus]
  process, pids = begin(tmp_path, *argv)
  wait(lambda: 'loss=' in log.read_text(), 300)
  for pid in pids:  # held, so that it does not end before it is looked at
    os.kill(pid, signal.SIGSTOP)
  assert cli.main(['status', str(run), '--json']) == 0
  assert ' of 20, loss ' in json.loads(capfd.readouterr().out)['progress']
  os.kill(pids[1], signal.SIGKILL)
  os.kill(pids[0], signal.SIGCONT)
  _, err = process.communicate(timeout=150)
  assert process.returncode == 137 and 'process 1 died with exit code 137' in err
  assert not any(psutil.pid_exists(p) for p in pids)
  log.unlink()
  process, _ = begin(tmp_path, *argv)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  rows = [(r['step'], r['loss']) for r in read_rows(run / 'metrics.jsonl') if 'loss' in r]
  want = [(r['step'], r['loss']) for r in read_rows(trained / 'metrics.jsonl') if 'loss' in r]
  assert [s for s, _ in rows] == [s for s, _ in want]
  np.testing.assert_allclose([v for _, v in rows], [v for _, v in want], rtol=1e-5)
  assert int(saved_state(run).step) == 20
