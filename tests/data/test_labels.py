"""What the values of masks mean: columns that `prepare` writes, labels.json, and which classes a record annotates."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmed.data.corpus import labels
from jaxmed.data.corpus.labels import Labels, labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import fields
from jaxmed.data.feed.pipeline import eval_batches, train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError

GRID = (6, 7)


def write(root, masks, annotated=None, splits=None):
  """Images with masks, and a Parquet table of them."""
  (root / 'in').mkdir(parents=True)
  for i, mask in enumerate(masks):
    np.savez(root / 'in' / f'{i}.npz', image=np.full((*GRID, 1), i, np.uint8), channels=['x'])
    if mask is not None:
      np.savez(root / 'in' / f'm{i}.npz', image=np.asarray(mask)[..., None], channels=['x'])
  table = {'path': [f'{i}.npz' for i in range(len(masks))], 'split': splits or ['train'] * len(masks),
           'mask': [None if m is None else f'm{i}.npz' for i, m in enumerate(masks)]}
  if annotated:
    table['annotated'] = annotated
  pq.write_table(pa.table(table), root / 't.parquet')
  return root


def run(root, out='c', **options):
  prepare([root / 'in'], root / out, table=root / 't.parquet', progress=False, **options)
  return open_source(root / out)


def masks(count=4, seed=0, values=(0, 1, 5), dtype=np.int16):
  rng = np.random.default_rng(seed)
  return [rng.choice(values, GRID).astype(dtype) for _ in range(count)]


def test_counted():
  rng = np.random.default_rng(0)
  for mask in (rng.integers(-1, 9, (40, 50, 60)).astype(np.int32), rng.choice([0, 1 << 20], (9, 5)),
               np.zeros((1, 1), np.uint8), rng.integers(0, 3, (5, 1 << 21), np.uint8)):
    values, counts = np.unique(mask, return_counts=True)
    assert labels.counted(mask) == dict(zip(values.tolist(), counts.tolist()))
    assert list(labels.counted(mask)) == values.tolist()


def test_columns_and_names(tmp_path):
  found = [*masks(), None]
  found[0][0, 0] = -1
  (tmp_path / 'names.json').write_text(json.dumps({'lesion': 5, 'liver': 1, 'spleen': 9}))
  source = run(write(tmp_path, found), labels=tmp_path / 'names.json')
  for i, mask in enumerate(found):
    row = source.table.slice(i, 1).to_pylist()[0]
    if mask is None:
      assert row['mask_values'] is None and row['mask_voxels'] is None
    else:
      values, counts = np.unique(mask, return_counts=True)
      assert (row['mask_values'], row['mask_voxels']) == (values.tolist(), counts.tolist())
  assert json.loads((tmp_path / 'c' / 'labels.json').read_text()) == {
    '0': 'background', '1': 'liver', '5': 'lesion', '9': 'spleen'}
  assert labels_of(source) == Labels((0, 1, 5, 9), ('background', 'liver', 'lesion', 'spleen'))
  assert labels_of(source.select('train')) == labels_of(source)


def test_without_names_values_are_those_of_the_masks(tmp_path, capsys):
  source = run(write(tmp_path, masks(values=(0, 3, 200))))
  assert labels_of(source) == Labels((0, 3, 200), ('0', '3', '200'))
  assert capsys.readouterr().err == ''
  path = tmp_path / 'c' / 'manifest.parquet'  # as an earlier version wrote it
  pq.write_table(pq.read_table(path).drop_columns(list(labels.COLUMNS)), path)
  assert labels_of(open_source(tmp_path / 'c')) == labels_of(source)
  assert '4 of 4 masks are read' in capsys.readouterr().err
  path = write(tmp_path / 'b', [None]) / 'in' / '0.npz'
  prepare([path], tmp_path / 'd', progress=False, splits=(1, 0, 0))
  with pytest.raises(UserError, match='has no masks: expected a corpus'):
    labels_of(open_source(tmp_path / 'd'))


def test_several_corpora(tmp_path):
  for name, words in (('a', {'1': 'liver'}), ('b', {'1': 'liver', '2': 'spleen'}), ('c', {'1': 'spleen'})):
    root = write(tmp_path / name, masks(values=(0, 1)))
    (root / 'n.json').write_text(json.dumps(words))
    run(root, name, labels=root / 'n.json')
  run(write(tmp_path / 'd', masks(values=(0, 1, 4))), 'd')
  joined = lambda *names: labels_of(open_source(','.join(str(tmp_path / n / n) for n in names)))
  assert joined('a', 'b') == Labels((0, 1, 2), ('background', 'liver', 'spleen'))
  assert joined('a', 'd') == Labels((0, 1, 4), ('background', 'liver', '4'))
  with pytest.raises(UserError, match="value 1 of masks is 'spleen' in c, 'liver' in another corpus"):
    joined('a', 'c')


@pytest.mark.parametrize('processes', [1, 2])
def test_annotated(tmp_path, processes):
  told = [None, [0, 1], [5], None]
  source = run(write(tmp_path, masks(), annotated=told))
  wanted = fields.of_source(source, GRID, ('image', 'mask', 'annotated'), labels=3)
  assert fields.shapes(wanted, 2)['annotated'] == ((2, 3), np.dtype(bool))
  options = dict(batch_size=4, size=GRID, vocabulary=('x',), fields=wanted, labels=(0, 1, 5))
  expected = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]], bool)
  for p in range(processes):
    for batch in itertools.islice(train_batches(source, seed=1, process_index=p, process_count=processes, **options), 3):
      assert np.array_equal(batch['annotated'], expected[batch['index']])
  last = list(eval_batches(source, **options | {'batch_size': 3}))[-1]
  assert last['index'].tolist() == [3, -1, -1] and last['annotated'].tolist() == [[True] * 3, [False] * 3, [False] * 3]
  with pytest.raises(UserError, match=r'annotated \[5\], but 5 is no class of its masks: choose among 0, 1'):
    next(train_batches(source, seed=1, **options | {'labels': (0, 1)}))


def test_annotated_as_text():
  assert fields.parse_annotated('[0, 2]', 'r') == [0, 2] and fields.parse_annotated('', 'r') is None
  for value in ('liver', '[]', '["a"]', [0.5], '3'):
    with pytest.raises(UserError, match='r has annotated .*: expected a list of values of masks'):
      fields.parse_annotated(value, 'r')


@pytest.mark.parametrize('change, message', [
  (lambda m: m * 0.5, '0.npz: mask: its values are no integers'),
  (lambda m: m - 3, '0.npz: mask: holds the value -3: expected 0 and more, or -1'),
  (lambda m: m * 2, '0.npz: mask: holds the value 2, which the labels do not name: expected 0, 1, 5'),
  (lambda m: m[1:], r'0.npz: mask: its grid is \[5, 7\], that of the image \[6, 7\]'),
])
def test_refused_masks(tmp_path, change, message):
  found = masks()
  found[0][0, :3] = (0, 1, 5)
  found[0] = change(found[0])
  (tmp_path / 'n.json').write_text('{"0": "none", "1": "a", "5": "b"}')
  with pytest.raises(UserError, match=message):
    run(write(tmp_path, found), labels=tmp_path / 'n.json')


@pytest.mark.parametrize('content, message', [
  ('[]', 'must be JSON of the form'), ('{"a": "b"}', "must be JSON of the form .*; 'a' has 'b'"),
  ('{"1": "a", "2": "a"}', "gives the name 'a' to the values 1 and 2"),
  ('{"a": 1, "b": 1}', "names the value 1 twice: 'a' and 'b'"), ('{"-2": "a"}', "names the value -2 \\('a'\\)"),
])
def test_refused_names(tmp_path, content, message):
  (tmp_path / 'n.json').write_text(content)
  with pytest.raises(UserError, match=message):
    labels.read(tmp_path / 'n.json')


def test_a_class_that_train_lacks(tmp_path, capsys):
  found = masks(values=(0, 1))
  found[3][0, 0] = 7
  (tmp_path / 'n.json').write_text('{"1": "a", "7": "b", "8": "c"}')
  run(write(tmp_path, found, splits=['train', 'train', 'val', 'test']), labels=tmp_path / 'n.json')
  assert 'no mask of split train holds 7 (b), 8 (c): nothing can be learned of them' in capsys.readouterr().err
