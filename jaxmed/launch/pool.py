"""Processes of their own on this machine, at most so many at once: started, watched, ended together.

Each writes its output to a file. It holds the other end of a pipe: when this process is gone, however that came, it
saves and ends too (`follow_parent`).
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmed.errors import EXIT_STOPPED, Stopped
from jaxmed.launch.local import noted
from jaxmed.parallel.devices import cores

FOLLOW = 'JAXMED_FOLLOWS'  # set for processes whose standard input is the pipe
_POLL = 0.05  # seconds


@dataclasses.dataclass(frozen=True)
class Task:
  """A process to run: a name, its command, the file of its output."""

  name: str
  command: Sequence[str]
  log: pathlib.Path


@dataclasses.dataclass
class _Child:
  task: Task
  process: subprocess.Popen
  slot: int
  asked: bool = False  # to end

  def code(self) -> int | None:
    """Its exit code as a shell has it; 75 where our signal ended it before it could answer one."""
    code = self.process.poll()
    if code is not None and self.asked and code in (-signal.SIGTERM, -signal.SIGKILL):
      return EXIT_STOPPED
    return None if code is None else 128 - code if code < 0 else code


def run(tasks: Sequence[Task], at_once: int, ended: Callable[[Task, int, str], None], *, grace: float = 60,
        environments: Sequence[Mapping[str, str]] = ()) -> None:
  """Runs all tasks, in their order.

  Args:
    ended: is told of each task that ended its exit code and the last line of its output.
    grace: seconds to save and end after a signal, before they are killed.
    environments: variables of the processes, one mapping for each of those that run at once.
  Raises:
    Stopped: a signal came; every process has ended.
  """
  waiting, running = list(tasks), list[_Child]()
  shares = _shares(at_once)
  with noted() as came:
    try:
      while running or (waiting and not came):
        while waiting and not came and len(running) < at_once:
          slot = min({*range(at_once)} - {c.slot for c in running})
          running.append(_start(waiting.pop(0), slot, environments[slot] if environments else {}, shares))
        if came and not all(c.asked for c in running):
          _end(running)
          threading.Thread(target=_kill_later, args=(list(running), grace), daemon=True).start()
        time.sleep(_POLL)
        for child in [c for c in running if c.code() is not None]:
          running.remove(child)
          ended(child.task, child.code() or 0, last_line(child.task.log))
    finally:  # whatever went wrong here
      _end(running)
  if came:
    raise Stopped(f'{signal.Signals(came[0]).name}; the same command goes on')


def _start(task: Task, slot: int, env: Mapping[str, str], shares: Sequence[set[int]]) -> _Child:
  task.log.parent.mkdir(parents=True, exist_ok=True)
  with open(task.log, 'ab') as log:
    # A session of its own: Ctrl-C reaches it from us, once.
    process = subprocess.Popen(list(task.command), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                               env=os.environ | {FOLLOW: '1'} | dict(env), start_new_session=True)
  if shares:
    with contextlib.suppress(OSError):
      os.sched_setaffinity(process.pid, shares[slot])
  return _Child(task, process, slot)


def _shares(at_once: int) -> list[set[int]]:
  """The cores of each process: equal parts, where there are enough; [] leaves all to all."""
  if not hasattr(os, 'sched_setaffinity') or at_once < 2 or cores() < at_once:
    return []
  mine = sorted(os.sched_getaffinity(0))
  return [set(mine[i::at_once]) for i in range(at_once)]


def _end(children: Sequence[_Child]) -> None:
  for child in children:
    if not child.asked:
      child.asked = True
      with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(signal.SIGTERM)


def _kill_later(children: Sequence[_Child], grace: float) -> None:
  end = time.monotonic() + grace
  while time.monotonic() < end and any(c.process.poll() is None for c in children):
    time.sleep(_POLL)
  for child in children:
    with contextlib.suppress(ProcessLookupError):
      child.process.kill()


def last_line(log: pathlib.Path) -> str:
  """The last words of an output."""
  try:
    with open(log, 'rb') as f:
      f.seek(max(0, log.stat().st_size - 4096))
      lines = f.read().decode('utf-8', 'replace').splitlines()
  except OSError:
    return ''
  return next((line.strip() for line in reversed(lines) if line.strip()), '')


def follow_parent(env: Mapping[str, str] = os.environ) -> None:
  """Sends this process SIGTERM when the one that started it is gone; nothing for one that `run` did not start."""
  if env.get(FOLLOW) != '1':
    return

  def follow() -> None:
    with contextlib.suppress(OSError):
      while os.read(0, 1024):  # not sys.stdin, whose lock an interpreter that ends wants
        pass
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=follow, name='parent', daemon=True).start()


def environments(at_once: int, shares: Sequence[Sequence[str]], more: Mapping[str, str]) -> list[dict[str, str]]:
  """Variables of the processes that run at once: those of all, and the GPUs of each (see `local.share`)."""
  own: list[dict[str, Any]] = [{'CUDA_VISIBLE_DEVICES': ','.join(gpus)} if gpus else {} for gpus in shares]
  return [dict(more) | (own[i] if own else {}) for i in range(at_once)]
