"""DICOM: series equal the NIfTI of the same phantom; pydicom's files equal pydicom's pixels; oddities are told."""

import dataclasses
import pathlib
import sys
import warnings

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_color_lut, apply_rescale

from jaxmed.data import readers
from jaxmed.errors import UserError
from tests.data.readers.dicoms import DX, MR, PATIENT, US, enhanced, image, series, write

FILES = sorted((pathlib.Path(pydicom.__file__).parent / 'data/test_files').glob('*.dcm'))
WHOLE = readers.Options(volumes='whole')
AXES = {
  'axial': [1, 0, 0, 0, 1, 0],
  'coronal': [1, 0, 0, 0, 0, -1],
  'sagittal': [0, 1, 0, 0, 0, -1],
  'oblique': [0.9396926208, 0.3420201433, 0, -0.3213938048, 0.8830222216, 0.3420201433],
}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def phantom(rng, shape=(5, 6, 7)) -> np.ndarray:
  return rng.integers(-1000, 3000, shape).astype(np.int16)


def normal(axes) -> np.ndarray:
  return np.cross(axes[:3], axes[3:])


def groups(paths, **options):
  found, rejects = readers.groups('dicom', paths, paths[0].parent, readers.Options(**options))
  assert not rejects
  return found


def volumes(paths):
  return [list(readers.read_group(g, WHOLE)) for g in groups(paths)]


def as_nifti(path, volume, axes, step, origin=(-30.0, 12.0, 77.0), spacing=(0.7, 0.9)):
  """The same phantom written by nibabel: [columns, rows, slices] and its affine into RAS."""
  affine = np.eye(4)
  affine[:3] = np.c_[np.array(axes[:3]) * spacing[1], np.array(axes[3:]) * spacing[0], step, origin]
  nibabel.save(nibabel.Nifti1Image(volume.T, np.diag([-1, -1, 1, 1]) @ affine), path)
  [record] = readers.read(path, WHOLE)
  return record


@pytest.mark.parametrize('reverse', [False, True])
def test_mixed_series_equal_their_nifti_to_the_bit(tmp_path, rng, reverse):
  expected, paths = {}, []
  for name, axes in AXES.items():
    volume, step = phantom(rng), normal(axes) * (-2.5 if reverse else 2.5)
    slices = series(volume, axes, step, series=name, SeriesDescription=name)
    for data, number in zip(slices, rng.permutation(5)):  # instance numbers lie, too
      data.InstanceNumber = int(number)
    paths += write(tmp_path / 'd', slices, rng, prefix=name)
    expected[name] = as_nifti(tmp_path / f'{name}.nii.gz', volume, axes, step)
  rng.shuffle(paths)
  found = volumes(paths)
  assert len(found) == 4
  for [record] in found:
    same = [n for n, e in expected.items() if np.array_equal(e['image'], record['image'])]
    assert len(same) == 1
    twin = expected.pop(same[0])
    assert record['image'].dtype == np.int16
    np.testing.assert_allclose(record['spacing'], twin['spacing'], rtol=1e-5)
    np.testing.assert_allclose(record['meta']['direction'], twin['meta']['direction'], atol=1e-5)
    np.testing.assert_allclose(record['meta']['origin'], twin['meta']['origin'], atol=1e-3)
    assert record['meta']['orientation'] == 'RAS'
    assert 'notes' not in record['meta']


def test_groups_do_not_depend_on_order_or_names(tmp_path, rng):
  slices = series(phantom(rng), AXES['axial'], [0, 0, 3.0])
  first = groups(write(tmp_path / 'a', slices, rng))
  again = groups(write(tmp_path / 'b', slices, rng)[::-1])
  assert [(g.name, g.subject) for g in first] == [(g.name, g.subject) for g in again]
  assert [f.name for f in first[0].files] != [f.name for f in again[0].files]
  salted = groups(list((tmp_path / 'a').iterdir()), salt='pepper')
  assert salted[0].subject != first[0].subject
  assert salted[0].files == first[0].files


def test_hounsfield_units_and_window(tmp_path, rng):
  stored = rng.integers(0, 4096, (3, 6, 7)).astype(np.uint16)
  slices = series(stored, AXES['axial'], [0, 0, 1.0], BitsStored=12, RescaleSlope=1, RescaleIntercept=-1024,
                  RescaleType='HU', WindowCenter=[40, 300], WindowWidth=[400, 1500])
  [[record]] = volumes(write(tmp_path / 'd', slices, rng))
  assert record['image'].dtype == np.int16
  # LPS rows run to the back and columns to the left: RAS turns both.
  assert np.array_equal(record['image'][..., 0], stored[:, ::-1, ::-1].astype(int) - 1024)
  assert record['meta']['intensity'] == 'hu'
  assert record['meta']['window'] == [40.0, 400.0]
  assert record['meta']['bits'] == 12
  assert record['meta']['modality'] == 'CT'
  slope = series(stored, AXES['axial'], [0, 0, 1.0], sop_class=MR, series='t', RescaleSlope=0.5, RescaleIntercept=2)
  [[record]] = volumes(write(tmp_path / 'e', slope, rng))
  assert record['image'].dtype == np.float32
  assert np.array_equal(record['image'][..., 0], (stored[:, ::-1, ::-1] * 0.5 + 2).astype(np.float32))


def notes_of(paths) -> list[str]:
  return [r['meta'].get('notes', '') for records in volumes(paths) for r in records]


def test_missing_slices_and_tilt_are_told(tmp_path, rng):
  volume = phantom(rng, (9, 6, 7))
  slices = series(volume, AXES['axial'], [0, 0, 2.0])
  [note] = notes_of(write(tmp_path / 'gap', slices[:4] + slices[6:], rng))
  assert note == '2 slices missing in 1 gaps (step 2.000 mm, largest 6.000 mm)'
  tilted = series(volume, AXES['axial'], [0, 2 * np.tan(np.radians(15)), 2.0], GantryDetectorTilt=0)
  [note] = notes_of(write(tmp_path / 'tilt', tilted, rng))
  assert note == 'tilted gantry: 15.0 degrees between the normal and the line of positions'
  for data, x in zip(slices, rng.uniform(-20, 20, 9)):
    data.ImagePositionPatient[0] = round(float(x), 3)
  found, rejects = readers.groups('dicom', write(tmp_path / 'walk', slices, rng), tmp_path)
  assert not found
  assert len(rejects) == 9
  assert 'off a line' in rejects[0][1]


def test_duplicates_are_dropped_and_rivals_refused(tmp_path, rng):
  volume = phantom(rng)
  slices = series(volume, AXES['axial'], [0, 0, 2.0])
  twin = image(volume[2], name='copy', **{k: slices[2].get(k) for k in (
    'ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing', 'InstanceNumber')})
  paths = write(tmp_path / 'a', [*slices, twin], rng)
  [[record]] = volumes(paths)
  assert record['image'].shape[0] == 5
  assert record['meta']['notes'] == '1 duplicate slices dropped'
  copies = write(tmp_path / 'copies', slices, rng) + write(tmp_path / 'more', slices, rng)
  assert notes_of(copies) == ['5 duplicate slices dropped']
  twin.PixelData = (volume[2] + 1).tobytes()
  found, rejects = readers.groups('dicom', write(tmp_path / 'b', [*slices, twin], rng), tmp_path)
  assert not found
  assert len(rejects) == 6
  assert '1 of 5 positions hold several slices' in rejects[0][1]


@pytest.mark.parametrize('tag, values', [('EchoTime', [4.0, 80.0]), ('DiffusionBValue', [0.0, 1000.0]),
                                         ('AcquisitionNumber', [9, 10]), (None, [0, 0])])
def test_volumes_at_the_same_positions_are_told_apart(tmp_path, rng, tag, values):
  both = [phantom(rng), phantom(rng)]
  both[0][0] = both[1][0] = 0  # air in both is no duplicate
  slices = []
  for i, value in enumerate(values):
    part = series(both[i], AXES['axial'], [0, 0, 2.0], sop_class=MR, **({tag: value} if tag else {}))
    for k, data in enumerate(part):
      data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f'1.2.{i + 1}.{k + 1}'
      data.InstanceNumber = 5 * i + k + 1
    slices += part
  found = groups(write(tmp_path / 'd', slices, rng))
  assert len({g.name for g in found}) == 2
  images = [next(readers.read_group(g, WHOLE))['image'][..., 0] for g in found]
  turned = [v[:, ::-1, ::-1] for v in both]
  assert any(np.array_equal(images[0], t) for t in turned)
  assert any(np.array_equal(images[1], t) for t in turned)
  assert not np.array_equal(*images)
  assert [n == ('volumes told apart by instance number only',) for n in (g.notes for g in found)] == [tag is None] * 2


def test_enhanced_multi_frame_equals_its_nifti(tmp_path, rng):
  axes, volume = AXES['oblique'], phantom(rng)
  step = normal(axes) * 3.0
  order = rng.permutation(5)
  data = enhanced(volume, axes, step)
  frames = data.PerFrameFunctionalGroupsSequence
  data.PerFrameFunctionalGroupsSequence = pydicom.Sequence([frames[i] for i in order])
  data.PixelData = volume[order].tobytes()
  [path] = write(tmp_path / 'd', [data], rng)
  [record] = readers.read(path, WHOLE)
  twin = as_nifti(tmp_path / 'a.nii', volume, axes, step, origin=(0, 0, 0))
  assert np.array_equal(record['image'], twin['image'])
  np.testing.assert_allclose(record['meta']['direction'], twin['meta']['direction'], atol=1e-5)
  np.testing.assert_allclose(record['spacing'], twin['spacing'], rtol=1e-5)
  both = np.concatenate([volume, phantom(rng)])
  [path] = write(tmp_path / 'b', [enhanced(both, axes, step, values=[0] * 5 + [800] * 5)], rng)
  found = list(readers.read(path, WHOLE))
  assert [r['part'] for r in found] == ['v00', 'v01']
  assert np.array_equal(found[0]['image'], twin['image'])
  parts = [r['part'] for r in readers.read(path)]
  assert parts[0] == 'v00z000'
  assert len(parts) == len(set(parts))


def test_cine_is_a_clip(tmp_path, rng):
  frames = rng.integers(0, 256, (4, 6, 7, 3)).astype(np.uint8)
  data = image(frames, sop_class=US, samples=3, FrameTime=40.0)
  region = pydicom.Dataset()
  region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
  region.PhysicalDeltaX, region.PhysicalDeltaY = 0.02, 0.03
  data.SequenceOfUltrasoundRegions = pydicom.Sequence([region])
  [path] = write(tmp_path / 'd', [data], rng)
  [clip] = readers.read(path, WHOLE)
  assert np.array_equal(clip['image'], frames)
  assert clip['channels'] == ['R', 'G', 'B']
  assert clip['meta']['frame_seconds'] == pytest.approx(0.04)
  parts = list(readers.read(path))
  assert [p['part'] for p in parts] == ['t000', 't001', 't002', 't003']
  assert [p['meta']['frame_seconds'] for p in parts] == pytest.approx([0, 0.04, 0.08, 0.12])
  assert parts[1]['spacing'] == pytest.approx([0.3, 0.2])
  assert np.array_equal(parts[3]['image'], frames[3])
  data.PlanarConfiguration = 1
  data.PixelData = np.moveaxis(frames, 3, 1).tobytes()
  [path] = write(tmp_path / 'p', [data], rng)
  assert np.array_equal(next(readers.read(path, WHOLE))['image'], frames)


def test_bits_signs_overlays_and_inversion(tmp_path, rng):
  stored = rng.integers(0, 4096, (6, 7)).astype(np.uint16)
  def read(pixels, **tags):
    [path] = write(tmp_path / 'd', [image(pixels, sop_class=DX, **tags)], rng)
    [record] = readers.read(path)
    return record
  overlaid = stored | np.uint16(0x5000)
  assert np.array_equal(read(overlaid, BitsStored=12)['image'][..., 0], stored)
  high = (stored << 4 | 7).astype(np.uint16)
  assert np.array_equal(read(high, BitsStored=12, HighBit=15)['image'][..., 0], stored)
  signed = (stored.astype(np.int16) - 2048)
  masked = (signed.view(np.uint16) & 0x0FFF).view(np.int16)
  assert np.array_equal(read(masked, BitsStored=12)['image'][..., 0], signed)
  white = read(stored, BitsStored=12, PhotometricInterpretation='MONOCHROME1', WindowCenter=1000, WindowWidth=200)
  assert np.array_equal(white['image'][..., 0], 4095 - stored)
  assert white['meta']['window'] == [3096.0, 200.0]
  scaled = read(stored, BitsStored=12, PhotometricInterpretation='MONOCHROME1', RescaleSlope=2, RescaleIntercept=-10)
  assert np.array_equal(scaled['image'][..., 0], 8180 - stored * 2)  # -10 + 8180 - (2 x - 10)
  assert scaled['image'].dtype == np.int16
  spaced = read(stored, BitsStored=12, ImagerPixelSpacing=[0.1, 0.2])
  assert spaced['spacing'] == [0.1, 0.2]


@pytest.mark.parametrize('syntax, codec', [
  (pydicom.uid.JPEGLosslessSV1, 'ljpeg_encode'), (pydicom.uid.JPEGLSLossless, 'jpegls_encode')])
@pytest.mark.parametrize('bits, signed', [(8, 0), (12, 0), (12, 1), (16, 0), (16, 1)])
def test_lossless_jpeg_is_what_was_coded_and_what_gdcm_reads(tmp_path, rng, syntax, codec, bits, signed):
  stored = rng.integers(-(1 << bits - 1), 1 << bits - 1, (3, 16, 20)) + (0 if signed else 1 << bits - 1)
  pixels = stored.astype(f'{"i" if signed else "u"}{1 if bits == 8 else 2}')
  coded = [getattr(imagecodecs, codec)((f.astype(int) & (1 << bits) - 1).astype(f'u{pixels.itemsize}'),
                                       **({'bitspersample': bits} if codec[0] == 'l' else {})) for f in pixels]
  data = image(pixels, sop_class=US, BitsStored=bits)
  data.PixelData = pydicom.encaps.encapsulate(coded)
  data['PixelData'].is_undefined_length = True
  data.file_meta.TransferSyntaxUID = syntax
  [path] = write(tmp_path / 'd', [data], rng)
  found = next(readers.read(path, WHOLE))['image'][..., 0]
  assert np.array_equal(found, pixels)
  if not (codec[0] == 'j' and bits == 12):  # imagecodecs codes 12 bits as 16: GDCM takes the sign from there
    assert np.array_equal(pydicom.dcmread(path).pixel_array, pixels)


@pytest.mark.parametrize('syntax, codec', [
  (pydicom.uid.HTJ2KLossless, 'htj2k_encode'), (pydicom.uid.JPEG2000Lossless, 'jpeg2k_encode')])
def test_jpeg_2000_is_what_was_coded(tmp_path, rng, syntax, codec):
  pixels = rng.integers(0, 4096, (16, 20)).astype(np.uint16)
  data = image(pixels, sop_class=DX)
  how = {'reversible': True} | ({'codecformat': 'j2k'} if codec == 'jpeg2k_encode' else {})
  data.PixelData = pydicom.encaps.encapsulate([getattr(imagecodecs, codec)(pixels, **how)])
  data['PixelData'].is_undefined_length = True
  data.file_meta.TransferSyntaxUID = syntax
  [path] = write(tmp_path / 'd', [data], rng)
  assert np.array_equal(next(readers.read(path))['image'][..., 0], pixels)


def test_modality_lut_and_missing_positions(tmp_path, rng):
  stored = rng.integers(0, 4, (6, 7)).astype(np.uint8)
  data = image(stored, sop_class=DX)
  lut = pydicom.Dataset()
  lut.LUTDescriptor, lut.ModalityLUTType = [4, 0, 16], 'US'
  lut.add_new('LUTData', 'US', [5, 500, 50, 60000])
  data.ModalityLUTSequence = pydicom.Sequence([lut])
  [path] = write(tmp_path / 'a', [data], rng)
  [record] = readers.read(path)
  assert np.array_equal(record['image'][..., 0], np.array([5, 500, 50, 60000])[stored])
  volume = phantom(rng)
  slices = [image(v, name=str(k), InstanceNumber=k, PixelSpacing=[1, 2], SliceThickness=4) for k, v in enumerate(volume)]
  [[record]] = volumes(write(tmp_path / 'b', slices, rng))
  assert np.array_equal(record['image'][..., 0], volume)
  assert record['meta']['notes'] == 'no positions: ordered by instance number'
  assert record['meta']['orientation'] == 'native'
  assert record['spacing'] == [4.0, 1.0, 2.0]


@pytest.mark.parametrize('path', FILES, ids=[p.stem for p in FILES])
def test_pydicoms_own_files(path):
  """Each equals pydicom's pixels, or is rejected with one line, and says nothing of the patient."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    data = pydicom.dcmread(path, force=True)
    try:
      records = list(readers.read(path, WHOLE))
    except Exception as e:
      assert str(e).strip()
      unread = ('MR_truncated', 'JPEG2000-embedded-sequence-delimiter')  # pydicom cannot read them either
      assert 'PixelData' not in data or data.get('Modality') in ('SEG', 'RTDOSE') or path.stem in unread or (
        'SOPClassUID' not in data)
      return
    [record] = records
    if path.stem in ('JPEG-lossy', 'JPGExtended'):  # pydicom has no decoder of 12-bit JPEG
      assert record['image'].shape == (1024, 256, 1)
      assert (record['image'].min(), record['image'].max()) == (0, 264)
      return
    expected = data.pixel_array
    expected = apply_color_lut(expected, data) if data.PhotometricInterpretation == 'PALETTE COLOR' else expected
    expected = apply_rescale(expected, data) if data.get('RescaleSlope') is not None else expected
  assert np.array_equal(record['image'].squeeze(), expected.squeeze())
  assert set(record['meta']) <= set(readers.META)
  told = repr({k: v for k, v in record.items() if k != 'image'})
  for tag in ('PatientName', 'PatientID', 'PatientBirthDate', 'InstitutionName', 'AccessionNumber', 'StudyDate'):
    value = str(data.get(tag) or '')
    assert len(value) < 4 or value not in told


def test_an_unreadable_slice_is_named_by_its_number(tmp_path, rng):
  paths = write(tmp_path / 'd', series(phantom(rng), AXES['axial'], [0, 0, 2.0]), rng)
  [group] = groups(paths)
  group.files[3].write_bytes(group.files[3].read_bytes()[:-20])
  [cut] = groups(paths)  # the headers are whole
  assert cut.name == group.name
  with pytest.raises(ValueError, match='slice 4 of 5: The number of bytes of pixel data is less than expected'):
    list(readers.read_group(cut))


def test_no_patient_data_in_records(tmp_path, rng):
  slices = series(phantom(rng), AXES['axial'], [0, 0, 2.0])
  for data in slices:
    data.add_new(0x00090010, 'LO', 'SECRET')
    data.add_new(0x00091001, 'LO', 'SECRET-VALUE')
  for group in groups(write(tmp_path / 'd', slices, rng), salt='x'):
    for record in readers.read_group(group, readers.Options(salt='x')):
      told = repr(record['meta'] | {k: v for k, v in record.items() if k != 'image'} | dataclasses.asdict(group))
      for value in (*PATIENT.values(), 'SECRET', 'Jane', slices[0].StudyInstanceUID):
        assert value not in told
      assert set(record['meta']) <= set(readers.META)


def test_one_series_of_two_orientations_and_a_localizer(tmp_path, rng):
  both = {name: phantom(rng) for name in ('axial', 'sagittal')}
  slices = [d for name, v in both.items() for d in series(v, AXES[name], normal(AXES[name]) * 2.0)]
  slices.append(series(phantom(rng), AXES['coronal'], [0, 1, 0])[0])
  for k, data in enumerate(slices):
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f'1.2.{k + 1}'
  found = volumes(write(tmp_path / 'd', slices, rng))
  shapes = sorted(r['image'].shape for [r] in found)
  assert shapes == [(5, 6, 7, 1), (6, 7, 1), (6, 7, 5, 1)]
  single = next(r for [r] in found if r['image'].ndim == 3)
  assert single['meta']['orientation'] == 'native'
  assert single['meta']['direction'] == [-1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, -1.0, 0.0]  # a column each: x, y, normal
  assert single['meta']['origin'] == [30.0, -12.0, 77.0]


def test_files_of_one_image_each(tmp_path, rng):
  views = [image(rng.integers(0, 4096, (6, 7)).astype(np.uint16), sop_class=DX, name=n, PatientID='') for n in 'ab']
  paths = write(tmp_path / 'd', views, rng) + write(tmp_path / 'again', views[:1], rng)
  found = groups(paths)
  assert len(found) == len({g.name for g in found}) == 2
  assert len({g.subject for g in found}) == 1  # of the study, where there is no patient
  assert sorted(g.notes for g in found) == [(), ('1 duplicate files dropped',)]
  views[0].PixelData = bytes(84)
  _, rejects = readers.groups('dicom', paths + write(tmp_path / 'other', views[:1], rng), tmp_path)
  assert [r for _, r in rejects] == ['has the SOPInstanceUID of another file and other pixels']


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
  for package, extra, suffix in (('pydicom', 'medical', 'dcm'), ('SimpleITK', 'medical', 'mha'), ('av', 'video', 'mp4'),
                                 ('h5py', 'medical', 'h5')):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f'a.{suffix}'
    path.write_bytes(b'\x89HDF\r\n\x1a\n' if suffix == 'h5' else bytes(200))
    with pytest.raises(UserError, match=rf"pip install 'jaxmed\[{extra}\]'"):
      list(readers.read(path))


def test_known_by_header(tmp_path, rng):
  [path, *_] = write(tmp_path / 'd', series(phantom(rng), AXES['axial'], [0, 0, 2.0]), rng)
  assert readers.known(path)
  assert readers.kind(path) == 'dicom'
  path = path.rename(path.with_name('picture.png'))
  assert readers.kind(path) == 'dicom'
  assert not readers.known(path.rename(path.with_name('DICOMDIR')))
  (tmp_path / 'notes.txt').write_text('x' * 200)
  assert not readers.known(tmp_path / 'notes.txt')
  with pytest.raises(ValueError, match='no image: RT Plan'):
    list(readers.read(next(p for p in FILES if p.stem == 'rtplan')))


@pytest.mark.parametrize('name', AXES)
def test_series_are_as_itk_reads_them(tmp_path, rng, name):
  """GDCM's and ITK's reader of series, an independent one, written as NIfTI by ITK."""
  import SimpleITK as sitk

  step = normal(AXES[name]) * -2.5
  paths = write(tmp_path / 'd', series(phantom(rng), AXES[name], step, RescaleSlope=1, RescaleIntercept=-1024), rng)
  names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / 'd'))
  sitk.WriteImage(sitk.ReadImage(names), str(tmp_path / 'a.nii.gz'))
  [twin] = readers.read(tmp_path / 'a.nii.gz', WHOLE)
  [[record]] = volumes(paths)
  assert np.array_equal(record['image'], twin['image'])
  np.testing.assert_allclose(record['spacing'], twin['spacing'], rtol=1e-5)
  np.testing.assert_allclose(record['meta']['direction'], twin['meta']['direction'], atol=1e-5)
  np.testing.assert_allclose(record['meta']['origin'], twin['meta']['origin'], atol=1e-3)


@pytest.mark.parametrize('missing, slope, intercept', [('RescaleSlope', 1, -1024), ('RescaleIntercept', 2, 0)])
@pytest.mark.parametrize('empty', [False, True])
def test_half_a_rescale_is_a_rescale(tmp_path, rng, missing, slope, intercept, empty):
  stored = rng.integers(0, 2000, (3, 6, 7)).astype(np.uint16)
  slices = series(stored, AXES['axial'], [0, 0, 1.0], BitsStored=12, RescaleSlope=slope, RescaleIntercept=intercept)
  for data in slices:
    if empty:
      data[missing].value = None
    else:
      del data[missing]
  [[record]] = volumes(write(tmp_path / 'd', slices, rng))
  assert np.array_equal(record['image'][..., 0], stored[:, ::-1, ::-1].astype(int) * slope + intercept)
  assert record['image'].dtype == np.int16
  assert record['meta']['intensity'] == 'hu'
  assert record['meta']['notes'] == f'{missing} is missing: {int(missing == "RescaleSlope")} was taken'


@pytest.mark.parametrize('syntax', ['ImplicitVRLittleEndian', 'ExplicitVRLittleEndian', 'ExplicitVRBigEndian'])
def test_files_without_preamble_are_known_by_their_first_bytes(tmp_path, rng, syntax):
  stored = rng.integers(0, 4096, (6, 7)).astype(np.uint16)
  data = image(stored, sop_class=DX)
  uid = data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
  if not uid.is_little_endian:
    data.PixelData = stored.astype('>u2').tobytes()
  pydicom.dcmwrite(tmp_path / 'whole', data, enforce_file_format=True)
  content = (tmp_path / 'whole').read_bytes()
  length = int.from_bytes(content[140:144], 'little')
  (tmp_path / 'IM0').write_bytes(content[132:])
  (tmp_path / 'IM1').write_bytes(content[144 + length:])  # no group 2 either
  for name in ('IM0', 'IM1'):
    assert readers.known(tmp_path / name)
    assert readers.kind(tmp_path / name) == 'dicom'
    [record] = readers.read(tmp_path / name)
    assert np.array_equal(record['image'][..., 0], stored)


@pytest.mark.parametrize('head', [b'\x02\0' + bytes(130), b'\x08\0\0\0' * 33, b'\x08\0\x05\0CS\n\0short', b'\0\x08\0\x05',
                                  b'\x02\0\x01\0\xff\xff\xff\xff' + bytes(100)])
def test_other_files_are_not_taken_for_dicom(tmp_path, head):
  (tmp_path / 'x').write_bytes(head)
  assert not readers.known(tmp_path / 'x')


def test_slices_that_differ_within_the_tolerances_are_one_volume(tmp_path, rng):
  volume = phantom(rng, (6, 6, 7))
  spaced = series(volume, AXES['axial'], [0, 0, 3.0])
  for k, data in enumerate(spaced):
    data.PixelSpacing = [0.7 + 0.0009 * (k % 2)] * 2
  drifting = series(volume, AXES['axial'], [0, 0, 3.0], series='t')
  for k, data in enumerate(drifting):
    angle = 0.0009 * k
    data.ImageOrientationPatient = [round(float(v), 9) for v in (np.cos(angle), np.sin(angle), 0, -np.sin(angle),
                                                                 np.cos(angle), 0)]
  for slices, note in ((spaced, None), (drifting, 'orientation of slices drifts by 0.0045')):
    for _ in range(2):
      [[record]] = volumes(write(tmp_path / 'd', slices, rng))
      assert np.array_equal(record['image'][..., 0], volume[:, ::-1, ::-1])
      assert record['spacing'][0] == pytest.approx(3.0)
      assert record['meta'].get('notes') == note
  for k, data in enumerate(spaced):
    data.PixelSpacing = [0.7 + 0.007 * (k % 2)] * 2
  found = groups(write(tmp_path / 'e', spaced, rng))
  assert len({g.name for g in found}) == 2
  assert all('differ by more than 0.5 % in spacing or 0.002 in direction' in g.notes[-1] for g in found)


def test_refusals_name_field_and_what_was_expected(tmp_path, rng):
  def refused(data, match):
    [path] = write(tmp_path / 'd', [data], rng)
    with pytest.raises(ValueError, match=match):
      list(readers.read(path, WHOLE))
  frames = rng.integers(0, 9, (10, 12, 14)).astype(np.uint8)
  data = image(frames, sop_class=US)
  data.NumberOfFrames = 8
  refused(data, 'NumberOfFrames is 8: the pixels are 10 frames of Rows 12, Columns 14')
  data.NumberOfFrames = 12
  refused(data, 'NumberOfFrames is 12: the pixels are 10 frames of Rows 12, Columns 14')
  for syntax, codec in ((pydicom.uid.JPEGLSLossless, 'jpegls_encode'), (pydicom.uid.JPEGBaseline8Bit, 'jpeg8_encode')):
    coded = image(frames, sop_class=US, NumberOfFrames=12)
    coded.PixelData = pydicom.encaps.encapsulate([getattr(imagecodecs, codec)(f) for f in frames])
    coded['PixelData'].is_undefined_length = True
    coded.file_meta.TransferSyntaxUID = syntax
    refused(coded, 'NumberOfFrames is 12: the pixels are .*frames')
  data.NumberOfFrames = 10
  data.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
  data.PixelData = pydicom.encaps.encapsulate([bytes(20)])
  data['PixelData'].is_undefined_length = True
  refused(data, r'TransferSyntaxUID is 1.2.840.10008.1.2.4.102 .MPEG-4 .*a video in DICOM is not read; expected')
  for name, value in (('PixelSpacing', b'0,7\\0,7 '), ('RescaleSlope', b'1,5 '), ('SliceThickness', b'2,5 ')):
    data = image(frames[0], RescaleIntercept=0)
    data[name] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(name), 'DS', len(value), value, 0, False, True)
    refused(data, f'{name} is .*{value.decode().strip()[:3]}.*: expected numbers with a decimal point')


def test_deflated_without_the_length_of_its_group(tmp_path):
  source = next(p for p in FILES if p.stem == 'image_dfl').read_bytes()
  [twin] = readers.read(next(p for p in FILES if p.stem == 'image_dfl'))
  assert source[132:138] == b'\x02\0\0\0UL'
  for name, data in (('a.dcm', source[:132] + source[144:]), ('b', source[132:])):
    (tmp_path / name).write_bytes(data)
    [record] = readers.read(tmp_path / name)
    assert np.array_equal(record['image'], twin['image'])
