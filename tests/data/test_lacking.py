"""Records that lack channels in training: which ones, how many, and what batches and a run make of them."""

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import lacking
from jaxmed.data.feed.lacking import Lack
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.errors import UserError


def test_shares_are_exact_nested_and_spread():
  count = 10_000
  rows = {share: np.array([Lack(('a',), share).of(i) for i in range(count)]) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
  for share, found in rows.items():
    assert abs(found.mean() - share) < 1e-3
    for start in range(0, count, 100):  # as even in every stretch
      assert abs(found[start:start + 100].mean() - share) < 0.06
  assert all((a <= b).all() for a, b in zip(list(rows.values()), list(rows.values())[1:]))


def test_a_record_without_others_keeps_its_channels():
  lack = Lack(('a', 'b'), 1.0)
  assert lack.shown(3, ['a', 'c', 'b']) == [False, True, False]
  assert lack.shown(3, ['b', 'a']) == [True, True]
  assert Lack(('a',), 0.0).shown(3, ['a', 'c']) == [True, True]


def test_parse():
  assert lacking.parse('', 'ab') is None
  assert lacking.parse('GM, WM=0.5', ('T1', 'GM', 'WM')) == Lack(('GM', 'WM'), 0.5)
  assert lacking.parse('a=b=0.5', ('a=b', 'c')) == Lack(('a=b',), 0.5)
  for text, match in (('GM', r"loader.missing is 'GM': expected CHANNEL,CHANNEL=SHARE .* such as 'WM=0.5'"),
                      ('GM=2', 'a share of the records, 0 to 1'), ('GM=x', 'expected CHANNEL'), ('=0.5', 'expected CHANNEL'),
                      ('GN=0.5', "unknown channel in loader.missing 'GN': did you mean 'GM'"),
                      ('T1,GM,WM=0.1', 'leaves no channel: the corpus has T1, GM, WM')):
    with pytest.raises(UserError, match=match):
      lacking.parse(text, ('T1', 'GM', 'WM'))


def test_batches_do_not_depend_on_the_seed_and_keep_their_pixels(corpus):
  source = open_source(corpus).select('train')
  names = source.channels
  lack = Lack((names[0],), 0.5)
  seen = {}
  for seed in (0, 1):
    plain = train_batches(source, batch_size=8, size=(8, 8), vocabulary=names, seed=seed)
    batches = train_batches(source, batch_size=8, size=(8, 8), vocabulary=names, seed=seed, lack=lack)
    for _ in range(4):
      batch, whole = next(batches), next(plain)
      assert np.array_equal(batch['image'], whole['image'])
      assert np.array_equal(batch['index'], whole['index'])
      own = np.array(source.distinct('channels')[1], object)
      for i, mask, full, ids in zip(batch['index'], batch['channel_mask'], whole['channel_mask'], batch['channels']):
        others = [names[c] for c, there in zip(ids, full) if there and names[c] != names[0]]
        hidden = lack.of(int(i)) and bool(others)
        want = full & ~((ids == 0) & hidden)
        assert np.array_equal(mask, want)
        assert seen.setdefault(int(i), mask.tolist()) == mask.tolist()
      assert len(own)
  assert len({tuple(m) for m in seen.values()}) > 1


def counted(monkeypatch, place, name):
  """A list that grows by one with each call of a function of a module."""
  calls, real = [], getattr(place, name)
  monkeypatch.setattr(place, name, lambda *args: (calls.append(args), real(*args))[1])
  return calls


def test_a_run_knows_that_channels_are_missing(no_figures, corpus, tmp_path, monkeypatch):
  from jaxmed.train import loop
  from jaxmed.train.build import assemble, rundir
  from tests.conftest import SUPERVISED

  source = open_source(corpus).select('train', label='tissue')
  name = source.channels[0]
  user = SUPERVISED | {'steps': 2, 'data': str(corpus), 'model': 'vit_micro/8',
                       'loader': SUPERVISED['loader'] | {'missing': f'{name}=0.5'}}
  parsed, samplers = counted(monkeypatch, lacking, 'parse'), counted(monkeypatch, assemble, 'sampler')
  loop.train(user, tmp_path / 'run', quiet=True)
  assert len(parsed) == len(samplers) == 1
  config, spec = rundir.load_config(tmp_path / 'run')
  assert spec.masked
  assert spec.mixed
  assert config.loader.missing == f'{name}=0.5'
  with pytest.raises(UserError, match='unknown channel in loader.missing'):
    loop.train(user | {'loader': user['loader'] | {'missing': 'xyz=0.5'}}, tmp_path / 'other', quiet=True)
