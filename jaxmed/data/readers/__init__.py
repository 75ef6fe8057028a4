"""One file a format. `read(path, options)` yields the records of a file, whatever its format.

A record is a plain dict:

  image     ndarray, [H, W, C] or [D, H, W, C], uint8/int8/uint16/int16/uint32/int32 or float32
  channels  list of C distinct names
  spacing   list of mm along the grid axes (2 or 3 numbers), or None where the file does not say
  subject   str, the reader's own guess: the name of the file without its suffix
  source    str, the format
  part      str, '' or what was cut out of the file, e.g. 'z042'
  meta      dict (may be absent), what else the file tells: only keys of META
  mask      [H, W] or [D, H, W] integers (only where a mask was given), on the grid of the image
  content   share of the pixels that are no background (only with `Options.min_content`)

A reader's module gives volumes whole, marked by `volume`; jaxmed.data.readers.shaping makes records of them. Its
`outline` gives the same from headers alone, with stand-ins for images. It raises ValueError (or whatever its decoder
raises) for a file that it cannot read whole: `prepare` lists it as a reject. Files of a kind in GROUPED belong
together: `groups` sorts them by their headers, `read_group` reads one group.
"""

import contextlib
import dataclasses
import importlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from jaxmed.errors import UserError, choose

Record = dict[str, Any]

# An axis of an array or a TIFF that nobody named counts as channels up to this length, as slices above it.
MAX_CHANNELS = 16
# A header can claim any size: what would decode to more than this is refused before it is decoded.
MAX_BYTES = 4 << 30

SUFFIXES = {
  '.png': 'image', '.jpg': 'image', '.jpeg': 'image',
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
#   intensity      'hu' (CT, int16 Hounsfield units), 'mr', 'pet' or 'native'
META: dict[str, pa.DataType] = {
  'modality': pa.string(), 'window': pa.list_(pa.float32()), 'orientation': pa.string(),
  'direction': pa.list_(pa.float32()), 'origin': pa.list_(pa.float32()), 'frame_seconds': pa.float64(),
  'level_mpp': pa.float32(), 'tile_xy': pa.list_(pa.int32()), 'bits': pa.int32(), 'notes': pa.string(),
  'site': pa.string(), 'intensity': pa.string(),
}

_MAGIC = (
  (b'\x89PNG\r\n\x1a\n', 'image'), (b'\xff\xd8\xff', 'image'),
  (b'II*\x00', 'tiff'), (b'MM\x00*', 'tiff'), (b'II+\x00', 'tiff'), (b'MM\x00+', 'tiff'),
  (b'\x93NUMPY', 'array'), (b'\x89HDF\r\n\x1a\n', 'array'), (b'NRRD000', 'itk'),
  (b'PK\x03\x04', 'array'), (b'ZISRAWFILE', 'czi'),
)
VOLUMES = ('slices', 'whole')
PLANES = ('axial', 'acquired')
SLIDES = ('auto', 'tiles')
CROPS = ('none', 'foreground')


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

  def __post_init__(self):
    choose('volumes', self.volumes, VOLUMES)
    choose('plane', self.plane, PLANES)
    choose('slides', self.slides, SLIDES)
    choose('crop', self.crop, CROPS)
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
  """How the channels of an image lie in files that do not say so (see jaxmed.data.layouts).

  Attributes:
    files: one for each channel, or the one that holds them all.
    channels: their names, in order.
    way: 'named' (the file holds an image of these channels), 'stack' (a file each), 'tape' (side by side along the
      width) or 'rows' (many images in one HDF5 file of So2Sat).
    width: of one channel of a tape, in pixels.
    rows: the first of the images that are meant, and the one after the last.
    values: of the label of rows, by their places in it.
  """

  files: tuple[pathlib.Path, ...]
  channels: tuple[str, ...]
  way: str
  width: int = 0
  rows: tuple[int, int] | None = None
  values: tuple[str, ...] = ()


def suffix(path: str | os.PathLike) -> str | None:
  """The known suffix that a file name ends with (lower case, '.nii.gz' before '.gz'), or None."""
  name = pathlib.Path(path).name.lower()
  return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def stem(path: str | os.PathLike) -> str:
  """The file name without its known suffix."""
  name = pathlib.Path(path).name
  return name[:-len(suffix(path) or '')] or name if suffix(path) else name


def known(path: str | os.PathLike) -> bool:
  """Whether some reader takes this file: its suffix is known, or it is DICOM by its header (132 bytes are read).

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
      if b'"multiscales"' in (path / name).read_bytes():
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
    raise ValueError(f'no reader for this suffix; known: {", ".join(SUFFIXES)}')
  if not head:
    raise ValueError('the file is empty (0 bytes)')
  if SUFFIXES[found] == 'slide':  # most are TIFF inside
    return 'slide'
  return next((name for magic, name in _MAGIC if head.startswith(magic)), SUFFIXES[found])


def read(path: str | os.PathLike, options: Options = DEFAULT, mask: str | os.PathLike | None = None,
         ) -> Iterator[Record]:
  """Yields the records of one file, with the mask that another file holds. See the module's docstring for a record's
  fields.

  Raises:
    ValueError: the file is empty, of no known format, holds no finite pixels, or has another number of
      channels than `options.channels` names; the mask does not fit. Decoders raise their own errors for damaged files.
    UserError: the package that decodes this format is not installed.
  """
  yield from _checked(_reader(kind(path)).read(path, options), options, mask)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields what the reader of a file would, from its header: images are stand-ins (see `stand_in`), not yet cut.

  Raises as `read` does, for a damaged header."""
  yield from _reader(kind(path)).outline(path, options)


def outline_group(group: Group, options: Options = DEFAULT) -> Iterator[Record]:
  """`outline` of a group."""
  yield from _reader(group.kind).outline_group(group, options)


def stand_in(*shape: int) -> np.ndarray:
  """Zeros of a shape that take no memory."""
  return np.broadcast_to(np.uint8(0), shape)


def groups(
    kind: str, paths: Iterable[pathlib.Path], root: str | os.PathLike, options: Options = DEFAULT,
) -> tuple[list[Group], list[tuple[pathlib.Path, str]]]:
  """Sorts files of one kind of GROUPED into groups, by their headers.

  Args:
    kind: a member of GROUPED.
    paths: files, in any order.
    root: the folder that they were found under; not looked at by the readers there are.
    options: `salt` is used.

  Returns:
    Groups, in an order that does not depend on that of the paths, and (path, reason) for each file that is in none.
  """
  found, rejects = _reader(kind).groups(sorted(paths), root, options)
  return sorted(found, key=lambda g: (g.subject, g.name)), sorted(rejects)


def read_group(group: Group, options: Options = DEFAULT, mask: str | os.PathLike | None = None) -> Iterator[Record]:
  """Yields the records of a group. Raises as `read` does."""
  yield from _checked(_reader(group.kind).read_group(group, options), options, mask)


def read_parts(parts: Parts, options: Options = DEFAULT, mask: str | os.PathLike | None = None) -> Iterator[Record]:
  """Yields the images of some files whose channels a layout names. Raises as `read` does."""
  yield from _checked(_reader('parts').read_parts(parts, options), options, mask)


def outline_parts(parts: Parts, options: Options = DEFAULT) -> Iterator[Record]:
  """`outline` of `read_parts`."""
  yield from _reader('parts').outline_parts(parts, options)


def digest_rows(parts: Parts) -> str:
  """The hash of some rows of a file."""
  return _reader('parts').digest(parts)


def reader_of(path: str | os.PathLike) -> ModuleType:
  """The module that reads a file."""
  return _reader(kind(path))


def _reader(kind: str) -> ModuleType:
  return importlib.import_module(f'jaxmed.data.readers.{kind}')


def _checked(records: Iterable[Record], options: Options, mask: str | os.PathLike | None) -> Iterator[Record]:
  from jaxmed.data.readers import shaping
  from jaxmed.data.readers.companions import read_masks

  try:
    masks = read_masks(mask, options) if mask is not None else []
    yield from shaping.shaped(_named(records, options), options, masks)
  except MemoryError as e:
    raise ValueError(f'needs more memory than there is ({e})') from e
  except Exception as e:
    if str(e).strip() and not isinstance(e, AssertionError):
      raise
    raise ValueError(f'is damaged: {type(e).__name__} in its decoder') from e  # decoders do not always find words


def _named(records: Iterable[Record], options: Options) -> Iterator[Record]:
  for record in records:
    yield record | {'image': check_pixels(record['image']), 'channels': _name_channels(record, options)}


def _head(path: str | os.PathLike) -> bytes:
  with open(path, 'rb') as f:
    return f.read(132)


def _is_dicom(head: bytes) -> bool:
  return head[128:132] == b'DICM'


def check_pixels(image: np.ndarray) -> np.ndarray:
  """Returns pixels in a storable type: small integers as they are, every float as float32, C order.

  Booleans become 0 and 255; 64-bit integers become int32 when they fit, else float32.

  Raises:
    ValueError: no pixels, NaN or infinity, or numbers that are not real.
  """
  if image.size == 0:
    raise ValueError(f'the image has no pixels (shape {list(image.shape)})')
  if image.dtype.kind == 'b':
    image = image.astype(np.uint8) * np.uint8(255)
  elif image.dtype.kind == 'f':
    with np.errstate(over='ignore'):
      image = image.astype(np.float32)
    bad = int(image.size - np.isfinite(image).sum())
    if bad:
      raise ValueError(f'{bad} of {image.size} pixels are NaN, infinite or beyond float32')
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


def numbered(count: int) -> list[str]:
  """Names for channels that nobody named: ['gray'] for one, else ['c0', 'c1', ...]."""
  return ['gray'] if count == 1 else [f'c{i}' for i in range(count)]


def whole(volume: np.ndarray, record: Record) -> Record:
  """A volume [D, H, W, C] as a reader gives it: it is cut and brought into shape later."""
  return record | {'image': volume, 'volume': True}


def _name_channels(record: Record, options: Options) -> list[str]:
  count = record['image'].shape[-1]
  if options.channels is None:
    return list(record['channels'])
  if len(options.channels) != count:
    raise ValueError(f'has {count} channels, but {len(options.channels)} names were given '
                     f'({", ".join(options.channels)})')
  return list(options.channels)
