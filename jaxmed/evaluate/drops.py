"""How much accuracy falls as training rows are confounded more and more: the average performance drop, on arrays.

Koemen et al. 2025, arXiv 2507.17845; bifold-pathomics/PathoROB, pathorob/apd.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmed.evaluate import confounding, probes
from jaxmed.evaluate.confounding import Design


class Rows(NamedTuple):
  """Features [n, D], classes [n], values of the confounder [n] and subjects [n] of some rows."""

  x: np.ndarray
  y: np.ndarray
  value: np.ndarray
  subjects: np.ndarray


def levels(count: int) -> np.ndarray:
  """Correlations 0 .. 1 in even steps."""
  return np.linspace(0, 1, count)


def accuracies(train: Rows, val: Rows, tests: Mapping[str, Rows], home: np.ndarray, sizes: tuple[int, int],
               steps: int, repetitions: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Balanced accuracies of logistic regression fitted on rows of growing correlation and constant size.

  A repetition puts the subjects in a random order; each cell takes its first rows. The penalty is chosen on validation
  rows confounded like the training rows; see `probes.logistic`. The published script does not standardise features, and
  tries penalties down to 1e-8, of which rounding decides the answers.

  Args:
    tests: {name: rows that are asked}. home: home cells [K, M].
    sizes: rows of a cell at correlation 0 in train and in val, see `confounding.room`.
    steps: correlations from 0 to 1.
  Returns:
    {name: [steps, repetitions]}, where each value of the confounder counts the same within a class.
  """
  out = {name: np.zeros((steps, repetitions)) for name in tests}
  asked = np.concatenate([rows.x for rows in tests.values()])
  ends = np.cumsum([len(rows.y) for rows in tests.values()])
  for j in range(repetitions):
    rng = np.random.default_rng([seed, j])
    orders = [confounding.order_by_subject(rows.subjects, rng) for rows in (train, val)]
    for i, r in enumerate(levels(steps)):
      some = [confounding.take(rows.y, rows.value, confounding.cells(size, Design(home, r)), order)
              for rows, size, order in zip((train, val), sizes, orders, strict=True)]
      scores, _ = probes.logistic(train.x[some[0]], train.y[some[0]], val.x[some[1]], val.y[some[1]], asked, len(home))
      predicted = np.split(scores.argmax(axis=1), ends[:-1])
      for (name, rows), answer in zip(tests.items(), predicted, strict=True):
        out[name][i, j] = even_accuracy(rows.y, rows.value, answer)
  return out


def even_accuracy(y: np.ndarray, value: np.ndarray, predicted: np.ndarray) -> float:
  """Mean over classes of the mean over values of the confounder of the fraction of right answers."""
  right = np.asarray(predicted) == y
  each = [np.mean([right[(y == c) & (value == v)].mean() for v in np.unique(value[y == c])]) for c in np.unique(y)]
  return float(np.mean(each))


def relative(scores: np.ndarray) -> np.ndarray:
  """[S, R] accuracies -> [R]: the mean over correlations above the first of accuracy over the first one's, less 1."""
  first = scores[0]
  share = np.divide(scores[1:], first, out=np.full(scores[1:].shape, np.nan), where=first > 0)
  return share.mean(axis=0) - 1


def masson_loftus(groups: Sequence[np.ndarray]) -> dict[str, float]:
  """Mean of repetitions of one or more groups (corpora) with its 95 % interval by Student's t.

  The differences between the means of groups are taken out first (Masson and Loftus 2003). No interval of a single
  repetition: NaN.
  """
  from scipy import stats
  values = np.concatenate(groups)
  mean = values.mean()
  centred = np.concatenate([np.asarray(g) - np.mean(g) + mean for g in groups])
  if len(centred) < 2:
    return {'value': float(mean), 'low': float('nan'), 'high': float('nan')}
  half = float(stats.t.ppf(0.975, len(centred) - 1) * centred.std(ddof=1) / np.sqrt(len(centred)))
  return {'value': float(mean), 'low': float(mean) - half, 'high': float(mean) + half}
