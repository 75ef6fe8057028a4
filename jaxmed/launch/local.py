"""Several processes on this machine: started together, watched, ended together, started again after exit code 75."""

import contextlib
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from jaxmed.errors import EXIT_STOPPED, EXIT_UNAVAILABLE, UserError
from jaxmed.launch import record
from jaxmed.launch.job import Job
from jaxmed.launch.options import Local
from jaxmed.parallel.devices import machine_gpus

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL = 0.05  # seconds
_AGAIN = (EXIT_STOPPED, EXIT_UNAVAILABLE)  # a run that ended so may be started again


def visible_gpus(env: Mapping[str, str]) -> list[str]:
  """The GPUs that processes started here would see: CUDA_VISIBLE_DEVICES, otherwise what nvidia-smi lists."""
  if 'CUDA_VISIBLE_DEVICES' in env:
    return [name for name in env['CUDA_VISIBLE_DEVICES'].split(',') if name]
  return [] if env.get('JAX_PLATFORMS', '') == 'cpu' else machine_gpus()


def share(gpus: list[str], o: Local) -> list[list[str]]:
  """The GPUs of each process: all of them shared out, or `gpus` each.

  Raises:
    UserError: they do not go round; JAX processes cannot share a GPU.
  """
  if not gpus and not o.gpus:
    return [[] for _ in range(o.processes)]
  each = o.gpus or len(gpus) // o.processes
  if each < 1 or each * o.processes > len(gpus):
    wanted = f'--processes {o.processes}' + (f' x --gpus {o.gpus}' if o.gpus else '')
    raise UserError(f'{wanted} needs {max(each, 1) * o.processes} GPUs, this machine shows {len(gpus)}: '
                    'processes cannot share one')
  return [gpus[i * each : (i + 1) * each] for i in range(o.processes)]


def devices(o: Local, gpus: list[str]) -> tuple[int, str]:
  """How many devices all processes have, and how they come about; 0 where simulated ones may be added."""
  if not gpus and 'device_count' in os.environ.get('XLA_FLAGS', ''):
    return 0, ''
  each = max(len(share(gpus, o)[0]), 1)
  return o.processes * each, f'{o.processes} processes' + (f' x {each} GPUs' if each > 1 else '')


def environments(job: Job, o: Local, gpus: list[str], port: int) -> list[dict[str, str]]:
  """What is added to the environment of each process."""
  out = []
  for i, own in enumerate(share(gpus, o)):
    joined = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(o.processes),
              'JAX_PROCESS_ID': str(i)} if o.processes > 1 else {}
    out.append(job.variables() | joined | ({'CUDA_VISIBLE_DEVICES': ','.join(own)} if own else {}))
  return out


def script(job: Job, o: Local) -> str:
  """What would be started, as lines of a shell; the port is chosen at the start."""
  lines = []
  for env in environments(job, o, visible_gpus(os.environ), 0):
    words = [f'{k}={v}' for k, v in env.items()]
    lines.append(' '.join([*words, job.line()]).replace('127.0.0.1:0', '127.0.0.1:PORT'))
  return '\n'.join(lines) + '\n'


class _Child:
  """A process, and a thread that copies its output to a file and, with its number, to this process's stderr."""

  def __init__(self, number: int, of: int, job: Job, env: Mapping[str, str]):
    self.number, self.log, self.last = number, job.place / f'log-{number}.txt', ''
    self.sent: set[int] = set()
    # A session of its own: Ctrl-C reaches it from us, once.
    self.process = subprocess.Popen(job.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, env=os.environ | dict(env), cwd=job.folder,
                                    start_new_session=True)
    prefix = f'[{number}] ' if of > 1 else ''
    self._thread = threading.Thread(target=self._copy, args=(self.process.stdout, prefix), daemon=True)
    self._thread.start()

  def _copy(self, pipe: IO[bytes], prefix: str) -> None:
    with open(self.log, 'ab') as f:
      for line in pipe:
        f.write(line)
        f.flush()
        text = line.decode('utf-8', 'replace').rstrip()
        self.last = text or self.last
        print(prefix + text, file=sys.stderr, flush=True)

  def code(self) -> int | None:
    """Its exit code as a shell has it (128 + the signal that killed it), None while it runs.

    One that our signal ended before it had begun to train has nothing to save: 75 too.
    """
    code = self.process.poll()
    if code is not None and -code in self.sent:
      return EXIT_STOPPED
    return None if code is None else 128 - code if code < 0 else code

  def signal(self, number: int) -> None:
    """Sends a signal, unless it has ended."""
    if number != signal.SIGKILL:
      self.sent.add(number)
    with contextlib.suppress(ProcessLookupError):
      self.process.send_signal(number)

  def finish(self) -> None:
    """Waits for the last of its output."""
    self._thread.join(2)  # a process of its own may hold the pipe for longer

  def obituary(self) -> str:
    """How it ended, with its last words."""
    self.finish()
    return f'process {self.number} died with exit code {self.code()} ({self.last[-200:]}); its output is in {self.log}'


@contextlib.contextmanager
def noted(then: Callable[[int], Any] = lambda number: None) -> Iterator[list[int]]:
  """Calls `then` of signals that ask this process to end or to save; yields the list of those that came."""
  came: list[int] = []

  def note(number: int, frame: Any) -> None:
    del frame
    came.append(number)
    then(number)

  before = {n: signal.signal(n, note) for n in _FORWARDED}
  try:
    yield came
  finally:
    for n, handler in before.items():
      signal.signal(n, handler)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _say(text: str) -> None:
  print(f'jaxmed launch: {text}', file=sys.stderr, flush=True)


def _supervise(children: list[_Child], grace: int, came: list[int]) -> int:
  """Waits for all; when one dies, or others stay behind, ends them.

  Returns:
    0 if all ended well; otherwise the code of the first that died, or 75 or 69 where none died of anything else.
  """
  first, deadline = 0, 0.0
  while None in (codes := [child.code() for child in children]):
    time.sleep(_POLL)
    dead = [c for c in children if c.code() not in (None, 0, *_AGAIN)]
    if dead and not first and not came:
      first, deadline = dead[0].code() or 1, time.monotonic() + grace
      _say(f'{dead[0].obituary()}; ending the others')
      _send(children, signal.SIGTERM)
    elif not deadline and set(codes) & {*_AGAIN}:
      deadline = time.monotonic() + grace
    elif deadline and time.monotonic() > deadline:
      late = [str(c.number) for c in children if c.code() is None]
      _say(f'killing process {", ".join(late)}, which did not end within --grace {grace} s')
      _send(children, signal.SIGKILL)
      deadline = float('inf')
  for child in children:
    child.finish()
  again = [code for code in _AGAIN if code in codes]
  dead = [c for c in children if c.code() not in (0, *_AGAIN)]
  if first or again or not dead:
    return first or (again or [0])[0]
  _say(dead[0].obituary())
  return dead[0].code() or 1


def _send(children: list[_Child], number: int) -> None:
  for child in children:
    child.signal(number)


def submit(job: Job, o: Local) -> dict[str, Any]:
  """Runs the processes to their end, starting them again after 75 as often as allowed: {'code': exit code}."""
  gpus = visible_gpus(os.environ)
  for old in job.place.glob('log-*.txt'):
    old.unlink()
  attempt = 0
  while True:
    children: list[_Child] = []
    with noted(functools.partial(_send, children)) as came:
      for i, env in enumerate(environments(job, o, gpus, _free_port())):
        children.append(_Child(i, o.processes, job, env))
      if came:
        _send(children, came[-1])  # those that began after it came
      _remember(job, children)
      code = _supervise(children, o.grace, came)
    if code not in _AGAIN or came or attempt == job.restarts:
      return {'code': code, 'restarts': attempt}
    attempt += 1
    _say(f'ended with exit code {code}: starting again ({attempt} of {job.restarts})')


def _remember(job: Job, children: list[_Child]) -> None:
  """Writes who runs, so that `status` and `stop` find them."""
  record.write(job.place, {
      'launcher': 'local', 'run': job.out, 'command': job.command(), 'launcher_process': record.identity(os.getpid()),
      'processes': [record.identity(child.process.pid) for child in children]})


def state(values: dict[str, Any]) -> record.State:
  """Which of the processes live."""
  living = [int(p[0]) for p in values.get('processes', []) if record.alive(p)]
  text = f'{len(living)} of {len(values.get("processes", []))} processes run on this machine'
  return record.State(bool(living), text + (f': {", ".join(map(str, living))}' if living else ''))


def stop(values: dict[str, Any]) -> str:
  """Asks the processes to save and end: through their launcher where that lives, otherwise themselves."""
  launcher = values.get('launcher_process', [0, 0.0])
  targets = [launcher] if record.alive(launcher) else [p for p in values.get('processes', []) if record.alive(p)]
  for pid, _ in targets:
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid), signal.SIGTERM)
  return 'asked to save and end' if targets else 'nothing of it runs on this machine'


def log(values: dict[str, Any]) -> str:
  """Where the output of each process is."""
  return str(pathlib.Path(values['place']) / 'log-*.txt')
