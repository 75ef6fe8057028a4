"""Folders of channel benchmarks, written small by each format's own library, come out as the benchmark's code has them."""

import csv
import gzip
import hashlib

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from jaxmed import cli
from jaxmed.data import readers
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import benchmarks, blocks
from jaxmed.data.prepare.benchmarks import so2sat
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError

h5py = pytest.importorskip('h5py')


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def run(root, out, **options):
  return prepare([root], out, progress=False, **{'splits': (1, 0, 0)} | options)


def write_csv(path, head, lines, delimiter=','):
  path.parent.mkdir(parents=True, exist_ok=True)
  with (gzip.open if path.suffix == '.gz' else open)(path, 'wt', newline='', encoding='utf-8') as f:
    csv.writer(f, delimiter=delimiter).writerows([head, *lines])


def by_path(out):
  source = open_source(out)
  return {row['path']: row | {'image': source[i]['image'], 'record': source[i]}
          for i, row in enumerate(source.table.to_pylist())}


# BraTS

def volume(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def brats(root, rng, case, words, sep, suffix='.nii.gz'):
  arrays = {w: rng.integers(0, 900, (5, 6, 4)).astype(np.int16) for w in words}
  for word, array in arrays.items():
    volume(root / case / f'{case}{sep}{word}{suffix}', array % 4 if word == 'seg' else array)
  return arrays


OLD, NEW = ('t1', 't1ce', 't2', 'flair', 'seg'), ('t1n', 't1c', 't2w', 't2f', 'seg')


def test_brats_of_all_years(tmp_path, rng, capsys):
  root = tmp_path / 'in'
  made = {'BraTS2021_00003': brats(root, rng, 'BraTS2021_00003', OLD, '_'),
          'HGG/BraTS19_CBICA_AAB_1': brats(root / 'HGG', rng, 'BraTS19_CBICA_AAB_1', OLD, '_', '.nii'),
          'new/BraTS-GLI-00005-000': brats(root / 'new', rng, 'BraTS-GLI-00005-000', NEW, '-'),
          'new/BraTS-GLI-00005-001': brats(root / 'new', rng, 'BraTS-GLI-00005-001', NEW[:4], '-')}
  planned = survey([root], tmp_path / 'c', volumes='whole', splits=(1, 0, 0))
  summary = run(root, tmp_path / 'c', volumes='whole')
  assert planned['records'] == summary['records'] == 4
  assert planned['formats'] == {'nifti': 4}
  assert 'laid out as BraTS' in capsys.readouterr().err
  assert list(summary['channels']) == sorted(('T1', 'T1c', 'T2', 'FLAIR'))
  rows = by_path(tmp_path / 'c')
  assert set(rows) == set(made)
  for name, arrays in made.items():
    row = rows[name]
    words = OLD if 't1' in arrays else NEW
    assert row['channels'] == ['T1', 'T1c', 'T2', 'FLAIR']
    want = np.stack([arrays[w] for w in words[:4]], -1).transpose(2, 1, 0, 3)  # [z, y, x, C]
    assert np.array_equal(row['image'], want), name
    assert row['image'].dtype == np.int16
    if 'seg' in arrays:
      assert np.array_equal(row['record']['mask'], (arrays['seg'] % 4).transpose(2, 1, 0))
    else:
      assert 'mask' not in row['record']
  assert rows['new/BraTS-GLI-00005-000']['subject'] == rows['new/BraTS-GLI-00005-001']['subject'] == 'BraTS-GLI-00005'
  assert [rows[f'new/BraTS-GLI-00005-00{i}']['visit'] for i in (0, 1)] == ['000', '001']
  assert rows['HGG/BraTS19_CBICA_AAB_1']['grade'] == 'HGG'
  assert {r['source'] for r in rows.values()} == {'BraTS2021', 'BraTS19', 'BraTS-GLI'}


def test_brats_in_slices_with_masks_and_the_odd_one_of_2020(tmp_path, rng):
  arrays = brats(tmp_path / 'in', rng, 'BraTS20_Training_355', OLD[:4], '_', '.nii')
  volume(tmp_path / 'in/BraTS20_Training_355/W39_1998.09.19_Segm.nii', (arrays['t1'] > 450).astype(np.int16))
  assert run(tmp_path / 'in', tmp_path / 'c')['records'] == 4
  source = open_source(tmp_path / 'c')
  assert 'visit' not in source.table.column_names  # nobody has one
  for z in range(4):
    assert np.array_equal(source[z]['image'][..., 1], arrays['t1ce'][:, :, z].T)
    assert np.array_equal(source[z]['mask'], arrays['t1'][:, :, z].T > 450)


def test_brats_that_lacks_a_sequence_or_has_another_grid(tmp_path, rng):
  root = tmp_path / 'in'
  brats(root, rng, 'BraTS2021_00000', OLD, '_')
  brats(root, rng, 'BraTS2021_00001', ('t1', 't2', 'flair'), '_')
  with pytest.raises(UserError, match=r'1 of 2 files .* first BraTS2021_00001: has no T1c: expected BraTS2021_00001_t1ce'):
    run(root, tmp_path / 'c')
  assert run(root, tmp_path / 'c', max_bad=0.5)['records'] == 4
  volume(root / 'BraTS2021_00001/BraTS2021_00001_t1ce.nii.gz', np.zeros((5, 6, 3), np.int16))
  with pytest.raises(UserError, match=r'BraTS2021_00001_t1ce.nii.gz has the grid \[3, 6, 5\], BraTS2021_00001_t1.nii.gz'):
    run(root, tmp_path / 'd')


# JUMP-CP

def jumpcp(root, rng, count=10):
  """A plate as in the bucket, whose path column still names the bucket."""
  maps = root / 'platemap_and_metadata'
  maps.mkdir(parents=True)
  # As in the bucket: Parquet with the suffix .tsv.
  pq.write_table(pa.table({'broad_sample': ['BRD-1', 'BRD-2', None], 'target': ['GPR1', 'ABL1', None]}),
                 maps / 'JUMP-Target-1_compound_metadata.tsv')
  pq.write_table(pa.table({'well_position': ['A01', 'A02', 'B03'], 'broad_sample': ['BRD-1', None, 'BRD-2']}),
                 maps / 'JUMP-Target-1_compound_platemap.tsv')
  wells = [('A01', 'A02', 'B03', 'C04')[i % 4] for i in range(count)]
  ids = [f'BR00116991_{w}_{1 + i % 9}_{i}' for i, w in enumerate(wells)]
  (root / 'BR00116991').mkdir()
  cells = rng.integers(0, 256, (count, 8, 20, 20)).astype(np.uint8)
  for name, cell in zip(ids, cells):
    np.save(root / f'BR00116991/{name}.npy', cell)
  pq.write_table(pa.table({'ID': ids, 'well_loc': wells, 'plate_id': ['BR00116991'] * count,
                           'path': [f's3://bucket/jumpcp/BR00116991/{n}.npy' for n in ids],
                           'box': [[0, 1]] * count}), root / 'BR00116991.pq')
  return ids, wells, cells


def test_jumpcp_cells(tmp_path, rng, capsys):
  ids, wells, cells = jumpcp(tmp_path / 'jumpcp', rng)
  summary = run(tmp_path, tmp_path / 'c', splits=(0.8, 0.1, 0.1))  # the folder around it will do
  assert 'laid out as JUMP-CP' in capsys.readouterr().err
  assert {k: v['records'] for k, v in summary['splits'].items()} == {'train': 6, 'val': 2, 'test': 2}
  rows = by_path(tmp_path / 'c')
  labels = {'A01': 'GPR1', 'A02': 'control', 'B03': 'ABL1', 'C04': None}
  for name, well, cell in zip(ids, wells, cells):
    row = rows[f'BR00116991/{name}.npy']
    assert np.array_equal(row['image'], cell.transpose(1, 2, 0))
    assert [row[k] for k in ('label', 'well', 'plate', 'subject')] == [labels[well], well, 'BR00116991', name]
    assert row['field'] == name.split('_')[2]
  assert next(iter(rows.values()))['channels'][:5] == ['AGP', 'DNA', 'ER', 'Mito', 'RNA']


def test_jumpcp_splits_are_those_of_the_papers_code(tmp_path, rng):
  pandas = pytest.importorskip('pandas')
  ids, _, _ = jumpcp(tmp_path / 'in', rng, 13)
  frame = pandas.read_parquet(tmp_path / 'in/BR00116991.pq')
  np.random.seed(0)
  order = np.random.permutation(frame.index)
  want = {'train': order[:7], 'val': order[7:9], 'test': order[9:]}
  run(tmp_path / 'in', tmp_path / 'c')
  rows = by_path(tmp_path / 'c').values()
  for split, places in want.items():
    assert {r['subject'] for r in rows if r['split'] == split} == set(frame['ID'].iloc[places])
  # By wells: a subject pattern, and then splits are drawn.
  run(tmp_path / 'in', tmp_path / 'd', subject_pattern=r'/([^/]+_[A-P]\d+)_', splits=(0.5, 0.25, 0.25), seed=3)
  rows = by_path(tmp_path / 'd').values()
  assert {r['subject'] for r in rows} == {f'BR00116991_{w}' for w in ('A01', 'A02', 'B03', 'C04')}
  assert len({(r['subject'], r['split']) for r in rows}) == 4


def test_jumpcp_fields_of_view(tmp_path, rng):
  root = tmp_path / 'in'
  names = ('DNA', 'ER', 'Mito')
  head = ['Metadata_Plate', 'Metadata_Well', 'Metadata_Site']
  head += [f'{k}_Orig{c}' for c in names for k in ('FileName', 'PathName')]
  planes, lines = {}, []
  for well, site in (('A01', 1), ('A01', 2), ('B02', 1)):
    line = ['P1', well, site]
    for c in names:
      planes[well, site, c] = rng.integers(0, 65536, (12, 10)).astype(np.uint16)
      file = root / 'images/P1' / f'{well}_{site}-{c}.tiff'
      file.parent.mkdir(parents=True, exist_ok=True)
      tifffile.imwrite(file, planes[well, site, c])
      line += [file.name, '/elsewhere/cpg/images/P1/']
    lines.append(line)
  write_csv(root / 'load_data/P1/load_data.csv.gz', head, lines)
  summary = run(root, tmp_path / 'c', layout='jumpcp')
  assert summary['records'] == 3
  assert summary['subjects'] == 2
  rows = by_path(tmp_path / 'c')
  row = rows['P1/A01/2']
  assert row['channels'] == list(names)
  assert np.array_equal(row['image'], np.stack([planes['A01', 2, c] for c in names], -1))
  assert (row['subject'], row['well'], row['field'], row['label']) == ('P1_A01', 'A01', '2', None)
  (root / 'images/P1/B02_1-ER.tiff').unlink()
  with pytest.raises(UserError, match='first P1/B02/1: load_data.csv.gz names B02_1-ER.tiff for ER, but no such file'):
    run(root, tmp_path / 'd', layout='jumpcp')


# CHAMMI

def chammi(root, rng):
  cells = {}
  for name, count, width in (('Allen', 3, 9), ('HPA', 4, 8), ('CP', 5, 7)):
    lines = []
    for i, task in enumerate(('Train', 'Train', 'Task_one')):
      cell = rng.integers(0, 256, (6, width, count)).astype(np.uint8)
      path = f'{name}/crops/{i}.{"png" if name != "Allen" else "ome.tiff"}'
      (root / path).parent.mkdir(parents=True, exist_ok=True)
      tape = np.concatenate(list(np.moveaxis(cell, -1, 0)), axis=1)  # side by side
      if name == 'Allen':
        tifffile.imwrite(root / path, tape)
      else:
        Image.fromarray(tape).save(root / path)
      cells[path] = cell
      lines.append([path, float(width), task, f'{name}-{i % 2}', f'type{i}'])
    write_csv(root / name / 'enriched_meta.csv', ['file_path', 'channel_width', 'train_test_split', 'Label', 'cell_type'],
              lines)
  return cells


def test_chammi(tmp_path, rng, capsys):
  cells = chammi(tmp_path / 'in', rng)
  summary = run(tmp_path / 'in', tmp_path / 'c')
  assert 'laid out as CHAMMI' in capsys.readouterr().err
  assert {k: v['records'] for k, v in summary['splits'].items()} == {'train': 6, 'test': 3}
  assert len(summary['channels']) == 8  # of 12, as nucleus, protein and er are shared
  rows = by_path(tmp_path / 'c')
  for path, cell in cells.items():
    # What morphem/folded_dataset.py does to a tape [H, W * C].
    tape = np.concatenate(list(np.moveaxis(cell, -1, 0)), axis=1)
    folded = np.reshape(tape, (tape.shape[0], cell.shape[1], -1), order='F')
    assert np.array_equal(rows[path]['image'], folded)
    assert np.array_equal(folded, cell)
  row = rows['HPA/crops/2.png']
  assert row['channels'] == ['microtubules', 'protein', 'nucleus', 'er']
  assert [row[k] for k in ('source', 'split', 'task', 'label', 'cell_type', 'plate')] == [
    'HPA', 'test', 'Task_one', 'HPA-0', 'type2', None]


def test_chammi_of_one_table_and_its_mistakes(tmp_path, rng):
  root = tmp_path / 'in'
  cells = chammi(root, rng)
  lines = [[p, p.split('/')[0], c.shape[1], 'Train', 'x'] for p, c in cells.items()]
  for name in ('Allen', 'HPA', 'CP'):
    (root / name / 'enriched_meta.csv').unlink()
  head = ['file_path', 'chunk', 'channel_width', 'train_test_split', 'label']
  write_csv(root / 'morphem70k_v2.csv', head, lines)
  assert run(root, tmp_path / 'c')['labels']['label'] == 1
  for k, value, match in ((1, 'HPAA', "unknown chunk .*'HPAA': did you mean 'HPA'"), (2, 'wide', "channel_width of .* is 'wide'"),
                          (2, 5, r'has the shape \[6, 27, 1\]: expected 3 channels side by side, each 5 pixels wide'),
                          (0, 'CP/crops/99.png', 'first CP/crops/99.png: morphem70k_v2.csv names it, but no such file')):
    bad = [list(line) for line in lines]
    bad[0][k] = value
    write_csv(root / 'morphem70k_v2.csv', head, bad)
    with pytest.raises(UserError, match=match):
      run(root, tmp_path / 'd')
  write_csv(root / 'morphem70k_v2.csv', ['file', *head[1:]], lines)
  with pytest.raises(UserError, match="unknown column .*'file_path'"):
    run(root, tmp_path / 'd')


# So2Sat

def so2sat_files(root, rng, counts):
  root.mkdir(parents=True)
  made = {}
  for name, n in counts.items():
    zones = rng.integers(0, 17, n)
    parts = rng.normal(size=(n, 4, 4, 8)), rng.random((n, 4, 4, 10)), np.eye(17)[zones]
    with h5py.File(root / name, 'w') as store:
      for key, value in zip(('sen1', 'sen2', 'label'), parts):
        store[key] = value
    made[name] = (*parts, zones)
  return made


def test_so2sat(tmp_path, rng, monkeypatch, capsys):
  monkeypatch.setattr(so2sat, 'ROWS', 5)
  made = so2sat_files(tmp_path / 'in', rng, {'training.h5': 12, 'validation.h5': 4, 'testing.h5': 5})
  planned = survey([tmp_path / 'in'], tmp_path / 'c')
  summary = run(tmp_path / 'in', tmp_path / 'c')
  assert 'laid out as So2Sat' in capsys.readouterr().err
  assert planned['records'] == summary['records'] == 21
  assert planned['items'] == 3 + 1 + 1
  assert {k: v['records'] for k, v in summary['splits'].items()} == {'train': 12, 'val': 4, 'test': 5}
  source = open_source(tmp_path / 'c')
  assert source.channels == so2sat.CHANNELS
  assert len(so2sat.CHANNELS) == 18
  rows = source.table.to_pylist()
  assert len({r['subject'] for r in rows}) == len({r['id'] for r in rows}) == 21
  for i, row in enumerate(rows):
    name, place = row['subject'].split('/')
    sen1, sen2, _, zones = made[name]
    want = np.concatenate([sen1[int(place)], sen2[int(place)]], -1).astype(np.float32)
    assert np.array_equal(source[i]['image'], want)
    assert row['label'] == so2sat.ZONES[zones[int(place)]]


def test_so2sat_is_read_in_pieces(tmp_path, rng, monkeypatch):
  """No read takes more than 64 patches of a file, and equal rows have equal hashes."""
  monkeypatch.setattr(so2sat, 'ROWS', 100)
  so2sat_files(tmp_path / 'in', rng, {'training.h5': 150, 'testing.h5': 70})
  seen, read = [], h5py.Dataset.__getitem__

  def watched(self, at, *rest):
    value = read(self, at, *rest)
    seen.append(len(value))
    return value

  monkeypatch.setattr(h5py.Dataset, '__getitem__', watched)
  run(tmp_path / 'in', tmp_path / 'c')
  assert max(seen) == 64
  hashes = {r['path']: r['sha256'] for r in open_source(tmp_path / 'c').table.to_pylist()}
  assert len(hashes) == len(set(hashes.values())) == 3


def test_so2sat_is_read_once(tmp_path, rng, monkeypatch):
  """Rows are hashed as they are read; where the hash is needed before their end, beforehand."""
  so2sat_files(tmp_path / 'in', rng, {'training.h5': 150, 'testing.h5': 70})
  seen, read = [], h5py.Dataset.__getitem__

  def watched(self, at, *rest):
    value = read(self, at, *rest)
    seen.append((self.name, len(value)))
    return value

  monkeypatch.setattr(h5py.Dataset, '__getitem__', watched)
  run(tmp_path / 'in', tmp_path / 'c')
  assert sum(n for _, n in seen) == 3 * (150 + 70)
  monkeypatch.setattr(blocks, 'HELD_BYTES', 100_000)
  run(tmp_path / 'in', tmp_path / 'd')
  hashes = [[(r['path'], r['sha256']) for r in open_source(tmp_path / name).table.to_pylist()] for name in 'cd']
  assert hashes[0] == hashes[1]
  assert len({h for _, h in hashes[0]}) == 2
  with h5py.File(tmp_path / 'in' / 'testing.h5') as store:
    want = hashlib.sha256()
    for first in (0, 64):
      for key in ('sen1', 'sen2', 'label'):
        want.update(store[key][first:first + 64].tobytes())
  assert want.hexdigest() in {h for _, h in hashes[0]}


def test_so2sat_mistakes(tmp_path, rng):
  so2sat_files(tmp_path / 'in', rng, {'training.h5': 3, 'testing.h5': 2})
  with h5py.File(tmp_path / 'in/testing.h5', 'a') as store:
    del store['sen2']
  with pytest.raises(UserError, match=r"testing.h5 has no data set 'sen2': it has label, sen1"):
    run(tmp_path / 'in', tmp_path / 'c')
  with h5py.File(tmp_path / 'in/testing.h5', 'a') as store:
    store['sen2'] = np.zeros((2, 4, 4, 9))
  with pytest.raises(UserError, match=r"sen2 of shape \[2, 4, 4, 9\]: expected \[2, 'H', 'W', 10\]"):
    run(tmp_path / 'in', tmp_path / 'c')
  (tmp_path / 'in/testing.h5').write_bytes(b'no')
  with pytest.raises(UserError, match='testing.h5 is no HDF5 file'):
    run(tmp_path / 'in', tmp_path / 'c')


# What all share

def test_named_layouts_and_their_mistakes(tmp_path, rng, capsys):
  root = tmp_path / 'in'
  brats(root, rng, 'BraTS2021_00000', OLD, '_')
  argv = ['prepare', str(root), '--out', str(tmp_path / 'c'), '--workers', '1', '--splits', '1,0,0']
  for words, told in ((['--layout', 'bratz'], "unknown layout 'bratz': did you mean 'brats'"),
                      (['--layout', 'chammi'], 'is not laid out as CHAMMI: expected Allen, HPA or CP'),
                      (['--layout', 'so2sat'], 'is not laid out as So2Sat LCZ42: expected training.h5'),
                      (['--layout', 'jumpcp'], 'is not laid out as JUMP-CP: expected a plate'),
                      (['--layout', 'brats', '--channels', 'a,b'], '--layout brats says itself what --channels says')):
    assert cli.main([*argv, *words]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count('\n') == 1
  with pytest.raises(UserError, match='--layout brats is of one folder, not of '):
    prepare([root, tmp_path], tmp_path / 'd', layout='brats')
  assert cli.main([*argv, '--layout', 'none', '--channels', 'gray']) == 0
  assert set(open_source(tmp_path / 'c').table['channels'].to_pylist()[0]) == {'gray'}


def test_plain_folders_have_no_layout(tmp_path):
  for i in range(3):
    Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f'{i}.png')
  assert benchmarks.find('auto', [tmp_path], []) == ''
  assert benchmarks.find('auto', [tmp_path / '0.png'], []) == ''


def test_another_way_of_reading_begins_afresh(tmp_path, rng):
  """The fingerprint of a corpus knows how channels lie in files, and workers read the same bytes."""
  from jaxmed.data.prepare.preparation import make_preparation

  cells = chammi(tmp_path / 'in', rng)
  first = make_preparation([tmp_path / 'in'], tmp_path / 'c', layout='chammi').fingerprint()
  assert make_preparation([tmp_path / 'in'], tmp_path / 'c', layout='chammi').fingerprint() == first
  widths = {p: c.shape[1] + 1 for p, c in cells.items()}
  write_csv(tmp_path / 'in/HPA/enriched_meta.csv', ['file_path', 'channel_width', 'train_test_split', 'Label'],
            [[p, w, 'Train', 'x'] for p, w in widths.items() if p.startswith('HPA')])
  assert make_preparation([tmp_path / 'in'], tmp_path / 'c', layout='chammi').fingerprint() != first
  assert readers.Parts((tmp_path,), ('a',), 'named').rows is None


# Tables that are not whole

def fields(root, rng, plate, names=('AGP', 'DNA', 'Mito'), sites=2):
  """Fields of view of a plate; returns the head of its table and its rows, which are written."""
  head = ['Metadata_Plate', 'Metadata_Well', 'Metadata_Site'] + [
    f'{k}_Orig{c}' for c in names for k in ('FileName', 'PathName')]
  lines = []
  for site in range(1, sites + 1):
    line = [plate, 'A01', site]
    for c in names:
      file = root / 'images' / plate / f'A01_{site}-{c}.tiff'
      file.parent.mkdir(parents=True, exist_ok=True)
      tifffile.imwrite(file, rng.integers(0, 65536, (6, 5)).astype(np.uint16))
      line += [file.name, f'/cpg/images/{plate}/']
    lines.append(line)
  write_csv(root / plate / 'load_data.csv', head, lines)
  return head, lines


@pytest.mark.parametrize('data, reason', [(b'', 'it is empty'), (b'Metadata_Plate,Metadata_Well\n', "did you mean"),
                                          (None, 'lists no image')])
def test_a_plate_whose_table_is_empty_is_a_reject_and_the_others_stay(data, reason, tmp_path, rng):
  root = tmp_path / 'in'
  fields(root, rng, 'P1')
  head, _ = fields(root, rng, 'P2')
  if data is None:
    write_csv(root / 'P2/load_data.csv', head, [])
  else:
    (root / 'P2/load_data.csv').write_bytes(data)
  summary = run(root, tmp_path / 'c', layout='jumpcp', max_bad=0.5)
  assert (summary['records'], summary['rejected']) == (2, 1)
  (_, (path, told)) = csv.reader((tmp_path / 'c/rejects.csv').read_text().splitlines())
  assert path == 'P2/load_data.csv' and reason in told
  with pytest.raises(UserError, match='1 of 3 files are unreadable.*first P2/load_data.csv'):
    run(root, tmp_path / 'd', layout='jumpcp')


def test_one_file_for_two_channels_or_fields_is_no_field(tmp_path, rng):
  root = tmp_path / 'in'
  head, lines = fields(root, rng, 'P1', sites=4)
  lines[0][head.index('FileName_OrigMito')] = lines[0][head.index('FileName_OrigAGP')]
  lines[1][head.index('FileName_OrigDNA')] = lines[2][head.index('FileName_OrigDNA')]
  (root / 'images/P1/A01_4-DNA.tiff').unlink()
  (root / 'images/P1/A01_4-DNA.tiff').symlink_to('A01_4-AGP.tiff')
  write_csv(root / 'P1/load_data.csv', head, lines)
  plan = benchmarks.plan('jumpcp', root)
  assert [i.rel for i in plan.items] == ['P1/A01/2']
  assert dict(plan.rejects) == {
    'P1/A01/1': 'load_data.csv names A01_1-AGP.tiff for both AGP and Mito: expected a file for each',
    'P1/A01/3': 'load_data.csv names A01_3-DNA.tiff for DNA, which is DNA of P1/A01/2 already: expected a file for each',
    'P1/A01/4': 'load_data.csv names A01_4-DNA.tiff for both AGP and DNA: expected a file for each'}


def test_a_channel_that_no_row_names_is_left_out(tmp_path, rng, capsys):
  root = tmp_path / 'in'
  head, lines = fields(root, rng, 'P1', ('AGP', 'DNA', 'Brightfield'))
  fields(root, rng, 'P2', ('AGP', 'DNA', 'Brightfield'))
  for line in lines:
    line[-2:] = ['', '']
  write_csv(root / 'P1/load_data.csv', head, lines, ';')
  run(root, tmp_path / 'c', layout='jumpcp')
  rows = by_path(tmp_path / 'c')
  assert [rows[f'{p}/A01/1']['channels'] for p in ('P1', 'P2')] == [['AGP', 'DNA'], ['AGP', 'DNA', 'Brightfield']]
  assert 'tables that name no file for Brightfield: 1; their images' in capsys.readouterr().err


def test_an_empty_table_of_chammi_is_a_reject(tmp_path, rng):
  chammi(tmp_path / 'in', rng)
  (tmp_path / 'in/HPA/enriched_meta.csv').write_bytes(b'')
  plan = benchmarks.plan('chammi', tmp_path / 'in')
  assert len(plan.items) == 6
  assert [path for path, _ in plan.rejects] == ['HPA/enriched_meta.csv']


def test_brats_by_links(tmp_path, rng):
  root = tmp_path / 'in'
  brats(root, rng, 'BraTS2021_00000', OLD, '_')
  brats(root, rng, 'BraTS2021_00001', OLD, '_')
  (root / 'alias').symlink_to('BraTS2021_00000')
  (root / 'loop').symlink_to('.')
  case = root / 'BraTS2021_00001'
  (case / f'{case.name}_t1ce.nii.gz').unlink()
  (case / f'{case.name}_t1ce.nii.gz').symlink_to(f'{case.name}_t1.nii.gz')
  plan = benchmarks.plan('brats', root)
  assert [i.rel for i in plan.items] == ['BraTS2021_00000']
  assert [path for path, _ in plan.rejects] == ['BraTS2021_00001']
  assert 'leads to the file that is T1' in plan.rejects[0][1]
