"""The workflow model against every sequence of states of tiny chains, and on a synthetic workflow."""

import itertools

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import hmm


def test_forward_and_viterbi_by_brute_force():
  rng = np.random.default_rng(0)
  for _ in range(5):
    first, moves = np.log(rng.dirichlet(np.ones(3))), np.log(rng.dirichlet(np.ones(3), 3))
    moves[0, 2] = -np.inf
    seen = rng.normal(size=(4, 3))
    filtered = np.zeros((4, 3))
    best, path = -np.inf, None
    for t in range(4):
      for states in itertools.product(range(3), repeat=t + 1):
        log_p = first[states[0]] + sum(moves[a, b] for a, b in itertools.pairwise(states))
        log_p += sum(seen[i, s] for i, s in enumerate(states))
        filtered[t, states[-1]] += np.exp(log_p)
        if t == 3 and log_p > best:
          best, path = log_p, states
    filtered /= filtered.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(hmm.forward(first, moves, seen)), filtered, rtol=1e-10)
    assert hmm.viterbi(first, moves, seen).tolist() == list(path)


def video(rng, noise=1.2):
  labels = np.repeat([1, 2, 4], rng.integers(15, 30, 3))
  return np.eye(5)[labels] + noise * rng.normal(size=(len(labels), 5)), labels


def test_a_workflow():
  """The model is far better than frames alone, offline phases are the better ones, and no move skips a state."""
  rng = np.random.default_rng(0)
  train, test = [video(rng) for _ in range(8)], [video(rng) for _ in range(8)]
  model = hmm.fit(*zip(*train, strict=True), states=2)
  right = lambda f: np.mean(np.concatenate([f(x) == y for x, y in test]))
  alone, online, offline = right(lambda x: x.argmax(axis=1)), right(model.online), right(model.offline)
  assert alone < 0.6 and online > 0.8 and offline > 0.93 and offline > online
  assert model.phase.tolist() == [1, 1, 2, 2, 4, 4]
  moves = np.exp(model.moves)
  np.testing.assert_allclose(moves.sum(axis=1), 1)
  assert moves[0, 2] == 0 and moves[1, 2] > 0.03 and moves[1, 4] < 0.01 and moves[3, 0] < 0.01
  x, y = test[0]
  assert (model.online(x[:10]) == model.online(x)[:10]).all()  # later frames change nothing


def test_states_are_equal_parts_of_runs():
  labels = np.array([3, 3, 3, 3, 7, 7, 3])
  assert hmm._states(labels, np.array([3, 7]), 2).tolist() == [0, 0, 1, 1, 2, 3, 0]
  observed = np.arange(7.0)[:, None]
  model = hmm.fit([observed], [labels], 2, floor=0.5)
  np.testing.assert_allclose(model.mean[:, 0], [(0 + 1 + 6) / 3, 2.5, 4, 5])
  np.testing.assert_allclose(model.variance[1, 0], 0.25 + 0.5)
  with pytest.raises(UserError, match='hmm'):
    hmm.fit([observed], [labels[:3]])
