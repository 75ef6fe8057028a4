"""Start-up of one process or many, and the few things that they decide together."""

import os

import jax
import numpy as np

# Variables that a launcher sets and jax.distributed reads by itself when several processes run.
_LAUNCHED = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_NUM_PROCESSES')


def start() -> None:
  """Joins the other processes where a launcher started several; does nothing for one."""
  if jax.distributed.is_initialized():
    return
  if 'JAX_COORDINATOR_ADDRESS' in os.environ and 'JAX_PROCESS_ID' in os.environ:
    jax.distributed.initialize(num_processes=int(os.environ['JAX_NUM_PROCESSES']),
                               process_id=int(os.environ['JAX_PROCESS_ID']))
  elif any(int(os.environ.get(name, '1')) > 1 for name in _LAUNCHED):
    jax.distributed.initialize()


def is_main() -> bool:
  """Whether this process writes what there is one of."""
  return jax.process_index() == 0


def any_process(flag: bool) -> bool:
  """True on all processes when it is true on any. A collective call when there are several."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
