"""Metrics of tables of counts, true class by predicted class: macro F1 and the quadratic weighted kappa.

Each takes one table or many, so that value and resamples come of one function.
"""

import numpy as np


def confusion(y: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
  """Rows of each class by what was predicted: y, predicted [M] integers in 0..K-1 -> [K, K] float64."""
  out = np.zeros((num_classes, num_classes))
  np.add.at(out, (np.asarray(y), np.asarray(predicted)), 1.0)
  return out


def macro_f1(right: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  """Mean over classes of F1 = 2 right / (true + predicted), as scikit-learn's f1_score(average='macro').

  A class that is neither in the rows nor predicted is left out.

  Args:
    right, true, predicted: [..., K] rows of each class that are right, that are there, and that were predicted.
  Returns:
    [...]; NaN without rows.
  """
  both = true + predicted
  f1 = np.divide(2 * right, both, out=np.zeros(np.shape(both)), where=both > 0)
  some = (both > 0).sum(axis=-1)
  return np.divide(f1.sum(axis=-1), some, out=np.full(np.shape(some), np.nan), where=some > 0)


def quadratic_kappa(table: np.ndarray) -> np.ndarray:
  """1 - (weighted disagreement) / (that of independent answers with the same counts), weights (i - j)^2.

  Cohen's weighted kappa (1968), the metric of grading tasks; as scikit-learn's cohen_kappa_score(weights='quadratic').

  Args:
    table: [..., K, K] counts, classes in their order.
  Returns:
    [...]; NaN where true and predicted classes are one and the same, or without rows.
  """
  table = np.asarray(table, np.float64)
  grade = np.arange(table.shape[-1])
  weight = np.square(grade[:, None] - grade).astype(np.float64)
  chance = table.sum(axis=-1)[..., :, None] * table.sum(axis=-2)[..., None, :]
  rows = table.sum(axis=(-2, -1))
  seen, by_chance = (table * weight).sum(axis=(-2, -1)) * rows, (chance * weight).sum(axis=(-2, -1))
  return 1 - np.divide(seen, by_chance, out=np.full(np.shape(rows), np.nan), where=by_chance > 0)
