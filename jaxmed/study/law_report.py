"""What a fitted law says: as text, as Markdown with figures, as a CSV row a run."""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.evaluate.report.figures import COLOURS
from jaxmed.study import budgets
from jaxmed.study.law_intervals import LEVEL, link
from jaxmed.study.law_table import Table
from jaxmed.study.laws import Law

NUMBERS = ('E', 'A', 'B', 'alpha', 'beta', 'R')
_SHOWN = 8  # runs and names in a text; the files have all


def text(result: Mapping[str, Any]) -> str:
  """The result in a terminal: at most about 40 lines."""
  lines = [verdict(result), '', result['law']]
  lines += [f'  {name:<6}{_interval(result[name])}' for name in NUMBERS if name in result]
  cells = f'{result["runs"]} runs of {result["cells"]} cells'
  lines += [f'{cells}; sum of Huber (delta {result["delta"]:g}) {result["huber"]:.10f}; [..] is the 95 % interval of '
            f'{result["draws"]} bootstrap draws']
  if result['left_out']:
    lines.append(f'left out {len(result["left_out"])} runs: {_some(result["left_out"])}')
  for part in (_frontier, _isoflop, _extrapolation):
    found = part(result)
    lines += ['', *found] if found else []
  return '\n'.join(lines + ([''] if result['notes'] else []) + [f'note: {n}' for n in result['notes']])


def verdict(result: Mapping[str, Any]) -> str:
  """A sentence: is there a law, or which axis is undecided."""
  chance = {name: f'{p:.3f}' for name, p in result['chance'].items()}
  if 'law' in result['unclear']:
    return (f'undecided: the table does not tell a law from a constant (permuted cells do as well with chance '
            f'{chance["law"]}; a law needs at most {LEVEL:g})')
  if result['unclear']:
    said = ', '.join(f'{name} (chance {chance[name]})' for name in result['unclear'])
    return f'undecided: {result["value"]} follows a law, but the table does not tell whether it depends on {said}'
  return f'law: permuted cells do as well with chance {max(chance.values())}'


def _interval(cell: Mapping[str, float], digits: int = 5) -> str:
  shown = lambda v: f'{v:.{digits}g}' if abs(v) < 1e5 else f'{v:.{digits - 1}e}'
  return f'{shown(cell["value"])} [{shown(cell["low"])}, {shown(cell["high"])}]'


def _some(names: list[str]) -> str:
  return '; '.join(names[:_SHOWN]) + (f'; and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')


def _frontier(result: Mapping[str, Any]) -> list[str]:
  found = result['frontier']
  if not found:
    return []
  params, samples = result['axes']
  c = found['compute']
  rule = f'{c["k"]:.4g} {params}^{c["u"]:.3g} {samples}^{c["v"]:.3g}'
  lines = [f'compute-optimal, C = {rule}: {params} ~ C^{_interval(found["params_exponent"], 3)}, '
           f'{samples} ~ C^{_interval(found["samples_exponent"], 3)}',
           f'  {"C":<10}{params:<34}{samples:<34}{result["value"]}']
  return lines + [f'  {b["compute"]:<10.3g}{_interval(b["params"], 3):<34}{_interval(b["samples"], 3):<34}'
                  f'{_interval(b["value"], 4)}' for b in found['budgets']]


def _isoflop(result: Mapping[str, Any]) -> list[str]:
  found = result['isoflop']
  if not found:
    asked = result['frontier'] and not result['rising']
    return ['no isoflop curves: no budget has runs of four sizes'] if asked else []
  number = lambda v, form: 'none' if v is None else format(v, form)
  lines = [f'isoflop parabolas: {result["axes"][0]} ~ C^{number(found["exponent"], ".3f")}; on this grid a parabola of '
           f'the law without noise gives {number(found["biased_exponent"], ".3f")} (wide or off-centre grids bias it)',
           f'  {"C":<10}{"runs":<6}{"vertex":<11}{"of the law":<12}{"width":<8}{"centre":<8}bias of the parabola']
  for c in found['curves'][:_SHOWN]:
    lines.append(f'  {c["compute"]:<10.3g}{c["runs"]:<6}{number(c["params"], ".3g"):<11}{c["law"]:<12.3g}'
                 f'{c["width"]:<8.1f}{c["centre"]:<8.2f}{number(c["bias"], "+.1%")}'
                 + ('' if c['inside'] else '  outside of the grid, not used'))
  more = len(found['curves']) - _SHOWN
  return lines + ([f'  and {more} more'] if more > 0 else [])


def _extrapolation(result: Mapping[str, Any]) -> list[str]:
  found = result['extrapolation']
  if not found:
    return []
  runs = found['runs']
  lines = [f'the {found["cells"]} largest cells from the other {found["fitted_runs"]} runs: mean error '
           f'{found["mean_error"]:.2%} (a constant: {found["mean_error_constant"]:.2%}), {found["inside"]} of '
           f'{len(runs)} inside their interval']
  for r in runs[:_SHOWN]:
    axes = ', '.join(f'{name} {r[name]:.3g}' for name in result['axes'])
    said = _interval({'value': r['predicted'], 'low': r['low'], 'high': r['high']}, 4)
    lines.append(f'  {axes}: seen {r["seen"]:.4g}, predicted {said}, error {r["error"]:+.2%}')
  return lines + ([f'  and {len(runs) - _SHOWN} more'] if len(runs) > _SHOWN else [])


def write(place: pathlib.Path, result: Mapping[str, Any], table: Table, law: Law, numbers: np.ndarray) -> None:
  """fit.json, fit.csv (a row a run), the figures, and fit.md, which shows them."""
  files.write_json(place / 'fit.json', result)
  files.write_csv(place / 'fit.csv', csv_rows(table, law, result))
  drawn = {name: title for name, (title, draw) in figures(result, table, law, numbers).items()
           if draw(place / f'fit_{name}.png') is None}
  lines = [f'# {result["law"]}', '', '```', text(result), '```', '']
  for name, title in drawn.items():
    lines += [f'![{title}](fit_{name}.png)', '', title, '']
  files.write_text(place / 'fit.md', '\n'.join(lines))


def csv_rows(table: Table, law: Law, result: Mapping[str, Any]) -> list[list[Any]]:
  """Axes, compute, what was seen, what the law says, the residual, and whether the run is of the largest cells."""
  predicted = law.predict(table.design.x, table.design.distinct)
  held = {tuple(r[name] for name in table.axes) for r in (result['extrapolation'] or {'runs': []})['runs']}
  rows: list[list[Any]] = [[*table.axes, 'compute', table.value, 'predicted', 'residual', 'held_out']]
  columns = table.design.x, table.compute, table.y, predicted
  for x, c, y, p in zip(*(column.tolist() for column in columns), strict=True):
    rows.append([*x, c, y, p, y - p, int(tuple(x) in held)])
  return rows


Drawing = tuple[str, Callable[[pathlib.Path], None]]


def figures(result: Mapping[str, Any], table: Table, law: Law, numbers: np.ndarray) -> dict[str, Drawing]:
  """{name: (title, function that writes the PNG)}."""
  out: dict[str, Drawing] = {}
  if table.rule is not None and not table.rule.trades:
    out['law'] = (f'{table.value} against {table.axes[1]}: runs, and the law at each size of model.',
                  lambda path: _draw_sizes(table, law, path))
  elif table.rule is not None:
    out['compute'] = (f'{table.value} against compute: runs, the law at each size of model (thin) and its frontier '
                      '(black).', lambda path: _draw_compute(table, law, path))
    if result['isoflop']:
      out['isoflop'] = ('Isoflop curves: runs, their parabola (dashed), the law (full) and its optimum (dot).',
                        lambda path: _draw_isoflop(table, law, path))
  else:
    out['law'] = (f'{table.value} against {table.axes[0]}: runs, the law, and the 95 % interval of the law.',
                  lambda path: _draw_law(table, law, numbers, path))
  out['residuals'] = ('Residuals of the fit, in the unit that it minimises.',
                      lambda path: _draw_residuals(table, law, path))
  return out


def _axes(width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
  from matplotlib.figure import Figure  # without pyplot: no global state, no display
  figure = Figure(figsize=(width, height), layout='constrained', facecolor='white')
  ax = figure.subplots()
  ax.spines[['top', 'right']].set_visible(False)
  return figure, ax


def _saved(figure: Any, ax: Any, path: pathlib.Path, x: str, y: str) -> None:
  ax.set_xlabel(x)
  ax.set_ylabel(y)
  with files.writing(path) as part:
    figure.savefig(part, format='png', dpi=130, metadata={'Software': None})


def _draw_compute(table: Table, law: Law, path: pathlib.Path) -> None:
  from matplotlib import colormaps
  from matplotlib.ticker import FormatStrFormatter
  rule = table.rule or budgets.Compute()
  params, samples = table.design.x.T
  figure, ax = _axes()
  c = np.geomspace(table.compute.min(), 10 * table.compute.max(), 80)
  sizes = np.unique(params)
  sizes = sizes if len(sizes) <= 12 else np.geomspace(sizes[0], sizes[-1], 8)
  span = max(math.log(sizes[-1] / sizes[0]), 1e-9)
  colour = lambda n: colormaps['viridis'](np.log(np.asarray(n) / sizes[0]) / span * 0.9)
  for n in sizes:
    d = rule.samples(c, np.full(len(c), n))
    rows = (d >= samples.min() / 3) & (d <= samples.max() * 3)
    ax.plot(c[rows], law.predict(np.stack([np.full(rows.sum(), n), d[rows]], axis=1)), color=colour(n), linewidth=0.8,
            label=f'{n:.3g}')
  own = np.array([[law.E, *law.A, *law.alpha]])
  best = budgets.optimum(own, c, rule)[0]
  ax.plot(c, law.predict(np.stack([best, rule.samples(c, best)], axis=1)), color='black', linewidth=1.8)
  ax.scatter(table.compute, table.y, c=colour(params), s=14, zorder=3, edgecolors='white', linewidths=0.3)
  ax.set_xscale('log')
  if not law.rising:
    ax.set_yscale('log')
  for side in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
    side(FormatStrFormatter('%.3g'))
  ax.legend(title=table.axes[0], frameon=False, fontsize=7, title_fontsize=8)
  _saved(figure, ax, path, 'compute (FLOPs)', table.value)


def _draw_isoflop(table: Table, law: Law, path: pathlib.Path) -> None:
  rule = table.rule or budgets.Compute()
  params = table.design.x[:, 0]
  figure, ax = _axes()
  for i, rows in enumerate(budgets.curves(table.compute, params)):
    colour, budget = COLOURS[i % len(COLOURS)], np.exp(np.log(table.compute[rows]).mean())
    n = np.geomspace(params[rows].min(), params[rows].max(), 60)
    ax.plot(params[rows], table.y[rows], '.', color=colour, label=f'{budget:.2g}')
    middle = np.log(params[rows]).mean()
    parabola = np.polyfit(np.log(params[rows]) - middle, table.y[rows], 2)
    ax.plot(n, np.polyval(parabola, np.log(n) - middle), '--', color=colour, linewidth=0.8)
    ax.plot(n, law.predict(np.stack([n, rule.samples(budget, n)], axis=1)), color=colour, linewidth=1.2)
    best = budgets.optimum(np.array([[law.E, *law.A, *law.alpha]]), np.array([budget]), rule)[0]
    ax.plot(best, law.predict(np.stack([best, rule.samples(budget, best)], axis=1)), 'o', color='black', markersize=4)
  ax.set_xscale('log')
  ax.legend(title='FLOPs', frameon=False, fontsize=7, title_fontsize=8)
  _saved(figure, ax, path, table.axes[0], table.value)


def _draw_law(table: Table, law: Law, numbers: np.ndarray, path: pathlib.Path) -> None:
  figure, ax = _axes()
  x = np.geomspace(table.design.x.min(), 3 * table.design.x.max(), 80)
  sign = -1 if law.rising else 1
  band = numbers[:, :1] + sign * numbers[:, 1:2] * x[None] ** -numbers[:, 2:3]
  ax.fill_between(x, *np.percentile(band, [2.5, 97.5], axis=0), color=COLOURS[0], alpha=0.15, linewidth=0)
  ax.plot(x, law.predict(x[:, None]), color=COLOURS[0])
  ax.plot(table.design.x[:, 0], table.y, 'o', color='black', markersize=4)
  room = max(np.ptp(table.y), 1e-9)
  ax.set_ylim(table.y.min() - room, table.y.max() + room)
  ax.set_xscale('log')
  _saved(figure, ax, path, table.axes[0], table.value)


def _draw_sizes(table: Table, law: Law, path: pathlib.Path) -> None:
  figure, ax = _axes()
  params, samples = table.design.x.T
  x = np.geomspace(samples.min(), samples.max(), 60)
  for i, n in enumerate(np.unique(params)):
    colour = COLOURS[i % len(COLOURS)]
    ax.plot(samples[params == n], table.y[params == n], '.', color=colour)
    ax.plot(x, law.predict(np.stack([np.full(len(x), n), x], axis=1)), color=colour, linewidth=0.9, label=f'{n:.3g}')
  ax.set_xscale('log')
  ax.legend(title=table.axes[0], frameon=False, fontsize=7, title_fontsize=8)
  _saved(figure, ax, path, table.axes[1], table.value)


def _draw_residuals(table: Table, law: Law, path: pathlib.Path) -> None:
  figure, ax = _axes(height=3.2)
  ax.axhline(0, color='#666666', linewidth=0.8)
  residual = link(table.design, table.y, law.predict(table.design.x, table.design.distinct))
  ax.plot(table.compute, residual, '.', color=COLOURS[0])
  ax.set_xscale('log')
  _saved(figure, ax, path, 'compute (FLOPs)' if table.rule else table.axes[0],
         'seen - predicted, over the median' if law.rising else 'log seen - log predicted')
