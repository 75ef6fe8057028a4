"""How fast steps follow each other: a rate belongs to the steps between two rows of the log."""

import contextlib
import queue
import threading
import time
from typing import Any

import jax


class Pace:
  """Notes when each step was done, pauses left out.

  The host is ahead of the device and reads rows late, sometimes two of them in one turn of its loop, so neither the
  moment at which a step is given to the device nor the one at which its row is read says how long it took. A thread
  waits for the steps one after the other and looks at the clock when the device has finished each of them.

  Args:
    first: the step that is done already. batch_size: images of a step.
  """

  def __init__(self, first: int, batch_size: int):
    self._batch_size = batch_size
    self._last, self._row = first, (first, 0.0, 0.0)  # of the last row: step, seconds at work, seconds without data
    self._waited = 0.0
    self._done: dict[int, tuple[float, float]] = {}
    self._changed = threading.Condition()
    self._since: float | None = None  # when the clock was started; None in a pause, with which it begins
    self._before = 0.0  # seconds at work before that
    self._given: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._follow, name='pace', daemon=True)
    self._thread.start()

  def step(self, n: int, result: Any, waited: float) -> None:
    """Step n was given to the device, which makes `result`; the host had waited for its data so many seconds."""
    self._waited += waited
    self._last = n
    self._given.put((n, result, self._waited))

  def row(self, n: int) -> dict[str, float]:
    """Images per second from the last row to step n, and the share of that time spent waiting for data."""
    with self._changed:
      self._changed.wait_for(lambda: n in self._done)
      seconds, waited = self._done[n]
      self._done = {k: v for k, v in self._done.items() if k > n}
    step, before, waited_before = self._row
    self._row = n, seconds, waited
    took = max(seconds - before, 1e-9)
    return {'images_per_second': (n - step) * self._batch_size / took,
            'data_wait': min((waited - waited_before) / took, 1.0)}

  def pause(self) -> None:
    """Stops the clock before an evaluation or a checkpoint, once the device has done all steps."""
    with self._changed:
      self._changed.wait_for(lambda: self._last in self._done or self._last == self._row[0])
      self._before, self._since = self._at_work(), None

  def go(self) -> None:
    """Starts it again."""
    with self._changed:
      self._before, self._since = self._at_work(), time.monotonic()

  def close(self) -> None:
    """Ends the thread."""
    self._given.put(None)
    self._thread.join(1.0)

  def _at_work(self) -> float:
    return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

  def _follow(self) -> None:
    while (given := self._given.get()) is not None:
      n, result, waited = given
      with contextlib.suppress(Exception):  # the loop meets the same error
        jax.block_until_ready(result)
      with self._changed:
        self._done[n] = self._at_work(), waited
        self._changed.notify_all()
