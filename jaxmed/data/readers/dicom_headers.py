"""What a DICOM header says of a slice, and which slices make one volume."""

import dataclasses
import hashlib
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmed.data.readers.types import NO_IMAGE
from jaxmed.errors import need

EXTRA = 'medical'
# Objects with pixels that are no images: labels and doses.
_NO_IMAGES = {
  '1.2.840.10008.5.1.4.1.1.66.4': 'a segmentation', '1.2.840.10008.5.1.4.1.1.66.7': 'a segmentation',
  '1.2.840.10008.5.1.4.1.1.481.2': 'a dose',
  '1.2.840.10008.1.3.10': 'a list of files (DICOMDIR)',
}
# CT, MR and PET images of one slice a file (DICOM PS3.4, B.5): stacked even where they lack positions.
_SLICES = {'1.2.840.10008.5.1.4.1.1.2', '1.2.840.10008.5.1.4.1.1.4', '1.2.840.10008.5.1.4.1.1.128'}
# What is one in a volume, beside spacing and orientation.
_ALIKE = ('SOPClassUID', 'Modality', 'Rows', 'Columns', 'SamplesPerPixel', 'PhotometricInterpretation')
# What tells volumes of one series apart that lie at the same positions, the most telling first.
SPLITS = (
  'AcquisitionNumber', 'EchoNumbers', 'EchoTime', 'EffectiveEchoTime', 'DiffusionBValue',
  'DiffusionGradientOrientation', 'TemporalPositionIdentifier', 'TemporalPositionIndex', 'ImageType', 'FrameType',
  'InversionTime', 'FlipAngle', 'ConvolutionKernel', 'StackID', 'NominalCardiacTriggerDelayTime', 'TriggerTime',
  'AcquisitionDateTime', 'FrameAcquisitionDateTime', 'FrameReferenceDateTime', 'AcquisitionTime', 'ContentTime',
)
# Elements whose text becomes numbers here.
_NUMBERS = ('NumberOfFrames', 'InstanceNumber', 'PixelSpacing', 'ImagerPixelSpacing', 'NominalScannedPixelSpacing',
            'SliceThickness', 'SpacingBetweenSlices', 'ImagePositionPatient', 'ImageOrientationPatient', 'RescaleSlope',
            'RescaleIntercept', 'WindowCenter', 'WindowWidth', 'FrameTime', 'FrameTimeVector', 'CineRate',
            'RecommendedDisplayFrameRate')
_HEAD = 1 << 14  # bytes that the file meta information lies in
_LONG = {b'OB', b'OW', b'OF', b'OD', b'OL', b'OV', b'SQ', b'UN', b'UT', b'UC', b'UR', b'SV', b'UV'}  # length of 4 bytes
_MAX_INFLATED = 1 << 30  # bytes of a deflated file
_BOMB = 1 << 28, 500  # bytes from which on a file that inflates so many times is made for harm
_SAME = 0.01  # mm, or 1/20 of a pixel where that is less: positions that are closer are one
SAME_SPACING = 0.005  # share by which spacings in the plane may differ in one volume
SAME_AXES = 0.002  # direction cosines likewise: 0.1 degrees
_NEARLY = 10  # times these tolerances: what is further off was meant to be another volume
_TILT = 0.2  # degrees between the slices' normal and the line of their positions that go unmentioned
_GAP = 1.5  # times the median step: more is a gap


@dataclasses.dataclass(frozen=True)
class Slice:
  """One frame, as its header describes it. Lengths in mm, vectors in DICOM's LPS space."""

  path: pathlib.Path
  index: int  # of the frame in its file
  frames: int  # of the file
  series: str
  sop: str  # SOPInstanceUID
  patient: str
  shape: tuple  # what must be equal in a volume: the values of _ALIKE
  number: int | None
  spacing: tuple[float, float] | None  # between rows, between columns
  position: tuple[float, ...]  # of the centre of the first pixel; () where the header lacks this or the axes
  axes: tuple[float, ...]  # direction of a row, direction of a column; () likewise
  thickness: float | None
  splits: tuple[str, ...]
  matrix: int = 0  # pixels of the whole slide that the frames are tiles of


@dataclasses.dataclass(frozen=True)
class Stack:
  """Slices of one volume in order, with the key that separates it from others and its notes."""

  slices: tuple[Slice, ...]
  label: str
  notes: tuple[str, ...] = ()


def load(path: str | os.PathLike, pixels: bool = True) -> Any:
  """The data set of a file, with or without its pixels, its transfer syntax filled in where the file lacks it.

  Raises:
    ValueError: no DICOM; deflated from more than 1 GiB. pydicom raises its own errors for damaged files.
  """
  pydicom = need('pydicom', EXTRA)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of values that are not quite as the standard wants them
    _check_deflated(pydicom, path)
    data = pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)
  if 'SOPClassUID' not in data and 'Rows' not in data:
    raise ValueError('is not DICOM: it names no class of object')
  _check_numbers(data)
  if 'TransferSyntaxUID' not in data.file_meta:
    implicit, little = data.original_encoding
    uid = pydicom.uid
    data.file_meta.TransferSyntaxUID = (
      uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian)
  return data


def _check_deflated(pydicom, path: str | os.PathLike) -> None:
  """Refuses what would inflate to more than _MAX_INFLATED, or is a _BOMB, before pydicom inflates it."""
  with open(path, 'rb') as f:
    head = f.read(_HEAD)
    if pydicom.uid.DeflatedExplicitVRLittleEndian.encode() not in head:
      return
    f.seek(_end_of_meta(head))
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflate.eof and (chunk := inflate.unconsumed_tail or f.read(1 << 16)):
      size += len(inflate.decompress(chunk, 1 << 24))
      if size > _MAX_INFLATED:
        raise ValueError(f'inflates to more than {_MAX_INFLATED >> 30} GiB')
      if size > _BOMB[0] and size > _BOMB[1] * f.tell():
        raise ValueError(f'inflates to more than {_BOMB[0] >> 20} MiB and {_BOMB[1]} times its length')


def _end_of_meta(head: bytes) -> int:
  """Where the elements of group 2 end (explicit little-endian, DICOM PS3.10), whether or not their length is told."""
  at = 132 if head[128:132] == b'DICM' else 0
  while head[at : at + 2] == b'\x02\0' and at + 12 <= len(head):
    long = head[at + 4 : at + 6] in _LONG
    at += 12 + int.from_bytes(head[at + 8 : at + 12], 'little') if long else (
      8 + int.from_bytes(head[at + 6 : at + 8], 'little'))
  return at


def _check_numbers(data: Any) -> None:
  """Raises a ValueError that names an element of _NUMBERS whose text is no number, such as one with a decimal comma."""
  for name in _NUMBERS:
    try:
      value = data.get(name)
      several = hasattr(value, '__len__') and not isinstance(value, str)
      wrong = any(isinstance(v, str) and v.strip() for v in (value if several else [value]))
    except Exception:  # pydicom raises anything at all for values that it cannot convert
      wrong, value = True, getattr(data.get_item(name), 'value', b'')
    if wrong:
      text = value.decode('latin1').strip(' \0') if isinstance(value, bytes) else str(value)
      raise ValueError(f'{name} is {text}: expected numbers with a decimal point')


def hashed(salt: str, text: str) -> str:
  """16 hex digits of SHA-256 of salt and text."""
  return hashlib.sha256((salt + text).encode('utf-8', 'surrogateescape')).hexdigest()[:16]


def slices(path: pathlib.Path, data: Any) -> list[Slice]:
  """The frames of a file whose frames say where they lie; else one Slice for all frames.

  Raises:
    ValueError: the object holds no image, or one of a kind that is not read.
  """
  _check_kind(data)
  if 'PerFrameFunctionalGroupsSequence' not in data or 'TotalPixelMatrixColumns' in data:
    return [_slice(path, data, 0, frame_values(data, 0))]
  count = len(data.PerFrameFunctionalGroupsSequence)
  found = [_slice(path, data, i, frame_values(data, i)) for i in range(count)]
  if len(found) != frame_count(data):
    raise ValueError(f'describes {len(found)} frames and declares {frame_count(data)}')
  return found if all(s.axes for s in found) else found[:1]


def frame_values(data: Any, index: int) -> Callable[[str], Any]:
  """A function (frame, attribute) -> value: the frame's, else the shared one, else the file's."""
  if 'SharedFunctionalGroupsSequence' not in data and 'PerFrameFunctionalGroupsSequence' not in data:
    return data.get
  values = _flat(data.get('SharedFunctionalGroupsSequence') or [])
  values |= _flat((data.get('PerFrameFunctionalGroupsSequence') or [])[index : index + 1])
  return lambda name: values.get(name, data.get(name))


def frame_count(data: Any) -> int:
  return int(data.get('NumberOfFrames') or 1)


def _flat(items: Sequence[Any], depth: int = 0) -> dict[str, Any]:
  """{keyword: value} of functional groups: the first item of each sequence, and of those in it."""
  values: dict[str, Any] = {}
  if items:
    _check_numbers(items[0])
  for element in items[0] if items else ():
    if element.keyword and element.VR == 'SQ' and depth < 3:
      values |= {k: v for k, v in _flat(element.value or [], depth + 1).items() if k not in values}
    elif element.keyword:
      values[element.keyword] = element.value
  return values


def _check_kind(data: Any) -> None:
  sop_class = str(data.get('SOPClassUID') or '')
  if sop_class in _NO_IMAGES:
    raise ValueError(f'{NO_IMAGE}{_NO_IMAGES[sop_class]}')
  if 'Rows' not in data or 'Columns' not in data:
    raise ValueError(f'{NO_IMAGE}{getattr(data.get("SOPClassUID"), "name", "") or "an object of no known class"}')
  if 'TotalPixelMatrixColumns' in data and {'LABEL', 'OVERVIEW'} & set(data.get('ImageType') or ()):
    raise ValueError(f'{NO_IMAGE}the label of a slide')  # it may name the patient
  if 'MOSAIC' in (data.get('ImageType') or ()):
    raise ValueError('is a mosaic, a volume as tiles of one image: convert it to NIfTI or enhanced DICOM')


def _slice(path: pathlib.Path, data: Any, index: int, value: Callable[[str], Any]) -> Slice:
  position, axes = _numbers(value('ImagePositionPatient'), 3), _numbers(value('ImageOrientationPatient'), 6)
  if axes and np.linalg.norm(np.cross(axes[:3], axes[3:])) < 0.9:
    raise ValueError(f'ImageOrientationPatient {list(axes)} are not two unit vectors at right angles')
  spacing = pixel_spacing(data, value)

  def first(*names: str) -> str:
    return next((text for n in names if (text := str(data.get(n) or '').strip())), '')

  number = value('InstanceNumber') if frame_count(data) == 1 else index
  return Slice(
    path=path, index=index, frames=frame_count(data),
    series=first('SeriesInstanceUID', 'SOPInstanceUID') or _digest(path),
    sop=first('SOPInstanceUID') or _digest(path),
    patient=first('PatientID', 'StudyInstanceUID', 'SeriesInstanceUID') or _digest(path),
    shape=tuple(first(n) for n in _ALIKE),
    number=None if number is None else int(number), spacing=spacing,
    position=position if axes else (), axes=axes if position else (),
    thickness=_positive(value('SpacingBetweenSlices')) or _positive(value('SliceThickness')),
    splits=tuple('' if value(name) is None else str(value(name)) for name in SPLITS),
    matrix=int(data.get('TotalPixelMatrixRows') or 0) * int(data.get('TotalPixelMatrixColumns') or 0))


def pixel_spacing(data: Any, value: Callable[[str], Any]) -> tuple[float, float] | None:
  """Spacing (mm) between rows and between columns, or None: of the patient, else of the detector, else of an
  ultrasound region in cm, if there is one region alone (DICOM PS3.3 C.8.5.5)."""
  for name in ('PixelSpacing', 'ImagerPixelSpacing', 'NominalScannedPixelSpacing'):
    found = _numbers(value(name), 2)
    if found and min(found) > 0:
      return found[0], found[1]
  regions = data.get('SequenceOfUltrasoundRegions') or []
  if len(regions) == 1 and {regions[0].get(f'PhysicalUnits{a}Direction') for a in 'XY'} == {3}:  # 3: cm
    dx, dy = (abs(float(regions[0].get(f'PhysicalDelta{a}') or 0)) * 10 for a in 'XY')
    return (dy, dx) if dx and dy else None
  return None


def _numbers(value: Any, count: int) -> tuple[float, ...]:
  if value is None or isinstance(value, (str, bytes)) or not hasattr(value, '__len__') or len(value) != count:
    return ()
  numbers = tuple(float(v) for v in value)
  return numbers if np.isfinite(numbers).all() else ()


def _positive(value: Any) -> float | None:
  return float(value) if value is not None and value != '' and 0 < float(value) < float('inf') else None


def _digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def stacks(
    series: Sequence[Slice], digest: Callable[[Slice], str],
) -> tuple[list[Stack], list[tuple[list[Slice], str]]]:
  """The volumes of one series' frames, in an order independent of the order of the frames.

  Args:
    series: frames, each with a position and axes, or each with a number.
    digest: of a frame's pixels; called only for frames that share a position.

  Returns:
    Stacks, and (frames, reason) for those of which no volume can be made.
  """
  found, refused = [], []
  for key, alike, told in _alike(sorted(series, key=lambda s: (s.sop, s.index, s.number or 0))):
    alike, dropped = _drop_copies(alike, digest, same_sop=True)
    for label, part in _apart(alike, SPLITS):
      part, more = _drop_twins(part, digest)
      for rank, members in _by_rank(part):
        try:
          ordered, notes = _ordered(members)
        except ValueError as e:
          refused.append((list(members), str(e)))
          continue
        notes = ([f'{dropped + more} duplicate slices dropped'] if dropped + more else []) + notes
        notes += told + (['volumes told apart by instance number only'] if rank else [])
        found.append(Stack(tuple(ordered), f'{key}{label}{rank}', tuple(notes)))
  return found, refused


def _alike(series: Sequence[Slice]) -> list[tuple[str, list[Slice], list[str]]]:
  """(key, frames, notes) of frames of one shape, spacing and orientation.

  A frame is like another one whose spacing differs by less than SAME_SPACING and whose direction cosines differ by less
  than SAME_AXES, and like the frames that this one is like.
  """
  kind = lambda s: (s.shape, s.spacing or (), s.axes)
  bundles: list[list[tuple]] = []
  for one in dict.fromkeys(map(kind, series)):
    near = [b for b in bundles if any(_near(one, other) for other in b)]
    bundles = [b for b in bundles if not any(b is n for n in near)] + [[*(k for b in near for k in b), one]]
  found, keys = [], set()
  for members in ([s for s in series if kind(s) in set(b)] for b in bundles):
    first = members[0]
    shape = (*first.shape, first.spacing and tuple(float(f'{v:.4g}') for v in first.spacing))
    key = f'{shape}{[round(a, 2) + 0.0 for a in first.axes]}'
    while key in keys:
      key += "'"
    keys.add(key)
    found.append((key, members, _spread(members) + _parted(first, [b[0] for b in bundles])))
  return sorted(found, key=lambda bundle: bundle[0])


def _near(one: tuple, other: tuple, times: float = 1.0) -> bool:
  """Whether (shape, spacing, axes) of two frames are those of one volume; `times` widens the tolerances."""
  if one[0] != other[0] or len(one[1]) != len(other[1]) or len(one[2]) != len(other[2]):
    return False
  return all(abs(a - b) <= times * SAME_SPACING * max(a, b) for a, b in zip(one[1], other[1])) and all(
    abs(a - b) <= times * SAME_AXES for a, b in zip(one[2], other[2]))


def _spread(members: Sequence[Slice]) -> list[str]:
  """Notes on frames that differ by more than the tolerances and are alike only by what lies between them."""
  notes = []
  spacing = np.array([s.spacing or (1.0, 1.0) for s in members])
  if (np.ptp(spacing, axis=0) > SAME_SPACING * spacing.max(axis=0)).any():
    notes.append(f'spacing of slices drifts from {spacing.min():.6g} to {spacing.max():.6g} mm')
  drift = float(np.ptp(np.array([s.axes for s in members]), axis=0).max(initial=0))
  return [*notes, f'orientation of slices drifts by {drift:.4f}'] if drift > SAME_AXES else notes


def _parted(first: Slice, bundles: Sequence[tuple]) -> list[str]:
  """A note on frames of the series that nearly belong to this volume."""
  own = first.shape, first.spacing or (), first.axes
  if not any(_near(own, b, _NEARLY) and not _near(own, b) for b in bundles):
    return []
  return [f'other slices of its series differ by more than {100 * SAME_SPACING:g} % in spacing or {SAME_AXES:g} in '
          'direction: they are another volume']


def _drop_copies(members: list[Slice], digest, same_sop: bool) -> tuple[list[Slice], int]:
  """Leaves out frames whose position and pixels are another's (and whose SOPInstanceUID is, too)."""
  kept: list[Slice] = []
  for group in _by_position(members):
    seen = set()
    for s in group:
      rivals = [r for r in group if r is not s and (r.sop == s.sop or not same_sop)]
      mark = (s.sop if same_sop else '', digest(s) if rivals else id(s))
      if mark not in seen:
        seen.add(mark)
        kept.append(s)
  return kept, len(members) - len(kept)


def _drop_twins(members: list[Slice], digest) -> tuple[list[Slice], int]:
  """Leaves out frames whose position and pixels are another's, unless they are only part of volumes that repeat all
  positions as often: those differ somewhere, and are empty alike elsewhere."""
  kept, dropped = _drop_copies(members, digest, same_sop=False)
  before, after = ({len(g) for g in _by_position(m)} for m in (members, kept))
  return (members, 0) if len(before) == 1 and after != {1} else (kept, dropped)


def heights(members: Sequence[Slice]) -> np.ndarray:
  """Where frames of one orientation lie along their normal, mm; their numbers where they have no position."""
  if not members[0].axes:
    return np.array([float(s.number or 0) for s in members])
  return np.array([s.position for s in members]) @ normal(members[0])


def normal(s: Slice) -> np.ndarray:
  """The unit vector at right angles to a frame (LPS)."""
  across = np.cross(s.axes[:3], s.axes[3:])
  return across / np.linalg.norm(across)


def _by_position(members: Sequence[Slice]) -> list[list[Slice]]:
  """Frames by where they lie along the normal, in that order."""
  same = min(_SAME, 0.05 * min(members[0].spacing or (1.0,)))
  at = heights(members)
  groups: list[list[Slice]] = []
  last = -np.inf
  for i in np.argsort(at, kind='stable'):
    if at[i] - last > same:
      groups.append([])
    groups[-1].append(members[i])
    last = at[i]
  return groups


def _apart(members: list[Slice], names: Sequence[str]) -> list[tuple[str, list[Slice]]]:
  """Splits frames that share positions by the first attributes that tell them apart."""
  most = max(len(g) for g in _by_position(members))
  for i, name in enumerate(names):
    column = SPLITS.index(name)
    values = sorted({s.splits[column] for s in members}, key=_natural)
    if most > 1 and 1 < len(values) <= most:
      return [(f'{name}={value};{label}', part) for value in values
              for label, part in _apart([s for s in members if s.splits[column] == value], names[i + 1:])]
  return [('', members)]


def _natural(text: str) -> tuple:
  try:
    return (0, float(text), text)
  except ValueError:
    return (1, 0.0, text)


def _by_rank(members: list[Slice]) -> list[tuple[str, list[Slice]]]:
  """Where every position has k frames that nothing else tells apart: k volumes, by their instance numbers."""
  groups = _by_position(members)
  counts = {len(g) for g in groups}
  numbers = [s.number for s in members]
  if counts == {1} or len(counts) > 1 or None in numbers or len(set(numbers)) < len(numbers):
    return [('', members)]
  ranked = [sorted(g, key=lambda s: s.number or 0) for g in groups]
  return [(f'rank={k}', [g[k] for g in ranked]) for k in range(counts.pop())]


def _ordered(members: Sequence[Slice]) -> tuple[list[Slice], list[str]]:
  """Frames in order of position, and notes on gaps and tilt.

  Raises:
    ValueError: several frames at one position, or positions that do not lie on a line.
  """
  groups = _by_position(members)
  repeated = sum(len(g) > 1 for g in groups)
  if repeated:
    raise ValueError(f'{repeated} of {len(groups)} positions hold several slices with different pixels, and nothing '
                     'in their headers tells them apart')
  ordered = [g[0] for g in groups]
  if not ordered[0].axes:
    return ordered, ['no positions: ordered by instance number'] if len(ordered) > 1 else []
  notes = _gaps(np.diff(heights(ordered)))
  tilt = _tilt(ordered)
  if tilt > _TILT:
    notes.append(f'tilted gantry: {tilt:.1f} degrees between the normal and the line of positions')
  return ordered, notes


def _gaps(steps: np.ndarray) -> list[str]:
  if len(steps) < 2:
    return []
  middle = float(np.median(steps))
  gaps = steps[steps > _GAP * middle]
  if len(gaps):
    return [f'{int(np.round(gaps / middle).sum()) - len(gaps)} slices missing in {len(gaps)} gaps '
            f'(step {middle:.3f} mm, largest {steps.max():.3f} mm)']
  if steps.max() - steps.min() > 0.02 * middle:
    return [f'uneven steps: {steps.min():.3f} to {steps.max():.3f} mm']
  return []


def _tilt(ordered: Sequence[Slice]) -> float:
  """Degrees between the slices' normal and the line of their positions.

  Raises:
    ValueError: the positions do not lie on a line.
  """
  if len(ordered) == 1:
    return 0.0
  positions = np.array([s.position for s in ordered])
  offsets, up = positions - positions[0], normal(ordered[0])
  line = offsets[-1]
  off = float(np.linalg.norm(offsets - (offsets @ up / (line @ up))[:, None] * line, axis=1).max())
  if off > max(ordered[0].spacing or (1.0,)):
    raise ValueError(f'the positions of {len(ordered)} slices lie up to {off:.1f} mm off a line')
  return float(np.degrees(np.arccos(np.clip(line @ up / np.linalg.norm(line), -1, 1))))


def step(ordered: Sequence[Slice]) -> np.ndarray:
  """The vector (mm, LPS) from one slice to the next: the line of positions, the median step long."""
  at = heights(ordered)
  line = np.array(ordered[-1].position) - np.array(ordered[0].position)
  return line / (at[-1] - at[0]) * float(np.median(np.diff(at)))


def stackable(s: Slice) -> bool:
  """Whether a file is one slice of a volume: it says where it lies, or is a CT, MR or PET image with a number."""
  return s.frames == 1 and not s.matrix and (bool(s.axes) or (s.shape[0] in _SLICES and s.number is not None))
