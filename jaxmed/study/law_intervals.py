"""What a fitted law is worth: intervals, whether there is a law at all, predictions of what was left out, budgets.

Intervals are of the residual bootstrap: the design stays, and each cell gets the residuals of one of the cells nearest
to it, drawn with replacement, of one sign or the other, those of its seeds drawn without. So cells, not runs, are the
independent units; noise may differ from one end of a table to the other; and every draw can be fitted, which a draw of
the cells themselves often cannot: it leaves sizes out. What corrects for few cells, as Student's t does for a mean:

- a fit of nearly absolute residuals goes through about as many runs as it has parameters, so the cells with the least
  residuals, as many as that, give none, and a little normal noise is added (De Angelis, Hall and Young 1993);
- residuals are stretched by sqrt(runs / (runs - parameters)): with what the first does that is the jackknife's
  correction (HC3 of MacKinnon and White 1985), which errs to the safe side;
- each draw stretches all residuals by sqrt(f / chi2_f) with f = cells - parameters, since their spread is estimated;
- and all are stretched by a constant, since a fit of few runs varies more than its bootstrap, as simulations show.

tools/law_coverage.py prints how often the truth lies inside.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.study import laws
from jaxmed.study.laws import DELTA, Design, Grid, Law, Problem

LEVEL = 0.01  # an axis is decided where fewer permutations than this do as well
PERMUTATIONS = 999
NEAREST = 16  # cells that may give residuals to one: with 8, intervals of 36 cells barely hold the truth often enough
_SAFETY = 1.15  # without it 91 to 99 of 100 simulated grids of 16 to 36 cells held the truth, with it more than 95
_NOISE = 0.3  # of residuals, in their spread: enough that draws of few cells are not all alike
_POINTS = 12  # exponents an axis that the test looks among


def link(design: Design, y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  """Residuals seen - predicted, in the unit of the fit."""
  return (y - predicted) / np.median(np.abs(y)) if design.rising else np.log(y) - np.log(predicted)


def unlink(design: Design, y: np.ndarray, predicted: np.ndarray, residual: np.ndarray) -> np.ndarray:
  """The values whose residuals [..., n] these are; of a score none is below a thousandth of what is usual."""
  if not design.rising:
    return predicted * np.exp(residual)
  scale = np.median(np.abs(y))
  return np.maximum(predicted + scale * residual, 1e-3 * scale)


def redrawn(residual: np.ndarray, cells: np.ndarray, x: np.ndarray, parameters: int, draws: int,
            seed: int) -> np.ndarray:
  """Residuals [draws, n] of the bootstrap; see the module.

  Args:
    residual: [n]. cells: [n], equal values are runs of one cell. x: [n, K], the axes. parameters: of the fit.
  """
  rng = np.random.default_rng(seed)
  names, cell = np.unique(cells, return_inverse=True)
  free = max(len(names) - parameters, 1)
  sizes = np.bincount(cell, np.square(residual)) / np.bincount(cell)
  givers = np.argsort(sizes, kind='stable')[min(math.ceil(parameters * len(names) / len(cell)), len(names) - 1):]
  count = np.bincount(cell)
  member = np.full((len(names), count.max()), -1)  # rows of each cell
  order = np.argsort(cell, kind='stable')
  place = np.arange(len(cell)) - np.repeat(np.cumsum(count) - count, count)  # of a row in its cell
  member[cell[order], place] = order
  near = _nearest(x, cell, givers)
  pick = rng.integers(0, near.shape[1], (draws, len(names)))
  source = near[np.arange(len(names)), pick]  # the cell that gives residuals to each cell
  shuffled = np.argsort(np.where(member[source] < 0, 2.0, rng.random((draws, *member.shape))), axis=2)
  given = source[:, cell[order]]
  out = np.empty((draws, len(residual)))
  out[:, order] = residual[member[given, shuffled[np.arange(draws)[:, None], cell[order], place % count[given]]]]
  out *= rng.choice((-1.0, 1.0), source.shape)[:, cell]
  out += _NOISE * np.sqrt(sizes[near].mean(axis=1))[cell] * rng.standard_normal(out.shape)
  stretch = _SAFETY * math.sqrt(len(cell) / max(len(cell) - parameters, 1) / (1 + _NOISE**2))
  return out * stretch * np.sqrt(free / rng.chisquare(free, (draws, 1)))


def _nearest(x: np.ndarray, cell: np.ndarray, givers: np.ndarray) -> np.ndarray:
  """For each cell the NEAREST of `givers`, or all where there are no more: [cells, k], by log x in its deviation."""
  logs = np.log(x)
  place = np.stack([np.bincount(cell, column) / np.bincount(cell) for column in logs.T], axis=1)
  place /= np.maximum(place.std(axis=0), 1e-12)
  distance = np.square(place[:, None] - place[None, givers]).sum(axis=2)
  return givers[np.argsort(distance, axis=1, kind='stable')[:, :NEAREST]]


def bootstrap(design: Design, y: np.ndarray, law: Law, cells: np.ndarray, draws: int = 1000, seed: int = 0,
              delta: float = DELTA) -> np.ndarray:
  """Numbers [draws, p] (E, A, alpha, R) of laws fitted to redrawn runs."""
  predicted = law.predict(design.x, design.distinct)
  residual = redrawn(link(design, y, predicted), cells, design.x, design.parameters, draws, seed)
  return laws.fit_draws(design, y, unlink(design, y, predicted, residual), law, delta)


def interval(value: float, drawn: np.ndarray) -> dict[str, float]:
  """{'value', 'low', 'high'}: the 95 % percentile interval of draws [M], which holds the value at any rate."""
  low, high = np.percentile(drawn, [2.5, 97.5])
  return {'value': float(value), 'low': float(min(low, value)), 'high': float(max(high, value))}


def chance(design: Design, y: np.ndarray, axis: int | None = None, permutations: int = PERMUTATIONS,
           seed: int = 0) -> float:
  """The chance that a table without a law looks as lawful: a permutation test over cells.

  Least squares on the grid of exponents, with A >= 0, are compared with those without the axis; the statistic is how
  much of what is left the axis explains. What the smaller law leaves is permuted between the cells (Freedman and Lane
  1983): against a constant that is a permutation of y, and the test is exact. Few cells have few permutations, so four
  never reach 0.01: the best of their 24 orders comes by chance once in 24.

  Args:
    axis: which axis to leave out; None leaves out all, so that a constant remains.
  """
  design, y = _cell_means(design, y)
  smaller = design.without(axis) if axis is not None else Design(np.empty((len(y), 0)), design.rising)
  grids = [Grid.of(Problem(d, y), d.repeat or laws.REPEATS[1], _POINTS if d.axes else 1) for d in (smaller, design)]
  left, right = (grid.solve(y[None])[0].min() for grid in grids)
  if left <= 0:
    return 1.0
  fitted = _fitted(smaller, y, grids[0])
  order = _orders(len(y), permutations, seed)
  drawn = fitted + (y - fitted)[order]
  less, more = (_least(grid, drawn) for grid in grids)
  explained = lambda a, b: (a - b) / np.maximum(b, 1e-12 * left)
  as_good = explained(less, more) >= explained(left, right) * (1 - 1e-9)
  complete = len(order) == math.factorial(len(y))  # the table itself is one of them
  return float((as_good.sum() + (not complete)) / (len(order) + (not complete)))


def _least(grid: Grid, y: np.ndarray) -> np.ndarray:
  """Least squares over the grid [M] for y [M, n], in parts that fit memory."""
  parts = np.array_split(y, -(-len(y) * len(grid.alpha) // 400_000))
  return np.concatenate([grid.solve(part)[0].min(axis=1) for part in parts])


def _fitted(design: Design, y: np.ndarray, grid: Grid) -> np.ndarray:
  """What the best point of the grid says of y [n]."""
  rss, coefficient = grid.solve(y[None])
  best = rss[0].argmin()
  z = Problem(design, y).logs(design.repeat or laws.REPEATS[1])[0][0]
  sign = -1.0 if design.rising else 1.0
  return coefficient[0, best, 0] + sign * (np.exp(-grid.alpha[best] * z) @ coefficient[0, best, 1:])


def _orders(count: int, permutations: int, seed: int) -> np.ndarray:
  """All orders of `count` cells where those are no more than `permutations`, else random ones: [P, count]."""
  if math.factorial(min(count, 10)) <= permutations:
    return np.array(list(itertools.permutations(range(count))))
  return np.argsort(np.random.default_rng(seed).random((permutations, count)), axis=1)


def _cell_means(design: Design, y: np.ndarray) -> tuple[Design, np.ndarray]:
  """One row for the runs that lie at one place."""
  place = design.x if design.distinct is None else np.column_stack([design.x, design.distinct])
  _, first, cell = np.unique(place, axis=0, return_index=True, return_inverse=True)
  cell = cell.reshape(-1)
  return design.at(first), np.bincount(cell, y) / np.bincount(cell)


def chances(design: Design, y: np.ndarray, names: Sequence[str], permutations: int = PERMUTATIONS,
            seed: int = 0) -> dict[str, float]:
  """Chances by name: of the whole law under 'law', then of each axis where there are several."""
  found = {'law': chance(design, y, None, permutations, seed)}
  if design.axes > 1:
    found |= {name: chance(design, y, axis, permutations, seed) for axis, name in enumerate(names)}
  return found


def held_out(design: Design, y: np.ndarray, cells: np.ndarray, size: np.ndarray, fraction: float = 0.2,
             draws: int = 400, seed: int = 0, delta: float = DELTA) -> dict[str, Any] | None:
  """Runs of the largest cells predicted from all others.

  Args:
    size: [n] what cells are ordered by: compute, or x. fraction: of the cells to leave out, at least one.

  Returns:
    {'rows': the rows left out, 'predicted', 'low', 'high': [m] with the 95 % interval of a run, 'constant': what the
    largest fitted cell gives, 'law'}; None where the others are too few for a fit.
  """
  names, cell = np.unique(cells, return_inverse=True)
  mean = lambda values: np.array([values[cell == c].mean() for c in range(len(names))])
  # Of cells of one compute, the larger are those of more parameters and samples.
  order = np.lexsort((mean(np.log(design.x).sum(axis=1)), np.round(np.log(mean(size)), 6)))
  left = order[len(order) - max(1, round(fraction * len(order))):]
  rows = np.isin(cell, left)
  rest = design.at(~rows)
  if not enough(rest, cells[~rows]):
    return None
  law = laws.fit(rest, y[~rows], delta)
  predicted = law.predict(design.x[rows], None if design.distinct is None else design.distinct[rows])
  numbers = bootstrap(rest, y[~rows], law, cells[~rows], draws, seed, delta)
  residual = link(rest, y[~rows], law.predict(rest.x, rest.distinct))
  noise = redrawn(residual, cells[~rows], rest.x, rest.parameters, draws, seed + 1)
  drawn = np.array([law_of(design, row).predict(design.x[rows], _rows(design.distinct, rows)) for row in numbers])
  pick = np.random.default_rng(seed + 2).integers(0, noise.shape[1], drawn.shape)
  drawn = unlink(rest, y[~rows], drawn, np.take_along_axis(noise, pick, axis=1))
  low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
  largest = cells == names[order[len(order) - len(left) - 1]]
  return {'rows': np.flatnonzero(rows), 'predicted': predicted, 'low': low, 'high': high, 'law': law,
          'constant': float(y[largest].mean())}


def _rows(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
  return None if values is None else values[rows]


def law_of(design: Design, numbers: np.ndarray) -> Law:
  """The law of one row of what `bootstrap` returns."""
  k = design.axes
  return Law(numbers[0], tuple(numbers[1:1 + k]), tuple(numbers[1 + k:1 + 2 * k]), design.rising,
             numbers[-1] if design.fits_repeat else design.repeat)


def enough(design: Design, cells: np.ndarray) -> bool:
  """Whether there are more cells than parameters, and two sizes of each axis at least."""
  places = np.unique(design.x, axis=0)
  return (min(len(np.unique(cells)), len(places)) > design.parameters
          and all(len(np.unique(places[:, k])) > 1 for k in range(design.axes)))
