"""The same loss, gradients, queues and clusters on one device and on eight simulated ones."""

import json
import os
import pathlib
import subprocess
import sys


def test_eight_devices():
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'
  done = subprocess.run(
      [sys.executable, '-m', 'tests.objectives.siamese_devices'], capture_output=True, text=True, timeout=200,
      env=os.environ | {'XLA_FLAGS': flags}, cwd=pathlib.Path(__file__).parent.parent.parent)
  assert done.returncode == 0, done.stderr[-2000:]
  out = json.loads(done.stdout.splitlines()[-1])
  assert out.pop('devices') == 8 and len(out) == 8
  for name, (loss, error, gradient, extra) in out.items():
    assert loss > 0 and error < 1e-5 * loss, name
    assert gradient < 1e-4, name
    assert extra < 1e-5, name
