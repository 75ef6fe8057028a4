"""The concept bottleneck: against a slow loop, its limits in the weight of the prior, a confounder that turns round."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxmed.errors import UserError
from jaxmed.evaluate import bottleneck, confounding, probes

PRIOR = np.array([[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])


def slow(x, y, prior, weight, orders, rate=1e-3):
  """Adam in float64, one row of `orders` a step; returns weights [C, K] and bias [K]."""
  w, b = np.zeros(prior.T.shape), np.zeros(len(prior))
  first, second = [np.zeros(w.shape), np.zeros(b.shape)], [np.zeros(w.shape), np.zeros(b.shape)]
  for t, rows in enumerate(orders, 1):
    logits = x[rows] @ w + b
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True) - np.eye(len(prior))[y[rows]]
    squashed = np.tanh(w)
    grads = [x[rows].T @ p / len(rows) + weight * np.sign(squashed - prior.T) * (1 - squashed**2) / w.size,
             p.mean(axis=0)]
    for i, (g, param) in enumerate(zip(grads, (w, b), strict=True)):
      first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
      param -= rate * (first[i] / (1 - 0.9**t)) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
  return w, b


@pytest.mark.parametrize('weight', [0.0, 1.0])
def test_the_head_is_that_of_a_slow_loop(weight):
  """The weight 0 is a plain linear layer of concepts; the last batch has fewer rows."""
  rng = np.random.default_rng(0)
  x, y = rng.random((70, 3)), rng.integers(0, 2, 70)
  head = bottleneck.fit_head(x, y, x, y, PRIOR, weight, epochs=1, batch=32, seed=4)
  order = np.random.default_rng([4, 0]).permutation(70)
  w, b = slow(x, y, PRIOR, weight, [order[:32], order[32:64], order[64:]])
  np.testing.assert_allclose(head.weights, w, atol=2e-6)
  np.testing.assert_allclose(head.bias, b, atol=2e-6)
  assert head(x) == pytest.approx(x @ w + b, abs=1e-5)


def test_weights_go_to_the_prior_as_its_weight_grows():
  rng = np.random.default_rng(0)
  x, y = rng.random((64, 3)), rng.integers(0, 2, 64)
  far = [np.abs(np.tanh(bottleneck.trajectory(x, y, PRIOR, w, epochs=900, rate=3e-3)[0][-1]).T - PRIOR).mean()
         for w in (0.0, 1.0, 100.0)]
  assert far[0] > far[1] > far[2] and far[2] < 0.06


def test_the_first_best_epoch_is_taken():
  """Validation labels that training moves away from: the best epoch is an early one."""
  rng = np.random.default_rng(1)
  x = rng.random((64, 3))
  y = (x[:, 0] > 0.5).astype(int)
  head = bottleneck.fit_head(x, y, x, y, PRIOR, 0.0, epochs=60, rate=0.05)
  assert head.accuracy == ((head(x)).argmax(axis=1) == y).mean() > 0.9
  against = bottleneck.fit_head(x, y, x, 1 - y, PRIOR, 0.0, epochs=60, rate=0.05)
  assert np.abs(against.weights).max() < np.abs(head.weights).max()


def test_grounding_is_balanced_logistic_regression():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(120, 6))
  told = {'a': (x[:, 0] > 1).astype(np.int8), 'b': np.where(rng.random(120) < 0.3, -1, x[:, 1] > 0).astype(np.int8)}
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  got = bottleneck.ground(x, told)(x)
  for i, values in enumerate(told.values()):
    model = LogisticRegression(class_weight='balanced', max_iter=1000).fit(unit[values >= 0], values[values >= 0])
    np.testing.assert_allclose(got[:, i], model.predict_proba(unit)[:, 1], atol=2e-3)
  with pytest.raises(UserError, match=r"concept 'a': 9 training rows have it; expected 10 or more"):
    bottleneck.ground(x, {'a': (np.arange(120) < 9).astype(np.int8)})


def toy(rows, correlation, seed):
  """The class shows weakly as its concept in two features, the confounder clearly in another two."""
  rng = np.random.default_rng(seed)
  y = np.arange(rows) % 2
  value = np.where(rng.random(rows) < (1 + correlation) / 2, y, 1 - y)
  x = 0.5 * rng.normal(size=(rows, 8))
  x[:, :2] += 0.45 * (2 * y[:, None] - 1)
  x[:, 2:4] += 1.5 * (2 * value[:, None] - 1)
  return x, y, value


def test_a_linear_probe_collapses_and_the_bottleneck_does_not():
  """Label and confounder at +0.95 in training and -0.95 in the test; concepts were found where nothing is confounded."""
  train, val, same, turned = (toy(n, c, s) for s, (n, c) in enumerate(((600, 0.95), (200, 0.95), (400, 0.95),
                                                                       (400, -0.95))))
  open_rows = toy(600, 0.0, 9)
  grounding = bottleneck.ground(open_rows[0], {'concept': open_rows[1].astype(np.int8)})
  prior = np.array([[-1.0], [1.0]])
  head = bottleneck.fit_head(grounding(train[0]), train[1], grounding(val[0]), val[1], prior, epochs=60)
  gap = lambda answers: np.mean(answers(same[0]) == same[1]) - np.mean(answers(turned[0]) == turned[1])
  linear = lambda x: probes.logistic(train[0], train[1], val[0], val[1], x, 2)[0].argmax(axis=1)
  through = lambda x: head(grounding(x)).argmax(axis=1)
  assert gap(linear) > 0.5 and abs(gap(through)) < 0.15
  assert np.mean(through(turned[0]) == turned[1]) > 0.7
  assert confounding.correlation(*train[1:], np.eye(2, dtype=bool)) == pytest.approx(0.95, abs=0.04)


def test_tables(tmp_path):
  path = tmp_path / 'table.json'
  path.write_text(json.dumps({'b': {'round': 'no', 'dark': 'Unknown'}, 'a': {'round': 1, 'fat': -1.0}}))
  concepts, prior = bottleneck.read_table(path, ('a', 'b'))
  assert concepts == ('round', 'dark', 'fat') and prior.tolist() == [[1, 0, -1], [-1, 0, 0]]
  for table, words in (({'a': {'c': 1}}, "'b'"), ({'a': {'c': 1}, 'b': {}, 'd': {}}, "class in .*'d'"), ([1], 'expected'),
                       ({'a': {'c': 2}, 'b': {}}, "'a': 'c' is 2: expected 1, -1, 0"), ({'a': {}, 'b': {}}, 'no class has'),
                       ({'a': {'c': True}, 'b': {}}, 'is True')):
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=words):
      bottleneck.read_table(path, ('a', 'b'))
  with pytest.raises(UserError, match='none.json'):
    bottleneck.read_table(tmp_path / 'none.json', ('a', 'b'))


def test_what_columns_say():
  assert bottleneck.told([1, 0.0, True, 'no', None, '', float('nan')], 'c').tolist() == [1, 0, 1, 0, -1, -1, -1]
  with pytest.raises(UserError, match=r"concept 'c': 'maybe' in its column; expected 0 or 1"):
    bottleneck.told(['maybe'], 'c')
