"""libtpu stays away from machines without a TPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

from jaxmed.parallel import tpu


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """A libtpu that prints errors when JAX asks it for its library."""
  place = tmp_path / 'site' / 'libtpu'
  place.mkdir(parents=True)
  (place / '__init__.py').write_text('import sys\nprint("WARNING: no TPU", file=sys.stderr)\n'
                                     'def get_library_path():\n  return "none.so"\n')
  monkeypatch.syspath_prepend(str(place.parent))
  importlib.invalidate_caches()
  return place.parent


def test_left_out_without_a_tpu(installed, tmp_path):
  env = {}
  assert tpu.leave_out(env, str(tmp_path))
  assert os.path.isfile(env['TPU_LIBRARY_PATH'])
  assert tpu.allowed(env | {'A': 'b'}) == {'A': 'b'}


@pytest.mark.parametrize('device', ['accel0', 'vfio/0'])
def test_a_tpu_is_left_alone(installed, tmp_path, device):
  place = tmp_path / 'dev' / device
  place.parent.mkdir(parents=True)
  place.touch()
  env = {}
  assert not tpu.leave_out(env, str(tmp_path))
  assert env == {}


@pytest.mark.parametrize('name', ['JAX_PLATFORMS', 'TPU_LIBRARY_PATH', 'TPU_WORKER_HOSTNAMES'])
def test_a_choice_is_left_alone(installed, tmp_path, name):
  env = {name: 'mine'}
  assert not tpu.leave_out(env, str(tmp_path))
  assert env == tpu.allowed(env) == {name: 'mine'}


def test_not_installed(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert not tpu.leave_out({}, str(tmp_path))


@pytest.mark.skipif(tpu.has_tpu(), reason='there is a TPU')
def test_commands_are_quiet(installed):
  env = {k: v for k, v in os.environ.items() if k not in tpu._VARIABLES}
  env['PYTHONPATH'] = os.pathsep.join([str(installed), os.getcwd()])
  code = 'from jaxmed import cli; cli._quiet_libraries(); {}import jax; print(jax.default_backend())'
  words = lambda first: [sys.executable, '-c', code.format(first)]
  loud = subprocess.run(words(''), env=env, capture_output=True, text=True, check=True)
  assert 'no TPU' in loud.stderr
  done = subprocess.run(words('cli.tpu.leave_out(); '), env=env, capture_output=True, text=True, check=True)
  assert done.stderr == ''
  assert done.stdout == loud.stdout
