"""The rates in a run's log: each is that of the steps between two rows."""

import time

import pytest

from jaxmed.train import loop
from jaxmed.train.logs import read_rows
from jaxmed.train.monitor.pace import Pace
from tests.conftest import TINY

BATCH = 8


class Device:
  """Does steps one after the other, each in so many seconds; a step is what `block_until_ready` takes."""

  def __init__(self, seconds: float):
    self.seconds, self.free = seconds, 0.0

  def step(self):
    self.free = max(self.free, time.monotonic()) + self.seconds
    return Result(self.free)


class Result:

  def __init__(self, ready: float):
    self.ready = ready

  def block_until_ready(self):
    time.sleep(max(self.ready - time.monotonic(), 0))
    return self


@pytest.fixture
def pace():
  pace = Pace(0, BATCH)
  yield pace
  pace.close()


def test_rows_taken_out_together_have_their_own_rates(pace):
  device = Device(0.02)
  pace.go()
  for n in range(1, 21):
    pace.step(n, device.step(), 0.0)
  rates = [pace.row(n)['images_per_second'] for n in (10, 20)]  # both at the end, as at a checkpoint
  assert rates == pytest.approx([BATCH / 0.02] * 2, rel=0.2)


def test_pauses_do_not_count_and_begin_when_the_device_is_done(pace):
  device = Device(0.02)
  pace.go()
  for n in range(1, 6):
    pace.step(n, device.step(), 0.0)
  pace.pause()  # five steps are under way
  time.sleep(0.5)
  pace.go()
  for n in range(6, 11):
    pace.step(n, device.step(), 0.0)
  assert pace.row(10)['images_per_second'] == pytest.approx(BATCH / 0.02, rel=0.2)


def test_waits_for_data_belong_to_their_steps(pace):
  device = Device(0.01)
  pace.go()
  for n in range(1, 11):
    if n > 5:
      time.sleep(0.03)
    pace.step(n, device.step(), 0.03 if n > 5 else 0.0)
  first, second = pace.row(5), pace.row(10)
  assert first['data_wait'] == 0
  assert second['data_wait'] > 0.7
  assert second['images_per_second'] < first['images_per_second'] / 2


def test_a_wait_is_of_one_row_alone(pace):
  device = Device(0.02)
  pace.go()
  for n in range(1, 11):
    pace.step(n, device.step(), 0.02 if n <= 5 else 0.0)
  first, second = pace.row(5), pace.row(10)
  assert first['data_wait'] > 0.7 and second['data_wait'] == 0


def test_a_failed_step_does_not_hang(pace):
  class Broken:
    def block_until_ready(self):
      raise RuntimeError
  pace.go()
  pace.step(1, Broken(), 0.0)
  pace.pause()
  assert pace.row(1)['images_per_second'] > 0


def test_rates_of_a_run_at_a_checkpoint_are_those_elsewhere(corpus, tmp_path, monkeypatch):
  """Every step takes 30 ms; rows at steps of a checkpoint were ten times too fast."""
  put = loop.mesh_lib.put_batch
  def slowly(batch, mesh):
    time.sleep(0.03)
    return put(batch, mesh)
  monkeypatch.setattr(loop.mesh_lib, 'put_batch', slowly)
  monkeypatch.setattr(loop.Evaluation, '__call__', lambda self, state, names: {})
  loop.train(TINY | {'data': str(corpus), 'log_every': 5, 'checkpoint_every': 10, 'eval_every': 20}, tmp_path / 'run',
             quiet=True)
  rates = {r['step']: r['images_per_second'] for r in read_rows(tmp_path / 'run' / 'metrics.jsonl')
           if 'images_per_second' in r}
  assert sorted(rates) == [5, 10, 15, 20]
  assert max(rates.values()) < 1.5 * BATCH / 0.03
  assert max(rates.values()) < 3 * min(rates.values())
