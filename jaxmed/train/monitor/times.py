"""What a run does besides its steps: said while it goes on, and how long it took in RUN/times.json."""

import contextlib
import json
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxmed import files
from jaxmed.parallel import process

FIRST, EVERY = 2.0, 10.0  # seconds after which it is said what is being done, and again
_COMPILED = '/jax/core/compile/backend_compile_duration'  # JAX's event: XLA's work, or reading what it made before


@contextlib.contextmanager
def telling(what: str, quiet: bool = False) -> Iterator[None]:
  """Names the current work on standard error after FIRST seconds, then every EVERY seconds."""
  if quiet:
    yield
    return
  ended, begun = threading.Event(), time.monotonic()

  def tell() -> None:
    pause = FIRST
    while not ended.wait(pause):
      _say(f'jaxmed: {what} ... {time.monotonic() - begun:.0f} s')
      pause = EVERY

  thread = threading.Thread(target=tell, name='telling', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def _say(line: str) -> None:
  """Prints a line of the main process, above a bar where there is one."""
  if jax.distributed.is_initialized() and not process.is_main():
    return
  if 'tqdm' in sys.modules:
    sys.modules['tqdm'].tqdm.write(line, file=sys.stderr)
  else:
    print(line, file=sys.stderr, flush=True)


class Times:
  """Seconds of each stage of a run, in their order."""

  def __init__(self, quiet: bool = False):
    self.quiet = quiet
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Adds the time of the block to a stage, and tells the stage when it is long."""
    begun = time.monotonic()
    try:
      with telling(name, self.quiet):
        yield
    finally:
      self._add(name, time.monotonic() - begun)

  @contextlib.contextmanager
  def compilation(self, name: str) -> Iterator[None]:
    """A stage that traces and compiles, timed apart."""
    begun, compiled = time.monotonic(), [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
      compiled[0] += duration_secs if event == _COMPILED else 0.0

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      with telling(f'tracing and compiling {name}', self.quiet):
        yield
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
      self._add(f'tracing {name}', time.monotonic() - begun - compiled[0])
      self._add(f'compiling {name}', compiled[0])

  def _add(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds

  def write(self, run: pathlib.Path) -> None:
    """Writes RUN/times.json: {stage: seconds}."""
    if process.is_main():
      found = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
      files.write_text(run / 'times.json', json.dumps(found, indent=2) + '\n')  # in their order

  def line(self) -> str:
    """All of it in one line."""
    return 'seconds: ' + ', '.join(f'{name} {seconds:.1f}' for name, seconds in self.seconds.items())

  def tell(self) -> None:
    """Prints the line."""
    if not self.quiet:
      _say(f'jaxmed: {self.line()}')
