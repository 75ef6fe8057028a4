"""Segments of videos: Edit, F1 at overlaps of labels a frame, and mean average precision of segments with scores.

Edit and F1 are those of temporal action segmentation (Lea et al. 2017; yabufarha/ms-tcn, eval.py): a segment is a run
of frames of one label. F1 is of matches pooled over videos, Edit a mean over videos; some papers average F1 over
videos, which is `by='video'`. Average precision is that of ActivityNet, see `average_precision`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate.overlap import mean

OVERLAPS = (0.1, 0.25, 0.5)
TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)  # OphNet's
SAME = 1e-3  # seconds: annotations of one label that differ by less are one, and shorter ones are none
BY = ('pooled', 'video')
COMPAT = ('', 'swag')
SPAN_COMPAT = ('', 'actionformer')


def segments(labels: np.ndarray, background: Sequence[int] = (), compat: str = '') -> tuple[np.ndarray, ...]:
  """Labels, starts and ends (the frame after the last one) [S] of the runs of labels [T] that are not background.

  Args:
    compat: 'swag' ends the last segment of a video a frame early, as the evaluation of SWAG does
      (maxboels/SWAG-surgical-workflow-anticipative-generation, R2A2/eval/seg_eval.py): one of a single frame has no
      length and is never found.
  """
  choose('compat', compat, COMPAT)
  labels = np.asarray(labels)
  borders, some = np.flatnonzero(labels[1:] != labels[:-1]) + 1, min(len(labels), 1)
  starts = np.concatenate([np.zeros(some, np.int64), borders])
  ends, values = np.concatenate([borders, np.full(some, len(labels))]), labels[starts]
  if compat == 'swag' and len(ends):
    ends = ends - (ends == len(labels))
  kept = ~np.isin(values, list(background))
  return values[kept], starts[kept], ends[kept]


def edit(truth: np.ndarray, predicted: np.ndarray, background: Sequence[int] = ()) -> float:
  """1 - Levenshtein distance of the sequences of segments over the length of the longer, of labels [T]; 1 is best.

  NaN where neither has a segment.
  """
  y, p = (segments(x, background)[0].tolist() for x in (truth, predicted))
  if not y and not p:
    return float('nan')
  return 1 - levenshtein(y, p) / max(len(y), len(p))


def levenshtein(a: Sequence, b: Sequence) -> int:
  """The smallest number of insertions, deletions and substitutions that turn one sequence into another."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    previous, row = row, [i]
    for j, y in enumerate(b, 1):
      row.append(previous[j - 1] if x == y else 1 + min(previous[j - 1], previous[j], row[j - 1]))
  return row[-1]


def matches(truth: np.ndarray, predicted: np.ndarray, overlap: float, background: Sequence[int] = (),
            compat: str = '') -> np.ndarray:
  """True positives, false positives and false negatives [3] among the segments of labels [T] of one video.

  A predicted segment takes the true one of its label with the largest overlap, in order of time. It is right where that
  overlap is at least `overlap` and the true segment is not taken yet. The denominator of an overlap is the length from
  the first start to the last end, which is the union of intervals that touch.
  """
  _check(truth, predicted, overlap)
  y, y_start, y_end = segments(truth, background, compat)
  taken, hits = np.zeros(len(y), bool), 0
  found = list(zip(*segments(predicted, background, compat), strict=True))
  for label, start, end in found:
    both = np.minimum(end, y_end) - np.maximum(start, y_start)
    hull = np.maximum(end, y_end) - np.minimum(start, y_start)
    iou = np.where(y == label, np.divide(both, hull, out=np.zeros(len(y)), where=hull > 0), 0.0)
    best = int(iou.argmax()) if len(iou) else 0
    if len(iou) and iou[best] >= overlap and not taken[best]:
      taken[best], hits = True, hits + 1
  return np.array([hits, len(found) - hits, len(y) - hits])


def score(truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray], *, overlaps: Sequence[float] = OVERLAPS,
          background: Sequence[int] = (), by: str = 'pooled', compat: str = '') -> dict[str, float]:
  """{'accuracy', 'edit', 'f1@10', ...} of labels [T] of each video, from 0 to 1.

  Args:
    by: 'pooled' counts the matches and the frames of all videos together; 'video' averages F1 and accuracy over videos.
      Edit is a mean over videos in both, those without a segment left out. F1 without any segment is NaN.
  """
  choose('aggregation of segments', by, BY)
  if len(truth) != len(predicted) or not len(truth):
    raise UserError(f'segments: {len(truth)} true and {len(predicted)} predicted videos; expected one or more of each')
  table = np.array([[matches(y, p, o, background, compat) for o in overlaps]
                    for y, p in zip(truth, predicted, strict=True)])  # [V, O, 3]
  f1 = _f1(table.sum(axis=0)) if by == 'pooled' else mean(_f1(table), 0)
  right = [np.asarray(y) == np.asarray(p) for y, p in zip(truth, predicted, strict=True)]
  accuracy = np.concatenate(right).mean() if by == 'pooled' else np.mean([r.mean() for r in right])
  edits = np.array([edit(y, p, background) for y, p in zip(truth, predicted, strict=True)])
  return {'accuracy': float(accuracy), 'edit': float(mean(edits, 0)),
          **{f'f1@{round(100 * o)}': float(v) for o, v in zip(overlaps, f1, strict=True)}}


def _check(truth: np.ndarray, predicted: np.ndarray, overlap: float) -> None:
  if np.shape(truth) != np.shape(predicted):
    raise UserError(f'segments: truth {np.shape(truth)} and prediction {np.shape(predicted)} of a video; expected one '
                    'label a frame in both')
  if not 0 < overlap <= 1:
    raise UserError(f'segments: an overlap of {overlap}; expected a number above 0, 1 at most')


def _f1(table: np.ndarray) -> np.ndarray:
  """F1 [...] of counts [..., 3]; NaN without a segment."""
  hits, false, missed = np.moveaxis(np.asarray(table, np.float64), -1, 0)
  total = 2 * hits + false + missed
  return np.divide(2 * hits, total, out=np.full(np.shape(total), np.nan), where=total > 0)


class Spans(NamedTuple):
  """Segments of one video: spans [S, 2] start and end in seconds, labels [S] integers, scores [S] of predictions."""

  spans: np.ndarray
  labels: np.ndarray
  scores: np.ndarray = np.zeros(0)


def average_precision(truth: Mapping[Any, Spans], predicted: Mapping[Any, Spans], tious: Sequence[float] = TIOUS,
                      compat: str = '') -> tuple[np.ndarray, np.ndarray]:
  """Average precision [len(tious), K] and the K classes that the truth has.

  ActivityNet's (OphNet-benchmark, talnets/actionformer/libs/utils/metrics.py): predictions of a class over all videos
  go from the highest score on; each takes the free true segment of its video with the largest intersection over union
  where that is at least tIoU, else it is false. The area is below the precision that is made to fall with recall (VOC
  2010). True segments shorter than SAME, and repeated ones, are left out. Equal scores stand in the order given.

  Args:
    truth, predicted: segments by video. Predictions of other videos or of classes that the truth lacks do not count.
    compat: 'actionformer' numbers the classes of the truth from 0 and lets a predicted label that the truth lacks keep
      its value, so that it may fall on another class.
  """
  choose('compat', compat, SPAN_COMPAT)
  if bad := [t for t in tious if not 0 < t <= 1]:
    raise UserError(f'segments: a tIoU of {bad[0]}; expected a number above 0, 1 at most')
  truth = {video: _cleaned(spans) for video, spans in truth.items()}
  classes = np.unique(np.concatenate([np.zeros(0, np.int64), *(np.asarray(s.labels) for s in truth.values())]))
  number = {int(c): i for i, c in enumerate(classes)}
  lost = (lambda label: label) if compat == 'actionformer' else (lambda label: -1)
  rows = [(float(s), video, span, number.get(int(label), lost(int(label)))) for video, found in predicted.items()
          for span, label, s in zip(found.spans, found.labels, found.scores, strict=True)]
  rows.sort(key=lambda row: -row[0])
  out = np.zeros((len(tious), len(classes)))
  for k, c in enumerate(classes):
    true = {video: np.asarray(s.spans, np.float64)[np.asarray(s.labels) == c] for video, s in truth.items()}
    ranked = [(video, span) for _, video, span, label in rows if label == k]
    for i, tiou in enumerate(tious):
      out[i, k] = _area(_hits(true, ranked, tiou), sum(len(s) for s in true.values()))
  return out, classes


def mean_average_precision(truth: Mapping[Any, Spans], predicted: Mapping[Any, Spans], tious: Sequence[float] = TIOUS,
                           compat: str = '') -> dict[str, float]:
  """{'map@0.3', ..., 'map'}: means over the classes of the truth, and over tIoUs too; NaN without a true segment."""
  table, classes = average_precision(truth, predicted, tious, compat)
  each = table.mean(axis=1) if len(classes) else np.full(len(tious), np.nan)
  return {**{f'map@{t:g}': float(v) for t, v in zip(tious, each, strict=True)}, 'map': float(each.mean())}


def _cleaned(found: Spans) -> Spans:
  """True segments without repeated ones and those of no length."""
  kept: list[int] = []
  spans, labels = np.asarray(found.spans, np.float64).reshape(-1, 2), np.asarray(found.labels)
  for i, (span, label) in enumerate(zip(spans, labels, strict=True)):
    again = any(labels[j] == label and np.abs(spans[j] - span).max() <= SAME for j in kept)
    if span[1] - span[0] >= SAME and not again:
      kept.append(i)
  return Spans(spans[kept], labels[kept])


def _hits(truth: Mapping[Any, np.ndarray], ranked: Sequence[tuple[Any, np.ndarray]], tiou: float) -> np.ndarray:
  """Which predictions (video, span), from the best on, take a true segment [n, 2] of their video."""
  free = {video: np.ones(len(spans), bool) for video, spans in truth.items()}
  hits = np.zeros(len(ranked), bool)
  for i, (video, (start, end)) in enumerate(ranked):
    if video not in truth or not len(truth[video]):
      continue
    begins, ends = truth[video].T
    both = np.maximum(np.minimum(end, ends) - np.maximum(start, begins), 0)
    iou = both / np.maximum((end - start) + (ends - begins) - both, 1e-12)
    iou = np.where(free[video], iou, -1)
    best = int(iou.argmax())
    if iou[best] >= tiou:
      free[video][best], hits[i] = False, True
  return hits


def _area(hits: np.ndarray, total: int) -> float:
  """Area below precision over recall, precision made to fall: for each hit the best precision from there on."""
  precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
  best = np.maximum.accumulate(precision[::-1])[::-1]
  return float(best[hits].sum() / total) if total else float('nan')
