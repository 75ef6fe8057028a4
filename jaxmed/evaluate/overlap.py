"""How well two label maps agree: IoU and Dice of cases, as pure functions of tables of confusion.

A case is a record. Where a class is in neither map of a case, the case says nothing of it; where it is in one of them
alone, it scores 0. How often each of these happens is told by `outcomes`.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate.metrics import resampled_means

LABELS = {'miou': 'mIoU (pooled)', 'miou_case': 'mIoU (cases)', 'dice': 'Dice (cases)',
          'dice_foreground': 'Dice (not 0)'}
OUTCOMES = ('both', 'missed', 'hallucinated', 'absent')


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """Pixels of each class (rows) that are predicted as each class (columns), int64 [N, K, K] for each case.

  Args:
    truth, predicted: integers [N, ...] in 0..K-1. Pixels whose truth is negative are ignored.
  Raises:
    UserError: shapes that differ, or a class beyond K-1.
  """
  truth, predicted = (np.asarray(a).reshape(len(a), -1) for a in (truth, predicted))
  if truth.shape != predicted.shape:
    raise UserError(f'overlap: a truth of {truth.shape[1]} pixels and a prediction of {predicted.shape[1]}; expected '
                    'the same grid')
  known = truth >= 0
  if truth.size and max(truth.max(), np.where(known, predicted, 0).max()) >= classes:
    raise UserError(f'overlap: a class beyond 0..{classes - 1}')
  case = np.broadcast_to(np.arange(len(truth))[:, None], truth.shape)[known]
  place = (case * classes + truth[known]) * classes + predicted[known]
  return np.bincount(place, minlength=len(truth) * classes**2).reshape(len(truth), classes, classes)


def areas(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pixels [..., K] of each class in the truth, in the prediction, and in both, of tables [..., K, K]."""
  return table.sum(axis=-1), table.sum(axis=-2), np.diagonal(table, axis1=-2, axis2=-1)


def iou(table: np.ndarray) -> np.ndarray:
  """Intersection over union [..., K] of tables [..., K, K]; NaN where a class is in neither map."""
  truth, predicted, both = areas(table)
  return _ratio(both, truth + predicted - both)


def dice(table: np.ndarray) -> np.ndarray:
  """Dice [..., K] of tables [..., K, K]: twice the pixels in both over those of either; NaN where there are none."""
  truth, predicted, both = areas(table)
  return _ratio(2 * both, truth + predicted)


def dice_of_cases(both: np.ndarray, total: np.ndarray) -> np.ndarray:
  """Dice [N, K] of pixels in both maps [N, K], and of those in the one plus those in the other [N, K].

  NaN where a case has a class in neither map.
  """
  return _ratio(2 * np.asarray(both, np.float64), np.asarray(total, np.float64))


def outcomes(table: np.ndarray) -> dict[str, np.ndarray]:
  """Cases [K] that have a class in 'both' maps, in the truth alone ('missed'), in the prediction alone
  ('hallucinated') and in neither ('absent'), of tables [N, K, K]; the four add up to N."""
  truth, predicted, _ = (a > 0 for a in areas(table))
  found = (truth & predicted, truth & ~predicted, ~truth & predicted, ~truth & ~predicted)
  return {name: cases.sum(axis=0) for name, cases in zip(OUTCOMES, found, strict=True)}


def score(table: np.ndarray, foreground: Sequence[bool] | np.ndarray) -> dict[str, float]:
  """The metrics in LABELS of tables [N, K, K]; NaN where no class says anything.

  'miou' has the areas of all cases pooled, and is the mean over the classes that are in the truth or the prediction
  (macro Jaccard). The others are means over the cases that have a class, then over classes; 'dice_foreground' is over
  the classes in `foreground` [K] alone.
  """
  return {m: float(v[0]) for m, v in _named(_columns(table).mean(axis=0, keepdims=True),
                                            mean(_cases(table), 0)[None], foreground).items()}


def resampled(table: np.ndarray, subjects: Sequence | np.ndarray, foreground: Sequence[bool] | np.ndarray, *,
              draws: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
  """The same [draws] on resampled subjects [N], whose cases move together; NaN of a single subject."""
  ask = dict(draws=draws, seed=seed)
  return _named(resampled_means(_columns(table), subjects, **ask), resampled_means(_cases(table), subjects, **ask),
                foreground)


def constant(table: np.ndarray, answer: int) -> np.ndarray:
  """The tables [N, K, K] if every pixel were predicted as the class `answer`."""
  out = np.zeros_like(table)
  out[..., answer] = table.sum(axis=-1)
  return out


def _columns(table: np.ndarray) -> np.ndarray:
  """[N, 2K] float64: intersection and union of each case and class."""
  truth, predicted, both = areas(table)
  return np.concatenate([both, truth + predicted - both], axis=1).astype(np.float64)


def _cases(table: np.ndarray) -> np.ndarray:
  """[N, 2K]: IoU and Dice of each case and class."""
  return np.concatenate([iou(table), dice(table)], axis=1)


def _named(pooled: np.ndarray, cases: np.ndarray, foreground: Sequence[bool] | np.ndarray) -> dict[str, np.ndarray]:
  """The metrics [R] of R means of `_columns` and `_cases`."""
  k = pooled.shape[1] // 2
  overlaps, coefficients = cases[:, :k], cases[:, k:]
  some = np.asarray(foreground, bool)
  return {'miou': mean(_ratio(pooled[:, :k], pooled[:, k:]), 1), 'miou_case': mean(overlaps, 1),
          'dice': mean(coefficients, 1), 'dice_foreground': mean(coefficients[:, some], 1)}


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) > 0)


def mean(x: np.ndarray, axis: int) -> np.ndarray:
  """Means without NaN; NaN, without a warning, of nothing else."""
  there = ~np.isnan(x)
  return _ratio(np.where(there, x, 0).sum(axis=axis), there.sum(axis=axis))
