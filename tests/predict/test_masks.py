"""Masks as files lie where their image lies, whatever its axes, and are read back as they were written."""

import itertools

import nibabel
import numpy as np
import pytest
from nibabel import orientations

from jaxmed.data import readers
from jaxmed.errors import UserError
from jaxmed.predict import masks

WHOLE = readers.Options(volumes='whole')
TURNS = [(p, f) for p in itertools.permutations(range(3)) for f in itertools.product((1, -1), repeat=3)]


def turned_affine(axes, signs, spacing=(0.8, 1.5, 3.0), oblique=True):
  """Voxel axes along some RAS axes, maybe a little oblique."""
  affine = np.eye(4)
  affine[:3, :3] = 0
  for i, (axis, sign) in enumerate(zip(axes, signs)):
    affine[axis, i] = sign * spacing[i]
  if oblique:
    angle = 0.2
    affine[:3, :3] = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]) @ affine[:3, :3]
  affine[:3, 3] = (-20, 7.5, 31)
  return affine


@pytest.mark.parametrize('turn', TURNS[::5] + TURNS[-2:], ids=str)
@pytest.mark.parametrize('channels', [0, 2])
def test_a_mask_lies_on_its_image(tmp_path, turn, channels):
  """A mask that is the image itself, read by our reader and written, is the array of the file, bit by bit."""
  rng = np.random.default_rng(0)
  shape = (4, 5, 6)
  array = rng.integers(0, 255, (*shape, channels) if channels else shape).astype(np.uint8)
  image = nibabel.Nifti1Image(array, turned_affine(*turn))
  image.header['descrip'] = b'scanner'
  image.set_sform(image.affine, 2)
  image.set_qform(image.affine, 1)
  nibabel.save(image, tmp_path / 'a.nii.gz')
  record = next(iter(readers.read(tmp_path / 'a.nii.gz', WHOLE)))
  masks.write(tmp_path / 'mask.nii.gz', record['image'][..., 0].astype(np.int32), record, tmp_path / 'a.nii.gz')
  got = nibabel.load(tmp_path / 'mask.nii.gz')
  assert got.get_data_dtype() == np.uint8 and got.shape == shape
  np.testing.assert_array_equal(np.asarray(got.dataobj), array[..., 0] if channels else array)
  for key in ('srow_x', 'srow_y', 'srow_z', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'sform_code', 'qform_code', 'xyzt_units'):
    np.testing.assert_array_equal(got.header[key], image.header[key])
  np.testing.assert_array_equal(got.header['pixdim'][:4], image.header['pixdim'][:4])
  np.testing.assert_array_equal(masks.read(tmp_path / 'mask.nii.gz'), record['image'][..., 0])


def test_a_scaled_image_has_a_mask_without_scale(tmp_path):
  image = nibabel.Nifti2Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), turned_affine(*TURNS[7]))
  image.header.set_slope_inter(0.5, -3)
  nibabel.save(image, tmp_path / 'a.nii')
  record = next(iter(readers.read(tmp_path / 'a.nii', WHOLE)))
  mask = (record['image'][..., 0] > 2).astype(np.int32) * 300
  masks.write(tmp_path / 'm.nii', mask, record, tmp_path / 'a.nii')
  got = nibabel.load(tmp_path / 'm.nii')
  assert got.header['sizeof_hdr'] == 540 and set(np.unique(got.get_fdata())) == {0, 300}
  assert got.get_data_dtype() == np.uint16
  np.testing.assert_array_equal(got.affine, nibabel.load(tmp_path / 'a.nii').affine)


def test_volumes_of_other_formats_are_written_in_ras(tmp_path):
  """A voxel of the mask is at the place in space where the voxel of the image was."""
  affine = turned_affine(*TURNS[11])
  array = np.zeros((4, 5, 6), np.uint8)
  array[1, 3, 2] = 1
  nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / 'a.nii')
  record = next(iter(readers.read(tmp_path / 'a.nii', WHOLE)))
  masks.write(tmp_path / 'm.nii.gz', record['image'][..., 0], record)
  got = nibabel.load(tmp_path / 'm.nii.gz')
  assert ''.join(nibabel.aff2axcodes(got.affine)) == 'RAS'
  place = got.affine @ [*np.argwhere(np.asarray(got.dataobj))[0], 1]
  np.testing.assert_allclose(place, affine @ [1, 3, 2, 1], atol=1e-4)
  assert orientations.io_orientation(got.affine)[:, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize('name', ['m.png', 'm.tif'])
@pytest.mark.parametrize('top', [2, 700])
def test_images(tmp_path, name, top):
  mask = np.random.default_rng(0).integers(0, top + 1, (7, 9))
  masks.write(tmp_path / name, mask, {'spacing': None})
  np.testing.assert_array_equal(masks.read(tmp_path / name), mask)
  assert not list(tmp_path.glob('.*'))


def test_what_no_png_holds(tmp_path):
  with pytest.raises(UserError, match='below 65536'):
    masks.write(tmp_path / 'm.png', np.full((2, 2), 70000), {'spacing': None})
