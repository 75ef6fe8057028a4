"""Five disasters, and the run ends with the bits of one that was left in peace (tools/chaos.py does hundreds)."""

import importlib.util
import pathlib

import pytest

FIVE = ('kill one', 'full disk', 'damage', 'term one', 'shard')


@pytest.mark.timeout(900)  # on cores that others use
def test_five_disasters(corpus, tmp_path):
  file = pathlib.Path(__file__).parent.parent.parent / 'tools' / 'chaos.py'
  spec = importlib.util.spec_from_file_location('chaos', file)
  chaos = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(chaos)
  results = chaos.rounds(corpus, tmp_path, 5, seed=1, say=lambda line: None, disasters=FIVE, processes=2)
  parts, ends = [r for r in results if 'what' in r], [r for r in results if 'differ' in r]
  assert [r['what'] for r in parts] == list(FIVE)
  assert all(r['as_expected'] for r in parts), parts
  assert all(r['lost'] <= chaos.most_lost() for r in parts), parts
  assert ends
  for end in ends:
    assert end['codes'] == [0, 0]
    assert end['rows'] and end['differ'] == 0 and end['values'] > 50_000, end
