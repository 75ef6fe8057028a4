"""Watches a run for collapse, and keeps what it must remember of that in RUN/health.json."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from jaxmed import files
from jaxmed.errors import UserError
from jaxmed.evaluate.health import Collapse, diagnose
from jaxmed.parallel import process

ACTIONS = ('warn', 'stop', 'rollback')
SLOWER = 0.5  # what a rollback makes of the learning rate
MOST_ROLLBACKS = 3


class RollBack(Exception):
  """Training is to go on from the last checkpoint at or before `step` with a smaller learning rate."""

  def __init__(self, step: int):
    super().__init__(step)
    self.step = step


@dataclasses.dataclass
class Watch:
  """What a run does about collapse.

  Attributes:
    run: its directory. action: 'warn', 'stop', or 'rollback'; the latter two only for hard signs.
    rows, width: shape of the features that are looked at.
    start: health before the first step. healthy: the last step without a sign. slowdown: factor on the learning rate.
    skipped: updates left out until the last row.
  """

  run: pathlib.Path
  action: str
  rows: int
  width: int
  start: dict[str, float] = dataclasses.field(default_factory=dict)
  healthy: int = 0
  slowdown: float = 1.0
  skipped: int = 0
  _warned: str = ''

  def load(self) -> 'Watch':
    """Remembers what an earlier part of the run saw."""
    if (self.run / 'health.json').is_file():
      for name, value in files.read_json(self.run / 'health.json').items():
        setattr(self, name, value)
    return self

  def save(self) -> None:
    """Writes what must survive."""
    if process.is_main():
      files.write_json(self.run / 'health.json', {k: vars(self)[k] for k in ('start', 'healthy', 'slowdown')})

  def begin(self, values: Mapping[str, float]) -> None:
    """Notes the health of the untrained features."""
    self.start = dict(values)
    self.save()

  def look(self, step: int, values: Mapping[str, Any]) -> None:
    """Judges the metrics of a step.

    Raises:
      UserError: a hard sign, and the run is to stop. RollBack: or to go back.
    """
    sign = diagnose(values, self.rows, self.width, self.start)
    if sign is None:
      self.healthy = step
      self.save()
      return
    if sign.sign.split('(')[0] != self._warned and process.is_main():
      print(f'warning: step {step}: {text(sign)}', file=sys.stderr, flush=True)
    self._warned = sign.sign.split('(')[0]
    if sign.hard and self.action == 'stop':
      raise UserError(f'step {step}: {text(sign)} (on_collapse=stop)')
    if sign.hard and self.action == 'rollback':
      self._slow_down(step, text(sign), self.healthy)

  def spike(self, step: int, loss: float, limit: float, action: str) -> None:
    """What becomes of a spike of the loss.

    Raises:
      RollBack: to the step before it. The batches that follow are the same ones; the smaller rate makes the difference.
    """
    what = f'the loss rose to {loss:.4g}, above {limit:.4g} that its last rows allow'
    if action == 'warn' and process.is_main():
      print(f'warning: step {step}: {what}', file=sys.stderr, flush=True)
    if action == 'rollback':
      self._slow_down(step, what, step - 1)

  def left_out(self, step: int, skipped: int) -> None:
    """Says how many updates the step left out since the last row, given their number in all (on_spike=skip)."""
    if skipped > self.skipped and process.is_main():
      print(f'warning: step {step}: {skipped - self.skipped} update(s) left out since the row before: the loss was a '
            'spike or not finite', file=sys.stderr, flush=True)
    self.skipped = skipped

  def _slow_down(self, step: int, why: str, healthy: int) -> None:
    if self.slowdown <= SLOWER**MOST_ROLLBACKS:
      raise UserError(f'step {step}: {why}; {MOST_ROLLBACKS} rollbacks to smaller learning rates did not help')
    self.slowdown *= SLOWER
    self.save()
    if process.is_main():
      print(f'warning: step {step}: {why}; back to the last healthy checkpoint at or before step {healthy}, with the '
            f'learning rate times {self.slowdown:g}', file=sys.stderr, flush=True)
    raise RollBack(healthy)


def text(sign: Collapse) -> str:
  """One line for people."""
  return f'{"collapse" if sign.hard else sign.kind}: {sign.sign}; likely {sign.cause}'
