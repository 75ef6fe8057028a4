"""Mean average precision of boxes as COCO has it, with its sizes and numbers of detections (pycocotools, cocoeval.py).

Of an image and class, detections go from the highest score on; each takes the free true box with the largest
intersection over union where that is at least the threshold, before any box that is ignored. Boxes of crowds, which
may be taken often and whose overlap is the share of the detection that lies in them, and boxes outside of a range of
areas are ignored: neither they nor the detections that take them count, nor free detections outside of the range.
Precision is made to fall with recall and read at 101 recalls. A class without a true box in a range has no value there,
and means are over the other classes; `Result.without` names those that have no true box at all.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate.overlap import mean

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {'all': (0.0, 1e10), 'small': (0.0, 32.0**2), 'medium': (32.0**2, 96.0**2), 'large': (96.0**2, 1e10)}
DETECTIONS = (1, 10, 100)


class Truth(NamedTuple):
  """True boxes of an image: boxes [n, 4] start and end in pixels, along both axes in either order; labels [n].

  crowd [n] bool: empty for none. area [n]: of the objects, pixels, by which they are small or large (COCO has those of
  their masks); empty for the areas of the boxes.
  """

  boxes: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray = np.zeros(0, bool)
  area: np.ndarray = np.zeros(0)


class Found(NamedTuple):
  """Detections of an image: boxes [m, 4] as of `Truth`, labels [m], scores [m]."""

  boxes: np.ndarray
  labels: np.ndarray
  scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
  """precision [T, R, K, A, M] and recall [T, K, A, M] by threshold, recall, class, area and number of detections.

  NaN where a class has no true box of that size. classes [K] are the values of the classes, `without` those of them
  that no true box (crowds apart) has.
  """

  precision: np.ndarray
  recall: np.ndarray
  classes: tuple[int, ...]
  without: tuple[int, ...]

  def summary(self) -> dict[str, float]:
    """COCO's twelve numbers: 'map', 'map50', 'map75', 'map_small', ..., 'mar1', 'mar10', 'mar100', 'mar_small', ..."""
    every = lambda x: float(mean(x.reshape(-1), 0))
    near = lambda t: self.precision[np.isclose(THRESHOLDS, t)][..., 0, -1]
    out = {'map': every(self.precision[..., 0, -1]), 'map50': every(near(0.5)), 'map75': every(near(0.75))}
    out |= {f'map_{a}': every(self.precision[..., i, -1]) for i, a in enumerate(AREAS) if i}
    out |= {f'mar{n}': every(self.recall[..., 0, i]) for i, n in enumerate(DETECTIONS)}
    return out | {f'mar_{a}': every(self.recall[..., i, -1]) for i, a in enumerate(AREAS) if i}

  def of_class(self, value: int) -> float:
    """Average precision over all thresholds of one class, all areas, most detections; NaN without a true box."""
    return float(mean(self.precision[:, :, self.classes.index(value), 0, -1].reshape(-1), 0))


def score(truth: Sequence[Truth], found: Sequence[Found], classes: Sequence[int]) -> Result:
  """Precision and recall of detections in images.

  Args:
    truth, found: one of each an image. classes: the values of the K classes; other labels do not count.
  Raises:
    UserError: numbers of images that differ, or arrays of an image that do.
  """
  if len(truth) != len(found):
    raise UserError(f'boxes: {len(truth)} images with truth and {len(found)} with detections; expected the same number')
  for i, (t, f) in enumerate(zip(truth, found, strict=True)):
    _check(i, t, f)
  shape = len(THRESHOLDS), len(classes), len(AREAS), len(DETECTIONS)
  precision = np.full((shape[0], len(RECALLS), *shape[1:]), np.nan)
  recall, without = np.full(shape, np.nan), []
  for k, c in enumerate(classes):
    pairs = [_of_class(t, f, c) for t, f in zip(truth, found, strict=True)]
    if not sum((~t.crowd).sum() for t, _ in pairs):
      without.append(int(c))
    overlaps = [iou(f.boxes, t.boxes, t.crowd) for t, f in pairs]
    for a, borders in enumerate(AREAS.values()):
      matched = [_match(t, f, table, borders) for (t, f), table in zip(pairs, overlaps, strict=True)]
      for m, most in enumerate(DETECTIONS):
        curves = _curves(matched, most)
        if curves is not None:
          precision[:, :, k, a, m], recall[:, k, a, m] = curves
  return Result(precision, recall, tuple(int(c) for c in classes), tuple(without))


def iou(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
  """Overlaps [m, n] of boxes [m, 4] and [n, 4]: of a crowd [n] bool, the share of the detection that lies in it."""
  low, high = np.maximum(found[:, None, :2], truth[:, :2]), np.minimum(found[:, None, 2:], truth[:, 2:])
  both = np.maximum(high - low, 0).prod(axis=-1)
  below = np.where(crowd, _sizes(found)[:, None], _sizes(found)[:, None] + _sizes(truth) - both)
  return np.divide(both, below, out=np.zeros(both.shape), where=below > 0)


def _sizes(boxes: np.ndarray) -> np.ndarray:
  return (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1)


def _check(i: int, truth: Truth, found: Found) -> None:
  n, m = len(truth.labels), len(found.labels)
  if np.size(truth.boxes) != 4 * n or np.size(found.boxes) != 4 * m or len(found.scores) != m:
    raise UserError(f'boxes: image {i} has arrays that do not match; expected boxes [n, 4], labels [n] and, of '
                    'detections, scores [n]')
  for name in ('crowd', 'area'):
    if len(getattr(truth, name)) not in (0, n):
      raise UserError(f'boxes: image {i} has {len(getattr(truth, name))} values of {name} for {n} true boxes')


def _of_class(truth: Truth, found: Found, c: int) -> tuple[Truth, Found]:
  """The boxes of one class, detections from the highest score on and no more than may count."""
  boxes = np.asarray(truth.boxes, np.float64).reshape(-1, 4)
  area = np.asarray(truth.area, np.float64) if len(truth.area) else _sizes(boxes)
  crowd = np.asarray(truth.crowd, bool) if len(truth.crowd) else np.zeros(len(boxes), bool)
  kept = np.asarray(truth.labels) == c
  own = np.flatnonzero(np.asarray(found.labels) == c)
  scores = np.asarray(found.scores, np.float64)[own]
  best = own[np.argsort(-scores, kind='stable')[: DETECTIONS[-1]]]
  return (Truth(boxes[kept], np.asarray(truth.labels)[kept], crowd[kept], area[kept]),
          Found(np.asarray(found.boxes, np.float64).reshape(-1, 4)[best], np.asarray(found.labels)[best],
                np.asarray(found.scores, np.float64)[best]))


class _Matched(NamedTuple):
  """Of an image and class: scores [m], hits and ignored [T, m] of detections, and how many true boxes count."""

  scores: np.ndarray
  hits: np.ndarray
  ignored: np.ndarray
  total: int


def _match(truth: Truth, found: Found, overlaps: np.ndarray, borders: tuple[float, float]) -> _Matched:
  """Which true box each detection takes at each threshold."""
  low, high = borders
  away = truth.crowd | (truth.area < low) | (truth.area > high)
  order = np.argsort(away, kind='stable')  # those that count come first
  away, crowd, overlaps = away[order], truth.crowd[order], overlaps[:, order]
  size = _sizes(found.boxes)
  hits = np.zeros((len(THRESHOLDS), len(size)), bool)
  ignored = np.broadcast_to((size < low) | (size > high), hits.shape).copy()
  for i, threshold in enumerate(THRESHOLDS):
    free = np.ones(len(away), bool)
    for j, row in enumerate(overlaps):
      best = _best(np.where((free | crowd) & (row >= min(threshold, 1 - 1e-10)), row, -1.0), away)
      if best >= 0:
        free[best] = False
        hits[i, j], ignored[i, j] = True, away[best]
  return _Matched(found.scores, hits, ignored, int((~away).sum()))


def _best(row: np.ndarray, away: np.ndarray) -> int:
  """The last of the largest overlaps [n] among boxes that count, else among the ignored; -1 without one."""
  for part in (~away, away):
    value = np.where(part, row, -1.0)
    if len(value) and value.max() >= 0:
      return len(value) - 1 - int(value[::-1].argmax())
  return -1


def _curves(matched: Sequence[_Matched], most: int) -> tuple[np.ndarray, np.ndarray] | None:
  """Precision [T, R] and the largest recall [T] of all images; None where no true box counts."""
  total = sum(m.total for m in matched)
  if not total:
    return None
  order = np.argsort(-np.concatenate([m.scores[:most] for m in matched]), kind='stable')
  hits, ignored = (np.concatenate([getattr(m, name)[:, :most] for m in matched], axis=1)[:, order]
                   for name in ('hits', 'ignored'))
  right, wrong = (np.cumsum(x & ~ignored, axis=1).astype(np.float64) for x in (hits, ~hits))
  precision, recall = np.zeros((len(hits), len(RECALLS))), np.zeros(len(hits))
  for t in range(len(hits)):
    if not len(order):
      continue
    reached = right[t] / total
    value = right[t] / np.maximum(right[t] + wrong[t], np.finfo(np.float64).eps)
    value = np.maximum.accumulate(value[::-1])[::-1]
    place = np.searchsorted(reached, RECALLS, side='left')
    precision[t] = np.append(value, 0.0)[place]
    recall[t] = reached[-1]
  return precision, recall
