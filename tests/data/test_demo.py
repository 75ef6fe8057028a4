"""The demo corpus is what its docstring says: no voxel in two splits, labels by place, real pixels."""

import json

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from jaxmed.data.corpus.labels import Labels, labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import demo
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError
from tests.common import words
from tests.conftest import TINY

nibabel = pytest.importorskip('nibabel')
nilearn = pytest.importorskip('nilearn')


@pytest.fixture(scope='module')
def made(demo_corpus):
  return json.loads(demo_corpus.with_suffix('.json').read_text()), open_source(demo_corpus)


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
  folder = tmp_path_factory.mktemp('samples') / 'samples'
  demo.demo_files(folder)
  return folder


def place(name):
  """'brain/z085y100x044' -> (85, 100, 44)."""
  text = name.split('/')[1]
  return int(text[1:4]), int(text[5:8]), int(text[9:12])


def test_size_and_channels(made):
  summary, source = made
  sizes = {k: v['records'] for k, v in summary['splits'].items()}
  assert 5000 < sizes['train'] < 6500
  assert 1000 <= sizes['test'] < 2500
  assert 800 < sizes['val'] < 1500
  assert source.channels == ('T1', 'GM', 'WM', 'R', 'G', 'B', 'phase', 'DNA')
  assert summary['rejected'] == 0
  assert len(source.classes('region')) == 12
  others = source.table.filter(pc.is_null(source.table['region']))
  assert set(others['split'].to_pylist()) == {'train'}
  assert 1000 < others.num_rows < 2000
  assert set(others['source'].to_pylist()) == {
    'fundus', 'histology', 'microaneurysms', 'cell', 'fluorescence'}


def test_the_tissue_corpus(tmp_path):
  """T1 alone with the most probable tissue: white matter is brighter than grey, and the classes have names."""
  prepare(['tissue'], tmp_path / 'c', progress=False)
  source = open_source(tmp_path / 'c')
  assert 1000 < len(source) < 3000 and source.channels == ('T1',)
  assert labels_of(source) == Labels((0, 1, 2), ('other', 'GM', 'WM'))
  brightness = {value: [] for value in (1, 2)}
  for i in range(0, len(source), 200):
    record = source[i]
    assert record['image'].shape == (48, 48, 1) and record['mask'].shape == (48, 48)
    for value, found in brightness.items():
      found += record['image'][..., 0][record['mask'] == value].tolist()
  assert np.mean(brightness[2]) > np.mean(brightness[1]) + 20
  found = survey(['tissue'], tmp_path / 'other')
  assert {s: n['items'] for s, n in found['splits'].items()} == {s: len(source.select(s)) for s in ('test', 'train', 'val')}


def test_splits_are_apart_and_regions_are_right(made):
  _, source = made
  rows = source.select(label='region').table.to_pylist()
  slices, subjects = {}, {}
  for row in rows:
    z, y, x = place(row['id'])
    slices.setdefault(row['split'], set()).add(z)
    assert subjects.setdefault(row['subject'], row['split']) == row['split']
    assert x + demo.SIZE <= 98  # left of the midline, whose index is 98
    mm = x + 24 - 98, y + 24 - 134, z - 72
    along = 'posterior' if mm[1] < -40 else 'central' if mm[1] < 0 else 'anterior'
    assert row['region'] == f'{along}-{"superior" if mm[2] > 10 else "inferior"}-' \
                            f'{"medial" if mm[0] > -36 else "lateral"}'
    side, depth, height = -mm[0], abs(mm[1]), abs(mm[2])
    assert ', '.join(row['region'].split('-')[:1]) in row['text'] and f'{side:.0f} mm left' in row['text']
    assert f'{depth:.0f} mm {"behind" if mm[1] < 0 else "before"} and {height} mm ' \
           f'{"below" if mm[2] < 0 else "above"} the anterior' in row['text']
  texts = [row['text'] for row in rows]
  assert len(set(texts)) > 0.9 * len(texts) and source[0]['text'] == texts[0]
  for a, b in (('train', 'val'), ('train', 'test'), ('val', 'test')):
    assert min(abs(i - j) for i in slices[a] for j in slices[b]) == 5
  for split in ('train', 'val', 'test'):
    regions = [r['region'] for r in rows if r['split'] == split]
    assert len(set(regions)) == 12
    assert min(regions.count(c) for c in set(regions)) > 20


def test_pixels_are_those_of_the_template_which_is_symmetric(made):
  _, source = made
  from nilearn.datasets import load_mni152_template

  path = demo.find('nilearn', demo.template('t1'))
  t1 = np.asarray(nibabel.load(path).dataobj)
  # Why the right half is not used: it holds no other data.
  assert np.array_equal(t1, t1[::-1])
  assert load_mni152_template(resolution=1).shape == t1.shape
  brain = source.select('test', label='region')
  for i in (0, 700, len(brain) - 1):
    z, y, x = place(brain[i]['id'])
    patch = brain[i]['image']
    assert np.array_equal(patch[..., 0], t1[x:x + 48, y:y + 48, z].T)
    assert (patch[..., 1].astype(int) + patch[..., 2] > 64).mean() >= 0.5


def test_word_demo_stands_alone(tmp_path):
  with pytest.raises(UserError, match='demo corpus takes no'):
    prepare(['demo'], tmp_path / 'c', labels_from_folders=True)


def test_a_dry_run_counts(made, tmp_path):
  found, summary = survey(['demo'], tmp_path / 'c'), made[0]
  assert (found['records'], found['subjects']) == (summary['records'], summary['subjects'])
  assert {k: {'records': v['items'], 'subjects': v['subjects']} for k, v in found['splits'].items()} == summary['splits']


def test_sample_files(tmp_path):
  paths = demo.demo_files(tmp_path / 'files')
  assert all(p.is_file() for p in paths)
  assert paths[-1].name == 'table.csv'
  assert np.asarray(Image.open(tmp_path / 'files/png/fundus-0.png')).shape == (96, 96, 3)
  table = tmp_path / 'files' / 'table.csv'
  summary = prepare([tmp_path / 'files'], tmp_path / 'c', table=table, progress=False)
  assert summary['files'] == 25
  assert summary['rejected'] == 0
  assert summary['not_in_table'] == 96 + 16  # series and stains
  assert set(summary['splits']) == {'train', 'val', 'test'}
  assert summary['labels'] == {'label': 3}
  source = open_source(tmp_path / 'c')
  assert {'T1', 'GM', 'WM', 'R', 'G', 'B', 'gray'} <= set(source.channels)
  tiff = next(i for i, p in enumerate(source.table['path'].to_pylist()) if p.endswith('.tif'))
  assert source[tiff]['image'].dtype == np.uint16
  assert source[tiff]['image'].max() > 2**15
  with pytest.raises(UserError, match='not empty'):
    demo.demo_files(tmp_path / 'files')


def test_sample_series_is_the_template_turned_back(samples, tmp_path):
  names = [p.name for p in sorted((samples / 'dicom').iterdir())]
  assert len(names) == demo.PATIENTS * demo.SLICES
  prepare([samples / 'dicom'], tmp_path / 'c', volumes='whole', progress=False)
  source = open_source(tmp_path / 'c')
  t1 = np.asarray(nibabel.load(demo.find('nilearn', demo.template('t1'))).dataobj)
  assert len(source) == demo.PATIENTS
  for i in range(len(source)):
    record, row = source[i], source.table.slice(i, 1).to_pylist()[0]
    x, y, z = (round(o) + n for o, n in zip(row['origin'], (98, 134, 72)))
    assert np.array_equal(record['image'][..., 0].T, t1[x:x + 64, y:y + 64, z:z + 12].astype(np.uint16) * 16)
    assert record['spacing'] == [1, 1, 1]
    assert np.allclose(row['direction'], np.eye(3).ravel())


def test_sample_stains_have_names_and_a_pixel_size(samples, tmp_path):
  summary = prepare([samples / 'ome'], tmp_path / 'c', progress=False)
  source = open_source(tmp_path / 'c')
  assert source.channels == ('haematoxylin', 'DAB')
  assert summary['records'] == 16
  assert source[0]['spacing'] == pytest.approx([5e-4, 5e-4])
  assert source[0]['image'].dtype == np.uint16
  stains = np.concatenate([source[i]['image'].reshape(-1, 2) for i in range(16)])
  assert stains.max() < 65535  # nothing was clipped
  assert abs(np.corrcoef(stains.T)[0, 1]) < 0.5  # two stains, not one twice


@pytest.mark.parametrize('way', ['dicom', 'ome', 'table'])
def test_three_ways_in(no_figures, samples, tmp_path, capsys, way):
  """From files to features, by the commands."""
  from jaxmed import cli

  def jaxmed(*argv):
    assert cli.main([*map(str, argv), '--json']) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  files = [samples, '--table', samples / 'table.csv'] if way == 'table' else [samples / way]
  planned = jaxmed('prepare', *files, '--out', tmp_path / 'c', '--workers', 1, '--dry-run')
  summary = jaxmed('prepare', *files, '--out', tmp_path / 'c', '--workers', 1)
  assert planned['records'] == summary['records'] == {'dicom': 96, 'ome': 16, 'table': 70}[way]
  assert summary['rejected'] == planned['untold'] == 0
  run = jaxmed('train', '--data', tmp_path / 'c', '--out', tmp_path / 'run', *words(TINY | {'steps': 2}))
  assert run['steps'] == 2
  assert np.isfinite(run['loss'])
  if way == 'table':
    found = jaxmed('evaluate', tmp_path / 'run', '--data', tmp_path / 'c', '--label', 'label')
    assert found['rows']
    record = next(r for r in open_source(tmp_path / 'c') if r['id'].startswith('nifti'))
    assert record['text'] == 'T1-weighted volume: brain.'
  found = jaxmed('embed', tmp_path / 'run', '--data', tmp_path / 'c', '--out', tmp_path / 'f.npz')
  assert found['shape'][0] == summary['records']
  features = np.load(tmp_path / 'f.npz')['features']
  assert np.isfinite(features).all()
  assert features.std(axis=0).max() > 0
