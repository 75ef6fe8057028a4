"""A source gives back what was prepared, and says what is wrong with a folder that is no corpus."""

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Twelve images [6, 5 + i, C]; classes of every third are unknown."""
  root = tmp_path_factory.mktemp('made')
  rng = np.random.default_rng(0)
  (root / 'in').mkdir()
  images, lines = [], ['path,split,source,finding,grade']
  for i in range(12):
    images.append(rng.integers(0, 4000, (6, 5 + i, 1 + i % 3)).astype(np.uint16))
    names = ['CT', 'PET', 'MR'][:1 + i % 3]
    np.savez(root / 'in' / f'{i:02d}.npz', image=images[-1], channels=names, spacing=[1.5, 2.0])
    lines.append(f'{i:02d}.npz,{("train", "test")[i % 4 == 3]},{("north", "south")[i > 8]},{("", "tumour", "clear")[i % 3]},{i // 4}')
  (root / 't.csv').write_text('\n'.join(lines))
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False)
  return root / 'c', images


@pytest.fixture
def copy(made, tmp_path):
  import shutil

  return shutil.copytree(made[0], tmp_path / 'copy')


def test_records_in_any_order_and_after_pickling(made):
  path, images = made
  source = open_source(path)
  assert len(source) == 12
  assert source.channels == ('CT', 'PET', 'MR')
  for i in range(12):
    record = source[i]
    assert np.array_equal(record['image'], images[i])
    assert record['image'].dtype == np.uint16
    assert record['id'] == f'{i:02d}.npz'
    assert record['spacing'] == [1.5, 2.0]
    said = {'shape': list(images[i].shape), 'dtype': 'uint16'}  # of every record, in the manifest too
    said |= {name: record[name] for name in ('id', 'subject', 'source', 'channels', 'spacing')}
    assert {name: source.table[name][i].as_py() for name in said} == said
  order = [11, 3, 3, 0, -1, np.int64(7)]
  for other in (source, pickle.loads(pickle.dumps(source))):
    assert [r['id'] for r in other.__getitems__(order)] == [f'{i % 12:02d}.npz' for i in order]
  with pytest.raises(IndexError):
    source[12]


def test_select(made):
  source = open_source(made[0])
  test = source.select('test')
  assert [r['id'] for r in test.table.to_pylist()] == ['03.npz', '07.npz', '11.npz']
  assert [test[i]['id'] for i in range(3)] == ['03.npz', '07.npz', '11.npz']
  known = source.select('train', label='finding')
  assert known.table['id'].to_pylist() == [f'{i:02d}.npz' for i in (1, 2, 4, 5, 8, 10)]
  assert known[3]['id'] == '05.npz'
  assert len(source.select('val')) == 0
  assert source.select(label='finding').select('test').table['id'].to_pylist() == ['07.npz', '11.npz']
  with pytest.raises(UserError, match="'findings': did you mean 'finding'"):
    source.select('train', label='findings')
  with pytest.raises(UserError, match="'tain': did you mean 'train'"):
    source.select('tain')
  assert source.select('train', sources=['south']).table['id'].to_pylist() == ['09.npz', '10.npz']
  assert len(source.select(sources=['south', 'north'])) == 12
  with pytest.raises(UserError, match="'nort': did you mean 'north'"):
    source.select(sources=['south', 'nort'])


def test_classes_and_codes(made):
  source = open_source(made[0])
  assert source.classes('finding') == ('clear', 'tumour')
  assert source.classes('grade') == ('0', '1', '2')
  assert source.codes('finding', ('clear', 'tumour')).tolist() == [-1, 1, 0] * 4
  assert source.codes('grade', ('2', '1', '0')).tolist() == [2] * 4 + [1] * 4 + [0] * 4
  with pytest.raises(UserError, match="'tumour': did you mean 'tumor'"):
    source.codes('finding', ('clear', 'tumor'))
  with pytest.raises(UserError, match='cannot be a label'):
    source.classes('shape')


def test_what_is_no_corpus(tmp_path, made):
  with pytest.raises(UserError, match='none does not exist: expected a corpus'):
    open_source(tmp_path / 'none')
  with pytest.raises(UserError, match=r'is no corpus: it has no manifest.parquet'):
    open_source(tmp_path)


def test_damaged_manifest(copy):
  data = (copy / 'manifest.parquet').read_bytes()
  for damaged in (b'', data[:len(data) // 2]):
    (copy / 'manifest.parquet').write_bytes(damaged)
    with pytest.raises(UserError, match=r'manifest.parquet is damaged'):
      open_source(copy)
  table = pq.read_table(__import__('io').BytesIO(data))
  pq.write_table(table.drop_columns(['sha256']), copy / 'manifest.parquet')
  with pytest.raises(UserError, match="no column 'sha256'"):
    open_source(copy)
  pq.write_table(table.slice(1), copy / 'manifest.parquet')
  with pytest.raises(UserError, match='is damaged: the manifest has'):
    open_source(copy)


def test_damaged_metadata_and_shards(copy):
  info = (copy / 'dataset_info.json').read_text()
  (copy / 'dataset_info.json').write_text(info[:50])
  with pytest.raises(UserError, match='damaged metadata'):
    open_source(copy)
  (copy / 'dataset_info.json').write_text(info)
  (copy / 'stats.json').write_text('{')
  with pytest.raises(UserError, match=r'stats.json as JSON'):
    open_source(copy)
  (copy / 'stats.json').write_text('{}')
  shard = copy / 'corpus-test.array_record-00000-of-00001'
  data = shard.read_bytes()
  shard.write_bytes(data[:len(data) // 2])
  with pytest.raises(UserError, match='damaged shard of split test') as e:
    open_source(copy).select('test')[0]
  assert '\n' not in str(e.value)
  shard.unlink()
  with pytest.raises(UserError, match=f'lacks the shard {shard.name}'):
    open_source(copy)


def test_a_corpus_whose_place_is_no_utf8_is_one_line(tmp_path):
  with pytest.raises(UserError, match='is no UTF-8.*: move it'):
    open_source(tmp_path / 'd\udcfc')
