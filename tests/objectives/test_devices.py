"""The same loss, gradients, statistics and state on one device and on four or eight simulated ones, for every method."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from tests.objectives.devices import CASES, FAST, SAMPLINGS

pytestmark = pytest.mark.timeout(1600)  # all cases are compiled in one process, slower where JAX fuses more


@pytest.fixture(scope='module')
def compared(request):
  """The comparisons of the cases that are tested, from one process with eight devices."""
  chosen = {item.callspec.params['case'] for item in request.session.items
            if item.path == request.path and item.originalname == 'test_devices_agree'}
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'
  done = subprocess.run(
      [sys.executable, '-m', 'tests.objectives.devices', *sorted(chosen)], capture_output=True, text=True, timeout=1500,
      env=os.environ | {'XLA_FLAGS': flags}, cwd=pathlib.Path(__file__).parent.parent.parent)
  assert done.returncode == 0, done.stderr[-2000:]
  out = json.loads(done.stdout.splitlines()[-1])
  assert out.pop('devices') == 8
  return out


@pytest.mark.parametrize('case', [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_devices_agree(compared, case):
  found = dict(compared[case])
  assert math.isfinite(found.pop('loss')) and found.pop('gradient') > 0
  assert len(found) == len(CASES[case][2]) >= 1
  for mesh, (loss, gradient, state) in found.items():
    assert loss < 1e-5, mesh
    assert gradient < 1e-4, mesh
    assert state < 1e-5, mesh


@pytest.mark.parametrize('kind', SAMPLINGS)
def test_devices_sample_the_same_channels(compared, kind):
  error, left, there = compared['sampled'][kind]
  assert error < 1e-5
  assert 0 < left < there


def test_every_device_packs_its_own_samples(compared):
  assert compared['moved'] == 0
