"""Runs the blocks of a corpus: here, in processes of this machine, or by a Dask cluster."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmed.data import blocks
from jaxmed.errors import Unavailable, UserError, need

_POLL = 0.2  # seconds
_CONNECT = 20.0  # seconds
_RETRIES = 3  # of a block whose file system failed
# In worker processes: how many items of each block are done. Each has one writer, so it needs no lock.
_counts: Any = None


def cores() -> int:
  """The cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def run(
    tasks: Sequence[blocks.Task], folder: pathlib.Path, workers: int, progress: bool, scheduler: str | None,
    signals: list[int],
) -> None:
  """Does all blocks that `folder` lacks, in `workers` processes (1: in this one), with a bar over items.

  With `scheduler`, the workers of a Dask cluster do them. `signals` is the list of `put_off`.

  Raises:
    Unavailable: a process was killed; what is done is kept. KeyboardInterrupt: a signal came. Whatever `blocks.write`
      raises.
  """
  left = [t for t in tasks if not (folder / t.name).exists()]
  total = sum(len(t.items) for t in tasks)
  with _bar(total, progress, signals) as tick:
    tick(total - sum(len(t.items) for t in left))
    if scheduler is not None:
      _cluster(left, folder, scheduler, tick)
    elif min(workers, len(left)) <= 1:
      for task in left:
        blocks.write(task, folder, tick)
    else:
      _processes(left, folder, min(workers, len(left)), tick)


def _processes(tasks: Sequence[blocks.Task], folder: pathlib.Path, workers: int, tick: Callable[[int], Any]) -> None:
  """Workers are told to end, and waited for, whatever ends this."""
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


def _cluster(tasks: Sequence[blocks.Task], folder: pathlib.Path, address: str, tick: Callable[[int], Any]) -> None:
  """Blocks are done again elsewhere when a worker dies; done twice, they have the same bytes."""
  distributed = need('distributed', 'cluster')
  try:
    client = distributed.Client(address, timeout=_CONNECT)
  except (OSError, ValueError, TimeoutError) as e:
    raise UserError(f'no Dask scheduler answers at {address}: expected, for example, tcp://host:8786') from e
  with client:
    futures = {client.submit(blocks.write, _absolute(t), folder, key=f'{folder}/{t.name}', retries=_RETRIES): t
               for t in tasks}
    pending = set(futures)
    try:
      while pending:
        tick(0)
        with contextlib.suppress(TimeoutError):
          done, pending = distributed.wait(pending, timeout=_POLL, return_when='FIRST_COMPLETED')
          for future in done:
            future.result()
            tick(len(futures[future].items))
    except distributed.KilledWorker as e:
      raise Unavailable('Dask workers were killed again and again (too little memory?); finished blocks are kept: the '
                        'same command goes on') from e
    finally:
      client.cancel(list(futures))


def _absolute(task: blocks.Task) -> blocks.Task:
  """The task for a process in another working directory."""
  absolute = lambda path: pathlib.Path(os.path.abspath(path))
  items = []
  for item in task.items:
    group = item.group and dataclasses.replace(item.group, files=tuple(map(absolute, item.group.files)))
    items.append(dataclasses.replace(item, file=absolute(item.file), group=group))
  return dataclasses.replace(task, items=tuple(items))


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
