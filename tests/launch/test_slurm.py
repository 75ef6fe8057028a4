"""A real SLURM (tools/slurm_here.sh): its warning before the time limit, its requeue, and the run that comes of it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from jaxmed.train.logs import read_rows
from tests.common import same, saved_state, words
from tests.conftest import TINY

ROOT = pathlib.Path(__file__).parent.parent.parent


def takes_jobs():
  """Whether there is a SLURM here whose node is up."""
  if shutil.which('sinfo') is None:
    return False
  said = subprocess.run(['sinfo', '-h', '-o', '%t'], capture_output=True, text=True, check=False).stdout
  return said.startswith(('idle', 'mix', 'alloc'))


pytestmark = [pytest.mark.slurm,
              pytest.mark.skipif(not takes_jobs(), reason='no SLURM here: tools/slurm_here.sh sets one up')]


def jaxmed(*argv, check=True):
  """Runs the command: what it prints, as JSON."""
  done = subprocess.run([sys.executable, '-m', 'jaxmed', *map(str, argv), '--json'], capture_output=True, text=True,
                        cwd=ROOT, check=False)
  assert not check or done.returncode == 0, done.stderr
  return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def scontrol(*words):
  """Runs scontrol."""
  return subprocess.run(['scontrol', *words], capture_output=True, text=True, check=True).stdout


def wait(condition, seconds=150.0, pause=0.1):
  """The first true value of `condition`."""
  end = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < end, 'waited too long'
    time.sleep(pause)
  return value


def steps(run):
  return [r['step'] for r in read_rows(run / 'metrics.jsonl') if 'loss' in r] if run.exists() else []


def tasks(run):
  """The processes that train, not srun."""
  found = []
  for process in psutil.process_iter(['cmdline', 'name']):
    line = process.info['cmdline'] or []
    if str(run) in line and 'train' in line and process.info['name'].startswith('python'):
      found.append(process.pid)
  return found


@pytest.mark.timeout(900)
def test_a_job_that_its_time_limit_stops_ends_as_one_that_nothing_stopped(corpus, tmp_path):
  run = tmp_path / 'run'
  sent = jaxmed('launch', 'slurm', *words(TINY), '--data', corpus, '--out', run, '--tasks-per-node', 2, '--time', 30,
                '--lead', 120, '--sbatch=--overcommit')
  job = sent['job']
  try:
    assert 'was launched already' in jaxmed('launch', 'slurm', '--data', corpus, '--out', run, check=False)
    # Training is held at an early step until SLURM, which looks twice a minute, has sent its warning.
    wait(lambda: len(steps(run)) >= 3, pause=0.01)
    both = tasks(run)
    assert len(both) == 2
    for pid in both:
      os.kill(pid, signal.SIGSTOP)
    held = steps(run)[-1]
    assert held < 15
    told = jaxmed('status', run)
    assert told['alive'] and 'RUNNING' in told['state'] and f'step {held} of 20' in told['progress']
    shown = dict(pair.partition('=')[::2] for pair in scontrol('-o', 'show', 'job', job).split())
    hours, minutes, _ = shown['RunTime'].split(':')
    scontrol('update', f'JobId={job}', f'TimeLimit={int(hours) * 60 + int(minutes) + 2}')
    log = pathlib.Path(sent['log'])
    wait(lambda: 'stopped by SIGUSR1' in log.read_text(), 100)  # SLURM sends SIGCONT with it
    scontrol('update', f'JobId={job}', 'TimeLimit=30')  # for the second start
    undisturbed = tmp_path / 'undisturbed'
    jaxmed('launch', 'local', *words(TINY), '--data', corpus, '--out', undisturbed, '--processes', 2)
    wait(lambda: not jaxmed('status', run)['alive'], 400, pause=1)
  finally:
    subprocess.run(['scancel', job], check=False)
  told, said = jaxmed('status', run), log.read_text()
  assert 'COMPLETED' in told['state'] and ' 1 restarts' in told['state'], said
  assert 'stopped with code 75, queued again' in said
  assert said.count('starts on') == 2
  losses = [[(r['step'], r['loss']) for r in read_rows(p / 'metrics.jsonl') if 'loss' in r] for p in (run, undisturbed)]
  assert losses[0] == losses[1]
  assert [step for step, _ in losses[0]] == list(range(1, 21))
  same(saved_state(undisturbed), saved_state(run))


@pytest.mark.timeout(600)
def test_stop_saves_and_does_not_queue_again(corpus, tmp_path):
  run = tmp_path / 'run'
  sent = jaxmed('launch', 'slurm', *words(TINY | {'steps': 100_000}), '--data', corpus, '--out', run, '--time', 30)
  try:
    wait(lambda: len(steps(run)) >= 2)
    assert 'asked to save and end' in jaxmed('stop', run)['stopped']
    wait(lambda: not jaxmed('status', run)['alive'], 200, pause=1)
  finally:
    subprocess.run(['scancel', sent['job']], check=False)
  assert 'stopped by jaxmed stop' in pathlib.Path(sent['log']).read_text()
  assert int(saved_state(run).step) == steps(run)[-1]
  assert 'has ended already' in jaxmed('stop', run)['stopped']


def test_what_sbatch_refuses_is_one_line(corpus, tmp_path):
  said = jaxmed('launch', 'slurm', '--data', corpus, '--out', tmp_path / 'run', '--time', 30, '--partition', 'nowhere',
                check=False)
  assert said.startswith('jaxmed: sbatch did not take the job') and said.count('\n') == 1
  assert 'invalid partition' in said.lower() and '--partition' in said
  assert not (tmp_path / 'run.launch' / 'launch.json').exists()
