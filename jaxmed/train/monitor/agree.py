"""What all processes of a run decide together: to stop, or to save, at the same point of the same step.

A run is a sequence of points (after compilation, after each step, between batches of a probe) that every process
passes in the same order. A signal comes to one process at any moment. Then:

  1. its thread asks, through the key-value store of `parallel.process`;
  2. the thread of each process answers with the number of the last point that it passed, and from then on the process
     waits at its next point (it can pass none before the decision is known);
  3. process 0 takes the greatest answer plus one: the point where all of them stop. None is past it, all reach it.

A thread looks for a question every POLL seconds; without one a point costs a lock and no message. JAX's own
`multihost_utils.reached_preemption_sync_point` is built likewise, but hears SIGTERM only, and not from Python, and is
asked at steps only. On a TPU or GKE node a maintenance event reaches a process as SIGTERM.
"""

import contextlib
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

import jax

from jaxmed.errors import DISK, EXIT_STOPPED, EXIT_UNAVAILABLE, EXIT_USER, Stopped, Unavailable, UserError
from jaxmed.parallel import process
from jaxmed.train.monitor import stacks
from jaxmed.train.monitor.signals import StopFlag, stop_on_signals

POLL = 0.2  # seconds; with more than 200 processes a millisecond for each, 1,000 questions a second in all
GRACE = 5.0  # seconds that a process has to end by itself once another one failed


class Agreement:
  """Decides with the other processes of the run when to stop and when to save.

  Attributes:
    stop: the flag of this process. minutes: save after so many, 0 for never. reason: of the stop that was decided.
    folder: the run directory, for stacks, once it is known.
  """

  def __init__(self, stop: StopFlag):
    self.stop, self.minutes, self.reason = stop, 0.0, ''
    self.folder: pathlib.Path | None = None
    self._saved = time.monotonic()
    self._points, self._round = 0, 0
    self._held = False
    self._decided: tuple[int, str, str] | None = None  # point, what, why
    self._due = False
    self._lock = threading.Condition()
    self._ended = threading.Event()
    self._thread = None
    if process.several():
      _runs.append(1)
      self._name = f'run/{len(_runs)}'
      self._thread = threading.Thread(target=self._attend, name='agreement', daemon=True)
      self._thread.start()

  def saved(self) -> None:
    """Starts the clock of `minutes` again."""
    self._saved, self._due = time.monotonic(), False

  @property
  def due(self) -> bool:
    """Whether it is time to save; the same on all processes, and until `saved`."""
    return self._due

  def point(self) -> bool:
    """To be called where all processes pass; True when all are to stop here."""
    if self._thread is None:
      self.reason, self._due = self.stop.name, self._due or self._late()
      return bool(self.reason)
    with self._lock:
      self._points += 1
      while self._held and not self._ended.is_set():
        self._lock.wait(0.5)
      if self._decided is not None and self._points >= self._decided[0]:
        _, what, why = self._decided
        self._decided, self._round = None, self._round + 1
        if what == 'stop':
          self.reason = why
        else:
          self._due = True
    return bool(self.reason)

  def check(self) -> None:
    """A point that raises Stopped."""
    if self.point():
      raise Stopped(self.reason)

  def peek(self) -> None:
    """Raises Stopped once all processes stop at the next point: work before it need not end."""
    if self._thread is None:
      return self.stop.check()
    with self._lock:
      if self._decided is not None and self._decided[1] == 'stop' and self._decided[0] <= self._points + 1:
        raise Stopped(self._decided[2])

  def finish(self) -> None:
    """Waits until no process has a point before it, then ends the thread."""
    if self._thread is not None:
      process.gather('end of the run', True, 60.0)
      self.close()

  def close(self) -> None:
    """Ends the thread."""
    self._ended.set()
    if self._thread is not None:
      self._thread.join()

  def fail(self, text: str, code: int, hung: bool = False) -> None:
    """Tells the others that this process ends alone: they cannot go on without it.

    When it hung it waits until they have written where they stand: its end would end what they wait in.
    """
    if self._thread is not None:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        process.retell(f'{self._name}/failed/{jax.process_index()}', [text, code, hung])
        others = jax.process_count() - 1
        if hung:
          process.until(lambda: len(process.told(f'{self._name}/shown')) >= others or None, 4 * GRACE)

  def _late(self) -> bool:
    return self.minutes > 0 and time.monotonic() - self._saved >= 60 * self.minutes

  def _attend(self) -> None:
    pause = max(POLL, jax.process_count() / 1000)
    while not self._ended.is_set():
      try:
        self._peers()
        open_question = self._answer()
      except jax.errors.JaxRuntimeError:  # process 0 is gone: the next collective, or JAX itself, ends this process
        open_question = False
      self._ended.wait(pause / 20 if open_question else pause)

  def _answer(self) -> bool:
    """One look at the question of this round; whether there is one that is not decided yet."""
    with self._lock:
      turn, waiting = self._round, self._decided is not None
    if waiting:
      return False
    folder, answers = f'{self._name}/asked/{turn}', f'{self._name}/at/{turn}'
    ask = process.told(folder).get('ask')
    if ask is None:
      if not self.stop and not (process.is_main() and self._late() and not self._due):
        return False
      why = f'{self.stop.name} (process {jax.process_index()})'
      process.tell(f'{folder}/ask', ['stop' if self.stop else 'save', why])
      ask = process.told(folder)['ask']
    with self._lock:
      first, self._held = not self._held, True
      points = self._points
    if first:
      process.tell(f'{answers}/{jax.process_index()}', points)
    if process.is_main() and len(at := process.told(answers)) == jax.process_count():
      process.tell(f'{folder}/point', max(at.values()) + 1)
      process.forget(answers)
    point = process.told(folder).get('point')
    if point is None:
      return True
    with self._lock:
      self._decided, self._held = (point, ask[0], ask[1]), False
      self._lock.notify_all()
    return False

  def _peers(self) -> None:
    """Ends this process when another one failed: a collective without it would wait for ever."""
    others = {p: v for p, v in process.told(f'{self._name}/failed').items() if int(p) != jax.process_index()}
    if not others:
      return
    which, (text, code, hung) = min(others.items(), key=lambda x: int(x[0]))
    if hung and self.folder is not None:
      stacks.write(self.folder, f'process {which}: {text}')
      process.retell(f'{self._name}/shown/{jax.process_index()}', True)
    elif self._ended.wait(GRACE):
      return
    print(f'jaxmed: process {which} failed: {text}', file=sys.stderr, flush=True)
    process.leave(code)


_runs: list[int] = []  # one for each run of this process: all processes do the same ones


@contextlib.contextmanager
def agreement() -> Iterator[Agreement]:
  """An Agreement for one run. What ends one process with an error ends the others too, with its exit code.

  Raises:
    Unavailable: a device or a process that this one computes with does not answer.
  """
  with stop_on_signals() as stop:
    agreed = Agreement(stop)
    try:
      yield agreed
      agreed.finish()
    except Stopped:
      agreed.finish()
      if process.several():
        jax.distributed.shutdown()  # together: a process that ends before the others would be missed by them
      raise
    except BaseException as e:
      lost = _lost(e)
      code = EXIT_UNAVAILABLE if lost else _exit_code(e)
      agreed.fail(lost or f'{type(e).__name__ if code == 1 else ""} {e}'.strip(), code)
      agreed.close()
      if process.several():
        process.leave_at_exit(code)
      if lost:
        raise Unavailable(lost) from e
      raise


def _exit_code(e: BaseException) -> int:
  """As for the signals of the command."""
  if isinstance(e, UserError) or (isinstance(e, OSError) and e.errno in DISK):
    return EXIT_USER
  return EXIT_STOPPED if isinstance(e, KeyboardInterrupt) else 1


def _lost(e: BaseException) -> str:
  """What to say when a computation failed because another process or a device is gone, or ''."""
  if not process.several() or not isinstance(e, (jax.errors.JaxRuntimeError, ValueError)):
    return ''
  text = ' '.join(str(e).split())
  signs = ('gloo', 'connection', 'unavailable', 'nccl', 'deadline_exceeded', 'aborted', 'heartbeat')
  if not any(s in text.lower() for s in signs):
    return ''
  return f'another process or a device does not answer: {text[:200]}; go on from the last checkpoint with --resume'
