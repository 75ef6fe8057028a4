"""RUN/stacks/PROCESS.txt: where every thread of a process stood when a run made no progress."""

import faulthandler
import pathlib
import sys
import time
from typing import IO

import jax


def path(run: pathlib.Path) -> pathlib.Path:
  """The file of this process."""
  return pathlib.Path(run) / 'stacks' / f'{jax.process_index()}.txt'


def opened(run: pathlib.Path) -> IO[str]:
  """The file, open for appending."""
  path(run).parent.mkdir(parents=True, exist_ok=True)
  return open(path(run), 'a', encoding='utf-8')


def write(run: pathlib.Path, why: str) -> None:
  """Adds the stacks of all threads, under a line that says when and why; to stderr where the file cannot be written."""
  line = f'{time.strftime("%Y-%m-%d %H:%M:%S")} {why}\n'
  try:
    with opened(run) as f:
      f.write(line)
      f.flush()
      faulthandler.dump_traceback(f, all_threads=True)
      f.write('\n')
  except OSError:  # a full disk, or storage that is gone: perhaps the reason
    sys.stderr.write(line)
    faulthandler.dump_traceback(all_threads=True)
