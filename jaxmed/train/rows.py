"""The rows of metrics of a run: read from the device one behind, logged, watched for spikes and lost updates."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmed.errors import UserError
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.logs import Logs
from jaxmed.train.monitor import vitals
from jaxmed.train.monitor.pace import Pace
from jaxmed.train.monitor.spikes import Spikes
from jaxmed.train.monitor.watch import Watch
from jaxmed.train.utilization import Utilization

MOST_SKIPPED = 10  # updates left out in a row after which a run stops


class Rows:
  """What a run's steps have said, and the rows that still lie on the device.

  Attributes:
    latest: the last value of each metric, of evaluations too. trained: the same of steps alone.
    hosts: waits for the device, and what hosts wait for.
  """

  def __init__(self, config: Any, spec: Any, logs: Logs, watch: Watch, checkpoints: Checkpoints, pace: Pace):
    self.latest: dict[str, float] = dict(logs.latest)
    self.trained: dict[str, float] = dict(logs.trained)
    self.hosts = vitals.Hosts()
    self._pending: collections.deque = collections.deque()
    self._logs, self._watch, self._checkpoints, self._pace = logs, watch, checkpoints, pace
    self._spikes, self._used, self._on_spike = Spikes(logs.losses), Utilization(config, spec), config.on_spike

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Keeps the metrics of a step, which the device may still compute."""
    self._pending.append((step, metrics))

  def tell(self, most: int) -> None:
    """Logs and looks at rows until at most so many are left: one, so that the device never waits for the host.

    Raises:
      UserError: too many updates in a row were left out. RollBack, UserError: as `Watch` wants of a spike.
    """
    while len(self._pending) > most:
      step, metrics = self._pending.popleft()
      self.hosts.wait(metrics)
      values = {k: float(v) for k, v in jax.device_get(metrics).items()} | self._pace.row(step)
      values |= self._used.row(values)
      self.latest |= values
      self.trained |= values
      self._logs.scalars(step, values | vitals.own() | self.hosts.row(step, values['data_wait']))
      check_finite(self.latest, self._checkpoints)
      if self._on_spike == 'skip':  # the step has looked
        self._watch.left_out(step, int(values['skipped']))
      elif (limit := self._spikes.look(values['loss'])) is not None:
        self._watch.spike(step, values['loss'], limit, self._on_spike)


def check_finite(latest: Mapping[str, float], checkpoints: Checkpoints) -> None:
  """Ends a run whose updates are all left out; the weights are those before the first of them."""
  row = int(latest.get('skipped_in_row', 0))
  if row < MOST_SKIPPED:
    return
  checkpoints.wait()
  steps = checkpoints.steps()
  kept = f'{checkpoints.folder / str(steps[-1])} is the last good checkpoint' if steps else 'no checkpoint was due'
  if np.isfinite(latest['loss']) and np.isfinite(latest['grad_norm']):
    raise UserError(f'the loss stayed far above its last ones {row} steps in a row (loss {latest["loss"]:.3g}); {kept}'
                    ': lower learning_rate, or start with on_spike=warn if a schedule of the method raises the loss')
  raise UserError(f'loss or gradient was not finite {row} steps in a row (loss {latest["loss"]:.3g}); {kept}: lower '
                  'learning_rate or set optimizer.clip=1')
