"""What people see of a run: metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

import contextlib
import json
import os
import pathlib
import sys
from typing import Any

from jaxmed.files import read_json_lines, write_text

_SHOWN = ('loss', 'val_loss', 'knn', 'rankme', 'images_per_second', 'data_wait')


class Logs:
  """Writes the metrics of a run.

  Args:
    run: the run directory. start, steps: where the bar begins and ends. quiet: no bar and no lines.
    main: whether this process writes; the others only read what there is.
  """

  def __init__(self, run: pathlib.Path, start: int, steps: int, batch_size: int, quiet: bool = False,
               main: bool = True):
    self.path = pathlib.Path(run) / 'metrics.jsonl'
    rows = [r for r in read_rows(self.path) if r['step'] <= start]  # a killed run may have gone on past its checkpoint
    self.losses = [r['loss'] for r in rows if 'loss' in r]
    self.latest = {k: v for r in rows for k, v in r.items() if k != 'step'}  # the newest value of each metric
    self._file = self._events = None
    if main:
      write_text(self.path, ''.join(json.dumps(r) + '\n' for r in rows))
      self._file = open(self.path, 'a', encoding='utf-8')  # noqa: SIM115 (closed by close())
      from tensorboardX import SummaryWriter
      self._events = SummaryWriter(str(pathlib.Path(run) / 'events'), purge_step=start + 1)
    self._batch_size, self._steps = batch_size, steps
    self._shown: dict[str, float] = {}
    self._bar = None
    self._quiet = quiet or not main
    if not self._quiet and sys.stderr.isatty():
      from tqdm import tqdm
      self._bar = tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes a row."""
    if self._file is None or self._events is None:
      return
    self._file.write(json.dumps({'step': step} | values) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)
    self._show(step, values)

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
    if self._file is None or self._events is None:
      return
    self._file.close()
    with contextlib.suppress(OSError):  # a full disk: the rows are in metrics.jsonl
      self._events.close()
    if self._bar is not None:
      self._bar.close()


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The whole rows of a metrics.jsonl; a last line cut off by a kill is left out."""
  return read_json_lines(path)[0]
