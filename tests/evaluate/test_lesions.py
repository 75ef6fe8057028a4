"""Which lesions a prediction finds, by both rules, against hand-made cases and a slow loop over sets of pixels."""

import itertools

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import lesions


def line(text):
  """A mask [1, n] of a text such as '..##.#'."""
  return np.array([[c == '#' for c in text]])


@pytest.mark.parametrize(('truth', 'predicted', 'rule', 'found', 'false'), [
  ('##..##...', '#....#..#', 'touch', [True, True], 1),
  ('##..##...', '#########', 'touch', [True, True], 0),  # one component finds both
  ('######...', '#.#.#...#', 'touch', [True], 1),  # several find one
  ('##..##...', '.........', 'touch', [False, False], 0),
  ('.........', '##..#....', 'touch', [], 2),
  ('.........', '.........', 'touch', [], 0),
  ('##..##...', '######...', 'iou', [True, False], 0),  # one partner each: IoU 1/3 with both
  ('####.....', '##.#.....', 'iou', [True], 1),
  ('########.', '.......##', 'iou', [False], 1),  # IoU 1/9
  ('.........', '##..#....', 'iou', [], 2),
  ('##..##...', '.........', 'iou', [False, False], 0),
])
def test_lines(truth, predicted, rule, found, false):
  got = lesions.detect(line(truth), line(predicted), rule, least=0.2)
  assert got.found.tolist() == found and got.false_positives == false
  assert got.sensitivity == pytest.approx(np.mean(found)) if found else np.isnan(got.sensitivity)


def test_partners_are_the_most_and_of_those_the_best():
  """By all permutations: as many pairs as can be, then the largest sum of IoU."""
  rng = np.random.default_rng(0)
  for _ in range(30):
    iou = np.where(rng.random((4, 3)) < 0.6, rng.random((4, 3)), 0)
    rows, columns = lesions._partners(iou, 0.3)
    pairs = [[(r, c) for r, c in zip(p, range(3)) if iou[r, c] >= 0.3] for p in itertools.permutations(range(4), 3)]
    worth = lambda some, iou=iou: (len(some), sum(iou[r, c] for r, c in some))
    assert worth(list(zip(rows, columns))) == pytest.approx(max(map(worth, pairs)))


def flood(mask):
  """Components as sets of places, by flooding from each voxel."""
  left, out = {tuple(p) for p in np.argwhere(mask)}, []
  while left:
    part, edge = set(), {left.pop()}
    while edge:
      part |= edge
      near = {tuple(np.add(p, s)) for p in edge for s in itertools.product((-1, 0, 1), repeat=mask.ndim)}
      edge = near & left
      left -= edge
    out.append(part)
  return out


@pytest.mark.parametrize('shape', [(12, 13), (6, 7, 8)])
def test_touch_by_flooding(shape):
  rng = np.random.default_rng(1)
  truth, predicted = rng.random((2, *shape)) < (0.2 if len(shape) == 2 else 0.06)
  a, b = flood(truth), flood(predicted)
  got = lesions.detect(truth, predicted)
  assert len(a) == len(got.found) > 3 and sorted(got.voxels) == sorted(map(len, a))
  assert got.found.sum() == sum(any(x & y for y in b) for x in a)
  assert got.false_positives == sum(not any(x & y for x in a) for y in b) and got.components == len(b)


def test_faces_and_corners_and_the_largest():
  mask = np.eye(3, dtype=bool)
  assert lesions.components(mask)[1] == 1 and lesions.components(mask, 1)[1] == 3
  several = line('##.###.#')
  assert lesions.largest(several).tolist() == line('...###..').tolist()
  assert lesions.largest(mask) is mask


def test_bad_input():
  with pytest.raises(UserError, match='touch'):
    lesions.detect(line('#'), line('#'), 'touches')
  with pytest.raises(UserError, match='above 0, 1 at most'):
    lesions.detect(line('#'), line('#'), 'iou', 0)
  with pytest.raises(UserError, match='expected the same grid'):
    lesions.detect(line('#'), line('##'))
