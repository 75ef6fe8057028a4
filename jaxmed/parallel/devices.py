"""Which GPUs each of several processes on a machine takes, and which ones nobody took.

JAX gives each process of SLURM and Open MPI one GPU, the one numbered as its place on the machine
(`jax.distributed`, ClusterEnv.get_local_process_id), whatever the job asked for: with several GPUs a task the others
stay idle, and with GPUs bound to their task (`--gpus-per-task` implies it; each task then sees its own from 0) that
number may not exist.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmed.errors import UserError

_VISIBLE = ('CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES')
_LINES = 16  # processes that are listed one by one


def initialize_arguments(env: Mapping[str, str]) -> dict[str, Any]:
  """Arguments of `jax.distributed.initialize` that share the GPUs of a machine out; {} leaves it to JAX.

  Raises:
    UserError: more processes on the machine than GPUs.
  """
  ids = local_device_ids(env)
  return {} if ids is None else {'local_device_ids': ids}


def local_device_ids(env: Mapping[str, str]) -> list[int] | None:
  """Numbers, among the GPUs that this process sees, of those that it takes; None where JAX should decide.

  A process started with JAX_PROCESS_ID takes all that it sees. A task of SLURM or Open MPI that sees only its own
  takes all of them; tasks that see those of the whole machine take SLURM_GPUS_PER_TASK or an equal share each, in
  their order.

  Raises:
    UserError: more tasks on the machine than GPUs.
  """
  seen = _seen(env)
  if not seen or 'JAX_LOCAL_DEVICE_IDS' in env or _only_cpu(env):
    return None
  if 'JAX_PROCESS_ID' in env:
    return list(range(seen)) if visible(env) else None
  rank, tasks = _place(env)
  if tasks is None:
    return None
  each = _number(env.get('SLURM_GPUS_PER_TASK', ''))
  if tasks == 1 or _bound(env, seen, tasks, each):
    return list(range(seen))
  each = each or seen // tasks
  if each < 1 or each * tasks > seen:
    wanted = f'{tasks} tasks on a machine with {seen} GPUs' + (f', {each} a task' if each else '')
    raise UserError(f'{wanted}: processes cannot share a GPU; start {seen // max(each, 1)} tasks on each machine, or '
                    'ask for more GPUs')
  return list(range(rank * each, (rank + 1) * each))


def _bound(env: Mapping[str, str], seen: int, tasks: int, each: int) -> bool:
  """Whether the launcher has bound GPUs to each task, so that tasks see different ones."""
  here = _number(env.get('SLURM_GPUS_ON_NODE', ''))
  binding = env.get('SLURM_GPU_BIND', '') + env.get('SLURM_TRES_BIND', '')
  return (each > 0 and seen == each) or (here > 0 and seen * tasks == here) or bool(
      re.search('per_task|single', binding) and seen < here)


def visible(env: Mapping[str, str]) -> list[str]:
  """The GPUs that a variable of the environment lets this process see, by the names that it uses (numbers, UUIDs)."""
  text = next((env[name] for name in _VISIBLE if name in env), '')
  return [name.strip() for name in text.split(',') if name.strip() not in ('', '-1', 'NoDevFiles')]


def _seen(env: Mapping[str, str]) -> int:
  """How many GPUs this process sees: by a variable, otherwise all that SLURM gave on this machine."""
  if any(name in env for name in _VISIBLE):
    return len(visible(env))
  return _number(env.get('SLURM_GPUS_ON_NODE', ''))


def _only_cpu(env: Mapping[str, str]) -> bool:
  return env.get('JAX_PLATFORMS', '') == 'cpu'


def _number(text: str) -> int:
  """'4', 'a100:4' -> 4; 0 for anything else."""
  last = text.rpartition(':')[2]
  return int(last) if last.isdigit() else 0


def _place(env: Mapping[str, str]) -> tuple[int, int | None]:
  """(local rank, processes on this machine); (0, None) outside SLURM and Open MPI."""
  if int(env.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    tasks = tasks_per_node(env.get('SLURM_STEP_TASKS_PER_NODE', '1'))
    return int(env.get('SLURM_LOCALID', '0')), tasks[min(int(env.get('SLURM_NODEID', '0')), len(tasks) - 1)]
  if int(env.get('OMPI_COMM_WORLD_SIZE', '1')) > 1:
    return int(env.get('OMPI_COMM_WORLD_LOCAL_RANK', '0')), int(env.get('OMPI_COMM_WORLD_LOCAL_SIZE', '1'))
  return 0, None


def tasks_per_node(text: str) -> list[int]:
  """SLURM's '2(x3),1' -> [2, 2, 2, 1]."""
  out = []
  for part in text.split(','):
    found = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part.strip())
    out += [int(found[1])] * int(found[2] or 1) if found else []
  return out or [1]


def owner(env: Mapping[str, str], process: int, host: str, kind: str, owned: Sequence[int],
          machine: Sequence[str]) -> dict[str, Any]:
  """What one process tells the others of its devices, as plain data for JSON.

  Args:
    kind: of its devices. owned: their numbers among the GPUs that it sees; () for devices that are no GPUs.
    machine: names of the GPUs of the machine, where no variable limits them.
  """
  limited = any(name in env for name in _VISIBLE)
  names = visible(env) if limited else list(machine)
  given = 0 if _only_cpu(env) else max(len(names), _number(env.get('SLURM_GPUS_ON_NODE', '')))
  return {'process': process, 'host': host, 'kind': kind, 'given': given, 'visible': [] if _only_cpu(env) else names,
          'owned': [names[i] if i < len(names) else str(i) for i in owned]}


def lines(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
  """Who owns what, a line a process; of very many the first ones."""
  out = []
  for one in everyone[:_LINES]:
    gpus = f'GPU {", ".join(one["owned"])} ({one["kind"]})' if one['owned'] else one['kind']
    out.append(f'process {one["process"]} on {one["host"]}: {gpus}')
  rest = everyone[_LINES:]
  return out + ([f'and {len(rest)} more processes on {len({one["host"] for one in rest})} machines'] if rest else [])


def idle(everyone: Sequence[Mapping[str, Any]]) -> list[str]:
  """A warning for each machine on which GPUs that the job may use are used by no process."""
  out = []
  for host in dict.fromkeys(one['host'] for one in everyone):
    here = [one for one in everyone if one['host'] == host]
    used = [name for one in here for name in one['owned']]
    seen = list(dict.fromkeys(name for one in here for name in one['visible']))
    given = max([len(seen), *(one['given'] for one in here)])
    if given <= len(used):
      continue
    free = [name for name in seen if name not in used]
    which = f'GPU {", ".join(free)}' if len(free) == given - len(used) else f'{given - len(used)} of {given} GPUs'
    out.append(f'{which} of {host} {"is" if given - len(used) == 1 else "are"} used by no process: ' + (
        'start one process for each GPU, or give each process several (--gpus-per-task)' if used else
        "JAX has no support for them here: pip install jax[cuda13], or set JAX_PLATFORMS=cpu to train without"))
  return out


def machine_gpus() -> list[str]:
  """Indices of the NVIDIA GPUs that nvidia-smi lists, [] without any."""
  if shutil.which('nvidia-smi') is None:
    return []
  try:
    done = subprocess.run(['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'], capture_output=True, text=True,
                          check=False, timeout=20)
  except subprocess.TimeoutExpired:
    return []
  return done.stdout.split() if done.returncode == 0 else []


def report(env: Mapping[str, str], host: str, gather: Callable[[str, Any], list[Any]]) -> list[str]:
  """Lines to print at the start: the devices of each process, and warnings of idle ones. All processes call it.

  Args:
    gather: gives what each process says, in order (`parallel.process.gather`).
  """
  import jax  # here: what launches processes reads this module too, and needs none
  own = jax.local_devices()
  ids = local_device_ids(env)
  gpu = own[0].platform in ('gpu', 'cuda', 'rocm')
  if gpu and ids is None:
    ids = [d.local_hardware_id if d.local_hardware_id is not None else i for i, d in enumerate(own)]
  kind = own[0].device_kind if gpu else f'{len(own)} {own[0].device_kind}'
  limited = any(name in env for name in _VISIBLE)
  said = owner(env, jax.process_index(), host, kind, (ids or []) if gpu else [], () if limited else machine_gpus())
  everyone = gather('devices', said)
  shown = lines(everyone) if len(everyone) > 1 else []
  return shown + [f'warning: {text}' for text in idle(everyone)]


def cores() -> int:
  """The cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
