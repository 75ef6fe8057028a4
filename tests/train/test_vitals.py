"""What a run says of its processes, its steps and its losses: numbers, without a run."""

import dataclasses
import os
import types

import jax
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.parallel import chips
from jaxmed.train import utilization
from jaxmed.train.build import rundir
from jaxmed.train.logs import read_rows
from jaxmed.train.monitor import vitals
from jaxmed.train.monitor.spikes import Spikes
from jaxmed.train.monitor.watch import RollBack, Watch
from jaxmed.train.monitor.watchdog import Watchdog
from tests.common import start
from tests.conftest import TINY


def rows(**waits):
  return {p[1:]: {'data wait': wait, 'busy time': busy} for p, (wait, busy) in waits.items()}


@pytest.mark.parametrize('given, expected', [
    (rows(p0=(0.0, 0.3), p1=(0.5, 0.3)), [(1, 'data wait', 0.5, 0.0)]),
    (rows(p0=(0.4, 0.3), p1=(0.5, 0.3)), []),  # less than 1.5 times
    (rows(p0=(0.0, 0.3), p1=(0.09, 0.3)), []),  # does not matter
    (rows(p0=(0.1, 0.2), p1=(0.1, 0.2), p2=(0.1, 0.9), p3=(0.1, 0.2)), [(2, 'busy time', 0.9, 0.2)]),
    (rows(p0=(0.6, 0.2), p1=(0.6, 0.2), p10=(0.1, 0.2)), []),  # all wait for one disk
])
def test_who_keeps_the_others_waiting(given, expected):
  assert vitals.slow(given) == expected


def test_own_vitals():
  big = np.ones(64 << 17)  # 64 MiB, touched
  vitals.own()  # starts the backend, which opens files
  before = vitals.own()
  files = [open(os.devnull) for _ in range(5)]  # noqa: SIM115
  after = vitals.own()
  assert after['open_files'] - before['open_files'] == 5
  assert after['host_gb'] > big.nbytes / 1e9
  for f in files:
    f.close()


def test_a_spike_is_told_from_noise():
  rng = np.random.default_rng(0)
  noise = 2 + 0.1 * rng.standard_normal(2000)
  assert not any(Spikes(noise[:i]).look(noise[i]) for i in range(20, 200))
  spikes = Spikes(noise)
  limit = spikes.look(9.0)
  assert 2.6 < limit < 3.6  # 10 of 0.1 above 2
  assert spikes.look(9.0) == limit  # the spike did not widen the window
  assert spikes.look(float('nan')) is None
  assert Spikes([2.0] * 19).look(9.0) is None  # too few rows to tell
  assert Spikes([2.0] * 20).look(2.09) is None
  assert Spikes([2.0] * 20).look(2.11) == pytest.approx(2.1)
  falling = Spikes()
  assert not any(falling.look(x) for x in 5 * np.exp(-np.arange(300) / 50))
  assert Spikes([-2.0 + 0.01 * (i % 2) for i in range(30)]).look(-1.0) == pytest.approx(-1.895, abs=0.01)


def test_what_becomes_of_a_spike(tmp_path, capfd):
  watch = Watch(tmp_path, 'warn', 8, 8, healthy=3)
  watch.spike(7, 9.0, 2.5, 'ignore')
  assert capfd.readouterr().err == ''
  watch.spike(7, 9.0, 2.5, 'warn')
  assert capfd.readouterr().err == 'warning: step 7: the loss rose to 9, above 2.5 that its last rows allow\n'
  for factor in (0.5, 0.25, 0.125):
    with pytest.raises(RollBack) as e:
      watch.spike(7, 9.0, 2.5, 'rollback')
    assert (e.value.step, watch.slowdown) == (6, factor)
  with pytest.raises(UserError, match='step 7: the loss rose to 9.*3 rollbacks'):
    watch.spike(7, 9.0, 2.5, 'rollback')
  assert Watch(tmp_path, 'warn', 8, 8).load().slowdown == 0.125


def test_how_long_a_step_may_take(tmp_path, monkeypatch):
  clock = [0.0]
  monkeypatch.setattr('jaxmed.train.monitor.watchdog.time.monotonic', lambda: clock[0])
  dog = Watchdog(tmp_path, 0.0, None)
  assert dog.limit == 6 * 600  # at the start
  for seconds in (100.0, 100.0, 100.0, 3000.0):
    dog.beat('a step')
    clock[0] += seconds
  assert dog.limit == 20 * 100
  dog.beat('a step')
  assert dog.limit == 3 * 3000  # one of 3000 s was no hang
  dog.beat('an evaluation', step=False)
  assert dog.limit == 6 * 3 * 3000
  assert Watchdog(tmp_path, 2.0, None).limit == 6 * 120


def test_mfu_is_the_planners(corpus, tmp_path, monkeypatch):
  """On a chip of the table; the CPU of these tests is in none, so its runs have no such number."""
  kind = jax.devices()[0].device_kind
  chip = dataclasses.replace(chips.CHIPS['v4'], kinds=(kind,), flops=1e12)
  assert utilization.Utilization.row(types.SimpleNamespace(_share=0.0), {'images_per_second': 5.0}) == {}
  monkeypatch.setattr(chips, 'CHIPS', {'this': chip})
  start(corpus, tmp_path / 'run', TINY | {'steps': 3})
  rows = [r for r in read_rows(tmp_path / 'run' / 'metrics.jsonl') if 'mfu' in r]
  assert len(rows) == 3
  config, spec = rundir.load_config(tmp_path / 'run')
  image = utilization.model_flops(config, spec) / config.batch_size
  for row in rows:
    assert row['mfu'] == pytest.approx(image * row['images_per_second'] / 1e12)
  blocks = 3 * 2 * config.batch_size * 2 * 12 * 32**2  # a lower bound: two blocks of width 32, a token a sample
  assert image * config.batch_size > blocks
