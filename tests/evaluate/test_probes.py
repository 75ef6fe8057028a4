"""kNN against a plain loop in float64; logistic regression against scikit-learn run by hand; no leakage."""

import warnings

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import probes


def blobs(rng, n, num_classes=4, dim=10, noise=1.5):
  centres = np.random.default_rng(99).normal(size=(num_classes, dim))
  y = rng.integers(0, num_classes, n)
  return (centres[y] + noise * rng.normal(size=(n, dim))).astype(np.float32), y


def slow_knn(train_x, train_y, test_x, num_classes, k, temperature):
  train = [x / np.sqrt((x * x).sum()) for x in train_x.astype(np.float64)]
  out = []
  for t in test_x.astype(np.float64):
    t = t / np.sqrt((t * t).sum())
    similar = sorted(((float(t @ x), int(c)) for x, c in zip(train, train_y, strict=True)), reverse=True)[:k]
    votes = [sum(np.exp(s / temperature) for s, c in similar if c == j) for j in range(num_classes)]
    out.append(np.array(votes) / sum(votes))
  return np.array(out)


@pytest.mark.parametrize(
  ('n', 'k', 'temperature'), [(60, 20, 0.07), (60, 1, 0.07), (7, 20, 0.07), (60, 5, 1.0)]
)
def test_knn_equals_a_plain_loop(n, k, temperature):
  rng = np.random.default_rng(0)
  (train_x, train_y), (test_x, _) = blobs(rng, n), blobs(rng, 23)
  got = probes.knn(train_x, train_y, test_x, 5, k=k, temperature=temperature)
  assert got.dtype == np.float32 and got.shape == (23, 5)
  np.testing.assert_allclose(got, slow_knn(train_x, train_y, test_x, 5, k, temperature), atol=2e-5)
  np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
  assert (got[:, 4] == 0).all()  # a class that no training row has


def test_knn_chunks_and_scale_do_not_matter(monkeypatch):
  rng = np.random.default_rng(1)
  (train_x, train_y), (test_x, _) = blobs(rng, 50), blobs(rng, 31)
  whole = probes.knn(train_x, train_y, test_x, 4)
  monkeypatch.setattr(probes, '_CHUNK', 50 * 7)
  np.testing.assert_allclose(probes.knn(train_x, train_y, test_x, 4), whole, atol=1e-5)
  np.testing.assert_allclose(probes.knn(train_x * 100, train_y, test_x / 50, 4), whole, atol=1e-5)


def test_knn_survives_a_low_temperature_and_a_zero_feature():
  train_x, train_y = np.array([[1, 0], [0, 1], [-1, 0]], np.float32), np.array([0, 1, 2])
  got = probes.knn(train_x, train_y, np.array([[1, 0.1], [0, 0]], np.float32), 3, temperature=1e-3)
  np.testing.assert_allclose(got[0], [1, 0, 0], atol=1e-6)
  np.testing.assert_allclose(got[1], [1 / 3, 1 / 3, 1 / 3], atol=1e-6)


@pytest.mark.parametrize('bad', [dict(k=0), dict(temperature=0.0), dict(empty=True)])
def test_knn_refuses(bad):
  n = 0 if bad.pop('empty', False) else 3
  with pytest.raises(UserError, match='expected at least one|must be positive'):
    probes.knn(np.ones((n, 2)), np.zeros(n, int), np.ones((1, 2)), 2, **bad)


def test_logistic_equals_scikit_learn_by_hand():
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler
  rng = np.random.default_rng(2)
  (train_x, train_y), (val_x, val_y), (test_x, _) = (blobs(rng, n, noise=2.5) for n in (120, 60, 40))
  train_x, val_x, test_x = (x * np.geomspace(0.01, 100, 10) + 7
                            for x in (train_x, val_x, test_x))
  by_hand = []
  for c in probes.SHORT_GRID:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8)).fit(
      train_x, train_y
    )
    by_hand.append(model.score(val_x, val_y))
  got, info = probes.logistic(train_x, train_y, val_x, val_y, test_x, 4)
  np.testing.assert_allclose(info['grid_val_accuracy'], by_hand, atol=1 / 60 + 1e-9)  # one row on the border
  assert info['val_accuracy'] == max(info['grid_val_accuracy']) and info['unconverged'] == 0
  final = make_pipeline(StandardScaler(), LogisticRegression(C=info['C'], max_iter=5000, tol=1e-8))
  final.fit(np.concatenate([train_x, val_x]), np.concatenate([train_y, val_y]))
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, final.predict_proba(test_x), atol=5e-3)


def test_the_penalty_comes_from_the_validation_rows():
  rng = np.random.default_rng(3)
  # 30 rows in 200 dimensions, labels half noise: a weak penalty memorises, a strong one generalises.
  x = rng.normal(size=(330, 200)).astype(np.float32)
  y = (x[:, 0] + 1.5 * rng.normal(size=330) > 0).astype(int)
  _, strict = probes.logistic(x[:30], y[:30], x[30:], y[30:], x[:1], 2)
  _, loose = probes.logistic(x[:30], y[:30], x[:30], y[:30], x[:1], 2)
  assert strict['val_accuracy'] < 0.9
  assert loose['val_accuracy'] == 1.0
  assert loose['C'] > strict['C'] or strict['val_accuracy'] == max(strict['grid_val_accuracy'])
  i = strict['grid'].index(strict['C'])
  assert strict['grid_val_accuracy'][i] == max(strict['grid_val_accuracy'])


def test_other_test_rows_do_not_change_a_prediction():
  rng = np.random.default_rng(4)
  (train_x, train_y), (val_x, val_y), (test_x, _) = (blobs(rng, n) for n in (80, 30, 20))
  wild = test_x.copy()
  wild[1:] = 1000 * rng.normal(size=wild[1:].shape)
  a, info_a = probes.logistic(train_x, train_y, val_x, val_y, test_x, 4)
  b, info_b = probes.logistic(train_x, train_y, val_x, val_y, wild, 4)
  assert info_a == info_b
  np.testing.assert_allclose(a[0], b[0], atol=1e-6)
  np.testing.assert_allclose(
    probes.knn(train_x, train_y, test_x, 4)[0], probes.knn(train_x, train_y, wild, 4)[0], atol=1e-6
  )


def test_logistic_counts_what_did_not_converge_and_prints_nothing():
  rng = np.random.default_rng(5)
  (train_x, train_y), (val_x, val_y) = blobs(rng, 80), blobs(rng, 30)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    _, info = probes.logistic(train_x, train_y, val_x, val_y, val_x, 4, max_iter=1, grid=(1.0, 100.0))
  assert info['unconverged'] == 3 and info['iterations'] == 3


def test_logistic_with_constant_columns_and_unseen_classes():
  rng = np.random.default_rng(6)
  (train_x, train_y), (val_x, val_y) = blobs(rng, 80), blobs(rng, 30)
  train_x[:, 0], val_x[:, 0] = 0.1, 0.1
  got, _ = probes.logistic(train_x, train_y, val_x, val_y, val_x, 6)
  assert np.isfinite(got).all() and (got[:, 4:] == 0).all()
  np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
  mean, scale = probes.standardiser(train_x)
  assert scale[0] == 1 and abs(mean[0] - 0.1) < 1e-6
  with pytest.raises(UserError, match='single class'):
    probes.logistic(train_x, np.zeros(80), val_x, val_y, val_x, 4)
  with pytest.raises(UserError, match='no validation row'):
    probes.logistic(train_x, train_y, val_x[:0], val_y[:0], val_x, 4)


@pytest.mark.parametrize('rows', [40, 9])
def test_ridge_of_numbers_equals_scikit_learn(rows):
  from sklearn.linear_model import Ridge
  rng = np.random.default_rng(0)
  x, val_x, test_x = (rng.normal(size=(n, 12)) * 3 + 1 for n in (rows, 15, 6))
  x[:, 0] = val_x[:, 0] = test_x[:, 0] = 2.0  # a constant feature
  true = rng.normal(size=12)
  y, val_y = (50 + a @ true + rng.normal(size=len(a)) for a in (x, val_x))

  def reference(x, y, asked, penalty):
    mean, scale = probes.standardiser(x)
    model = Ridge(alpha=penalty * len(x)).fit((x - mean) / scale, y)
    return model.predict((asked - mean) / scale)
  errors = {p: np.square(reference(x, y, val_x, p) - val_y).mean() for p in probes.RIDGE_GRID}
  for refit in (False, True):
    got, info = probes.ridge_numbers(x, y, val_x, val_y, test_x, refit=refit)
    assert info['penalty'] == min(errors, key=errors.get)
    assert info['grid_val_mse'] == pytest.approx([errors[p] for p in info['grid']], rel=1e-4)
    both = (np.r_[x, val_x], np.r_[y, val_y]) if refit else (x, y)
    np.testing.assert_allclose(got, reference(*both, test_x, info['penalty']), rtol=1e-4)


def test_knn_of_numbers_equals_a_slow_loop_and_votes_for_classes():
  rng = np.random.default_rng(1)
  x, test = rng.normal(size=(30, 5)), rng.normal(size=(7, 5))
  y = rng.normal(size=(30, 2))
  unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
  for i, s in enumerate(unit(test) @ unit(x).T):
    top = np.argsort(-s)[:4]
    w = np.exp(s[top] / 0.07)
    np.testing.assert_allclose(probes.knn_mean(x, y, test, 4)[i], (w[:, None] * y[top]).sum(axis=0) / w.sum(), rtol=1e-4)
  labels = rng.integers(0, 3, 30)
  np.testing.assert_allclose(probes.knn_mean(x, np.eye(3)[labels], test), probes.knn(x, labels, test, 3), atol=1e-6)


def test_logistic_without_a_second_fit_leaves_the_validation_rows_out():
  rng = np.random.default_rng(2)
  y, val_y = rng.integers(0, 2, 60), rng.integers(0, 2, 30)
  x, val_x = (rng.normal(size=(len(a), 4)) + a[:, None] for a in (y, val_y))
  alone, info = probes.logistic(x, y, val_x, val_y, val_x, 2, refit=False)
  from sklearn.linear_model import LogisticRegression
  mean, scale = probes.standardiser(x)
  want = LogisticRegression(C=info['C'], max_iter=1000).fit((x - mean) / scale, y).predict_proba((val_x - mean) / scale)
  np.testing.assert_allclose(alone, want, atol=1e-3)
  assert np.abs(alone - probes.logistic(x, y, val_x, val_y, val_x, 2)[0]).max() > 1e-3
