"""Metrics against scikit-learn, the bootstrap against a slow loop over the same drawn subjects."""

import numpy as np
import pytest
from sklearn import metrics as sk

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics


def data(seed=0, rows=90, num_classes=4, subjects=15, ties=False):
  rng = np.random.default_rng(seed)
  y = rng.integers(0, num_classes, rows)
  scores = rng.random((rows, num_classes)) + 0.6 * np.eye(num_classes)[y]
  scores /= scores.sum(axis=1, keepdims=True)
  names = np.array([f's{i}' for i in rng.integers(0, subjects, rows)])
  return y, np.round(scores, 1) if ties else scores, names


def reference(y, scores):
  present = np.unique(y)
  auroc = [sk.roc_auc_score(y == c, scores[:, c]) for c in present if not (y == c).all()]
  predicted = scores.argmax(axis=1)
  recall = sk.recall_score(y, predicted, labels=present, average='macro', zero_division=0)
  return dict(accuracy=sk.accuracy_score(y, predicted), balanced_accuracy=recall, auroc=np.mean(auroc))


@pytest.mark.parametrize('ties', [False, True])
def test_scores_equal_scikit_learn(ties):
  y, scores, _ = data(ties=ties)
  got = metrics.score(y, scores)
  assert got == pytest.approx(reference(y, scores), abs=1e-12)
  if not ties:
    assert got['auroc'] == pytest.approx(sk.roc_auc_score(y, scores, multi_class='ovr'), abs=1e-12)
  assert got['balanced_accuracy'] == pytest.approx(sk.balanced_accuracy_score(y, scores.argmax(axis=1)))


@pytest.mark.parametrize('ties', [False, True])
def test_weighted_auroc_equals_scikit_learn(ties):
  y, scores, _ = data(1, ties=ties)
  weights = np.random.default_rng(2).integers(0, 4, (20, len(y))).astype(float)
  got = metrics.weighted_auroc(y == 1, scores[:, 1], weights)
  want = [sk.roc_auc_score(y == 1, scores[:, 1], sample_weight=w) for w in weights]
  np.testing.assert_allclose(got, want, atol=1e-12)
  assert np.isnan(metrics.weighted_auroc(y == 1, scores[:, 1], (y == 1)[None].astype(float))).all()


@pytest.mark.parametrize('ties', [False, True])
def test_bootstrap_equals_a_slow_loop(ties):
  y, scores, names = data(3, ties=ties)
  other = data(4)[1]
  draws, known = 30, sorted(set(names))
  slow = []
  for counts in next(metrics.resamples(len(known), draws, 7)):
    rows = np.concatenate([np.flatnonzero(names == s) for s, c in zip(known, counts, strict=True)
                           for _ in range(int(c))])
    a, b = reference(y[rows], scores[rows]), reference(y[rows], other[rows])
    slow.append([(a[m], a[m] - b[m]) for m in metrics.METRICS])
  low, high = np.percentile(np.array(slow), [2.5, 97.5], axis=0)  # [metrics, 2]
  got = metrics.intervals(y, scores, names, draws=draws, seed=7)
  paired = metrics.paired_difference(y, scores, other, names, draws=draws, seed=7)
  for i, m in enumerate(metrics.METRICS):
    assert (got[m]['low'], got[m]['high']) == pytest.approx((low[i, 0], high[i, 0]), abs=1e-12)
    assert (paired[m]['low'], paired[m]['high']) == pytest.approx((low[i, 1], high[i, 1]), abs=1e-12)
    assert got[m]['value'] == pytest.approx(reference(y, scores)[m])
    assert paired[m]['value'] == pytest.approx(reference(y, scores)[m] - reference(y, other)[m])


def test_resamples_do_not_depend_on_chunks(monkeypatch):
  whole = next(metrics.resamples(9, 25, 3))
  parts = list(metrics.resamples(9, 25, 3, chunk=4))
  assert [len(p) for p in parts] == [4] * 6 + [1]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert (whole.sum(axis=1) == 9).all()
  y, scores, names = data()
  before = metrics.intervals(y, scores, names, draws=50)
  monkeypatch.setattr(metrics, '_CHUNK', 7 * len(y))
  assert metrics.intervals(y, scores, names, draws=50) == before
  assert metrics.intervals(y, scores, names, draws=50, seed=1) != before


def test_identical_scores_differ_by_exactly_nothing():
  y, scores, names = data()
  for interval in metrics.paired_difference(y, scores, scores.copy(), names, draws=40).values():
    assert interval == dict(value=0.0, low=0.0, high=0.0)


def test_a_class_absent_from_the_rows_is_left_out():
  y, scores, names = data(5)
  kept = y != 2
  got = metrics.score(y[kept], scores[kept])
  want = np.mean([sk.roc_auc_score(y[kept] == c, scores[kept, c]) for c in (0, 1, 3)])
  assert metrics.absent_classes(y[kept], 4) == (2,)
  assert got['auroc'] == pytest.approx(want)
  some = metrics.intervals(y, scores, names, draws=20, auroc_classes=[0, 3])['auroc']['value']
  assert some == pytest.approx(np.mean([sk.roc_auc_score(y == c, scores[:, c]) for c in (0, 3)]))


def test_no_interval_from_one_subject_and_no_auroc_from_one_class():
  y, scores, _ = data()
  got = metrics.intervals(y, scores, ['one'] * len(y), draws=10)
  assert all(np.isnan(i['low']) and np.isnan(i['high']) and not np.isnan(i['value']) for i in got.values())
  got = metrics.intervals(np.zeros(9, int), scores[:9], range(9), draws=10)
  assert np.isnan(got['auroc']['value']) and np.isnan(got['auroc']['low'])
  assert not np.isnan(got['accuracy']['low'])


def test_intervals_cover_the_truth_where_rows_are_clustered():
  """40 subjects of 10 rows; a subject's rows are all right or all wrong, right with 0.7: the truth."""
  rng, cover, rows_cover, trials = np.random.default_rng(0), 0, 0, 100
  names = np.repeat(np.arange(40), 10)
  for trial in range(trials):
    right = np.repeat(rng.random(40) < 0.7, 10)
    y = np.tile([0, 1], 200)
    scores = np.eye(2)[np.where(right, y, 1 - y)]
    got = metrics.intervals(y, scores, names, draws=150, seed=trial)['accuracy']
    cover += got['low'] <= 0.7 <= got['high']
    got = metrics.intervals(y, scores, np.arange(400), draws=150, seed=trial)['accuracy']
    rows_cover += got['low'] <= 0.7 <= got['high']
  assert 0.87 <= cover / trials <= 0.99
  assert rows_cover / trials < 0.7  # taking rows for independent would claim far too much


@pytest.mark.parametrize(
  ('y', 'scores', 'words'),
  [
    ([0, 1], np.ones((3, 2)), 'expected'),
    ([0, 2], np.ones((2, 2)), 'expected 0..1'),
    ([], np.ones((0, 2)), 'M > 0'),
    ([0, 1], np.array([[0.1, np.nan], [1, 0]]), 'NaN'),
  ],
)
def test_bad_arrays_are_refused(y, scores, words):
  with pytest.raises(UserError, match=words):
    metrics.intervals(y, scores, ['a'] * len(y))


def test_bad_subjects_are_refused():
  y, scores, _ = data()
  with pytest.raises(UserError, match='one a row'):
    metrics.intervals(y, scores, ['a', 'b'])
  with pytest.raises(UserError, match='draws=0'):
    metrics.intervals(y, scores, np.arange(len(y)), draws=0)


def test_differences_over_runs_equal_a_slow_loop():
  """Runs and subjects are drawn independently, the same subjects for all."""
  y, _, names = data(5)
  pairs = [tuple(data(seed)[1] + 0.4 * np.eye(4)[y] for seed in (10 + i, 20 + i)) for i in range(3)]
  pairs[0][0][:] += 0.5 * np.eye(4)[y]
  got = metrics.difference_over_runs(y, pairs, names, draws=60, seed=7)
  unique = np.unique(names)
  subjects = next(metrics.resamples(len(unique), 60, 7)).astype(int)
  runs = next(metrics.resamples(3, 60, 8)).astype(int)
  drawn = []
  for of_subjects, of_runs in zip(subjects, runs, strict=True):
    rows = np.concatenate([np.flatnonzero(names == s) for s, n in zip(unique, of_subjects, strict=True) for _ in range(n)])
    chosen = [pairs[i] for i, n in enumerate(of_runs) for _ in range(n)]
    drawn.append([[reference(y[rows], s[rows])[m] for m in metrics.METRICS] for pair in chosen for s in pair])
  drawn = np.asarray(drawn)
  each = (drawn[:, ::2] - drawn[:, 1::2]).mean(axis=1)
  low, high = np.percentile(each, [2.5, 97.5], axis=0)
  for i, m in enumerate(metrics.METRICS):
    assert (got[m]['low'], got[m]['high']) == pytest.approx((low[i], high[i]), abs=1e-12)
    want = np.mean([reference(y, a)[m] - reference(y, b)[m] for a, b in pairs])
    assert got[m]['value'] == pytest.approx(want)
  one = metrics.difference_over_runs(y, pairs[:1], names, draws=60, seed=7)
  assert one == metrics.paired_difference(y, *pairs[0], names, draws=60, seed=7)
  with pytest.raises(UserError, match='no runs'):
    metrics.difference_over_runs(y, [], names)
