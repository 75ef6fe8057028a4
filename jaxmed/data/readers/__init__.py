"""One file a format. `read(path, options)` yields the records of a file, whatever its format.

A record is a plain dict:

  image     ndarray, [H, W, C] or [D, H, W, C], uint8/int8/uint16/int16/uint32/int32 or float32
  channels  list of C distinct names
  spacing   list of mm along the grid axes (2 or 3 numbers), or None where the file does not say
  subject   str, the reader's own guess: the name of the file without its suffix
  source    str, the format
  part      str, '' or what was cut out of the file, e.g. 'z042'

A reader raises ValueError (or whatever its decoder raises) for a file that it cannot read whole:
`prepare` lists it as a reject.
"""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxmed.errors import choose

Record = dict[str, Any]

# An axis of an array or a TIFF that nobody named counts as channels up to this length, as slices above it.
MAX_CHANNELS = 16
# A header can claim any size: what would decode to more than this is refused before it is decoded.
MAX_BYTES = 4 << 30

SUFFIXES = {
  '.png': 'image', '.jpg': 'image', '.jpeg': 'image',
  '.tif': 'tiff', '.tiff': 'tiff',
  '.npy': 'array', '.npz': 'array',
  '.nii': 'nifti', '.nii.gz': 'nifti',
}
_MAGIC = (
  (b'\x89PNG\r\n\x1a\n', 'image'), (b'\xff\xd8\xff', 'image'),
  (b'II*\x00', 'tiff'), (b'MM\x00*', 'tiff'), (b'II+\x00', 'tiff'), (b'MM\x00+', 'tiff'),
  (b'\x93NUMPY', 'array'), (b'PK\x03\x04', 'array'),
)
VOLUMES = ('slices', 'whole')


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may say about files.

  Attributes:
    channels: names for the channels of every file, instead of what the file says; None keeps the file's.
    volumes: 'slices' cuts volumes into [H, W, C] planes along their first axis, 'whole' keeps [D, H, W, C].
  """

  channels: tuple[str, ...] | None = None
  volumes: str = 'slices'

  def __post_init__(self):
    choose('volumes', self.volumes, VOLUMES)


DEFAULT = Options()


def suffix(path: str | os.PathLike) -> str | None:
  """The known suffix that a file name ends with (lower case, '.nii.gz' before '.gz'), or None."""
  name = pathlib.Path(path).name.lower()
  return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def stem(path: str | os.PathLike) -> str:
  """The file name without its known suffix."""
  name = pathlib.Path(path).name
  return name[:-len(suffix(path) or '')] or name if suffix(path) else name


def kind(path: str | os.PathLike) -> str:
  """The reader for a file: by its first bytes where they tell, else by its suffix.

  Raises:
    ValueError: an empty file, or a suffix that no reader knows.
  """
  found = suffix(path)
  if found is None:
    raise ValueError(f'no reader for this suffix; known: {", ".join(SUFFIXES)}')
  with open(path, 'rb') as f:
    head = f.read(16)
  if not head:
    raise ValueError('the file is empty (0 bytes)')
  return next((name for magic, name in _MAGIC if head.startswith(magic)), SUFFIXES[found])


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the records of one file. See the module's docstring for a record's fields.

  Raises:
    ValueError: the file is empty, of no known format, holds no finite pixels, or has another number of
      channels than `options.channels` names. Decoders raise their own errors for damaged files.
  """
  reader = importlib.import_module(f'jaxmed.data.readers.{kind(path)}')
  for record in reader.read(path, options):
    record['image'] = check_pixels(record['image'])
    record['channels'] = _name_channels(record, options)
    yield record


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


def cut(volume: np.ndarray, record: Record, options: Options) -> Iterator[Record]:
  """Yields a volume [D, H, W, C] whole, or its D planes [H, W, C] as parts 'z000', 'z001', ..."""
  if options.volumes == 'whole':
    yield record | {'image': volume, 'part': ''}
    return
  spacing = record['spacing'] and record['spacing'][1:]
  width = max(3, len(str(len(volume) - 1)))
  for z, plane in enumerate(volume):
    yield record | {'image': plane, 'spacing': spacing, 'part': f'z{z:0{width}d}'}


def _name_channels(record: Record, options: Options) -> list[str]:
  count = record['image'].shape[-1]
  if options.channels is None:
    return list(record['channels'])
  if len(options.channels) != count:
    raise ValueError(f'has {count} channels, but {len(options.channels)} names were given '
                     f'({", ".join(options.channels)})')
  return list(options.channels)
