"""Folders and corpora become folders of masks: names, grids, channels, what is kept and what is refused."""

import csv
import json

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.predict.job import Options, predict
from tests.predict.test_masks import TURNS, turned_affine
from tests.segmenters import bright, segmenter


def ball(shape=(14, 12, 10), noise=0):
  """A bright ball in [X, Y, Z] int16, which no axis or direction of mirrors onto itself."""
  grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
  inside = ((grid - [8, 5, 4]) ** 2 / np.array([16, 9, 6])).sum(-1) <= 1
  return (inside * 150 + np.random.default_rng(0).integers(0, 1 + noise, shape)).astype(np.int16)


def scan(path, turn=TURNS[0], spacing=(1.0, 1.0, 1.0), array=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(nibabel.Nifti1Image(ball() if array is None else array, turned_affine(*turn, spacing)), path)


def mask_of(path):
  return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def scans(tmp_path):
  for name, turn in (('a.nii.gz', TURNS[3]), ('deep/b.nii', TURNS[20])):
    scan(tmp_path / 'in' / name, turn)
  return tmp_path / 'in'


def test_a_folder_of_volumes(tmp_path, scans):
  """Masks have the names, shapes and affines of their images, whatever the order of axes, and are exact."""
  found = predict(bright(), scans, tmp_path / 'out')
  assert found == {'out': str(tmp_path / 'out'), 'images': 2, 'written': 2, 'kept': 0}
  for name in ('a.nii.gz', 'deep/b.nii'):
    np.testing.assert_array_equal(mask_of(tmp_path / 'out' / name), 3 * (ball() > 100))
    np.testing.assert_array_equal(nibabel.load(tmp_path / 'out' / name).affine, nibabel.load(scans / name).affine)


@pytest.mark.parametrize('wanted', [(1.0, 1.0, 1.0), (2.0, 0.7, 0.9)])
def test_another_spacing_and_back(tmp_path, wanted):
  """Logits are resampled to the stored grid before classes are chosen; computed here by SciPy on the file's own axes."""
  scan(tmp_path / 'in' / 'a.nii', TURNS[0], (0.8, 1.5, 3.0), ball(noise=60))
  predict(bright(spacing=wanted, level=90.0), tmp_path / 'in', tmp_path / 'out')
  from jaxmed.data.resize import resize
  image = ball(noise=60).transpose(2, 1, 0)
  own = (3.0, 1.5, 0.8)
  size = [round(n * s / w) if abs(s - w) > 1e-3 * s else n for n, s, w in zip(image.shape, own, wanted)]
  logits = resize(image[..., None], size, [w / s if abs(s - w) > 1e-3 * s else None for s, w in zip(own, wanted)])[..., 0] - 90.0
  at = [((np.arange(n) - (n - 1) / 2) * s / w + (m - 1) / 2).clip(0, m - 1)
        for n, s, w, m in zip(image.shape, own, wanted, size)]
  back = ndimage.map_coordinates(logits, np.meshgrid(*at, indexing='ij'), order=1)
  sure = np.abs(back) > 1e-3
  got = mask_of(tmp_path / 'out' / 'a.nii').transpose(2, 1, 0)
  np.testing.assert_array_equal(got[sure], 3 * (back > 0)[sure])
  assert sure.mean() > 0.99 and 0.02 < (got > 0).mean() < 0.3


def test_what_is_whole_is_kept_and_the_rest_is_written(tmp_path, scans):
  predict(bright(), scans, tmp_path / 'out')
  (tmp_path / 'out' / 'deep' / 'b.nii').unlink()
  stamp = (tmp_path / 'out' / 'a.nii.gz').stat().st_mtime_ns
  found = predict(bright(), scans, tmp_path / 'out')
  assert (found['written'], found['kept']) == (1, 1)
  assert (tmp_path / 'out' / 'a.nii.gz').stat().st_mtime_ns == stamp


def test_masks_of_others_are_refused_or_replaced(tmp_path, scans):
  out = tmp_path / 'out'
  predict(bright(), scans, out)
  with pytest.raises(UserError, match='masks of another step.*--overwrite'):
    predict(bright(), scans, out, Options(step=0.25))
  with pytest.raises(UserError, match='another run or checkpoint'):
    predict(segmenter((8, 8, 8), values=(0, 3), channels=({'name': 'T1', 'mean': 0, 'std': 1},), tile=(8, 8, 8)), scans, out)
  assert predict(bright(level=10.0), scans, out, Options(step=0.25, overwrite=True))['written'] == 2
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'thesis.txt').write_text('mine')
  for options in (Options(), Options(overwrite=True)):
    with pytest.raises(UserError, match='holds no masks of jaxmed predict'):
      predict(bright(), scans, other, options)
  with pytest.raises(UserError, match='is a file'):
    predict(bright(), scans, other / 'thesis.txt')


@pytest.mark.parametrize('named', [True, False])
def test_channels_of_one_image_in_several_files(tmp_path, named):
  """Files of nnU-Net's folders; dataset.json says which channel is which, else they are those of the run in order."""
  place = tmp_path / 'imagesTs'
  for case in ('p1', 'p2'):
    scan(place / f'{case}_0000.nii.gz', array=np.zeros((14, 12, 10), np.int16))
    scan(place / f'{case}_0001.nii.gz')
  if named:
    (tmp_path / 'dataset.json').write_text(json.dumps({'channel_names': {'0': 'T2', '1': 'T1'}}))
  predict(bright(channels=('T1', 'T2') if named else ('T2', 'T1')), place, tmp_path / 'out')
  expected = 3 * (ball() > 100) * named  # the network looks at the first channel of its vocabulary
  for case in ('p1', 'p2'):
    np.testing.assert_array_equal(mask_of(tmp_path / 'out' / f'{case}.nii.gz'), expected)
  (place / 'p2_0000.nii.gz').unlink()
  with pytest.raises(UserError, match='p2 has the channels _0001: expected _0000 to _0001'):
    predict(bright(channels=('T1', 'T2')), place, tmp_path / 'again')


def test_images_and_their_volumes(tmp_path):
  """PNG and TIFF; areas where the spacing is unknown are empty, borders are told."""
  image = np.zeros((20, 24), np.uint8)
  image[2:6, 8:12], image[10, 12] = 200, 201
  (tmp_path / 'in').mkdir()
  for name in ('x.jpg', 'y.png', 'z.tif'):
    Image.fromarray(image if name != 'y.png' else np.zeros_like(image)).save(tmp_path / 'in' / name, quality=100)
  predict(bright((8, 8)), tmp_path / 'in', tmp_path / 'out', Options(volumes=str(tmp_path / 'v.csv')))
  names = sorted(p.name for p in (tmp_path / 'out').iterdir())
  assert names == ['prediction.json', 'x.png', 'y.png', 'z.tif']
  with Image.open(tmp_path / 'out' / 'z.tif') as got:
    np.testing.assert_array_equal(np.asarray(got), 3 * (image > 100))
  rows = {r['name']: r for r in csv.DictReader((tmp_path / 'v.csv').open())}
  assert rows['y.png']['voxels'] == '0' and rows['y.png']['mean_T1'] == ''
  z = rows['z.tif']
  assert (z['value'], z['structure'], z['voxels'], z['volume_mm3'], z['touches_border']) == ('3', 'lamp', '17', '', '1')
  assert float(z['mean_T1']) == pytest.approx((16 * 200 + 201) / 17, rel=1e-5)


def test_volumes_are_of_the_stored_grid_and_of_kept_masks_too(tmp_path):
  scan(tmp_path / 'in' / 'a.nii', TURNS[3], (0.5, 1.0, 3.0))
  for _ in range(2):
    predict(bright(), tmp_path / 'in', tmp_path / 'out', Options(volumes=str(tmp_path / 'v.csv')))
    row = next(csv.DictReader((tmp_path / 'v.csv').open()))
    assert float(row['volume_mm3']) == pytest.approx((ball() > 100).sum() * 1.5)
    assert float(row['mean_T1']) == 150 and row['touches_border'] == '1'


def test_a_corpus(tmp_path, scans):
  """Masks under the ids of records, where volumes lie is kept."""
  prepare([scans], tmp_path / 'corpus', volumes='whole', channels=('T1',), splits=(0.5, 0.0, 0.5), progress=False)
  found = predict(bright(), tmp_path / 'corpus', tmp_path / 'out')
  assert found['images'] == 2
  for path in sorted((tmp_path / 'out').rglob('*.nii*')):
    name = path.relative_to(tmp_path / 'out').as_posix()
    original = nibabel.load(scans / name)
    mask = nibabel.as_closest_canonical(nibabel.Nifti1Image((np.asarray(original.dataobj) > 100).astype(np.uint8) * 3, original.affine))
    np.testing.assert_array_equal(mask_of(path), np.asarray(mask.dataobj))
    np.testing.assert_allclose(nibabel.load(path).affine, mask.affine, atol=1e-4)
  assert predict(bright(), tmp_path / 'corpus', tmp_path / 'half', Options(split='test'))['images'] == 1


def test_a_series_of_slices_becomes_a_volume(tmp_path):
  """DICOM: the mask lies where the slices lie, oblique too; its name tells nothing of the patient."""
  pytest.importorskip('pydicom')
  from tests.data.readers import dicoms
  volume = ball().astype(np.int16)  # [slices, rows, columns]
  angle = 0.3
  axes = [np.cos(angle), np.sin(angle), 0, 0, 0, -1]
  step = [-2.5 * np.sin(angle), 2.5 * np.cos(angle), 0]
  dicoms.write(tmp_path / 'in', dicoms.series(volume, axes, step), np.random.default_rng(0))
  predict(bright(), tmp_path / 'in', tmp_path / 'out')
  (path,) = (tmp_path / 'out').glob('*.nii.gz')
  image = nibabel.load(path)
  inside = np.argwhere(volume > 100)
  at = np.array((-30.0, 12.0, 77.0)) + inside[:, :1] * np.array(step) + inside[:, 1:2] * 0.7 * np.array(axes[3:]) + (
    inside[:, 2:] * 0.9 * np.array(axes[:3]))
  got = np.argwhere(np.asarray(image.dataobj) == 3) @ image.affine[:3, :3].T + image.affine[:3, 3]
  order = lambda x: x[np.lexsort(np.round(x, 2).T)]
  np.testing.assert_allclose(order(got), order(at * [-1, -1, 1]), atol=1e-2)  # LPS -> RAS


@pytest.mark.parametrize(('make', 'options', 'words'), [
  (lambda p: p.mkdir(), {}, 'is empty'),
  (lambda p: (p.mkdir(), (p / 'notes.txt').write_text('x')), {}, 'no image in'),
  (lambda p: None, {}, 'does not exist'),
  (lambda p: scan(p / 'a.nii', array=np.zeros((8, 8, 8, 3), np.int16)), {}, "a.nii: unknown channel 'c0': choose one of T1"),
  (lambda p: scan(p / 'a.nii'), {'channels': ('FLAIR',)}, "FLAIR"),
  (lambda p: (p.mkdir(), Image.new('L', (9, 9)).save(p / 'a.png')), {}, 'a.png: an image of shape .* 3 axes'),
  (lambda p: scan(p / 'a.nii'), {'split': 'test'}, 'goes with a corpus'),
  (lambda p: (p.mkdir(), (p / 'a.nii').write_bytes(b'0' * 400)), {}, 'a.nii: magic is'),
  (lambda p: [scan(p / n) for n in ('a.nii.gz', 'a.mha.nii.gz')] and None, {'step': 2.0}, 'step is 2.0'),
])
def test_bad_input(tmp_path, make, options, words):
  make(tmp_path / 'in')
  with pytest.raises(UserError, match=words) as e:
    predict(bright(), tmp_path / 'in', tmp_path / 'out', Options(**options))
  assert '\n' not in str(e.value)


def test_an_unknown_spacing_where_the_run_has_one(tmp_path):
  (tmp_path / 'in').mkdir()
  Image.new('L', (9, 9)).save(tmp_path / 'in' / 'a.png')
  with pytest.raises(UserError, match='a.png: spacing is not known.*0.5, 0.5 mm'):
    predict(bright((8, 8), spacing=(0.5, 0.5)), tmp_path / 'in', tmp_path / 'out')
