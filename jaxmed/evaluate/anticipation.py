"""How well the future of a video is anticipated: errors of the remaining time, and F1 of future tokens.

Times are in minutes. The definitions are those of Rivoir et al. (2020) as SWAG applies them
(maxboels/SWAG-surgical-workflow-anticipative-generation, loss_fn/mae.py).
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate.overlap import mean

BY = ('class', 'pooled')
ERRORS = ('in', 'out', 'exp', 'w')


def time_errors(predicted: np.ndarray, target: np.ndarray, horizon: float, by: str = 'class') -> dict[str, float]:
  """Mean absolute errors of the remaining time until each class begins, of one video, in minutes.

  With targets clipped to 0..horizon: 'in' where 0 < target < horizon, 'out' where the target is the horizon (the class
  is farther away or does not come), 'exp' where 0 < target < horizon / 10, and 'w' = (in + out) / 2, of the one that
  exists where the other does not. Frames where the class is present (target 0) do not count. Predictions are not
  clipped, as published.

  Args:
    predicted, target: [T, K]; a target may be infinite. A NaN target is unknown and does not count.
    by: 'class' takes errors of each class, then means over the classes that have one; 'pooled', what SWAG's script
      does, takes frames of all classes together.
  Returns:
    {'in', 'out', 'exp', 'w'}; NaN where no frame counts.
  """
  choose('aggregation of errors', by, BY)
  predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
  if predicted.shape != target.shape or target.ndim != 2:
    raise UserError(f'anticipation: times {predicted.shape} and targets {target.shape}; expected two tables [T, K]')
  if not horizon > 0:
    raise UserError(f'anticipation: a horizon of {horizon} minutes; expected more than 0')
  clipped = np.clip(target, 0, horizon)
  error = np.abs(predicted - np.where(np.isnan(target), 0, clipped))
  inside = (clipped > 0) & (clipped < horizon)
  where = {'in': inside, 'out': clipped == horizon, 'exp': inside & (clipped < 0.1 * horizon)}
  flat = (lambda x: x.reshape(-1, 1)) if by == 'pooled' else (lambda x: x)
  each = {name: mean(flat(np.where(ok, error, np.nan)), 0) for name, ok in where.items()}
  each['w'] = mean(np.stack([each['in'], each['out']]), 0)
  return {name: float(mean(each[name], 0)) for name in ERRORS}


def future_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
  """Mean over observed frames of the weighted F1 of tokens (the current phase and the future ones), of one video.

  Args:
    truth, predicted: classes [T, 1 + F]; the class after the last phase is the end of the video. Tokens whose truth is
      negative do not count, frames without tokens neither.
  Returns:
    F1 as scikit-learn's f1_score(average='weighted', zero_division=0) of each frame; NaN without frames.
  """
  truth, predicted = np.asarray(truth), np.asarray(predicted)
  if truth.shape != predicted.shape or truth.ndim != 2:
    raise UserError(f'anticipation: tokens {predicted.shape} and {truth.shape}; expected two tables [T, 1 + F]')
  known = truth >= 0
  total = np.zeros(len(truth))
  for c in np.unique(truth[known]):
    y, p = known & (truth == c), known & (predicted == c)
    support, both = y.sum(axis=1), (y & p).sum(axis=1)
    total += support * np.divide(2.0 * both, support + p.sum(axis=1), out=np.zeros(len(y)), where=support > 0)
  count = known.sum(axis=1)
  return float(mean(np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0), 0))


def repeated(current: np.ndarray, tokens: int) -> np.ndarray:
  """The baseline that the current phase [T] goes on: tokens [T, 1 + F]."""
  return np.repeat(np.asarray(current)[:, None], 1 + tokens, axis=1)


def transition_prior(videos: Sequence[np.ndarray], classes: int) -> np.ndarray:
  """How often a token k steps ahead has each class where the current phase is known, [F + 1, K, K + 1] that sum to 1.

  Args:
    videos: true tokens [T, 1 + F] of the training videos, as of `future_f1`; classes: K phases, the end is class K.
  Returns:
    A phase that training lacks goes on as it is, k = 0 too.
  """
  table = np.zeros((np.shape(videos[0])[1], classes, classes + 1))
  for tokens in map(np.asarray, videos):
    for k in range(tokens.shape[1]):
      ok = (tokens[:, 0] >= 0) & (tokens[:, 0] < classes) & (tokens[:, k] >= 0)
      np.add.at(table[k], (tokens[ok, 0], tokens[ok, k]), 1.0)
  total = table.sum(axis=-1, keepdims=True)
  return np.where(total > 0, table / np.maximum(total, 1), np.eye(classes, classes + 1))


def from_prior(current: np.ndarray, prior: np.ndarray) -> np.ndarray:
  """The baseline of the likeliest class k steps ahead given the current phase [T]: tokens [T, 1 + F]."""
  tokens = prior[:, np.asarray(current)].argmax(axis=-1).T
  tokens[:, 0] = current
  return tokens
