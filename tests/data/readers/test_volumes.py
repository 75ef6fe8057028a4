"""NRRD, MetaImage and NIfTI in time: the same phantom, the same records."""

import gzip
import re
import struct

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


def test_nrrd_of_few_volumes_is_time_where_its_kind_says_so(tmp_path, rng):
  times = rng.integers(0, 255, (5, 2, 6, 7)).astype(np.uint8)
  def write(kinds):
    head = f'NRRD0004\ntype: uint8\ndimension: 4\nsizes: 7 6 2 5\nkinds: {kinds}\nencoding: raw\n\n'
    (tmp_path / 'a.nrrd').write_bytes(head.encode() + times.tobytes())
    return list(readers.read(tmp_path / 'a.nrrd', WHOLE))
  found = write('domain domain domain time')
  assert [r['part'] for r in found] == [f't{t:03d}' for t in range(5)]
  assert np.array_equal(found[3]['image'][..., 0], times[3][:, ::-1, ::-1])  # LPS -> RAS
  assert write('domain domain domain domain')[0]['image'].shape == (2, 6, 7, 5)
  with pytest.raises(ValueError, match='kinds are time, domain, .*expected time'):
    write('time domain domain domain')


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


def test_vectors_are_no_colours(tmp_path, rng):
  field = rng.random((4, 5, 6, 3)).astype(np.float32)
  sitk.WriteImage(itk_image(field, vector=True), str(tmp_path / 'a.mha'))
  [record] = readers.read(tmp_path / 'a.mha', WHOLE)
  assert record['channels'] == ['c0', 'c1', 'c2']


def test_itk_refusals_name_the_field(tmp_path, rng):
  sitk.WriteImage(itk_image(rng.integers(0, 9, (2, 3, 4)).astype(np.uint8)), str(tmp_path / 'a.mhd'))
  text = (tmp_path / 'a.mhd').read_text()
  spacing = next(line for line in text.splitlines() if line.startswith('ElementSpacing'))
  (tmp_path / 'a.mhd').write_text(text.replace(spacing, spacing.replace('.', ',')))
  with pytest.raises(ValueError, match="ElementSpacing is '0,9.*expected numbers with a decimal point"):
    list(readers.read(tmp_path / 'a.mhd'))
  (tmp_path / 'a.mhd').write_text(text)
  (tmp_path / 'a.raw').unlink()
  with pytest.raises(ValueError, match='its pixels lie in a.raw, which is not there: expected that file beside'):
    list(readers.read(tmp_path / 'a.mhd'))


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


@pytest.mark.parametrize('count', [12, 18])
def test_nifti_of_few_volumes_is_time_where_the_header_says_seconds(tmp_path, rng, count):
  array = rng.integers(0, 900, (4, 5, 3, count)).astype(np.int16)
  image = nibabel.Nifti1Image(array, np.eye(4))
  image.header.set_xyzt_units('mm', 'sec')
  image.header.set_zooms((1, 1, 1, 0.05))
  nibabel.save(image, tmp_path / 'cine.nii.gz')
  found = list(readers.read(tmp_path / 'cine.nii.gz', WHOLE))
  assert [r['part'] for r in found] == [f't{t:03d}' for t in range(count)]
  assert found[7]['meta']['frame_seconds'] == pytest.approx(0.35)
  assert np.array_equal(found[7]['image'][..., 0], array[..., 7].T)
  assert len(list(readers.outline(tmp_path / 'cine.nii.gz'))) == count
  names = tuple(f'b{i}' for i in range(count))  # as many names as volumes say that they are channels
  [record] = readers.read(tmp_path / 'cine.nii.gz', readers.Options(volumes='whole', channels=names))
  assert np.array_equal(record['image'], array.transpose(2, 1, 0, 3))
  image.header['pixdim'][4] = 0  # as the Medical Segmentation Decathlon writes four sequences
  nibabel.save(image, tmp_path / 'a.nii')
  assert len(list(readers.read(tmp_path / 'a.nii', WHOLE))) == (1 if count <= readers.MAX_CHANNELS else count)


@pytest.mark.parametrize('names', ['RGB', 'RGBA'])
def test_nifti_in_colour(tmp_path, rng, names):
  array = rng.integers(0, 256, (4, 5, 3, len(names))).astype(np.uint8)
  stored = np.ascontiguousarray(array).view([(n, 'u1') for n in names])[..., 0]
  nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / 'a.nii.gz')
  [record] = readers.read(tmp_path / 'a.nii.gz', WHOLE)
  assert record['channels'] == ['R', 'G', 'B']
  assert np.array_equal(record['image'], array[..., :3].transpose(2, 1, 0, 3))
  [outline] = readers.outline(tmp_path / 'a.nii.gz')
  assert outline['image'].shape == record['image'].shape


NAN = float('nan')
# (offset in the header, format, values) by nifti1.h, and what is noted or, after '!', why it is refused.
HEADERS = [
  (123, 'B', [7], 'xyzt_units is 7, of space 7: expected 0 to 3'), (112, 'f', [NAN], 'scl_slope is nan: values are kept'),
  (112, '2f', [2.0, NAN], 'scl_inter is nan: 0 was taken'), (80, 'f', [NAN], 'pixdim is nan, 2, 3: .* spacing is that of'),
  (84, 'f', [0.0], 'pixdim is 1, 0, 3'), (254, 'h', [99], 'sform_code is 99: expected 0 to 5'),
  (280, 'f', [NAN], 'sform maps no voxels to space'), (108, 'f', [NAN], 'vox_offset is nan: expected at least 352'),
  (124, '2f', [NAN, NAN], ''), (76, 'f', [NAN], ''),  # cal_max and cal_min, qfac of no qform
  (70, 'h', [77], '!datatype is 77: expected integers'), (70, 'h', [1], '!datatype is 1:'),
  (42, 'h', [-4], '!dim is .3, -4, 5, 6.*expected the number of axes'), (344, '4s', [b'abc'], "!magic is 'abc.*expected n.1")]


@pytest.mark.parametrize('offset, form, values, said', HEADERS)
def test_nifti_headers_that_do_not_hold(tmp_path, rng, offset, form, values, said):
  array = rng.integers(0, 900, (4, 5, 6)).astype(np.int16)
  image = nibabel.Nifti1Image(array, np.diag([1.0, 2, 3, 1]))
  image.set_qform(image.affine, 1)
  nibabel.save(image, tmp_path / 'a.nii')
  data = bytearray((tmp_path / 'a.nii').read_bytes())
  struct.pack_into(f'<{form}', data, offset, *values)
  (tmp_path / 'a.nii').write_bytes(data)
  if said.startswith('!'):
    with pytest.raises(ValueError, match=said[1:]):
      list(readers.read(tmp_path / 'a.nii', WHOLE))
    return
  [record] = readers.read(tmp_path / 'a.nii', WHOLE)
  slope = 2 if form == '2f' and offset == 112 else 1
  assert np.array_equal(record['image'][..., 0], array.T * slope)
  assert record['spacing'] == pytest.approx([3, 2, 1])
  notes = record['meta'].get('notes', '')
  assert re.search(said, notes) if said else notes == ''


def test_nifti_gzip_is_known_by_its_bytes(tmp_path, rng):
  array = rng.integers(0, 900, (4, 5, 6)).astype(np.int16)
  for version, suffix in ((nibabel.Nifti1Image, 'nii.gz'), (nibabel.Nifti2Image, 'nii')):
    nibabel.save(version(array.astype('>i2'), np.eye(4)), tmp_path / f'a.{suffix}')
    wrong = tmp_path / ('b.nii' if suffix == 'nii.gz' else 'b.nii.gz')
    (tmp_path / f'a.{suffix}').rename(wrong)
    assert np.array_equal(next(readers.read(wrong, WHOLE))['image'][..., 0], array.T)


@pytest.mark.parametrize('suffix', ['nii.gz', 'nrrd', 'mha', 'npy', 'tif', 'h5', 'zarr'])
def test_what_is_not_finite_is_refused_or_filled(tmp_path, rng, suffix):
  array = rng.random((17, 18, 19)).astype(np.float32)  # [z, y, x]
  array[0], array[3, 4, 5:7] = np.nan, [np.inf, -np.inf]
  path = tmp_path / f'a.{suffix}'
  if suffix == 'nii.gz':
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
  elif suffix in ('nrrd', 'mha'):
    image = sitk.GetImageFromArray(array)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # RAS
    sitk.WriteImage(image, str(path))
  elif suffix == 'npy':
    np.save(path, array)
  elif suffix == 'tif':
    pytest.importorskip('tifffile').imwrite(path, array, imagej=True, metadata={'axes': 'ZYX'})
  elif suffix == 'h5':
    with pytest.importorskip('h5py').File(path, 'w') as f:
      f['image'] = array
  else:
    group = pytest.importorskip('zarr').open_group(str(path), mode='w')
    group.create_array('0', shape=array.shape, dtype=array.dtype)[...] = array
    group.attrs['ome'] = {'multiscales': [{'axes': [{'name': a} for a in 'zyx'], 'datasets': [{'path': '0'}]}]}
  with pytest.raises(ValueError, match='344 of 5814 pixels are NaN .342., infinite .*--nan 0 or --nan mean'):
    list(readers.read(path))
  finite = np.isfinite(array)
  for how, value in (('0', 0), ('mean', array[finite].mean(dtype=np.float64))):
    [record] = readers.read(path, readers.Options(volumes='whole', nan=how))
    np.testing.assert_allclose(record['image'][..., 0], np.where(finite, array, np.float32(value)), rtol=1e-6)
    assert record['meta']['nan_filled'] == 344
  planes = list(readers.read(path, readers.Options(nan='0')))
  assert [p.get('meta', {}).get('nan_filled') for p in planes] == [342, None, None, 2] + [None] * 13


def test_a_channel_without_a_finite_pixel_has_no_mean(tmp_path):
  array = np.stack([np.ones((20, 20)), np.full((20, 20), np.nan)], -1)
  np.save(tmp_path / 'a.npy', array)
  with pytest.raises(ValueError, match='channel c1 has no finite pixel, so no mean: expected one, or --nan 0'):
    list(readers.read(tmp_path / 'a.npy', readers.Options(nan='mean')))
  [record] = readers.read(tmp_path / 'a.npy', readers.Options(nan='0'))
  assert record['image'][..., 1].max() == 0


@pytest.mark.parametrize('end', ['', '.gz'])
def test_a_nifti_that_counts_more_than_it_holds_takes_no_memory(tmp_path, end):
  """A file of a kilobyte whose header says gigabytes is refused before they are asked for."""
  image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
  image.to_filename(tmp_path / 'x.nii')
  data = bytearray((tmp_path / 'x.nii').read_bytes())
  data[42:48] = np.array([512, 512, 512], '<i2').tobytes()
  (tmp_path / f'y.nii{end}').write_bytes(gzip.compress(bytes(data)) if end else bytes(data))
  with pytest.raises(ValueError, match=r'truncated: dim and datatype count 268435456 bytes of pixels from byte 352 on'):
    next(iter(readers.read(tmp_path / f'y.nii{end}')))
