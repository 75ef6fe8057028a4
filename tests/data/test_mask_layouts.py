"""Folders of segmentation data sets, written small as their code writes them, come out with masks, names and splits."""

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed.data.corpus.labels import labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.benchmarks import LAYOUTS, totalsegmentator
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError

SHAPE = (5, 6, 4)  # x, y, z
ZOOMS = (2.0, 1.0, 3.0)


def save(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(nibabel.Nifti1Image(array, np.diag([*ZOOMS, 1])), path)
  return array


def image(rng, shape=SHAPE):
  return rng.integers(-900, 900, shape).astype(np.int16)


def mask(rng, values=(0, 1, 2)):
  return rng.choice(values, SHAPE).astype(np.uint8)


def run(root, out, **options):
  summary = prepare([root], out, progress=False, volumes='whole', **options)
  source = open_source(out)
  return {row['path']: row | {'record': source[i]} for i, row in enumerate(source.table.to_pylist())}, source, summary


def about(root, **words):
  (root / 'dataset.json').write_text(json.dumps(
    {'channel_names': {'0': 'CT'}, 'labels': {'background': 0, 'liver': 1, 'lesion': 2}, 'file_ending': '.nii.gz'} | words))


def zyx(array):
  return array.transpose(2, 1, 0)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# nnU-Net

def nnunet(root, rng, cases=('a', 'b', 'c'), tests=(), labelled=(), channels=1):
  made = {}
  for folder, names in (('Tr', cases), ('Ts', tests)):
    for case in names:
      images = [save(root / f'images{folder}' / f'{case}_{k:04d}.nii.gz', image(rng)) for k in range(channels)]
      made[f'images{folder}/{case}'] = images, (save(root / f'labels{folder}' / f'{case}.nii.gz', mask(rng))
                                               if folder == 'Tr' or case in labelled else None)
  return made


def test_nnunet(tmp_path, rng, capsys):
  root = tmp_path / 'Dataset001_Liver'
  made = nnunet(root, rng, [f'case_{i}' for i in range(9)], ['t1', 't2'], ['t1'], channels=2)
  about(root, channel_names={'1': 'PET', '0': 'CT'}, numTraining=9)
  assert survey([root], tmp_path / 'c', volumes='whole')['records'] == 11
  rows, source, _ = run(root, tmp_path / 'c')
  assert 'laid out as nnU-Net' in capsys.readouterr().err
  assert set(rows) == set(made)
  for name, (images, truth) in made.items():
    row = rows[name]
    assert row['channels'] == ['CT', 'PET'] and row['spacing'] == [3.0, 1.0, 2.0] and row['source'] == root.name
    assert np.array_equal(row['record']['image'], np.stack([zyx(i) for i in images], axis=-1))
    assert ('mask' in row['record']) == (truth is not None)
    if truth is not None:
      assert np.array_equal(row['record']['mask'], zyx(truth))
  assert labels_of(source).names == ('background', 'liver', 'lesion')
  # t1 has a mask, so the test split is the folder's
  assert {n for n, r in rows.items() if r['split'] == 'test'} == {'imagesTs/t1', 'imagesTs/t2'}
  assert {r['split'] for n, r in rows.items() if 'Tr' in n} == {'train', 'val'}


def test_nnunet_draws_test_where_it_has_no_masks(tmp_path, rng):
  nnunet(tmp_path / 'd', rng, [f'{i}' for i in range(12)], ['t'])
  about(tmp_path / 'd')
  rows, _, _ = run(tmp_path / 'd', tmp_path / 'c', splits=(0.4, 0.3, 0.3))
  assert {r['split'] for n, r in rows.items() if 'Tr' in n} == {'train', 'val', 'test'}
  assert rows['imagesTs/t']['split'] == 'test'


def test_nnunet_first_fold_ignored_pixels_and_regions(tmp_path, rng, capsys):
  root = tmp_path / 'd'
  made = nnunet(root, rng)
  for name in made:
    made[name] = made[name][0], save(root / 'labelsTr' / f'{name[-1]}.nii.gz', mask(rng, (0, 1, 2, 3)))
  fold = [{'train': ['a', 'c'], 'val': ['b']}, {'train': ['b'], 'val': ['a', 'c']}]
  (root / 'splits_final.json').write_text(json.dumps(fold))
  about(root, labels={'background': 0, 'whole': [1, 2], 'core': 1, 'ignore': 3}, regions_class_order=[1, 2])
  rows, source, _ = run(root, tmp_path / 'c')
  assert {n[-1]: r['split'] for n, r in rows.items()} == {'a': 'train', 'b': 'val', 'c': 'train'}
  for name, (_, truth) in made.items():
    assert np.array_equal(rows[name]['record']['mask'], np.where(zyx(truth) == 3, -1, zyx(truth).astype(int)))
    assert rows[name]['mask_values'] == [-1, 0, 1, 2]
  assert labels_of(source).values == (0, 1, 2) and labels_of(source).names[1:] == ('core', 'value 2')
  assert 'regions (whole is 1 + 2): masks keep their values' in capsys.readouterr().err


def test_decathlon(tmp_path, rng):
  root = tmp_path / 'Task01'
  arrays = {n: save(root / f'imagesTr/{n}.nii.gz', image(rng, (*SHAPE, 2))) for n in ('x', 'y')}
  truths = {n: save(root / f'labelsTr/{n}.nii.gz', mask(rng)) for n in arrays}
  save(root / 'imagesTs/z.nii.gz', image(rng, (*SHAPE, 2)))
  listed = [{'image': f'./imagesTr/{n}.nii.gz', 'label': f'./labelsTr/{n}.nii.gz'} for n in arrays]
  words = {'modality': {'0': 'FLAIR', '1': 'T1w'}, 'labels': {'0': 'background', '1': 'edema', '2': 'tumour'},
           'training': listed, 'test': ['./imagesTs/z.nii.gz'], 'numTraining': 2}
  (root / 'dataset.json').write_text(json.dumps(words))
  rows, source, _ = run(root, tmp_path / 'c', splits=(1, 0, 0))
  for name, array in arrays.items():
    row = rows[f'imagesTr/{name}']
    assert row['channels'] == ['FLAIR', 'T1w']
    assert np.array_equal(row['record']['image'], array.transpose(2, 1, 0, 3))
    assert np.array_equal(row['record']['mask'], zyx(truths[name]))
  assert rows['imagesTs/z']['split'] == 'test' and rows['imagesTs/z']['mask'] is None
  assert labels_of(source).names == ('background', 'edema', 'tumour')
  words['training'].append({'image': './imagesTr/gone.nii.gz', 'label': './labelsTr/x.nii.gz'})
  (root / 'dataset.json').write_text(json.dumps(words))
  with pytest.raises(UserError, match='first imagesTr/gone.nii.gz: dataset.json names it, but no such file exists'):
    run(root, tmp_path / 'e')


def test_nnunet_of_version_1_lists_cases_without_their_channels(tmp_path, rng):
  root = tmp_path / 'Task500'
  made = nnunet(root, rng, ['x'], channels=2)
  (root / 'dataset.json').write_text(json.dumps({
    'modality': {'0': 'T1', '1': 'T1'}, 'labels': {'0': 'background', '1': 'a', '2': 'b'},
    'training': [{'image': './imagesTr/x.nii.gz', 'label': './labelsTr/x.nii.gz'}]}))
  rows, _, _ = run(root, tmp_path / 'c', splits=(1, 0, 0))
  assert rows['imagesTr/x']['channels'] == ['T1', 'T1-2']
  assert rows['imagesTr/x']['record']['image'].shape[-1] == len(made['imagesTr/x'][0])


def test_nnunet_files_that_lie_anywhere_and_colour(tmp_path, rng):
  root = tmp_path / 'd'
  (root / 'imagesTr').mkdir(parents=True)
  pixels = {n: rng.integers(0, 255, (7, 8, 3), np.uint8) for n in 'pq'}
  for name, array in pixels.items():
    Image.fromarray(array).save(tmp_path / f'{name}_0000.png')
    Image.fromarray(array[..., 0] // 128).save(tmp_path / f'{name}.png')
  listed = {n: {'images': [str(tmp_path / f'{n}_0000.png')], 'label': f'../{n}.png'} for n in pixels}
  about(root, channel_names={'0': 'R', '1': 'G', '2': 'B'}, file_ending='.png', dataset=listed,
        labels={'background': 0, 'street': 1})
  rows, _, _ = run(root, tmp_path / 'c', splits=(1, 0, 0))
  for name, array in pixels.items():
    assert np.array_equal(rows[name]['record']['image'], array)
    assert np.array_equal(rows[name]['record']['mask'], array[..., 0] // 128)


@pytest.mark.parametrize('change, message', [
  (lambda r: (r / 'labelsTr/a.nii.gz').unlink(), 'first imagesTr/a: has no mask: expected labelsTr/a.nii.gz'),
  (lambda r: (r / 'imagesTr/a_0000.nii.gz').unlink(), 'first labelsTr/a.nii.gz: is a mask without an image'),
  (lambda r: about(r, channel_names={'0': 'T1', '1': 'T2'}), 'holds|has 1 channels, (but|expected) 2'),
  (lambda r: about(r, labels={'background': 0, 'liver': 1}), 'holds the value 2, which the labels do not name'),
  (lambda r: about(r, labels={'background': 0, 'a': 1, 'b': 1}), "gives the value 1 the names 'a' and 'b'"),
  (lambda r: about(r, labels=[]), r'has labels \[\]: expected'),
  (lambda r: about(r, channel_names=3), 'has channel_names 3: expected'),
  (lambda r: save(r / 'imagesTs/a_0000.nii.gz', np.zeros(SHAPE, np.int16)), 'case a is in imagesTr and in imagesTs'),
  (lambda r: (r / 'splits_final.json').write_text('[{"train": ["a"], "val": ["b"]}]'), 'says nothing of the case c'),
  (lambda r: (r / 'splits_final.json').write_text('[{"train": ["a", "z"], "val": ["b", "c"]}]'), 'the case z, which is'),
  (lambda r: (r / 'splits_final.json').write_text('{}'), 'has no first fold'),
])
def test_nnunet_refusals(tmp_path, rng, change, message):
  root = tmp_path / 'd'
  nnunet(root, rng)
  about(root)
  change(root)
  with pytest.raises(UserError, match=message):
    run(root, tmp_path / 'c')


# TotalSegmentator

def total(root, rng, case, names, name='ct.nii.gz'):
  pixels = save(root / case / name, image(rng))
  return pixels, {n: save(root / case / 'segmentations' / f'{n}.nii.gz', mask(rng, (0, 0, 1))) for n in names}


def test_totalsegmentator(tmp_path, rng, capsys):
  root, names = tmp_path / 'd', ('spleen', 'kidney_cyst_left', 'kidney_left', 'costal_cartilages')
  made = {case: total(root, rng, case, names) for case in ('s0000', 's0001', 's0003')}
  (root / 'meta.csv').write_text('\ufeffimage_id;age;split;source\n' + ''.join(
    f'{case};{30 + k};{split};x\n' for k, (case, split) in enumerate(zip(made, ('train', 'test', 'val')))))
  rows, source, _ = run(root, tmp_path / 'c')
  assert 'laid out as TotalSegmentator' in capsys.readouterr().err
  values = {'spleen': 1, 'kidney_left': 3, 'kidney_cyst_left': 23, 'costal_cartilages': 117}
  for case, (pixels, structures) in made.items():
    expected = np.zeros(SHAPE, np.uint8)
    for name, value in values.items():  # in rising order: the later one wins
      expected[structures[name] > 0] = value
    assert np.array_equal(rows[case]['record']['mask'], zyx(expected))
    assert np.array_equal(rows[case]['record']['image'][..., 0], zyx(pixels)) and rows[case]['channels'] == ['CT']
    assert rows[case]['source'] == 'd' and 'annotated' not in rows[case]
  assert [(r['split'], r['age'], r['subject']) for r in rows.values()] == [
    ('train', '30', 's0000'), ('test', '31', 's0001'), ('val', '32', 's0003')]
  assert dict(zip(labels_of(source).names, labels_of(source).values)) == {'background': 0} | values


def test_totalsegmentator_numbers():
  """Places in the lists of the official map_to_binary.py."""
  lists = totalsegmentator.STRUCTURES
  assert {k: (len(v), len(set(v))) for k, v in lists.items()} == {
    'total': (117, 117), 'total_v1': (104, 104), 'total_mr': (50, 50)}
  at = lambda which, *numbers: [lists[which][n - 1] for n in numbers]
  assert at('total', 26, 27, 50, 51, 62, 89, 92, 115) == [
    'vertebrae_S1', 'vertebrae_L5', 'vertebrae_C1', 'heart', 'superior_vena_cava', 'iliopsoas_right', 'rib_left_1',
    'rib_right_12']
  assert at('total_v1', 17, 18, 41, 55, 92, 104) == [
    'lung_lower_lobe_right', 'vertebrae_L5', 'vertebrae_C1', 'small_bowel', 'sacrum', 'urinary_bladder']
  assert at('total_mr', 10, 19, 25, 39, 50) == ['lung_left', 'vertebrae', 'portal_vein_and_splenic_vein', 'hip_right',
                                                'brain']
  assert totalsegmentator.values_of(['heart_myocardium', 'brain']) == {'heart_myocardium': 44, 'brain': 50}
  assert totalsegmentator.values_of(['zz', 'liver']) == {'liver': 1, 'zz': 2}


def test_totalsegmentator_cases_that_lack_structures(tmp_path, rng):
  root = tmp_path / 'd'
  total(root, rng, 'a', ('liver', 'spleen'), 'mri.nii.gz')
  total(root, rng, 'b', ('liver',), 'mri.nii.gz')
  save(root / 'c' / 'mri.nii.gz', image(rng))
  rows, _, _ = run(root, tmp_path / 'c', splits=(1, 0, 0))
  assert {k: r['annotated'] for k, r in rows.items()} == {'a': None, 'b': [0, 5], 'c': None}
  assert rows['a']['channels'] == ['MR'] and 'mask' not in rows['c']['record']
  (root / 'b' / 'mri.nii.gz').unlink()
  with pytest.raises(UserError, match='b: has no image: expected ct.nii.gz or mri.nii.gz'):
    run(root, tmp_path / 'e')
  total(root, rng, 'b', ('liver',))
  save(root / 'b' / 'segmentations' / 'spleen.nii.gz', np.zeros((3, 3, 3), np.uint8))
  with pytest.raises(UserError, match=r'b: mask: liver.nii.gz has the grid|b: mask: .* the grid \[4, 6, 5\]'):
    run(root, tmp_path / 'e')


@pytest.mark.parametrize('table, message', [
  ('image_id;split\na;train\na;val\n', 'names the case a twice'), ('image_id;split\na;trian\n', "unknown split of a"),
  ('image_id;split\na;train\nb;val\n', 'first b: meta.csv names it, but no such folder exists'),
])
def test_totalsegmentator_refusals(tmp_path, rng, table, message):
  total(tmp_path / 'd', rng, 'a', ('liver',))
  (tmp_path / 'd' / 'meta.csv').write_text(table)
  with pytest.raises(UserError, match=message):
    run(tmp_path / 'd', tmp_path / 'c')


# BIDS

def bids(root, rng):
  (root).mkdir(parents=True)
  (root / 'dataset_description.json').write_text('{}')
  (root / 'participants.tsv').write_text('participant_id\tage\tsex\nsub-01\t40\tF\nsub-02\tn/a\tM\n')
  place = lambda sub, ses, more='': root / more / f'sub-{sub}' / f'ses-{ses}' / 'anat' / f'sub-{sub}_ses-{ses}'
  made = {}
  for sub, ses in (('01', '1'), ('01', '2'), ('02', '1')):
    for suffix in ('T1w', 'T2w'):
      stem = place(sub, ses)
      made[f'sub-{sub}/ses-{ses}/anat/{stem.name}_{suffix}.nii.gz'] = save(
        stem.with_name(f'{stem.name}_{suffix}.nii.gz'), image(rng))
  save(root / 'sub-01/ses-1/func/sub-01_ses-1_task-x_bold.nii.gz', image(rng))
  return place, made


def test_bids(tmp_path, rng, capsys):
  root = tmp_path / 'd'
  place, made = bids(root, rng)
  beside = lambda sub, ses, end: place(sub, ses, 'derivatives/seg').with_name(f'sub-{sub}_ses-{ses}_{end}.nii.gz')
  truth = save(beside('01', '1', 'dseg'), mask(rng, (0, 3, 4)))
  save(beside('01', '1', 'desc-brain_mask'), mask(rng, (0, 1)))
  save(beside('01', '1', 'space-MNI_dseg'), np.zeros((2, 2, 2), np.uint8))
  other = save(beside('02', '1', 'space-T2w_dseg'), mask(rng, (0, 3)))
  (root / 'derivatives/seg/dseg.tsv').write_text('index\tname\n0\tBackground\n3\tputamen\n4\tthalamus\n')
  rows, source, _ = run(root, tmp_path / 'c', splits=(1, 0, 0))
  assert 'laid out as BIDS' in capsys.readouterr().err
  assert set(rows) == set(made)
  for name, pixels in made.items():
    assert np.array_equal(rows[name]['record']['image'][..., 0], zyx(pixels))
    assert rows[name]['channels'] == [name[-10:-7]] and rows[name]['session'] == name.split('ses-')[1][0]
    assert (rows[name]['subject'], rows[name]['age']) == (name[:6], '40' if '01' in name[:6] else 'n/a')
  masks = {n: r['record']['mask'] for n, r in rows.items() if 'mask' in r['record']}
  assert set(masks) == {'sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz', 'sub-02/ses-1/anat/sub-02_ses-1_T2w.nii.gz'}
  assert np.array_equal(masks['sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz'], zyx(truth))
  assert np.array_equal(masks['sub-02/ses-1/anat/sub-02_ses-1_T2w.nii.gz'], zyx(other))
  assert labels_of(source).names == ('Background', 'putamen', 'thalamus')


def test_bids_structures(tmp_path, rng):
  root = tmp_path / 'd'
  place, _ = bids(root, rng)
  beside = lambda sub, ses, label: place(sub, ses).with_name(f'sub-{sub}_ses-{ses}_label-{label}_mask.nii.gz')
  own = {label: save(beside('01', '1', label), mask(rng, (0, 1))) for label in ('lesion', 'brain')}
  save(beside('02', '1', 'brain'), mask(rng, (0, 1)))
  rows, source, _ = run(root, tmp_path / 'c', splits=(1, 0, 0))
  expected = np.where(own['lesion'], 2, np.where(own['brain'], 1, 0))
  assert np.array_equal(rows['sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz']['record']['mask'], zyx(expected))
  assert labels_of(source).names == ('background', 'brain', 'lesion')
  assert rows['sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz']['annotated'] == [0, 1]
  assert rows['sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz']['annotated'] is None
  for pipeline in ('p', 'q'):
    save(place('01', '2', f'derivatives/{pipeline}').with_name('sub-01_ses-2_dseg.nii.gz'), mask(rng))
  with pytest.raises(UserError, match='sub-01_ses-2_T1w.nii.gz: has 2 masks, derivatives/p/.* and derivatives/q/'):
    run(root, tmp_path / 'e')


def test_each_layout_says_what_it_expects(tmp_path):
  (tmp_path / 'd').mkdir()
  np.save(tmp_path / 'd' / 'x.npy', np.zeros((4, 4)))
  for name in ('totalsegmentator', 'bids'):
    with pytest.raises(UserError, match=f'is not laid out as {LAYOUTS[name]}: expected'):
      prepare([tmp_path / 'd'], tmp_path / 'c', layout=name, progress=False)
