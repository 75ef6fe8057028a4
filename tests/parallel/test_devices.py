"""The same run on one device, on eight simulated ones in several meshes, and on two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.train.logs import read_rows
from tests.common import saved_state
from tests.conftest import TINY

MESHES = {'data=8': {}, 'fsdp=8': {'fsdp': 8}, 'data=4 tensor=2': {'tensor': 2}}


def process(devices, **env):
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
      [sys.executable, '-m', 'tests.parallel.runs'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, env=os.environ | {'XLA_FLAGS': flags} | env,
      cwd=pathlib.Path(__file__).parent.parent.parent)


def answers(processes, asks):
  """What each process says to `asks`; all are given them before any is waited for."""
  for p in processes:
    p.stdin.write(json.dumps(asks))
    p.stdin.close()
    p.stdin = None
  said = [p.communicate(timeout=200) for p in processes]
  assert all(p.returncode == 0 for p in processes), '\n'.join(err[-2000:] for _, err in said)
  return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.fixture(scope='module')
def eight(corpus, tmp_path_factory):
  """Runs and refusals with eight devices, all from one process."""
  place = tmp_path_factory.mktemp('eight')
  user = TINY | {'data': str(corpus)}
  asks = {name: merge(user, {'mesh': mesh}) for name, mesh in MESHES.items()} | {
      'batch': merge(user, {'batch_size': 12}), 'mesh': merge(user, {'mesh': {'tensor': 3}}),
      'two rests': merge(user, {'mesh': {'tensor': 0}}), 'small': merge(user, {'batch_size': 4}),
      'accumulate': merge(user, {'batch_size': 24, 'optimizer': {'accumulate': 2}})}
  out, = answers([process(8)], [(values, str(place / name), False) for name, values in asks.items()])
  return place, dict(zip(asks, out, strict=True))


def losses(run):
  return [r['loss'] for r in read_rows(run / 'metrics.jsonl') if 'loss' in r]


def alike(a, b):
  """Equal moments and, but for few, weights: where a gradient is zero (biases of keys), Adam's step is its rounding."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a.moments, b.moments)
  off = np.concatenate([np.ravel(np.abs(x - y)) for x, y in zip(
      jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)])
  assert np.quantile(off, 0.99) < 1e-5
  assert off.max() < 20 * 2 * TINY['learning_rate']


@pytest.mark.parametrize('mesh', MESHES)
def test_eight_devices_give_the_curve_of_one(trained, eight, mesh):
  place, curves = eight
  assert len(curves[mesh]) == 20
  np.testing.assert_allclose(curves[mesh], losses(trained), rtol=1e-5)
  want, got = saved_state(trained), saved_state(place / mesh)
  assert int(got.skipped) == 0
  alike(want, got)


def test_what_does_not_fit_eight_devices(eight):
  place, said = eight
  assert 'batch_size 12 does not divide over 8 devices' in said['batch']
  assert 'nearest is 16' in said['batch'] or 'nearest is 8' in said['batch']
  assert 'nearest is 8' in said['small']
  assert 'nearest is 16' in said['accumulate'] or 'nearest is 32' in said['accumulate']
  assert 'mesh replica=1 x data=rest x fsdp=1 x sequence=1 x tensor=3 does not fit 8 devices' in said['mesh']
  assert 'does not fit 8 devices' in said['two rests']
  assert sorted(p.name for p in place.iterdir()) == sorted(MESHES)


def test_two_processes_give_the_curve_of_one(trained, corpus, tmp_path):
  """Two processes of four devices each, joined as a launcher would, write one run."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  both = [process(4, JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}', JAX_NUM_PROCESSES='2', JAX_PROCESS_ID=str(i))
          for i in range(2)]
  said = answers(both, [(TINY | {'data': str(corpus)}, str(tmp_path / 'run'), True)])
  np.testing.assert_allclose(said[0][0], losses(trained), rtol=1e-5)
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert [r['step'] for r in rows if 'loss' in r] == list(range(1, 21))
  assert [r['step'] for r in rows if 'val_loss' in r] == [10, 20]
  want, got = saved_state(trained), saved_state(tmp_path / 'run')
  alike(want, got)
