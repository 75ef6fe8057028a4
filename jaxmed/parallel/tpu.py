"""Whether this machine has a TPU, told without JAX; where it has none, libtpu stays away.

JAX loads libtpu, the compiler of `jaxmed plan`, wherever it is installed, and looks for a TPU; without one libtpu
prints errors of its own. JAX_PLATFORMS=cpu would end that, and hide GPUs. So JAX is told to load a file as libtpu that
is none, which fails without a word, and goes on to the other platforms.
"""

import glob
import importlib.util
import os
from collections.abc import Mapping, MutableMapping

_DEVICES = ('dev/accel*', 'dev/vfio/[0-9]*')  # of v2 to v4, and from v5e on
# What a TPU VM, GKE or a user sets; a choice that was made is left alone.
_VARIABLES = ('JAX_PLATFORMS', 'JAX_FORCE_TPU_INIT', 'TPU_LIBRARY_PATH', 'TPU_NAME', 'TPU_ACCELERATOR_TYPE',
              'TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID', 'TPU_PROCESS_ADDRESSES', 'TPU_VISIBLE_CHIPS',
              'TPU_VISIBLE_DEVICES')
_NO_LIBRARY = os.path.abspath(__file__)


def has_tpu(root: str = '/') -> bool:
  """Whether device files of accelerators exist."""
  return any(glob.glob(os.path.join(root, pattern)) for pattern in _DEVICES)


def leave_out(env: MutableMapping[str, str] = os.environ, root: str = '/') -> bool:
  """Has JAX not load libtpu where there is no TPU; to be called before JAX looks for devices. Whether it does so.

  Nothing is done where libtpu is not installed, or a variable says what to do.
  """
  if any(name in env for name in _VARIABLES) or importlib.util.find_spec('libtpu') is None or has_tpu(root):
    return False
  env['TPU_LIBRARY_PATH'] = _NO_LIBRARY
  return True


def allowed(env: Mapping[str, str]) -> dict[str, str]:
  """An environment in which libtpu is loaded, whatever `leave_out` did."""
  return {k: v for k, v in env.items() if (k, v) != ('TPU_LIBRARY_PATH', _NO_LIBRARY)}
