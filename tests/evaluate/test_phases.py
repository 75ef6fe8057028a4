"""Phases: the published cases of relaxed boundaries in both forms, and a slow loop over frames and runs."""

import itertools

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import phases

PHASES = range(1, 8)


def relaxed(truth, predicted, compat='', frames=10):
  return phases.counts(np.array(truth), np.array(predicted), PHASES, phases.Relaxation(frames), compat)


@pytest.mark.parametrize(('predicted', 'intended', 'script', 'strict'), [
  ([2] * 92 + [3] * 108, 1.0, 0.96, 0.96),  # an early switch
  ([7] * 8 + [2] * 84 + [3] * 108, 0.96, 0.95, 0.92),  # and errors at the start
])
def test_golden_accuracy(predicted, intended, script, strict):
  truth = [2] * 100 + [3] * 100
  assert relaxed(truth, predicted).metrics()['accuracy'] == intended
  assert relaxed(truth, predicted, 'tmrnet').metrics()['accuracy'] == script
  assert phases.counts(np.array(truth), np.array(predicted), PHASES).metrics()['accuracy'] == strict


@pytest.mark.parametrize('compat', phases.COMPAT)
def test_golden_late_switch(compat):
  found = relaxed([2] * 20 + [3] * 20, [2] * 30 + [3] * 10, compat)
  raw, clipped = found.metrics(clip=False), found.metrics()
  assert raw['accuracy'] == 1 and raw['recall'][1] == 1.5 and raw['precision'][2] == 2.0
  assert clipped['recall'][1] == 1 and clipped['precision'][2] == 1 and np.isnan(clipped['recall'][0])


def slow(truth, predicted, t, compat):
  """Accepted frames by a walk over runs and frames, then every metric by sets of frames."""
  ok = [a == b for a, b in zip(truth, predicted)]
  at = 0
  for phase, run in itertools.groupby(truth):
    n = len(list(run))
    reach = min(t, n)
    late = {-1, -2} if phase in (6, 7) else {-1}
    early = {1, 2} if phase in (4, 5, 6, 7) else {1}
    for i in range(reach):
      if predicted[at + i] - phase in late:
        ok[at + i] = True
    for i in range(reach):
      tail = at + n - reach + i
      if predicted[tail] - phase in early and not ok[tail]:
        ok[at + i if compat else tail] = True
    at += n
  out = {'accuracy': np.mean(ok), 'precision': [], 'recall': [], 'jaccard': []}
  for phase in PHASES:
    true = {i for i, x in enumerate(truth) if x == phase}
    found = {i for i, x in enumerate(predicted) if x == phase}
    hits = sum(ok[i] for i in true | found)
    for name, below in (('precision', found), ('recall', true), ('jaccard', true | found)):
      out[name].append(hits / len(below) if true and below else np.nan)
  return out


def video(rng):
  truth = np.repeat(rng.permutation(7)[:5] + 1, rng.integers(1, 12, 5))
  predicted = np.clip(truth + rng.choice([0, 0, 0, -1, 1, 2, -2], len(truth)), 1, 7)
  return truth, predicted


@pytest.mark.parametrize('compat', phases.COMPAT)
def test_slow_loop(compat):
  rng = np.random.default_rng(0)
  for _ in range(40):
    truth, predicted = video(rng)
    got = relaxed(truth, predicted, compat, 4).metrics(clip=False)
    for name, value in slow(truth.tolist(), predicted.tolist(), 4, compat).items():
      np.testing.assert_allclose(got[name], value, rtol=1e-12)


def test_aggregations():
  """A phase's mean over videos and back, a video's mean over phases, and frames together, by hand."""
  one = phases.counts(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), (0, 1))  # recall 2/3, 1
  two = phases.counts(np.array([0, 0, -1]), np.array([0, 1, 1]), (0, 1))  # recall 1/2, none; accuracy 1/2
  by = {name: phases.score([one, two], name) for name in phases.BY}
  assert by['phase']['recall']['value'] == pytest.approx(((2 / 3 + 1 / 2) / 2 + 1) / 2)
  assert by['phase']['recall']['deviation'] == pytest.approx(np.std([7 / 12, 1], ddof=1))
  assert by['video']['recall']['value'] == pytest.approx(((2 / 3 + 1) / 2 + 1 / 2) / 2)
  assert by['pooled']['recall']['value'] == pytest.approx((3 / 5 + 1) / 2)
  assert by['phase']['accuracy']['value'] == pytest.approx((3 / 4 + 1 / 2) / 2)
  assert by['pooled']['accuracy']['value'] == pytest.approx(4 / 6)
  assert by['phase']['accuracy']['of'] == 'videos' and by['pooled']['jaccard']['of'] == 'phases'


def test_another_order_of_phases_is_another_relaxed_metric_and_the_same_strict_one():
  truth, predicted = np.repeat([4, 5, 6, 7], 20), np.roll(np.repeat([4, 5, 6, 7], 20), 5)
  order = (1, 2, 3, 4, 7, 6, 5)
  for relaxation in (None, phases.Relaxation()):
    a, b = (phases.counts(truth, predicted, classes, relaxation) for classes in (PHASES, order))
    assert (a.right == b.right) == (relaxation is None)


def test_m2cai16_is_cholec80_after_a_phase_more():
  rng = np.random.default_rng(2)
  for _ in range(10):
    truth, predicted = video(rng)
    one = relaxed(truth, predicted)
    more = phases.counts(truth, predicted, range(8), phases.M2CAI16)
    assert more.right == one.right and more.hits.tolist() == [0, *one.hits]


def test_errors():
  with pytest.raises(UserError, match='none of the classes'):
    phases.counts(np.array([9]), np.array([1]), PHASES)
  with pytest.raises(UserError, match=r'truth \(2,\) and prediction \(1,\)'):
    phases.counts(np.array([1, 1]), np.array([1]), PHASES)
  with pytest.raises(UserError, match='tmrnet'):
    phases.counts(np.array([1]), np.array([1]), PHASES, None, 'tmr')
