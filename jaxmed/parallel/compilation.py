"""Compiled programs are kept on disk, so that the same command starts sooner the next time.

They lie in $JAXMED_CACHE/xla (~/.cache/jaxmed/xla by default), in a folder for each kind of machine: JAX's key of a
program for CPUs does not hold the instructions that the processor has. JAXMED_COMPILATION_CACHE=off switches this off,
and JAX_COMPILATION_CACHE_DIR names another place. JAX keeps a file lock while it reads or writes, so that any number of
processes may share the folder, and removes what was used longest ago beyond SIZE.
"""

import hashlib
import importlib.util
import os
import pathlib
import platform
from collections.abc import Mapping

import jax

SIZE = 2 << 30
LEAST_SECONDS = 0.2  # a program that compiles faster is not worth a file
_OFF = ('off', '0', 'false', 'no')


def keep(env: Mapping[str, str] = os.environ) -> pathlib.Path | None:
  """Has JAX keep the programs that it compiles from now on, unless the user chose otherwise; returns where, or None.

  To be called by commands, never where the library is imported.
  """
  if getattr(jax.config, 'jax_compilation_cache_dir', None) or env.get('JAXMED_COMPILATION_CACHE', '').lower() in _OFF:
    return None
  if importlib.util.find_spec('filelock') is None:  # without it JAX can neither lock nor limit the folder
    return None
  base = pathlib.Path(env.get('JAXMED_CACHE') or pathlib.Path.home() / '.cache' / 'jaxmed')
  place = base / 'xla' / machine()
  try:
    place.mkdir(parents=True, exist_ok=True)
  except OSError:
    return None
  if not os.access(place, os.W_OK):
    return None
  jax.config.update('jax_compilation_cache_dir', str(place))
  if 'JAX_COMPILATION_CACHE_MAX_SIZE' not in env:
    jax.config.update('jax_compilation_cache_max_size', SIZE)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in env:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', LEAST_SECONDS)
  return place


def machine() -> str:
  """A word for the kind of this machine: the same where a program compiled for it runs."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    lines = [platform.processor()]
  told = sorted({line for line in lines if line.startswith(('flags', 'Features', 'model name', 'vendor_id'))})
  return f'{platform.machine()}-{hashlib.sha256(repr(told or lines[:1]).encode()).hexdigest()[:12]}'
