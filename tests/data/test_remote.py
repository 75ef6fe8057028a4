"""A corpus in an object store gives what it gives on a disk: against moto's server, which speaks S3 over HTTP."""

import itertools
import pickle

import numpy as np
import pytest

from jaxmed.data.corpus import remote
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import Unavailable, UserError

pytest.importorskip('moto')
pytest.importorskip('s3fs')


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """The address of a server and a bucket with nothing in it."""
  import logging

  import s3fs
  from moto.server import ThreadedMotoServer

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    host, port = server.get_host_and_port()
    patch.setenv('AWS_ENDPOINT_URL', f'http://{host}:{port}')
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
      patch.setenv(name, 'none')
    patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    patch.setenv('JAXMED_CACHE', str(tmp_path_factory.mktemp('cache')))
    patch.setattr(remote, 'PAUSE', 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir('corpora')
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
  server.stop()


def upload(store, folder, name):
  for file in folder.iterdir():
    store.put_file(str(file), f'corpora/{name}/{file.name}')
  store.invalidate_cache()
  return f's3://corpora/{name}'


@pytest.fixture(scope='module')
def flat(store, corpus):
  return corpus, upload(store, corpus, 'flat')


@pytest.fixture(scope='module')
def volumes(store, tmp_path_factory):
  """Two volumes: one of pixels in the record, one in bricks of noise, whose file has many blocks."""
  root = tmp_path_factory.mktemp('volumes')
  rng = np.random.default_rng(0)
  (root / 'in').mkdir()
  for i, grid in enumerate([(20, 30, 40), (160, 170, 180)]):
    image = rng.integers(0, 4000, (*grid, 1)).astype(np.uint16)
    np.savez(root / 'in' / f'{i}.npz', image=image, channels=['CT'])
  prepare([root / 'in'], root / 'c', volumes='whole', splits=(1.0, 0.0, 0.0), progress=False)
  return root / 'c', upload(store, root / 'c', 'volumes')


def batches(uri, count=4, **options):
  source = open_source(uri).select('train')
  rank = len(source.table['shape'][0].as_py()) - 1
  options = {'batch_size': 8, 'size': (16,) * rank, 'seed': 3, 'vocabulary': source.channels, 'fit': 'crop'} | options
  return list(itertools.islice(train_batches(source, **options), count))


@pytest.mark.parametrize('fit', ['crop', 'resize'])
def test_batches_are_those_of_the_disk(flat, fit):
  for a, b in zip(*(batches(uri, fit=fit) for uri in flat), strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert np.array_equal(a[key], b[key]), key


def test_volumes_in_bricks(volumes):
  for a, b in zip(*(batches(uri, batch_size=2, size=(30, 70, 70)) for uri in volumes), strict=True):
    assert np.array_equal(a['image'], b['image'])
  local, far = map(open_source, volumes)
  assert np.array_equal(local[1]['image'], far[1]['image'])


def test_a_source_of_a_store(flat, store):
  local, far = map(open_source, flat)
  assert str(far.path) == 's3://corpora/flat'
  assert far.stats == local.stats
  assert far.table.whole().equals(local.table.whole())
  rows = [3, 90, 3, 17]
  for source in (far, pickle.loads(pickle.dumps(far))):
    for a, b in zip(source.__getitems__(rows), local.__getitems__(rows), strict=True):
      assert np.array_equal(a['image'], b['image'])
      assert a['id'] == b['id']
  both = open_source(f'{flat[1]},{flat[0]}')
  assert len(both) == 2 * len(local)
  assert both.datasets[0] == 'flat'
  with pytest.raises(UserError, match='lies in an object store'):
    far.path / 'x'


def test_only_what_is_asked_for_is_fetched(volumes, monkeypatch):
  source = open_source(volumes[1])
  fetched = []
  system = source.bricks['train']._system  # fsspec shares it
  one, some = system.cat_file, system.cat_ranges

  def cat_file(path, start, end):
    fetched.append(end - start)
    return one(path, start=start, end=end)

  def cat_ranges(paths, starts, ends):
    fetched.append(sum(ends) - sum(starts))
    return some(paths, starts, ends)

  monkeypatch.setattr(system, 'cat_file', cat_file)
  monkeypatch.setattr(system, 'cat_ranges', cat_ranges)
  source.window(1, (0, 0, 0), (8, 8, 8))
  before = sum(fetched)
  source.window(1, (64, 64, 64), (8, 8, 8))
  brick = sum(fetched) - before
  assert 32**3 < brick < 32**3 * 2  # a brick of noise (12 of 16 bits) and a record that names it
  requests = len(fetched)
  source.window(1, (64, 64, 64), (8, 40, 40))
  assert len(fetched) == requests + 2 and fetched[-1] > 4 * 32**3  # two by two bricks by one call, beside the record
  source.window(1, (64, 64, 64), (8, 8, 100))
  assert len(fetched) == requests + 4 and fetched[-1] > 4 * 32**3  # neighbours are one range


def test_a_new_version_is_seen(store, flat, tmp_path):
  import shutil

  copy = shutil.copytree(flat[0], tmp_path / 'copy')
  url = upload(store, copy, 'changing')
  assert len(open_source(url)) == 96
  stats = (copy / 'stats.json').read_text()
  (copy / 'stats.json').write_text(stats.replace('"count"', '"count" '))
  upload(store, copy, 'changing')
  assert open_source(url).stats == open_source(copy).stats
  folders = {f.parent.name for f in remote.cache_folder().glob('*/stats.json')}
  assert len(folders) >= 2


def test_every_record_of_an_array_record_file(tmp_path):
  """The index and the records, beside ArrayRecord's own reader: long and short records, packed or not, in groups."""
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

  rng = np.random.default_rng(0)
  for options, sizes in (('group_size:1,zstd:3', rng.integers(0, 3000, 400)),
                         ('group_size:1,uncompressed', rng.integers(0, 3000, 400)),
                         ('group_size:7,zstd:1', rng.integers(0, 50, 100)),
                         ('group_size:1,uncompressed', [1, 300_000, 0, 65_536, 65_472])):
    records = [rng.integers(0, 30, n).astype(np.uint8).tobytes() for n in sizes]
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}'
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
      writer.write(record)
    writer.close()
    assert ArrayRecordReader(str(path)).num_records() == len(records)
    data = path.read_bytes()
    index = remote.read_index(lambda a, b: data[a:b], len(data), 'x')  # noqa: B023
    for i, record in enumerate(records):
      number, place = index.chunk(i)
      low, high = index.span(number)
      assert remote.unpacked(remote.joined(data[low:high], low), 'x')[place] == record
    for broken in (data[:-1], data[:len(data) // 2], bytes(65536), b'x' * 100):
      with pytest.raises(UserError, match='x is no whole ArrayRecord file'):
        remote.read_index(lambda a, b: broken[a:b], len(broken), 'x')  # noqa: B023


def test_refusals(store, flat, monkeypatch):
  for url, match in (('s3://nowhere/corpus', 'nowhere'), ('s3://corpora/none', 'is no corpus'),
                     ('nothing://a/b', 'nothing://a/b'), ('file:///nowhere/at/all', '/nowhere/at/all does not exist')):
    with pytest.raises(UserError, match=match) as e:
      open_source(url)
    assert '\n' not in str(e.value)
  assert len(open_source(f'file://{flat[0]}')) == 96
  source = open_source(flat[1])
  monkeypatch.setattr(remote, 'TRIES', 2)
  def fails(*args, **kwargs):
    raise OSError('connection reset')
  monkeypatch.setattr(source.readers['train'].data_source._system, 'cat_file', fails)
  with pytest.raises(Unavailable, match=r'connection reset \(tried 2 times\); go on with --resume'):
    source[0]
