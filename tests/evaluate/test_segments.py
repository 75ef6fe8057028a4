"""Segments: published cases in both forms, a slow loop over sets of frames, ActivityNet's average precision by hand."""

import functools
import itertools

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import segments
from jaxmed.evaluate.segments import Spans


def test_golden():
  truth = np.repeat([0, 1, 2], 10)
  predicted = np.array([0] * 10 + [1] * 4 + [2] + [1] * 5 + [2] * 10)
  got = segments.score([truth], [predicted])
  assert got['edit'] == pytest.approx(0.6)
  for overlap in segments.OVERLAPS:
    assert segments.matches(truth, predicted, overlap).tolist() == [3, 2, 0]
    assert got[f'f1@{round(100 * overlap)}'] == pytest.approx(0.75)


def test_golden_last_segment():
  labels = np.array([0, 0, 0, 0, 0, 1])
  assert segments.matches(labels, labels, 0.5).tolist() == [2, 0, 0]
  assert segments.matches(labels, labels, 0.5, compat='swag').tolist() == [1, 1, 1]
  assert segments.edit(labels, labels) == 1


def slow_runs(labels):
  at, out = 0, []
  for value, run in itertools.groupby(labels):
    n = len(list(run))
    out.append((value, set(range(at, at + n))))
    at += n
  return out


def slow_matches(truth, predicted, overlap):
  taken, hits = set(), 0
  true, found = slow_runs(truth), slow_runs(predicted)
  for value, frames in found:
    iou = [len(frames & f) / len(frames | f) if v == value else 0 for v, f in true]
    best = int(np.argmax(iou))
    if iou[best] >= overlap and best not in taken:
      taken.add(best)
      hits += 1
  return [hits, len(found) - hits, len(true) - hits]


@functools.cache
def distance(a, b):
  if not a or not b:
    return len(a) + len(b)
  return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_slow_loop():
  rng = np.random.default_rng(0)
  videos = [np.repeat(rng.integers(0, 3, (2, 6)), 3, axis=1) for _ in range(20)]
  videos = [(np.roll(a, 1), b) for a, b in videos]
  total = np.zeros(3)
  for y, p in videos:
    total += slow_matches(y.tolist(), p.tolist(), 0.25)
    assert segments.matches(y, p, 0.25).tolist() == slow_matches(y.tolist(), p.tolist(), 0.25)
  got = segments.score(*zip(*videos))
  assert got['f1@25'] == pytest.approx(2 * total[0] / (2 * total[0] + total[1] + total[2]))
  a, b = (tuple(v for v, _ in slow_runs(x.tolist())) for x in videos[0])
  assert segments.edit(*videos[0]) == pytest.approx(1 - distance(a, b) / max(len(a), len(b)))


def test_pooled_is_not_the_mean_over_videos():
  perfect, wrong = np.array([0, 1, 2, 3]), np.array([0, 0, 0, 0])
  pooled = segments.score([perfect, wrong], [perfect, wrong + 1])
  each = segments.score([perfect, wrong], [perfect, wrong + 1], by='video')
  assert pooled['f1@50'] == pytest.approx(8 / 10) and each['f1@50'] == pytest.approx(0.5)
  assert np.isnan(segments.edit(np.array([9, 9]), np.array([9]), background=[9]))
  assert segments.edit(np.array([9, 1, 9]), np.array([1, 9, 9]), background=[9]) == 1


TRUE = {'a': Spans(np.array([[0, 10], [20, 30]]), np.array([5, 5]))}
FOUND = {'a': Spans(np.array([[0, 10], [0, 9], [21, 31]]), np.array([5, 5, 5]), np.array([0.9, 0.8, 0.7]))}


def test_golden_average_precision():
  table, classes = segments.average_precision(TRUE, FOUND, (0.5, 0.9))
  assert classes.tolist() == [5]
  np.testing.assert_allclose(table[:, 0], [(1 + 2 / 3) / 2, 0.5])


def test_average_precision_of_truth_duplicates_and_low_scores():
  spans = np.array([[0, 10], [20, 30], [0, 10.0005], [4, 4]])
  truth = {'a': Spans(spans, np.array([1, 2, 1, 1])), 'b': Spans(spans[:1], np.array([1]))}
  perfect = {v: Spans(s.spans[:2], s.labels[:2], np.linspace(1, 0.9, len(s.labels[:2]))) for v, s in truth.items()}
  assert segments.mean_average_precision(truth, perfect)['map'] == 1
  low = {**perfect, 'b': Spans(np.array([[0, 10], [2, 9]]), np.array([1, 1]), np.array([0.95, 0.1]))}
  assert segments.mean_average_precision(truth, low)['map'] == 1
  between = {**perfect, 'b': Spans(np.array([[0, 10], [50, 60]]), np.array([1, 1]), np.array([0.5, 0.7]))}
  assert segments.mean_average_precision(truth, between)['map@0.5'] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
  second = {'a': Spans(np.array([[0, 10], [0, 10]]), np.array([1, 1]), np.array([0.9, 0.8]))}
  two = {'a': Spans(np.array([[0, 10], [1, 10]]), np.array([1, 1]))}
  assert segments.mean_average_precision(two, second, (0.5,))['map'] == 1  # the second takes the one that is free


def test_actionformer_lets_foreign_labels_fall_on_a_class():
  truth = {'a': Spans(np.array([[0, 10]]), np.array([7]))}
  found = {'a': Spans(np.array([[50, 60], [0, 10]]), np.array([0, 7]), np.array([0.9, 0.8]))}
  assert segments.mean_average_precision(truth, found)['map'] == 1
  assert segments.mean_average_precision(truth, found, compat='actionformer')['map'] == 0.5


def slow_area(hits, total):
  """VOC 2010's area by the envelope of (recall, precision)."""
  r = [0, *np.cumsum(hits) / total, 1]
  p = [0, *np.cumsum(hits) / np.arange(1, len(hits) + 1), 0]
  return sum((r[i] - r[i - 1]) * max(p[i:]) for i in range(1, len(r)))


def test_area():
  rng = np.random.default_rng(0)
  for _ in range(20):
    hits = rng.random(9) < 0.5
    assert segments._area(hits, 10) == pytest.approx(slow_area(hits, 10))


def test_errors():
  with pytest.raises(UserError, match='one label a frame'):
    segments.matches(np.zeros(3), np.zeros(2), 0.5)
  with pytest.raises(UserError, match='an overlap of 0'):
    segments.matches(np.zeros(3), np.zeros(3), 0)
  with pytest.raises(UserError, match='tIoU of 2'):
    segments.average_precision(TRUE, FOUND, (2,))
