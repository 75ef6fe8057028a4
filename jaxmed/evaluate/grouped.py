"""Balanced accuracy of several answers about the same rows, or about parts of them, on the same resampled subjects."""

import numpy as np

from jaxmed.evaluate import metrics

_CHUNK = 2**22


def balanced_accuracies(y: np.ndarray, predicted: np.ndarray, subjects: np.ndarray, where: np.ndarray | None = None, *,
                        draws: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Mean recall over the classes that the rows have.

  Args:
    y: classes [M], integers from 0. predicted: [P, M], P answers. subjects: [M].
    where: [P, M] bool, the rows that count for each answer; None for all.
  Returns:
    Values [P], and [draws, P] on resampled subjects, the same ones for all answers: a resample that lacks a class is
    averaged over those that it has. NaN without rows; of a single subject [1, P] of NaN.
  """
  y, predicted = np.asarray(y), np.atleast_2d(predicted)
  names, subject = np.unique(np.asarray(subjects), return_inverse=True)
  there = np.ones(predicted.shape, bool) if where is None else np.asarray(where, bool)
  shape = len(names), len(predicted), int(y.max()) + 1
  total, right = np.zeros(shape), np.zeros(shape)
  for p, (answer, used) in enumerate(zip(predicted, there, strict=True)):
    np.add.at(total[:, p], (subject[used], y[used]), 1.0)
    np.add.at(right[:, p], (subject[used], y[used]), (answer == y)[used])
  value = _recall(np.ones((1, len(names))), right, total)[0]
  if len(names) < 2:
    return value, np.full((1, len(predicted)), np.nan)
  chunk = max(1, _CHUNK // (shape[1] * shape[2]))
  return value, np.concatenate([_recall(c, right, total) for c in metrics.resamples(len(names), draws, seed, chunk)])


def _recall(counts: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
  """[R, P] of counts [R, S] and tables [S, P, K]."""
  right, total = (np.tensordot(counts, t, axes=1) for t in (right, total))
  recall = np.divide(right, total, out=np.zeros(total.shape), where=total > 0)
  classes = (total > 0).sum(axis=2)
  return np.divide(recall.sum(axis=2), classes, out=np.full(classes.shape, np.nan), where=classes > 0)
