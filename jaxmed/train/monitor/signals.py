"""Signals become a flag that the loop looks at, also while it compiles or evaluates."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxmed import owner
from jaxmed.errors import Stopped


class StopFlag:
  """Set by SIGTERM or Ctrl-C. A second Ctrl-C is told what goes on, a third ends the process without saving.

  Schedulers send SIGTERM more than once, and wrappers hand a terminal's Ctrl-C on: neither is a wish to lose work.

  Attributes:
    name: of the first signal; '' before. doing: what goes on after it. lost: what to say of the checkpoints when the
      process is given up.
  """

  def __init__(self):
    self.name, self.doing, self._presses = '', 'stopping', 0
    self.lost: Callable[[], str] = str

  def __bool__(self) -> bool:
    return bool(self.name)

  def check(self) -> None:
    """Raises Stopped when a signal came."""
    if self:
      raise Stopped(self.name)

  def set(self, number: int, frame: Any = None) -> None:
    """The signal handler."""
    if self.name and number != signal.SIGINT:
      return
    self._presses += 1
    if self._presses == 2:
      _say(f'{self.doing}, press Ctrl-C again to give up')
    if self._presses > 2:
      self._give_up()
    self.name = self.name or signal.Signals(number).name

  def _give_up(self) -> None:
    """Ends the process here: what saves in other threads would go on as long as it takes."""
    _say(f'given up while {self.doing}{self.lost()}')
    owner.release_all()
    os._exit(1)


def _say(text: str) -> None:
  os.write(2, f'jaxmed: {text}\n'.encode())  # print may be in the middle of a line of its own


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
  """Handles signals in the main thread (no other may); the handlers before are put back afterwards."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {n: signal.signal(n, handler) for n in numbers}
  try:
    yield
  finally:
    for n, previous in before.items():
      signal.signal(n, previous)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
  """Yields a flag that SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) set."""
  flag = StopFlag()
  with _handled(flag.set, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    yield flag


@contextlib.contextmanager
def raising_on_sigterm() -> Iterator[None]:
  """SIGTERM raises Stopped at once, as Ctrl-C raises KeyboardInterrupt: for work that leaves nothing half-written."""
  def stop(number: int, frame: Any) -> None:
    raise Stopped('SIGTERM; nothing is left half-written')

  with _handled(stop, signal.SIGTERM):
    yield


def interruptible(work: Callable[[], Any], check: Callable[[], None]) -> Any:
  """Runs `work` (a compilation, which no signal handler interrupts) in a thread and returns its result.

  Raises:
    Stopped: `check`, called meanwhile, raised it; the thread is left behind and ends with the process.
  """
  box: dict[str, Any] = {}

  def run():
    try:
      box['value'] = work()
    except Exception as e:  # handed over to the caller below
      box['error'] = e

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  while thread.is_alive():
    thread.join(0.1)
    check()
  if 'error' in box:
    raise box['error']
  return box['value']
