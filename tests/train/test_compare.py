"""Several methods side by side: real runs, a table, a figure, going on after a stop, failures as rows."""

import json

import numpy as np
import pytest

from jaxmed import cli
from jaxmed.data.corpus.open import open_source
from jaxmed.evaluate.protocols.classify import Classify
from jaxmed.study import compare
from jaxmed.train.build.rundir import load_encoder
from tests.common import words
from tests.conftest import TINY

SMALL = words({k: v for k, v in TINY.items() if k not in ('method', 'model', 'steps', 'objective', 'loader')} | {
    'eval_every': 2, 'checkpoint_every': 4})


def run(corpus, out, *more, methods='mae,simclr', seeds=2):
  return cli.main(['compare', '--data', str(corpus), '--methods', methods, '--model', 'channel_vit_micro/8', '--label',
                   'tissue', '--out', str(out), '--samples', '32', '--seeds', str(seeds), *SMALL, *more])


@pytest.mark.parametrize('word', ['method=dino', 'mae:method=dino'])
def test_methods_are_named_in_one_place(corpus, tmp_path, capfd, word):
  assert run(corpus, tmp_path / 'c', word) == 2
  err = capfd.readouterr().err
  assert 'method=dino would take the place of a method of --methods mae,simclr' in err and err.count('\n') == 1
  assert not list(tmp_path.rglob('config.json'))


def test_a_comparison(corpus, tmp_path, capfd):
  out = tmp_path / 'c'
  assert run(corpus, out, 'mae:objective.decoder_depth=1', 'mae:objective.decoder_dim=32', '--json') == 0
  whole = json.loads(capfd.readouterr().out)
  assert [r['method'] for r in whole['rows']] == ['mae', 'simclr']
  assert [b['method'] for b in whole['baselines']] == ['pixels (PCA)']
  for row in whole['rows']:
    results = [json.loads((out / row['method'] / str(seed) / 'result.json').read_text()) for seed in (0, 1)]
    values = [r['scores']['knn accuracy']['value'] for r in results]
    score = row['scores']['knn accuracy']
    assert score['value'] == pytest.approx(np.mean(values))
    before = [r['untrained']['knn accuracy']['value'] for r in results]
    assert row['untrained']['knn accuracy']['value'] == pytest.approx(np.mean(before))
    assert score['high'] - score['value'] == pytest.approx(12.71 * np.std(values, ddof=1) / np.sqrt(2))
    assert row['seconds'] > 0 and row['images_per_second'] > 0 and 0.01 < row['memory_mb'] < 1000
    assert json.loads((out / row['method'] / '0' / 'config.json').read_text())['steps'] == 4
  assert (out / 'compare.png').stat().st_size > 5000
  table = (out / 'compare.md').read_text()
  assert table.count('\n') == 5 and '| simclr |' in table and '| pixels (PCA) |' in table
  assert f'] ({np.mean(before):.3f}) |' in table  # the last row's
  encoder = load_encoder(out / 'simclr' / '1')
  again = Classify().run(encoder.untrained(1), open_source(corpus), 'tissue', feature='cls', seed=1, pixels=False, draws=5)
  knn = next(r['metrics'] for r in again['rows'] if r['method'] == 'knn')
  assert knn['accuracy']['value'] == before[1]
  before = {p: p.stat().st_mtime_ns for p in out.rglob('result.json')}
  assert run(corpus, out, 'mae:objective.decoder_depth=1', 'mae:objective.decoder_dim=32') == 0  # nothing is run again
  assert {p: p.stat().st_mtime_ns for p in out.rglob('result.json')} == before


def test_a_run_that_fails_is_a_row(corpus, tmp_path, capfd, monkeypatch):
  train = compare.loop.train

  def failing(user, out, **kwargs):
    if user['method'] == 'simclr':
      out.mkdir(parents=True)
      (out / 'config.json').write_text('{}')
      raise compare.UserError('loss or gradient was not finite 10 steps in a row')
    return train(user, out, **kwargs)

  monkeypatch.setattr(compare.loop, 'train', failing)
  assert run(corpus, tmp_path / 'c', seeds=1) == 0
  assert '| simclr | failed: loss or gradient was not finite' in capfd.readouterr().out


@pytest.mark.parametrize('argv, words_', [
    (dict(methods='mae,simcrl'), ["'simcrl'", "'simclr'"]), (dict(methods='mae', seeds=0), ['--seeds'])])
def test_mistakes(corpus, tmp_path, capfd, argv, words_):
  assert run(corpus, tmp_path / 'c', **argv) == 2
  err = capfd.readouterr().err
  assert all(w in err for w in words_) and err.count('\n') == 1


def test_intervals():
  assert compare.interval([0.5]) == {'value': 0.5, 'low': None, 'high': None}
  from scipy import stats
  values = [0.4, 0.5, 0.65]
  low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
  got = compare.interval(values)
  assert (got['low'], got['high']) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
