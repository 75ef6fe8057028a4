"""NRRD, MetaImage and NIfTI in time: the same phantom, the same records."""

import nibabel
import numpy as np
import pytest

from jaxmed.data import readers

sitk = pytest.importorskip('SimpleITK')
WHOLE = readers.Options(volumes='whole')
# A quarter turn about z and a flip of y, beside 20 degrees about x: no axis is where it was.
TURN = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1.0]]) @ np.array(
  [[1, 0, 0], [0, 0.9396926208, -0.3420201433], [0, 0.3420201433, 0.9396926208]])


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def itk_image(array: np.ndarray, vector: bool = False):
  image = sitk.GetImageFromArray(array, isVector=vector)
  rank = image.GetDimension()
  image.SetSpacing((0.9, 0.7, 2.5, 2.0)[:rank])
  image.SetOrigin((-3.0, 4.0, 5.0, 0.0)[:rank])
  direction = np.eye(rank)
  direction[:3, :3] = TURN[:min(3, rank), :min(3, rank)] if rank > 2 else direction
  image.SetDirection(direction.ravel().tolist())
  return image


def nifti_of(path, array: np.ndarray):
  """The same phantom [z, y, x] by nibabel, from the same numbers."""
  affine = np.eye(4)
  affine[:3, :3] = TURN * [0.9, 0.7, 2.5]
  affine[:3, 3] = -3, 4, 5
  nibabel.save(nibabel.Nifti1Image(array.T, np.diag([-1, -1, 1, 1]) @ affine), path)
  return next(readers.read(path, WHOLE))


@pytest.mark.parametrize('suffix', ['nrrd', 'nhdr', 'mha', 'mhd'])
def test_itk_equals_nifti(tmp_path, rng, suffix):
  array = rng.integers(-1000, 3000, (5, 6, 7)).astype(np.int16)
  sitk.WriteImage(itk_image(array), str(tmp_path / f'a.{suffix}'), useCompression=suffix != 'nhdr')
  [record] = readers.read(tmp_path / f'a.{suffix}', WHOLE)
  twin = nifti_of(tmp_path / 'a.nii', array)
  assert np.array_equal(record['image'], twin['image'])
  assert record['image'].dtype == np.int16
  np.testing.assert_allclose(record['spacing'], twin['spacing'], rtol=1e-6)
  np.testing.assert_allclose(record['meta']['direction'], twin['meta']['direction'], atol=1e-6)
  np.testing.assert_allclose(record['meta']['origin'], twin['meta']['origin'], atol=1e-4)
  # The centre of voxel [z, y, x] = [0, 0, 0] is where the affine of the file puts it.
  x, y, z = (array.shape[i] for i in (2, 1, 0))
  corners = [(i, j, k) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)]
  world = [np.array([-1, -1, 1]) * (TURN * [0.9, 0.7, 2.5] @ c + [-3, 4, 5]) for c in corners]
  assert np.linalg.norm(np.array(world) - record['meta']['origin'], axis=1).min() < 1e-4


def test_itk_components_planes_and_time(tmp_path, rng):
  colour = rng.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
  sitk.WriteImage(itk_image(colour, vector=True), str(tmp_path / 'c.mha'))
  [record] = readers.read(tmp_path / 'c.mha', WHOLE)
  assert record['channels'] == ['R', 'G', 'B']
  twins = [nifti_of(tmp_path / 'a.nii', np.ascontiguousarray(colour[..., i]))['image'][..., 0] for i in range(3)]
  assert np.array_equal(record['image'], np.stack(twins, -1))
  plane = rng.integers(0, 255, (5, 6)).astype(np.uint8)
  sitk.WriteImage(itk_image(plane), str(tmp_path / 'p.nrrd'))
  [record] = readers.read(tmp_path / 'p.nrrd')
  assert np.array_equal(record['image'][..., 0], plane)
  assert record['spacing'] == pytest.approx([0.7, 0.9])
  times = rng.integers(0, 255, (18, 2, 5, 6)).astype(np.uint8)
  sitk.WriteImage(itk_image(times), str(tmp_path / 't.nrrd'))
  found = list(readers.read(tmp_path / 't.nrrd', WHOLE))
  assert [r['part'] for r in found] == [f't{t:03d}' for t in range(18)]
  assert np.array_equal(found[7]['image'], nifti_of(tmp_path / 'b.nii', times[7])['image'])


def test_pixels_outside_the_folder_are_refused(tmp_path, rng):
  inner = tmp_path / 'inner'
  inner.mkdir()
  sitk.WriteImage(itk_image(rng.integers(0, 9, (2, 3, 4)).astype(np.uint8)), str(inner / 'a.mhd'))
  text = (inner / 'a.mhd').read_text()
  (tmp_path / 'a.raw').write_bytes((inner / 'a.raw').read_bytes())
  for name in ('../a.raw', str(tmp_path / 'a.raw')):
    (inner / 'a.mhd').write_text(text.replace('a.raw', name))
    with pytest.raises(ValueError, match='outside the folder'):
      list(readers.read(inner / 'a.mhd'))
  (inner / 'a.mhd').write_text(text.replace('NDims = 3', 'NDims = 30000'))
  with pytest.raises(ValueError, match='30000 axes'):  # the reader of MetaImage would end the process
    list(readers.read(inner / 'a.mhd'))
  (inner / 'a.mhd').write_text('Comment = ' + 'x' * 70000 + '\n' + text.replace('a.raw', '../a.raw'))
  with pytest.raises(ValueError, match='within 64 KiB'):
    list(readers.read(inner / 'a.mhd'))
  (inner / 'a.raw').unlink()
  (inner / 'a.raw').symlink_to(tmp_path / 'a.raw')
  (inner / 'a.mhd').write_text(text)
  with pytest.raises(ValueError, match='behind a link'):
    list(readers.read(inner / 'a.mhd'))


def test_nifti_time_is_frames_and_a_short_axis_channels(tmp_path, rng):
  array = rng.integers(0, 1000, (4, 5, 3, 20)).astype(np.int16)
  image = nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1]))
  image.header.set_xyzt_units('mm', 'msec')
  image.header.set_zooms((2, 2, 3, 1500))
  nibabel.save(image, tmp_path / 'bold.nii.gz')
  found = list(readers.read(tmp_path / 'bold.nii.gz', WHOLE))
  assert len(found) == 20
  assert found[3]['part'] == 't003'
  assert found[3]['meta']['frame_seconds'] == pytest.approx(4.5)
  assert found[3]['meta']['notes'] == 'volume 3 of 20 in time'
  assert np.array_equal(found[3]['image'][..., 0], array[..., 3].T)
  assert next(readers.read(tmp_path / 'bold.nii.gz'))['part'] == 't000z000'
  nibabel.save(nibabel.Nifti1Image(array[..., :3], np.diag([2.0, 2.0, 3.0, 1])), tmp_path / 'rgb.nii')
  [record] = readers.read(tmp_path / 'rgb.nii', WHOLE)
  assert record['image'].shape == (3, 5, 4, 3)
  assert record['meta']['origin'] == [0.0, 0.0, 0.0]
  assert record['meta']['orientation'] == 'RAS'


@pytest.mark.parametrize('zooms, letter, axis', [((1, 1, 4), 'z', 0), ((1, 4, 1), 'y', 1), ((4, 1, 1), 'x', 2),
                                                 ((1, 1.1, 1), 'z', 0)])
def test_planes_as_acquired(tmp_path, rng, zooms, letter, axis):
  array = rng.integers(0, 1000, (5, 6, 7)).astype(np.int16)
  nibabel.save(nibabel.Nifti1Image(array, np.diag([*zooms, 1.0])), tmp_path / 'a.nii')
  [whole] = readers.read(tmp_path / 'a.nii', WHOLE)
  planes = list(readers.read(tmp_path / 'a.nii', readers.Options(plane='acquired')))
  assert len(planes) == whole['image'].shape[axis]
  assert planes[2]['part'] == f'{letter}002'
  assert np.array_equal(planes[2]['image'], whole['image'].take(2, axis))
  assert planes[2]['spacing'] == pytest.approx([s for i, s in enumerate(whole['spacing']) if i != axis])
