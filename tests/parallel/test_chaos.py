"""Six disasters, and each run ends with the bits of one that was left in peace (tools/chaos.py does hundreds)."""

import json

import pytest

from jaxmed.errors import UserError
from tools import chaos

SIX = ('kill one', 'full disk', 'damage', 'shard', 'second owner', 'dead owner')  # test_elastic has terms


@pytest.mark.timeout(1200)  # on cores that others use
def test_six_disasters(corpus, tmp_path, capsys):
  out = tmp_path / 'chaos.jsonl'
  assert chaos.main(['--corpus', str(corpus), '--only', ','.join(SIX), '--rounds', '6', '--processes', '2', '--seed', '1',
                     '--out', str(out)]) == 0
  assert '6 disasters, 6 ended as they should' in capsys.readouterr().out
  results = [json.loads(line) for line in out.read_text().splitlines()]
  parts, ends = [r for r in results if 'what' in r], [r for r in results if 'differ' in r]
  assert [r['what'] for r in parts] == list(SIX)
  assert all(r['as_expected'] for r in parts), parts
  assert all(r['lost'] <= chaos.most_lost() for r in parts), parts
  second, dead = parts[-2:]
  assert set(second['second']) == {2} and second['codes'] == [0, 0] and second['reached'] == chaos.STEPS
  assert dead['next'] == [0, 0] and -9 in dead['codes']
  assert ends
  for end in ends:
    assert end['codes'] == [0, 0]
    assert end['rows'] and end['differ'] == 0 and end['values'] > 50_000, end


def test_a_mistake_is_told_at_once(corpus):
  with pytest.raises(UserError, match="unknown disaster 'kill two': did you mean 'kill one'"):
    chaos.main(['--corpus', str(corpus), '--only', 'kill two'])
  with pytest.raises(UserError, match='no-corpus'):
    chaos.main(['--corpus', 'no-corpus'])
