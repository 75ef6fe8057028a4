"""Rows of a run that goes on."""

import json

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
