"""How a process fares: memory, open files, and which host keeps the others waiting."""

import collections
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import psutil

from jaxmed.parallel import process

SLOW = 1.5  # times the median of the processes
ROWS = 3  # so many rows one after the other, before anything is said
MATTERS = 0.1  # share of a step below which a wait is no reason to say anything
_GB = 1e9


def own() -> dict[str, float]:
  """Gigabytes of memory of this process and of its fullest device (where devices count), and open files."""
  me = psutil.Process()
  values = {'host_gb': me.memory_info().rss / _GB}
  if hasattr(me, 'num_fds'):  # psutil has it on POSIX alone
    values['open_files'] = float(me.num_fds())
  stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
  if stats:
    values['device_gb'] = max(s.get('bytes_in_use', 0) for s in stats) / _GB
    values['device_peak_gb'] = max(s.get('peak_bytes_in_use', 0) for s in stats) / _GB
  return values


class Hosts:
  """Compares the processes of a run at log steps, on the host: each writes its times, process 0 reads them all.

  Nobody waits: process 0 may find the row before. In a synchronous run all steps take as long as the slowest
  process's; what tells that one is that it waits for data, or is busy itself, while the others wait for their devices.
  """

  def __init__(self) -> None:
    self._slow: collections.Counter[tuple[int, str]] = collections.Counter()
    self._waited, self._since = 0.0, time.monotonic()

  def wait(self, values: Any) -> None:
    """Waits for what devices compute, and adds up the time."""
    begun = time.monotonic()
    jax.block_until_ready(values)
    self._waited += time.monotonic() - begun

  def row(self, step: int, data_wait: float) -> dict[str, float]:
    """To be called at log steps, with this process's share of time spent waiting for data; values for the log.

    Warns, in process 0, of a process that waits for data, or is busy, for ROWS rows more than SLOW times the median.
    """
    now = time.monotonic()
    took = max(now - self._since, 1e-9)
    busy = max(1.0 - self._waited / took, 0.0)
    self._waited, self._since = 0.0, now
    if not process.several():
      return {}
    process.retell(f'vitals/{jax.process_index()}', {'data wait': data_wait, 'busy time': busy, 'step': step})
    if not process.is_main():
      return {}
    rows = process.told('vitals')
    if len(rows) < jax.process_count():
      return {}
    found = slow(rows)
    self._slow = collections.Counter({f[:2]: self._slow[f[:2]] + 1 for f in found})
    for which, kind, value, median in found:
      if self._slow[which, kind] == ROWS:
        print(f'warning: step {step}: process {which} keeps the others waiting: its {kind} is {value:.0%} of the step, '
              f'the median is {median:.0%}', file=sys.stderr, flush=True)
    waits = [r['data wait'] for r in rows.values()]
    return {'data_wait_max': max(waits), 'busy_max': max(r['busy time'] for r in rows.values())}


def slow(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, str, float, float]]:
  """(process, kind, its value, median: of two the other's) where a value is above SLOW medians, and matters."""
  found = []
  for kind in ('data wait', 'busy time'):
    values = {int(p): float(r[kind]) for p, r in rows.items()}
    for which, value in sorted(values.items()):
      median = float(np.median([v for p, v in values.items() if p != which or len(values) > 2]))
      if value > SLOW * median and value - median > MATTERS:
        found.append((which, kind, value, median))
  return found
