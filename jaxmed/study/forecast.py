"""What a study would cost, before anything starts: hours of each cell and of all, here or on a cluster."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.parallel.chips import Cluster
from jaxmed.plan.tables import amount
from jaxmed.study import cells as cells_lib
from jaxmed.study import cost
from jaxmed.study.table import aligned


def rate(out: str | None, stated: float | None) -> tuple[float, str]:
  """FLOP/s of this machine, and where the number is from: stated, of finished cells, or of matrix products."""
  if stated:
    return stated, f'{amount(stated, "FLOP/s")}, as --rate says'
  known = _reached(out) if out and (pathlib.Path(out) / cells_lib.PLAN).exists() else []
  if known:
    value = float(np.median(known))
    return value, f'{amount(value, "FLOP/s")}, the median of {len(known)} finished cells'
  value = cost.measured_rate()
  return value, (f'{amount(value, "FLOP/s")} of float32 matrix products, measured now on '
                 f'{jax.devices()[0].device_kind}: a training reaches a part of it, so hours are the least')


def _reached(out: str) -> list[float]:
  """Model FLOP/s of the cells that are done."""
  plan = cells_lib.read_plan(out)
  found = [(c['flops'], cells_lib.result(out, c['name'])) for c in plan['cells']]
  return [flops / r['seconds'] for flops, r in found if r and r['status'] == cells_lib.DONE and r['seconds']]


def here(cells: Sequence[cost.Ready], flops: float, how: str, jobs: int) -> dict[str, Any]:
  """{'cells': [{name, params, samples, batch_size, steps, epochs, seen, flops, memory, hours}], 'flops', 'hours',
  'rate', 'how'} on this machine. Cells that run at once share it, so they take no less together."""
  rows = [_row(c) | {'hours': c.flops / flops / 3600} for c in cells]
  shared = f'; {jobs} at once share it' if jobs > 1 else ''
  return _whole(rows, f'on this machine at {how}{shared}') | {'rate': flops}


def there(cells: Sequence[cost.Ready], corpus: cost.Corpus, cluster: Cluster) -> dict[str, Any]:
  """The same on a cluster, one cell after the other on all of it, by the bounds of `jaxmed plan`, `fits` and `mfu`."""
  plans = cost.planned(cells, corpus, cluster)
  rows = []
  for c in cells:
    plan = plans[c.name]
    rows.append(_row(c) | {'hours': c.steps * plan['seconds']['step'] / 3600, 'memory': plan['memory']['peak'],
                           'fits': plan['memory']['fits'], 'mfu': plan['mfu'], 'how': plan['how']})
  hows = {r['how'] for r in rows}
  how = 'compiled by XLA:TPU' if hows == {'compiled'} else 'analytic, nothing was compiled'
  return _whole(rows, f'on {cluster.name} ({how}); bounds from published peak rates, not measurements') | {
      'chip_hours': sum(r['hours'] for r in rows) * cluster.chips, 'cluster': cluster.name}


def _row(cell: cost.Ready) -> dict[str, Any]:
  return {'cell': cell.name, 'axes': dict(cell.axes), 'params': cell.params, 'samples': cell.samples,
          'batch_size': cell.batch_size, 'steps': cell.steps, 'epochs': cell.epochs, 'seen': cell.seen,
          'flops': cell.flops, 'memory': cell.memory, 'learning_rate': cell.config['learning_rate']}


def _whole(rows: list[dict[str, Any]], how: str) -> dict[str, Any]:
  return {'cells': rows, 'flops': sum(r['flops'] for r in rows), 'hours': sum(r['hours'] for r in rows), 'how': how}


def text(found: Mapping[str, Any], judges: int) -> str:
  """A table of the cells, and the whole cost but that of so many judges."""
  head = ('cell', 'params', 'records', 'batch', 'rate', 'steps', 'epochs', 'seen', 'FLOPs', 'memory', 'hours', '')
  lines = [head]
  for r in found['cells']:
    amounts = [f'{r["flops"]:.3g}', amount(r['memory'], 'B'), f'{r["hours"]:.3g}']
    lines.append((r['cell'], amount(r['params'], ''), str(r['samples']), str(r['batch_size']),
                  f'{r["learning_rate"]:.3g}', str(r['steps']), f'{r["epochs"]:.3g}', str(r['seen']), *amounts,
                  '' if r.get('fits', True) else 'DOES NOT FIT'))
  chips = f', {found["chip_hours"]:.3g} chip hours' if 'chip_hours' in found else ''
  return (f'{aligned(lines)}\n{len(found["cells"])} cells, {found["flops"]:.3g} FLOP, {found["hours"]:.3g} hours'
          f'{chips} {found["how"]}\nnot counted: compilation, checkpoints and {judges} '
          f'judge{"s" if judges > 1 else ""}; memory is an estimate without fusion where nothing was compiled')
