"""Ends a run that makes no progress, after writing where each thread of each process stands."""

import collections
import contextlib
import faulthandler
import pathlib
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from jaxmed.errors import EXIT_UNAVAILABLE
from jaxmed.parallel import process
from jaxmed.train.monitor import stacks

# Where minutes=0, the longest of: minutes, so many median steps, so many times the longest step so far (a step at which
# the host waits for all before it).
LEAST_MINUTES, FACTOR, FACTOR_OF_LONGEST = 10.0, 20.0, 3.0
PATIENCE = 6.0  # factor for what is no step: compilation, the first step, evaluation, checkpoints


class Watchdog:
  """Expects a `beat` for each step.

  Without one in time: RUN/stacks/PROCESS.txt on every process, then exit code 69. A thread looks at the clock; should
  the interpreter itself be stuck, faulthandler's own thread writes the stacks and ends the process (with code 1).

  Args:
    run: the run directory. minutes: the longest step; 0 for LEAST_MINUTES or more, negative for no
      watching. agreement: tells the other processes.
  """

  def __init__(self, run: pathlib.Path, minutes: float, agreement: Any):
    self._run, self._minutes, self._agreement = run, minutes, agreement
    self._steps: collections.deque[float] = collections.deque(maxlen=101)
    self._longest = 0.0
    self._what, self._patient, self._since = 'start', True, time.monotonic()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    if self._minutes >= 0:
      self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._ended.set()
    if self._thread.ident is not None:
      self._thread.join()

  def beat(self, what: str, step: bool = True) -> None:
    """Something was done, and `what` begins: a step, or work of unknown length."""
    now = time.monotonic()
    if not self._patient:
      self._steps.append(now - self._since)
      self._longest = max(self._longest, self._steps[-1])
    self._what, self._patient, self._since = what, not step, now

  @property
  def limit(self) -> float:
    """Seconds that the current work may take."""
    median = float(np.median(list(self._steps) or [0.0]))
    chosen = max(60 * LEAST_MINUTES, FACTOR * median, FACTOR_OF_LONGEST * self._longest)
    return (60 * self._minutes or chosen) * (PATIENCE if self._patient else 1.0)

  def _watch(self) -> None:
    file = None
    try:
      while not self._ended.wait(min(self.limit / 10, 5.0)):
        late = time.monotonic() - self._since
        if late > self.limit:
          self._give_up(late)
        if file is None and late > self.limit / 4:
          with contextlib.suppress(OSError):
            file = stacks.opened(self._run)
        if file is not None:
          faulthandler.dump_traceback_later(max(self.limit - late, 1.0) + 60, exit=True, file=file)
    finally:
      if file is not None:
        faulthandler.cancel_dump_traceback_later()
        file.close()

  def _give_up(self, late: float) -> None:
    why = f'no progress for {late:.0f} s in {self._what}'
    stacks.write(self._run, why)
    print(f'jaxmed: process {jax.process_index()} made {why}; stacks are in {stacks.path(self._run).parent}; go on '
          f'with --resume {self._run}', file=sys.stderr, flush=True)
    self._agreement.fail(why, EXIT_UNAVAILABLE, hung=True)
    process.leave(EXIT_UNAVAILABLE)
