"""Robustness index, clustering score, performance drop, confounded choices: known features, scikit-learn, slow loops."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from jaxmed.errors import UserError
from jaxmed.evaluate import clusters, confounding, drops, grouped, metrics, probes, robustness
from jaxmed.evaluate.confounding import Design


def golden(c):
  """The small case of the definitions: two classes, two centres, slides of two rows."""
  i = np.arange(16)
  y, centre, slide = i // 8, i // 4 % 2, i // 2
  return np.stack([2 * y - 1, c * (2 * centre - 1), np.sin(1.7 * i)], axis=1), y, centre, slide


def problem(rows=60, seed=0, classes=3, centres=3, subjects=15, width=5):
  """Every subject is of one centre; classes are mixed."""
  rng = np.random.default_rng(seed)
  whose = rng.integers(0, subjects, rows)
  y, centre = rng.integers(0, classes, rows), whose % centres
  return rng.normal(size=(rows, width)) + y[:, None] * 0.5, y, centre, np.char.add('s', whose.astype(str))


@pytest.mark.parametrize('c, k, index, ties', [
    (0.9, 3, 1.0, 0), (0.9, 4, 0.8125, 0), (0.9, 6, 0.703125, 0), (1.0, 3, 0.5625, 0), (1.0, 4, 0.53125, 0),
    (1.0, 6, 0.515625, 1 / 64), (1.0, 1, np.nan, 0)])
def test_the_golden_case(c, k, index, ties):
  """Row 0 is equally near to four rows of either kind where c is 1: of its four neighbours at k = 6 one may differ."""
  looked = robustness.look(*golden(c), most=k, seed=None)
  np.testing.assert_allclose(robustness.index(looked, (k,)), [index], rtol=0, atol=ties + 1e-9)


def slow(x, y, centre, subjects, k):
  """PathoROB's way: k + the rows of the largest subject neighbours, those of the subject dropped, rows cut alike."""
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  most = max(np.unique(subjects, return_counts=True)[1])
  knn = KNeighborsClassifier(min(k + most, len(x)), algorithm='brute').fit(x, y)
  found = [[j for j in row if subjects[j] != subjects[i]] for i, row in enumerate(knn.kneighbors(x)[1])]
  least = min(map(len, found))
  found = [row[:least][:k] for row in found]
  same = sum(y[j] == y[i] and centre[j] != centre[i] for i, row in enumerate(found) for j in row)
  other = sum(y[j] != y[i] and centre[j] == centre[i] for i, row in enumerate(found) for j in row)
  vote = [np.bincount(y[row]).argmax() for row in found]
  return same / (same + other) if same + other else np.nan, balanced_accuracy_score(y, vote), found


@pytest.mark.parametrize('seed', range(3))
def test_index_and_accuracy_are_those_of_a_slow_loop(seed, monkeypatch):
  """In chunks of a few rows; also beyond the neighbours that all rows have."""
  monkeypatch.setattr(robustness, '_CHUNK', 300)
  given = problem(seed=seed)
  looked = robustness.look(*given)
  most = max(np.unique(given[3], return_counts=True)[1])
  assert looked.kinds.shape == (60, 60 - most)
  ks = robustness.grid(looked.kinds.shape[1])
  for k, index, accuracy in zip(ks, robustness.index(looked, ks), robustness.accuracies(looked, ks), strict=True):
    want = slow(*given, k)
    assert (index, accuracy) == pytest.approx(want[:2], nan_ok=True)
  found = robustness.neighbours(given[0], given[3], 9)
  np.testing.assert_array_equal(found, slow(*given, 9)[2])
  assert not (given[3][found] == given[3][:, None]).any()
  assert sum(robustness.shares(looked, 5).values()) == pytest.approx(1)


def test_the_nearest_of_many_rows(monkeypatch):
  """Put in order alone, without the rest."""
  given = problem()
  want = robustness.neighbours(given[0], given[3], 6)
  monkeypatch.setattr(robustness, '_SORTED', 10)
  np.testing.assert_array_equal(robustness.neighbours(given[0], given[3], 6), want)


def known(kind, seed=0, each=12):
  """Features that hold the class, the centre or both alike; slides of three rows."""
  y, centre = np.repeat([0, 0, 1, 1], each), np.repeat([0, 1, 0, 1], each)
  noise = 1e-3 * np.random.default_rng(seed).normal(size=(4 * each, 4))
  one = {'biology': np.eye(2)[y] @ np.eye(2, 4), 'centre': np.eye(2)[centre] @ np.eye(2, 4),
         'both': np.concatenate([np.eye(2)[y], np.eye(2)[centre]], axis=1)}[kind]
  return one + noise, y, centre, np.arange(4 * each) // 3


@pytest.mark.parametrize('pairs', [False, True])
def test_features_whose_index_is_known(pairs):
  """Class alone 1, centre alone 0; of both alike neighbours of the same kind come first, then SO and OS as often."""
  at = lambda kind: robustness.index(robustness.look(*known(kind), pairs=pairs), (15, 21))
  np.testing.assert_array_equal(at('biology'), [1, 1])
  np.testing.assert_array_equal(at('centre'), [0, 0])
  assert at('both')[1] == pytest.approx(0.5, abs=0.1)
  assert np.isnan(robustness.index(robustness.look(*known('both')), (9,))).all()  # neighbours of the same kind alone


def test_equal_features_have_no_order():
  """Constant features: the neighbours are a random sample, whatever the order of the rows."""
  _, y, centre, subjects = known('both')
  looked = robustness.look(np.ones((len(y), 3)), y, centre, subjects)
  assert robustness.index(looked, (11,)) == pytest.approx(0.5, abs=0.12)


def test_pairs_are_pooled_over_combinations():
  given = problem(rows=90)
  found = [c.rows for c in robustness.combinations(given[1], given[2])]
  assert len(found) == 9
  looked = [robustness.look(*(a[rows] for a in given), most=7) for rows in found]
  count = lambda kind: sum((one.kinds == robustness.KINDS.index(kind)).sum() for one in looked)
  got = robustness.index(robustness.look(*given, most=7, pairs=True), (7,))
  assert got == pytest.approx(count('SO') / (count('SO') + count('OS')))
  with pytest.raises(UserError, match='no two classes and two centres'):
    robustness.look(*given[:2], given[1], given[3], pairs=True)


def test_the_bootstrap_moves_whole_subjects():
  given = problem()
  looked = robustness.look(*given)
  names = np.unique(given[3])
  want = []
  for counts in next(metrics.resamples(len(names), 30, 4)):
    rows = np.concatenate([np.repeat(np.flatnonzero(given[3] == n), int(c)) for n, c in zip(names, counts, strict=True)])
    want.append(robustness.index(looked._replace(kinds=looked.kinds[rows]), (5, 9)))
  np.testing.assert_allclose(robustness.resampled_index(looked, (5, 9), draws=30, seed=4), want)
  assert np.isnan(robustness.resampled_index(looked._replace(subjects=np.zeros(60)), (5,), draws=3)).all()


def test_the_grid():
  assert robustness.grid(35) == (1, 3, 5, 7, 9, 11, 21, 31) and robustness.grid(2) == (1,) and robustness.grid(0) == ()
  assert robustness.grid(700, 600)[-1] == 591


def test_weighted_ari():
  """With equal weights that of scikit-learn; with others a loop over pairs of rows."""
  rng = np.random.default_rng(0)
  a, b, subject = rng.integers(0, 3, 40), rng.integers(0, 4, 40), rng.integers(0, 6, 40)
  assert clusters.weighted_ari(a, b, subject, np.ones((1, 6))) == pytest.approx([adjusted_rand_score(a, b)])
  counts = rng.integers(0, 4, (5, 6)).astype(float)
  want = []
  for w in counts[:, subject]:
    sums = np.zeros(4)
    for i in range(40):
      for j in range(i):
        one, two = a[i] == a[j], b[i] == b[j]
        sums += w[i] * w[j] * np.array([one and two, one, two, 1])
    expected = sums[1] * sums[2] / sums[3]
    want.append((sums[0] - expected) / ((sums[1] + sums[2]) / 2 - expected))
  np.testing.assert_allclose(clusters.weighted_ari(a, b, subject, counts), want)
  assert clusters.weighted_ari(a, a, subject, counts) == pytest.approx(1)
  assert clusters.weighted_ari(np.zeros(4), np.zeros(4), np.arange(4), np.ones((1, 4))) == pytest.approx([1.0])


@pytest.mark.parametrize('kind, sign', [('biology', 1), ('centre', -1)])
def test_clusters_of_known_features(kind, sign):
  x, y, centre, subjects = known(kind)
  parts = clusters.clustered(x, y, centre, repetitions=2, largest=4)
  assert [(p.clusters, p.labels.shape) for p in parts] == [(2, (2, 48))]
  assert clusters.score(parts, y, centre)['clustering'] == pytest.approx(sign, abs=0.05)
  drawn = clusters.resampled_score(parts, y, centre, subjects, draws=20)['clustering']
  assert drawn.shape == (20,) and np.mean(sign * drawn) > 0.9


def test_the_clustering_score_is_the_mean_over_combinations_of_ari():
  x, y, centre, _ = problem(rows=40, classes=2)
  parts = clusters.clustered(x, y, centre, repetitions=2, largest=3)
  each = [adjusted_rand_score(y[p.combination.rows], labels) - adjusted_rand_score(centre[p.combination.rows], labels)
          for p in parts for labels in p.labels]
  assert len(parts) == 3
  assert clusters.score(parts, y, centre)['clustering'] == pytest.approx(np.mean(each))
  some = clusters.clustered(x, y, centre, repetitions=1, largest=2, combined=2)
  assert len(some) == 2 and all(any((s.combination.rows == p.combination.rows).all() for p in parts if len(
      p.combination.rows) == len(s.combination.rows)) for s in some)
  with pytest.raises(UserError, match='all four cells'):
    clusters.clustered(x, y, y)


def test_rows_beyond_the_most_are_a_sample():
  x, y, centre, _ = known('biology')
  part, = clusters.clustered(x, y, centre, repetitions=1, largest=2, most=20)
  assert part.labels.shape == (1, 20) and len(set(part.combination.rows)) == 20


def test_balanced_accuracies_of_parts_on_resampled_subjects():
  rng = np.random.default_rng(0)
  y, subjects = rng.integers(0, 3, 50), rng.integers(0, 7, 50)
  predicted, where = rng.integers(0, 3, (2, 50)), rng.random((2, 50)) < 0.7
  value, drawn = grouped.balanced_accuracies(y, predicted, subjects, where, draws=20, seed=3)
  assert value == pytest.approx([balanced_accuracy_score(y[w], p[w]) for p, w in zip(predicted, where, strict=True)])
  for counts, got in zip(next(metrics.resamples(7, 20, 3)), drawn, strict=True):
    weight = counts[subjects]
    for p, (answer, used) in enumerate(zip(predicted, where, strict=True)):
      recall = [np.average(answer[used & (y == c)] == c, weights=weight[used & (y == c)]) for c in range(3)
                if weight[used & (y == c)].sum()]
      assert got[p] == pytest.approx(np.mean(recall))
  assert np.isnan(grouped.balanced_accuracies(y, predicted, np.zeros(50))[1]).all()
  assert np.isnan(grouped.balanced_accuracies(y, predicted, subjects, np.zeros((2, 50)))[0]).all()


@pytest.mark.parametrize('classes, values', [(2, 2), (3, 2), (6, 2), (2, 3), (4, 4), (2, 5)])
def test_cells_keep_the_size_of_classes(classes, values):
  """At every correlation; at 0 all cells are alike, at 1 only home cells have rows; turned homes are others."""
  home = confounding.homes(classes, values)
  assert home.any(axis=0).all() and home.any(axis=1).all()
  assert not (home & confounding.turned(home)).any()
  for r in (0, 0.3, 0.95, 1):
    cells = confounding.cells(20, Design(home, r))
    assert (cells.sum(axis=1) == 20 * values).all() and (cells >= 0).all()
    y, value = (np.repeat(i.ravel(), cells.ravel()) for i in np.indices(cells.shape))
    assert confounding.correlation(y, value, home) == pytest.approx(r, abs=0.03)
    if classes == values == 2:
      assert confounding.correlation(y, value, home) == pytest.approx(np.corrcoef(y, value)[0, 1])
  assert (confounding.cells(20, Design(home, 0)) == 20).all()
  assert not confounding.cells(20, Design(home, 1))[~home].any()


def test_the_splits_of_the_published_camelyon_design():
  """pathorob/apd/utils.py: 7 - s and 7 + s slides, s = 0 .. 7."""
  home = confounding.homes(2, 2)
  for s in range(8):
    np.testing.assert_array_equal(confounding.cells(7, Design(home, s / 7)), [[7 + s, 7 - s], [7 - s, 7 + s]])


def test_room_is_the_most_that_fits():
  rng = np.random.default_rng(0)
  for _ in range(50):
    counts, home = rng.integers(0, 60, (3, 2)), confounding.homes(3, 2)
    plans = [[Design(home, 0.9), Design(confounding.turned(home), 0.9)], [Design(home, 0.2)]]
    fits = [n for n in range(80) if all((sum(confounding.cells(n, d) for d in p) <= counts).all() for p in plans)]
    assert confounding.room(counts, plans) == max(fits)
  with pytest.raises(UserError, match=r"train rows of 'b' with 'Y': 1 rows; expected 4 or more"):
    confounding.check(np.array([[9, 9], [9, 1]]), [[Design(confounding.homes(2, 2), 0)]], 4, 'ab', 'XY', 'train rows')


def test_rows_are_taken_subject_by_subject():
  _, y, centre, subjects = problem(rows=200, classes=2, centres=2)
  order = confounding.order_by_subject(subjects, np.random.default_rng(1))
  assert sorted(order) == list(range(200))
  shown = subjects[order]
  assert np.count_nonzero(shown[1:] != shown[:-1]) == len(set(subjects)) - 1
  wanted = np.array([[5, 20], [11, 0]])
  rows = confounding.take(y, centre, wanted, order)
  np.testing.assert_array_equal(confounding.counted(y[rows], centre[rows], (2, 2)), wanted)
  more = confounding.take(y, centre, wanted + 4, order)
  assert (more | ~rows).all()  # nested
  other = confounding.take(y, centre, wanted, order[::-1])
  assert not (rows & other)[(y == 0) & (centre == 0)].any()


def test_new_splits_are_by_subject_and_reach_every_cell():
  y, centre, subjects = (np.repeat(a, 3) for a in (np.arange(40) % 2, np.arange(40) // 2 % 2, np.arange(40)))
  split = confounding.cut_anew(y, centre, subjects, 0)
  for name, share in (('train', 0.6), ('val', 0.2), ('test', 0.2)):
    np.testing.assert_array_equal(confounding.counted(y[split == name], centre[split == name], (2, 2)), 30 * share)
  assert all(len(set(split[subjects == s])) == 1 for s in subjects)
  assert confounding.cut_anew(np.zeros(3, int), np.zeros(3, int), np.array(list('aab')), 0).tolist() in (
      ['train', 'train', 'test'], ['test', 'test', 'train'])
  assert confounding.determined(np.array([[3, 0, 0], [0, 2, 4]])) and not confounding.determined(np.ones((2, 2)))


def part(rows, seed, strength, centres=2):
  """Class in the first feature, centre in the second, three times as clear as the class."""
  rng = np.random.default_rng(seed)
  y, value = rng.integers(0, 2, rows), rng.integers(0, centres, rows)
  x = np.stack([2.0 * y - 1, strength * (2 * value - 1), *rng.normal(size=(2, rows))], axis=1)
  x[:, :2] += rng.normal(size=(rows, 2))
  return drops.Rows(x, y, value, rng.integers(0, 30, rows) + 100 * value)


def test_the_drop_of_known_features():
  """None without the centre in the features; more and more where it is clearer than the class; the first is level."""
  home = confounding.homes(2, 2)
  found = {}
  for strength in (0.0, 3.0):
    train, val, test = part(240, 0, strength), part(120, 1, strength), part(400, 2, strength)
    found[strength] = drops.accuracies(train, val, {'id': test, 'ood': part(300, 3, strength)}, home, (40, 12), 3, 2)
    assert found[strength]['id'].shape == (3, 2)
  assert np.abs(drops.relative(found[0.0]['id'])).max() < 0.08
  assert drops.relative(found[3.0]['id']).max() < -0.1
  assert (np.diff(found[3.0]['id'].mean(axis=1)) < 0.02).all()


def test_accuracies_of_the_drop_are_those_of_scikit_learn():
  """One repetition at correlation 0, the rows and the penalty found by hand."""
  train, val, test = part(100, 0, 1.0), part(80, 1, 1.0), part(90, 2, 1.0)
  home = confounding.homes(2, 2)
  got = drops.accuracies(train, val, {'id': test}, home, (15, 8), 2, 1, seed=5)['id'][0, 0]
  rng = np.random.default_rng([5, 0])
  a, b = (confounding.take(r.y, r.value, np.full((2, 2), n), confounding.order_by_subject(r.subjects, rng))
          for r, n in ((train, 15), (val, 8)))
  scaled = lambda fit, x: (x - fit.mean(axis=0)) / fit.std(axis=0)
  best = []
  for c in probes.SHORT_GRID:
    model = LogisticRegression(C=c, max_iter=1000).fit(scaled(train.x[a], train.x[a]), train.y[a])
    best.append((model.score(scaled(train.x[a], val.x[b]), val.y[b]), c))
  top = [c for s, c in best if s == max(best)[0]]
  both = np.concatenate([train.x[a], val.x[b]])
  want = [drops.even_accuracy(test.y, test.value, LogisticRegression(C=c, max_iter=1000).fit(
      scaled(both, both), np.concatenate([train.y[a], val.y[b]])).predict(scaled(both, test.x))) for c in top]
  assert got in [pytest.approx(w, abs=0.012) for w in want]


def test_even_accuracy_is_balanced_accuracy_of_even_cells():
  rng = np.random.default_rng(0)
  y, value = (np.repeat(a.ravel(), 10) for a in np.indices((3, 2)))
  predicted = rng.integers(0, 3, 60)
  assert drops.even_accuracy(y, value, predicted) == pytest.approx(balanced_accuracy_score(y, predicted))
  twice = np.concatenate([np.arange(60), np.arange(10)])  # a cell with its rows twice counts the same
  assert drops.even_accuracy(y[twice], value[twice], predicted[twice]) == pytest.approx(
      drops.even_accuracy(y, value, predicted))


def test_relative_drops_and_their_interval():
  scores = np.array([[0.8, 0.5], [0.4, 0.5], [0.6, 0.25]])
  assert drops.relative(scores) == pytest.approx([-0.375, -0.25])
  assert np.isnan(drops.relative(np.array([[0.0], [0.5]]))).all()
  values = np.random.default_rng(0).normal(size=12)
  got = drops.masson_loftus([values])
  want = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
  assert (got['value'], got['low'], got['high']) == pytest.approx((values.mean(), *want))
  moved = drops.masson_loftus([values[:6], values[6:] + 50])
  level = drops.masson_loftus([values[:6] - values[:6].mean(), values[6:] - values[6:].mean()])
  assert moved['high'] - moved['low'] == pytest.approx(level['high'] - level['low'])
  assert np.isnan(drops.masson_loftus([np.ones(1)])['low'])
