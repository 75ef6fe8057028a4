"""Whether probabilities are what they say: expected calibration error, Brier score, the reliability diagram."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.evaluate import metrics

BINS = 15  # of equal width, as in Guo et al. (arXiv 1706.04599)


def score(y: np.ndarray, scores: np.ndarray, bins: int = BINS) -> dict[str, float]:
  """Expected calibration error and Brier score of probabilities.

  ECE is of the largest probability, the confidence (Guo et al., arXiv 1706.04599, equation 3): over bins
  (i / bins, (i + 1) / bins] of confidence the mean, weighted by rows, of |accuracy - mean confidence|. The Brier score
  is the mean over rows of the sum over classes of (probability - truth)^2 (Brier 1950), 0 to 2; with two classes it is
  twice that of one of them.

  Args:
    y: [M] integers in 0..K-1. scores: [M, K] probabilities.
  Returns:
    {'ece', 'brier'}; NaN for scores that are not probabilities.
  """
  values = _of_sums(_row_values(y, scores, bins).sum(axis=0)[None], bins)
  return {m: float(v[0]) for m, v in values.items()}


def resampled(y: np.ndarray, scores: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000, seed: int = 0,
              bins: int = BINS) -> dict[str, np.ndarray]:
  """The same [draws] on resampled subjects, see `metrics.resampled`."""
  return _of_sums(metrics.resampled_sums(_row_values(y, scores, bins), subjects, draws=draws, seed=seed), bins)


def reliability(y: np.ndarray, scores: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
  """The bins that have rows: {'low', 'high', 'rows', 'confidence', 'accuracy'}, means over their rows."""
  confidence, right, place = _binned(y, scores, bins)
  out = []
  for b in np.unique(place).tolist():
    here = place == b
    out.append({'low': b / bins, 'high': (b + 1) / bins, 'rows': int(here.sum()),
                'confidence': float(confidence[here].mean()), 'accuracy': float(right[here].mean())})
  return out


def best_scale(y: np.ndarray, similarity: np.ndarray, low: float = 0.1, high: float = 1e4) -> float:
  """The s in [low, high] of which softmax(s * similarity) has the least mean negative log-likelihood.

  1 / s is the temperature of Guo et al. (section 4.2); the likelihood is concave in s, so that there is one best value.

  Args:
    y: [M] integers in 0..K-1. similarity: [M, K], such as cosines.
  """
  from scipy.optimize import minimize_scalar
  from scipy.special import logsumexp
  y, similarity = np.asarray(y, np.int64), np.asarray(similarity, np.float64)
  right = similarity[np.arange(len(y)), y]
  loss = lambda log: float((logsumexp(np.exp(log) * similarity, axis=1) - np.exp(log) * right).mean())
  return float(np.exp(minimize_scalar(loss, bounds=(np.log(low), np.log(high)), method='bounded').x))


def are_probabilities(scores: np.ndarray) -> bool:
  """Whether each row [K] adds up to 1 and none is negative."""
  scores = np.asarray(scores)
  return bool((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3))


def _binned(y: np.ndarray, scores: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Confidence, whether the prediction is right, and bin of each row."""
  scores = np.asarray(scores, np.float64)
  confidence, right = scores.max(axis=1), scores.argmax(axis=1) == np.asarray(y)
  edges = np.arange(1, bins) / bins
  return confidence, right, np.searchsorted(edges, confidence, side='left')  # closed to the right


def _row_values(y: np.ndarray, scores: np.ndarray, bins: int) -> np.ndarray:
  """[M, bins + 2]: confidence less right in the bin of the row, squared errors, 1."""
  scores = np.asarray(scores, np.float64)
  out = np.zeros((len(scores), bins + 2))
  out[:, -1] = 1
  if not are_probabilities(scores):
    out[:, :-1] = np.nan
    return out
  confidence, right, place = _binned(y, scores, bins)
  out[np.arange(len(out)), place] = confidence - right
  out[:, -2] = np.square(scores).sum(axis=1) - 2 * scores[np.arange(len(out)), np.asarray(y, np.int64)] + 1
  return out


def _of_sums(sums: np.ndarray, bins: int) -> dict[str, np.ndarray]:
  rows = sums[:, -1]
  return {'ece': np.abs(sums[:, :bins]).sum(axis=1) / rows, 'brier': sums[:, -2] / rows}
