"""Writes DICOM files for tests, by pydicom and from what the standard says."""

import pathlib

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT, MR, ENHANCED_MR, US, DX, SLIDE = (
  f'1.2.840.10008.5.1.4.1.1.{n}' for n in ('2', '4', '4.1', '3.1', '1.1', '77.1.6'))
PATIENT = {'PatientName': 'Doe^Jane', 'PatientID': 'MRN-0042', 'PatientBirthDate': '19700102',
           'InstitutionName': 'General Hospital', 'ReferringPhysicianName': 'House^Gregory'}


def uid(text: str) -> str:
  return generate_uid(entropy_srcs=[text])


def image(pixels: np.ndarray, sop_class: str = CT, series: str = 's', name: str = '0', **tags) -> Dataset:
  """A data set of pixels [H, W] or [T, H, W] (or with 3 samples last, given samples=3)."""
  data = Dataset()
  data.file_meta = FileMetaDataset()
  data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = sop_class
  data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = uid(f'{series}/{name}')
  data.StudyInstanceUID, data.SeriesInstanceUID = uid('study'), uid(series)
  data.Modality = {CT: 'CT', MR: 'MR', ENHANCED_MR: 'MR', US: 'US', DX: 'DX', SLIDE: 'SM'}[sop_class]
  samples = tags.pop('samples', 1)
  data.SamplesPerPixel, data.PhotometricInterpretation = samples, 'MONOCHROME2' if samples == 1 else 'RGB'
  if samples == 3:
    data.PlanarConfiguration = 0
  frames = pixels if pixels.ndim == 3 + (samples == 3) else pixels[None]
  data.Rows, data.Columns = frames.shape[1:3]
  if len(frames) > 1 or sop_class == ENHANCED_MR:
    data.NumberOfFrames = len(frames)
  data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
  data.PixelRepresentation = int(pixels.dtype.kind == 'i')
  for key, value in (PATIENT | tags).items():
    setattr(data, key, value)
  data.HighBit = tags.get('HighBit', data.BitsStored - 1)
  vr = 'OB' if data.BitsAllocated == 8 else 'OW'
  data.add_new(0x7FE00010, vr, pixels.astype(pixels.dtype.newbyteorder('<')).tobytes())
  return data


def series(volume: np.ndarray, axes, step, origin=(-30.0, 12.0, 77.0), spacing=(0.7, 0.9), **tags) -> list[Dataset]:
  """Slices of a volume [slices, rows, columns]: `axes` and `step` (mm) in LPS, spacing of rows and of columns."""
  found = []
  for k, plane in enumerate(volume):
    position = [float(v) for v in np.round(np.add(origin, k * np.asarray(step)), 6)]
    found.append(image(plane, name=str(k), **{
      'ImagePositionPatient': position, 'ImageOrientationPatient': [float(a) for a in np.round(axes, 9)],
      'PixelSpacing': list(spacing), 'InstanceNumber': k + 1} | tags))
  return found


def enhanced(volume: np.ndarray, axes, step, values=None, **tags) -> Dataset:
  """One multi-frame file; `values` gives a b-value for each frame, positions then repeat for each b-value."""
  data = image(volume, sop_class=ENHANCED_MR, **tags)
  shared, frames = Dataset(), []
  measures, orientation = Dataset(), Dataset()
  measures.PixelSpacing, measures.SliceThickness = [0.7, 0.9], 9.0
  orientation.ImageOrientationPatient = [float(a) for a in np.round(axes, 9)]
  shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
  seen: dict = {}
  for k in range(len(volume)):
    value = values[k] if values else 0
    at = seen[value] = seen.get(value, -1) + 1
    frame, place, transform, diffusion = Dataset(), Dataset(), Dataset(), Dataset()
    place.ImagePositionPatient = [float(v) for v in np.round(at * np.asarray(step), 6)]
    transform.RescaleSlope, transform.RescaleIntercept = 1.0, 0.0
    diffusion.DiffusionBValue = float(value)
    frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([place]), Sequence([transform])
    frame.MRDiffusionSequence = Sequence([diffusion])
    frames.append(frame)
  data.SharedFunctionalGroupsSequence = Sequence([shared])
  data.PerFrameFunctionalGroupsSequence = Sequence(frames)
  return data


def slide_level(matrix: np.ndarray, mpp: float, name: str, flavour: str = 'VOLUME', order=None, tile: int = 64) -> Dataset:
  """One level [H, W, 3] of a whole slide, padded to tiles; `order` permutes them (sparse: each says where it lies)."""
  height, width = matrix.shape[:2]
  padded = np.pad(matrix, [(0, -height % tile), (0, -width % tile), (0, 0)], mode='edge')
  places = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
  places = places if order is None else [places[i] for i in order]
  frames = np.stack([padded[y : y + tile, x : x + tile] for y, x in places])
  data = image(frames, sop_class=SLIDE, name=name, samples=3, ImageType=['ORIGINAL', 'PRIMARY', flavour, 'NONE'],
               NumberOfFrames=len(frames), TotalPixelMatrixRows=height, TotalPixelMatrixColumns=width,
               DimensionOrganizationType='TILED_FULL' if order is None else 'TILED_SPARSE')
  shared, measures = Dataset(), Dataset()
  measures.PixelSpacing = [mpp / 1e3, mpp / 1e3]
  shared.PixelMeasuresSequence = Sequence([measures])
  data.SharedFunctionalGroupsSequence = Sequence([shared])
  if order is not None:
    items = [Dataset() for _ in places]
    for item, (y, x) in zip(items, places):
      at = Dataset()
      at.RowPositionInTotalImagePixelMatrix, at.ColumnPositionInTotalImagePixelMatrix = y + 1, x + 1
      item.PlanePositionSlideSequence = Sequence([at])
    data.PerFrameFunctionalGroupsSequence = Sequence(items)
  return data


def write(folder: pathlib.Path, found: list[Dataset], rng: np.random.Generator, prefix: str = '') -> list[pathlib.Path]:
  """Writes files under names that say nothing of their order, without a suffix."""
  folder.mkdir(exist_ok=True)
  paths = []
  for data, number in zip(found, rng.permutation(len(found))):
    paths.append(folder / f'{prefix}{number:04d}')
    pydicom.dcmwrite(paths[-1], data, enforce_file_format=True)
  return paths
