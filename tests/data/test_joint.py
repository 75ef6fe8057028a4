"""Several corpora as one source: rows, subjects, statistics, mixtures; and what does not belong together."""

import itertools
import pickle
import shutil

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.feed.sampling import Mixture, make
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError


def corpus(root, name, count, channels, seed, shape=(6, 7), column='grade', volumes='slices'):
  rng = np.random.default_rng(seed)
  (root / name / 'in').mkdir(parents=True)
  images, lines = {}, [f'path,split,subject,{column}']
  for i in range(count):
    images[f'{i:02d}.npz'] = rng.integers(0, 100 + 40 * seed, (*shape, len(channels))).astype(np.uint8)
    np.savez(root / name / 'in' / f'{i:02d}.npz', image=images[f'{i:02d}.npz'], channels=channels)
    lines.append(f'{i:02d}.npz,{("train", "val")[i // 4 % 3 == 2]},p{i // 4},{i % 3}')
  (root / name / 't.csv').write_text('\n'.join(lines))
  prepare([root / name / 'in'], root / name / 'c', table=root / name / 't.csv', progress=False, volumes=volumes)
  return shutil.move(root / name / 'c', root / f'{name}-corpus'), images


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  root = tmp_path_factory.mktemp('joint')
  return corpus(root, 'a', 16, ['R', 'G'], 1), corpus(root, 'b', 8, ['G', 'T1'], 2)


def test_rows_are_those_of_both(two):
  (a, of_a), (b, of_b) = two
  both = open_source(f'{a},{b}')
  assert len(both) == 24
  assert both.datasets == ('a-corpus', 'b-corpus')
  assert both.table['dataset'].to_pylist() == ['a-corpus'] * 16 + ['b-corpus'] * 8
  assert both.channels == ('R', 'G', 'T1')
  assert both.table['subject'].to_pylist()[0] == 'a-corpus/p0'
  assert both.table['id'].to_pylist()[-1] == 'b-corpus/07.npz'
  images = [*of_a.values(), *of_b.values()]
  for source in (both, pickle.loads(pickle.dumps(both))):
    records = source.__getitems__([20, 3, 16, 15])
    for i, record in zip([20, 3, 16, 15], records):
      assert np.array_equal(record['image'], images[i])
  assert np.array_equal(both.window(21, (1, 2), (3, 4)), images[21][1:4, 2:6])
  val = both.select('val')
  assert val.table['id'].to_pylist() == [f'a-corpus/{i:02d}.npz' for i in range(8, 12)]
  assert np.array_equal(val[1]['image'], images[9])
  assert len(both.where({'dataset': ('b-corpus',)})) == 8


def test_statistics_are_those_of_all_pixels(two):
  (a, of_a), (b, of_b) = two
  both = open_source(f'{a},{b}')
  train = lambda images, c: [v[..., c].ravel() for i, v in enumerate(images.values()) if i // 4 % 3 != 2]
  for name, pixels in (('R', train(of_a, 0)), ('G', train(of_a, 1) + train(of_b, 0)), ('T1', train(of_b, 1))):
    pixels = np.concatenate(pixels).astype(np.float64)
    found = both.stats[name]
    assert found['count'] == pixels.size
    assert np.isclose(found['mean'], pixels.mean(), rtol=1e-12)
    assert np.isclose(found['std'], pixels.std(), rtol=1e-12)
    assert found['split'] == 'train'
    assert found['low'] < found['mean'] < found['high']


def test_mixed_batches(two):
  (a, _), (b, _) = two
  both = open_source(f'{a},{b}').select('train')
  sampler = make(both, Mixture(balance='dataset', weights='a-corpus=1,b-corpus=3'), 0)
  batches = list(itertools.islice(train_batches(both, batch_size=8, size=(6, 7), vocabulary=('T1', 'R', 'G'), seed=0, sampler=sampler), 5))
  for batch in batches:
    from_b = batch['index'] >= 12
    assert from_b.sum() == 6
    assert batch['channels'][from_b].tolist() == [[2, 0]] * 6
    assert batch['channels'][~from_b].tolist() == [[1, 2]] * 2
  for image, row in zip(batches[0]['image'], batches[0]['index']):
    assert np.array_equal(image, both[row]['image'])


def test_the_same_corpus_twice_and_one_alone(two):
  (a, _), _ = two
  assert open_source(f'{a},{a}').datasets == ('a-corpus', 'a-corpus-2')
  assert open_source(f'{a},').datasets == ()


def test_refusals(two, tmp_path):
  (a, _), _ = two
  with pytest.raises(UserError, match='nowhere does not exist'):
    open_source(f'{a},{tmp_path}/nowhere')
  other, _ = corpus(tmp_path, 'v', 2, ['R'], 1, shape=(4, 5, 6), volumes='whole')
  with pytest.raises(UserError, match='images and volumes cannot be trained on together: a-corpus of rank 2 and v-corpus of rank 3'):
    open_source(f'{a},{other}')
