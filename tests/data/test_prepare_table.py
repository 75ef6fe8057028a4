"""Texts, masks and signals that a table lays beside images, and what shaping does to a whole corpus."""

import csv
import dataclasses
import gzip
import os

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmed.data import readers
from jaxmed.data.corpus import store
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import blocks, spreadsheet
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.data.readers.companions import read_signal
from jaxmed.errors import UserError
from tests.data.readers import dicoms


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path, rng):
  """Three volumes in other orientations with masks, a photo with a mask and a signal, a photo with nothing."""
  root = tmp_path / 'in'
  root.mkdir()
  for i, turn in enumerate((np.eye(3), np.diag([-1, -1, 1.0]), np.eye(3)[[2, 0, 1]])):
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.0, 2.0, 1.5])
    volume = np.zeros((14, 9, 11), np.int16)
    volume[3:9, 2:7, 4:8] = 500 + rng.integers(0, 300, (6, 5, 4))
    nibabel.save(nibabel.Nifti1Image(volume, affine), root / f'v{i}.nii.gz')
    nibabel.save(nibabel.Nifti1Image((volume > 600).astype(np.float32) * 3, affine), root / f'm{i}.nii.gz')
  photo = rng.integers(30, 200, (12, 10, 3)).astype(np.uint8)
  for name in 'ab':
    Image.fromarray(photo).save(root / f'{name}.png')
  Image.fromarray(photo[..., 0] // 64).save(root / 'a_mask.png')
  np.save(root / 'ecg.npy', rng.normal(size=(50, 2)))
  table(root, [('v0.nii.gz', 'p0', 'train', 'A note,\nwith a line.', 'm0.nii.gz', '', ''),
               ('v1.nii.gz', 'p1', 'train', '', 'm1.nii.gz', '', ''), ('v2.nii.gz', 'p2', 'val', 'ok', 'm2.nii.gz', '', ''),
               ('a.png', 'p3', 'train', 'Größe', 'a_mask.png', 'ecg.npy', '250'), ('b.png', 'p4', 'test', '', '', '', '')])
  return root


def table(root, lines, head=('path', 'subject', 'split', 'text', 'mask', 'signal', 'signal_rate')):
  with open(root / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows([head, *lines])


def run(root, out, **options):
  return prepare([root], out, table=root / 'table.csv', progress=False, **options)


def content(out):
  return {p.name: p.read_bytes() for p in out.iterdir()}


def test_records_hold_text_mask_and_signal_where_there_are_some(folder, tmp_path):
  summary = run(folder, tmp_path / 'c', volumes='whole')
  assert [summary[k] for k in ('records', 'rejected', 'not_in_table', 'labels')] == [5, 0, 0, {}]
  source = open_source(tmp_path / 'c')
  records = {r['id']: r for r in source}
  assert [set(records[k]) & {'text', 'mask', 'signal', 'signal_rate'} for k in ('v1.nii.gz', 'a.png', 'b.png')] == [
    {'mask'}, {'text', 'mask', 'signal', 'signal_rate'}, set()]
  assert records['v0.nii.gz']['text'] == 'A note,\nwith a line.'
  assert records['a.png']['text'] == 'Größe'
  assert source.table['text'].to_pylist() == ['A note,\nwith a line.', None, 'ok', 'Größe', None]
  assert source.table['mask'].to_pylist()[3] == 'a_mask.png'
  for i in range(3):  # on the image's grid, turned as it is
    record = records[f'v{i}.nii.gz']
    assert np.array_equal(record['mask'], (record['image'][..., 0] > 600) * 3)
    assert record['mask'].dtype == np.uint8
    assert record['mask'].any()
  assert np.array_equal(records['a.png']['mask'], np.asarray(Image.open(folder / 'a_mask.png')))
  assert np.array_equal(records['a.png']['signal'], np.load(folder / 'ecg.npy').astype(np.float32))
  assert records['a.png']['signal_rate'] == 250.0


def test_masks_are_brought_into_shape_with_their_image(folder, tmp_path):
  """Mask and image stay together through spacing, crop and planes: a mask of the image's own values shows it."""
  options = {'spacing': (1.0,), 'crop': 'foreground', 'margin': 1}
  run(folder, tmp_path / 'c', volumes='whole', **options)
  run(folder, tmp_path / 'd', **options)
  planes = {r['id']: r for r in open_source(tmp_path / 'd')}
  count = 0
  for record in open_source(tmp_path / 'c'):
    if record['image'].ndim == 4:
      assert record['mask'].shape == record['image'].shape[:-1]
      assert record['spacing'] == [1, 1, 1]
      inside = record['image'][..., 0][record['mask'] > 0]
      assert inside.min() > 250  # half of what lay in the mask: the nearest voxel was above 600
      assert np.count_nonzero(record['mask']) > 100
      for z in range(len(record['image'])):
        plane = planes[f'{record["id"]}#z{z:03d}']
        assert np.array_equal(plane['mask'], record['mask'][z])
        assert np.array_equal(plane['image'], record['image'][z])
        count += 1
  assert count == len(planes) - 2


def test_large_masks_lie_in_bricks(folder, tmp_path, monkeypatch):
  run(folder, tmp_path / 'c', volumes='whole')
  monkeypatch.setattr(store, 'CHUNK_BYTES', 1000)
  monkeypatch.setattr(store, 'EDGE', 4)
  run(folder, tmp_path / 'd', volumes='whole')
  one, other = open_source(tmp_path / 'c'), open_source(tmp_path / 'd')
  assert list(tmp_path.glob('d/bricks-*'))
  assert len((tmp_path / 'd' / 'corpus-train.array_record-00000-of-00001').read_bytes()) > 0
  for i in range(5):
    assert set(one[i]) == set(other[i])
    assert np.array_equal(one[i]['image'], other[i]['image'])
    assert np.array_equal(one[i].get('mask', 0), other[i].get('mask', 0))
  assert np.array_equal(other.window(0, [2, 3, 4], [5, 4, 3]), one[0]['image'][2:7, 3:7, 4:7])


def test_masks_that_do_not_fit_are_rejected(folder, tmp_path):
  nibabel.save(nibabel.Nifti1Image(np.zeros((14, 9, 11), np.uint8), np.diag([1, 2, 1.5, 1.0])), folder / 'fits.nii')
  nibabel.save(nibabel.Nifti1Image(np.zeros((14, 9, 10), np.uint8), np.diag([1, 2, 1.5, 1.0])), folder / 'short.nii')
  nibabel.save(nibabel.Nifti1Image(np.zeros((14, 9, 11), np.uint8), np.diag([1, 2, 2.5, 1.0])), folder / 'far.nii')
  moved = np.diag([1, 2, 1.5, 1.0])
  moved[0, 3] = 5
  nibabel.save(nibabel.Nifti1Image(np.zeros((14, 9, 11), np.uint8), moved), folder / 'moved.nii')
  nibabel.save(nibabel.Nifti1Image(np.full((14, 9, 11), 0.5, np.float32), moved), folder / 'soft.nii')
  (folder / 'broken.nii').write_bytes(b'no')
  expected = {'short': 'mask: its grid is [10, 9, 14], that of the image [11, 9, 14]',
              'far': 'mask: its spacing is 2.5, 2, 1 mm, that of the image 1.5, 2, 1 mm',
              'moved': 'mask: its origin is 5, 0, 0 mm, that of the image 0, 0, 0 mm',
              'soft': 'mask: its values are no integers', 'broken': 'mask: ', 'lost': 'the table names the mask lost.nii, but'}
  found = {}
  for name in expected:
    table(folder, [('v0.nii.gz', f'{name}.nii'), ('b.png', '')], ('path', 'mask'))
    run(folder, tmp_path / name, max_bad=0.5, splits=(1, 0, 0))
    found[name] = (tmp_path / name / 'rejects.csv').read_text().splitlines()[1]
  for name, words in expected.items():
    assert words in found[name], name
  table(folder, [('a.png', 'b.png')], ('path', 'mask'))
  with pytest.raises(UserError, match='mask: has 3 channels: expected one value a pixel'):
    run(folder, tmp_path / 'e')
  table(folder, [('v0.nii.gz', 'fits.nii')], ('path', 'mask'))
  assert run(folder, tmp_path / 'f', splits=(1, 0, 0))['records'] == 11


def test_a_mask_with_a_palette_keeps_its_numbers(folder, tmp_path, rng):
  labels = rng.integers(0, 4, (12, 10)).astype(np.uint8)
  image = Image.fromarray(labels)
  image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
  image.save(folder / 'voc.png')
  assert Image.open(folder / 'voc.png').mode == 'P'
  table(folder, [('a.png', 'voc.png')], ('path', 'mask'))
  run(folder, tmp_path / 'c', splits=(1, 0, 0))
  assert np.array_equal(open_source(tmp_path / 'c')[0]['mask'], labels)


def test_options_of_the_command(folder, tmp_path, capsys):
  from jaxmed import cli

  words = lambda *more: ['prepare', str(folder), '--table', str(folder / 'table.csv'), '--out', str(tmp_path / 'c'), *more]
  for more, said in ((['--spacing', 'x'], '--spacing x: expected one number of mm, or three'),
                     (['--spacing', '1,2'], 'spacing is 1.0, 2.0'), (['--min-content', '2'], 'min_content is 2.0'),
                     (['--margin', '-3'], 'margin is -3'), (['--slurm', '1', '--scheduler', 'tcp://x:1'], 'not both')):
    assert cli.main(words(*more)) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count('\n') == 1
  options = ['--spacing', '2,1,1', '--crop', 'foreground', '--margin', '0', '--min-content', '0.01', '--plane', 'acquired',
             '--workers', '1']
  assert cli.main(words(*options, '--dry-run')) == 0
  assert '2 records before --min-content, and those of 3 items that are cropped' in capsys.readouterr().out
  assert cli.main(words(*options)) == 0
  spacings = {tuple(r['spacing']) for r in open_source(tmp_path / 'c') if r['spacing']}
  assert spacings <= {(1.0, 1.0), (2.0, 1.0)}
  assert spacings


def test_a_mask_of_a_series(tmp_path, rng):
  """DICOM slices of LPS and a NIfTI mask made from what they become."""
  volume = rng.integers(0, 900, (9, 12, 10)).astype(np.int16)
  (tmp_path / 'in').mkdir()
  dicoms.write(tmp_path / 'in' / 's', dicoms.series(volume, (0, 1, 0, 0, 0, -1), (2.0, 0, 0)), rng)
  prepare([tmp_path / 'in'], tmp_path / 'plain', volumes='whole', splits=(1, 0, 0), progress=False)
  source = open_source(tmp_path / 'plain')
  row = source.table.to_pylist()[0]
  affine = np.eye(4)
  affine[:3, :3] = np.reshape(row['direction'], (3, 3)) @ np.diag(row['spacing'][::-1])
  affine[:3, 3] = row['origin']
  labels = (source[0]['image'][..., 0] > 450).T.astype(np.uint8)
  nibabel.save(nibabel.Nifti1Image(labels[::-1], affine @ np.array([[-1, 0, 0, labels.shape[0] - 1], *np.eye(4)[1:]])),
               tmp_path / 'in' / 'm.nii.gz')
  table(tmp_path / 'in', [('s', 'm.nii.gz', 'sagittal')], ('path', 'mask', 'text'))
  run(tmp_path / 'in', tmp_path / 'c', volumes='whole', splits=(1, 0, 0))
  [record] = open_source(tmp_path / 'c')
  assert np.array_equal(record['mask'], record['image'][..., 0] > 450)
  assert record['text'] == 'sagittal'


def test_signals(tmp_path, rng):
  counts = rng.integers(-2000, 2000, (40, 3)).astype(np.int16)
  np.save(tmp_path / 'a.npy', counts)
  np.save(tmp_path / 'one.npy', counts[:, 0])
  np.savetxt(tmp_path / 'b.csv', counts / 4, delimiter=',', header='I,II,III', comments='')
  pq.write_table(pa.table({k: counts[:, i] for i, k in enumerate('xyz')}), tmp_path / 'c.parquet')
  for name, expected in (('a.npy', counts), ('one.npy', counts[:, :1]), ('b.csv', np.float32(counts / 4)), ('c.parquet', counts)):
    found, rate = read_signal(tmp_path / name)
    assert rate is None
    assert np.array_equal(found, expected)
    assert found.dtype == expected.dtype
  (tmp_path / 'd.csv').write_text('a,b\n1,x\n')
  np.save(tmp_path / 'deep.npy', np.zeros((2, 2, 2)))
  np.save(tmp_path / 'nan.npy', np.array([0, np.nan]))
  np.save(tmp_path / 'pickle.npy', np.array([{}]))
  for name, words in (('d.csv', "column 'b' holds no numbers"), ('deep.npy', r'shape \[2, 2, 2\]'), ('nan.npy', '1 of 2'),
                      ('pickle.npy', 'signal: '), ('x.mat', 'no reader for x.mat; known: .npy')):
    with pytest.raises(ValueError, match=words):
      read_signal(tmp_path / name)


def edf(path, channels, names, samples, seconds=2.0, kind=b'EDF+C', cut=0):
  """Writes int16 channels [T] of +-1000 digits and +-5 mV, and a channel of annotations, by the specification."""
  labels = [*names, 'EDF Annotations']
  fields = [(16, labels), (80, [''] * len(labels)), (8, ['mV'] * len(labels)), (8, ['-5'] * len(labels)),
            (8, ['5'] * len(labels)), (8, ['-1000'] * len(labels)), (8, ['1000'] * len(labels)), (80, [''] * len(labels)),
            (8, [*[str(samples)] * len(names), '4']), (32, [''] * len(labels))]
  count = len(channels[0]) // samples
  head = b''.join(str(v).encode().ljust(n) for n, v in (
    (8, 0), (80, 'X X X X'), (80, 'Startdate X X X X'), (8, '01.01.01'), (8, '00.00.00'), (8, 256 * (len(labels) + 1)),
    (44, kind.decode()), (8, count), (8, seconds), (4, len(labels))))
  texts = b''.join(str(v).encode().ljust(n) for n, values in fields for v in values)
  records = [b''.join(c[i * samples : (i + 1) * samples].astype('<i2').tobytes() for c in channels) + b'+0\x14\x14\0\0\0\0'
             for i in range(count)]
  path.write_bytes((head + texts + b''.join(records))[: -cut or None])
  return path


def test_edf_gives_physical_units_and_its_rate(folder, tmp_path, rng):
  digits = rng.integers(-1000, 1001, (2, 300))
  found, rate = read_signal(edf(tmp_path / 'a.edf', digits, ['I', 'II'], 100))
  assert rate == 50.0
  assert found.dtype == np.float32
  assert np.allclose(found, digits.T / 200)
  for more, words in (({'kind': b'EDF+D'}, 'gaps in time'), ({'cut': 7}, 'bytes of samples: its header tells of')):
    with pytest.raises(ValueError, match=words):
      read_signal(edf(tmp_path / 'b.edf', digits, ['I', 'II'], 100, **more))
  (tmp_path / 'c.edf').write_bytes(b'no')
  with pytest.raises(ValueError, match='is not EDF'):
    read_signal(tmp_path / 'c.edf')
  edf(folder / 'ecg.edf', digits, ['I', 'II'], 100)
  table(folder, [('a.png', 'ecg.edf', ''), ('b.png', 'ecg.edf', '25')], ('path', 'signal', 'signal_rate'))
  run(folder, tmp_path / 'c', splits=(1, 0, 0))
  assert [r['signal_rate'] for r in open_source(tmp_path / 'c')] == [50.0, 25.0]


def test_the_same_bytes_in_blocks_and_a_new_mask_is_a_new_corpus(folder, tmp_path, monkeypatch):
  options = {'spacing': (1.2,), 'crop': 'foreground', 'min_content': 0.01}
  run(folder, tmp_path / 'a', **options)
  monkeypatch.setattr(blocks, 'BLOCK_BYTES', (500, 500))
  summary = run(folder, tmp_path / 'b', **options)
  assert summary['blocks'] > 2
  run(folder, tmp_path / 'c', **options)
  assert content(tmp_path / 'b') == content(tmp_path / 'c')
  one, other = open_source(tmp_path / 'a'), open_source(tmp_path / 'b')
  assert one.table['id'].to_pylist() == other.table['id'].to_pylist()
  assert all(np.array_equal(x['image'], y['image']) for x, y in zip(one, other))
  from jaxmed.data.prepare.preparation import make_preparation

  plan = lambda **more: make_preparation([folder], tmp_path / 'x', table=folder / 'table.csv', **(options | more)).fingerprint()
  before = plan()
  assert plan() == before
  others = [plan(spacing=(1.3,)), plan(crop='none'), plan(margin=5), plan(min_content=0.02), plan(plane='acquired')]
  assert len({before, *others}) == 6
  mask = folder / 'm0.nii.gz'
  mask.write_bytes(mask.read_bytes())  # only its time is another
  assert plan() != before


def test_what_has_no_content_is_listed_and_is_no_error(folder, tmp_path):
  found = survey([folder], tmp_path / 'c', table=folder / 'table.csv', min_content=0.01)
  summary = run(folder, tmp_path / 'c', min_content=0.01)
  with open(tmp_path / 'c' / 'rejects.csv', newline='') as f:
    rejects = list(csv.DictReader(f))
  assert summary['rejected'] == 0
  assert summary['empty'] == len(rejects) > 5
  assert found['records'] == summary['records'] + summary['empty']
  assert rejects[0] == {'path': 'v0.nii.gz#z000', 'reason': 'no content: 0 % of its pixels are not background'}
  kept = [r['id'] for r in open_source(tmp_path / 'c') if r['id'].startswith('v0')]
  assert kept == [f'v0.nii.gz#z{z:03d}' for z in range(4, 8)]
  table(folder, [('v0.nii.gz',)], ('path',))
  with pytest.raises(UserError, match='none of the files found holds an image with the content that min_content wants'):
    run(folder, tmp_path / 'd', min_content=0.99999, splits=(1, 0, 0))


def test_bad_columns(folder, tmp_path):
  table(folder, [('a.png', 'fast')], ('path', 'signal_rate'))
  with pytest.raises(UserError, match=r'cannot read .*table.csv as a table'):
    run(folder, tmp_path / 'c')
  pq.write_table(pa.table({'path': ['a.png'], 'text': [[1]]}), folder / 't.parquet')
  with pytest.raises(UserError, match=r"t.parquet: column 'text' holds list.*, expected string"):
    prepare([folder], tmp_path / 'c', table=folder / 't.parquet', progress=False)


def test_a_corpus_without_these_fields_is_as_it_was(folder, tmp_path):
  prepare([folder / 'a.png', folder / 'b.png'], tmp_path / 'c', splits=(1, 0, 0), progress=False)
  features = (tmp_path / 'c' / 'features.json').read_text()
  assert 'mask' not in features
  assert 'signal' not in features
  assert set(open_source(tmp_path / 'c')[0]) == {'image', 'channels', 'spacing', 'id', 'subject', 'source'}
  assert {f.name for f in dataclasses.fields(readers.Options)} >= {'spacing', 'crop', 'margin', 'min_content'}


def test_card_and_summary_say_what_is_kept_of_persons(folder, tmp_path, rng):
  summary = run(folder, tmp_path / 'c')
  assert summary['carried'] == {
    'subject': 'as the table, the pattern or the file names say', 'id': 'names of files and folders, except of DICOM',
    'path': 'names of files and folders, except of DICOM', 'text': 'free text, in the records too', 'mask': 'name of a file',
    'signal': 'name of a file', 'signal_rate': 'as the table or the folders say'}
  volume = rng.integers(0, 900, (4, 12, 10)).astype(np.int16)
  dicoms.write(tmp_path / 's', dicoms.series(volume, (1, 0, 0, 0, 1, 0), (0, 0, 2.0)), rng)
  summary = prepare([tmp_path / 's'], tmp_path / 'd', splits=(1, 0, 0), progress=False, salt='x')
  assert summary['carried'] == {'subject': "hash of the patient's identifier, salted",
                                'site': "hash of the institution's name, salted"}
  card = (tmp_path / 'd' / 'card.md').read_text()
  assert "| subject | hash of the patient's identifier, salted |" in card
  whole = b''.join(content(tmp_path / 'd').values())
  assert not [v for v in dicoms.PATIENT.values() if v.encode() in whole]
  other = prepare([tmp_path / 's'], tmp_path / 'e', splits=(1, 0, 0), progress=False)
  assert 'not salted: who knows an identifier can look for it' in other['carried']['subject']


# Tables as people's programs write them

def labelled(tmp_path, data, name='t.csv', images='ab'):
  """The rows of a corpus of images that a table of these bytes lists, by path."""
  for i, image in enumerate(images):
    (tmp_path / 'in').mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 5), i, np.uint8)).save(tmp_path / 'in' / f'{image}.png')
  (tmp_path / name).write_bytes(data)
  prepare([tmp_path / 'in'], tmp_path / 'c', table=tmp_path / name, progress=False, overwrite=True)
  return pq.read_table(tmp_path / 'c/manifest.parquet')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'cp1252', 'latin-1'])
@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
def test_encodings_and_delimiters(encoding, delimiter, tmp_path, capsys):
  word = 'Tum\x81ör' if encoding == 'latin-1' else 'Tumör'  # a byte that cp1252 does not know
  text = f'path,label,n\r\na.png,{word},1\r\nb.png,ok,2\r\n'.replace(',', delimiter)
  table = labelled(tmp_path, text.encode(encoding))
  assert table['label'].to_pylist() == [word, 'ok']
  assert (table.schema.field('label').type, table['n'].to_pylist()) == (pa.string(), [1, 2])
  said = f'jaxmed: {tmp_path}/t.csv is no UTF-8 (byte 0x'
  err = capsys.readouterr().err
  assert (f'read as {encoding};' in err and said in err) if encoding in ('cp1252', 'latin-1') else said not in err


def test_a_name_in_the_encoding_of_the_table_is_found(tmp_path):
  (tmp_path / 'in').mkdir()
  for i, name in enumerate((b'Tum\xf6r.png', 'a\u0308.png'.encode())):
    Image.fromarray(np.full((4, 5), i, np.uint8)).save(tmp_path / 'in' / os.fsdecode(name))
  table = labelled(tmp_path, 'path,label\nTumör.png,x\nä.png,y\n'.encode('cp1252'))
  assert dict(zip(table['path'].to_pylist(), table['label'].to_pylist())) == {r'Tum\xf6r.png': 'x', 'a\u0308.png': 'y'}
  again = labelled(tmp_path, table.select(['path']).to_pandas().to_csv(index=False).encode())
  assert again['path'].to_pylist() == table['path'].to_pylist()  # as the manifest writes it


def test_what_a_column_holds_survives(tmp_path):
  cells = {'site': ('007', '7'), 'uid': (str(10**25), str(10**25 + 1)), 'well': ('1E5', '2E05'), 'comma': ('0,7', '1,25'),
           'long': ('9007199254740993', '1.5'), 'zero': ('0', '0.5'), 'whole': ('9007199254740993', '-3'),
           'float': ('1e-05', '0.25'), 'day': ('2020-01-02', '2020-01-03'), 'code': ('00', '01')}
  lines = [['path', *cells], *([f'{"ab"[i]}.png', *(c[i] for c in cells.values())] for i in range(2))]
  table = labelled(tmp_path, '\n'.join(';'.join(line) for line in lines).encode())
  for name in ('site', 'uid', 'well', 'comma', 'long', 'code'):
    assert table[name].to_pylist() == list(cells[name]), name
  assert table['zero'].to_pylist() == [0.0, 0.5]
  assert table['whole'].to_pylist() == [9007199254740993, -3]
  assert table['float'].to_pylist() == [1e-05, 0.25]
  assert [str(day) for day in table['day'].to_pylist()] == list(cells['day'])


def test_a_column_whose_last_cell_is_a_word_is_text(tmp_path):
  head = 'path,label\na.png,1\n' + 'nowhere.png,1\n' * 100_000
  (tmp_path / 'in').mkdir()
  Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / 'in/a.png')
  data = (head + 'b.png,x\n').encode()
  assert spreadsheet.read_text(tmp_path / 't.csv', data, 'path', {})[0].schema.field('label').type == pa.string()


def test_columns_without_a_name(tmp_path, capsys):
  table = labelled(tmp_path, b',path,label,\n0,a.png,x,\n1,b.png,y,\n')
  assert {'unnamed_1', 'label'} < set(table.column_names)
  assert 'unnamed_4' not in table.column_names
  assert table['unnamed_1'].to_pylist() == [0, 1]
  assert 'has no name: it is called unnamed_1' in capsys.readouterr().err
  assert labelled(tmp_path, b'sep=;\r\npath;label\r\na.png;x\r\n')['label'].to_pylist() == ['x']


@pytest.mark.parametrize('name, data, match', [
    ('t.csv', b'path,label,label\na.png,1,2\n', r"t.csv has two columns 'label' \(columns 2 and 3\): rename one"),
    ('t.csv', 'path,label\na.png,x\n'.encode('utf-16-le'), 'holds NUL bytes.*UTF-16 needs its byte order mark'),
    ('t.csv', b'\xff\xfe' + b'path,label\na.png,xx', 'first bytes say UTF-16'),
    ('t.xlsx', b'PK\x03\x04....', 'is a workbook or an archive, save the sheet as CSV'),
    ('t.csv', b' \n', 'cannot read .*t.csv as a table: it is empty'),
    ('t.csv', b'Path;label\na.png;1\n', r"unknown column \(needed in .*t.csv\) 'path'"),
    ('t.csv', b'path;signal_rate\na.png;0,7\n', "column 'signal_rate' holds '0,7', expected a number with a point, not"),
    ('t.csv.gz', b'path\na.png\n', 'cannot read .*t.csv.gz as a table'),
    ('none/', b'', 'is a folder: expected a table')])
def test_tables_that_are_refused(name, data, match, tmp_path):
  if name.endswith('/'):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=match):
      spreadsheet.raw_bytes(tmp_path / name)
    return
  with pytest.raises(UserError, match=match):
    labelled(tmp_path, data, name)


def test_a_parquet_table_with_a_column_twice_and_one_that_is_packed(tmp_path):
  pq.write_table(pa.table([['a.png'], ['x'], ['y']], names=['path', 'label', 'label']), tmp_path / 'p.parquet')
  with pytest.raises(UserError, match="two columns 'label'"):
    labelled(tmp_path, (tmp_path / 'p.parquet').read_bytes(), 't.parquet')
  table = labelled(tmp_path, gzip.compress(b'path,site\na.png,007\n'), 't.csv.gz')
  assert table['site'].to_pylist() == ['007']
