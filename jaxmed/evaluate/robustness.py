"""Whether the nearest neighbours of an image share its biology or its origin: the robustness index, on arrays.

Definitions follow PathoROB (Koemen et al. 2025, arXiv 2507.17845; bifold-pathomics/PathoROB, robustness_index).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics

KINDS = ('SS', 'SO', 'OS', 'OO')  # same or other class, then same or other centre
MOST = 1000  # largest k of the grid
_SORTED = 4096  # rows beyond which only the nearest are put in order
_DIGITS = 12  # of similarities: what differs beyond is rounding, and equally near
_CHUNK = 2**23  # similarities held at once: 64 MiB of float64


class Looked(NamedTuple):
  """The neighbours of R rows, nearest first: classes y [R] of the rows, near_y [R, K] of their neighbours, kinds [R, K]
  (places in KINDS) and subjects [R] of the rows."""

  y: np.ndarray
  near_y: np.ndarray
  kinds: np.ndarray
  subjects: np.ndarray


def look(x: np.ndarray, y: np.ndarray, centre: np.ndarray, subjects: np.ndarray, most: int = MOST,
         pairs: bool = False, seed: int | None = 0) -> Looked:
  """What the nearest rows of other subjects are.

  Args:
    x: features [N, D]. y: classes [N], integers. centre: origins [N], integers. subjects: [N]; rows of one subject are
      never neighbours of each other.
    most: most neighbours K; fewer where a row has fewer, as all rows are cut to the smallest number.
    pairs: looks within each combination of two classes and two centres apart and stacks the rows.
    seed: of the order among equally near rows, which is random; None for the order of the rows.
  """
  parts = []
  for rows in (c.rows for c in combinations(y, centre)) if pairs else (np.arange(len(x)),):
    found = neighbours(x[rows], subjects[rows], most, seed)
    near_y, near_centre = y[rows].astype(np.int32)[found], centre[rows][found]
    kinds = 2 * (near_y != y[rows][:, None]) + (near_centre != centre[rows][:, None])
    parts.append(Looked(y[rows], near_y, kinds.astype(np.int8), subjects[rows]))
  if not parts:
    raise UserError('robustness: no two classes and two centres have rows in all four cells; expected one such '
                    'combination')
  least = min(p.kinds.shape[1] for p in parts)
  return Looked(np.concatenate([p.y for p in parts]), np.concatenate([p.near_y[:, :least] for p in parts]),
                np.concatenate([p.kinds[:, :least] for p in parts]), np.concatenate([p.subjects for p in parts]))


class Combination(NamedTuple):
  """Two classes, two centres, and the places of their rows."""

  classes: tuple[int, int]
  centres: tuple[int, int]
  rows: np.ndarray


def combinations(y: np.ndarray, centre: np.ndarray) -> Iterator[Combination]:
  """Each two classes with each two centres that have rows in all four cells."""
  for two in itertools.combinations(np.unique(y).tolist(), 2):
    for places in itertools.combinations(np.unique(centre).tolist(), 2):
      if all(np.any((y == c) & (centre == p)) for c in two for p in places):
        yield Combination(two, places, np.flatnonzero(np.isin(y, two) & np.isin(centre, places)))


def neighbours(x: np.ndarray, subjects: np.ndarray, most: int, seed: int | None = 0) -> np.ndarray:
  """The rows of other subjects that are nearest to each row of [N, D] by cosine, int64 [N, K].

  K is `most`, or the smallest number of rows that any row has outside its subject. `seed` is as for `look`.
  """
  x = np.asarray(x, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  subject = np.unique(np.asarray(subjects), return_inverse=True)[1]
  count = min(most, len(x) - int(np.bincount(subject).max(initial=0)))
  order = np.arange(len(x)) if seed is None else np.random.default_rng(seed).permutation(len(x))
  shuffled, whose = x[order], subject[order]
  out = np.zeros((len(x), max(count, 0)), np.int64)
  step = max(1, _CHUNK // max(len(x), 1))
  for start in range(0, len(x) if count > 0 else 0, step):
    rows = slice(start, start + step)
    alike = np.round(x[rows] @ shuffled.T, _DIGITS)
    far = np.where(subject[rows, None] == whose, np.inf, -alike)
    out[rows] = order[_nearest(far, count)]
  return out


def _nearest(far: np.ndarray, count: int) -> np.ndarray:
  """The places of the smallest values of each row [m, N], in their order, [m, count]."""
  if far.shape[1] <= _SORTED or 2 * count > far.shape[1]:
    return np.argsort(far, axis=1, kind='stable')[:, :count]
  some = np.sort(np.argpartition(far, count - 1, axis=1)[:, :count], axis=1)
  return np.take_along_axis(some, np.argsort(np.take_along_axis(far, some, axis=1), axis=1, kind='stable'), axis=1)


def grid(largest: int, most: int = MOST) -> tuple[int, ...]:
  """The k that are tried: 1, 3, 5, 7, 9, 11, 21, 31, ... below `most` and up to `largest`."""
  return tuple(k for k in (1, 3, 5, 7, 9, *range(11, most, 10)) if k <= largest)


def accuracies(looked: Looked, ks: Sequence[int]) -> np.ndarray:
  """Balanced accuracy [len(ks)] of the class that most of the k nearest rows have; of equals the smallest class.

  ks rise.
  """
  votes = np.zeros((len(looked.y), int(looked.y.max()) + 1))
  rows = np.arange(len(looked.y))
  out, done = [], 0
  for k in ks:
    for j in range(done, k):
      votes[rows, looked.near_y[:, j]] += 1
    done = k
    right = votes.argmax(axis=1) == looked.y
    out.append(np.mean([right[looked.y == c].mean() for c in np.unique(looked.y)]))
  return np.array(out)


def index(looked: Looked, ks: Sequence[int]) -> np.ndarray:
  """The robustness index [len(ks)]: SO / (SO + OS) over the k nearest neighbours of all rows together.

  1 where only biology counts, 0 where only the origin does; NaN where there is neither an SO nor an OS.
  """
  return _ratio(*(_counted(looked, kind, ks).sum(axis=0) for kind in ('SO', 'OS')))


def resampled_index(looked: Looked, ks: Sequence[int], *, draws: int = 1000, seed: int = 0) -> np.ndarray:
  """The same [draws, len(ks)] on resampled subjects; neighbours stay. NaN of a single subject."""
  names, subject = np.unique(looked.subjects, return_inverse=True)
  if len(names) < 2:
    return np.full((1, len(ks)), np.nan)
  sums = []
  for kind in ('SO', 'OS'):
    sums.append(np.zeros((len(names), len(ks))))
    np.add.at(sums[-1], subject, _counted(looked, kind, ks))
  counts = next(metrics.resamples(len(names), draws, seed))
  return _ratio(*(counts @ s for s in sums))


def shares(looked: Looked, k: int) -> dict[str, float]:
  """The fraction of each kind among the k nearest neighbours of all rows."""
  return {name: float((looked.kinds[:, :k] == i).mean()) for i, name in enumerate(KINDS)}


def _counted(looked: Looked, kind: str, ks: Sequence[int]) -> np.ndarray:
  """[R, len(ks)]: how many of the k nearest neighbours of each row are of this kind."""
  so_far = np.cumsum(looked.kinds == KINDS.index(kind), axis=1)
  return so_far[:, np.asarray(ks) - 1].astype(np.float64)


def _ratio(same: np.ndarray, other: np.ndarray) -> np.ndarray:
  total = same + other
  return np.divide(same, total, out=np.full(np.shape(total), np.nan), where=total > 0)
