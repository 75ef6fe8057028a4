"""Choices of rows in which a label and a confounder are correlated as wanted, on arrays.

A cell is a class with a value of the confounder. Each class has home cells; at correlation 0 all cells have the same
number of rows, at 1 the home cells have all. The rows of a class, and of all, are as many at every correlation. Of two
classes and two values the correlation is Pearson's (phi). Splits of growing correlation follow PathoROB (arXiv
2507.17845, pathorob/apd/utils.py), those reversed in test KnoBo (Yang et al. 2024, arXiv 2405.14839).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmed.errors import UserError


class Design(NamedTuple):
  """Home cells [K, M] bool, and the correlation 0 .. 1 of the rows with them."""

  home: np.ndarray
  correlation: float


def homes(classes: int, values: int) -> np.ndarray:
  """Home cells [K, M] bool: classes and values in order, every class and every value with one home or more."""
  out = np.zeros((classes, values), bool)
  if classes >= values:
    out[np.arange(classes), np.arange(classes) * values // classes] = True
  else:
    out[np.arange(values) * classes // values, np.arange(values)] = True
  return out


def turned(home: np.ndarray) -> np.ndarray:
  """Other home cells, none of which is one of these; of two classes and two values all the others."""
  return np.roll(home, 1, axis=0 if home.shape[0] <= home.shape[1] else 1)


def cells(rows: int, design: Design) -> np.ndarray:
  """Rows of each cell [K, M] where each class has M * `rows`."""
  home, r = design
  values = home.shape[1]
  other = int(np.floor(rows * (1 - r) + 0.5))
  out = np.where(home, 0, other)
  for k, places in enumerate(home):
    mine = np.flatnonzero(places)
    each, rest = divmod(values * rows - (values - len(mine)) * other, len(mine))
    out[k, mine] = each + (np.arange(len(mine)) < rest)
  return out


def room(counts: np.ndarray, plans: Sequence[Sequence[Design]]) -> int:
  """The most `rows` for `cells` such that in each plan all its designs together fit into counts [K, M]."""
  low, high = 0, int(counts.max(initial=0))
  while low < high:
    middle = (low + high + 1) // 2
    fits = all((_together(middle, plan) <= counts).all() for plan in plans)
    low, high = (middle, high) if fits else (low, middle - 1)
  return low


def check(counts: np.ndarray, plans: Sequence[Sequence[Design]], least: int, classes: Sequence[str],
          values: Sequence[str], what: str) -> int:
  """`room`, at least `least`.

  Raises:
    UserError: a cell has too few rows; it is named with its count. `what` says which rows these are.
  """
  found = room(counts, plans)
  if found >= least:
    return found
  need = np.max([_together(least, plan) for plan in plans], axis=0)
  k, m = map(int, np.unravel_index(int(np.argmax(need - counts)), counts.shape))
  raise UserError(f'{what} of {classes[k]!r} with {values[m]!r}: {counts[k, m]} rows; expected {need[k, m]} or more '
                  'for the splits')


def _together(rows: int, plan: Sequence[Design]) -> np.ndarray:
  return np.sum([cells(rows, design) for design in plan], axis=0)


def counted(y: np.ndarray, value: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Rows in each cell [K, M]."""
  out = np.zeros(shape, np.int64)
  np.add.at(out, (y, value), 1)
  return out


def order_by_subject(subjects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Places of all rows, subject by subject in a random order."""
  subject = np.unique(np.asarray(subjects), return_inverse=True)[1]
  rank = rng.permutation(subject.max(initial=-1) + 1)
  return np.argsort(rank[subject], kind='stable')


def take(y: np.ndarray, value: np.ndarray, wanted: np.ndarray, order: np.ndarray) -> np.ndarray:
  """bool [N]: the first rows of each cell in this order, as many as wanted [K, M]."""
  out = np.zeros(len(y), bool)
  cell = y[order] * wanted.shape[1] + value[order]
  for i, count in enumerate(wanted.ravel()):
    out[order[np.flatnonzero(cell == i)[:count]]] = True
  return out


def correlation(y: np.ndarray, value: np.ndarray, home: np.ndarray) -> float:
  """How much rows prefer the home cells: 1 all in them, 0 evenly spread; of 2 x 2 balanced cells Pearson's."""
  even = home.mean()
  return float((home[y, value].mean() - even) / (1 - even))


def determined(counts: np.ndarray) -> bool:
  """Whether each value of the confounder, [K, M] rows, has one class alone."""
  return bool(((counts > 0).sum(axis=0) <= 1).all())


def cut_anew(y: np.ndarray, value: np.ndarray, subjects: np.ndarray, seed: int) -> np.ndarray:
  """A split for each row [N], by subject: of the subjects of each cell 20 % test, 20 % val, the rest train.

  One subject of three or more goes to each, of two to train and test, a single one to train. A subject belongs to the
  cell of most of its rows.
  """
  names, subject = np.unique(np.asarray(subjects), return_inverse=True)
  values = int(value.max()) + 1
  table = np.zeros((len(names), (int(y.max()) + 1) * values))
  np.add.at(table, (subject, y * values + value), 1.0)
  cell, rng = table.argmax(axis=1), np.random.default_rng(seed)
  split = np.full(len(names), 'train', dtype='<U5')
  for c in np.unique(cell):
    mine = rng.permutation(np.flatnonzero(cell == c))
    fifth = max(1, round(len(mine) / 5))
    test, val = fifth * (len(mine) > 1), fifth * (len(mine) > 2)
    split[mine[:test]], split[mine[test:test + val]] = 'test', 'val'
  return split[subject]
