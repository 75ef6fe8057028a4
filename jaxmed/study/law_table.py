"""The table that a law is fitted to: which columns mean what, which rows count, and what is wrong with them."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.study import law_intervals
from jaxmed.study.budgets import Compute, compute_of
from jaxmed.study.laws import Design

# Names that a column of each meaning goes by, in small letters and with underscores for spaces.
ALIASES: Mapping[str, tuple[str, ...]] = {
    'params': ('params', 'parameters', 'n', 'n_params', 'num_params', 'model_size'),
    'samples': ('samples', 'd', 'n_samples', 'num_samples', 'examples', 'tokens'),
    'loss': ('loss', 'l', 'val_loss', 'test_loss'),
    'flops': ('flops', 'flop', 'compute', 'c', 'training_flop', 'training_flops'),
    'cells': ('cells', 'cell'),
    'seeds': ('seeds', 'seed'),
}
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a table mean what; an empty name is looked for by ALIASES, or is not there.

  Attributes:
    params, samples, loss, flops, cells, seeds: see ALIASES. score: what rises instead of a loss. axis: the only axis
      of a law of one. unique: distinct samples, where `samples` counts all passes over them. epochs: passes over
      `samples`, which are distinct then. where: values that a row must have, by column.
  """

  params: str = ''
  samples: str = ''
  loss: str = ''
  score: str = ''
  axis: str = ''
  flops: str = ''
  cells: str = ''
  seeds: str = ''
  unique: str = ''
  epochs: str = ''
  where: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
  """Runs that a law is fitted to.

  Attributes:
    design, y, cells: [n], of the fit. axes, value: names of columns. compute: [n], FLOPs or what `rule` says; of one
      axis its values. rule: how compute follows from two axes. left_out: names of runs that have no value. notes: what
      a reader must know.
  """

  design: Design
  y: np.ndarray
  cells: np.ndarray
  axes: tuple[str, ...]
  value: str
  compute: np.ndarray
  rule: Compute | None
  left_out: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def read(path: str | pathlib.Path, columns: Columns, constant: float | None = None,
         repeat: float | None = None) -> Table:
  """The runs of a CSV file, or of the table.csv of a study.

  Args:
    constant: k of C = k N D, also where the table has FLOPs. repeat: the constant R of repeated samples; None fits it
      where `unique` or `epochs` is given.

  Raises:
    UserError: a missing file or column, a text that is no number, numbers that are not above 0, too few cells, a single
      size, a cell and seed that stand twice.
  """
  _check_options(columns, constant, repeat)
  place, header, rows = _rows(pathlib.Path(path), columns)
  named = {kind: _column(place, header, columns, kind) for kind in ('flops', 'cells', 'seeds')}
  axes = (choose(f'column of {place}', columns.axis, header),) if columns.axis else (
      _needed(place, header, columns, 'params'), _needed(place, header, columns, 'samples'))
  for kind in ('score', 'unique', 'epochs'):
    if getattr(columns, kind):
      choose(f'column of {place}', getattr(columns, kind), header)
  value = columns.score or _needed(place, header, columns, 'loss')
  extra = [c for c in (columns.unique, columns.epochs) if c]
  flops = '' if constant is not None or columns.axis else named['flops']
  kept, left_out = _kept(place, rows, [*axes, value, *extra], named)
  if flops and any(not row[flops].strip() for _, row in kept):
    flops = ''
  numbers = {c: np.array([_number(place, line, c, row[c]) for line, row in kept]) for c in
             dict.fromkeys([*axes, value, *extra, *filter(None, [flops])])}
  design = _design(numbers, axes, bool(columns.score), columns, repeat)
  cells = _cells(kept, design, named, place)
  _check(place, design, cells, axes, len(kept))
  rule = None
  if not columns.axis:
    params, samples = design.x.T
    rule = compute_of(params, samples, numbers[flops]) if flops else Compute(6.0 if constant is None else constant)
  compute = design.x[:, 0] if rule is None else numbers[flops] if flops else rule.of(*design.x.T)
  return Table(design, numbers[value], cells, axes, value, compute, rule, tuple(left_out), tuple(_notes(design, cells)))


def _check_options(columns: Columns, constant: float | None, repeat: float | None) -> None:
  """Raises a UserError for options of which one would be ignored."""
  given = {name: bool(getattr(columns, name)) for name in
           ('params', 'samples', 'loss', 'score', 'axis', 'flops', 'unique', 'epochs')}
  given |= {'constant': constant is not None, 'repeat': repeat is not None}
  for one, other in (('loss', 'score'), ('unique', 'epochs'), ('flops', 'constant'), ('axis', 'params'),
                     ('axis', 'samples'), ('axis', 'flops'), ('axis', 'constant'), ('axis', 'unique'),
                     ('axis', 'epochs')):
    if given[one] and given[other]:
      raise UserError(f'--{one} does not go with --{other}: choose one of them')
  if given['repeat'] and not (given['unique'] or given['epochs']):
    raise UserError('--repeat needs the column of --unique or --epochs, which says how often samples are repeated')


def _rows(path: pathlib.Path, columns: Columns) -> tuple[str, list[str], list[tuple[int, Row]]]:
  """The name of the table, its header, and the rows that `where` asks for, with their lines."""
  if path.is_dir():
    path = path / 'table.csv'
    if not path.exists():
      raise UserError(f'{path.parent} has no table.csv: expected a CSV file or the folder of a study')
  try:
    with open(path, newline='', encoding='utf-8-sig') as f:
      reader = csv.DictReader(f, restval='')
      header = [h.strip() for h in reader.fieldnames or ()]
      reader.fieldnames = header
      rows = [(reader.line_num, row) for row in reader]
  except FileNotFoundError as e:
    raise UserError(f'{path} does not exist: expected a CSV file or the folder of a study') from e
  except (OSError, UnicodeDecodeError, csv.Error) as e:
    raise UserError(f'cannot read {path} as CSV: {e}') from e
  if len(set(header)) < len(header):
    twice = next(h for h in header if header.count(h) > 1)
    raise UserError(f'{path} has two columns of the name {twice!r}, expected one')
  for column in columns.where:
    choose(f'column of {path}', column, header)
  rows = [(line, row) for line, row in rows
          if all(row[c].strip() in values for c, values in columns.where.items())]
  if not rows:
    raise UserError(f'{path} has no runs{" of these values" if columns.where else ""}')
  return str(path), header, rows


def _column(place: str, header: Sequence[str], columns: Columns, kind: str) -> str:
  """The column of a meaning: as given, by its own name, or the only one among its aliases; '' without one."""
  given = getattr(columns, kind)
  if given:
    return choose(f'column of {place}', given, header)
  small = {h: h.lower().replace(' ', '_') for h in header}
  found = [h for h in header if small[h] == kind] or [h for h in header if small[h] in ALIASES[kind]]
  if len(found) > 1:
    raise UserError(f'{place}: columns {", ".join(found)} may all be {kind}: choose with --{kind}')
  return found[0] if found else ''


def _needed(place: str, header: Sequence[str], columns: Columns, kind: str) -> str:
  """The column of a meaning, or a UserError that names the nearest."""
  found = _column(place, header, columns, kind)
  if not found:
    try:
      choose(f'column of {place}', kind, header)
    except UserError as e:
      raise UserError(f'{e} (--{kind} COLUMN names it)') from None
  return found


def _kept(place: str, rows: list[tuple[int, Row]], needed: Sequence[str],
          named: Mapping[str, str]) -> tuple[list[tuple[int, Row]], list[str]]:
  """Rows that are done and have all numbers, and names of the others."""
  kept, left_out = [], []
  for line, row in rows:
    parts = [f'{kind[:-1]} {row[named[kind]]}' for kind in ('cells', 'seeds') if named[kind]] or [f'line {line}']
    status = row.get('status', '').strip()
    empty = [c for c in needed if not row[c].strip() or row[c].strip().lower() in ('nan', 'inf', '-inf')]
    if status and status != 'done':
      left_out.append(f'{", ".join(parts)} ({status})')
    elif empty:
      left_out.append(f'{", ".join(parts)} ({empty[0]} {row[empty[0]].strip() or "empty"})')
    else:
      kept.append((line, row))
  if not kept:
    raise UserError(f'{place}: none of {len(rows)} runs has {", ".join(needed)}; the first: {left_out[0]}')
  return kept, left_out


def _number(place: str, line: int, column: str, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    raise UserError(f'{place}, line {line}: {column} is {text!r}, expected a number') from None
  if not 0 < value < math.inf:
    raise UserError(f'{place}, line {line}: {column} is {text}, expected a number above 0')
  return value


def _design(numbers: Mapping[str, np.ndarray], axes: Sequence[str], rising: bool, columns: Columns,
            repeat: float | None) -> Design:
  """x of the axes; of `epochs` the samples are distinct, and the axis counts all passes."""
  x, distinct = np.stack([numbers[a] for a in axes], axis=1), None
  if columns.epochs:
    distinct = x[:, -1].copy()
    x[:, -1] *= numbers[columns.epochs]
  elif columns.unique:
    distinct = numbers[columns.unique]
  return Design(x, rising, distinct, repeat)


def _cells(kept: list[tuple[int, Row]], design: Design, named: Mapping[str, str], place: str) -> np.ndarray:
  """Numbers of cells [n]: by the column, or runs of one place."""
  if not named['cells']:
    where = design.x if design.distinct is None else np.column_stack([design.x, design.distinct])
    return np.unique(where, axis=0, return_inverse=True)[1].reshape(-1)
  names = [row[named['cells']].strip() for _, row in kept]
  if named['seeds']:
    pairs = [(name, row[named['seeds']].strip()) for name, (_, row) in zip(names, kept, strict=True)]
    twice = [p for p in dict.fromkeys(pairs) if pairs.count(p) > 1]
    if twice:
      raise UserError(f'{place}: cell {twice[0][0]}, seed {twice[0][1]} stands twice')
  return np.unique(names, return_inverse=True)[1]


def _check(place: str, design: Design, cells: np.ndarray, axes: Sequence[str], runs: int) -> None:
  """Raises a UserError where no law can be fitted."""
  for name, values in zip(axes, design.x.T, strict=True):
    if len(np.unique(values)) < 2:
      raise UserError(f'{place}: all {runs} runs have {name} {values[0]:g}, expected at least two sizes'
                      + (' (--axis COLUMN fits a law of one axis)' if len(axes) > 1 else ''))
  if not law_intervals.enough(design, cells):
    count = min(len(np.unique(cells)), len(np.unique(design.x, axis=0)))
    raise UserError(f'{place}: {count} cells ({runs} runs) for {design.parameters} parameters, expected at least '
                    f'{design.parameters + 1} cells of different {" and ".join(axes)}')


def _notes(design: Design, cells: np.ndarray) -> list[str]:
  """Cells that lie at one place: their differences count as noise."""
  where = design.x if design.distinct is None else np.column_stack([design.x, design.distinct])
  _, place = np.unique(where, axis=0, return_inverse=True)
  pairs = len({(int(c), int(p)) for c, p in zip(cells, place.reshape(-1), strict=True)})
  same = pairs - len(set(place.reshape(-1).tolist()))
  return [f'{same} cells have the axes of another one: what else differs between them counts as noise (--where '
          'COLUMN=VALUE picks runs)'] if same > 0 else []
