"""COCO's average precision against a slow restatement of its definition; tests/parity compares with pycocotools."""

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import boxes
from jaxmed.evaluate.boxes import Found, Truth


def scene(rng, images=6, classes=3):
  """Boxes of several sizes with crowds, areas, near and far detections and equal scores."""
  truth, found = [], []
  for _ in range(images):
    n = int(rng.integers(0, 6))
    start, size = rng.uniform(0, 200, (n, 2)), rng.choice([8.0, 40.0, 120.0], (n, 2))
    own = np.concatenate([start, start + size], axis=1)
    labels = rng.integers(0, classes, n)
    truth.append(Truth(own, labels, rng.random(n) < 0.2, size.prod(axis=1) * rng.uniform(0.5, 1, n)))
    near = own + rng.normal(0, 2, own.shape)
    again = own[: n // 2] + rng.normal(0, 4, own[: n // 2].shape)
    far = np.sort(rng.uniform(0, 200, (2, 2, 2)), axis=1).reshape(2, 4)
    every = np.concatenate([near, again, far])
    every = np.concatenate([np.minimum(every[:, :2], every[:, 2:]), np.maximum(every[:, :2], every[:, 2:])], axis=1)
    guess = np.concatenate([labels, labels[: n // 2], rng.integers(0, classes, 2)])
    found.append(Found(every, guess, np.round(rng.random(len(every)), 1)))
  return truth, found


def overlap(d, g, crowd):
  both = np.prod([max(0, min(d[i + 2], g[i + 2]) - max(d[i], g[i])) for i in (0, 1)])
  size = lambda b: (b[2] - b[0]) * (b[3] - b[1])
  return both / (size(d) if crowd else size(d) + size(g) - both)


def slow(truth, found, c, threshold, borders, most):
  """(101 precisions, largest recall) of a class by lists, or None."""
  rows, total = [], 0
  for t, f in zip(truth, found, strict=True):
    own = [(b, crowd, crowd or not borders[0] <= area <= borders[1])
           for b, label, crowd, area in zip(t.boxes, t.labels, t.crowd, t.area, strict=True) if label == c]
    total += sum(not away for _, _, away in own)
    ranked = sorted(((b, s) for b, label, s in zip(f.boxes, f.labels, f.scores, strict=True) if label == c),
                    key=lambda x: -x[1])[:most]
    taken = set()
    for b, s in ranked:
      choices = [(away, -overlap(b, g, crowd), i) for i, (g, crowd, away) in enumerate(own)
                 if (i not in taken or crowd) and overlap(b, g, crowd) >= threshold]
      if choices:
        away, _, i = min(choices)
        taken.add(i)
        rows.append((s, True, away))
      else:
        size = (b[2] - b[0]) * (b[3] - b[1])
        rows.append((s, False, not borders[0] <= size <= borders[1]))
  if not total:
    return None
  rows.sort(key=lambda r: -r[0])
  curve, right, wrong = [], 0, 0
  for _, hit, away in rows:
    right, wrong = right + (hit and not away), wrong + (not hit and not away)
    curve.append((right / total, right / max(right + wrong, 1e-12)))
  at = [max((p for r, p in curve if r >= level), default=0) for level in boxes.RECALLS]
  return at, curve[-1][0] if curve else 0


def test_slow_restatement():
  rng = np.random.default_rng(0)
  truth, found = scene(rng)
  got = boxes.score(truth, found, range(3))
  for k in range(3):
    for t in (0, 5, 9):
      for a, borders in enumerate(boxes.AREAS.values()):
        for m, most in enumerate(boxes.DETECTIONS):
          want = slow(truth, found, k, boxes.THRESHOLDS[t], borders, most)
          precision, recall = got.precision[t, :, k, a, m], got.recall[t, k, a, m]
          if want is None:
            assert np.isnan(precision).all() and np.isnan(recall)
          else:
            np.testing.assert_allclose(precision, want[0], atol=1e-12)
            assert recall == pytest.approx(want[1])


def test_by_hand():
  """One of two boxes found, below a false detection: precision 1/2 up to recall 1/2."""
  truth = [Truth(np.array([[0, 0, 10, 10], [20, 20, 30, 30]]), np.array([1, 1]))]
  found = [Found(np.array([[50, 50, 60, 60], [0, 0, 10, 10]]), np.array([1, 1]), np.array([0.9, 0.8]))]
  got = boxes.score(truth, found, (1, 4))
  assert got.summary()['map'] == pytest.approx(0.5 * 51 / 101) and got.summary()['mar100'] == 0.5
  assert got.summary()['mar1'] == 0 and np.isnan(got.summary()['map_large'])
  assert got.without == (4,) and np.isnan(got.of_class(4)) and got.of_class(1) == got.summary()['map50']


def test_a_crowd_is_taken_often():
  """Two detections in a crowd, whose overlap is their share in it, count as little as the crowd itself."""
  truth = [Truth(np.array([[0, 0, 40, 40], [60, 60, 70, 70]]), np.array([1, 1]), np.array([True, False]))]
  found = [Found(np.array([[0, 0, 10, 10], [20, 20, 30, 30], [60, 60, 70, 70], [80, 80, 90, 90]]), np.ones(4),
                 np.array([0.9, 0.8, 0.7, 0.6]))]
  assert boxes.score(truth, found, (1,)).summary()['map'] == 1


def test_errors():
  with pytest.raises(UserError, match='the same number'):
    boxes.score([], [Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0))], (1,))
  with pytest.raises(UserError, match='image 0'):
    boxes.score([Truth(np.zeros((1, 4)), np.zeros(2))], [Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0))], (1,))
