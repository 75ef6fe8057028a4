"""`jaxmed study fit`: a table of runs in, a law with intervals and a report out."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.errors import UserError
from jaxmed.study import budgets, law_intervals, law_report, law_table, laws
from jaxmed.study.law_intervals import LEVEL, interval
from jaxmed.study.laws import Law

FAR = 10.0  # budgets of the frontier end at this many times the largest of the table


@dataclasses.dataclass(frozen=True)
class Options:
  """How a law is fitted.

  Attributes:
    columns: see `law_table.Columns`. constant: k of C = k N D; None takes FLOPs of the table, else 6. repeat: R of
      repeated samples; None fits it. delta: Huber's bound. draws: of the bootstrap. hold_out: fraction of the largest
      cells to predict from the others; 0 for none. compute: budgets of the frontier; none gives five. seed: of the
      bootstrap and the permutations.
  """

  columns: law_table.Columns = dataclasses.field(default_factory=law_table.Columns)
  constant: float | None = None
  repeat: float | None = None
  delta: float = laws.DELTA
  draws: int = 1000
  hold_out: float = 0.2
  compute: tuple[float, ...] = ()
  seed: int = 0

  def __post_init__(self):
    for name in ('constant', 'repeat', 'delta'):
      value = getattr(self, name)
      if value is not None and not 0 < value < np.inf:
        raise UserError(f'--{name} is {value:g}, expected a number above 0')
    if self.draws < 100:
      raise UserError(f'--draws is {self.draws}, expected at least 100: a 95 % interval has few beyond it')
    if not 0 <= self.hold_out <= 0.5:
      raise UserError(f'--hold-out is {self.hold_out:g}, expected 0 to 0.5')
    if any(not 0 < c < np.inf for c in self.compute):
      raise UserError('--compute expects FLOPs above 0, comma-separated')
    if self.compute and self.columns.axis:
      raise UserError('--compute does not go with --axis: a law of one axis has no frontier')


def fit(path: str | pathlib.Path, out: str | pathlib.Path | None = None, **options: Any) -> dict[str, Any]:
  """Fits a law to a table and writes OUT/fit.json, fit.csv, fit.md and its figures.

  Args:
    path: a CSV file, or the folder of a study. out: a folder; None writes FOLDER/fit of a study, and nothing of a file.
    options: fields of `Options`, and of `law_table.Columns` by their names.

  Returns:
    {'json', 'text'}; the first has E, A, alpha (A, B, alpha, beta of two axes; R of repeated samples), each
    {'value', 'low', 'high'}, 'huber' (the sum), 'runs', 'cells', 'verdict' ('law' or 'undecided'), 'unclear'
    (the names whose chance is too large), 'chance', 'frontier', 'isoflop', 'extrapolation', 'left_out', 'notes'.

  Raises:
    UserError: see `law_table.read` and `Options`; a place that cannot be written.
  """
  names = {f.name for f in dataclasses.fields(law_table.Columns)}
  columns = law_table.Columns(**{k: v for k, v in options.items() if k in names})
  chosen = Options(columns, **{k: v for k, v in options.items() if k not in names})
  place = pathlib.Path(out) if out else pathlib.Path(path) / 'fit' if pathlib.Path(path).is_dir() else None
  if place is not None:
    files.check_place(place / 'fit.json')
  table = law_table.read(path, columns, chosen.constant, chosen.repeat)
  result, numbers, law = analysed(table, chosen)
  result['table'] = str(path)
  text = law_report.text(result)
  if place is not None:
    law_report.write(place, result, table, law, numbers)
    text += f'\nreport: {place / "fit.md"}'
  return {'json': result, 'text': text}


def analysed(table: law_table.Table, options: Options) -> tuple[dict[str, Any], np.ndarray, Law]:
  """The result as plain values, the numbers [draws, p] of the bootstrap, and the law."""
  design, y, seed = table.design, table.y, options.seed
  law = laws.fit(design, y, options.delta)
  numbers = law_intervals.bootstrap(design, y, law, table.cells, options.draws, seed, options.delta)
  chance = law_intervals.chances(design, y, table.axes, seed=seed)
  without = [name for name, p in chance.items() if p > LEVEL]
  result: dict[str, Any] = {
      'law': formula(table), 'axes': list(table.axes), 'value': table.value, 'rising': design.rising,
      **_numbers(law, numbers), 'huber': law.huber, 'delta': options.delta, 'runs': len(y),
      'cells': len(np.unique(table.cells)), 'draws': options.draws, 'left_out': list(table.left_out),
      'chance': chance, 'verdict': 'undecided' if without else 'law', 'unclear': without,
      'frontier': None, 'isoflop': None,
      'extrapolation': _extrapolation(table, options) if options.hold_out else None}
  if table.rule is not None and table.rule.trades:
    params, samples = design.x.T
    result['frontier'] = _frontier(table, law, numbers, options.compute)
    if not design.rising:
      result['isoflop'] = budgets.isoflop(table.compute, params, samples, y, law, table.rule)
  result['notes'] = [*table.notes, *_notes(table, law, numbers, result, options)]
  return result, numbers, law


def formula(table: law_table.Table) -> str:
  """The law in words of the table's columns."""
  sign, axes = '-' if table.design.rising else '+', list(table.axes)
  if table.design.distinct is not None:
    axes[-1] = f'effective({axes[-1]})'
  letters = (('A', 'alpha'), ('B', 'beta'))
  return f'{table.value} = E' + ''.join(f' {sign} {a} {name}^-{b}' for (a, b), name in zip(letters, axes, strict=False))


def _numbers(law: Law, numbers: np.ndarray) -> dict[str, Any]:
  """Each number of the law with its interval."""
  names = ['E', 'A', 'alpha'] if len(law.A) == 1 else ['E', 'A', 'B', 'alpha', 'beta']
  values = [law.E, *law.A, *law.alpha]
  if numbers.shape[1] > len(names) and law.repeat is not None:
    names, values = [*names, 'R'], [*values, law.repeat]
  return {name: interval(value, numbers[:, i]) for i, (name, value) in enumerate(zip(names, values, strict=True))}


def _frontier(table: law_table.Table, law: Law, numbers: np.ndarray, compute: Sequence[float]) -> dict[str, Any]:
  """The best parameters and samples of budgets, their exponents, and the loss there, with intervals."""
  rule = table.rule or budgets.Compute()
  own = np.array([[law.E, *law.A, *law.alpha]])
  at = np.array(compute or np.geomspace(table.compute.min(), FAR * table.compute.max(), 5))
  both = np.concatenate([own, numbers[:, :5]])
  params = budgets.optimum(both, at, rule)
  samples = rule.samples(at, params)
  e, a, b, alpha, beta = (both[:, i:i + 1] for i in range(5))
  sign = -1 if table.design.rising else 1
  best = e + sign * (a * params**-alpha + b * samples**-beta)
  cell = lambda values, j: interval(values[0, j], values[1:, j])
  exponents = budgets.exponents(both, rule)
  return {'compute': {'k': rule.k, 'u': rule.u, 'v': rule.v, 'spread': rule.spread},
          'params_exponent': interval(exponents[0][0], exponents[0][1:]),
          'samples_exponent': interval(exponents[1][0], exponents[1][1:]),
          'budgets': [{'compute': float(c), 'params': cell(params, j), 'samples': cell(samples, j),
                       'value': cell(best, j)} for j, c in enumerate(at)]}


def _extrapolation(table: law_table.Table, options: Options) -> dict[str, Any] | None:
  """The largest cells, predicted from the others."""
  found = law_intervals.held_out(table.design, table.y, table.cells, table.compute, options.hold_out,
                                 min(options.draws, 400), options.seed, options.delta)
  if found is None:
    return None
  seen = table.y[found['rows']]
  runs = [{**{name: float(table.design.x[row, k]) for k, name in enumerate(table.axes)},
           'compute': float(table.compute[row]), 'seen': float(table.y[row]),
           'error': float(found['predicted'][i] / table.y[row] - 1),
           **{name: float(found[name][i]) for name in ('predicted', 'low', 'high')}}
          for i, row in enumerate(found['rows'])]
  return {'cells': len(np.unique(table.cells[found['rows']])), 'fitted_runs': len(table.y) - len(seen), 'runs': runs,
          'mean_error': float(np.mean([abs(r['error']) for r in runs])),
          'mean_error_constant': float(np.mean(np.abs(found['constant'] / seen - 1))),
          'inside': sum(r['low'] <= r['seen'] <= r['high'] for r in runs)}


def _notes(table: law_table.Table, law: Law, numbers: np.ndarray, result: Mapping[str, Any],
           options: Options) -> list[str]:
  """What a reader of the numbers must know."""
  notes = []
  if not table.design.rising and np.percentile(numbers[:, 0], 2.5) < 1e-3 * table.y.min():
    notes.append('E may be 0: the table does not show where the value ends')
  for name, values, ends in zip(('alpha', 'beta'), numbers[:, 1 + len(law.A):].T, [laws.EXPONENTS] * 2, strict=False):
    if ((values < ends[0] * 1.01) | (values > ends[1] * 0.99)).mean() > 0.025:
      notes.append(f'{name} reaches the bound of its search, {ends[0]:g} to {ends[1]:g}: the table does not fix it')
  cells = len(np.unique(table.cells))
  if cells < 2 * table.design.parameters:
    notes.append(f'{cells} cells for {table.design.parameters} parameters: the intervals rest on '
                 f'{cells - table.design.parameters} degrees of freedom')
  if options.hold_out and result['extrapolation'] is None:
    notes.append('the largest cells were not held out: the others are too few for a fit')
  if table.rule is not None and not table.rule.trades:
    free = table.axes[table.rule.v < budgets.LEAST]
    notes.append(f'FLOPs do not grow with {free}, as where all runs train for as many steps: there is no frontier')
  spread = result['frontier'] and result['frontier']['compute']['spread']
  if spread and spread > 1.05:
    notes.append(f'FLOPs differ from the rule of compute by up to a factor of {spread:.2f}')
  return notes
