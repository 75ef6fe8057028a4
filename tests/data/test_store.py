"""Volumes in bricks: the same voxels, and only the bytes that a window touches."""

import itertools
import pickle

import numpy as np
import pytest

from jaxmed.data.corpus import store
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import elements, eval_batches, train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError

NAMES = ('a', 'b')


@pytest.fixture(scope='module')
def volumes():
  """Volumes [D, H, W, C] of several types; the first is small enough to be kept in its record."""
  rng = np.random.default_rng(0)
  shapes = [(5, 6, 7, 1), (40, 41, 70, 1), (33, 64, 32, 2), (50, 20, 90, 1)]
  types = [np.int16, np.int16, np.float32, np.uint8]
  return [rng.integers(0, 200, s).cumsum(0).astype(t) for s, t in zip(shapes, types)]


def made(root, volumes, monkeypatch, **sizes):
  (root / 'in').mkdir(parents=True)
  for i, volume in enumerate(volumes):
    np.savez(root / 'in' / f'{i:02d}.npz', image=volume, channels=NAMES[:volume.shape[-1]], spacing=[2, 1, 1])
  with monkeypatch.context() as patch:
    for name, value in sizes.items():
      patch.setattr(store, name, value)
    prepare([root / 'in'], root / 'c', volumes='whole', splits=(1, 0, 0), progress=False)
  return open_source(root / 'c')


@pytest.fixture(scope='module')
def sources(volumes, tmp_path_factory):
  """The volumes in bricks of 32, and whole."""
  patch = pytest.MonkeyPatch()
  yield (made(tmp_path_factory.mktemp('bricks'), volumes, patch, CHUNK_BYTES=20_000, EDGE=32),
         made(tmp_path_factory.mktemp('whole'), volumes, patch))
  patch.undo()


@pytest.mark.parametrize('dtype', ['uint8', 'int16', 'uint16', 'int32', 'float32'])
def test_bricks_come_back(dtype):
  rng = np.random.default_rng(0)
  brick = rng.normal(0, 1e4, (3, 5, 7, 2)).astype(dtype)
  brick[0, 0, 0] = np.iinfo(dtype).min if np.dtype(dtype).kind in 'iu' else -0.0
  data = store.encode(brick)
  back = store.decode(data, brick.shape, np.dtype(dtype))
  assert back.dtype == brick.dtype
  assert back.tobytes() == brick.tobytes()
  for damaged in (data[:-3], data + data, b''):
    with pytest.raises(ValueError, match='damaged'):
      store.decode(damaged, brick.shape, np.dtype(dtype))


def test_bricks_of_earlier_versions_are_read():
  """zstd of bytes stored apart, all low ones first, of differences along the second axis, wrapping."""
  import imagecodecs

  brick = np.random.default_rng(0).normal(0, 1e4, (3, 5, 7, 2)).astype(np.int16)
  steps = brick.view('<u2').copy()
  steps[:, 1:] -= brick.view('<u2')[:, :-1]
  data = bytes(imagecodecs.zstd_encode(np.stack([steps & 255, steps >> 8]).astype(np.uint8).tobytes(), level=1))
  assert np.array_equal(store.decode(data, brick.shape, brick.dtype), brick)
  with pytest.raises(ValueError, match='damaged'):
    store.decode(data[:-3], brick.shape, brick.dtype)


def test_smooth_volumes_are_packed_well():
  z, y, x = np.ogrid[:32, :32, :32]
  brick = (1000 + 20 * z + 30 * y + 10 * x).astype(np.int16)[..., None]
  assert len(store.encode(brick)) < brick.nbytes / 20


def test_records_are_the_same(volumes, sources, tmp_path):
  bricks, whole = sources
  assert bricks.table.equals(whole.table)
  names = sorted(p.name for p in bricks.path.iterdir() if 'bricks' in p.name)
  assert names == ['bricks-train-00000-of-00001.array_record']
  for source in (bricks, pickle.loads(pickle.dumps(bricks))):
    for i, record in enumerate(source.__getitems__([0, 1, 2, 3])):
      assert np.array_equal(record['image'], volumes[i])
      assert record['image'].dtype == volumes[i].dtype
      assert not record['image'].flags.writeable
      assert record.keys() == whole[i].keys()
      assert record['spacing'] == [2.0, 1.0, 1.0]


def test_tfds_reads_a_corpus_with_bricks(sources, volumes):
  import tensorflow_datasets as tfds

  data = tfds.builder_from_directory(sources[0].path).as_data_source(split='train')
  assert len(data) == 4
  first = 0
  for example, volume in zip(data, volumes):
    assert list(example['shape']) == list(volume.shape)
    if volume.nbytes <= 20_000:
      assert example['image'] == volume.tobytes()
      continue
    assert np.frombuffer(example['image'], '<i8').tolist() == [store.MAGIC, first, 32]
    first += int(np.prod([-(-n // 32) for n in volume.shape[:3]]))


def test_windows_equal_slices(sources, volumes):
  rng = np.random.default_rng(1)
  for source in sources:
    for i, volume in enumerate(volumes):
      grid = volume.shape[:3]
      for _ in range(12):
        start = [int(rng.integers(n)) for n in grid]
        size = [int(rng.integers(1, n + 5)) for n in grid]
        found = source.window(i, start, size)
        at = tuple(slice(a, a + s) for a, s in zip(start, size))
        assert np.array_equal(found, volume[at])
        assert found.dtype == volume.dtype
      assert np.array_equal(source.window(i, (0, 0, 0), grid), volume)
      assert source.window(i, grid, (3, 3, 3)).size == 0
    with pytest.raises(ValueError, match='does not fit'):
      source.window(1, (0, 0), (4, 4))
    with pytest.raises(ValueError, match='does not fit'):
      source.window(1, (0, -1, 0), (4, 4, 4))


def test_a_window_reads_only_the_bricks_that_it_touches(sources, volumes, monkeypatch):
  source = sources[0]
  read, rows = store.Files.read, []
  monkeypatch.setattr(store.Files, 'read', lambda self, shard, r: rows.extend(r) or read(self, shard, r))
  # Volume 1 is 2 x 2 x 3 bricks whose rows are 0 to 11.
  for start, size, expected in (((0, 0, 0), (32, 32, 32), [0]), ((31, 0, 5), (2, 1, 20), [0, 6]),
                                ((33, 33, 65), (4, 4, 4), [11]), ((0, 31, 32), (5, 2, 33), [1, 2, 4, 5])):
    rows.clear()
    source.window(1, start, size)
    assert rows == expected


def test_bytes_that_leave_the_disk(tmp_path, monkeypatch):
  """A crop of 24^3 of 160^3 voxels reads the bytes of the bricks that it touches, and not of the others."""
  volume = np.random.default_rng(0).integers(0, 2**15, (160, 160, 160, 1)).astype(np.int16)  # cannot be packed
  source = made(tmp_path, [volume], monkeypatch, CHUNK_BYTES=1 << 20)
  source.window(0, (0, 0, 0), (1, 1, 1))  # opens the files

  def read_bytes():
    with open('/proc/self/io') as f:
      return int(f.readline().split()[1])

  brick = 32**3 * 2
  for start, bricks in (((4, 68, 100), 1), ((50, 68, 100), 2), ((50, 50, 50), 8)):
    before = read_bytes()
    assert np.array_equal(source.window(0, start, (24, 24, 24)),
                          volume[tuple(slice(a, a + 24) for a in start)])
    assert read_bytes() - before < 1.2 * bricks * brick + 200_000
  assert volume.nbytes > 120 * brick


@pytest.mark.parametrize('processes', [1, 2])
def test_crops_in_training_are_the_same(sources, monkeypatch, processes):
  """Bricks change nothing in the order of data, in where crops lie or in their pixels."""
  options = {'batch_size': 4, 'size': (24, 18, 30), 'vocabulary': NAMES, 'seed': 5, 'fit': 'crop', 'threads': 2}
  for p in range(processes):
    bricks, whole = ([*itertools.islice(train_batches(s, **options, process_index=p, process_count=processes), 5)]
                     for s in sources)
    for a, b in zip(bricks, whole):
      assert all(np.array_equal(a[k], b[k]) for k in b)
  assert len({image.tobytes() for batch in bricks for image in batch['image']}) > 6
  monkeypatch.setattr(type(sources[0]), '__getitem__', None)  # nothing is read whole
  options = {k: options[k] for k in ('batch_size', 'size', 'vocabulary', 'fit')}
  for a, b in zip(eval_batches(sources[0], **options), eval_batches(sources[1], **options)):
    assert np.array_equal(a['image'], b['image'])


@pytest.mark.parametrize('edge', [8, 64])
def test_several_crops_of_what_one_reads(edge, tmp_path, monkeypatch):
  """A voxel's value is its place, so a crop tells where it lies: all within the bricks of the first, read once."""
  grid = (33, 40, 41)
  volume = np.arange(np.prod(grid), dtype=np.uint16).reshape(*grid, 1)
  source = made(tmp_path, [volume] * 4, monkeypatch, CHUNK_BYTES=20_000 if edge == 8 else 1 << 20, EDGE=edge)
  monkeypatch.setattr(store, 'CHUNK_BYTES', 20_000 if edge == 8 else 1 << 20)
  monkeypatch.setattr(store, 'EDGE', edge)
  read, calls = store.Files.read, []
  monkeypatch.setattr(store.Files, 'read', lambda self, shard, r: calls.append(r) or read(self, shard, r))
  options = {'batch_size': 12, 'size': (12, 18, 10), 'vocabulary': NAMES, 'seed': 5, 'fit': 'crop', 'threads': 1,
             'prefetch': 1}
  some = lambda crops, p=0, n=1: [*itertools.islice(
      train_batches(source, **options, crops=crops, process_index=p, process_count=n), 3)]
  batches, halves, starts = some(3), [some(3, p, 2) for p in range(2)], []
  for k, batch in enumerate(batches):
    assert np.array_equal(batch['image'], np.concatenate([halves[p][k]['image'] for p in range(2)]))
    for image in batch['image']:
      start = np.unravel_index(int(image[0, 0, 0, 0]), grid)
      assert np.array_equal(image, volume[tuple(slice(a, a + n) for a, n in zip(start, options['size']))])
      starts.append(start)
  starts = np.array(starts).reshape(-1, 3, 3)  # [records, crops, axes]
  low = starts[:, :1] // edge * edge
  high = np.minimum(-(-(starts[:, :1] + options['size']) // edge) * edge, grid)
  assert (starts >= low).all() and (starts + options['size'] <= high).all()
  assert len(np.unique(starts.reshape(-1, 3), axis=0)) > 24
  calls.clear()
  parts = elements(source, options['size'], NAMES, 'crop').crops({'index': 2}, np.random.default_rng(0), 5)
  assert parts['image'].shape == (5, 12, 18, 10, 1) and (parts['index'] == 2).all() and len(calls) == (edge == 8)
  with pytest.raises(UserError, match='loader.crops=5 does not divide the 12 records'):
    some(5)


def test_many_shards(volumes, tmp_path, monkeypatch):
  from jaxmed.data.corpus import corpus_format

  monkeypatch.setattr(corpus_format, 'SHARD_BYTES', 250_000)
  source = made(tmp_path, volumes * 3, monkeypatch, CHUNK_BYTES=20_000, EDGE=32)
  count = len(source.shards['train'])
  assert count > 3
  assert len(list(source.path.glob('bricks-train-*'))) == count
  for i in (11, 4, 6, 1, 9):
    assert np.array_equal(source[i]['image'], volumes[i % 4])
    assert np.array_equal(source.window(i, (2, 3, 4), (2, 2, 2)), volumes[i % 4][2:4, 3:5, 4:6])


def test_lost_or_damaged_bricks_are_one_line(sources, tmp_path):
  import shutil

  copy = shutil.copytree(sources[0].path, tmp_path / 'c')
  file = copy / 'bricks-train-00000-of-00001.array_record'
  data = file.read_bytes()
  file.write_bytes(data[:len(data) // 2])
  with pytest.raises(UserError, match='damaged shard of split train') as e:
    open_source(copy)[3]
  assert '\n' not in str(e.value)
  file.unlink()
  with pytest.raises(UserError, match='damaged shard of split train'):
    open_source(copy).window(1, (0, 0, 0), (2, 2, 2))
