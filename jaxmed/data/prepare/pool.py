"""Runs the blocks of a corpus: here, in processes of this machine, or by a cluster."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmed.data.prepare import blocks, cluster
from jaxmed.errors import Unavailable

_POLL = 0.2  # seconds
# In worker processes: how many items of each block are done. Each has one writer, so it needs no lock.
_counts: Any = None


def run(
    tasks: Sequence[blocks.Task], folder: pathlib.Path, workers: int, progress: bool,
    scheduler: str | cluster.Slurm | None, signals: list[int],
) -> None:
  """Does all blocks that `folder` lacks, in `workers` processes (1: in this one), with a bar over items.

  With `scheduler`, the workers of the Dask cluster at that address do them, or SLURM jobs. `signals` is the list of
  `put_off`.

  Raises:
    Unavailable: a process was killed; what is done is kept. KeyboardInterrupt: a signal came. Whatever `blocks.write`
      raises.
  """
  left = [t for t in tasks if not (folder / t.name).exists()]
  total = sum(len(t.items) for t in tasks)
  with _bar(total, progress, signals) as tick:
    tick(total - sum(len(t.items) for t in left))
    if isinstance(scheduler, cluster.Slurm) and left:
      with cluster.of_slurm(scheduler, folder.parent / 'logs') as (client, check):
        cluster.run(left, folder, client, tick, check)
    elif isinstance(scheduler, str):
      with cluster.at(scheduler) as client:
        cluster.run(left, folder, client, tick)
    elif min(workers, len(left)) <= 1:
      for task in left:
        blocks.write(task, folder, tick)
    else:
      _processes(left, folder, min(workers, len(left)), tick)


def _processes(tasks: Sequence[blocks.Task], folder: pathlib.Path, workers: int, tick: Callable[[int], Any]) -> None:
  """A pool of processes; on leaving, also by an error, its workers are stopped and joined."""
  # New interpreters, because a fork of a process with threads (JAX has some) can hang.
  context = multiprocessing.get_context('spawn')
  counts: Any = context.RawArray('q', len(tasks))
  # Whoever waits for the reading end learns that this process closed the other one, or died: then workers end.
  reading, writing = context.Pipe(duplex=False)
  shown = 0
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (counts, reading))
  try:
    pending = {pool.submit(_work, task, folder, i) for i, task in enumerate(tasks)}
    while pending:
      done, pending = concurrent.futures.wait(pending, _POLL, concurrent.futures.FIRST_COMPLETED)
      for future in done:
        future.result()
      now = sum(counts)
      tick(now - shown)
      shown = now
  except concurrent.futures.process.BrokenProcessPool as e:
    raise Unavailable('a worker process was killed (too little memory?); finished blocks are kept: the same command '
                      'goes on, with fewer --workers if need be') from e
  finally:
    writing.close()
    pool.shutdown(cancel_futures=True)
    reading.close()


def _start(counts: Any, reading: Any) -> None:
  """Begins a worker: signals are the business of the process that started it, without which it ends."""
  global _counts
  _counts = counts
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def _watch(reading: Any) -> None:
  with contextlib.suppress(OSError, EOFError):
    reading.poll(None)
  os._exit(1)


def _work(task: blocks.Task, folder: pathlib.Path, place: int) -> None:
  def tick(number: int) -> None:
    _counts[place] += number

  blocks.write(task, folder, tick)


@contextlib.contextmanager
def put_off() -> Iterator[list[int]]:
  """Yields a list of the signals that came (Ctrl-C, SIGTERM), which are handled at the end; a second Ctrl-C at once.

  A handler that raises amid the locks of a pool leaves one locked for ever, and amid an import half a module.
  """
  came: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield came
    return

  def handler(number: int, frame: Any) -> None:
    if came and number == signal.SIGINT:
      raise KeyboardInterrupt
    came.append(number)

  before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield came
  finally:
    for number, previous in before.items():
      signal.signal(number, previous)
    if came:
      signal.raise_signal(came[0])


@contextlib.contextmanager
def _bar(total: int, progress: bool, signals: list[int]) -> Iterator[Callable[[int], Any]]:
  """Yields what moves the bar, and raises where a signal came."""
  from tqdm import tqdm

  def tick(number: int) -> None:
    bar.update(number)
    if signals:
      raise KeyboardInterrupt

  with tqdm(total=total, desc='prepare', unit='item', disable=None if progress else True) as bar:
    yield tick
