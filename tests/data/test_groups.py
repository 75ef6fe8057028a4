"""Series, folder formats and what readers tell, from files to the manifest; and what a dry run says before."""

import csv
import hashlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmed.data import readers
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.prepare import check_small, prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError

pytest.importorskip('pydicom')

from tests.data.readers import dicoms  # noqa: E402
from tests.data.readers.dicoms import PATIENT, image, series  # noqa: E402

AXIAL = [1, 0, 0, 0, 1, 0]


def write(folder, found, rng):
  folder.mkdir(parents=True)
  dicoms.write(folder, found, rng)


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
  """Two patients (patient 1 with two series of 4 slices, patient 2 with one of 5), a report, pictures, a text."""
  root = tmp_path_factory.mktemp('scans') / 'in'
  rng = np.random.default_rng(0)
  for patient, names, depth in (('p1', 'ab', 4), ('p2', 'c', 5)):
    for name in names:
      volume = rng.integers(0, 900, (depth, 6, 7)).astype(np.int16)
      write(root / patient / name, series(volume, AXIAL, [0, 0, 2.5], series=name, PatientID=patient,
                                            RescaleSlope=1, RescaleIntercept=0), rng)
  report = image(np.zeros((4, 4), np.uint8))
  del report[0x7FE00010], report.Rows, report.Columns
  report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.88.11'
  write(root / 'p1' / 'report', [report], rng)
  for i in range(3):
    Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(root / f'{i}.png')
  (root / 'readme.txt').write_text('x')
  return root


def run(inputs, out, **options):
  options = {'splits': (1, 0, 0)} | options
  return prepare([str(i) for i in inputs], out, progress=False, **options)


def rows(out):
  return pq.read_table(out / 'manifest.parquet').to_pylist()


def test_series_become_items(scans, tmp_path):
  summary = run([scans], tmp_path / 'c', volumes='whole', salt='s')
  assert [summary[k] for k in ('records', 'files', 'subjects', 'rejected', 'empty', 'ignored')] == [6, 6, 5, 0, 1, 1]
  found = rows(tmp_path / 'c')
  assert [r['path'] for r in found[:3]] == ['0.png', '1.png', '2.png']
  series = found[3:]
  assert sorted(tuple(r['shape']) for r in series) == [(4, 6, 7, 1), (4, 6, 7, 1), (5, 6, 7, 1)]
  assert [r['subject'] for r in series] == sorted(r['subject'] for r in series)
  assert len({r['subject'] for r in series}) == 2
  for row in series:
    assert row['id'] == row['path']
    assert len(row['path']) == 16
    assert int(row['path'], 16) >= 0
    assert row['modality'] == 'CT'
    assert row['orientation'] == 'RAS'
    assert row['intensity'] == 'hu'
    assert len(row['direction']) == 9
    files = [p for p in scans.glob('p*/[abc]/*') if row['shape'][0] == 5 or 'p1' in str(p)]
    digests = {hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert row['sha256'] not in digests
  assert all(r['modality'] is None for r in found[:3])
  types = {f.name: f.type for f in pq.read_schema(tmp_path / 'c' / 'manifest.parquet')}
  assert types['direction'] == readers.META['direction']
  assert 'level_mpp' not in types  # nobody filled it
  with open(tmp_path / 'c' / 'rejects.csv', newline='') as f:
    [reject] = csv.DictReader(f)
  assert reject['path'].startswith('p1/report/')
  assert reject['reason'].startswith('no image: ')
  manifest = (tmp_path / 'c' / 'manifest.parquet').read_bytes() + (tmp_path / 'c' / 'card.md').read_bytes()
  for word in (*PATIENT.values(), 'p1/', 'p2/'):
    assert word.encode() not in manifest


def test_ids_do_not_depend_on_names_and_subjects_depend_on_the_salt(scans, tmp_path):
  import shutil

  run([scans], tmp_path / 'a', volumes='whole')
  copy = tmp_path / 'copy'
  for i, path in enumerate(sorted(scans.glob('p*/[abc]/*'), reverse=True)):
    copy.mkdir(exist_ok=True)
    shutil.copy(path, copy / f'{i:03d}')  # no suffix either
  run([copy], tmp_path / 'b', volumes='whole')
  assert [r['id'] for r in rows(tmp_path / 'b')] == [r['id'] for r in rows(tmp_path / 'a')][3:]
  a, b = open_source(tmp_path / 'a'), open_source(tmp_path / 'b')
  assert all(np.array_equal(a[i + 3]['image'], b[i]['image']) for i in range(3))
  run([copy], tmp_path / 'salted', volumes='whole', salt='x')
  assert not {r['subject'] for r in rows(tmp_path / 'salted')} & {r['subject'] for r in rows(tmp_path / 'b')}


def test_tables_patterns_and_folders_apply_to_series(scans, tmp_path):
  first = sorted((scans / 'p1' / 'a').iterdir())
  (tmp_path / 't.csv').write_text('path,subject,split,grade\np1/a,anna,train,2\np2,bert,test,3\n1.png,anna,train,5\n')
  summary = run([scans], tmp_path / 'c', table=tmp_path / 't.csv', volumes='whole')
  assert summary['not_in_table'] == 7
  found = [[r[k] for k in ('subject', 'split', 'grade', 'shape')] for r in rows(tmp_path / 'c')]
  assert found[0] == ['anna', 'train', 5, [8, 8, 1]]
  assert sorted(found[1:]) == [['anna', 'train', 2, [4, 6, 7, 1]], ['bert', 'test', 3, [5, 6, 7, 1]]]
  name = first[0].relative_to(scans).as_posix()
  for text, match in ((f'path,subject\np1/a,anna\n{name},berta\n', f'lists {name} twice'),
                      (f'path,grade\n{name},1\n' + ''.join(f'{p.relative_to(scans).as_posix()},2\n' for p in first[1:]),
                       'are of one series, but their grade is (1 and 2|2 and 1)'),
                      ('path\np3\n', 'names no file that exists'), ('path\n1.png\nempty\n', 'holds no readable file')):
    (scans / 'empty').mkdir(exist_ok=True)
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(UserError, match=match):
      run([scans], tmp_path / 'd', table=tmp_path / 't.csv')
  run([scans / 'p1', scans / 'p2'], tmp_path / 'e', subject_pattern='^p[0-9]', labels_from_folders=True, volumes='whole')
  found = rows(tmp_path / 'e')
  assert sorted((r['path'][:3], r['subject'], r['label'], r['source']) for r in found) == [
    ('p1/', 'p1', 'a', 'p1'), ('p1/', 'p1', 'b', 'p1'), ('p2/', 'p2', 'c', 'p2')]


def test_folder_formats_are_one_item(tmp_path):
  zarr = pytest.importorskip('zarr')
  pixels = np.random.default_rng(0).integers(0, 900, (3, 20, 21)).astype(np.uint16)
  group = zarr.open_group(str(tmp_path / 'in' / 'deep' / 'cell.zarr'), mode='w', zarr_format=2)
  group.create_array('0', data=pixels, chunks=(1, 20, 21))
  axes = [{'name': 'z', 'type': 'space'}, {'name': 'y', 'type': 'space'}, {'name': 'x', 'type': 'space'}]
  scale = {'type': 'scale', 'scale': [2.0, 1.0, 1.0]}
  group.attrs['multiscales'] = [{'version': '0.4', 'axes': axes,
                                 'datasets': [{'path': '0', 'coordinateTransformations': [scale]}]}]
  for inputs in ([tmp_path / 'in'], [tmp_path / 'in' / 'deep' / 'cell.zarr']):
    summary = run(inputs, tmp_path / 'c', volumes='whole', overwrite=True)
    assert [summary[k] for k in ('records', 'files', 'ignored')] == [1, 1, 0]
    [row] = rows(tmp_path / 'c')
    assert row['path'] in ('deep/cell.zarr', 'cell.zarr')
    assert np.array_equal(open_source(tmp_path / 'c')[0]['image'][..., 0], pixels)


def test_columns_that_readers_fill(tmp_path, monkeypatch):
  """A reader of the test's own; a column of the table of the same name comes first."""
  def read(path, options, mask=None):
    number = int(path.stem)
    yield {'image': np.full((4, 4, 1), number, np.uint8), 'channels': ['g'], 'spacing': None, 'subject': 'x',
           'source': 'own', 'part': '', 'meta': {'modality': 'US', 'site': f'h{number}', 'tile_xy': [number, 7]} if number else {}}

  for i in range(3):
    np.save(tmp_path / f'{i}.npy', np.zeros((4, 4), np.uint8))
  (tmp_path / 't.csv').write_text('path,site\n0.npy,\n1.npy,north\n2.npy,south\n')
  monkeypatch.setattr(readers, 'read', read)
  run([tmp_path], tmp_path / 'c', table=tmp_path / 't.csv')
  assert [[r[k] for k in ('modality', 'site', 'tile_xy')] for r in rows(tmp_path / 'c')] == [
    [None, None, None], ['US', 'north', [1, 7]], ['US', 'south', [2, 7]]]
  schema = pq.read_schema(tmp_path / 'c' / 'manifest.parquet')
  assert schema.field('tile_xy').type == pa.list_(pa.int32())
  assert 'window' not in schema.names
  monkeypatch.setattr(readers, 'read', lambda *args: ((r | {'meta': {'sight': 1}}) for r in read(*args)))
  with pytest.raises(RuntimeError, match="gives 'sight'"):
    run([tmp_path], tmp_path / 'd')


def test_a_dry_run_writes_nothing(scans, tmp_path):
  (scans / 'bad.png').write_bytes(b'')
  np.save(scans / 'v.npy', np.zeros((17, 18, 19), np.uint8))
  try:
    before = sorted(str(p) for p in scans.rglob('*'))
    found = survey([scans], tmp_path / 'c', splits=(0.5, 0.25, 0.25), seed=2)
    assert sorted(str(p) for p in scans.rglob('*')) == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match='fell into train'):
      survey([scans], tmp_path / 'c', subject_pattern=r'\W', splits=(1e-9, 0.5, 0.5 - 1e-9))
    code = 'from jaxmed import cli; import sys; sys.exit(cli.main(sys.argv[1:]))'
    words = ['prepare', scans, '--out', tmp_path / 'c', '--dry-run', '--splits', '0.5,0.25,0.25', '--seed', '2']
    done = subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True, check=True)
    assert list(tmp_path.iterdir()) == []
    summary = run([scans], tmp_path / 'c', splits=(0.5, 0.25, 0.25), seed=2, max_bad=0.2)
  finally:
    (scans / 'bad.png').unlink()
    (scans / 'v.npy').unlink()
  assert found['formats'] == {'array': 1, 'dicom': 3, 'image': 3}
  assert [found[k] for k in ('items', 'groups', 'files', 'empty', 'ignored')] == [8, 3, 18, 1, 1]
  assert found['rejects'] == [['bad.png', 'the file is empty (0 bytes)']]
  assert found['records'] == summary['records'] == 3 + 17 + 13
  assert found['untold'] == 0
  assert found['bytes'] == sum(p.stat().st_size for p in scans.rglob('*') if p.is_file() and p.suffix != '.txt'
                               and 'report' not in p.parts) + 17 * 18 * 19 + 128
  assert found['blocks'] == summary['blocks'] == 1
  assert sum(s['subjects'] for s in found['splits'].values()) == found['subjects'] == 7
  assert '33 records' in done.stdout
  assert '  bad.png: the file is empty (0 bytes)' in done.stdout.splitlines()
  assert 'nothing was written' in done.stdout


def test_card(scans, tmp_path):
  run([scans], tmp_path / 'c', volumes='whole', splits=(0.6, 0.2, 0.2), seed=2)
  card = (tmp_path / 'c' / 'card.md').read_text()
  for line in ('6 records of 5 subjects; 0 files could not be read (rejects.csv).', '## Modalities', '| CT | 3 |',
               '| unknown | 3 |', '| in | 6 |', '| uint8 | 3 |'):
    assert line in card.splitlines(), line
  stats = open_source(tmp_path / 'c').stats['gray']
  assert f'| gray | 6 | {stats["mean"]:.6g} |' in card
  with Image.open(tmp_path / 'c' / 'mosaic.png') as mosaic:
    pixels = np.asarray(mosaic)
  assert pixels.shape == (96, 6 * 96, 3)
  assert pixels[:94, :94].std() > 10  # a picture
  assert (pixels[94:] == 255).all()


def test_large_folders_are_not_prepared_on_the_way(scans, monkeypatch):
  check_small(scans)
  monkeypatch.setattr('jaxmed.data.prepare.prepare.SMALL_FILES', 10)
  with pytest.raises(UserError, match='too large to be prepared on the way .*jaxmed prepare .* --out CORPUS'):
    check_small(scans)


def test_unknown_reading_option(scans, tmp_path):
  with pytest.raises(UserError, match="'sald': did you mean 'salt'"):
    run([scans], tmp_path / 'c', sald='x')
