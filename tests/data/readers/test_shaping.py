"""Spacing, crop, planes and content against SimpleITK, SciPy and images whose answer is known."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from jaxmed.data import readers
from jaxmed.data.readers import content, shaping, spacing
from jaxmed.errors import UserError

WHOLE = {'volumes': 'whole'}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def nifti(path, array, zooms, origin=(0, 0, 0), turn=None):
  """Writes [x, y, z]; returns the path."""
  affine = np.eye(4)
  affine[:3, :3] = (np.eye(3) if turn is None else turn) @ np.diag(zooms)
  affine[:3, 3] = origin
  nibabel.save(nibabel.Nifti1Image(array, affine), path)
  return path


def one(path, **options):
  [record] = readers.read(path, readers.Options(**(WHOLE | options)))
  return record


def smooth(rng, shape):
  """A band-limited volume, which a resampling must keep."""
  from scipy.ndimage import gaussian_filter

  value = gaussian_filter(rng.normal(size=shape), 2.5, mode='nearest')
  return ((value - value.min()) / np.ptp(value) * 4000 - 1000).astype(np.int16)


@pytest.mark.parametrize('zooms, wanted', [((1.0, 1.5, 4.0), (1.0,)), ((2.0, 2.0, 2.0), (1.3,)), ((0.9, 1.1, 3.0), (2.0, 0.7, 0.8))])
def test_finer_spacing_is_linear_as_in_itk(tmp_path, rng, zooms, wanted):
  array = smooth(rng, (19, 22, 14))
  path = nifti(tmp_path / 'a.nii', array, zooms, (-5, 7, 11))
  record = one(path, spacing=wanted)
  image = sitk.ReadImage(str(path), sitk.sitkFloat64)  # its origin and direction are LPS
  size = record['image'].shape[2::-1]
  origin = np.array(record['meta']['origin']) * [-1, -1, 1]
  there = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, origin.tolist(), record['spacing'][::-1],
                        image.GetDirection(), -9e9, sitk.sitkFloat64)
  expected = sitk.GetArrayFromImage(there)
  known = expected > -8e9  # ITK leaves out what lies beyond the last voxel by more than half of one
  assert known.mean() > 0.9
  assert record['spacing'] == list(wanted * 3 if len(wanted) == 1 else wanted)
  assert record['image'].dtype == np.int16
  assert np.abs(record['image'][..., 0] - expected)[known].max() <= 0.51  # rounded to integers


def test_coarser_spacing_is_antialiased(tmp_path, rng):
  """Against a triangle as wide as two new voxels, written out in float64; noise loses what it must lose."""
  array = rng.normal(size=(40, 30, 24))
  path = nifti(tmp_path / 'a.nii', array.astype(np.float32), (0.5, 0.6, 1.0))
  record = one(path, spacing=(2.0,))
  expected = np.float32(array).astype(np.float64).transpose(2, 1, 0)
  for axis, mm in enumerate((1.0, 0.6, 0.5)):
    n = expected.shape[axis]
    m = int(n * mm / 2.0 + 0.5)
    middle = (n - 1) / 2 + (np.arange(m) - (m - 1) / 2) * 2.0 / mm
    w = np.maximum(0, 1 - np.abs(np.arange(n) - middle[:, None]) * mm / 2.0)
    expected = np.moveaxis(np.tensordot(w / w.sum(1, keepdims=True), expected, (1, axis)), 0, axis)
  assert record['image'].shape == (*expected.shape, 1)
  assert np.allclose(record['image'][..., 0], expected, atol=1e-5)
  assert record['image'].std() < 0.3 < array[::4, ::3, ::2].std()


def test_field_keeps_its_middle_whatever_the_direction(tmp_path, rng):
  turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]) @ np.diag([1, -1, 1])
  path = nifti(tmp_path / 'a.nii', smooth(rng, (17, 12, 9)), (1.0, 2.0, 3.0), (4, -6, 8), turn)

  def middle(record):
    half = (np.array(record['image'].shape[2::-1]) - 1) / 2 * record['spacing'][::-1]
    return np.array(record['meta']['origin']) + np.reshape(record['meta']['direction'], (3, 3)) @ half

  before, after = one(path), one(path, spacing=(1.7,))
  assert np.allclose(middle(before), middle(after), atol=1e-4)
  assert not np.allclose(before['meta']['origin'], after['meta']['origin'])


def test_spacing_that_fits_or_is_unknown_changes_nothing(tmp_path, rng):
  array = rng.integers(0, 100, (9, 8, 7)).astype(np.uint8)
  path = nifti(tmp_path / 'a.nii', array, (1.0, 1.0, 1.0))
  assert np.array_equal(one(path, spacing=(1.0,))['image'], one(path)['image'])
  half = one(path, spacing=(2.0, 1.0, 1.0))
  assert half['image'].shape == (4, 8, 9, 1)
  assert half['spacing'] == [2.0, 1.0, 1.0]
  Image.fromarray(array[..., 0]).save(tmp_path / 'a.png')
  record = one(tmp_path / 'a.png', spacing=(0.1,))
  assert np.array_equal(record['image'][..., 0], array[..., 0])
  assert record['meta']['notes'] == 'spacing unknown: not resampled'
  np.savez(tmp_path / 'a.npz', image=array[..., 0], spacing=[2.0, 3.0])
  assert one(tmp_path / 'a.npz', spacing=(9.0, 1.0, 1.0))['image'].shape == (18, 24, 1)  # of a plane: y, x
  with pytest.raises(ValueError, match='GiB of pixels'):
    one(path, spacing=(1e-4,))


def test_planes_as_acquired_are_chosen_before_the_spacing(tmp_path, rng):
  path = nifti(tmp_path / 'a.nii', smooth(rng, (12, 5, 13)), (1.0, 4.0, 1.0))
  options = readers.Options(plane='acquired', spacing=(2.0,))
  planes = list(readers.read(path, options))
  assert [p['part'] for p in planes] == [f'y{i:03d}' for i in range(10)]
  assert planes[0]['image'].shape == (7, 6, 1)
  [outline] = readers.outline(path, options)
  assert shaping.count(outline, options) == 10


def phantom(rng, intensity):
  """A body of two legs with a table under it, [z, y, x], and the box of the legs."""
  volume = np.zeros((20, 60, 64), np.int16)
  y, x = np.mgrid[:60, :64]
  for middle in (20, 44):
    volume[3:17, (y - 25) ** 2 + (x - middle) ** 2 < 81] = 1000
  volume[:, 52, 10:30] = 800  # the table: a ninth of a leg
  noise = rng.normal(0, 20, volume.shape)
  volume = volume + noise if intensity == 'mr' else volume - 1000 + noise
  return volume.round().astype(np.int16), (slice(3, 17), slice(17, 34), slice(12, 53))


@pytest.mark.parametrize('intensity', ['hu', 'mr', None])
def test_box_around_a_body_leaves_the_table_out(rng, intensity):
  volume, expected = phantom(rng, intensity)
  inside = content.foreground(volume[..., None], ['gray'], {'intensity': intensity} if intensity else {})
  assert content.box(inside, 0) == expected
  assert content.box(inside, 4) == (slice(0, 20), slice(13, 38), slice(8, 57))


def test_crop_moves_the_origin_with_it(tmp_path, rng):
  volume, at = phantom(rng, 'mr')
  path = nifti(tmp_path / 'a.nii', volume.T, (1.0, 2.0, 3.0), (-10, 20, 30))
  record = one(path, crop='foreground', margin=0)
  assert np.array_equal(record['image'][..., 0], volume[at])
  assert record['meta']['origin'] == pytest.approx([-10 + 12, 20 + 17 * 2, 30 + 3 * 3])
  planes = list(readers.read(path, readers.Options(crop='foreground', margin=0)))
  assert len(planes) == 14
  assert {p['image'].shape for p in planes} == {(17, 41, 1)}  # one box for all planes
  blank = nifti(tmp_path / 'b.nii', np.full((9, 9, 9), 7, np.uint8), (1, 1, 1))
  assert one(blank, crop='foreground')['image'].shape == (9, 9, 9, 1)


def test_all_times_are_cropped_by_the_box_of_the_first(tmp_path, rng):
  array = np.zeros((20, 20, 20, 18), np.uint8)
  for t in range(18):
    array[5:12, 6:14 - t // 3, 7:15, t] = 200
  path = nifti(tmp_path / 'a.nii', array, (1, 1, 1))
  records = list(readers.read(path, readers.Options(crop='foreground', margin=1, **WHOLE)))
  assert {r['image'].shape for r in records} == {(10, 10, 9, 1)}
  assert np.array_equal(records[17]['image'][..., 0], array[4:13, 5:15, 6:16, 17].T)


def test_content_is_the_share_that_is_no_background(tmp_path, rng):
  volume, _ = phantom(rng, 'mr')
  path = nifti(tmp_path / 'a.nii', volume.T, (1, 1, 1))
  planes = list(readers.read(path, readers.Options(min_content=0.02)))
  truth = (volume > 400).mean(axis=(1, 2))
  assert [p['content'] for p in planes] == pytest.approx(truth.tolist(), abs=1e-12)
  assert truth[0] < 0.02 < truth[5]
  [record] = readers.read(path, readers.Options(min_content=0.02, crop='foreground', margin=0, **WHOLE))
  assert record['content'] == pytest.approx((volume[3:17, 17:34, 12:53] > 400).mean())
  assert 'content' not in one(path)


@pytest.mark.parametrize('image, channels, expected', [
  (np.full((8, 8, 1), 3, np.uint8), ['gray'], 0.0),
  (np.full((8, 8, 3), 250, np.uint8), ['R', 'G', 'B'], 0.0),  # blank glass
  (np.full((8, 8, 3), 4, np.uint8), ['R', 'G', 'B'], 0.0),
  (np.tile(np.uint8([200, 90, 160]), (8, 8, 1)), ['R', 'G', 'B'], 1.0),
  (np.tile(np.uint16([51400, 23130, 41120]), (8, 8, 1)), ['R', 'G', 'B'], 1.0),
  (np.repeat(np.float32([[0], [1]]), 8, 1)[..., None], ['gray'], 0.5),
])
def test_background_of_single_images(image, channels, expected):
  assert content.foreground(image, channels, {}).mean() == expected


def test_several_channels_count_alike_whatever_their_scale(rng):
  cells = np.zeros((64, 64, 2), np.float64)
  cells[8:24, 8:24, 0] = 60_000
  cells[40:56, 40:56, 1] = 30
  cells += rng.normal(0, [600, 0.5], cells.shape)
  inside = content.foreground(cells.astype(np.float32), ['a', 'b'], {})
  truth = np.zeros((64, 64), bool)
  truth[8:24, 8:24] = truth[40:56, 40:56] = True
  assert (inside == truth).mean() > 0.999
  assert content.box(truth, 2) == (slice(6, 58), slice(6, 58))  # of a plane all pieces count


def test_tiles_and_clips_keep_their_grid(rng):
  tile = {'image': rng.integers(0, 255, (8, 8, 3)).astype(np.uint8), 'channels': ['R', 'G', 'B'], 'spacing': [0.0005] * 2,
          'part': 'x0y0', 'meta': {'tile_xy': [0, 0]}}
  clip = {'image': np.zeros((5, 8, 8, 1), np.uint8), 'channels': ['gray'], 'spacing': None, 'part': '', 'meta': {}}
  options = readers.Options(spacing=(1.0,), crop='foreground', min_content=0.1)
  found = list(shaping.shaped([tile, clip], options))
  assert [f['image'].shape for f in found] == [(8, 8, 3), (5, 8, 8, 1)]
  assert found[1]['content'] == 0.0
  assert 'notes' not in found[1]['meta']


@pytest.mark.parametrize('options, words', [
  ({'spacing': (1.0, 2.0)}, 'spacing is 1.0, 2.0: expected one number of mm, or three'),
  ({'spacing': (0.0,)}, 'spacing is 0.0'), ({'crop': 'foregroud'}, "did you mean 'foreground'"),
  ({'margin': -1}, 'margin is -1'), ({'min_content': 1.0}, 'min_content is 1.0: expected a fraction'),
])
def test_bad_options(options, words):
  with pytest.raises(UserError, match=words):
    readers.Options(**options)


def test_same_weights_as_without_a_scale_where_that_fits():
  from jaxmed.data.resize import weights

  assert np.allclose(weights(30, 10, 3.0).toarray(), weights(30, 10).toarray(), atol=1e-7)
  assert spacing.grid((10, 11), (1.0, 1.0), (2.0, 0.9995)) == [5, 11]
