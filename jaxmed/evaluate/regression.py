"""Metrics of numbers: mean absolute error and R2."""

from collections.abc import Sequence

import numpy as np

from jaxmed.evaluate import metrics


def score(y: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
  """R2 = 1 - sum (y - predicted)^2 / sum (y - mean y)^2, and the mean absolute error in the units of y.

  Args:
    y, predicted: [M].
  Returns:
    {'r2', 'mae'}; R2 is NaN where all y are one number.
  """
  return {m: float(v[0]) for m, v in _of_sums(_row_values(y, predicted).sum(axis=0)[None]).items()}


def resampled(y: np.ndarray, predicted: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000,
              seed: int = 0) -> dict[str, np.ndarray]:
  """The same [draws] on resampled subjects, see `metrics.resampled`."""
  return _of_sums(metrics.resampled_sums(_row_values(y, predicted), subjects, draws=draws, seed=seed))


def _row_values(y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  """[M, 5]: 1, y, y^2, squared and absolute error, where y is centred, which changes no metric."""
  y, predicted = np.asarray(y, np.float64), np.asarray(predicted, np.float64)
  error, y = y - predicted, y - y.mean()
  return np.stack([np.ones(len(y)), y, y**2, error**2, np.abs(error)], axis=1)


def _of_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
  rows, total, squares, error, absolute = sums.T
  spread = squares - total**2 / rows
  # What is left of a spread that is rounding alone is no spread.
  some = spread > 1e-12 * np.maximum(squares, 1e-300)
  return {'r2': 1 - np.divide(error, spread, out=np.full(len(sums), np.nan), where=some), 'mae': absolute / rows}
