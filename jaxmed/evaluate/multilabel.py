"""Metrics of several yes-or-no labels a row, of which some may be unknown."""

from collections.abc import Sequence

import numpy as np

from jaxmed.evaluate import metrics

METRICS = ('auroc', 'ap')


def score(y: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
  """AUROC and average precision of each label on the rows where it is known.

  Args:
    y: [M, L] with 1 for yes, 0 for no, -1 for unknown. scores: [M, L], larger means likelier.
  Returns:
    {'auroc', 'ap'} [L]; NaN where the known rows lack a yes or, for AUROC, a no.
  """
  return {m: v[0] for m, v in _weighted(y, scores, np.ones((1, len(y)))).items()}


def resampled(y: np.ndarray, scores: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000,
              seed: int = 0) -> dict[str, np.ndarray]:
  """The same [draws, L] on resampled subjects, see `metrics.resampled`; NaN [1, L] for a single subject."""
  parts = [_weighted(y, scores, w) for w in metrics.resampled_weights(subjects, draws=draws, seed=seed)]
  if not parts:
    return {m: np.full((1, np.shape(y)[1]), np.nan) for m in METRICS}
  return {m: np.concatenate([part[m] for part in parts]) for m in METRICS}


def macro(values: np.ndarray) -> np.ndarray:
  """Mean over the labels [..., L] that have a value; NaN where none has."""
  there = ~np.isnan(values)
  count = there.sum(axis=-1)
  return np.divide(np.where(there, values, 0).sum(axis=-1), count, out=np.full(np.shape(count), np.nan),
                   where=count > 0)


def _weighted(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
  """Each metric [R, L] under weightings [R, M] of the rows."""
  y, scores = np.asarray(y), np.asarray(scores, np.float64)
  out = {m: np.full((len(weights), y.shape[1]), np.nan) for m in METRICS}
  for k in range(y.shape[1]):
    known = y[:, k] >= 0
    if known.any():
      ask = y[known, k] == 1, scores[known, k], weights[:, known]
      out['auroc'][:, k], out['ap'][:, k] = metrics.weighted_auroc(*ask), metrics.weighted_average_precision(*ask)
  return out
