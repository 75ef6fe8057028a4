"""Average precision of what is present in the frames of videos: tools, and criteria of the critical view of safety.

Two aggregations differ: 'pooled' ranks the frames of all videos together; 'video' takes average precision in each
video, then means over the videos that have the class, then over classes (CAMMA-public/ivtmetrics, recognition.py). A
class without a positive frame has no average precision and is left out, where scikit-learn says 0.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import multilabel

BY = ('pooled', 'video')
COMPAT = ('', 'ivtmetrics')


def average_precision(truth: Sequence[np.ndarray], scores: Sequence[np.ndarray], by: str = 'video',
                      compat: str = '') -> dict[str, np.ndarray]:
  """{'ap': [C], 'map': []} of videos; NaN where no frame has the class.

  Args:
    truth: [T, C] of each video with 1 for present, 0 for absent, -1 for unknown, which does not count.
    scores: [T, C] of each video, larger means likelier.
    by: of BY. compat: 'ivtmetrics' takes an average precision of 0 for an absent class.
  Raises:
    UserError: arrays that do not match.
  """
  choose('aggregation of videos', by, BY)
  choose('compat', compat, COMPAT)
  shapes = [np.shape(a) for a in truth], [np.shape(a) for a in scores]
  if shapes[0] != shapes[1] or not len(truth):
    raise UserError(f'presence: truth {shapes[0]} and scores {shapes[1]}; expected tables [T, C] of the same videos')
  if by == 'pooled':
    truth, scores = [np.concatenate(list(truth))], [np.concatenate(list(scores))]
  each = np.stack([multilabel.score(y, s)['ap'] for y, s in zip(truth, scores, strict=True)])  # [V, C]
  each = np.where(each == 0, np.nan, each) if compat == 'ivtmetrics' else each
  ap = multilabel.macro(each.T)
  return {'ap': ap, 'map': multilabel.macro(ap)}


def critical_view(annotated: Sequence[np.ndarray], scores: Sequence[np.ndarray],
                  by: str = 'pooled') -> dict[str, np.ndarray]:
  """{'ap': [3], 'map': []} of the three criteria of the critical view of safety in videos.

  A criterion is met where most annotators say so; average precision is over all frames together, and a criterion
  without a positive frame is left out (CAMMA-public/SurgLatentGraph, evaluator/CocoMetricRGD.py).

  Args:
    annotated: [T, 3] of each video, the mean over annotators (`ds` of Endoscapes). 0.5, impossible with three, is not
      met. scores: [T, 3], larger means likelier.
    by: 'pooled' as published; 'video' is another number.
  Raises:
    UserError: a mean outside of 0 to 1.
  """
  for a in annotated:
    if np.size(a) and not (np.min(a) >= 0 and np.max(a) <= 1):
      raise UserError('presence: a mean over annotators is outside of 0 to 1')
  return average_precision([(np.asarray(a) > 0.5).astype(np.int64) for a in annotated], scores, by)
