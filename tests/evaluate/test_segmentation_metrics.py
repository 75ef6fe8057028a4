"""Metrics of a case and their means: conventions for classes that one map lacks, spacing, lesions, subjects."""

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import overlap, segmentation
from jaxmed.evaluate.segmentation import Ask


def block(at, size=12, side=5, value=1):
  out = np.zeros((size,) * 3, np.int32)
  out[tuple(slice(a, a + side) for a in at)] = value
  return out


NOTHING, CUBE, MOVED = np.zeros((12, 12, 12), np.int32), block((3, 3, 3)), block((3, 3, 4))
DIAGONAL = np.sqrt(12**2 + 12**2 + 24**2)


@pytest.mark.parametrize(('truth', 'predicted', 'outcome', 'dice', 'distance', 'nsd'), [
  (CUBE, NOTHING, 'missed', 0, DIAGONAL, 0),
  (NOTHING, CUBE, 'hallucinated', 0, DIAGONAL, 0),
  (NOTHING, NOTHING, 'absent', None, None, None),
  (CUBE, CUBE, 'both', 1, 0, 1),
])
def test_conventions(truth, predicted, outcome, dice, distance, nsd):
  got = segmentation.case(truth, predicted, [1], (1, 1, 2), Ask(lesions='touch'))
  assert overlap.OUTCOMES[int(got['outcome'][0])] == outcome
  for name, wanted in {'dice': dice, 'iou': dice, 'nsd': nsd, 'hd95': distance, 'assd': distance, 'masd': distance}.items():
    assert np.isnan(got[name][0]) if wanted is None else got[name][0] == pytest.approx(wanted), name
  counts = segmentation.outcomes([got])
  assert {name: int(n[0]) for name, n in counts.items()} == dict.fromkeys(overlap.OUTCOMES, 0) | {outcome: 1}
  assert got['false_positives'][0] == (outcome == 'hallucinated') and got['lesions'][0] == truth.any()


def test_a_cube_that_moves_by_a_voxel():
  """By hand: 100 of 125 voxels in both; 2 mm of spacing along the last axis."""
  got = segmentation.case(CUBE, MOVED, [1], (1, 1, 2))
  assert got['dice'][0] == pytest.approx(0.8) and got['iou'][0] == pytest.approx(100 / 150)
  assert got['volume'][0] == got['volume_predicted'][0] == 250 and got['volume_difference'][0] == 0
  assert got['hd95'][0] == pytest.approx(2) and got['nsd'][0] < 1
  assert segmentation.case(CUBE, MOVED, [1], (1, 1, 2), Ask(tolerance=2.0))['nsd'][0] == 1
  wider = segmentation.case(CUBE, block((2, 3, 3), side=6), [1], (1, 1, 2))
  assert wider['volume_difference'][0] == (216 - 125) * 2 and wider['volume_error'][0] == pytest.approx(91 / 125)


def test_2d_and_classes_and_what_is_not_annotated():
  truth, predicted = np.zeros((2, 8, 9), np.int32)
  truth[1:4, 1:4], truth[5:7, 5:8], truth[:, 8] = 1, 4, -1
  predicted[1:4, 1:5], predicted[:, 8] = 1, 4
  got = segmentation.case(truth, predicted, [0, 1, 4, 7], (0.5, 0.25))
  assert [overlap.OUTCOMES[int(o)] for o in got['outcome']] == ['both', 'both', 'missed', 'absent']
  assert got['dice'][1] == pytest.approx(2 * 9 / (9 + 12)) and got['volume'][1] == pytest.approx(9 / 8)
  assert got['hd95'][2] == pytest.approx(np.hypot(4, 2.25)) and got['volume_predicted'][2] == 0


def test_dice_is_that_of_tables_of_confusion():
  rng = np.random.default_rng(0)
  truth, predicted = rng.integers(-1, 4, (2, 5, 6, 7))
  predicted = np.maximum(predicted, 0)
  table = overlap.confusion(truth[None], predicted[None], 4)
  got = segmentation.case(truth, predicted, range(4), (1, 1, 1), Ask(surface=''))
  assert 'hd95' not in got
  np.testing.assert_allclose(got['dice'], overlap.dice(table)[0])
  np.testing.assert_allclose(got['iou'], overlap.iou(table)[0])


def test_means_over_cases_then_classes_and_subjects():
  """Case 1 says nothing of class 1; sensitivity is of all lesions together; resamples of one mean are around it."""
  nan = np.nan
  cases = [{'dice': np.array([1.0, 0.5]), 'sensitivity': np.array([1.0, 0.5]), 'lesions': np.array([3.0, 2.0])},
           {'dice': np.array([0.0, nan]), 'sensitivity': np.array([0.0, nan]), 'lesions': np.array([1.0, 0.0])},
           {'dice': np.array([0.5, 1.0]), 'sensitivity': np.array([nan, 1.0]), 'lesions': np.array([0.0, 6.0])}]
  assert segmentation.by_class(cases, 'dice') == pytest.approx([0.5, 0.75])
  assert segmentation.score(cases, 'dice') == pytest.approx(0.625)
  assert segmentation.by_class(cases, 'sensitivity') == pytest.approx([3 / 4, 7 / 8])
  drawn = segmentation.resampled(cases, 'dice', ['a', 'b', 'b'], draws=400, seed=0)
  weights = np.random.default_rng(0).multinomial(2, [0.5, 0.5], size=400)  # of subjects a and b
  total = np.array([[1.0, 0.5], [0.5, 1.0]])
  count = np.array([[1.0, 1.0], [2.0, 1.0]])
  assert drawn == pytest.approx(((weights @ total) / (weights @ count)).mean(axis=1))
  assert np.isnan(segmentation.resampled(cases, 'dice', ['a'] * 3)).all()
  absent = [{'dice': np.array([nan])}]
  assert np.isnan(segmentation.score(absent, 'dice'))


@pytest.mark.parametrize(('options', 'words'), [
  ({'surface': 'surfels'}, 'surfel'), ({'lesions': 'touches'}, 'touch'), ({'tolerance': -1.0}, '0 or more')])
def test_bad_options(options, words):
  with pytest.raises(UserError, match=words):
    Ask(**options)
