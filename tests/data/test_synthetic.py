"""The synthetic corpus is what its docstring says: channels say nothing alone, pairs do, and it is stated as synthetic."""

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import synthetic
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError
from tests.data.test_prepare_table import content


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A tenth of the subjects."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(synthetic, 'SUBJECTS', {'train': 80, 'val': 10, 'test': 80})
    out = tmp_path_factory.mktemp('synthetic') / 'c'
    return prepare(['synthetic'], out, progress=False), open_source(out)


@pytest.fixture(scope='module')
def arrays(made):
  """{split: (images [N, 48, 48, C] float32, classes [N], statistics of each channel alone)}."""
  out = {}
  for split in ('train', 'test'):
    source = made[1].select(split)
    x = np.stack([r['image'] for r in source]).astype(np.float32)
    out[split] = x, source.codes('relation', synthetic.RELATIONS), [statistics(x[..., c]) for c in range(x.shape[-1])]
  return out


def correlation(a, b):
  """Circular correlation of two planes [N, H, W] by lag [N, H, W]."""
  unit = lambda x: (x - x.mean(axis=(1, 2), keepdims=True)) / x.std(axis=(1, 2), keepdims=True)
  return np.fft.ifft2(np.fft.fft2(unit(a)) * np.fft.fft2(unit(b)).conj()).real / a[0].size


def rings(both):
  """Means of correlations over rings of lags around 0: [N, 20]."""
  lag = np.abs((np.arange(both.shape[1]) + both.shape[1] // 2) % both.shape[1] - both.shape[1] // 2)
  radius = np.hypot(lag[:, None], lag).round().astype(int)
  return np.stack([both[:, radius == r].mean(axis=1) for r in range(20)], axis=1)


def statistics(x):
  """Of one plane [N, H, W]: moments, quantiles, autocorrelation, a coarse grid of means."""
  flat = x.reshape(len(x), -1).astype(np.float64)
  coarse = x.reshape(len(x), 4, 12, 4, 12).mean(axis=(2, 4)).reshape(len(x), -1)
  quantiles = np.sort(x.reshape(len(x), -1), axis=1)[:, [0, 230, 576, 1152, 1728, 2073, 2303]]
  moments = np.stack([flat.mean(axis=1), flat.std(axis=1), (flat**3).mean(axis=1)], axis=1)
  return np.concatenate([quantiles, moments, rings(correlation(x, x))[:, 1:], coarse], axis=1)


def of_pair(a, b):
  """Of two planes: rings of their correlation, and how far their total brightness lies from its middle."""
  total = sum(x.mean(axis=(1, 2)) / x.mean() + x.std(axis=(1, 2)) / x.std(axis=(1, 2)).mean() for x in (a, b))
  return np.concatenate([rings(correlation(a, b)), np.abs(total - np.median(total))[:, None]], axis=1)


def accuracy(arrays, names):
  """Of a ridge classifier, in closed form, on statistics of channels and of their pairs, standardised."""
  places = [synthetic.CHANNELS.index(n) for n in names]
  train, test = (np.concatenate([*(own[c] for c in places), *(
    of_pair(x[..., a], x[..., b]) for i, a in enumerate(places) for b in places[i + 1:])], axis=1)
    for x, _, own in (arrays['train'], arrays['test']))
  mean, std = train.mean(axis=0), train.std(axis=0) + 1e-9
  features = lambda values: np.concatenate([(values - mean) / std, np.ones((len(values), 1))], axis=1)
  x, target = features(train), np.eye(2)[arrays['train'][1]]
  weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ target)
  return np.mean((features(test) @ weights).argmax(axis=1) == arrays['test'][1])


def test_channels_alone_say_nothing_and_a_pair_does(arrays):
  chance = 0.5 + 4 * np.sqrt(0.25 / 480)  # four standard errors of 480 test images
  for name in synthetic.CHANNELS:
    assert accuracy(arrays, [name]) < chance, name
  for letter in 'AB':
    assert accuracy(arrays, [f'{letter}{k}' for k in (1, 2, 3)]) < chance
  assert accuracy(arrays, ['A1', 'B1']) > 0.85


def test_other_channels_say_it_again_less_and_less(arrays):
  found = [accuracy(arrays, [f'A{k}', f'B{k}']) for k in (1, 2, 3)]
  assert all(a > b + 0.03 for a, b in zip(found, found[1:])), found
  assert found[-1] > 0.5
  assert accuracy(arrays, ['A2', 'A3', 'B2', 'B3']) > found[2]


def test_marginals_are_equal_by_class(arrays):
  """Means and deviations of a channel differ between classes by no more than chance allows."""
  x, y, _ = arrays['train']
  for value in (x.mean(axis=(1, 2)), x.std(axis=(1, 2)), x.max(axis=(1, 2))):
    one, other = value[y == 0], value[y == 1]
    spread = value.std(axis=0) * np.sqrt(1 / len(one) + 1 / len(other))
    assert np.all(np.abs(one.mean(axis=0) - other.mean(axis=0)) < 4.5 * spread)


def test_corpus_says_that_it_is_synthetic(made):
  summary, source = made
  assert {k: v['records'] for k, v in summary['splits'].items()} == {'train': 480, 'val': 60, 'test': 480}
  assert source.channels == synthetic.CHANNELS
  rows = source.table.to_pylist()
  assert {(r['source'], r['path']) for r in rows} == {('synthetic', 'synthetic/seed-0')}
  card = (source.path / 'card.md').read_text()
  assert 'Synthetic: made by a generator (jaxmed.data.prepare.synthetic, seed 0), by no camera.' in card
  by_subject = {}
  for r in rows:
    by_subject.setdefault(r['subject'], []).append(r['relation'])
  assert all(sorted(v) == sorted(synthetic.RELATIONS * 3) for v in by_subject.values())
  pixels = np.stack([source[i]['image'] for i in range(0, 480, 40)])
  assert np.mean(pixels == 0) < 1e-2
  assert np.mean(pixels == 255) < 1e-2  # where blobs pile up


def test_seeds(made, tmp_path, monkeypatch):
  monkeypatch.setattr(synthetic, 'SUBJECTS', {'train': 80, 'val': 10, 'test': 80})
  prepare(['synthetic'], tmp_path / 'a', progress=False)
  assert content(tmp_path / 'a') == content(made[1].path)
  monkeypatch.setattr(synthetic, 'SUBJECTS', {'train': 2, 'val': 1, 'test': 1})
  prepare(['synthetic'], tmp_path / 'b', progress=False, seed=1)
  prepare(['synthetic'], tmp_path / 'c', progress=False)
  b, c = open_source(tmp_path / 'b'), open_source(tmp_path / 'c')
  assert 'seed 1' in (tmp_path / 'b/card.md').read_text()
  assert not set(b.table['sha256'].to_pylist()) & set(c.table['sha256'].to_pylist())
  assert np.array_equal(c[0]['image'], made[1][0]['image'])  # a subject does not depend on how many there are


def test_stands_alone(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="the synthetic corpus takes no .*: 'synthetic' stands alone"):
    prepare(['synthetic'], tmp_path / 'c', channels=('a',))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'synthetic').mkdir()
  with pytest.raises(UserError, match='synthetic is empty'):
    prepare(['synthetic'], tmp_path / 'c')


def test_blobs_are_on_a_torus():
  at = np.array([[1.0, 47.5]])
  plane = synthetic.blobs(at, np.ones(1), 2.0)
  assert np.allclose(plane, np.roll(synthetic.blobs(at + [10, -3], np.ones(1), 2.0), (-10, 3), axis=(0, 1)))
  assert np.allclose(plane, synthetic.blobs(at + 48, np.ones(1), 2.0))
  assert plane.sum() == pytest.approx(2 * np.pi * 4, rel=1e-3)


def test_a_dry_run_counts(made, monkeypatch, tmp_path):
  monkeypatch.setattr(synthetic, 'SUBJECTS', {'train': 80, 'val': 10, 'test': 80})
  found, summary = survey(['synthetic'], tmp_path / 'c'), made[0]
  assert (found['records'], found['subjects']) == (summary['records'], summary['subjects']) == (1020, 170)
  assert {k: {'records': v['items'], 'subjects': v['subjects']} for k, v in found['splits'].items()} == summary['splits']
  assert found['items'] == 1020
  assert not (tmp_path / 'c').exists()
