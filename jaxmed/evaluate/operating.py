"""An operating point: a threshold that reaches a sensitivity on validation rows, and what it gives on test rows."""

from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics

METRICS = ('sensitivity', 'specificity', 'ppv')


def threshold(positive: np.ndarray, score: np.ndarray, sensitivity: float) -> float:
  """The largest t for which at least this part of the positive rows has a score >= t.

  Args:
    positive: [M] bool. score: [M], larger means likelier. sensitivity: above 0, at most 1.
  Raises:
    UserError: there is no positive row.
  """
  found = np.sort(np.asarray(score, np.float64)[np.asarray(positive, bool)])[::-1]
  if not len(found):
    raise UserError('operating point: no validation row is positive; expected at least one to choose the threshold on')
  needed = int(np.ceil(sensitivity * len(found) - 1e-9))  # 0.95 x 20 is 19 rows, not 20 by rounding
  return float(found[max(needed, 1) - 1])


def at(positive: np.ndarray, score: np.ndarray, limit: float, subjects: Sequence | np.ndarray, *, draws: int = 1000,
       seed: int = 0) -> dict[str, dict[str, float]]:
  """Sensitivity, specificity and positive predictive value of `score >= limit`, with 95 % intervals over subjects.

  Args:
    positive: [M] bool. score: [M]. subjects: [M].
  Returns:
    {metric: {'value', 'low', 'high'}}; NaN where no row could show it.
  """
  positive, called = np.asarray(positive, bool), np.asarray(score, np.float64) >= limit
  rows = np.stack([positive & called, positive & ~called, ~positive & called, ~positive & ~called], axis=1)
  value = {m: float(v[0]) for m, v in _rates(rows.sum(axis=0)[None]).items()}
  return metrics.summarised(value, _rates(metrics.resampled_sums(rows, subjects, draws=draws, seed=seed)))


def _rates(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Of counts [R, 4]: true positives, false negatives, false positives, true negatives."""
  tp, fn, fp, tn = np.asarray(counts, np.float64).T
  part = lambda a, b: np.divide(a, a + b, out=np.full(len(a), np.nan), where=a + b > 0)
  return {'sensitivity': part(tp, fn), 'specificity': part(tn, fp), 'ppv': part(tp, fp)}
