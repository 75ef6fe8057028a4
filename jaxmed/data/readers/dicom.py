"""DICOM by pydicom: series become volumes in RAS, frames of one file a clip, slides tiles, all else single images.

Nothing that names a patient leaves this module: a record holds pixels, geometry and what readers.META lists;
identifiers of patients and institutions leave as salted hashes.
"""

import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxmed.data.readers.dicom_headers import (
  Slice,
  Stack,
  frame_count,
  frame_values,
  hashed,
  load,
  normal,
  slices,
  stackable,
  stacks,
  step,
)
from jaxmed.data.readers.dicom_pixels import Pixels, decode, transform
from jaxmed.data.readers.dicom_slide import open_slide
from jaxmed.data.readers.geometry import from_lps, place, to_ras
from jaxmed.data.readers.slide import tiles
from jaxmed.data.readers.types import DEFAULT, Group, Options, Record, check_size, numbered, stand_in, whole
from jaxmed.errors import UserError


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the records of one file, as `read_group` does.

  Raises:
    ValueError: the file is damaged or holds no image.
  """
  found, rejects = groups([pathlib.Path(path)], pathlib.Path(path).parent, options)
  if rejects:
    raise ValueError(rejects[0][1])
  for group in found:
    yield from read_group(group, options)


def groups(
    paths: Iterable[pathlib.Path], root: str | os.PathLike, options: Options = DEFAULT,
) -> tuple[list[Group], list[tuple[pathlib.Path, str]]]:
  """Sorts files into volumes by SeriesInstanceUID, and by what cannot be one volume.

  That is: another shape, orientation or spacing, and, where slices share a position, what tells them apart
  (acquisition, echo, b-value, time ...). Slices are ordered by the projection of their position on their normal; where
  they have no position, by instance number, which is noted. Pixels are read only of slices that share a position.

  Raises:
    UserError: pydicom is not installed.
  """
  del root
  frames: list[Slice] = []
  rejects: list[tuple[pathlib.Path, str]] = []
  for path in paths:
    try:
      frames += slices(path, load(path, pixels=False))[:1]
    except UserError:
      raise
    except Exception as e:  # pydicom raises anything at all for damaged files
      rejects.append((path, _line(e)))
  found = []
  by_series = lambda s: (s.series, s.patient)
  for _, series in itertools.groupby(sorted(frames, key=by_series), key=by_series):
    volumes, refused = _series(list(series))
    found += [_group(v, options) for v in volumes]
    rejects += [(s.path, reason) for members, reason in refused for s in members]
  return found, rejects


def _series(members: list[Slice]) -> tuple[list[Stack], list[tuple[list[Slice], str]]]:
  """One Stack for each volume of stackable frames, and one for each other file."""
  digest = functools.cache(_file_digest)
  found, refused = stacks([s for s in members if stackable(s)], digest)
  levels = sorted((s for s in members if s.matrix), key=lambda s: (-s.matrix, s.sop))
  if levels:
    kept = list({s.sop: s for s in levels[::-1]}.values())[::-1]
    dropped = len(levels) - len(kept)
    found.append(Stack(tuple(kept), 'slide', (f'{dropped} duplicate files dropped',) if dropped else ()))
  alone = sorted((s for s in members if not stackable(s) and not s.matrix), key=lambda s: s.sop)
  for sop, copies in itertools.groupby(alone, key=lambda s: s.sop):
    first, *others = copies
    differ = [s for s in others if digest(s) != digest(first)]
    dropped = len(others) - len(differ)
    found.append(Stack((first,), sop, (f'{dropped} duplicate files dropped',) if dropped else ()))
    if differ:
      refused.append((differ, 'has the SOPInstanceUID of another file and other pixels'))
  return found, refused


def _group(stack: Stack, options: Options) -> Group:
  first = stack.slices[0]
  digest = hashlib.sha256(f'{options.salt}{first.series}{stack.label}'.encode('utf-8', 'surrogateescape'))
  return Group(tuple(s.path for s in stack.slices), digest.hexdigest()[:16], hashed(options.salt, first.patient),
               stack.notes)


def read_group(group: Group, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the images of a group.

  Several slices, and frames that say where they lie, are a volume [D, H, W, C] turned to RAS; other frames are a clip
  [T, H, W, C] as it is (or its frames, parts 't000' ...); a single slice or image is [H, W, C] as it is. A whole slide
  is cut into tiles, see jaxmed.data.readers.slide.

  Raises:
    ValueError: damaged; pydicom raises its own errors. UserError: a decoder is not installed.
  """
  record: Record = {'subject': group.subject, 'source': 'dicom', 'part': '', 'spacing': None}
  notes = list(group.notes)
  data = load(group.files[0])
  if 'TotalPixelMatrixColumns' in data:
    levels = [data, *(load(f) for f in group.files[1:])]
    yield from tiles(open_slide(levels, _meta(data, notes, options)), record, options)
    return
  if len(group.files) == 1:
    frames = slices(group.files[0], data)
    if len(frames) > 1:
      yield from _enhanced(data, frames, record, notes, options)
    elif frame_count(data) > 1:
      yield from _clip(data, record, notes, options)
    else:
      yield _single(data, frames[0], record, notes, options)
    return
  check_size((len(group.files), int(data.Rows), int(data.Columns)), np.dtype(np.int16))
  ordered, parts = zip(*(_read_slice(group.files, i) for i in range(len(group.files))))
  yield _volume(data, ordered, parts, record, notes, options)


def frames_of(group: Group) -> tuple[list[Any], list[int], np.ndarray | None]:
  """How the one volume or image of a group lies in its files: what turns a mask of the record back into frames.

  Returns:
    The headers of the files, in the order of the slices; the stored number of each slice within its file; the affine
    [4, 4] (column, row, slice) -> RAS (mm) of a volume that `read_group` turned to RAS, else None.
  """
  data = [load(f, pixels=False) for f in group.files]
  found: Sequence[Slice] = [slices(f, d)[0] for f, d in zip(group.files, data)]
  if len(data) == 1 and len(several := slices(group.files[0], data[0])) > 1:
    found = _frames_apart(lambda: load(group.files[0]), several)[0].slices
  turned = len(found) > 1 and bool(found[0].axes)
  return data, [s.index for s in found], _affine(found[0], step(found)) if turned else None


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  found, rejects = groups([pathlib.Path(path)], pathlib.Path(path).parent, options)
  if rejects:
    raise ValueError(rejects[0][1])
  for group in found:
    yield from outline_group(group, options)


def outline_group(group: Group, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline. Of slides the coarsest level is read, which tells where tissue is."""
  data = load(group.files[0], pixels=False)
  record: Record = {'channels': numbered(1), 'spacing': None, 'part': ''}
  frames = slices(group.files[0], data)
  if 'TotalPixelMatrixColumns' in data:
    levels = [load(f, pixels=f == group.files[-1]) for f in group.files]
    yield from tiles(open_slide(levels, {}), record, options, pixels=False)
  elif len(group.files) > 1:
    # The median step needs all headers; without a spacing to bring the volume to, the ends tell enough.
    others = group.files[1:] if options.spacing else group.files[-1:]
    yield _outlined(data, [frames[0], *(slices(f, load(f, pixels=False))[0] for f in others)], len(group.files), record)
  elif len(frames) > 1:
    for stack in _frames_apart(lambda: load(group.files[0]), frames):
      yield _outlined(data, stack.slices, len(stack.slices), record)
  else:
    count, shape = frame_count(data), (int(data.Rows), int(data.Columns), 1)
    if options.volumes == 'whole' and count > 1:
      yield record | {'image': stand_in(count, *shape)}
    else:
      yield from (record | {'image': stand_in(*shape)} for _ in range(count))


def _outlined(data, ordered: Sequence[Slice], count: int, record: Record) -> Record:
  """The outline of `count` slices, of which `ordered` are all, or the first and the last."""
  shape, spacing = (int(data.Rows), int(data.Columns), 1), ordered[0].spacing
  if count == 1:
    return record | {'image': stand_in(*shape), 'spacing': spacing and list(spacing)}
  if not ordered[0].axes:
    depth = ordered[0].thickness
    return whole(stand_in(count, *shape), record | {'spacing': [depth, *spacing] if depth and spacing else None})
  along = step(ordered) * ((len(ordered) - 1) / (count - 1))
  volume, where = to_ras(stand_in(count, *shape).transpose(2, 1, 0, 3), _affine(ordered[0], along))
  return whole(volume, record | where | ({} if spacing else {'spacing': None}))


def _read_slice(files: Sequence[pathlib.Path], i: int) -> tuple[Slice, Pixels]:
  """A slice and its pixels; an error tells its number, as the name of a file may be a patient's."""
  try:
    data = load(files[i])
    return slices(files[i], data)[0], transform(data, decode(data), frame_values(data, 0))
  except UserError:
    raise
  except Exception as e:  # pydicom raises anything at all for damaged files
    raise ValueError(f'slice {i + 1} of {len(files)}: {_line(e)}') from e


def _enhanced(data, frames: Sequence[Slice], record, notes, options: Options) -> Iterator[Record]:
  """The volumes of a file whose frames say where they lie."""
  found = _frames_apart(lambda: data, frames)
  for i, stack in enumerate(found):
    parts = [transform(data, decode(data, s.index), frame_values(data, s.index)) for s in stack.slices]
    part = f'v{i:02d}' if len(found) > 1 else ''
    here = [*notes, *stack.notes]
    if len(stack.slices) == 1:
      yield _image(data, stack.slices[0], parts[0], record | {'part': part}, here, options)
    else:
      yield _volume(data, stack.slices, parts, record | {'part': part}, here, options)


def _frames_apart(loaded: Callable[[], Any], frames: Sequence[Slice]) -> list[Stack]:
  """The volumes of a file's frames; its pixels, from `loaded`, are needed only where frames share a position.

  Raises:
    ValueError: frames of which no volume can be made.
  """
  data = functools.cache(loaded)
  digest = lambda s: hashlib.sha256(decode(data(), s.index).tobytes()).hexdigest()
  found, refused = stacks(frames, functools.cache(digest))
  if refused:
    raise ValueError(refused[0][1])
  return found


def _volume(data, ordered: Sequence[Slice], parts: Sequence[Pixels], record, notes, options: Options) -> Record:
  """Slices in order -> one volume."""
  images = [p.frames[0] for p in parts]
  dtype = np.result_type(*(i.dtype for i in images)) if all(i.dtype.kind != 'f' for i in images) else np.float32
  volume = np.stack(images).astype(dtype, copy=False)  # [slices, rows, columns, C]
  meta = _meta(data, notes, options, parts[0])
  window = parts[len(parts) // 2].window
  meta |= {'window': window} if window else {}
  spacing = ordered[0].spacing
  if ordered[0].axes:
    volume, where = to_ras(volume.transpose(2, 1, 0, 3), _affine(ordered[0], step(ordered)))
    record = record | {'spacing': where['spacing'] if spacing else None}
    meta |= where['meta']
  else:
    depth = ordered[0].thickness
    record = record | {'spacing': [depth, *spacing] if depth and spacing else None}
    meta['orientation'] = 'native'
  names = ['R', 'G', 'B'] if volume.shape[-1] == 3 else numbered(volume.shape[-1])
  return whole(volume, record | {'channels': names, 'meta': meta})


def _clip(data, record, notes, options: Options) -> Iterator[Record]:
  """Frames in time, [T, H, W, C]: whole or one by one."""
  value = frame_values(data, 0)
  pixels = transform(data, decode(data), value)
  names = ['R', 'G', 'B'] if pixels.frames.shape[-1] == 3 else numbered(1)
  meta = _meta(data, notes, options, pixels) | {'orientation': 'native'}
  times = _times(data, len(pixels.frames))
  record = record | {'channels': names}
  if options.volumes == 'whole':
    step_seconds = {'frame_seconds': float(np.median(np.diff(times)))} if times is not None else {}
    yield record | {'image': pixels.frames, 'meta': meta | step_seconds}
    return
  spacing = slices(pathlib.Path(), data)[0].spacing
  for t, image in enumerate(pixels.frames):
    at = {'frame_seconds': float(times[t])} if times is not None else {}
    yield record | {'image': image, 'part': f't{t:03d}', 'spacing': spacing and list(spacing), 'meta': meta | at}


def _single(data, s: Slice, record, notes, options: Options) -> Record:
  return _image(data, s, transform(data, decode(data), frame_values(data, 0)), record, notes, options)


def _image(data, s: Slice, pixels: Pixels, record, notes, options: Options) -> Record:
  """One frame as it lies, [H, W, C]."""
  meta = _meta(data, notes, options, pixels) | {'orientation': 'native'}
  if s.axes:
    meta |= place(_affine(s, normal(s)))
  image = pixels.frames[0]
  names = ['R', 'G', 'B'] if image.shape[-1] == 3 else numbered(1)
  return record | {'image': image, 'channels': names, 'spacing': s.spacing and list(s.spacing), 'meta': meta}


def _affine(s: Slice, along: np.ndarray) -> np.ndarray:
  """(column, row, slice) -> RAS, mm, of a stack that begins with `s` and goes on by `along` (mm, LPS)."""
  rows, columns = s.spacing or (1.0, 1.0)
  affine = np.eye(4)
  affine[:3, 0] = np.array(s.axes[:3]) * columns
  affine[:3, 1] = np.array(s.axes[3:]) * rows
  affine[:3, 2] = along
  affine[:3, 3] = s.position
  return from_lps(affine)


def _meta(data, notes: Sequence[str], options: Options, pixels: Pixels | None = None) -> dict[str, Any]:
  """What readers.META lists of a file and of its pixels, without geometry."""
  meta: dict[str, Any] = {'intensity': pixels.intensity if pixels else 'native'}
  if modality := str(data.get('Modality') or ''):
    meta['modality'] = modality
  if pixels and pixels.window:
    meta['window'] = pixels.window
  if data.get('BitsStored'):
    meta['bits'] = int(data.BitsStored)
  if data.get('InstitutionName'):
    meta['site'] = hashed(options.salt, str(data.InstitutionName))
  if notes := [*notes, *(pixels.notes if pixels else ())]:
    meta['notes'] = '; '.join(notes)
  return meta


def _times(data, count: int) -> np.ndarray | None:
  """Seconds since the first frame: FrameTimeVector and FrameTime (ms), CineRate (1/s); None where none says."""
  vector = data.get('FrameTimeVector')
  if vector is not None and hasattr(vector, '__len__') and not isinstance(vector, str) and len(vector) == count:
    return np.cumsum([0.0, *(float(v) for v in vector[1:])]) / 1e3
  for name in ('FrameTime', 'CineRate', 'RecommendedDisplayFrameRate'):
    if data.get(name) and float(data.get(name)) > 0:
      number = float(data.get(name))
      return np.arange(count) * (number / 1e3 if name == 'FrameTime' else 1 / number)
  return None


def _file_digest(s: Slice) -> str:
  """SHA-256 of a file's stored pixels and of what makes them values; of one that cannot be read, its identifier."""
  try:
    data = load(s.path)
  except Exception:  # reading it will tell why
    return s.sop
  digest = hashlib.sha256()
  for name in ('PixelData', 'FloatPixelData', 'DoubleFloatPixelData'):
    digest.update(bytes(data.get(name) or b''))
  digest.update(f'{data.get("RescaleSlope")} {data.get("RescaleIntercept")}'.encode())
  return digest.hexdigest()


def _line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
