"""Receiver operating characteristics as points to draw."""

import numpy as np

POINTS = 51


def roc(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """False and true positive rates of every threshold, from (0, 0) to (1, 1); equal scores are one threshold.

  Args:
    positive: [M] bool, with both values. score: [M], larger means likelier.
  """
  order = np.argsort(-np.asarray(score), kind='stable')
  ranked, hit = np.asarray(score)[order], np.asarray(positive, bool)[order]
  ends = np.flatnonzero(np.concatenate([ranked[1:] != ranked[:-1], [True]]))
  tp, fp = np.cumsum(hit)[ends], np.cumsum(~hit)[ends]
  return np.concatenate([[0.0], fp / fp[-1]]), np.concatenate([[0.0], tp / tp[-1]])


def tpr_at(positive: np.ndarray, score: np.ndarray, points: int = POINTS) -> list[float]:
  """True positive rates at evenly spaced false positive rates 0..1, along the curve."""
  fpr, tpr = roc(positive, score)
  # Where the curve rises at one rate the upper end counts.
  last = np.concatenate([fpr[1:] != fpr[:-1], [True]])
  return np.interp(np.linspace(0, 1, points), fpr[last], tpr[last]).tolist()
