"""Intersection over union of instruments in frames: the forms that papers on robotic surgery call mIoU.

  'challenge'   a frame's mean over the classes in its truth, then over frames (EndoVis 2017). False positives of absent
                classes cost nothing, and a frame without an instrument says nothing.
  'isi'         a frame's mean over the classes in its truth or prediction, then over frames (ISINet).
  'mean_class'  a class's mean over the frames where it is in truth or prediction, then over classes (ISINet's mcIoU).
  'cumulative'  intersections over unions, summed over classes and frames.
  'pooled'      a class's intersections over its unions, summed over frames, then the mean over classes.

The first four are BCV-Uniandes/ISINet, temp_consistency_module/main.py. Class 0 is the background and never counts. A
frame without an instrument in truth and prediction says nothing in any of them.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.errors import choose
from jaxmed.evaluate import overlap

FORMS = ('challenge', 'isi', 'mean_class', 'cumulative', 'pooled')
COMPAT = ('', 'isinet')


def score(truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray], classes: int, compat: str = '',
          ) -> dict[str, float]:
  """Every form of FORMS of frames; NaN where nothing counts.

  Args:
    truth, predicted: integers [*size] of each frame, 0 for background, 1..classes for instruments. Pixels whose truth
      is negative are ignored.
    compat: 'isinet' does as the published script: a frame with instruments where nothing is predicted adds nothing to
      the sums of 'cumulative', so that missed frames do not lower it.
  """
  choose('compat', compat, COMPAT)
  table = np.concatenate([overlap.confusion(np.asarray(y)[None], np.asarray(p)[None], classes + 1)
                          for y, p in zip(truth, predicted, strict=True)])
  true, found, both = (a[:, 1:].astype(np.float64) for a in overlap.areas(table))
  union = true + found - both
  iou = np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)  # [N, K]
  seen = found.sum(axis=1) > 0 if compat == 'isinet' else np.ones(len(found), bool)
  total = union[seen].sum()
  return {'challenge': _twice(np.where(true > 0, iou, np.nan), 1), 'isi': _twice(iou, 1),
          'mean_class': _twice(iou, 0), 'cumulative': float(both[seen].sum() / total) if total else float('nan'),
          'pooled': float(overlap.mean(np.divide(both.sum(axis=0), union.sum(axis=0), out=np.full(classes, np.nan),
                                                 where=union.sum(axis=0) > 0), 0))}


def _twice(x: np.ndarray, axis: int) -> float:
  """The mean over an axis, then over the other, without NaN."""
  return float(overlap.mean(overlap.mean(x, axis), 0))
