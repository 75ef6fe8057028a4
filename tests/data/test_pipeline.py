"""Batches are a function of (seed, step) alone, whoever reads them and wherever reading starts."""

import itertools
import shutil

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import eval_batches, train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.resize import resize
from jaxmed.errors import UserError

NAMES = ('a', 'b', 'c')
VOCABULARY = ('z', 'c', 'a', 'b')


def corpus(root, shapes, dtypes=(np.uint8,), volumes='slices'):
  rng = np.random.default_rng(0)
  (root / 'in').mkdir(parents=True)
  lines = ['path,split,kind']
  for i, shape in enumerate(shapes):
    image = rng.integers(1, 255, shape).astype(dtypes[i % len(dtypes)])
    np.savez(root / 'in' / f'{i:02d}.npz', image=image, channels=NAMES[:shape[-1]])
    lines.append(f'{i:02d}.npz,train,{("", "x", "y")[i % 3]}')
  (root / 't.csv').write_text('\n'.join(lines))
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False, volumes=volumes)
  return open_source(root / 'c')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return corpus(tmp_path_factory.mktemp('s'), [(9 + i % 4, 8 + i % 5, 1 + i % 3) for i in range(22)])


def take(count, **options):
  options = {'batch_size': 8, 'size': (6, 7), 'vocabulary': VOCABULARY, 'seed': 3, 'label': 'kind'} | options
  return list(itertools.islice(train_batches(options.pop('source'), **options), count))


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype, key
    assert np.array_equal(a[key], b[key]), key


@pytest.mark.parametrize('fit', ['resize', 'crop'])
@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('start', [0, 3])
def test_global_batch_does_not_depend_on_processes_or_start(source, fit, processes, start):
  whole = take(7, source=source, fit=fit, threads=1)
  parts = [take(7 - start, source=source, fit=fit, start_step=start, process_index=p, process_count=processes,
                threads=2) for p in range(processes)]
  for step in range(start, 7):
    local = [part[step - start] for part in parts]
    equal(whole[step], {k: np.concatenate([b[k] for b in local]) for k in local[0]})


def test_one_element_a_process(source):
  whole = take(2, source=source, batch_size=8)
  parts = [take(2, source=source, batch_size=8, process_index=p, process_count=8) for p in range(8)]
  for step in range(2):
    equal(whole[step], {k: np.concatenate([part[step][k] for part in parts]) for k in whole[step]})


def test_every_epoch_is_a_permutation_of_its_own(source):
  rows = np.concatenate([b['index'] for b in take(11, source=source)])  # 88 elements are four epochs of 22
  epochs = rows.reshape(4, 22)
  assert (np.sort(epochs) == np.arange(22)).all()
  assert len({tuple(e) for e in epochs}) == 4
  assert not (epochs[0] == np.arange(22)).all()
  other = np.concatenate([b['index'] for b in take(11, source=source, seed=4)])
  assert (rows != other).mean() > 0.8


def test_content_of_a_batch(source):
  [batch] = take(1, source=source)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'image': ((8, 6, 7, 3), 'uint8'), 'channels': ((8, 3), 'int32'), 'channel_mask': ((8, 3), 'bool'),
    'label': ((8,), 'int32'), 'index': ((8,), 'int32')}
  for k, row in enumerate(batch['index']):
    count = 1 + row % 3
    image = source[row]['image']
    assert np.array_equal(batch['image'][k, ..., :count], resize(image, (6, 7)))
    assert not batch['image'][k, ..., count:].any()
    assert batch['channels'][k].tolist() == [2, 3, 1][:count] + [0] * (3 - count)
    assert batch['channel_mask'][k].tolist() == [True] * count + [False] * (3 - count)
    assert batch['label'][k] == (-1, 0, 1)[row % 3]
  assert (take(1, source=source, label=None)[0]['label'] == -1).all()
  swapped = take(1, source=source, classes=('y', 'x'))[0]['label']
  assert np.array_equal(swapped, np.where(batch['label'] < 0, -1, 1 - batch['label']))


def test_crops_are_windows_at_every_place(source):
  seen = set()
  for batch in take(60, source=source, fit='crop'):
    for image, row in zip(batch['image'], batch['index']):
      full = source[row]['image']
      h, w, c = full.shape
      places = [(y, x) for y in range(h - 5) for x in range(w - 6) if np.array_equal(full[y:y + 6, x:x + 7],
                                                                                     image[..., :c])]
      assert len(places) == 1
      if row == 3:
        seen.add(places[0])
  # Row 3 is 12 x 11: 35 places, of which some 22 draws hit about 16.
  assert len(seen) > 10
  assert {y for y, _ in seen} == set(range(7))
  assert {x for _, x in seen} == set(range(5))


def test_crop_of_a_smaller_image_lies_amid_zeros(source):
  [batch] = take(1, source=source, fit='crop', size=(20, 7))
  for image, row in zip(batch['image'], batch['index']):
    h, _, c = source[row]['image'].shape
    top = (20 - h) // 2
    assert image[top:top + h, :, :c].all()
    assert not image[:top].any()
    assert not image[top + h:].any()


@pytest.mark.parametrize('fit', ['resize', 'crop'])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_evaluation_sees_every_row_once(source, fit, processes):
  options = {'batch_size': 8, 'size': (6, 7), 'vocabulary': VOCABULARY, 'label': 'kind', 'fit': fit}
  parts = [list(eval_batches(source, **options, process_index=p, process_count=processes))
           for p in range(processes)]
  assert [len(p) for p in parts] == [3] * processes
  joined = {k: np.concatenate([b[k] for step in zip(*parts) for b in step]) for k in parts[0][0]}
  assert joined['index'].tolist() == [*range(22), -1, -1]
  assert joined['label'].tolist() == [(-1, 0, 1)[i % 3] for i in range(22)] + [-1, -1]
  assert not joined['image'][22:].any()
  assert not joined['channel_mask'][22:].any()
  full = source[5]['image']
  expected = resize(full, (6, 7)) if fit == 'resize' else full[2:8, 0:7]  # 10 x 8: spare 4 and 1
  assert np.array_equal(joined['image'][5], expected)


def test_a_class_that_training_lacks_is_no_label_of_evaluation(source):
  """A subset of few subjects may lack one; a held-out row of it has a loss all the same."""
  options = {'batch_size': 22, 'size': (6, 7), 'vocabulary': VOCABULARY, 'label': 'kind', 'classes': ('y',)}
  [batch] = eval_batches(source, **options)
  assert batch['label'].tolist() == [(-1, -1, 0)[i % 3] for i in range(22)]
  with pytest.raises(UserError, match="value of column 'kind'.*'x'"):
    take(1, source=source, classes=('y',))


def test_volumes(tmp_path):
  source = corpus(tmp_path, [(5, 9, 8, 2), (7, 9, 8, 1)], volumes='whole')
  batch = take(1, source=source, size=(4, 6, 6), batch_size=4)[0]
  assert batch['image'].shape == (4, 4, 6, 6, 2)
  for image, row in zip(batch['image'], batch['index']):
    full = source[row]['image']
    assert np.array_equal(image[..., :full.shape[-1]], resize(full, (4, 6, 6)))
  with pytest.raises(UserError, match=r'size 6x6 has rank 2, but 00.npz in .* is 5x9x8 of rank 3'):
    take(1, source=source, size=(6, 6))


@pytest.mark.parametrize('dtypes, expected', [((np.uint16,), 'uint16'), ((np.int16,), 'int16'),
                                              ((np.uint8, np.uint16), 'float32'), ((np.int32,), 'float32'),
                                              ((np.float32,), 'float32')])
def test_type_of_images(tmp_path, dtypes, expected):
  source = corpus(tmp_path, [(6, 7, 1)] * 4, dtypes)
  batch = take(1, source=source, batch_size=4)[0]
  assert batch['image'].dtype == expected
  for image, row in zip(batch['image'], batch['index']):
    assert np.array_equal(image, source[row]['image'].astype(expected))


def test_a_damaged_shard_ends_reading_with_one_line(source, tmp_path):
  copy = shutil.copytree(source.path, tmp_path / 'c')
  shard = copy / 'corpus-train.array_record-00000-of-00001'
  damaged = bytearray(shard.read_bytes())
  at = next(i for i in range(1000, len(damaged)) if all(damaged[i:i + 8]))  # within a record, not the padding
  damaged[at:at + 8] = bytes(8)
  shard.write_bytes(damaged)
  with pytest.raises(UserError, match='damaged shard of split train'):
    take(12, source=open_source(copy))


def test_refusals(source):
  for options, match in (
    ({'vocabulary': ('a', 'bb', 'c')}, "channel of .* 'b': did you mean 'bb'"),
    ({'label': 'kin'}, "'kin': did you mean 'kind'"),
    ({'classes': ('x', 'yy')}, "'y': did you mean 'yy'"),
    ({'size': (6, 7, 8)}, 'size 6x7x8 has rank 3, but 00.npz'),
    ({'size': (0, 7)}, 'expected positive'),
    ({'fit': 'crops'}, "did you mean 'crop'"),
    ({'batch_size': 9, 'process_count': 2}, 'batch_size 9 is not divisible by 2 processes'),
    ({'batch_size': 0}, 'batch_size 0'),
    ({'process_index': 2, 'process_count': 2}, 'process 2 is not one of 2'),
    ({'source': source.select('val')}, 'no records in this selection'),
  ):
    with pytest.raises(UserError, match=match) as e:
      take(1, **{'source': source} | options)
    assert '\n' not in str(e.value)
