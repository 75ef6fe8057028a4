"""What prepare writes, and each way in which it refuses."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmed import cli
from jaxmed.data import readers
from jaxmed.data.corpus import corpus_format
from jaxmed.data.corpus.stats import CAPACITY, Channel
from jaxmed.data.prepare.preparation import splits_of
from jaxmed.data.prepare.prepare import check_small, prepare, split_of
from jaxmed.errors import UserError
from jaxmed.files import name_of


def save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.npy':
    np.save(path, pixels)
  else:
    Image.fromarray(pixels).save(path)
  return pixels


@pytest.fixture
def folder(tmp_path):
  """Thirty images of subjects s0..s9 in two classes, with mixed channels and types."""
  rng = np.random.default_rng(0)
  for i in range(30):
    channels = (1, 3)[i % 2]
    pixels = rng.integers(0, 256, (8, 9, channels)).astype(np.uint8)
    save(tmp_path / 'in' / ('cat', 'dog')[i % 2] / f's{i // 3}_{i:02d}.png', pixels.squeeze())
  return tmp_path / 'in'


def run(inputs, out, **options):
  return prepare([str(i) for i in inputs], out, progress=False, **options)


def rows(out):
  return pq.read_table(out / 'manifest.parquet').to_pylist()


def test_tfds_reads_what_was_written(folder, tmp_path):
  import tensorflow_datasets as tfds

  save(folder / 'cat' / 's0_volume.npy', np.arange(20 * 18 * 17, dtype=np.uint16).reshape(20, 18, 17))
  summary = run([folder], tmp_path / 'c', subject_pattern=r's(\d+)_', volumes='whole', splits=(0.5, 0.2, 0.3))
  assert summary['records'] == summary['files'] == 31
  assert summary['subjects'] == 10
  assert summary['channels'] == {'B': 15, 'G': 15, 'R': 15, 'gray': 16}
  assert summary['shapes'] == {'20x18x17x1': 1, '8x9x1': 15, '8x9x3': 15}
  builder = tfds.builder_from_directory(tmp_path / 'c')
  total = 0
  for split in builder.info.splits:
    data = builder.as_data_source(split=split)
    own = [r for r in rows(tmp_path / 'c') if r['split'] == split]
    assert [r['row'] for r in own] == list(range(len(data)))
    for example, row in zip(data, own):
      file = folder / row['path']
      expected = np.load(file) if file.suffix == '.npy' else np.asarray(Image.open(file))
      record = corpus_format.decode(example)
      assert np.array_equal(record['image'].squeeze(), expected.squeeze())
      assert record['image'].dtype == expected.dtype
      assert record['id'] == row['id'] == row['path']
      assert row['sha256'] == hashlib.sha256(file.read_bytes()).hexdigest()
      assert row['shape'] == list(record['image'].shape)
      assert row['channels'] == record['channels']
      assert row['split'] == split_of(row['subject'], 0, (0.5, 0.2, 0.3))
      total += 1
  assert total == 31


def test_same_input_gives_the_same_bytes(folder, tmp_path):
  for name in 'ab':
    code = (f"from jaxmed.data.prepare.prepare import prepare; prepare([{str(folder)!r}], {str(tmp_path / name)!r}, "
            'progress=False)')
    env = os.environ | {'PYTHONHASHSEED': str(ord(name))}
    subprocess.run([sys.executable, '-c', code], check=True, env=env)
  names = sorted(p.name for p in (tmp_path / 'a').iterdir())
  assert {'features.json', 'dataset_info.json', 'rejects.csv', 'stats.json'} < set(names)
  for name in names:
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), name


def test_shards_are_closed_at_their_size(folder, tmp_path, monkeypatch):
  from jaxmed.data.corpus.open import open_source

  monkeypatch.setattr(corpus_format, 'SHARD_BYTES', 500)
  run([folder], tmp_path / 'c', splits=(1, 0, 0))
  shards = sorted(p.name for p in (tmp_path / 'c').glob('*array_record*'))
  # 72 and 216 bytes in turn: 72 + 216 + 72 = 360, and 216 more are too many.
  assert len(shards) == 10
  assert shards[3] == 'corpus-train.array_record-00003-of-00010'
  source = open_source(tmp_path / 'c')
  assert [source[i]['id'] for i in range(30)] == source.table['id'].to_pylist()


def test_statistics_equal_numpy(folder, tmp_path):
  run([folder], tmp_path / 'c', subject_pattern='s[0-9]', splits=(0.6, 0.2, 0.2))
  stats = json.loads((tmp_path / 'c' / 'stats.json').read_text())
  train = [r for r in rows(tmp_path / 'c') if r['split'] == 'train']
  for name in ('gray', 'G'):
    images = [(np.asarray(Image.open(folder / r['path'])).reshape(72, -1), r['channels']) for r in train]
    pixels = np.concatenate([image[:, names.index(name)] for image, names in images if name in names])
    assert stats[name]['count'] == pixels.size
    assert stats[name]['split'] == 'train'
    assert stats[name]['mean'] == pytest.approx(pixels.mean(), rel=1e-12)
    assert stats[name]['std'] == pytest.approx(pixels.std(), rel=1e-12)
    assert [stats[name]['low'], stats[name]['high']] == pytest.approx(np.percentile(pixels, [0.5, 99.5]))


@pytest.mark.parametrize('dtype, n', [(np.uint8, 40), (np.uint8, 4000), (np.uint16, 30_000),
                                      (np.int16, 5000)])
def test_moments_of_integers(dtype, n):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, min(np.iinfo(dtype).max, 9 ** (k + 2)), n).astype(dtype) for k in range(4)]
  channel = Channel(rng)
  for image in images:
    channel.add(image)
  pixels = np.concatenate(images).astype(np.float64)
  assert channel.mean == pytest.approx(pixels.mean(), rel=1e-12)
  assert channel.summary()['std'] == pytest.approx(pixels.std(), rel=1e-12)


def test_percentiles_in_bounded_memory():
  rng = np.random.default_rng(0)
  pixels = rng.normal(1e4, 10, (40, 50_000))
  channel = Channel(np.random.default_rng(1))
  for image in pixels:
    channel.add(image)
  assert channel.held <= CAPACITY
  assert channel.held > CAPACITY // 4
  summary = channel.summary()
  assert summary['mean'] == pytest.approx(pixels.mean(), rel=1e-12)
  assert summary['std'] == pytest.approx(pixels.std(), rel=1e-9)
  ranks = [(pixels < summary[k]).mean() for k in ('low', 'high')]
  assert ranks == pytest.approx([0.005, 0.995], abs=0.001)


def test_labels_and_splits_from_folders(tmp_path):
  pixels = np.zeros((4, 4), np.uint8)
  for split in ('train', 'val', 'test'):
    for label in ('benign', 'malignant'):
      save(tmp_path / 'in' / split / label / f'{split}{label}.png', pixels)
  run([tmp_path / 'in'], tmp_path / 'c', labels_from_folders=True)
  found = [(r['split'], r['label'], r['path']) for r in rows(tmp_path / 'c')]
  assert found == [(s, c, f'{s}/{c}/{s}{c}.png') for s in ('test', 'train', 'val')
                   for c in ('benign', 'malignant')]
  save(tmp_path / 'in' / 'other' / 'x.png', pixels)
  with pytest.raises(UserError, match=r'other/x.png does not'):
    run([tmp_path / 'in'], tmp_path / 'd')
  save(tmp_path / 'flat' / 'x.png', pixels)
  with pytest.raises(UserError, match=r'LABEL/x.png'):
    run([tmp_path / 'flat'], tmp_path / 'd', labels_from_folders=True)


@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_table(folder, tmp_path, kind):
  text = 'path,subject,split,source,grade,age\ncat/s0_00.png,007,train,A,2,50.5\n' \
         'dog/s0_01.png,008,test,B,,\ncat/s0_02.png,007,,A,high,61\n'
  path = tmp_path / f'table.{kind}'
  if kind == 'csv':
    path.write_text(text)
  else:
    pq.write_table(pa.table({
      'path': ['cat/s0_00.png', 'dog/s0_01.png', 'cat/s0_02.png'], 'subject': ['007', '008', '007'],
      'split': ['train', 'test', None], 'source': ['A', 'B', 'A'], 'grade': ['2', None, 'high'],
      'age': [50.5, None, 61]}), path)
  summary = run([folder], tmp_path / 'c', table=path)
  assert summary['not_in_table'] == 27
  assert summary['records'] == 3
  assert summary['labels'] == {'grade': 2}
  found = [[r[k] for k in ('subject', 'split', 'source', 'grade', 'age')] for r in rows(tmp_path / 'c')]
  assert found == [['007', 'train', 'A', '2', 50.5], ['008', 'test', 'B', None, None],
                   ['007', 'train', 'A', 'high', 61.0]]


def bad_table(text, match):
  return pytest.param(text, match, id=match.split()[0].replace('/', '-'))


@pytest.mark.parametrize('text, match', [
  bad_table('path,subject,split\ncat/s0_00.png,p,train\ncat/s0_02.png,p,test\n',
            "'p' is in two splits: train"),
  bad_table('file,subject\ncat/s0_00.png,p\n', "'path'.*did you mean|'path'.*choose"),
  bad_table('path,split\ncat/s0_00.png,trian\n', "'trian': did you mean 'train'"),
  bad_table('path,id\ncat/s0_00.png,3\n', "column 'id'.*rename"),
  bad_table('path\ncat/s0_00.png\ncat/s0_00.png\n', 'lists cat/s0_00.png twice'),
  bad_table('path\nno.png\n', 'names no file'),
  bad_table('path\ncat/s0_00.png\nno.png\n', '1 of 2 files are unreadable.*no.png'),
  bad_table('path,a\n1\n2,3,4\n', 'cannot read .*table'),
  bad_table('', 'cannot read .*table'),
])
def test_bad_tables(folder, tmp_path, text, match):
  (tmp_path / 't.csv').write_text(text)
  with pytest.raises(UserError, match=match) as e:
    run([folder], tmp_path / 'c', table=tmp_path / 't.csv')
  assert '\n' not in str(e.value)
  assert not (tmp_path / 'c').exists()
  assert not (tmp_path / 'c.part').exists()


def spoil(folder):
  """Six bad files; returns their names, sorted."""
  good = (folder / 'cat' / 's0_00.png').read_bytes()
  (folder / 'a_zero.png').write_bytes(b'')
  (folder / 'b_cut.png').write_bytes(good[:len(good) // 2])
  (folder / 'c_text.jpg').write_text('not an image')
  np.save(folder / 'd_nan.npy', np.full((4, 4), np.nan))
  np.save(folder / 'e_inf.npy', np.full((4, 4), np.inf))
  (folder / 'f.nii.gz').write_bytes(b'\x1f\x8b' + b'0' * 50)
  return ['a_zero.png', 'b_cut.png', 'c_text.jpg', 'd_nan.npy', 'e_inf.npy', 'f.nii.gz']


def test_bad_files_stop_or_are_listed(folder, tmp_path):
  bad = spoil(folder)
  match = '^6 of 36 files are unreadable.*first a_zero.png: the file is empty'
  with pytest.raises(UserError, match=match) as e:
    run([folder], tmp_path / 'c')
  listed = tmp_path / 'c.rejects.csv'
  assert str(listed) in str(e.value)
  assert '\n' not in str(e.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['c.rejects.csv', 'in']
  with open(listed, newline='') as f:
    assert sorted(r['path'] for r in csv.DictReader(f)) == bad
  with pytest.raises(UserError, match=r'max_bad 0.15'):
    run([folder], tmp_path / 'c', max_bad=0.15)
  summary = run([folder], tmp_path / 'c', max_bad=0.2)
  assert summary['rejected'] == 6
  assert summary['records'] == 30
  with open(tmp_path / 'c' / 'rejects.csv', newline='') as f:
    reasons = {r['path']: r['reason'] for r in csv.DictReader(f)}
  assert sorted(reasons) == bad
  assert 'NaN' in reasons['d_nan.npy']
  assert all(reasons.values())


def test_filled_pixels_are_counted_in_the_card(tmp_path):
  (tmp_path / 'in').mkdir()
  for i in range(3):
    image = np.ones((20, 20), np.float32)
    image[0, :i] = np.nan
    np.save(tmp_path / f'in/{i}.npy', image)
  with pytest.raises(UserError, match=r'2 of 3 files are unreadable .* 1 of 400 pixels are NaN .1., .*--nan 0'):
    prepare([tmp_path / 'in'], tmp_path / 'out', progress=False)
  summary = prepare([tmp_path / 'in'], tmp_path / 'out', progress=False, nan='0')
  assert summary['filled'] == 3
  assert '3 pixels of 2 records were NaN or infinite and were filled' in (tmp_path / 'out/card.md').read_text()
  with pytest.raises(UserError, match='nan'):
    prepare([tmp_path / 'in'], tmp_path / 'other', progress=False, nan='zero')


def test_all_bad_is_an_error_whatever_is_allowed(tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'a.png').write_bytes(b'')
  with pytest.raises(UserError, match='1 of 1 files are unreadable'):
    run([tmp_path / 'in'], tmp_path / 'c', max_bad=1.0)


def test_channel_names_for_all_files(folder, tmp_path):
  with pytest.raises(UserError, match=r'15 of 30 .*dog/s0_01.png: has 3 channels, but 1 names'):
    run([folder], tmp_path / 'c', channels=['T1'])
  run([folder / 'cat'], tmp_path / 'c', channels=['T1'])
  assert {tuple(r['channels']) for r in rows(tmp_path / 'c')} == {('T1',)}
  with pytest.raises(UserError, match='distinct'):
    run([folder], tmp_path / 'd', channels=['T1', 'T1'])


def test_places(folder, tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'a.txt').write_text('x')
  for inputs, match in (([tmp_path / 'none'], 'none does not exist'), ([tmp_path / 'empty'], 'is empty'),
                        ([tmp_path / 'text'], r'no readable file .*1 of other kinds'), ([], 'no input'),
                        ([tmp_path / 'text' / 'a.txt'], 'no known suffix')):
    with pytest.raises(UserError, match=match):
      run(inputs, tmp_path / 'c')
  run([folder], tmp_path / 'c')
  with pytest.raises(UserError, match='c exists'):
    run([folder], tmp_path / 'c')
  before = (tmp_path / 'c' / 'manifest.parquet').read_bytes()
  with pytest.raises(UserError):  # a failed overwrite loses nothing
    run([tmp_path / 'empty'], tmp_path / 'c', overwrite=True)
  assert (tmp_path / 'c' / 'manifest.parquet').read_bytes() == before
  assert run([folder / 'cat'], tmp_path / 'c', overwrite=True)['records'] == 15
  with pytest.raises(UserError, match='is no corpus, so it is not overwritten'):
    run([folder], tmp_path / 'text', overwrite=True)
  with pytest.raises(UserError, match='cannot write'):
    run([folder], tmp_path / 'text' / 'a.txt' / 'c')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['c', 'empty', 'in', 'text']


def test_a_corpus_inside_its_input_is_not_read(folder):
  assert run([folder], folder / 'corpus')['ignored'] == 0
  assert run([folder], folder / 'corpus', overwrite=True)['ignored'] == 0


def test_two_inputs_of_one_name(folder, tmp_path):
  save(tmp_path / 'more' / 'in' / 'x.png', np.zeros((4, 4), np.uint8))
  summary = run([folder, tmp_path / 'more' / 'in'], tmp_path / 'c')
  assert summary['records'] == 31
  last = rows(tmp_path / 'c')[-1]
  assert last['id'] == 'in-2/x.png'
  assert last['source'] == 'in-2'


def test_options(folder, tmp_path):
  for options, match in (({'splits': (0.5, 0.6, 0.1)}, 'sum to 1'), ({'splits': (1, 0)}, 'three fractions'),
                         ({'max_bad': 2}, 'between 0 and 1'), ({'volumes': 'slice'}, "did you mean 'slices'"),
                         ({'subject_pattern': '('}, 'no regular expression'),
                         ({'subject_pattern': 'zz'}, "matches nothing in cat/s0_00.png"),
                         ({'subject_pattern': r'\.', 'splits': (0.0001, 0.0001, 0.9998)}, 'fell into train')):
    with pytest.raises(UserError, match=match):
      run([folder], tmp_path / 'c', **options)


def test_split_fractions_and_seeds():
  found = [split_of(f'subject{i}', 0, (0.7, 0.1, 0.2)) for i in range(5000)]
  for split, fraction in (('train', 0.7), ('val', 0.1), ('test', 0.2)):
    assert found.count(split) / 5000 == pytest.approx(fraction, abs=3 * (0.21 / 5000) ** 0.5)
  other = [split_of(f'subject{i}', 1, (0.7, 0.1, 0.2)) for i in range(5000)]
  # Independent seeds agree where 0.7^2 + 0.1^2 + 0.2^2 says.
  assert np.mean([a == b for a, b in zip(found, other)]) == pytest.approx(0.54, abs=0.025)


@pytest.mark.parametrize('count', [3, 4, 8, 20])
def test_chance_leaves_no_split_empty(count):
  shares, moved = (0.8, 0.1, 0.1), 0
  for seed in range(300):
    names = [f'patient-{i}' for i in range(count)]
    found = splits_of(names, seed, shares)
    drawn = {name: split_of(name, seed, shares) for name in names}
    empty = {'train', 'val', 'test'} - set(drawn.values())
    assert set(found.values()) == {'train', 'val', 'test'}
    assert found == splits_of(reversed(names), seed, shares)
    assert sum(found[n] != drawn[n] for n in names) == len(empty)  # no more than must be
    assert {found[n] for n in names if found[n] != drawn[n]} == empty
    moved += len(empty)
  assert moved


def test_the_subject_nearest_to_an_empty_split_is_moved():
  for seed in range(200):
    names = [f'{i}' for i in range(6)]
    drawn = {name: split_of(name, seed, (0.8, 0.0, 0.2)) for name in names}
    if set(drawn.values()) == {'train'}:
      nearest = max(names, key=lambda n: hash_number(n, seed))
      assert splits_of(names, seed, (0.8, 0.0, 0.2)) == drawn | {nearest: 'test'}
    else:
      assert splits_of(names, seed, (0.8, 0.0, 0.2)) == drawn


def hash_number(subject: str, seed: int) -> int:
  return int.from_bytes(hashlib.sha256(f'{seed}:{subject}'.encode()).digest()[:8], 'big')


def test_splits_stay_where_nothing_is_empty_or_too_few():
  names = [f'subject{i}' for i in range(5000)]
  assert splits_of(names, 3, (0.7, 0.1, 0.2)) == {n: split_of(n, 3, (0.7, 0.1, 0.2)) for n in names}
  for seed in range(20):
    assert splits_of(['a', 'b'], seed, (0.8, 0.1, 0.1)) == {n: split_of(n, seed, (0.8, 0.1, 0.1)) for n in 'ab'}
    assert set(splits_of(['a', 'b', 'c'], seed, (1.0, 0.0, 0.0)).values()) == {'train'}
    few = splits_of(['a', 'b', 'c'], seed, (0.8, 0.1, 0.1), fill=False)
    assert few == {n: split_of(n, seed, (0.8, 0.1, 0.1)) for n in 'abc'}


def test_a_small_corpus_has_all_splits_whatever_its_order(tmp_path):
  def corpus(name, subjects, seed):
    place = tmp_path / f'in-{name}'
    place.mkdir()
    for s in subjects:
      np.save(place / f'{s}.npy', np.full((16, 16), ord(s[-1]), np.uint8))
    run([place / f'{s}.npy' for s in subjects], tmp_path / name, seed=seed)
    return {r['subject']: r['split'] for r in rows(tmp_path / name)}

  names = [f'case-{i}' for i in range(8)]
  for seed in range(3):
    found = corpus(f'a{seed}', names, seed)
    assert set(found.values()) == {'train', 'val', 'test'}
    assert found == corpus(f'b{seed}', names[::-1], seed)


def test_full_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk],
                                    check=False, capture_output=True).returncode:
    pytest.skip('mounting a small tmpfs needs root and the right to mount')
  try:
    rng = np.random.default_rng(0)
    for i in range(12):
      save(tmp_path / 'in' / f'{i}.png', rng.integers(0, 256, (256, 256, 3)).astype(np.uint8))
    with pytest.raises(UserError, match=r'^the disk is full: nothing was kept of ') as e:
      run([tmp_path / 'in'], disk / 'c')
    assert '\n' not in str(e.value)
    assert list(disk.iterdir()) == []
    # Shards that just fit leave no room for the rest.
    (disk / 'ballast').write_bytes(b'0' * (600 << 10))
    with pytest.raises(UserError, match=r'^the disk is full'):
      run([tmp_path / 'in' / '0.png', tmp_path / 'in' / '1.png'], disk / 'c', splits=(1, 0, 0))
    assert [p.name for p in disk.iterdir()] == ['ballast']
  finally:
    subprocess.run(['umount', disk], check=True)


def test_neither_tensorflow_nor_torch_is_imported(folder, tmp_path):
  code = f'''
import sys
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import train_batches
prepare([{str(folder)!r}], {str(tmp_path / "c")!r}, progress=False)
source = open_source({str(tmp_path / "c")!r})
next(train_batches(source, batch_size=2, size=(8, 8), vocabulary=source.channels, seed=0))
found = [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'torch')]
assert not found, found
'''
  subprocess.run([sys.executable, '-c', code], check=True)


# Names and links

def png(path, value=0):
  return save(path, np.full((4, 5), value, np.uint8))


def test_names_that_are_no_utf8_are_kept_and_come_back(tmp_path, capsys):
  names = [b'bad\xff\xfe.png', b'plain.png', rb'text\xff.png', b'back\\slash.png', b'caf\xe9/a.png']
  for i, name in enumerate(names):
    png(tmp_path / 'in' / os.fsdecode(name), i)
  with open(tmp_path / 'in' / os.fsdecode(b'cut\xf0.png'), 'wb'):
    pass
  out = tmp_path / 'c'
  assert cli.main(['prepare', str(tmp_path / 'in'), '--out', str(out), '--max-bad', '0.5', '--json']) == 0
  paths = [row['path'] for row in rows(out)]
  assert set(paths) == {r'bad\xff\xfe.png', 'plain.png', r'text\x5cxff.png', r'back\slash.png', r'caf\xe9/a.png'}
  assert {os.fsencode(name_of(p)) for p in paths} == set(names)
  assert {row['path']: row['id'] for row in rows(out)} == {p: p for p in paths}
  assert {row['subject'] for row in rows(out)} == {p[:-4] for p in paths}
  with open(out / 'rejects.csv', encoding='utf-8') as f:
    assert [line[0] for line in csv.reader(f)] == ['path', r'cut\xf0.png']
  (out / 'card.md').read_text(encoding='utf-8')
  assert json.loads(capsys.readouterr().out)['records'] == 5
  cli.main(['prepare', os.fsdecode(bytes(tmp_path) + b'/none\xff'), '--out', str(tmp_path / 'd')])
  assert capsys.readouterr().err == f'jaxmed: {tmp_path}/none\\xff does not exist\n'


def test_folders_and_inputs_that_are_no_utf8_give_sources_and_labels(tmp_path):
  root = tmp_path / os.fsdecode(b'klinik\xfc')
  for label in (b'tum\xf6r', b'ok'):
    png(root / os.fsdecode(label) / 'a.png')
  run([root], tmp_path / 'c', labels_from_folders=True)
  assert {(r['source'], r['label']) for r in rows(tmp_path / 'c')} == {(r'klinik\xfc', r'tum\xf6r'), (r'klinik\xfc', 'ok')}


def test_a_mha_whose_name_or_folder_is_no_utf8(tmp_path):
  sitk = pytest.importorskip('SimpleITK')
  volume = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
  sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / 'a.mhd'))
  sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / 'a.mha'))
  folder = tmp_path / 'in' / os.fsdecode(b'x\xff')
  folder.mkdir(parents=True)
  for name, new in ((b'a.mha', b'b\xff.mha'), (b'a.mhd', b'a.mhd'), (b'a.raw', b'a.raw')):
    os.rename(tmp_path / os.fsdecode(name), folder / os.fsdecode(new))
  assert run([tmp_path / 'in'], tmp_path / 'c', volumes='whole')['records'] == 2


def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path, capsys):
  outside = tmp_path / 'outside'
  for path in (tmp_path / 'in/real/a.png', tmp_path / 'in/real/b.png', outside / 'c.png', outside / 'deep/d.png'):
    png(path)
  for link, target in (('alias', 'real'), ('loop', '.'), ('up', '..'), ('x', outside), ('y', outside / 'deep'),
                       ('b.png', 'real/b.png'), ('c2.png', outside / 'c.png'), ('self.png', 'self.png')):
    os.symlink(target, tmp_path / 'in' / link)
  os.symlink(tmp_path, outside / 'back')
  os.link(tmp_path / 'in/real/a.png', tmp_path / 'in/hard.png')
  run([tmp_path / 'in'], tmp_path / 'c', max_bad=0.5)
  assert [row['path'] for row in rows(tmp_path / 'c')] == ['hard.png', 'real/a.png', 'real/b.png', 'x/c.png', 'x/deep/d.png']
  with open(tmp_path / 'c/rejects.csv') as f:
    assert [line[0] for line in csv.reader(f)][1:] == ['self.png']
  assert 'each file is read once: ' in capsys.readouterr().err
  run([tmp_path / 'in', tmp_path / 'in/real', outside], tmp_path / 'd', max_bad=0.5)
  assert sorted(row['path'] for row in rows(tmp_path / 'd')) == [
    'in/hard.png', 'in/real/a.png', 'in/real/b.png', 'in/x/c.png', 'in/x/deep/d.png']
  check_small(tmp_path / 'in')


def test_what_is_no_regular_file_is_never_opened(tmp_path, capsys):
  zarr = pytest.importorskip('zarr')
  png(tmp_path / 'in/a.png')
  png(tmp_path / 'in/m.png')
  folder = tmp_path / 'in/b.zarr'
  zarr.create_array(str(folder), shape=(4, 5), dtype='u1', chunks=(4, 5))[...] = 1
  for pipe in ('in/pipe.png', 'in/plain', 'in/z/zarr.json', 'in/b.zarr/pipe', 't.csv'):
    (tmp_path / pipe).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / pipe)
  os.symlink('/dev/zero', tmp_path / 'in/zero.png')
  summary = run([tmp_path / 'in'], tmp_path / 'c', max_bad=0.5)
  assert (summary['records'], summary['rejected'], summary['ignored']) == (2, 1, 4)
  assert 'b.zarr,pipe is no regular file' in (tmp_path / 'c/rejects.csv').read_text()
  assert 'jaxmed: not opened: pipe.png is a FIFO, and 3 more\n' in capsys.readouterr().err
  for inputs, options, match in (([tmp_path / 'in/pipe.png'], {}, 'pipe.png is a FIFO: expected a folder or a regular'),
                                 ([tmp_path / 'in'], {'table': tmp_path / 't.csv'}, 't.csv is a FIFO: expected a table')):
    with pytest.raises(UserError, match=match):
      run(inputs, tmp_path / 'd', **options)
  (tmp_path / 'u.csv').write_text('path,mask\na.png,m.png\nm.png,plain\npipe.png,\n')
  summary = run([tmp_path / 'in'], tmp_path / 'e', table=tmp_path / 'u.csv', max_bad=0.9)
  assert (summary['records'], summary['rejected']) == (1, 2)
  assert 'the table names it, but it is a FIFO' in (tmp_path / 'e/rejects.csv').read_text()


def test_a_file_without_suffix_that_cannot_be_opened_is_a_reject(tmp_path, monkeypatch):
  png(tmp_path / 'in/a.png')
  (tmp_path / 'in/IM0').write_bytes(b'')
  known = readers.known
  def denied(path):
    if path.name == 'IM0':
      raise PermissionError(13, 'Permission denied', str(path))
    return known(path)

  monkeypatch.setattr(readers, 'known', denied)
  with pytest.raises(UserError, match='first IM0: cannot be opened: Permission denied'):
    run([tmp_path / 'in'], tmp_path / 'c')


def test_out_that_is_a_link_is_the_place_that_it_leads_to(tmp_path):
  png(tmp_path / 'in/a.png')
  run([tmp_path / 'in'], tmp_path / 'disk/c', splits=(1, 0, 0))
  os.symlink(tmp_path / 'disk/c', tmp_path / 'c')
  with pytest.raises(UserError, match='exists: choose another'):
    run([tmp_path / 'in'], tmp_path / 'c', splits=(1, 0, 0))
  png(tmp_path / 'in/b.png')
  run([tmp_path / 'in'], tmp_path / 'c', splits=(1, 0, 0), overwrite=True)
  assert os.path.islink(tmp_path / 'c')
  assert len(rows(tmp_path / 'disk/c')) == 2
  assert sorted(os.listdir(tmp_path / 'disk')) == ['c']
  os.symlink(tmp_path / 'new/disk', tmp_path / 'd')
  run([tmp_path / 'in'], tmp_path / 'd', splits=(1, 0, 0))
  assert len(rows(tmp_path / 'new/disk')) == 2


@pytest.mark.parametrize('inputs, out', [([''], 'c'), (['in', ''], 'c'), (['in'], '')])
def test_an_empty_name_is_no_folder(inputs, out, tmp_path, monkeypatch):
  png(tmp_path / 'in/a.png')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match='is empty: expected'):
    run(inputs, out)
