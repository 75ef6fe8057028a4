"""The same bytes from the workers of a Dask cluster, one of which is killed; and a killed worker of our own."""

import os
import signal
import subprocess
import threading
import time

import numpy as np
import psutil
import pytest

from jaxmed.data.prepare import blocks
from jaxmed.data.prepare import cluster as cluster_module
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import Unavailable, UserError
from tests.launch.test_slurm import takes_jobs


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(blocks, 'BLOCK_BYTES', (1 << 20, 1 << 20))
  (tmp_path / 'in').mkdir()
  rng = np.random.default_rng(0)
  for i in range(40):  # packing noise takes a while
    np.save(tmp_path / 'in' / f'{i:02d}.npy', rng.normal(size=(512, 512)).astype(np.float32))
  prepare([tmp_path / 'in'], tmp_path / 'one', progress=False)
  return tmp_path / 'in'


def content(out):
  return {p.name: p.read_bytes() for p in out.iterdir()}


def kill_after_blocks(out, count, pid):
  """Kills a process when so many blocks are done; returns a list that then says how many were."""
  said: list[int] = []

  def watch():
    for _ in range(60_000):
      done = len(list(out.with_name(f'{out.name}.part').glob('blocks/[0-9]*')))
      if done >= count:
        os.kill(pid(), signal.SIGKILL)
        said.append(done)
        return
      time.sleep(0.001)

  threading.Thread(target=watch, daemon=True).start()
  return said


def test_a_cluster_writes_the_same_bytes_when_a_worker_is_killed(folder, tmp_path, monkeypatch):
  distributed = pytest.importorskip('distributed')
  from distributed import LocalCluster

  with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
    with distributed.Client(cluster) as client:
      pids = list(client.run(os.getpid).values())
    said = kill_after_blocks(tmp_path / 'c', 3, lambda: pids[0])
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    summary = prepare(['in'], 'c', progress=False, scheduler=cluster.scheduler_address)
  assert summary['blocks'] == 40
  assert 3 <= said[0] < 40
  assert not psutil.pid_exists(pids[0])
  assert content(tmp_path / 'c') == content(tmp_path / 'one')
  monkeypatch.setattr(cluster_module, '_CONNECT', 1.0)
  with pytest.raises(UserError, match='no Dask scheduler answers at tcp://127.0.0.1:1'):
    prepare(['in'], 'd', progress=False, scheduler='tcp://127.0.0.1:1')


def test_a_killed_worker_is_one_line_and_the_same_call_goes_on(folder, tmp_path):
  def worker():
    found = [p for p in psutil.Process().children() if 'spawn_main' in ' '.join(p.cmdline())]
    return found[-1].pid

  said = kill_after_blocks(tmp_path / 'c', 3, worker)
  with pytest.raises(Unavailable, match='a worker process was killed .*: the same command goes on'):
    prepare([folder], tmp_path / 'c', progress=False, workers=2)
  assert 3 <= said[0] < 40
  kept = len(list((tmp_path / 'c.part').glob('blocks/[0-9]*')))
  assert kept >= 3
  assert prepare([folder], tmp_path / 'c', progress=False)['blocks'] == 40
  assert content(tmp_path / 'c') == content(tmp_path / 'one')


def test_bad_jobs(folder, tmp_path, monkeypatch):
  for words, options in (('jobs is 0', {'jobs': 0}), ("memory is 'much'", {'jobs': 1, 'memory': 'much'})):
    with pytest.raises(UserError, match=words):
      cluster_module.Slurm(**options)
  monkeypatch.setenv('PATH', '')
  with pytest.raises(UserError, match='there is no sbatch here'):
    prepare([folder], tmp_path / 'c', progress=False, scheduler=cluster_module.Slurm(1))
  assert not (tmp_path / 'c.part').exists()


@pytest.mark.slurm
@pytest.mark.skipif(not takes_jobs(), reason='no SLURM here: tools/slurm_here.sh sets one up')
@pytest.mark.timeout(900)
def test_slurm_jobs_write_the_same_bytes(folder, tmp_path, monkeypatch):
  pytest.importorskip('dask_jobqueue')
  jobs = cluster_module.Slurm(2, cores=1, memory='500MB', time='10')
  monkeypatch.chdir(tmp_path)
  summary = prepare(['in'], 'c', progress=False, scheduler=jobs)
  assert summary['blocks'] == 40
  assert content(tmp_path / 'c') == content(tmp_path / 'one')
  left = subprocess.run(['squeue', '-h', '-n', 'jaxmed-prepare', '-t', 'R,PD'], capture_output=True, text=True, check=True)
  assert left.stdout == ''
  assert not (tmp_path / 'c.part').exists()
  with pytest.raises(UserError, match='sbatch does not take such jobs: .*Invalid partition'):
    prepare(['in'], 'd', progress=False, scheduler=cluster_module.Slurm(1, partition='nowhere'))
  # A job that its time ends, or whose worker cannot start, is told of.
  monkeypatch.setattr(cluster_module, '_ASK', 1.0)
  monkeypatch.setattr(cluster_module.sys, 'executable', '/bin/false')
  with pytest.raises(Unavailable, match='all SLURM jobs ended before the work was done .*: the same command goes on'):
    prepare(['in'], 'e', progress=False, scheduler=jobs)
