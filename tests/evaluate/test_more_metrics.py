"""Macro F1, kappa, calibration, labels, numbers and operating points against scikit-learn and slow loops."""

import numpy as np
import pytest
from sklearn import metrics as sk

from jaxmed.errors import UserError
from jaxmed.evaluate import calibration, confusion, metrics, multilabel, operating, regression, roc


def data(seed=0, rows=80, num_classes=4, subjects=12, ties=False):
  rng = np.random.default_rng(seed)
  y = rng.integers(0, num_classes, rows)
  scores = rng.random((rows, num_classes)) + 0.6 * np.eye(num_classes)[y]
  scores = np.round(scores, 1) if ties else scores
  return y, scores / scores.sum(axis=1, keepdims=True), np.array([f's{i}' for i in rng.integers(0, subjects, rows)])


def drawn_rows(names, draws, seed):
  """The rows of each resample, by a loop over its subjects."""
  known = sorted(set(names))
  for counts in next(metrics.resamples(len(known), draws, seed)):
    yield np.concatenate([np.flatnonzero(names == s) for s, c in zip(known, counts, strict=True)
                          for _ in range(int(c))])


@pytest.mark.parametrize('seed', range(4))
def test_kappa_and_f1_equal_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  y, predicted = rng.integers(0, 5 - seed % 2, 60), rng.integers(seed % 3, 5, 60)  # classes absent here or there
  table = confusion.confusion(y, predicted, 5)
  np.testing.assert_array_equal(table, sk.confusion_matrix(y, predicted, labels=range(5)))
  assert confusion.quadratic_kappa(table) == pytest.approx(
    sk.cohen_kappa_score(y, predicted, labels=range(5), weights='quadratic'), abs=1e-12)
  f1 = confusion.macro_f1(np.diag(table), table.sum(axis=1), table.sum(axis=0))
  assert f1 == pytest.approx(sk.f1_score(y, predicted, average='macro'), abs=1e-12)


def test_kappa_by_hand_and_where_there_is_none():
  assert confusion.quadratic_kappa(np.diag([3, 4, 5])) == 1
  assert confusion.quadratic_kappa(np.array([[0, 5], [5, 0]])) == pytest.approx(-1)
  assert np.isnan(confusion.quadratic_kappa(np.diag([7, 0, 0])))
  assert np.isnan(confusion.quadratic_kappa(np.zeros((2, 2))))
  many = np.random.default_rng(0).integers(0, 9, (6, 3, 3))
  np.testing.assert_allclose(confusion.quadratic_kappa(many), [confusion.quadratic_kappa(t) for t in many])
  assert np.isnan(confusion.macro_f1(np.zeros(3), np.zeros(3), np.zeros(3)))


def slow_ece(y, scores, bins):
  total = 0.0
  for b in range(bins):
    inside = [i for i, s in enumerate(scores) if b / bins < s.max() <= (b + 1) / bins]
    if inside:
      right = np.mean([scores[i].argmax() == y[i] for i in inside])
      total += len(inside) / len(y) * abs(right - np.mean([scores[i].max() for i in inside]))
  return total


@pytest.mark.parametrize('bins', [15, 4])
def test_calibration_equals_a_slow_loop(bins):
  y, scores, names = data()
  got = calibration.score(y, scores, bins)
  assert got['ece'] == pytest.approx(slow_ece(y, scores, bins), abs=1e-12)
  assert got['brier'] == pytest.approx(np.mean([((s - np.eye(4)[k])**2).sum() for s, k in zip(scores, y, strict=True)]))
  two = np.stack([1 - scores[:, 0], scores[:, 0]], axis=1)
  assert calibration.score((y == 0).astype(int), two)['brier'] == pytest.approx(2 * sk.brier_score_loss(y == 0, scores[:, 0]))
  resampled = calibration.resampled(y, scores, names, draws=9, seed=3, bins=bins)
  want = [calibration.score(y[rows], scores[rows], bins) for rows in drawn_rows(names, 9, 3)]
  for m in ('ece', 'brier'):
    np.testing.assert_allclose(resampled[m], [w[m] for w in want], atol=1e-12)
  table = calibration.reliability(y, scores, bins)
  assert sum(b['rows'] for b in table) == len(y) and all(b['low'] < b['confidence'] <= b['high'] for b in table)
  assert sum(b['rows'] * abs(b['accuracy'] - b['confidence']) for b in table) / len(y) == pytest.approx(got['ece'])


def test_calibration_of_what_is_certain_and_of_what_is_no_probability():
  y = np.array([0, 1, 2, 0])
  assert calibration.score(y, np.eye(3)[y]) == {'ece': 0, 'brier': 0}
  assert calibration.score(y, np.eye(3)[(y + 1) % 3]) == {'ece': 1, 'brier': 2}
  half = np.full((4, 2), 0.5)  # an edge of a bin where the number of bins is even
  assert calibration.score(np.array([0, 1, 0, 1]), half, 2)['ece'] == 0
  assert calibration.reliability(np.array([0, 1, 0, 1]), half, 2)[0]['high'] == 0.5
  found = calibration.score(y, np.random.default_rng(0).normal(size=(4, 3)))
  assert np.isnan(found['ece']) and np.isnan(found['brier'])
  assert np.isnan(calibration.resampled(y, np.eye(3)[y], ['one'] * 4)['ece']).all()


def labels(seed=0, rows=60):
  rng = np.random.default_rng(seed)
  y = rng.integers(-1, 2, (rows, 5))
  y[:, 3] = np.minimum(y[:, 3], 0)  # never yes
  y[:, 4] = -1  # never known
  scores = np.round(rng.random((rows, 5)) + 0.4 * y, 1)  # with ties
  return y, scores, np.array([f's{i}' for i in rng.integers(0, 9, rows)])


def slow_labels(y, scores):
  out = {'auroc': [], 'ap': []}
  for k in range(y.shape[1]):
    known = y[:, k] >= 0
    a, s = y[known, k] == 1, scores[known, k]
    out['auroc'].append(sk.roc_auc_score(a, s) if 0 < a.sum() < len(a) else np.nan)
    out['ap'].append(sk.average_precision_score(a, s) if a.sum() else np.nan)
  return out


@pytest.mark.parametrize('seed', range(3))
def test_labels_equal_scikit_learn(seed):
  y, scores, names = labels(seed)
  got, want = multilabel.score(y, scores), slow_labels(y, scores)
  drawn = multilabel.resampled(y, scores, names, draws=8, seed=1)
  slow = [slow_labels(y[rows], scores[rows]) for rows in drawn_rows(names, 8, 1)]
  for m in multilabel.METRICS:
    np.testing.assert_allclose(got[m], want[m], atol=1e-12)
    np.testing.assert_allclose(drawn[m], [s[m] for s in slow], atol=1e-12)
    assert np.isnan(got[m][3:]).all() and multilabel.macro(got[m]) == pytest.approx(np.nanmean(want[m]))
  assert np.isnan(multilabel.macro(np.full((2, 3), np.nan))).all()
  assert np.isnan(multilabel.resampled(y, scores, ['one'] * len(y))['ap']).all()


def test_average_precision_under_weights_equals_scikit_learn():
  rng = np.random.default_rng(5)
  y, score = rng.random(50) < 0.4, np.round(rng.random(50), 1)
  weights = rng.integers(0, 3, (20, 50)).astype(float)
  weights[0] = ~y  # leaves no positive row
  got = metrics.weighted_average_precision(y, score, weights)
  assert np.isnan(got[0])
  want = [sk.average_precision_score(y, score, sample_weight=w) for w in weights[1:]]
  np.testing.assert_allclose(got[1:], want, atol=1e-12)


def test_numbers_equal_scikit_learn():
  rng = np.random.default_rng(0)
  y = 1e6 + 5 * rng.normal(size=70)
  predicted = y + rng.normal(size=70)
  names = np.array([f's{i}' for i in rng.integers(0, 9, 70)])
  reference = lambda a, b: {'r2': sk.r2_score(a, b), 'mae': sk.mean_absolute_error(a, b)}
  assert regression.score(y, predicted) == pytest.approx(reference(y, predicted), rel=1e-9)
  drawn = regression.resampled(y, predicted, names, draws=9, seed=2)
  for i, rows in enumerate(drawn_rows(names, 9, 2)):
    assert {m: v[i] for m, v in drawn.items()} == pytest.approx(reference(y[rows], predicted[rows]), rel=1e-7)
  one = regression.score(np.full(4, 3.3), np.arange(4.0))
  assert np.isnan(one['r2']) and one['mae'] == pytest.approx(1.8)
  assert regression.score(y, np.full(70, y.mean()))['r2'] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('sensitivity', [0.01, 0.5, 0.8, 0.95, 1.0])
def test_the_threshold_is_the_largest_that_reaches_the_sensitivity(sensitivity):
  rng = np.random.default_rng(0)
  positive, score = rng.random(60) < 0.35, np.round(rng.random(60), 1)
  limit = operating.threshold(positive, score, sensitivity)
  reaches = lambda t: (score[positive] >= t).mean() >= sensitivity - 1e-12
  assert reaches(limit) and limit == max(t for t in score if reaches(t))
  assert operating.threshold(np.ones(20, bool), np.arange(20.0), 0.95) == 1.0  # 19 of 20


def test_rates_at_a_threshold():
  rng = np.random.default_rng(1)
  positive, score = rng.random(60) < 0.35, rng.random(60)
  names = np.array([f's{i}' for i in rng.integers(0, 9, 60)])
  got = operating.at(positive, score, 0.4, names, draws=50, seed=4)
  reference = lambda p, s: [sk.recall_score(p, s >= 0.4), sk.recall_score(~p, s < 0.4), sk.precision_score(p, s >= 0.4)]
  slow = [reference(positive[rows], score[rows]) for rows in drawn_rows(names, 50, 4)]
  low, high = np.percentile(slow, [2.5, 97.5], axis=0)
  for i, m in enumerate(operating.METRICS):
    assert list(got[m].values()) == pytest.approx([reference(positive, score)[i], low[i], high[i]], abs=1e-12)
  assert np.isnan(operating.at(positive, score, 2.0, names, draws=5)['ppv']['value'])  # nothing is called positive
  with pytest.raises(UserError, match='no validation row is positive'):
    operating.threshold(np.zeros(3, bool), np.arange(3), 0.9)


@pytest.mark.parametrize('ties', [False, True])
def test_roc_equals_scikit_learn(ties):
  y, scores, _ = data(6, ties=ties)
  fpr, tpr = roc.roc(y == 1, scores[:, 1])
  want = sk.roc_curve(y == 1, scores[:, 1], drop_intermediate=False)
  np.testing.assert_allclose(fpr, want[0])
  np.testing.assert_allclose(tpr, want[1])
  assert np.trapezoid(tpr, fpr) == pytest.approx(sk.roc_auc_score(y == 1, scores[:, 1]))
  even = roc.tpr_at(y == 1, scores[:, 1], 2001)
  assert np.trapezoid(even, dx=1 / 2000) == pytest.approx(sk.roc_auc_score(y == 1, scores[:, 1]), abs=5e-3)
  assert roc.tpr_at(np.array([True, False]), np.array([0.9, 0.1]), 3) == [1, 1, 1]


def test_sums_and_counts_of_resampled_subjects():
  y, scores, names = data()
  want = [scores[rows].sum(axis=0) for rows in drawn_rows(names, 12, 5)]
  np.testing.assert_allclose(metrics.resampled_sums(scores, names, draws=12, seed=5), want)
  codes = np.where(y == 3, -1, y)
  want = [np.bincount(y[rows], minlength=4)[:3] for rows in drawn_rows(names, 12, 5)]
  np.testing.assert_array_equal(metrics.resampled_counts(codes, 3, names, draws=12, seed=5), want)
  weights = np.concatenate(list(metrics.resampled_weights(names, draws=12, seed=5)))
  np.testing.assert_allclose(weights @ scores, metrics.resampled_sums(scores, names, draws=12, seed=5))
