"""NIfTI (https://nifti.nimh.nih.gov, versions 1 and 2) by nibabel, turned to RAS.

What a header holds that is not finite or not valid is left aside for the next best it holds, which is noted; where
there is none, the file is refused with the field's name.
"""

import contextlib
import dataclasses
import gzip
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed.data.readers.geometry import to_ras
from jaxmed.data.readers.types import (
  DEFAULT,
  MAX_CHANNELS,
  Options,
  Record,
  check_size,
  numbered,
  stand_in,
  stem,
  whole,
)

_TO_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # the three low bits of xyzt_units: unknown, m, mm, micron
_TO_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}  # the next three: s, ms, us; what else there is counts no time
_INFLATES = 1032  # bytes that a byte of deflated data can stand for, at most
_COLOURS = {128: 3, 2304: 4}  # datatype: RGB24, RGBA32


@dataclasses.dataclass
class _Header:
  """A header with what of it holds: the shape without trailing axes of length one, [4, 4] affine (mm), spacing along
  x, y, z in mm (None where unknown), seconds between volumes (0 where the fourth axis is no time), and notes."""

  raw: Any
  shape: tuple[int, ...]
  affine: np.ndarray
  zooms: list[float] | None
  step: float
  notes: list[str]
  proxy: Any

  @property
  def colours(self) -> int:
    """Samples of a voxel, 0 where it is one number."""
    return _COLOURS.get(int(self.raw['datatype']), 0)


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the volumes [D, H, W, C] of a file.

  The axes are turned to the closest RAS axes and stored as [z, y, x]: the index grows towards superior,
  anterior and right. Spacing is mm in that order. A fourth axis is channels where `options.channels` has as many names;
  else it is time where xyzt_units is one of time and pixdim[4] is above 0, or where it is longer than MAX_CHANNELS:
  each of its volumes is read as a part 't000', 't001' .... RGB24 and RGBA32 give R, G, B. Integers without a scale stay
  as stored; with one they become float32.

  Raises:
    OSError, EOFError, ValueError: damaged or truncated, not 3D or 4D, or a header that does not hold.
  """
  yield from _read(path, options, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  yield from _read(path, options, False)


def header_of(path: str | os.PathLike) -> tuple[Any, np.ndarray]:
  """The header of a file, without extensions, and the affine [4, 4] (mm) by which its axes are turned."""
  with _open(path) as (f, name):
    header = _header(f, name)
  raw = header.raw.copy()
  raw.extensions = type(raw.extensions)()
  return raw, header.affine


def _read(path: str | os.PathLike, options: Options, pixels: bool) -> Iterator[Record]:
  with _open(path) as (f, name):
    header = _header(f, name)
    data = _pixels(header) if pixels else stand_in(*header.shape, min(header.colours, 3) or 1)
  volume, where = to_ras(data.reshape(*header.shape[:3], -1), header.affine)  # [z, y, x, times * colours]
  where['spacing'] = _turned(header)
  record = where | {'subject': stem(path), 'source': 'nifti', 'part': ''}
  if header.notes:
    record['meta'] = where['meta'] | {'notes': '; '.join(header.notes)}
  colours = min(header.colours, 3) or 1
  names = ['R', 'G', 'B'] if colours == 3 else numbered(1)
  count = volume.shape[-1] // colours
  named = options.channels is not None and len(options.channels) == count > 1
  if count == 1 or (colours == 1 and (named or (count <= MAX_CHANNELS and not header.step))):
    yield whole(volume, record | {'channels': names if count == 1 else numbered(count)})
    return
  for t in range(count):
    notes = '; '.join([*header.notes, f'volume {t} of {count} in time'])
    meta = where['meta'] | {'notes': notes} | ({'frame_seconds': t * header.step} if header.step else {})
    here = record | {'channels': names, 'part': f't{t:03d}', 'meta': meta}
    yield whole(volume[..., t * colours : (t + 1) * colours], here)


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[tuple[Any, str]]:
  """The file, inflated where its first bytes are those of gzip, whatever its name."""
  with open(path, 'rb') as f:
    if f.read(2) == b'\x1f\x8b':
      with gzip.open(path) as inflated:
        yield inflated, 'gzip'
    else:
      f.seek(0)
      yield f, 'plain'


def _header(f: Any, name: str) -> _Header:
  import nibabel
  from nibabel.arrayproxy import ArrayProxy

  start = f.read(348)
  magics = start[344:348], start[4:8]
  version = 1 if magics[0][:3] in (b'n+1', b'ni1') else 2 if magics[1][:3] in (b'n+2', b'ni2') else 0
  if not version or len(start) < 348:
    raise ValueError(f'magic is {magics[0].decode("latin1")!r} ({name} bytes): expected n+1 of NIfTI at byte 344, or '
                     'n+2 at byte 4')
  magic = magics[version - 1][:3]
  notes = [] if magic[1:2] == b'+' else [
    f'magic is {magic.decode()}: expected n+{version}; pixels of this file were taken']
  f.seek(0)
  raw = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header).from_fileobj(f, check=False)
  shape, axes = _shape(raw)
  dtype = _dtype(raw)
  check_size((*shape, max(1, _COLOURS.get(int(raw['datatype']), 0))), np.dtype(np.uint8) if dtype.names else dtype)
  affine, zooms = _geometry(raw, notes)
  slope, inter = _scale(raw, notes)
  offset = _offset(raw, notes)
  _check_length(f, offset, int(np.prod(axes, dtype=object)) * dtype.itemsize)
  proxy = ArrayProxy(f, (axes, dtype, offset, slope, inter))
  return _Header(raw, shape, affine, zooms, _step(raw, axes, notes), notes, proxy)


def _check_length(f: Any, offset: int, size: int) -> None:
  """Raises a ValueError where the file cannot hold what its header counts: memory for it would be taken first."""
  packed = isinstance(f, gzip.GzipFile)
  length = os.fstat(f.fileno()).st_size * (_INFLATES if packed else 1)
  if offset + size > length:
    most = 'at most ' if packed else ''
    raise ValueError(f'truncated: dim and datatype count {size} bytes of pixels from byte {offset} on, and the file '
                     f'has {most}{length}')


def _shape(raw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes without those of length one behind the third, and as stored."""
  dim = [int(n) for n in raw['dim']]
  axes = tuple(dim[1 : 1 + dim[0]]) if 1 <= dim[0] <= 7 else ()
  if not axes or min(axes) < 1:
    raise ValueError(f'dim is {dim}: expected the number of axes, 3 or 4, and their lengths, each above 0')
  shape = tuple(n for i, n in enumerate(axes) if i < 3 or n > 1)
  if len(shape) not in (3, 4):
    raise ValueError(f'dim is {dim}, shape {list(axes)}: expected a volume [X, Y, Z] or [X, Y, Z, channels or time]')
  return shape, axes


def _dtype(raw: Any) -> np.dtype:
  with contextlib.suppress(Exception):  # nibabel has its own errors for types that nobody knows
    if (dtype := raw.get_data_dtype()).itemsize:
      return dtype
  raise ValueError(f'datatype is {int(raw["datatype"])}: expected integers, floating point or RGB of NIfTI')


def _offset(raw: Any, notes: list[str]) -> int:
  least, told = raw.sizeof_hdr + 4, float(raw['vox_offset'])
  if not np.isfinite(told) or told < least:
    notes.append(f'vox_offset is {told:g}: expected at least {least}, which was taken')
    return least
  return int(told)


def _scale(raw: Any, notes: list[str]) -> tuple[float, float]:
  """Slope and intercept; 1 and 0 where the slope says that there is none."""
  slope, inter = float(raw['scl_slope']), float(raw['scl_inter'])
  if not np.isfinite(slope):
    notes.append(f'scl_slope is {slope:g}: values are kept as stored')
  if slope == 0 or not np.isfinite(slope):
    return 1.0, 0.0
  if not np.isfinite(inter):
    notes.append(f'scl_inter is {inter:g}: 0 was taken')
  return slope, inter if np.isfinite(inter) else 0.0


def _step(raw: Any, axes: tuple[int, ...], notes: list[str]) -> float:
  """Seconds between volumes, 0 where the fourth axis is not told to be time."""
  unit, step = _TO_SECONDS.get(int(raw['xyzt_units']) & 0x38, 0.0), float(raw['pixdim'][4])
  if not unit or len(axes) < 4 or axes[3] == 1:
    return 0.0
  if not np.isfinite(step):
    notes.append(f'pixdim[4] is {step:g}: the time between volumes is unknown')
    return 0.0
  return max(0.0, step) * unit


def _geometry(raw: Any, notes: list[str]) -> tuple[np.ndarray, list[float] | None]:
  """The affine (mm) by sform, else qform, else pixdim alone; spacing by pixdim, else that affine."""
  code = int(raw['xyzt_units']) & 7
  if code not in _TO_MM:
    notes.append(f'xyzt_units is {int(raw["xyzt_units"])}, of space {code}: expected 0 to 3; mm was taken')
  mm = _TO_MM.get(code, 1.0)
  told = np.array(raw['pixdim'], np.float64)
  size = np.abs(told[1:4])
  holds = bool((np.isfinite(size) & (size > 0)).all())
  raw['pixdim'][1:4] = np.where(np.isfinite(size) & (size > 0), size, 1)
  raw['pixdim'][0] = -1 if told[0] == -1 else 1
  affine, way = _affine(raw, notes)
  if not holds:
    taken = 'the spacing is unknown' if way == 'pixdim' else f'spacing is that of {way}'
    notes.append(f'pixdim is {", ".join(f"{v:g}" for v in told[1:4])}: expected numbers above 0; {taken}')
  # Zooms and affine may differ in files of some writers: spacing stays what the header calls it.
  zooms = size if holds else np.linalg.norm(affine[:3, :3], axis=0)
  return np.diag([mm, mm, mm, 1.0]) @ affine, None if not holds and way == 'pixdim' else [float(z * mm) for z in zooms]


def _affine(raw: Any, notes: list[str]) -> tuple[np.ndarray, str]:
  """The first transform that is told and maps voxels to space, and its name."""
  for way, get in (('sform', raw.get_sform), ('qform', raw.get_qform)):
    code = int(raw[f'{way}_code'])
    if code < 0 or code > 5:
      notes.append(f'{way}_code is {code}: expected 0 to 5; {way} was left aside')
    if not 0 < code <= 5:
      continue
    with contextlib.suppress(Exception):  # nibabel has its own errors for quaternions that are none
      affine = np.asarray(get(), np.float64)
      if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-12:
        return affine, way
    notes.append(f'{way} maps no voxels to space (singular or not finite): it was left aside')
  if notes and 'left aside' in notes[-1]:
    notes.append('orientation is that of pixdim alone: the first axis runs to the left')
  return np.asarray(raw.get_base_affine(), np.float64), 'pixdim'


def _turned(header: _Header) -> list[float] | None:
  """Spacing along z, y, x of the closest RAS axes."""
  from nibabel import orientations

  if header.zooms is None:
    return None
  zooms = np.empty(3)
  zooms[orientations.io_orientation(header.affine)[:, 0].astype(int)] = header.zooms
  return [float(s) for s in zooms[::-1]]


def _pixels(header: _Header) -> np.ndarray:
  """[X, Y, Z (, T) (, colours)]: alpha is left out, as it is no measurement."""
  if header.colours:
    data = header.proxy.get_unscaled()
    return np.stack([data[name] for name in data.dtype.names[:3]], axis=-1)
  data = np.asanyarray(header.proxy)
  return data.astype(np.float32) if data.dtype.kind == 'f' else data
