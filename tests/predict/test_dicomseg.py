"""DICOM segmentations: voxels, segments, references and geometry, by pydicom and highdicom; and what is refused."""

import builtins

import numpy as np
import pytest

from jaxmed.data import readers
from jaxmed.errors import UserError
from jaxmed.predict import dicomseg, job
from tests.data.readers import dicoms
from tests.predict.test_job import ball, scan
from tests.segmenters import bright

AXES = {'axial': (1, 0, 0, 0, 1, 0), 'sagittal': (0, 1, 0, 0, 0, -1),
        'oblique': tuple(np.r_[np.cos(0.2), np.sin(0.2), 0, -np.sin(0.2), np.cos(0.2), 0])}
WHAT = {'FrameOfReferenceUID': dicoms.uid('frame'), 'StudyID': '1', 'StudyDate': '20200101', 'StudyTime': '101010',
        'AccessionNumber': '7', 'PatientSex': 'F', 'SeriesNumber': 4, 'SliceThickness': 2.5, 'PositionReferenceIndicator': ''}


def scanner(folder, axes, step=2.5, volume=None, **tags):
  """A series of the ball, in files whose order is drawn; its slices [slices, rows, columns] and their data sets."""
  volume = ball().transpose(2, 1, 0) if volume is None else volume
  along = step * np.cross(axes[:3], axes[3:])
  found = dicoms.series(volume, axes, along, **(WHAT | tags))
  dicoms.write(folder, found, np.random.default_rng(0))
  return volume, found


@pytest.mark.parametrize('name, step', [('axial', 2.5), ('axial', -2.5), ('sagittal', 2.5), ('oblique', -2.5)])
def test_a_series_gets_a_segmentation_on_its_own_frames(tmp_path, name, step):
  pytest.importorskip('highdicom', reason="needs highdicom: pip install 'jaxmed[dicomseg]'")
  import highdicom
  import pydicom
  volume, found = scanner(tmp_path / 'in', AXES[name], step)
  options = job.Options(format='dicomseg', volumes=str(tmp_path / 'v.csv'))
  assert job.predict(bright(), tmp_path / 'in', tmp_path / 'out', options)['written'] == 1
  [path] = (tmp_path / 'out').glob('*.dcm')
  data = pydicom.dcmread(path)
  assert data.SOPClassUID == '1.2.840.10008.5.1.4.1.1.66.4' and data.SegmentationType == 'BINARY' and data.Modality == 'SEG'
  [segment] = data.SegmentSequence
  assert (segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType) == (1, 'lamp', 'AUTOMATIC')
  assert data.FrameOfReferenceUID == WHAT['FrameOfReferenceUID'] and data.StudyInstanceUID == dicoms.uid('study')
  assert data.PatientID == 'MRN-0042' and data.SeriesInstanceUID != dicoms.uid('s')
  bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder='little')[:data.NumberOfFrames * volume[0].size]
  planes = bits.reshape(-1, *volume.shape[1:])  # by the standard alone: each frame names its instance and its place
  full = np.zeros(volume.shape, np.uint8)
  uids = [d.SOPInstanceUID for d in found]
  for plane, frame in zip(planes, data.PerFrameFunctionalGroupsSequence, strict=True):
    k = uids.index(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
    full[k] = plane
    np.testing.assert_allclose([float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient],
                               [float(v) for v in found[k].ImagePositionPatient], atol=1e-4)
  np.testing.assert_array_equal(full, volume > 100)
  seg = highdicom.seg.segread(path)
  again = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
  np.testing.assert_array_equal(again, volume > 100)
  kept = job.predict(bright(), tmp_path / 'in', tmp_path / 'out', options)
  rows = (tmp_path / 'v.csv').read_text().splitlines()
  assert kept['kept'] == 1 and int(rows[1].split(',')[3]) == (volume > 100).sum()
  with pytest.raises(UserError, match='masks of another format'):  # whose record knows of one
    job._claim(tmp_path / 'out', {'format': 'x'}, [], False)


def test_several_classes_none_and_frames_of_one_file(tmp_path):
  pytest.importorskip('highdicom', reason="needs highdicom: pip install 'jaxmed[dicomseg]'")
  rng = np.random.default_rng(0)
  volume = rng.integers(0, 200, (5, 6, 7)).astype(np.int16)
  scanner(tmp_path / 's', AXES['sagittal'], volume=volume)
  data = dicoms.enhanced(volume, AXES['oblique'], 3.0 * np.cross(AXES['oblique'][:3], AXES['oblique'][3:]), **WHAT)
  order, frames = rng.permutation(5), data.PerFrameFunctionalGroupsSequence  # frames of a file lie in any order
  data.PerFrameFunctionalGroupsSequence = type(frames)([frames[i] for i in order])
  data.PixelData = volume[order].tobytes()
  dicoms.write(tmp_path / 'e', [data], rng)
  for folder in ('s', 'e'):
    [group], _ = readers.dicom.groups(sorted((tmp_path / folder).iterdir()), tmp_path, readers.Options(volumes='whole'))
    [record] = readers.read_group(group, readers.Options(volumes='whole'))
    for mask in (rng.choice([0, 2, 9, 300], record['image'].shape[:-1]), np.zeros(record['image'].shape[:-1], int)):
      path = tmp_path / f'{folder}{mask.max()}.dcm'
      dicomseg.write(path, mask, group, (0, 2, 9, 300), ('background', 'a', 'b' * 80, 'c'), 'test')
      np.testing.assert_array_equal(dicomseg.read(path, group, (0, 2, 9, 300)), mask)


def test_what_is_refused(tmp_path, monkeypatch):
  ask = job.Options(format='dicomseg')
  with pytest.raises(UserError, match="unknown --format 'dicomsg': did you mean 'dicomseg'"):
    job.predict(bright(), tmp_path, tmp_path / 'out', job.Options(format='dicomsg'))
  known = builtins.__import__
  monkeypatch.setattr(dicomseg, 'need', lambda module, extra: None)
  scan(tmp_path / 'in' / 'a.nii.gz')
  with pytest.raises(UserError, match='--format dicomseg refers to a DICOM series, and a.nii.gz is none'):
    job.predict(bright(), tmp_path / 'in', tmp_path / 'out', ask)
  with pytest.raises(UserError, match='65536 classes, and a DICOM segmentation has at most 65535 segments'):
    dicomseg.check(range(65537))
  monkeypatch.undo()
  monkeypatch.setattr('importlib.import_module', lambda name, *rest: known('no_such_module_at_all'))
  with pytest.raises(UserError, match=r"highdicom is not installed: pip install 'jaxmed\[dicomseg\]'"):
    dicomseg.check((0, 1))
