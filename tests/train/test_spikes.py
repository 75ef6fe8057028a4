"""on_spike=skip: the rule inside the step, a run with a spike in it, and its resumption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.errors import Stopped, UserError
from jaxmed.train import loop, rows
from jaxmed.train.build import assemble
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.logs import read_rows
from jaxmed.train.monitor import spikes
from tests.common import record_indices, same, saved_state, start
from tests.conftest import TINY

SPIKE = 24  # step, counted from 1, whose loss is ten times as large
SKIP = merge(TINY, {'steps': 30, 'on_spike': 'skip', 'eval_every': 30, 'checkpoint_every': 1,
                    'checkpoint': {'keep': 99}, 'augment': {'flip': (0.0, 0.0)}})


def reference(losses):
  """The rule in NumPy, float64: which of these losses are spikes."""
  window, out = [], []
  for loss in losses:
    spike = False
    if np.isfinite(loss) and len(window) >= 20:
      last = np.asarray(window[-100:])
      middle = np.median(last)
      noise = 10 * 1.4826 * np.median(np.abs(last - middle))
      spike = bool(loss > middle + max(noise, 0.05 * abs(middle)))
    out.append(spike)
    if np.isfinite(loss) and not spike:
      window.append(loss)
  return out


def test_the_rule_inside_a_step_is_the_numpy_reference():
  rng = np.random.default_rng(0)
  losses = (2 + np.exp(-np.arange(300) / 60) + 0.05 * rng.standard_normal(300)).astype(np.float32)
  losses[[10, 60, 61, 150, 299]] *= 3
  losses[[5, 100, 200]] = np.nan, np.inf, -np.inf
  losses[220:225] = 2.9
  _, got = jax.lax.scan(lambda w, x: spikes.judge(w, x)[::-1], spikes.empty(), jnp.asarray(losses))
  want = reference(losses.astype(np.float64))
  assert np.flatnonzero(got).tolist() == np.flatnonzero(want).tolist() == [60, 61, 150, *range(220, 225), 299]
  watch = spikes.Spikes()
  assert [watch.look(float(x)) is not None for x in losses] == want


@pytest.fixture(scope='module')
def spiked():
  """Every run has one loss that is ten times as large, with its gradient."""
  build = assemble.build

  def spoilt(config, spec):
    trainer = build(config, spec)

    class Spiking(type(trainer.objective)):
      def loss(self, variables, batch, rng, step, train=True):
        loss, rest = super().loss(variables, batch, rng, step, train)
        return jnp.where(step == SPIKE - 1, 10.0, 1.0) * loss, rest

    fields = {f.name: getattr(trainer.objective, f.name) for f in dataclasses.fields(trainer.objective)}
    return dataclasses.replace(trainer, objective=Spiking(**fields))

  with pytest.MonkeyPatch.context() as m:
    m.setattr(assemble, 'build', spoilt)
    yield


@pytest.fixture(scope='module')
def skipped(spiked, corpus, tmp_path_factory):
  out = tmp_path_factory.mktemp('skip') / 'run'
  start(corpus, out, SKIP)
  return out


def test_the_update_of_a_spike_is_left_out(skipped):
  before, at, after = (saved_state(skipped, n) for n in (SPIKE - 1, SPIKE, SPIKE + 1))
  for name in ('params', 'target', 'extra', 'moments', 'average', 'losses'):
    same(getattr(before, name), getattr(at, name))
  assert [(int(s.step), int(s.skipped), int(s.skipped_in_row)) for s in (before, at, after)] == [
      (SPIKE - 1, 0, 0), (SPIKE, 1, 1), (SPIKE + 1, 1, 0)]
  assert not np.array_equal(at.params['encoder']['channel_embed'], after.params['encoder']['channel_embed'])
  rows = [r for r in read_rows(skipped / 'metrics.jsonl') if 'loss' in r]
  assert [r['skipped'] for r in rows] == [0] * (SPIKE - 1) + [1] * (31 - SPIKE)
  kept = [r['loss'] for r in rows if r['step'] != SPIKE]
  np.testing.assert_array_equal(after.losses[~np.isnan(after.losses)], np.float32(kept[:SPIKE]))
  assert rows[SPIKE - 1]['loss'] > 5 * max(kept)


def test_a_run_that_was_stopped_before_a_spike_skips_it_too(skipped, corpus, tmp_path, monkeypatch, capfd):
  with monkeypatch.context() as m:
    record_indices(m, stop_at=SPIKE - 2)
    with pytest.raises(Stopped):
      start(corpus, tmp_path / 'run', SKIP)
  with pytest.raises(UserError, match='on_spike=skip cannot change to warn when a run goes on'):
    loop.resume(tmp_path / 'run', {'on_spike': 'warn'}, quiet=True)
  loop.resume(tmp_path / 'run', quiet=True)
  same(saved_state(tmp_path / 'run'), saved_state(skipped))
  said = f'step {SPIKE}: 1 update(s) left out since the row before: the loss was a spike or not finite'
  assert capfd.readouterr().err.count(said) == 1


def test_a_loss_that_stays_up_ends_the_run(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  row = {'skipped_in_row': 9, 'loss': 9.0, 'grad_norm': 1.0}
  rows.check_finite(row, checkpoints)
  with pytest.raises(UserError, match='the loss stayed far above its last ones 10 steps in a row .* on_spike=warn'):
    rows.check_finite(row | {'skipped_in_row': 10}, checkpoints)
  with pytest.raises(UserError, match='loss or gradient was not finite 10 steps in a row'):
    rows.check_finite(row | {'skipped_in_row': 10, 'grad_norm': float('inf')}, checkpoints)
  checkpoints.close()
