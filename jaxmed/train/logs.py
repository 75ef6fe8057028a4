"""What people see of a run: the rows of its loggers, a progress bar or plain lines."""

import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmed.errors import Stopped
from jaxmed.files import read_json_lines
from jaxmed.train import loggers

_SHOWN = ('loss', 'val_loss', 'knn', 'rankme', 'images_per_second', 'data_wait')


class Logs:
  """Writes the metrics of a run.

  Args:
    run: the run directory. start, steps: where the bar begins and ends. quiet: no bar and no lines.
    main: whether this process writes; the others only read what there is.
    trackers: names of further loggers, see `loggers.TRACKERS`. config: what these are told of the run.
  """

  def __init__(self, run: pathlib.Path, start: int, steps: int, batch_size: int, quiet: bool = False,
               main: bool = True, trackers: Sequence[str] = (), config: Mapping[str, Any] | None = None):
    self.path = pathlib.Path(run) / 'metrics.jsonl'
    rows = [r for r in read_rows(self.path) if r['step'] <= start]  # a killed run may have gone on past its checkpoint
    self.losses = [r['loss'] for r in rows if 'loss' in r]
    self.latest = {k: v for r in rows for k, v in r.items() if k != 'step'}  # the newest value of each metric
    self.trained = {k: v for r in rows if 'loss' in r for k, v in r.items() if k != 'step'}  # of steps, not evaluations
    self._loggers: list[loggers.Logger] = []
    self._trackers: dict[str, loggers.Logger] = {}
    if main:
      self._loggers = [loggers.JsonLines(self.path, rows), loggers.TensorBoard(pathlib.Path(run), start)]
      self._trackers = {name: loggers.tracker(name, pathlib.Path(run), config or {}) for name in trackers}
    self._batch_size, self._steps = batch_size, steps
    self._shown: dict[str, float] = {}
    self._bar = None
    self._quiet = quiet or not main
    if not self._quiet and sys.stderr.isatty():
      from tqdm import tqdm
      self._bar = tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes a row."""
    for logger in self._loggers:
      logger.scalars(step, values)
    self._track(lambda logger: logger.scalars(step, values))
    if self._loggers:
      self._show(step, values)

  def figures(self, step: int, paths: Sequence[pathlib.Path]) -> None:
    """Hands over the figures of the report."""
    if paths:
      for logger in self._loggers:
        logger.figures(step, paths)
      self._track(lambda logger: logger.figures(step, paths))

  def _track(self, call: Callable[[loggers.Logger], None]) -> None:
    """Calls each tracker; the run goes on without one that fails, as a server does that is gone."""
    for name, logger in list(self._trackers.items()):
      try:
        call(logger)
      except Stopped:
        raise
      except Exception as e:
        del self._trackers[name]
        print(f'jaxmed: {name} takes no more metrics ({type(e).__name__}: {e}); the run goes on without it',
              file=sys.stderr, flush=True)

  def _show(self, step: int, row: dict[str, float]) -> None:
    self._shown |= {k: row[k] for k in _SHOWN if k in row}
    text = ' '.join(f'{k.replace("images_per_second", "images/s")}={v:.4g}' for k, v in self._shown.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
    elif not self._quiet:
      rate = self._shown.get('images_per_second', 0.0) / self._batch_size
      left = f'{(self._steps - step) / rate:.0f}s' if rate else '?'
      print(f'step {step}/{self._steps} {text} left={left}', file=sys.stderr, flush=True)

  def close(self) -> None:
    """Flushes everything."""
    for logger in self._loggers:
      logger.close()
    self._track(lambda logger: logger.close())
    if self._bar is not None:
      self._bar.close()


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The whole rows of a metrics.jsonl; a last line cut off by a kill is left out."""
  return read_json_lines(path)[0]
