"""Crops that must show a class: stored places, who is forced, what is drawn, in any number of processes."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmed import config as config_lib
from jaxmed.data.corpus import labels, places, store
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import fields, foreground, pipeline
from jaxmed.data.feed.foreground import Foreground
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.train.build import resolve

SIZE = (4, 4, 4)
GRIDS = ((20, 18, 16), (12, 20, 9), (3, 16, 16), (14, 14, 14))


def cube(grid, values, seed):
  """A mask of background with a small cube of each class; of the first class a single voxel."""
  rng, mask = np.random.default_rng(seed), np.zeros(grid, np.uint8)
  for k, value in enumerate(values):
    low = [int(rng.integers(0, n - 2)) for n in grid]
    mask[tuple(slice(a, a + 1 + 2 * bool(k)) for a in low)] = value
  return mask


@pytest.fixture(scope='module')
def masks():
  return [cube(grid, values, k) for k, (grid, values) in enumerate(zip(GRIDS, ((1, 5), (5, 9), (), (1, 5, 9))))]


@pytest.fixture(scope='module')
def source(tmp_path_factory, masks):
  """Volumes whose voxels say where they lie: three channels of z, y, x."""
  root = tmp_path_factory.mktemp('f')
  (root / 'in').mkdir()
  for i, mask in enumerate(masks):
    np.savez(root / 'in' / f'{i}.npz', image=np.moveaxis(np.indices(mask.shape), 0, -1).astype(np.uint8) + 1,
             channels=['z', 'y', 'x'])
    np.savez(root / 'in' / f'm{i}.npz', image=mask[..., None], channels=['m'])
  pq.write_table(pa.table({'path': [f'{i}.npz' for i in range(4)], 'mask': [f'm{i}.npz' for i in range(4)],
                           'split': ['train'] * 4}), root / 't.parquet')
  prepare([root / 'in'], root / 'c', table=root / 't.parquet', volumes='whole', progress=False)
  return open_source(root / 'c')


def take(source, count, fraction=1.0, rule='exact', batch=4, **options):
  wanted = fields.of_source(source, SIZE, ('image', 'mask'))
  return list(itertools.islice(train_batches(
    source, batch_size=batch, size=SIZE, vocabulary=('z', 'y', 'x'), seed=2, fit='crop', fields=wanted,
    foreground=foreground.make(source, fraction, rule, batch), **options), count))


@pytest.mark.parametrize('batch, forced', [(2, 1), (3, 1), (4, 1), (6, 2), (8, 3), (12, 4), (24, 8)])
def test_slots_of_nnunet(batch, forced):
  """Forced samples of a batch at 33 %, as the official rule gives them when it is run: the last ones."""
  rule = Foreground(0.33, 'slots', batch)
  for step in (0, 7):
    found = [rule.forced(step * batch + k) for k in range(batch)]
    assert found == [False] * (batch - forced) + [True] * forced


@pytest.mark.parametrize('fraction', [0.33, 0.1, 0.5, 1.0, 0.07])
def test_exact_fraction(fraction):
  rule = Foreground(fraction, 'exact')
  counts = np.cumsum([rule.forced(n) for n in range(5000)])
  assert np.array_equal(counts, [round(n * round(fraction * 100)) // 100 for n in range(1, 5001)])
  late = 10**15
  assert sum(rule.forced(late + k) for k in range(100)) == round(100 * fraction)


def test_places():
  rng = np.random.default_rng(0)
  mask = rng.choice([-1, 0, 1, 2, 300], (60, 50, 40), p=[.1, .3, .3, .2999, .0001]).astype(np.int16)
  mask[:10][mask[:10] == 2] = 0
  data = places.drawn(mask, labels.counted(mask))
  found = places.parse(data)
  assert list(found) == [1, 2, 300] and places.drawn(mask, labels.counted(mask)) == data
  for value, own in found.items():
    every = np.flatnonzero(mask == value)
    assert len(own) == min(len(every), places.MOST) and (np.diff(own) > 0).all()
    assert (mask.ravel()[own] == value).all()
    # one of each of as many stretches of the class: its ranks are spread evenly
    ranks, edges = np.searchsorted(every, own), np.arange(len(own) + 1) * len(every) // len(own)
    assert ((ranks >= edges[:-1]) & (ranks < edges[1:])).all()
  inside = (np.searchsorted(np.flatnonzero(mask == 1), found[1]) % 36) / 36  # stretches of about 36 voxels
  assert abs(inside.mean() - 0.5) < 0.05 and len(np.unique(inside)) > 25
  assert places.parse(places.drawn(None, {})) == places.parse(places.drawn(np.zeros((2, 2), np.uint8), {0: 4})) == {}
  for damaged in (b'', data[:40], data[:-4]):
    with pytest.raises(ValueError, match='places'):
      places.parse(damaged)


def test_places_do_not_depend_on_slabs(monkeypatch):
  mask = np.random.default_rng(1).integers(0, 4, (31, 9, 8)).astype(np.uint8)
  whole = places.drawn(mask, labels.counted(mask))
  monkeypatch.setattr(labels, '_SLAB', 200)
  assert len(labels.slabs(mask)) > 10 and places.drawn(mask, labels.counted(mask)) == whole


def test_places_of_a_corpus(source, masks):
  for i, mask in enumerate(masks):
    found = source.places_of(i)
    assert list(found) == [v for v in np.unique(mask).tolist() if v]
    for value, own in found.items():
      assert np.array_equal(own, np.flatnonzero(mask == value))  # few enough: all of them


def test_forced_crops_show_a_class_in_their_centre(source, masks):
  seen = set()
  for batch in take(source, 30):
    for index, image, mask in zip(batch['index'].tolist(), batch['image'], batch['mask']):
      grid = masks[index].shape
      there = image[..., 0] > 0  # 0 is padding
      low = [int(image[..., a][there].min()) - 1 for a in range(3)]
      part = masks[index][tuple(slice(a, a + n) for a, n in zip(low, SIZE))]
      assert np.array_equal(mask[there], part.ravel()) and (mask[~there] == -1).all()
      if index == 2:
        continue
      # crops that were not moved back from a border have the place in their centre
      free = all(0 < a < n - s for a, n, s in zip(low, grid, SIZE))
      value = int(mask[2, 2, 2]) if free else -1
      assert not free or value > 0
      assert (part > 0).any()
      seen |= set(np.unique(part).tolist())
  assert {1, 5, 9} <= seen


def test_the_class_is_drawn_alike_whatever_its_size():
  found = {1: np.array([7]), 4: np.arange(100, 900), 9: np.array([], np.int64)}
  rng = np.random.default_rng(0)
  drawn = [foreground.centre(found, (10, 10, 10), rng) for _ in range(4000)]
  ones = sum(d == (0, 0, 7) for d in drawn)
  assert abs(ones - 2000) < 5 * math.sqrt(1000)
  rest = np.array([d for d in drawn if d != (0, 0, 7)]) @ (100, 10, 1)
  assert rest.min() >= 100 and rest.max() < 900 and abs(rest.mean() - 499.5) < 5 * 231 / math.sqrt(2000)
  assert foreground.centre({}, (2, 2), rng) is None
  assert foreground.start((0, 9, 5), (10, 10, 3), (4, 4, 4)) == [0, 6, 0]


def test_records_and_other_crops_are_the_same_at_any_fraction(source):
  plain, half = take(source, 6, fraction=0.1, rule='slots'), take(source, 6, fraction=0.5, rule='slots')
  for a, b in zip(plain, half):
    assert np.array_equal(a['index'], b['index'])
    assert np.array_equal(a['image'][:2], b['image'][:2])
  assert any(not np.array_equal(a['image'][2:], b['image'][2:]) for a, b in zip(plain, half))


def digest(batches):
  out = hashlib.sha256()
  for batch in batches:
    for name in sorted(batch):
      out.update(np.ascontiguousarray(batch[name]).tobytes())
  return out.hexdigest()


@pytest.mark.parametrize('rule', foreground.RULES)
def test_processes_and_resumption(source, rule):
  whole = take(source, 6, fraction=0.33, rule=rule, batch=4)
  for processes in (2, 4):
    parts = [take(source, 6, fraction=0.33, rule=rule, process_index=p, process_count=processes)
             for p in range(processes)]
    together = [{k: np.concatenate([part[s][k] for part in parts]) for k in whole[0]} for s in range(6)]
    assert digest(together) == digest(whole)
  assert digest(take(source, 3, fraction=0.33, rule=rule, start_step=3)) == digest(whole[3:])


def test_only_the_bricks_of_the_crop_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(store, 'CHUNK_BYTES', 1000)
  monkeypatch.setattr(store, 'EDGE', 8)
  (tmp_path / 'in').mkdir()
  mask = np.zeros((32, 32, 32), np.uint8)
  mask[18:20, 18:20, 18:20] = 3  # crops around it lie in one brick of the image and one of the mask
  for name, array in (('a', np.arange(32**3, dtype=np.uint16).reshape(mask.shape)), ('m', mask)):
    np.savez(tmp_path / 'in' / f'{name}.npz', image=array[..., None], channels=['z'])
  (tmp_path / 't.csv').write_text('path,mask,split\na.npz,m.npz,train\n')
  prepare([tmp_path / 'in'], tmp_path / 'c', table=tmp_path / 't.csv', volumes='whole', progress=False)
  source, read = open_source(tmp_path / 'c'), []
  own = store.Files.read
  monkeypatch.setattr(store.Files, 'read', lambda self, shard, rows: read.append(len(rows)) or own(self, shard, rows))
  crops, crop = [], pipeline._Elements.crop
  monkeypatch.setattr(pipeline._Elements, 'crop', lambda *args: crops.append(1) or crop(*args))
  wanted = fields.of_source(source, SIZE, ('image', 'mask'))
  batch = next(train_batches(source, batch_size=1, size=SIZE, vocabulary=('z',), seed=0, fit='crop', fields=wanted,
                             foreground=Foreground(1.0), threads=1, prefetch=1))
  most = 3 * len(crops)  # places, image and mask of each; the last crop may be read in part, ahead
  assert (batch['mask'] == 3).any() and {*read} == {1} and most - 3 < len(read) <= most


def test_refusals(source):
  with pytest.raises(UserError, match='loader.foreground is 1.5: expected a fraction'):
    Foreground(1.5)
  with pytest.raises(UserError, match="unknown loader.foreground_rule 'slot': did you mean 'slots'"):
    Foreground(0.5, 'slot')
  with pytest.raises(UserError, match='stores no places: prepare it'):
    foreground.make(dataclasses.replace(source, places={}), 0.3, 'slots', 2)
  for values in ({'foreground': 0.3}, {'foreground': 0.3, 'fit': 'crop', 'window': 2}):
    with pytest.raises(UserError, match='it needs loader.fit=crop and no loader.window'):
      resolve.check({'loader': values})
  assert config_lib.base().loader.foreground == 0
