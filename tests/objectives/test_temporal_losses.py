"""Losses and targets of sequences against NumPy and PyTorch's definitions, and the places of their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.losses import temporal

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(2, 9, 3)), RNG.integers(-1, 3, (2, 9))
VALID = np.arange(9) < np.array([[9], [6]])


def log_softmax(x):
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize('double', [False, True])
def test_class_weights(double):
  weights = np.array([0.5, 2.0, 1.0])
  x = np.exp(log_softmax(LOGITS)) if double else LOGITS
  terms = [(weights[y], -log_softmax(x)[i][y]) for i, y in np.ndenumerate(LABELS) if y >= 0]
  want = sum(w * v for w, v in terms) / sum(w for w, _ in terms)
  got = temporal.class_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), weights, double)
  assert float(got) == pytest.approx(want, rel=1e-5)
  assert float(temporal.class_cross_entropy(jnp.asarray(LOGITS), jnp.full((2, 9), -1))) == 0


def test_double_softmax_has_a_floor():
  sure = jnp.asarray(np.eye(7)[[3]] * 100)
  floor = temporal.class_cross_entropy(sure, jnp.array([3]), double=True)
  assert float(floor) == pytest.approx(math.log(math.e + 6) - 1, abs=1e-5) and float(floor) == pytest.approx(1.165, abs=1e-3)
  assert float(temporal.class_cross_entropy(jnp.zeros((1, 7)), jnp.array([3]), double=True)) == pytest.approx(math.log(7))


def test_truncated_mse():
  log_p = log_softmax(4 * LOGITS)
  cells = [min((log_p[b, t, k] - log_p[b, t - 1, k]) ** 2, 16)
           for b, t, k in np.ndindex(2, 9, 3) if t and VALID[b, t]]
  assert max(cells) == 16 and min(cells) < 1
  logits = jnp.asarray(4 * LOGITS)
  assert float(temporal.truncated_mse(logits, jnp.asarray(VALID))) == pytest.approx(np.mean(cells), rel=1e-5)
  want = sum(cells) / (2 * 8 * 3)
  assert float(temporal.truncated_mse(logits, jnp.asarray(VALID), compat='ms_tcn')) == pytest.approx(want, rel=1e-5)


def test_the_frame_before_gets_no_gradient():
  two = jnp.asarray(LOGITS[:1, :2])
  grad = jax.grad(lambda x: temporal.truncated_mse(x, jnp.ones((1, 2), bool)))(two)
  assert (grad[:, 0] == 0).all() and (grad[:, 1] != 0).all()


def test_tasks_weighed_by_noise():
  losses, s = jnp.array([2.0, 0.5]), jnp.array([0.3, -0.2])
  want = math.exp(-0.3) * 2 + 0.3 + math.exp(0.2) * 0.5 - 0.2
  assert float(temporal.weighed_tasks(list(losses), s)) == pytest.approx(want)
  best = jax.grad(lambda s: temporal.weighed_tasks(list(losses), s))(jnp.log(losses))
  np.testing.assert_allclose(best, 0, atol=1e-6)  # the optimum is s = log(loss)
  truth = np.array([1, 0, -1])
  z = np.array([0.3, -2.0, 9.0])
  want = -(math.log(1 / (1 + math.exp(-0.3))) + math.log(1 - 1 / (1 + math.exp(2)))) / 2
  assert float(temporal.binary_cross_entropy(jnp.asarray(z), jnp.asarray(truth))) == pytest.approx(want, rel=1e-5)


def test_futures_by_a_loop():
  """Of two videos that end, and of one that goes on after its nine frames."""
  labels, valid, ended = np.abs(LABELS)[[0, 1, 0]], VALID[[0, 1, 0]], np.array([True, True, False])
  given = jnp.asarray(labels), jnp.asarray(valid)
  tokens = np.asarray(temporal.future_tokens(*given, 3, 2, 3, jnp.asarray(ended)))
  minutes, told = map(np.asarray, temporal.remaining_time(*given, 3, 1.5, 2.0, jnp.asarray(ended)))
  for b, t in np.ndindex(3, 9):
    length = int(valid[b].sum())
    if t >= length:
      assert (tokens[b, t] == -1).all() and not told[b, t].any()
      continue
    for f in range(3):
      later = t + 2 * (f + 1)
      assert tokens[b, t, f] == (labels[b, later] if later < length else 3 if ended[b] else -1)
    for c in range(4):
      ahead = [u - t for u in range(t, length) if labels[b, u] == c] if c < 3 else [length - t] * int(ended[b])
      if ahead or ended[b]:
        assert told[b, t, c] and minutes[b, t, c] == pytest.approx(min(ahead[0] / 2, 1.5) if ahead else 1.5)
      else:
        assert told[b, t, c] == ((length - t) / 2 >= 1.5)
  assert (temporal.future_tokens(*given, 3, 2, 3)[2] == tokens[0]).all()  # by default a video ends


def test_time_error():
  target, predicted, known = RNG.uniform(0, 5, (2, 9, 4)), RNG.uniform(0, 5, (2, 9, 4)), RNG.random((2, 9, 4)) < 0.7
  want = np.mean([math.exp(-target[i] / 5) * abs(predicted[i] - target[i]) / 5
                  for i in np.ndindex(2, 9, 4) if known[i]])
  got = temporal.time_error(jnp.asarray(predicted), jnp.asarray(target), 5.0, jnp.asarray(known))
  assert float(got) == pytest.approx(want, rel=1e-5)
