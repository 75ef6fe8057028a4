"""Every kind of field through the pipeline: what it holds, in any number of processes, from any step on."""

import dataclasses
import itertools
import json
import threading
import types

import numpy as np
import pytest

from jaxmed import objectives
from jaxmed.contracts import FIELDS, KINDS, Field
from jaxmed.data.corpus import store
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import fields
from jaxmed.data.feed.pipeline import eval_batches, train_batches
from jaxmed.data.feed.texts import Texts
from jaxmed.data.feed.tokenizers import Tokenizer
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.resize import nearest
from jaxmed.errors import UserError
from jaxmed.train.build import assemble, data_spec

STEP = 50
COUNT = 14
TEXTS = ('', 'Größe', 'a long report')


def boxes_of(mask):
  """One box a label, as JSON."""
  rows = []
  for label in (1, 2):
    found = np.argwhere(mask == label)
    rows += [[*map(int, found.min(axis=0)), *map(int, found.max(axis=0) + 1)]] if len(found) else []
  return json.dumps(rows)


def write(root, grids):
  """Images that are STEP times their mask; every third record lacks each of the other fields."""
  rng = np.random.default_rng(0)
  (root / 'in').mkdir(parents=True)
  lines = [['path', 'split', 'kind', 'mask', 'text', 'signal', 'boxes']]
  for i, grid in enumerate(grids):
    mask = np.zeros(grid, np.uint8)
    for label in (1, 2):
      low = [int(rng.integers(0, n // 2)) for n in grid]
      mask[tuple(slice(a, a + n // 3) for a, n in zip(low, grid))] = label
    np.savez(root / 'in' / f'{i:02d}.npz', image=(mask * STEP)[..., None], channels=['x'])
    np.savez(root / 'in' / f'm{i:02d}.npz', image=mask[..., None], channels=['x'])
    np.save(root / 'in' / f's{i:02d}.npy', rng.normal(size=(3 + i, 2)))
    has = i % 3 > 0
    lines.append([f'{i:02d}.npz', 'train', 'ab'[i % 2], f'm{i:02d}.npz' if has else '', TEXTS[i % 3],
                  f's{i:02d}.npy' if has else '', boxes_of(mask) if has else ''])
  quoted = lambda cell: '"' + cell.replace('"', '""') + '"' if ',' in cell else cell
  (root / 't.csv').write_text('\n'.join(','.join(map(quoted, line)) for line in lines), encoding='utf-8')
  return root


def opened(root, out='c', **options):
  prepare([root / 'in'], root / out, table=root / 't.csv', progress=False, **options)
  return open_source(root / out)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return opened(write(tmp_path_factory.mktemp('f'), [(9 + i % 4, 12 + i % 5) for i in range(COUNT)]))


def wanted(source, size, **lengths):
  return fields.of_source(source, size, FIELDS, **({'text_length': 8, 'signal': (6, 2), 'boxes': 2} | lengths))


def take(source, count, size=(8, 10), **options):
  options = {'batch_size': 4, 'vocabulary': ('x',), 'seed': 3, 'fields': wanted(source, size)} | options
  return list(itertools.islice(train_batches(source, size=size, **options), count))


def test_kinds():
  assert {f.kind for f in fields.of(FIELDS, size=(4, 4), slots=1, dtype='uint8')} == set(KINDS)
  fills = [Field('x', kind, (), 'int32').fill for kind in KINDS]
  np.testing.assert_array_equal(fills, [0, -1, 0, 0, 0, -1, np.nan, -1, -1])
  with pytest.raises(UserError, match="unknown field of a record 'masks': did you mean 'mask'"):
    fields.of(('image', 'masks'), size=(4, 4), slots=1, dtype='uint8')


@pytest.mark.parametrize('fit', ['resize', 'crop'])
@pytest.mark.parametrize('processes, start', [(1, 3), (2, 0), (2, 3)])
def test_batches_do_not_depend_on_processes_or_start(source, fit, processes, start):
  whole = take(source, 5, fit=fit, threads=1)
  assert {k: (v.shape[1:], v.dtype.name) for k, v in whole[0].items()} == {
      f.name: (f.shape, f.dtype) for f in wanted(source, (8, 10))}
  parts = [take(source, 5 - start, fit=fit, start_step=start, process_index=p, process_count=processes)
           for p in range(processes)]
  for step in range(start, 5):
    for name, array in whole[step].items():
      np.testing.assert_array_equal(array, np.concatenate([part[step - start][name] for part in parts]), err_msg=name)


def test_what_a_batch_holds(source):
  for batch in take(source, 4):
    for k, i in enumerate(batch['index']):
      record = source[i]
      assert ('mask' in record) == ('signal' in record) == (i % 3 > 0)
      if i % 3 == 0:
        assert (batch['mask'][k] == -1).all() and (batch['boxes'][k] == -1).all()
        assert not batch['signal'][k].any() and not batch['signal_mask'][k].any() and not batch['text'][k].any()
        continue
      assert np.array_equal(batch['mask'][k], nearest(record['mask'], (8, 10)))
      steps = min(3 + i, 6)
      assert np.array_equal(batch['signal'][k, :steps], record['signal'][:6])
      assert not batch['signal'][k, steps:].any() and batch['signal_mask'][k].tolist() == [True] * steps + [False] * (6 - steps)
      ids = [b + 1 for b in TEXTS[i % 3].encode()][:8]
      assert batch['text'][k].tolist() == ids + [0] * (8 - len(ids))
      for row in batch['boxes'][k]:
        if (row >= 0).all():
          low, high = np.floor(row[:2]).astype(int), np.ceil(row[2:]).astype(int)
          part = batch['mask'][k][low[0]:high[0], low[1]:high[1]]
          assert (part > 0).any()
  own = take(source, 1, texts=Texts(tokenizer=Tokenizer(fill=7)))[0]
  assert any(row[-1] == 7 for row in own['text'])


@pytest.mark.parametrize('size', [(8, 10), (20, 9)])
def test_a_cropped_mask_is_on_its_image(source, size):
  """Also where a small image lies amid zeros: there the mask does not tell."""
  for batch in (*take(source, 5, size, fit='crop'), *eval_batches(source, batch_size=4, size=size, vocabulary=('x',), fit='crop',
                                                                 fields=wanted(source, size))):
    for k, i in enumerate(batch['index']):
      mask, image = batch['mask'][k], batch['image'][k, ..., 0]
      if i < 0:
        assert (mask == -1).all() and (batch['boxes'][k] == -1).all()
        continue
      if i % 3:
        assert np.array_equal(image[mask >= 0], mask[mask >= 0] * STEP)
        assert (mask == -1).sum() == max(0, size[0] - source[i]['mask'].shape[0]) * size[1]
        for row, label in zip(batch['boxes'][k], (1, 2)):
          found = np.argwhere(mask == label)
          if (row >= 0).all() and len(found):
            assert (row[:2] <= found.min(axis=0)).all() and (row[2:] >= found.max(axis=0) + 1).all()


def test_masks_in_bricks_are_read_by_windows(tmp_path, monkeypatch):
  root = write(tmp_path, [(6, 9, 8), (8, 10, 9), (7, 9, 9)])
  plain = opened(root, 'c', volumes='whole')
  monkeypatch.setattr(store, 'CHUNK_BYTES', 100)
  monkeypatch.setattr(store, 'EDGE', 4)
  bricks = opened(root, 'd', volumes='whole')
  assert list(root.glob('d/bricks-*'))
  for fit in ('resize', 'crop'):
    one, other = (take(s, 2, (5, 6, 7), fit=fit, batch_size=3)[1] for s in (plain, bricks))
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert (one['mask'] > 0).any()
  reads = []
  name = threading.get_ident  # batches above are still being read ahead by other threads
  monkeypatch.setattr(store, 'window', lambda *args, own=store.window: reads.append(name()) or own(*args))
  for wanted_pixels, count in (((), 0), (('image',), 1), (('image', 'mask'), 2)):  # what nobody wants is not read
    record = bricks.record(1, wanted_pixels)
    assert set(record) & {'image', 'mask'} == set(wanted_pixels) and reads.count(name()) == count
    reads.clear()
  part = bricks.cut(1, [2, 3, 4], [3, 3, 9])
  whole = plain[1]
  assert np.array_equal(part['image'], whole['image'][2:5, 3:6, 4:]) and np.array_equal(part['mask'], whole['mask'][2:5, 3:6, 4:])


def test_what_a_corpus_holds(source, corpus, monkeypatch):
  assert fields.held(source) == ('mask', 'text', 'signal', 'boxes')
  assert fields.held(open_source(corpus)) == ()
  spec = data_spec.describe(source, 'kind')
  assert (spec.holds, spec.signal, spec.boxes) == (('mask', 'text', 'signal', 'boxes'), (4, 2), 2)
  monkeypatch.setitem(objectives.METHODS, 'all', types.SimpleNamespace(FIELDS=FIELDS))
  loader = types.SimpleNamespace(load_size=(8, 10), fit='resize', text_length=8, signal_length=6, window=0)
  config = types.SimpleNamespace(method='all', loader=loader, batch_size=4)
  assert assemble.fields(config, dataclasses.replace(spec, masked=True)) == wanted(source, (8, 10))
  loader.signal_length, loader.window = 0, 3
  shapes = assemble.batch_shapes(config, spec)
  assert shapes['signal'].shape == (4, 3, 4, 2) and shapes['signal_mask'].shape == (4, 3, 4) and 'channel_mask' not in shapes
  assert fields.held(source.keep(np.arange(COUNT) % 3 == 0)) == ('text',)  # whose column is not looked at


def test_refusals(source):
  other = wanted(source, (8, 10), signal=(6, 3))
  with pytest.raises(UserError, match='has a signal of 2 channels, other records one of 3'):
    take(source, 1, fields=other)
  for value in ('[[1, 2, 3]]', 'x', '[[3, 3, 1, 1]]'):
    with pytest.raises(UserError, match=r'r has the boxes .*: expected \[\[start, ..., end, ...\], ...\], 4 numbers a box'):
      fields.parse_boxes(value, 2, 'r')
  assert fields.parse_boxes(None, 2, 'r').shape == fields.parse_boxes('', 2, 'r').shape == (0, 4)
  assert fields.parse_boxes([[0, 1, 2, 3]], 2, 'r').tolist() == [[0, 1, 2, 3]]
