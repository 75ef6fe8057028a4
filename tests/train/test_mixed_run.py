"""A run on a mixture of corpora: shares, held-out rows, and the same records after a restart."""

import collections

import pytest

from jaxmed.errors import UserError
from jaxmed.train import loop
from jaxmed.train.build import rundir
from tests.common import record_indices, same, saved_state, start
from tests.conftest import TINY

MIXED = TINY | {'loader': {'threads': 1, 'balance': 'tissue', 'schedule': 'linear', 'subjects': 'balanced',
                           'weights': '0:colon=1,retina=0;0.5:colon=1,retina=3'}}


def test_a_mixture_goes_on_as_it_was(corpus, tmp_path, monkeypatch):
  seen = record_indices(monkeypatch)
  start(corpus, tmp_path / 'whole', MIXED, checkpoint={'keep_every': 5})
  first = dict(seen)
  config, _ = rundir.load_config(tmp_path / 'whole')
  assert config.loader.weights == MIXED['loader']['weights']
  from jaxmed.data.corpus.open import open_source
  tissue = open_source(corpus).select('train').table['tissue'].to_pylist()
  counts = [collections.Counter(tissue[i] for i in first[n]) for n in range(1, 21)]
  assert counts[0]['retina'] <= 1
  assert all(abs(c['retina'] - 6) <= 1 for c in counts[10:])
  seen.clear()
  with pytest.raises(Exception, match='SIGTERM'):
    record_indices(monkeypatch, stop_at=7)
    start(corpus, tmp_path / 'cut', MIXED)
  seen = record_indices(monkeypatch)
  loop.resume(tmp_path / 'cut', quiet=True)
  assert seen == {n: first[n] for n in seen}
  assert len(seen) >= 12
  same(saved_state(tmp_path / 'whole').params, saved_state(tmp_path / 'cut').params)


def test_two_corpora_and_rows_held_out(corpus, mixed_corpus, tmp_path):
  summary = start(f'{corpus},{mixed_corpus}', tmp_path / 'run', TINY, steps=2,
                  loader={'threads': 1, 'balance': 'dataset', 'alpha': 0.0, 'held_out': 'tissue=retina'})
  _, spec = rundir.load_config(tmp_path / 'run')
  assert summary['steps'] == 2
  assert spec.rows == 64
  assert spec.summary['sources']
  with pytest.raises(UserError, match="'retin': did you mean 'retina'"):
    start(corpus, tmp_path / 'bad', TINY, loader={'held_out': 'tissue=retin'})
  with pytest.raises(UserError, match='loader.balance'):
    start(corpus, tmp_path / 'bad', TINY, loader={'weights': 'colon=1'})
  assert not (tmp_path / 'bad').exists()
