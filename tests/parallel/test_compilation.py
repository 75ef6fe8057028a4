"""Compiled programs are kept where a user wants them, and found by the next process."""

import os
import subprocess
import sys

import jax
import pytest

from jaxmed.parallel import compilation

pytest.importorskip('filelock')
_OPTIONS = ('jax_compilation_cache_dir', 'jax_compilation_cache_max_size', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture
def unset():
  before = {name: getattr(jax.config, name) for name in _OPTIONS}
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_folder_of_the_machine_with_a_limit(unset, tmp_path):
  place = compilation.keep({'JAXMED_CACHE': str(tmp_path)})
  assert place == tmp_path / 'xla' / compilation.machine()
  assert place.is_dir()
  assert jax.config.jax_compilation_cache_dir == str(place)
  assert jax.config.jax_compilation_cache_max_size == compilation.SIZE


@pytest.mark.parametrize('word', ['off', 'OFF', '0'])
def test_switched_off(unset, tmp_path, word):
  assert compilation.keep({'JAXMED_CACHE': str(tmp_path), 'JAXMED_COMPILATION_CACHE': word}) is None
  assert jax.config.jax_compilation_cache_dir is None
  assert not list(tmp_path.iterdir())


def test_a_choice_is_left_alone(unset, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  assert compilation.keep({'JAXMED_CACHE': str(tmp_path)}) is None
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'mine')


def test_a_place_that_cannot_be_written(unset, tmp_path):
  (tmp_path / 'file').touch()
  assert compilation.keep({'JAXMED_CACHE': str(tmp_path / 'file')}) is None
  assert jax.config.jax_compilation_cache_dir is None


def test_without_filelock(unset, tmp_path, monkeypatch):
  monkeypatch.setattr(compilation.importlib.util, 'find_spec', lambda name: None)
  assert compilation.keep({'JAXMED_CACHE': str(tmp_path)}) is None


def test_processes_at_once_share_it(tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_COMPILATION', 'JAX_PERSISTENT'))}
  env |= {'JAXMED_CACHE': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  code = ('from jaxmed.parallel import compilation; compilation.keep(); import jax; hits = []; '
          'jax.monitoring.register_event_listener(lambda e, **k: hits.append(e) if "cache_hits" in e else None); '
          'print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))), len(hits))')
  start = lambda: subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
  first = [p.communicate() + (p.returncode,) for p in [start() for _ in range(2)]]
  out, err, code_ = start().communicate() + (0,)
  assert [c for *_, c in first] == [0, 0]
  assert {o.split()[0] for o, _, _ in first} == {out.split()[0]} == {'262144.0'}
  assert int(out.split()[1]) > 0
  assert err == '' and not any(e for _, e, _ in first)
