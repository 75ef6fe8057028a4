"""Metrics of PitVis-2023, steps and instruments of videos, as meant and as published.

The scripts are dreets/pitvis, helper_scripts/evaluation_{steps,instruments}.py; rows are seconds of a video. The score
of both tasks together is the mean of the two. All are means over videos.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import segments

BACKGROUND = (-1, 11, 13)  # steps whose true rows are dropped
INSTRUMENTS = 19  # classes 0..18; -1 is outside of the patient, -2 no second instrument
AVERAGES = ('macro', 'weighted')
COMPAT = ('', 'pitvis')


def steps(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[int] | None = None) -> dict[str, float]:
  """{'f1', 'edit', 'score'} of the steps [T] of one video: macro F1, Edit, and their mean.

  Rows whose truth is in BACKGROUND are dropped first, which may join neighbours. F1 is over `classes`; by default, as
  published, over those that the truth or the prediction has, so that a single predicted background row is a class of
  F1 0 more. Give the classes of the truth to count such rows as errors of their true class alone. NaN where every row
  is dropped.
  """
  truth, predicted = _rows(truth, predicted)
  kept = ~np.isin(truth, BACKGROUND)
  y, p = truth[kept], predicted[kept]
  if not len(y):
    return dict.fromkeys(('f1', 'edit', 'score'), float('nan'))
  wanted = np.unique(np.concatenate([y, p])) if classes is None else np.asarray(classes)
  f1 = float(_f1(y[:, None] == wanted, p[:, None] == wanted, empty=0.0).mean())
  edit = segments.edit(y, p)
  return {'f1': f1, 'edit': edit, 'score': (f1 + edit) / 2}


def instruments(truth: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], average: str = 'macro',
                compat: str = '') -> float:
  """F1 of the instruments of one video.

  Args:
    truth, predicted: the instruments of each row, up to two of 0..18; -1 and -2 are none.
    average: 'macro' (the paper), over all 19 classes, a class that neither has counts 1; 'weighted' by true rows, which
      the script of the leaderboard has.
    compat: 'pitvis' does as that script: rows outside of the patient stay, as rows without instruments, and columns of
      the classes that a side lacks stand behind those that it has, for truth and prediction apart. The columns of the
      two then mean different instruments wherever the sets of classes differ.
  Raises:
    UserError: numbers of rows that differ, or a class beyond 18.
  """
  choose('average', average, AVERAGES)
  choose('compat', compat, COMPAT)
  if len(truth) != len(predicted):
    raise UserError(f'instruments: {len(truth)} true and {len(predicted)} predicted rows; expected the same number')
  if compat != 'pitvis':
    kept = [i for i, row in enumerate(truth) if -1 not in row]
    truth, predicted = [truth[i] for i in kept], [predicted[i] for i in kept]
  y, p = (_columns(rows, compat) for rows in (truth, predicted))
  f1, weight = _f1(y, p, empty=1.0), y.sum(axis=0)
  if average == 'macro':
    return float(f1.mean())
  return float((f1 * weight).sum() / weight.sum()) if weight.sum() else float('nan')


def _columns(rows: Sequence[Sequence[int]], compat: str) -> np.ndarray:
  """Which instruments each row has, bool [T, 19]."""
  out = np.zeros((len(rows), INSTRUMENTS), bool)
  for i, row in enumerate(rows):
    for value in row:
      if value >= INSTRUMENTS:
        raise UserError(f'instruments: class {value} in row {i}; expected 0 to {INSTRUMENTS - 1}, -1 or -2')
      if value >= 0:
        out[i, value] = True
  if compat == 'pitvis':
    some = out.any(axis=0)
    out = out[:, np.concatenate([np.flatnonzero(some), np.flatnonzero(~some)])]
  return out


def _f1(y: np.ndarray, p: np.ndarray, empty: float) -> np.ndarray:
  """F1 [K] of columns of bool [T, K]; `empty` where a class is in neither."""
  total = (y.sum(axis=0) + p.sum(axis=0)).astype(np.float64)
  return np.divide(2 * (y & p).sum(axis=0), total, out=np.full(total.shape, empty), where=total > 0)


def _rows(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  truth, predicted = np.asarray(truth), np.asarray(predicted)
  if truth.shape != predicted.shape or truth.ndim != 1:
    raise UserError(f'steps: truth {truth.shape} and prediction {predicted.shape}; expected two rows of one length')
  return truth, predicted
