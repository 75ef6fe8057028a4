"""What readers give and take: records, options, groups, the suffixes that are known, and checks of pixels and sizes."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from jaxmed.data.readers import signals as signals_lib
from jaxmed.errors import UserError, choose

Record = dict[str, Any]
# An axis of an array or a TIFF that nobody named counts as channels up to this length, as slices above it.
MAX_CHANNELS = 16
# A header can claim any size: what would decode to more than this is refused before it is decoded.
MAX_BYTES = 4 << 30
SUFFIXES = {
  '.png': 'image', '.jpg': 'image', '.jpeg': 'image', '.jpe': 'image', '.jfif': 'image',
  '.bmp': 'image', '.dib': 'image', '.gif': 'image', '.webp': 'image', '.tga': 'image', '.pcx': 'image',
  '.qoi': 'image',
  '.pbm': 'image', '.pgm': 'image', '.ppm': 'image', '.pnm': 'image', '.pfm': 'image',
  '.jp2': 'image', '.j2k': 'image', '.jpx': 'image', '.jpf': 'image', '.j2c': 'image', '.jpc': 'image',
  '.tif': 'tiff', '.tiff': 'tiff', '.lsm': 'tiff', '.stk': 'tiff',
  '.svs': 'slide', '.ndpi': 'slide', '.scn': 'slide', '.qptiff': 'slide', '.bif': 'slide', '.mrxs': 'slide',
  '.vms': 'slide', '.vmu': 'slide', '.svslide': 'slide',
  '.npy': 'array', '.npz': 'array', '.h5': 'array', '.hdf5': 'array',
  '.nii': 'nifti', '.nii.gz': 'nifti', '.zarr': 'zarr',
  '.nrrd': 'itk', '.nhdr': 'itk', '.mha': 'itk', '.mhd': 'itk',
  '.czi': 'czi', '.nd2': 'nd2',
  '.mp4': 'video', '.mov': 'video', '.avi': 'video', '.mkv': 'video', '.webm': 'video',
  '.dcm': 'dicom', '.dicom': 'dicom', '.ima': 'dicom',
}
# Kinds whose files are grouped before they are read.
GROUPED = frozenset({'dicom'})
# What lies on the grid of an image and changes with it.
BESIDE = ('mask', 'filled')
# `groups` gives files that hold no image at all (reports, structure sets) as rejects whose reason begins so.
NO_IMAGE = 'no image: '
# Images and planes below `Options.min_content` are listed with a reason that begins so.
NO_CONTENT = 'no content: '
# What `meta` may hold, as columns of a manifest; absent means unknown.
#   modality       DICOM's word: CT, MR, US, DX ...
#   window         [center, width] in the units of the stored pixels; never burnt in
#   orientation    'RAS' where the axes were turned to [z, y, x] growing to superior, anterior, right; else 'native'
#   direction      3x3, row by row; column i is the unit vector of array axis x, y, z (i = 0, 1, 2) in RAS space
#   origin         position in RAS space, mm, of the centre of voxel [0, 0, 0]
#   frame_seconds  of one frame: its time since the start; of a whole clip: the time between frames
#   level_mpp      microns per pixel of a tile
#   tile_xy        [x, y] of a tile's corner, in pixels of the slide's full resolution
#   bits           bits stored
#   site           salted hash of the institution's name
#   nan_filled     pixels (in all channels) that were NaN or infinite and were filled, see Options.nan
#   intensity      'hu' (CT, int16 Hounsfield units), 'mr', 'pet' or 'native'
META: dict[str, pa.DataType] = {
  'modality': pa.string(), 'window': pa.list_(pa.float32()), 'orientation': pa.string(),
  'direction': pa.list_(pa.float32()), 'origin': pa.list_(pa.float32()), 'frame_seconds': pa.float64(),
  'level_mpp': pa.float32(), 'tile_xy': pa.list_(pa.int32()), 'bits': pa.int32(), 'notes': pa.string(),
  'site': pa.string(), 'intensity': pa.string(), 'nan_filled': pa.int64(),
}
_MAGIC = (
  (b'\x89PNG\r\n\x1a\n', 'image'), (b'\xff\xd8\xff', 'image'), (b'GIF8', 'image'),
  (b'\0\0\0\x0cjP  \r\n', 'image'), (b'\xff\x4f\xff\x51', 'image'),
  (b'II*\x00', 'tiff'), (b'MM\x00*', 'tiff'), (b'II+\x00', 'tiff'), (b'MM\x00+', 'tiff'),
  (b'\x93NUMPY', 'array'), (b'\x89HDF\r\n\x1a\n', 'array'), (b'NRRD000', 'itk'),
  (b'PK\x03\x04', 'array'), (b'ZISRAWFILE', 'czi'),
)
VOLUMES = ('slices', 'whole')
PLANES = ('axial', 'acquired')
SLIDES = ('auto', 'tiles')
CROPS = ('none', 'foreground')
NAN = ('refuse', '0', 'mean')


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may say about files.

  Attributes:
    channels: names for the channels of every file, instead of what the file says; None keeps the file's.
    volumes: 'slices' cuts volumes into [H, W, C] planes along their first axis, 'whole' keeps [D, H, W, C].
    plane: which planes are cut from volumes in RAS: 'axial', or as 'acquired', across the axis of the coarsest spacing
      (axial where that is less than 1.2 times the finest).
    salt: goes into the hash of patients' identifiers; keep it secret, or who guesses an identifier can check it.
    slides: 'tiles' cuts every TIFF and slide into tiles; 'auto' those that have a pyramid and more than 1e8 pixels.
    mpp: microns per pixel of a slide's tiles.
    tile: their height and width in pixels.
    every: seconds between the frames that are taken from a video.
    spacing: mm between pixels: one number, or three along z, y, x; None keeps the file's. Images of unknown spacing,
      tiles and clips stay as they are. See readers.spacing.
    crop: 'foreground' keeps the box around what is no background (see readers.content), not of tiles and clips.
    margin: pixels that the box is wider on each side.
    min_content: the share of pixels that are no background below which an image or plane is left out.
    nan: pixels that are NaN, infinite or beyond float32: 'refuse' the file, or fill them with '0', or with the 'mean'
      of the channel in that image (a volume is one).
    signals: steps on signals before they are stored, 'resample:100,baseline', see readers.signals.
  """

  channels: tuple[str, ...] | None = None
  volumes: str = 'slices'
  plane: str = 'axial'
  salt: str = ''
  slides: str = 'auto'
  mpp: float = 0.5
  tile: int = 256
  every: float = 1.0
  spacing: tuple[float, ...] | None = None
  crop: str = 'none'
  margin: int = 4
  min_content: float = 0.0
  nan: str = 'refuse'
  signals: str = ''

  def __post_init__(self):
    choose('volumes', self.volumes, VOLUMES)
    choose('plane', self.plane, PLANES)
    choose('slides', self.slides, SLIDES)
    choose('crop', self.crop, CROPS)
    choose('nan', self.nan, NAN)
    signals_lib.parse(self.signals)
    for name in ('mpp', 'tile', 'every'):
      if not 0 < getattr(self, name) < float('inf'):
        raise UserError(f'{name} is {getattr(self, name)}: expected a number above 0')
    spacing = self.spacing
    if spacing is not None and not (len(spacing) in (1, 3) and all(0 < s < float('inf') for s in spacing)):
      raise UserError(f'spacing is {", ".join(map(str, spacing))}: expected one number of mm, or three (z, y, x)')
    if self.margin < 0:
      raise UserError(f'margin is {self.margin}: expected a number of pixels, 0 or more')
    if not 0 <= self.min_content < 1:
      raise UserError(f'min_content is {self.min_content}: expected a fraction from 0 to below 1')


DEFAULT = Options()
Span = tuple[float, float, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Group:
  """Files that are read together, such as the slices of a series.

  Attributes:
    files: in reading order.
    name: 16 hex digits, made of what the files hold and not of their names; unique among the groups of one input.
    subject: salted hash of the patient's identifier.
    notes: what is odd: missing or duplicate slices, a tilted gantry ...
    kind: the reader.
  """

  files: tuple[pathlib.Path, ...]
  name: str
  subject: str
  notes: tuple[str, ...] = ()
  kind: str = 'dicom'


@dataclasses.dataclass(frozen=True)
class Parts:
  """How the channels of an image lie in files that do not say so (see jaxmed.data.prepare.benchmarks).

  Attributes:
    files: one for each channel, or the one that holds them all.
    channels: their names, in order.
    way: 'named' (the file holds an image of these channels), 'stack' (a file each), 'tape' (side by side along the
      width), 'rows' (many images in one HDF5 file of So2Sat), 'member' (some bytes of an archive are a file),
      'signal' (a signal as an image of one channel) or 'video' (frames, of which `spans` say more).
    width: of one channel of a tape, in pixels.
    rows: the first of the images (of a member: bytes) that are meant, and the one after the last.
    values: of the label of rows, by their places in it; of a member the suffix of its name.
    spans: of a 'video', what the manifest says of its frames: (begin, end in seconds, columns) in order of begin, where
      a later one counts before an earlier one.
    until: seconds that its annotation goes on for, 0 for unknown.
  """

  files: tuple[pathlib.Path, ...]
  channels: tuple[str, ...]
  way: str
  width: int = 0
  rows: tuple[int, int] | None = None
  values: tuple[str, ...] = ()
  spans: tuple[Span, ...] = ()
  until: float = 0.0


@dataclasses.dataclass(frozen=True)
class Masks:
  """How the mask of an image lies in files, where a layout says more than one file of values does.

  Attributes:
    files: one of values, or one for each structure, whose pixels are those above 0.
    values: that each structure gets, () for a file of values. Where structures overlap the last one counts.
    absent: a value of the file that stands for pixels of which nothing is said, or None.
    codes: {value of the file: value of the mask} where they differ; another value is refused. A colour is
      65536 R + 256 G + B.
  """

  files: tuple[pathlib.Path, ...]
  values: tuple[int, ...] = ()
  absent: int | None = None
  codes: dict[int, int] = dataclasses.field(default_factory=dict)


def suffix(path: str | os.PathLike) -> str | None:
  """The known suffix that a file name ends with (lower case, '.nii.gz' before '.gz'), or None."""
  name = pathlib.Path(path).name.lower()
  return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def stem(path: str | os.PathLike) -> str:
  """The file name without its known suffix."""
  name = pathlib.Path(path).name
  return name[:-len(suffix(path) or '')] or name if suffix(path) else name


def known(path: str | os.PathLike) -> bool:
  """Whether some reader takes this file: its suffix is known, or it is DICOM by its first bytes (132 are read).

  DICOMDIR, the list of a medium's files, is not: the files themselves are found beside it.
  """
  if pathlib.Path(path).name.upper() == 'DICOMDIR':
    return False
  return suffix(path) is not None or _is_dicom(_head(path))


def is_folder_format(path: str | os.PathLike) -> bool:
  """Whether a folder is one image (OME-Zarr): its name ends in .zarr, or its metadata lists multiscales."""
  path = pathlib.Path(path)
  if not path.is_dir():
    return False
  if path.name.lower().endswith('.zarr'):
    return True
  for name in ('zarr.json', '.zattrs'):
    with contextlib.suppress(OSError):
      if (path / name).is_file() and b'"multiscales"' in (path / name).read_bytes():
        return True
  return False


def kind(path: str | os.PathLike) -> str:
  """The reader for a file or folder: by its first bytes where they tell, else by its suffix.

  Raises:
    ValueError: an empty file, or a suffix that no reader knows.
  """
  if os.path.isdir(path):
    if is_folder_format(path):
      return 'zarr'
    raise ValueError('is a folder, and not an OME-Zarr image')
  head = _head(path)
  if _is_dicom(head):
    return 'dicom'
  found = suffix(path)
  if found is None:
    named = pathlib.Path(path).suffix or 'a name without a suffix'
    raise ValueError(f'no reader for {named}; known: {", ".join(SUFFIXES)}')
  if not head:
    raise ValueError('the file is empty (0 bytes)')
  if SUFFIXES[found] == 'slide':  # most are TIFF inside
    return 'slide'
  return next((name for magic, name in _MAGIC if head.startswith(magic)), SUFFIXES[found])


def stand_in(*shape: int) -> np.ndarray:
  """Zeros of a shape that take no memory."""
  return np.broadcast_to(np.uint8(0), shape)


def _head(path: str | os.PathLike) -> bytes:
  """The first bytes of a regular file; nothing else is opened, for a FIFO would be waited for."""
  if os.path.exists(path) and not os.path.isfile(path):
    raise ValueError('is no regular file')
  with open(path, 'rb') as f:
    return f.read(132)


def _is_dicom(head: bytes) -> bool:
  """Whether a file begins as DICOM: with its preamble, or without one by two elements of the groups 2 and 8."""
  if head[128:132] == b'DICM':
    return True
  order: Literal['little', 'big'] = 'big' if head[:1] == b'\0' else 'little'
  at, tags = 0, [(0, 0)]
  while at + 8 <= len(head) and len(tags) < 4:
    group, element = (int.from_bytes(head[at + i : at + i + 2], order) for i in (0, 2))
    if group not in (2, 8) or (group, element) <= tags[-1]:
      return False
    tags.append((group, element))
    vr = head[at + 4 : at + 6]
    if vr in (b'OB', b'OW', b'UN', b'UT', b'SQ'):
      size, start = int.from_bytes(head[at + 8 : at + 12], order), 12
    elif vr.isalpha() and vr.isupper():
      size, start = int.from_bytes(head[at + 6 : at + 8], order), 8
    else:
      size, start = int.from_bytes(head[at + 4 : at + 8], order), 8
    if size % 2 or size > 1 << 16:
      return False
    at += start + size
  return len(tags) > 2


def check_pixels(image: np.ndarray, finite: bool = True, hint: str = '') -> np.ndarray:
  """Returns pixels in a storable type: small integers as they are, every float as float32, C order.

  Booleans become 0 and 255; 64-bit integers become int32 when they fit, else float32.

  Raises:
    ValueError: no pixels, numbers that are not real, or (`finite`) NaN, infinity or what float32 cannot hold.
  """
  if image.size == 0:
    raise ValueError(f'the image has no pixels (shape {list(image.shape)})')
  if image.dtype.kind == 'b':
    image = image.astype(np.uint8) * np.uint8(255)
  elif image.dtype.kind == 'f':
    with np.errstate(over='ignore'):
      image = image.astype(np.float32)
    if finite and (bad := int(image.size - np.isfinite(image).sum())):
      raise ValueError(f'{bad} of {image.size} pixels are NaN ({int(np.isnan(image).sum())}), infinite or beyond '
                       f'float32: expected numbers{hint}')
  elif image.dtype.kind in 'iu':
    if image.dtype.itemsize == 8:
      fits = image.min() >= -2**31 and image.max() < 2**31
      image = image.astype(np.int32 if fits else np.float32)
  else:
    raise ValueError(f'pixels of type {image.dtype} are not real numbers')
  return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder('='))


def check_size(shape: Sequence[int], dtype: np.dtype) -> None:
  """Refuses a declared size before it is decoded.

  Raises:
    ValueError: the array would take more than MAX_BYTES.
  """
  size = float(np.prod([float(n) for n in shape])) * np.dtype(dtype).itemsize
  if size > MAX_BYTES:
    raise ValueError(f'declares {size / 2**30:.0f} GiB of pixels {list(shape)}: more than '
                     f'{MAX_BYTES / 2**30:.0f} GiB is refused')


def number(told: Any, field: str) -> float:
  """A number of a header, 0 where there is none.

  Raises:
    ValueError: a text that is no finite number, such as one with a decimal comma.
  """
  try:
    value = float(told or 0)
  except (TypeError, ValueError):
    value = float('nan')
  if not np.isfinite(value):
    raise ValueError(f'{field} is {str(told)!r}: expected a number with a decimal point')
  return value


def numbered(count: int) -> list[str]:
  """Names for channels that nobody named: ['gray'] for one, else ['c0', 'c1', ...]."""
  return ['gray'] if count == 1 else [f'c{i}' for i in range(count)]


def whole(volume: np.ndarray, record: Record) -> Record:
  """A volume [D, H, W, C] as a reader gives it: it is cut and brought into shape later."""
  return record | {'image': volume, 'volume': True}
