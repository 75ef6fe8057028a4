"""Compiles one training step ahead of time for a TPU slice that is not there, in a process of its own (__main__).

The real compiler is that of the package libtpu. It is told by the environment, before JAX starts, that there is no
TPU to look for; a failure of it ends that process only.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from jaxmed.errors import UserError
from jaxmed.parallel import tpu

EXTRA = 'tpu-plan'
ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
               'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # asked for at start-up only: the topology is given by name
               'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TF_CPP_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3',
               'TPU_MIN_LOG_LEVEL': '3'}


def installed() -> bool:
  """Whether the compiler is there."""
  return importlib.util.find_spec('libtpu') is not None


def check() -> None:
  """Raises a UserError where the compiler is not installed."""
  if not installed():
    raise UserError(f"libtpu, the compiler for TPUs, is not installed: pip install 'jaxmed[{EXTRA}]'")


def run(job: dict[str, Any]) -> dict[str, Any]:
  """Compiles in another process: {'peak', 'arguments', 'temporary', 'cost' ...} or {'over': what did not fit}.

  Raises:
    UserError: the mesh does not fit the slice, or what else the job's process says in one line.
  """
  check()
  done = subprocess.run([sys.executable, '-m', 'jaxmed.plan'], input=json.dumps(job), capture_output=True,
                        text=True, env=tpu.allowed(os.environ) | ENVIRONMENT, check=False)
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    tail = '\n'.join(done.stderr.strip().splitlines()[-15:])
    raise RuntimeError(f'the compiler for {job["cluster"]} ended with {done.returncode}:\n{tail}')
  answer = json.loads(lines[-1])
  if 'mistake' in answer:
    raise UserError(answer['mistake'])
  return answer
