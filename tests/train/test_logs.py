"""Rows of a run that goes on, and its speed, whose pauses do not count."""

import json

import pytest

from jaxmed.train import logs


def test_rows_after_the_checkpoint_go(tmp_path):
  """A run that was killed at step 7 goes on from its checkpoint of step 5, and a line was cut off."""
  rows = [{'step': n, 'loss': float(n)} for n in range(1, 8)] + [{'step': 5, 'val_loss': 0.5}]
  path = tmp_path / 'metrics.jsonl'
  path.write_text('\n'.join([*map(json.dumps, rows), '{"step": 7, "lo']))
  log = logs.Logs(tmp_path, 5, 10, 4, quiet=True)
  log.scalars(6, {'loss': 0.25})
  log.close()
  assert log.losses == [1, 2, 3, 4, 5]
  assert log.latest == {'loss': 5, 'val_loss': 0.5}
  assert logs.read_rows(path) == [*rows[:5], rows[-1], {'step': 6, 'loss': 0.25}]


def test_speed_is_that_since_the_last_call_without_pauses(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(logs.time, 'monotonic', lambda: now[0])

  def after(seconds):
    now[0] += seconds

  log = logs.Logs(tmp_path, 20, 100, 8, quiet=True, main=False)
  after(2)
  log.waited(0.5)
  log.pause()
  after(50)  # an evaluation
  log.go()
  after(2)
  assert log.speed(30) == {'images_per_second': pytest.approx(10 * 8 / 4), 'data_wait': pytest.approx(0.5 / 4)}
  after(1)
  assert log.speed(35) == {'images_per_second': pytest.approx(5 * 8 / 1), 'data_wait': 0}
