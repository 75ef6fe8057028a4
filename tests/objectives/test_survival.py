"""Cox's and the discrete likelihood against loops in float64, and the concordance index against pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate.survival import concordance
from jaxmed.objectives.losses import survival
from tests.objectives.siamese_fakes import check_gradient

RNG = np.random.default_rng(0)
TIME = np.array([3.0, 1.0, 3.0, 7.0, 2.0, 5.0])  # of which two are equal
EVENT = np.array([True, True, True, False, False, True])
COUNTS = np.array([True, True, True, True, True, False])


def cox_loop(risk, counts):
  total, events = 0.0, 0
  for i in range(len(risk)):
    if EVENT[i] and counts[i]:
      total += np.log(sum(np.exp(risk[j]) for j in range(len(risk)) if TIME[j] >= TIME[i] and counts[j])) - risk[i]
      events += 1
  return total / events


def discrete_loop(logits, place, counts):
  total = 0.0
  for i in np.flatnonzero(counts):
    h = 1 / (1 + np.exp(-logits[i]))
    alive = np.prod(1 - h[: place[i]])
    total -= np.log(alive * (h[place[i]] if EVENT[i] else 1 - h[place[i]]))
  return total / counts.sum()


@pytest.mark.parametrize('counts', [np.ones(6, bool), COUNTS], ids=['all', 'some'])
def test_losses_and_gradients_are_those_of_loops(counts):
  risk, logits = RNG.normal(size=6), RNG.normal(size=(6, 4))
  cox = jax.jit(lambda r: survival.cox(r, TIME, EVENT, counts))
  assert float(cox(jnp.asarray(risk, jnp.float32))) == pytest.approx(cox_loop(risk, counts), rel=1e-5)
  check_gradient(cox, lambda r: cox_loop(r, counts), risk)
  place = survival.interval_of(jnp.asarray(TIME), np.array([2.0, 3.0, 6.0]))
  assert place.tolist() == [2, 0, 2, 3, 1, 2]
  nll = jax.jit(lambda x: survival.discrete(x, place, EVENT, counts))
  assert float(nll(jnp.asarray(logits, jnp.float32))) == pytest.approx(discrete_loop(logits, place, counts), rel=1e-5)
  check_gradient(nll, lambda x: discrete_loop(x, place, counts), logits)


def test_a_batch_without_an_event_and_large_risks():
  risk = jnp.asarray([900.0, -900.0, 0.0])
  value, slope = jax.value_and_grad(survival.cox)(risk, TIME[:3], np.zeros(3, bool))
  assert value == 0 and not np.any(slope)
  assert np.isfinite(survival.cox(risk, TIME[:3], np.ones(3, bool)))


def test_intervals_have_as_many_events_each():
  time, event = RNG.exponential(size=400), RNG.random(400) < 0.7
  borders = survival.edges(time, event)
  counts = np.bincount(np.asarray(survival.interval_of(jnp.asarray(time[event]), borders)))
  assert len(borders) == 3 and np.ptp(counts) <= 1
  with pytest.raises(UserError, match='4 intervals of survival need as many different times of events: .* have 2'):
    survival.edges(np.array([1.0, 1.0, 2.0, 9.0]), np.array([True, True, True, False]))


def test_concordance_pair_by_pair():
  time, risk = np.round(RNG.exponential(5, 60)), np.round(RNG.normal(size=60), 1)
  event, right, pairs = RNG.random(60) < 0.6, 0.0, 0
  for i in range(60):
    for j in range(60):
      if event[i] and (time[j] > time[i] or (time[j] == time[i] and not event[j])):
        pairs += 1
        right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
  assert concordance(risk, time, event) == pytest.approx(right / pairs)
  assert concordance(-time, time, np.ones(60, bool)) == 1 and concordance(np.zeros(60), time, event) == 0.5
  assert np.isnan(concordance(risk, time, np.zeros(60, bool)))
