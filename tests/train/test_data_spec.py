"""What a run knows of its data is what a look at every row of the manifest says."""

import collections

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.errors import UserError
from jaxmed.train import loop
from jaxmed.train.build import data_spec
from tests.conftest import TINY


def plainly(source):
  """The same row by row, as lists."""
  rows = source.table.to_pylist()
  names, shapes = [r['channels'] for r in rows], [r['shape'] for r in rows]
  commonest = lambda values: dict(collections.Counter(sorted(values)).most_common(10))
  return {
    'vocabulary': tuple(dict.fromkeys(n for row in names for n in row)), 'slots': max(map(len, names)),
    'masked': len({len(n) for n in names}) > 1, 'mixed': len({tuple(n) for n in names}) > 1, 'rows': len(rows),
    'size': tuple(int(n) for n in np.median([s[:-1] for s in shapes], axis=0)),
    'summary': {
      'records': len(rows), 'subjects': len({r['subject'] for r in rows}),
      'sources': dict(collections.Counter(str(r['source']) for r in rows)),
      'channel_sets': commonest('+'.join(n) for n in names),
      'sizes': commonest('x'.join(map(str, s[:-1])) for s in shapes)}}


@pytest.fixture(scope='module')
def varied(tmp_path_factory):
  """Images of a dozen sizes and four channel sets."""
  from jaxmed.data.prepare.prepare import prepare
  root = tmp_path_factory.mktemp('varied')
  rng = np.random.default_rng(0)
  (root / 'in').mkdir()
  for i in range(31):
    channels = [['R', 'G'], ['G', 'R'], ['T1'], ['R', 'G', 'B']][i * i % 7 % 4]
    shape = (5 + i * 7 % 13, 6 + i % 3, len(channels))
    np.savez(root / 'in' / f's{i // 2}_{i}.npz', image=rng.integers(0, 255, shape).astype(np.uint8), channels=channels)
  prepare([root / 'in'], root / 'c', subject_pattern=r's(\d+)_', progress=False)
  return root / 'c'


def test_the_whole_manifest_is_told(varied, corpus, mixed_corpus):
  for place in (varied, corpus, mixed_corpus, f'{corpus},{mixed_corpus}'):
    for source in (open_source(place), open_source(place).select('train')):
      spec, wanted = data_spec.describe(source, ''), plainly(source)
      assert {key: getattr(spec, key) for key in wanted} == wanted
      for part in ('channel_sets', 'sizes'):
        assert list(spec.summary[part]) == list(wanted['summary'][part])


def test_nothing_to_train_on(varied):
  with pytest.raises(UserError, match='no record to train on'):
    data_spec.describe(open_source(varied).where({'source': ('in',)}, but=True), '')


@pytest.mark.parametrize('loader, message', [
    ({'fit': 'crop', 'load_size': 16, 'pad': False}, r's0_0.npz is 5x6, smaller than the crop of 16x16, and loader.pad=false: '
                                                     'set loader.load_size to at most 5x6'),
    ({'fit': 'resize', 'crops': 2}, 'loader.crops=2 cuts a record several times: it needs loader.fit=crop'),
    ({'fit': 'crop', 'crops': 3}, 'loader.crops=3 does not divide the 8 records'),
    ({'fit': 'crop', 'crops': 0}, 'loader.crops must be at least 1')])
def test_crops_that_cannot_be(varied, tmp_path, loader, message):
  with pytest.raises(UserError, match=message):
    loop.train(TINY | {'data': str(varied), 'loader': {'threads': 1} | loader}, tmp_path / 'run', quiet=True)


def test_crops_beyond_volumes_or_of_unlike_sides_are_told(tmp_path, capsys):
  from jaxmed.data.prepare.prepare import prepare
  from jaxmed.train.build import records
  (tmp_path / 'in').mkdir()
  for i, depth in enumerate((6, 20, 24)):
    np.savez(tmp_path / 'in' / f'{i}.npz', image=np.ones((depth, 24, 24, 1), np.int16), channels=['CT'],
             spacing=[5, 1, 1])
  prepare([tmp_path / 'in'], tmp_path / 'c', volumes='whole', splits=(1, 0, 0), progress=False)
  capsys.readouterr()
  source = open_source(tmp_path / 'c')
  records.tell_crops(source, (16, 16, 16))
  said = capsys.readouterr().err
  assert '1 of 3 volumes are smaller than the crop of 16x16x16: zeros lie around them' in said
  assert ('a crop of 16x16x16 voxels of 5x1x1 mm is 80x16x16 mm: 3x16x16 voxels have equal sides, or prepare with '
          '--spacing 1') in said
  records.tell_crops(source, (6, 16, 16))
  assert not capsys.readouterr().err
