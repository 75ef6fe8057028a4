"""Masks as DICOM segmentation objects, written and read by highdicom: a segment a class, on the frames of the image."""

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel import orientations

from jaxmed import files
from jaxmed.data.readers import Group, dicom
from jaxmed.errors import UserError, need
from jaxmed.version import __version__

EXTRA = 'dicomseg'
MOST = 65535  # segments of an object: their numbers are unsigned shorts from 1
LONGEST = 64  # characters of a label, value representation LO
SERIES_NUMBER = 1000  # of the segmentation, which has a series of its own
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


def check(values: Sequence[int]) -> None:
  """Raises a UserError where highdicom is missing, or there are more classes than an object has segments."""
  need('highdicom', EXTRA)
  count = sum(v != 0 for v in values)
  if count > MOST:
    raise UserError(f'--format dicomseg: {count} classes, and a DICOM segmentation has at most {MOST} segments: leave '
                    '--format out for NIfTI')


def write(path: pathlib.Path, mask: np.ndarray, group: Group, values: Sequence[int], names: Sequence[str],
          made: str) -> None:
  """Writes a mask [*size] as it was predicted for the record of a series, whole or not at all.

  Segments 1, 2 ... are the values but 0 in their order, labelled by `names`; the object refers to the instances and the
  frame of reference of the series and has its patient and study. Its identifiers follow from those and from `made`, a
  text that says how the mask was made.

  Raises:
    UserError: headers that lack what such an object must have.
  """
  highdicom, generate = need('highdicom', EXTRA), need('pydicom.uid', EXTRA).generate_uid
  headers, order, affine = dicom.frames_of(group)
  classes = [v for v in values if v]
  frames = np.zeros(mask.shape, np.uint16)
  for number, value in enumerate(classes, 1):
    frames[mask == value] = number
  frames = _turned(frames, affine)
  frames = frames[np.argsort(order)] if len(headers) == 1 and frames.ndim == 3 else frames
  seeds = [made, *(str(h.get('SOPInstanceUID')) for h in headers)]
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of names and numbers of the image that are not quite as the standard wants them
      found = highdicom.seg.Segmentation(
          source_images=headers, pixel_array=frames, segmentation_type='BINARY',
          segment_descriptions=_described(highdicom, classes, [n for v, n in zip(values, names) if v]),
          series_instance_uid=generate(entropy_srcs=[*seeds, 'series']), series_number=SERIES_NUMBER,
          sop_instance_uid=generate(entropy_srcs=[*seeds, 'instance']), instance_number=1, manufacturer='jaxmed',
          manufacturer_model_name='jaxmed predict', software_versions=__version__, device_serial_number='0')
      with files.writing(path) as part:
        found.save_as(part)
  except (AttributeError, ValueError, TypeError, KeyError) as e:
    line = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise UserError(f'{path.name}: no DICOM segmentation can refer to this series ({line}): leave --format out for '
                    'NIfTI') from e


def read(path: pathlib.Path, group: Group, values: Sequence[int]) -> np.ndarray:
  """What `write` wrote for the same series, [*size] of integers."""
  headers, order, affine = dicom.frames_of(group)
  found = need('highdicom', EXTRA).seg.segread(path)
  ask: dict[str, Any] = {'combine_segments': True, 'assert_missing_frames_are_empty': True,
                         'ignore_spatial_locations': True}
  if len(headers) == 1 and len(order) > 1:
    frames = found.get_pixels_by_source_frame(headers[0].SOPInstanceUID, [i + 1 for i in order], **ask)
  else:
    frames = found.get_pixels_by_source_instance([h.SOPInstanceUID for h in headers], **ask)
    frames = frames[0] if len(headers) == 1 else frames
  return np.array([0, *(v for v in values if v)])[_turned(frames, affine, back=True)]


def _turned(volume: np.ndarray, affine: np.ndarray | None, back: bool = False) -> np.ndarray:
  """A volume [z, y, x] in RAS as the frames [slices, rows, columns] that it was read from, or `back`; see to_ras."""
  if affine is None:
    return volume
  stored = orientations.io_orientation(affine)
  turn = orientations.ornt_transform(*((stored, _RAS) if back else (_RAS, stored)))
  return orientations.apply_orientation(volume.transpose(2, 1, 0), turn).transpose(2, 1, 0)


def _described(highdicom: Any, values: Sequence[int], names: Sequence[str]) -> list[Any]:
  codes = need('pydicom.sr.codedict', EXTRA).codes
  how = highdicom.AlgorithmIdentificationSequence(
      name='jaxmed', version=__version__, family=codes.DCM.ArtificialIntelligence)
  kind = lambda value, name: highdicom.sr.CodedConcept(str(value), '99JAXMED', name)  # no terminology knows the names
  return [highdicom.seg.SegmentDescription(
      segment_number=i, segment_label=name[:LONGEST], segmented_property_category=codes.SCT.Tissue,
      segmented_property_type=kind(value, name[:LONGEST]), algorithm_type='AUTOMATIC', algorithm_identification=how)
      for i, (value, name) in enumerate(zip(values, names, strict=True), 1)]
