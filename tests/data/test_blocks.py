"""A corpus has the same bytes for any number of processes, and after kills, signals and breaks anywhere."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmed.data import readers
from jaxmed.data.corpus import stats, store
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import assembly, blocks, building
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError

BYTES = 3000  # of a block
OPTIONS = {'volumes': 'whole', 'max_bad': 0.2, 'splits': (0.6, 0.2, 0.2)}
# The command, with blocks of a few files, volumes in bricks, and files that take their time. Worker processes import
# this as their main module, so they have the same.
DRIVER = f'''
import sys, time
from jaxmed import cli
from jaxmed.data.corpus import store
from jaxmed.data.prepare import blocks

store.CHUNK_BYTES, store.EDGE = 4000, 8
blocks.BLOCK_BYTES = ({BYTES}, {BYTES})
one = blocks._one
def slow(*args):
  time.sleep(float(sys.argv[1]))
  return one(*args)
blocks._one = slow
if __name__ == '__main__':
  sys.exit(cli.main(['prepare', *sys.argv[2:], '--volumes', 'whole', '--max-bad', '0.2', '--splits', '0.6,0.2,0.2']))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Twenty-four images and volumes of three formats and two damaged files."""
  import nibabel

  root = tmp_path_factory.mktemp('blocks') / 'in'
  root.mkdir()
  rng = np.random.default_rng(0)
  for i in range(8):
    Image.fromarray(rng.integers(0, 256, (9 + i, 10, 3)).astype(np.uint8)).save(root / f'{i}.png')
    np.save(root / f'v{i}.npy', rng.integers(0, 900, (17, 18, 19 + i)).astype(np.uint16))
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=(6, 7, 8)).astype(np.float32), np.eye(4)), root / f'{i}.nii.gz')
  (root / 'a.png').write_bytes(b'')
  (root / 'v3x.npy').write_bytes(b'\x93NUMPY')
  return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(blocks, 'BLOCK_BYTES', (BYTES, BYTES))
  monkeypatch.setattr(store, 'CHUNK_BYTES', 4000)
  monkeypatch.setattr(store, 'EDGE', 8)


@pytest.fixture
def run(folder, tmp_path):
  """Prepares the folder in this process."""
  return lambda name='c', **options: prepare([folder], tmp_path / name, progress=False, **(OPTIONS | options))


@pytest.fixture(scope='module')
def expected(folder, tmp_path_factory):
  """{file name: bytes} of the corpus made in one go, in one process."""
  out = tmp_path_factory.mktemp('expected') / 'c'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blocks, 'BLOCK_BYTES', (BYTES, BYTES))
    patch.setattr(store, 'CHUNK_BYTES', 4000)
    patch.setattr(store, 'EDGE', 8)
    summary = prepare([folder], out, progress=False, **OPTIONS)
  assert summary['records'] == 24
  assert summary['rejected'] == 2
  assert 10 < summary['blocks'] < 20
  return content(out)


def content(out):
  return {p.name: p.read_bytes() for p in out.iterdir()}


def same(out, expected):
  assert not out.with_name(f'{out.name}.part').exists()
  found = content(out)
  assert sorted(found) == sorted(expected)
  assert [name for name in found if found[name] != expected[name]] == []


def start(folder, out, delay, workers):
  driver = out.parent / 'driver.py'
  driver.write_text(DRIVER)
  words = [delay, folder, '--out', out, '--workers', workers]
  return subprocess.Popen([sys.executable, driver, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])})


def wait_for_blocks(process, out, count):
  """Waits until so many blocks are done."""
  while process.poll() is None:
    if len(list((out.with_name(f'{out.name}.part') / 'blocks').glob('[0-9]*'))) >= count:
      return
    time.sleep(0.002)
  pytest.fail(f'ended before {count} blocks: {process.communicate()}')


def test_corpus_holds_what_one_block_holds(folder, run, tmp_path, expected):
  """Cutting into blocks changes where records lie, and not what they are."""
  run()
  blocks.BLOCK_BYTES = (1 << 30, 1 << 30)  # the fixture puts it back
  assert run('whole')['blocks'] == 1
  same(tmp_path / 'c', expected)
  many, one = open_source(tmp_path / 'c'), open_source(tmp_path / 'whole')
  assert pq.read_table(tmp_path / 'c' / 'manifest.parquet').equals(pq.read_table(tmp_path / 'whole' / 'manifest.parquet'))
  for i in range(24):
    assert np.array_equal(many[i]['image'], one[i]['image'])
  for name, numbers in one.stats.items():
    for key, value in numbers.items():
      assert many.stats[name][key] == (value if key == 'split' else pytest.approx(value, rel=1e-12)), (name, key)


def test_processes_write_the_same_bytes(folder, expected, tmp_path):
  process = start(folder, tmp_path / 'c', 0, 3)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert '24 records of 16 subjects' in output
  same(tmp_path / 'c', expected)


@pytest.mark.parametrize('workers', [1, 2])
def test_killed_at_random_moments(folder, expected, tmp_path, workers):
  out, rng = tmp_path / 'c', random.Random(workers)
  done = 0
  for _ in range(2):
    done += rng.randint(1, 3)
    process = start(folder, out, 0.1, workers)
    wait_for_blocks(process, out, done)
    time.sleep(rng.random() * 0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(family, timeout=30)[1]  # workers end with whoever started them
    done = len(list((tmp_path / 'c.part' / 'blocks').glob('[0-9]*')))
    assert not out.exists()
  process = start(folder, out, 0, workers)
  assert process.wait(timeout=120) == 0, process.communicate()
  assert done >= 2
  same(out, expected)


@pytest.mark.parametrize('number, word, workers', [(signal.SIGINT, 'Ctrl-C', 1), (signal.SIGTERM, 'SIGTERM', 2)])
def test_signals_say_that_the_same_command_goes_on(folder, expected, tmp_path, number, word, workers, run):
  out = tmp_path / 'c'
  process = start(folder, out, 0.1, workers)
  wait_for_blocks(process, out, 2)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 75
  assert errors == f'jaxmed: stopped by {word}; what is done is kept in {out}.part: the same command goes on there\n'
  read = []
  with pytest.MonkeyPatch.context() as patch:
    one = blocks._one
    patch.setattr(blocks, '_one', lambda item, *rest: read.append(item.rel) or one(item, *rest))
    run(overwrite=False)
  assert 0 < len(read) < 24  # of 26: what was done is not done again
  same(out, expected)


@pytest.mark.parametrize('calls', [1, 5, 14])
def test_broken_off_while_putting_together(run, expected, tmp_path, monkeypatch, calls):
  with monkeypatch.context() as patch:
    move, left = assembly._move, iter(range(calls))

    def broken(*args):
      if next(left, None) is None:
        raise KeyboardInterrupt
      move(*args)

    patch.setattr(assembly, '_move', broken)
    with pytest.raises(KeyboardInterrupt):
      run()
  assert len(list((tmp_path / 'c.part' / 'corpus').iterdir())) == calls
  run()
  same(tmp_path / 'c', expected)


def test_broken_off_before_and_after_the_last_rename(run, expected, tmp_path, monkeypatch):
  def broken(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(building, '_swap', broken)
    with pytest.raises(KeyboardInterrupt):
      run()
    assert not (tmp_path / 'c').exists()
    swap = building.__dict__['_swap']
    assert swap is broken
  real = building._swap
  with monkeypatch.context() as patch:
    patch.setattr(building, '_swap', lambda *args: (real(*args), broken()))
    with pytest.raises(KeyboardInterrupt):
      run()
  assert (tmp_path / 'c').exists()
  assert (tmp_path / 'c.part').exists()
  assert run()['records'] == 24
  same(tmp_path / 'c', expected)
  with pytest.raises(UserError, match='c exists'):
    run()


def stopped(run, monkeypatch, **options):
  """Begins a corpus and breaks off after some blocks."""
  write, left = blocks.write, iter(range(4))
  with monkeypatch.context() as patch:
    patch.setattr(blocks, 'write', lambda *args: write(*args) if next(left, None) is not None else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect keeps what is done, too
      run(**options)


def test_other_options_or_files_start_afresh(run, folder, expected, tmp_path, monkeypatch, capfd):
  stopped(run, monkeypatch, seed=1)
  kept = [p.name for p in (tmp_path / 'c.part' / 'blocks').glob('[0-9]*')]
  assert sorted(kept) == [f'{i:05d}' for i in range(4)]
  run()
  assert capfd.readouterr().err == f'jaxmed: {tmp_path}/c.part was begun with other files or options: starting afresh\n'
  same(tmp_path / 'c', expected)
  stopped(lambda **options: run('d', **options), monkeypatch)
  place = folder / '0.png'
  before = place.stat()
  try:
    os.utime(place, (1, 1))
    run('d')
    assert 'd.part was begun with other files' in capfd.readouterr().err
  finally:
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
  same(tmp_path / 'd', expected)


def test_one_process_at_a_time(run, tmp_path, monkeypatch):
  stopped(run, monkeypatch)
  with building.building(tmp_path / 'c', False, 'another'):
    with pytest.raises(UserError, match='another process is preparing .*/c: wait for it'):
      run()
    assert (tmp_path / 'c.part' / 'plan.json').exists()


def test_a_file_that_fails_late_leaves_no_record(run, tmp_path, monkeypatch):
  """Its first records are on disk when the last one proves to be damaged."""
  read = readers.read

  def damaged(path, options, mask=None):
    if path.name == 'v2.npy':
      for part in 'abc':
        yield next(read(path, options)) | {'part': part}
      raise ValueError('the last page is cut off')
    yield from read(path, options)

  monkeypatch.setattr(blocks, 'HELD_BYTES', 1000)
  monkeypatch.setattr(readers, 'read', damaged)
  summary = run()
  assert summary['records'] == 23
  assert 'v2.npy,the last page is cut off' in (tmp_path / 'c' / 'rejects.csv').read_text()
  source = open_source(tmp_path / 'c')
  assert not any(p.startswith('v2') for p in source.table['path'].to_pylist())
  assert source[22]['image'].shape[-1] == 1
  pixels = [np.asarray(source[i]['image'], np.float64).ravel() for i in range(23)
            if source.table['split'][i].as_py() == 'train' and source.table['channels'][i].as_py() == ['gray']]
  assert source.stats['gray']['mean'] == pytest.approx(np.concatenate(pixels).mean(), rel=1e-9)


def test_blocks_follow_from_sizes():
  items = [blocks.Item(pathlib.Path(f'{i}'), f'{i}', f'{i}', 's', size=size) for i, size in
           enumerate([1000, 1500, 400, 2000, 9000, 10, 10])]
  cut = blocks.cut(items, readers.DEFAULT, {})
  assert [[int(i.rel) for i in task.items] for task in cut] == [[0, 1, 2], [3], [4], [5, 6]]
  assert [task.name for task in cut] == ['00000', '00001', '00002', '00003']
  blocks.BLOCK_BYTES = (32 << 20, 256 << 20)
  large = [blocks.dataclasses.replace(items[0], size=100 << 20)] * 400
  assert {len(task.items) for task in blocks.cut(large, readers.DEFAULT, {})} == {2}


def test_merged_statistics_equal_numpy(tmp_path):
  rng = np.random.default_rng(0)
  parts, pixels = [], []
  for i, n in enumerate([50_000, 700_000, 20, 300_000]):
    part = stats.Stats(i)
    for image in np.array_split(rng.normal(100 * i, 10, n), 3):
      part.add(image[:, None], ['a'], 'train')
      pixels.append(image)
    part.add(np.full((5, 1), 7, np.uint8), [f'b{i}'], 'val')
    part.save(tmp_path / f'{i}.npz')
    parts.append(stats.Stats.load(tmp_path / f'{i}.npz', i))
  summary = stats.merged(parts).summary()
  every = np.concatenate(pixels)
  found = summary['a']
  assert found['count'] == every.size
  assert found['mean'] == pytest.approx(every.mean(), rel=1e-12)
  assert found['std'] == pytest.approx(every.std(), rel=1e-12)
  ranks = [(every < found[k]).mean() for k in ('low', 'high')]
  assert ranks == pytest.approx([0.005, 0.995], abs=0.001)
  assert summary['b2'] == {'count': 5, 'mean': 7.0, 'std': 0.0, 'low': 7.0, 'high': 7.0, 'split': 'other'}


def test_a_kill_while_tidying_up_leaves_nothing_that_looks_whole(run, expected, tmp_path, monkeypatch):
  def broken(*args, **options):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(building.os, 'rename', lambda *args: broken() if args[1].name.endswith('.gone') else os.replace(*args))
    with pytest.raises(KeyboardInterrupt):
      run()
  assert (tmp_path / 'c.part' / 'whole').exists()
  with monkeypatch.context() as patch:
    patch.setattr(building.shutil, 'rmtree', lambda path, **options: path.name.endswith('.gone') and path.exists() and broken())
    with pytest.raises(KeyboardInterrupt):
      run()  # is done, and only tidies up
  same(tmp_path / 'c', expected)
  run('c', overwrite=True)
  assert not (tmp_path / '.c.part.gone').exists()
