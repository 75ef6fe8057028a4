"""Whether clusters of features follow the biology or the origin: PathoROB's clustering score, on arrays.

Koemen et al. 2025, arXiv 2507.17845; bifold-pathomics/PathoROB, pathorob/clustering_score.
"""

import warnings
from typing import NamedTuple

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics
from jaxmed.evaluate.robustness import Combination, combinations

SEED = 1337  # of the published script
LARGEST = 30
ROWS = 1000
STARTS = 20, 5  # of k-means: for the choice of K, of a repetition


class Clustered(NamedTuple):
  """A combination of two classes and two centres, its number of clusters and labels [T, n] of its rows."""

  combination: Combination
  clusters: int
  labels: np.ndarray


def clustered(x: np.ndarray, y: np.ndarray, centre: np.ndarray, *, repetitions: int = 10, largest: int = LARGEST,
              most: int = ROWS, combined: int | None = None, seed: int = SEED) -> list[Clustered]:
  """k-means on unit vectors of every combination of two classes and two centres.

  Args:
    x: features [N, D]. y, centre: integers [N].
    repetitions: clusterings T of a combination with seeds `seed`, seed + 1, ...; 50 in the publication.
    largest: the number of clusters is that of 2 .. largest with the largest cosine silhouette.
    most: rows of a combination that are clustered, a random sample beyond. combined: the same of combinations; None
      for all.
  Raises:
    UserError: no two classes and two centres have rows in all four cells.
  """
  from sklearn.cluster import KMeans
  from sklearn.exceptions import ConvergenceWarning
  from threadpoolctl import threadpool_limits
  x = np.asarray(x, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  out, rng = [], np.random.default_rng(seed)
  chosen = list(combinations(y, centre))
  if combined is not None and len(chosen) > combined:
    chosen = [chosen[i] for i in np.sort(rng.choice(len(chosen), combined, replace=False))]
  with threadpool_limits(1), warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # fewer distinct rows than clusters
    for combination in chosen:
      rows = combination.rows
      if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
      fit = lambda k, starts, s, part=x[rows]: KMeans(k, init='random', n_init=starts, random_state=s).fit_predict(part)
      k = _number(x[rows], lambda k, fit=fit: fit(k, STARTS[0], seed), largest)
      labels = np.stack([fit(k, STARTS[1], seed + t) for t in range(repetitions)])
      out.append(Clustered(combination._replace(rows=rows), k, labels))
  if not out:
    raise UserError('clustering score: no two classes and two centres have rows in all four cells; expected one such '
                    'combination')
  return out


def _number(x: np.ndarray, fit, largest: int) -> int:
  """The number of clusters with the largest cosine silhouette, the smallest of equals."""
  from sklearn.metrics import silhouette_score
  distance = np.maximum(1 - x @ x.T, 0)
  np.fill_diagonal(distance, 0)
  best, chosen = -np.inf, 2
  for k in range(2, min(largest, len(x) - 1) + 1):
    labels = fit(k)
    found = len(np.unique(labels))
    score = silhouette_score(distance, labels, metric='precomputed') if 2 <= found < len(x) else -np.inf
    if score > best:
      best, chosen = score, k
  return chosen


def score(parts: list[Clustered], y: np.ndarray, centre: np.ndarray) -> dict[str, float]:
  """Means over repetitions, then over combinations.

  Returns:
    'ari_biology' and 'ari_centre' (adjusted Rand indices of clusters with the classes and with the centres) and
    'clustering', the first less the second: positive where clusters follow the biology.
  """
  whole = np.ones((1, len(y)))
  return {name: float(v[0]) for name, v in _weighted(parts, y, centre, np.arange(len(y)), whole).items()}


def resampled_score(parts: list[Clustered], y: np.ndarray, centre: np.ndarray, subjects: np.ndarray, *,
                    draws: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
  """The same [draws] on resampled subjects; clusters stay. NaN of a single subject."""
  names, subject = np.unique(np.asarray(subjects), return_inverse=True)
  if len(names) < 2:
    return dict.fromkeys(('ari_biology', 'ari_centre', 'clustering'), np.full(1, np.nan))
  return _weighted(parts, y, centre, subject, next(metrics.resamples(len(names), draws, seed)))


def _weighted(parts: list[Clustered], y: np.ndarray, centre: np.ndarray, subject: np.ndarray,
              counts: np.ndarray) -> dict[str, np.ndarray]:
  """`score` [R] where each subject counts so often, counts [R, S]."""
  found: dict[str, list[np.ndarray]] = {'ari_biology': [], 'ari_centre': []}
  for combination, _, labels in parts:
    rows = combination.rows
    for name, truth in (('ari_biology', y[rows]), ('ari_centre', centre[rows])):
      found[name].append(np.mean([weighted_ari(truth, each, subject[rows], counts) for each in labels], axis=0))
  out = {name: np.mean(values, axis=0) for name, values in found.items()}
  return out | {'clustering': out['ari_biology'] - out['ari_centre']}


def weighted_ari(a: np.ndarray, b: np.ndarray, subject: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Adjusted Rand index [R] (Hubert and Arabie 1985) of labels a, b [n]; rows of subject s weigh counts[r, s].

  A pair of rows weighs the product of their weights; a row makes no pair with itself, however often it was drawn.
  1 where both put all rows into one class, or each row into its own.
  """
  a, b = (np.unique(v, return_inverse=True)[1] for v in (a, b))
  table = np.zeros((counts.shape[1], a.max() + 1, b.max() + 1))
  np.add.at(table, (subject, a, b), 1.0)
  weights, squares = (np.tensordot(c, table, axes=1) for c in (counts, counts**2))  # [R, A, B]
  pairs = lambda axes: ((weights.sum(axis=axes)**2 - squares.sum(axis=axes)) / 2).reshape(len(counts), -1).sum(axis=1)
  both, first, second, total = pairs(()), pairs(2), pairs(1), np.maximum(pairs((1, 2)), 1)
  expected, middle = first * second / total, (first + second) / 2
  same = np.isclose(middle, expected)
  return np.where(same, 1.0, (both - expected) / np.where(same, 1.0, middle - expected))
