"""Start-up of one process or many, and what they tell each other on the host, without a device.

Words travel through the key-value store of the service that jax.distributed starts in process 0. JAX has no public
function for it: its client (`jax._src.distributed.global_state.client`, in JAX 0.10 and 0.12, which Orbax uses too) is
touched in `_client` only. A read or write takes a third of a millisecond on one machine.
"""

import atexit
import collections
import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxmed.errors import EXIT_UNAVAILABLE, UserError
from jaxmed.parallel import devices

# Variables that a launcher sets and jax.distributed reads by itself when several processes run.
_LAUNCHED = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_NUM_PROCESSES')

START_SECONDS = int(os.environ.get('JAXMED_START_SECONDS', '300'))  # to wait for all processes to join
SHARED_SECONDS = 30.0  # to wait until a file of one host is seen by the others: NFS may look into its cache first
LEAVE_SECONDS = 8.0  # that process 0 waits for the others when it ends because of an error
_SHUTDOWN_SECONDS = 60


def start() -> None:
  """Joins the other processes where a launcher started several; does nothing for one.

  A process that waits for the others longer than START_SECONDS says so and exits with EXIT_UNAVAILABLE.
  """
  if jax.distributed.is_initialized():
    return
  given: dict[str, Any] = {}
  if 'JAX_COORDINATOR_ADDRESS' in os.environ and 'JAX_PROCESS_ID' in os.environ:
    given = dict(num_processes=int(os.environ['JAX_NUM_PROCESSES']), process_id=int(os.environ['JAX_PROCESS_ID']))
  elif not any(int(os.environ.get(name, '1')) > 1 for name in _LAUNCHED):
    return
  if getattr(jax.config, 'jax_cpu_collectives_implementation', None) in (None, 'none'):
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  given |= devices.initialize_arguments(os.environ)
  # After so long without a sign of life JAX gives a process up and ends the others. What a killed process leaves behind
  # mostly ends them sooner: its connections close, and the next collective fails.
  heartbeat = int(os.environ.get('JAXMED_HEARTBEAT_SECONDS', '100'))
  with _time_limit(START_SECONDS):
    jax.distributed.initialize(**given, initialization_timeout=START_SECONDS + 60,
                               shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
                               heartbeat_timeout_seconds=heartbeat)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
  """Ends the process with one line when joining takes longer: JAX itself would abort with a trace of C++."""
  def give_up():
    first = lambda *names: next((os.environ[n] for n in names if n in os.environ), '?')
    me = first('JAX_PROCESS_ID', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    count = first('JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
    where = os.environ.get('JAX_COORDINATOR_ADDRESS', 'the coordinator')
    print(f'jaxmed: process {me} of {count} on {socket.gethostname()} waited {seconds:g} s for the others at {where}: '
          'a process that prints no such line did not start, or cannot reach it (see its log; '
          'JAXMED_START_SECONDS sets the limit)', file=sys.stderr, flush=True)
    os._exit(EXIT_UNAVAILABLE)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def owners() -> list[str]:
  """The devices of each process, and warnings of idle GPUs; all processes call it."""
  return devices.report(os.environ, socket.gethostname(), gather)


def is_main() -> bool:
  """Whether this process writes what there is one of."""
  return jax.process_index() == 0


def several() -> bool:
  """Whether the run has several processes."""
  return jax.process_count() > 1


def leave(code: int) -> None:
  """Ends this process at once: what JAX does at exit waits for the others, which may be gone.

  Process 0 goes last where the others are there still: they hear each other through it, and would be aborted.
  """
  if several() and jax.distributed.is_initialized():
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      if is_main():
        until(lambda: True if len(told('gone')) >= jax.process_count() - 1 else None, LEAVE_SECONDS)
        time.sleep(0.2)
      else:
        retell(f'gone/{jax.process_index()}', True)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def leave_at_exit(code: int) -> None:
  """Makes the end of this process, whenever it comes, a `leave`: for one that failed alone."""
  atexit.register(leave, code)  # before jax's own, which was registered first


def _client() -> Any:
  from jax._src import distributed
  return distributed.global_state.client


def tell(key: str, value: Any) -> bool:
  """Writes JSON under a key for all processes to read; False where there is something already."""
  try:
    _client().key_value_set(f'jaxmed/{key}', json.dumps(value))
  except jax.errors.JaxRuntimeError as e:
    if 'ALREADY_EXISTS' in str(e):
      return False
    raise
  return True


def retell(key: str, value: Any) -> None:
  """Writes JSON under a key, in the place of what was there."""
  _client().key_value_set(f'jaxmed/{key}', json.dumps(value), allow_overwrite=True)


def told(folder: str) -> dict[str, Any]:
  """What stands under `folder`/: the last part of each key -> its value."""
  return {key.rpartition('/')[2]: json.loads(value) for key, value in _client().key_value_dir_get(f'jaxmed/{folder}/')}


def forget(folder: str) -> None:
  """Removes what stands under `folder`/."""
  _client().key_value_delete(f'jaxmed/{folder}/')


_calls: collections.Counter = collections.Counter()


def gather(name: str, value: Any, seconds: float = 600.0) -> list[Any]:
  """The values of all processes, in order of process; all must call it. Runs on the host: nothing is compiled.

  Args:
    name: of this question, for people. value: anything that JSON holds. seconds: how long to wait for the others.

  Raises:
    UserError: not all answered in time; it names those that did not.
  """
  if not several():
    return [value]
  _calls[name] += 1
  folder, me, count = f'gather/{name}/{_calls[name]}', jax.process_index(), jax.process_count()
  tell(f'{folder}/said/{me}', value)
  if me == 0:  # one process reads all answers and gives them out: the others read one value each
    said = until(lambda: got if len(got := told(f'{folder}/said')) == count else None, seconds)
    said = told(f'{folder}/said') if said is None else said
    tell(f'{folder}/all/all', [[k, said[k]] for k in sorted(said, key=int)])
  found = until(lambda: told(f'{folder}/all').get('all'), seconds + 10)
  found = [] if found is None else found
  answers = {int(k): v for k, v in found}
  missing = [p for p in range(count) if p not in answers] if found else [0]
  if missing:
    raise UserError(f'{name}: no answer within {seconds:g} s from process{"es" if len(missing) > 1 else ""} '
                    f'{", ".join(map(str, missing))} of {count}: see the logs there')
  return [answers[p] for p in range(count)]


def until(get: Callable[[], Any], seconds: float) -> Any:
  """The first thing other than None that `get` gives; None after `seconds`."""
  end, pause = time.monotonic() + seconds, 0.002
  while (found := get()) is None and time.monotonic() < end:
    time.sleep(pause)
    pause = min(2 * pause, 0.1 if jax.process_count() < 500 else 1.0)
  return found


def any_process(flag: bool) -> bool:
  """True on all processes when `flag` is true on any; all must call it."""
  return any(gather('any', bool(flag)))


def check_shared(folder: str | os.PathLike, seconds: float = SHARED_SECONDS) -> None:
  """Raises a UserError on all processes where one does not see what process 0 writes into `folder`, if it is there."""
  if not several():
    return
  folder = pathlib.Path(folder)
  token = folder / f'.shared-{uuid.uuid4().hex}'
  if is_main() and folder.is_dir():
    try:
      token.touch()
    except OSError as e:
      raise UserError(f'cannot write {folder}: {e.strerror or e}') from e
  name, there = gather('start', [token.name, folder.is_dir()])[0]
  if not there:
    return  # what comes next says what is wrong with it
  token = folder / name
  seen = until(lambda: True if token.name in os.listdir(folder if folder.is_dir() else '.') else None, seconds)
  answers = gather(f'folder {folder}', [bool(seen), socket.gethostname()], seconds + 60)
  if is_main():
    token.unlink(missing_ok=True)
  blind = [f'process {p} on {host}' for p, (sees, host) in enumerate(answers) if not sees]
  if blind:
    raise UserError(f'{folder} is not the same folder for all processes: {", ".join(blind)} did not see within '
                    f'{seconds:g} s what process 0 on {answers[0][1]} wrote; --out must be on storage that all share')
