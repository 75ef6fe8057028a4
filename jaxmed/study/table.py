"""What a study has found so far: STUDY/table.csv, study.json, study.md, and the grid of its states as text."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed import files
from jaxmed.study import cells as cells_lib
from jaxmed.study.cells import DONE, FAILED
from jaxmed.study.compare import cell as shown
from jaxmed.study.compare import interval
from jaxmed.study.grid import COLUMNS


def rows(out: str | pathlib.Path) -> list[dict[str, Any]]:
  """A row a cell: COLUMNS, a column an axis, a column a score. A cell that has not ended is 'waiting'.

  Cells that differ in their seed alone have one name in `cell`; `name` is what --cell takes. `samples` are records to
  train on, `seen` steps x batch, `loss` that of held-out records.
  """
  plan, found = cells_lib.read_plan(out), []
  for cell in plan['cells']:
    result = cells_lib.result(out, cell['name']) or {'status': cells_lib.WAITING}
    row = {'cell': cell['group'], 'name': cell['name'], 'seed': cell['config'].get('seed', 0)}
    row |= {k: cell[k] for k in ('params', 'samples', 'steps', 'flops', 'batch_size', 'seen', 'epochs')}
    row |= {k: result.get(k) for k in ('loss', 'seconds', 'status', 'reason')}
    row |= {axis: _text(value) for axis, value in cell['axes'].items() if axis not in COLUMNS}
    found.append(row | result.get('scores', {}))
  return found


def _text(value: Any) -> Any:
  return ','.join(map(str, value)) if isinstance(value, list) else value


def scores(table: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> list[str]:
  """Columns of the judges, the loss first."""
  axes = set(plan['axes'])
  own = dict.fromkeys(key for row in table for key in row if key not in COLUMNS and key not in axes)
  return [*(['loss'] if cells_lib.LOSS in plan['judges'] else []), *own]


def write(out: str | pathlib.Path) -> list[dict[str, Any]]:
  """Writes table.csv, study.json and study.md; returns the rows.

  Several processes may finish cells at once: each looks again after it wrote, so that the last file has all.
  """
  out = pathlib.Path(out)
  table = rows(out)
  while True:
    _write(out, table)
    fresh = rows(out)
    if fresh == table:
      return table
    table = fresh


def _write(out: pathlib.Path, table: list[dict[str, Any]]) -> None:
  plan = cells_lib.read_plan(out)
  names = list(dict.fromkeys([*COLUMNS[:7], *plan['axes'], *scores(table, plan), *COLUMNS[7:]]))
  files.write_csv(out / 'table.csv', [names, *(['' if row.get(n) is None else row[n] for n in names] for row in table)])
  files.write_json(out / 'study.json', {k: plan[k] for k in ('file', 'data', 'axes', 'judges', 'equal')} | {
      'cells': table, 'groups': groups(table, plan)})
  files.write_text(out / 'study.md', markdown(table, plan))


def groups(table: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Cells that differ in their seed alone, as one: {'axes', 'runs', 'scores': {name: {value, low, high}}}.

  Intervals are Student's t over the seeds; a single run has none.
  """
  parts: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
  for cell, row in zip(plan['cells'], table, strict=True):
    axes = {a: _text(v) for a, v in cell['axes'].items() if a != 'seed'}
    parts.setdefault(repr(axes), []).append((axes, row))
  found = []
  for part in parts.values():
    done = [row for _, row in part if row['status'] == DONE]
    values = {n: [r[n] for r in done if isinstance(r.get(n), (int, float))] for n in scores(table, plan)}
    mean = lambda key, part=part: sum(row[key] for _, row in part) / len(part)
    means = {k: mean(k) for k in ('params', 'samples', 'steps', 'flops')}
    found.append({'axes': part[0][0], 'runs': len(done), **means,
                  'scores': {n: interval(v) for n, v in values.items() if v}})
  return found


def markdown(table: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> str:
  """The study as Markdown: its axes, a row a combination without seeds, what failed, what is waiting."""
  names, axes = scores(table, plan), [a for a in plan['axes'] if a != 'seed']
  lines = [f'# {pathlib.Path(plan["file"].partition(":")[0]).stem}', '',
           f'{plan["file"]} on {plan["data"]}: {counted(table)}.', '']
  lines += [f'- {axis}: {", ".join(map(str, map(_text, values)))}' for axis, values in plan['axes'].items()]
  more = [k for k in ('params', 'samples', 'steps', 'flops') if k not in axes or k == 'samples']
  head = [*axes, *('records' if k == 'samples' else k for k in more), 'runs', *names]
  lines += ['', '| ' + ' | '.join(head) + ' |',
            '|---' * len(head) + '|']
  for g in groups(table, plan):
    own = [str(g['axes'][a]) for a in axes] + [f'{g[k]:.4g}' if k == 'flops' else f'{g[k]:.0f}' for k in more]
    lines.append('| ' + ' | '.join([*own, str(g['runs']), *(shown(g['scores'][n]) if n in g['scores'] else ''
                                                            for n in names)]) + ' |')
  lines += ['', 'A value of several seeds has its 95 % interval (Student\'s t over seeds).', '']
  failed = [r for r in table if r['status'] == FAILED]
  lines += [*(f'- {r["name"]} failed: {r["reason"]}' for r in failed), ''] if failed else []
  return '\n'.join(lines)


def counted(table: Sequence[Mapping[str, Any]]) -> str:
  """'14 of 16 cells done, 1 failed, 1 waiting'."""
  count = lambda status: sum(r['status'] == status for r in table)
  rest = [f'{count(s)} {s}' for s in (FAILED, cells_lib.WAITING) if count(s)]
  return ', '.join([f'{count(DONE)} of {len(table)} cells done', *rest])


def status(out: str | pathlib.Path) -> dict[str, Any]:
  """How a study is: {'study', 'cells': [{'cell', 'status', 'step', 'steps', 'loss', 'reason'}], 'counts'}."""
  plan = cells_lib.read_plan(out)
  found = [{'cell': c['name'], 'steps': c['steps']} | cells_lib.state(out, c) for c in plan['cells']]
  counts: dict[str, int] = {}
  for row in found:
    counts[row['status']] = counts.get(row['status'], 0) + 1
  return {'study': str(out), 'cells': found, 'counts': counts}


def grid_text(found: Mapping[str, Any]) -> str:
  """What `status` gives, as a table."""
  lines = [('cell', 'state', 'step', 'loss', '')]
  for row in found['cells']:
    loss = '' if row['loss'] is None else f'{row["loss"]:.4g}'
    lines.append((row['cell'], row['status'], f'{row["step"]} of {row["steps"]}', loss, row['reason']))
  counts = ', '.join(f'{n} {name}' for name, n in found['counts'].items())
  return f'{aligned(lines)}\n{len(found["cells"])} cells: {counts}'


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Columns of equal width, the first and the last to the left."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  last = len(widths) - 1
  return '\n'.join('  '.join(c.ljust(w) if i in (0, last) else c.rjust(w)
                             for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines)


def law_axes(table: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
  """Columns of a law of the loss over parameters and samples, as options of the fit: `samples` where subsets differ,
  else `seen`. None where the finished cells do not have two values of both."""
  done = [r for r in table if r['status'] == DONE and r['loss'] is not None]
  several = lambda key: len({r[key] for r in done}) > 1
  if not done or not several('params'):
    return None
  return next(({'samples': key} for key in ('samples', 'seen') if several(key)), None)
