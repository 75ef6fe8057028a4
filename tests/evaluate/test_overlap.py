"""IoU and Dice of tables of confusion, against scikit-learn and a slow loop over pixels."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics, overlap


def maps(cases=5, classes=4, seed=0, size=(6, 7)):
  """Random label maps with ignored pixels and with classes that some cases lack."""
  rng = np.random.default_rng(seed)
  truth = rng.integers(-1, classes, (cases, *size))
  predicted = np.where(rng.random(truth.shape) < 0.5, np.maximum(truth, 0), rng.integers(0, classes, truth.shape))
  truth[1][truth[1] == 2], predicted[2][predicted[2] == 3] = 0, 1
  truth[3][truth[3] == 1] = predicted[3][predicted[3] == 1] = 0
  return truth, predicted


def slow(truth, predicted, classes):
  """{outcome: [K]}, Dice and IoU [N, K] by sets of pixels."""
  dice, iou = np.full((2, len(truth), classes), np.nan)
  counts = {name: np.zeros(classes, int) for name in overlap.OUTCOMES}
  for n, (t, p) in enumerate(zip(truth, predicted, strict=True)):
    known = [i for i in np.ndindex(t.shape) if t[i] >= 0]
    for c in range(classes):
      a, b = {i for i in known if t[i] == c}, {i for i in known if p[i] == c}
      counts['both' if a and b else 'missed' if a else 'hallucinated' if b else 'absent'][c] += 1
      if a or b:
        dice[n, c], iou[n, c] = 2 * len(a & b) / (len(a) + len(b)), len(a & b) / len(a | b)
  return counts, dice, iou


def test_cases_are_those_of_sets_of_pixels():
  truth, predicted = maps()
  table = overlap.confusion(truth, predicted, 4)
  counts, dice, iou = slow(truth, predicted, 4)
  np.testing.assert_allclose(overlap.dice(table), dice)
  np.testing.assert_allclose(overlap.iou(table), iou)
  assert np.isnan(dice).any()
  for name, n in overlap.outcomes(table).items():
    np.testing.assert_array_equal(n, counts[name])
  got = overlap.score(table, [False, True, True, True])
  assert got['dice'] == pytest.approx(np.nanmean(np.nanmean(dice, axis=0)))
  assert got['dice_foreground'] == pytest.approx(np.nanmean(np.nanmean(dice, axis=0)[1:]))
  assert got['miou_case'] == pytest.approx(np.nanmean(np.nanmean(iou, axis=0)))


@pytest.mark.parametrize('seed', range(5))
def test_pooled_iou_is_that_of_scikit_learn(seed):
  """Macro over the classes that occur in truth or prediction; ignored pixels are out."""
  truth, predicted = maps(seed=seed)
  known = truth >= 0
  got = overlap.score(overlap.confusion(truth, predicted, 9), [True] * 9)['miou']
  assert got == pytest.approx(jaccard_score(truth[known], predicted[known], average='macro'))


def test_conventions_of_empty_cases():
  """A class that is missed or hallucinated scores 0, one that is absent from both says nothing."""
  truth = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
  predicted = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
  table = overlap.confusion(truth, predicted, 2)
  np.testing.assert_array_equal(overlap.dice(table)[:, 1], [0, 0, np.nan])
  assert {k: v.tolist() for k, v in overlap.outcomes(table).items()} == {
      'both': [3, 0], 'missed': [0, 1], 'hallucinated': [0, 1], 'absent': [0, 1]}
  assert overlap.score(table, [False, True])['dice_foreground'] == 0
  nothing = overlap.score(overlap.confusion(-np.ones((2, 4), int), np.zeros((2, 4), int), 2), [False, True])
  assert all(np.isnan(v) for v in nothing.values())


def test_invariances():
  truth, predicted = maps()
  score = lambda t, p: overlap.score(overlap.confusion(t, p, 4), [True] * 4)
  both = score(truth, predicted)
  np.testing.assert_equal(score(truth[:, ::-1, ::-1], predicted[:, ::-1, ::-1]), both)
  np.testing.assert_equal(score(truth.swapaxes(1, 2), predicted.swapaxes(1, 2)), both)
  shuffled = np.array([2, 0, 3, 1, -1])  # the last is what -1 picks
  assert score(shuffled[truth], shuffled[predicted]) == pytest.approx(both)
  whole = np.maximum(truth, 0)
  assert score(whole, predicted) == pytest.approx(score(predicted, whole))
  assert set(score(whole, whole).values()) == {1.0}


def test_intervals_are_of_resampled_subjects():
  """Each resample is the score of the cases of the subjects drawn, repeated."""
  truth, predicted = maps(cases=9, seed=3)
  subjects = np.array(list('abcadbbca'))
  table = overlap.confusion(truth, predicted, 4)
  got = overlap.resampled(table, subjects, [False, True, True, True], draws=7, seed=2)
  for r, counts in enumerate(next(metrics.resamples(4, 7, 2))):
    rows = np.repeat(np.arange(9), counts[np.searchsorted(list('abcd'), subjects)].astype(int))
    want = overlap.score(table[rows], [False, True, True, True])
    assert {m: v[r] for m, v in got.items()} == pytest.approx(want, nan_ok=True)
  assert np.isnan(overlap.resampled(table, ['one'] * 9, [True] * 4)['dice']).all()


def test_a_constant_answer():
  truth, predicted = maps()
  want = overlap.confusion(truth, np.full_like(predicted, 2), 4)
  np.testing.assert_array_equal(overlap.constant(overlap.confusion(truth, predicted, 4), 2), want)


def test_wrong_shapes_and_classes():
  with pytest.raises(UserError, match='expected the same grid'):
    overlap.confusion(np.zeros((1, 4), int), np.zeros((1, 5), int), 2)
  with pytest.raises(UserError, match='beyond 0..1'):
    overlap.confusion(np.zeros((1, 4), int), np.full((1, 4), 2), 2)
