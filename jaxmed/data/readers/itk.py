"""NRRD and MetaImage by SimpleITK: volumes turned to RAS, planes as they lie."""

import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from jaxmed.data.readers.geometry import from_lps, to_ras
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
from jaxmed.errors import need

_HEAD = 1 << 16  # bytes
_AXES = re.compile(rb'^\s*(?:NDims|dimension)\s*[=:]\s*(\d{1,9})', re.MULTILINE | re.IGNORECASE)
# Numbers with a comma in them, of fields that separate theirs by blanks.
_DECIMALS = re.compile(rb'^\s*(ElementSpacing|ElementSize|Offset|Origin|Position|TransformMatrix|Rotation|Orientation|'
                       rb'spacings|thicknesses)\s*[=:]([^\r\n]*\d,\d[^\r\n]*)', re.MULTILINE | re.IGNORECASE)
_DATA_FILE = re.compile(rb'^\s*(?:ElementDataFile|data ?file)\s*[=:](.+)$', re.MULTILINE | re.IGNORECASE)


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the volumes [D, H, W, C] of a file, turned to RAS as NIfTI is; a plane of a two-dimensional file is
  [H, W, C] as it lies.

  The components of a pixel are channels; a fourth axis of at most MAX_CHANNELS is, too, a longer one is time, and so is
  an axis whose kind is time by NRRD's header.

  Raises:
    ValueError: damaged, truncated, or its pixels lie in several files or in one outside the header's folder.
    UserError: SimpleITK is not installed.
  """
  del options
  yield from _read(path, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  del options
  yield from _read(path, False)


def _read(path: str | os.PathLike, pixels: bool) -> Iterator[Record]:
  sitk = need('SimpleITK', 'medical')
  image, array, parts = _load(sitk, path, _check_header(pathlib.Path(path)), pixels)
  rank = image.GetDimension()
  record = {'subject': stem(path), 'source': 'itk', 'part': ''}
  if rank == 2:
    spacing = [float(s) for s in image.GetSpacing()[::-1]]
    yield record | {'image': array if parts > 1 else array[..., None], 'channels': _names(image, parts),
                    'spacing': spacing,
                    'meta': {'orientation': 'native'}}
    return
  if parts > 1 and rank == 4:
    raise ValueError(f'has {parts} components and a fourth axis: expected one of both')
  if parts > 1:
    array = array.transpose(2, 1, 0, 3)  # [z, y, x, c] -> [x, y, z, c]
  else:
    array = array.T if rank == 4 else array.T[..., None]  # [(t,) z, y, x] -> [x, y, z, t or 1]
  volume, where = to_ras(array, _affine(image))
  yield from _volumes(volume, record | where, parts, _names(image, parts), _is_time(image))


def _load(sitk, path: str | os.PathLike, name: str, pixels: bool):
  """The image (or its reader, without pixels), its pixels as an array [(t,) (z,) y, x (, c)], and components of one."""
  sitk.ProcessObject.SetGlobalWarningDisplay(False)
  reader = sitk.ImageFileReader()
  reader.SetImageIO(name)
  reader.SetFileName(os.fspath(path))
  try:
    reader.ReadImageInformation()
    size = reader.GetSize()
    depth = int((re.findall(r'\d+', sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())) or ['64'])[0]) // 8
    parts = reader.GetNumberOfComponents()
    check_size((*size, parts), np.dtype(f'u{depth}'))
    if not pixels:
      return reader, stand_in(*size[::-1], *([parts] if parts > 1 else [])), parts
    image = reader.Execute()
  except RuntimeError as e:
    last = str(e).strip().splitlines()[-1].strip()
    # MetaImage gives the system's last error as the reason, whatever went wrong.
    if last.startswith('Reason'):
      last = f'damaged or truncated: expected pixels of size {list(reader.GetSize())}'
    raise ValueError(f'SimpleITK: {last}') from e
  return image, sitk.GetArrayFromImage(image), parts


def _volumes(volume: np.ndarray, record: Record, parts: int, names: list[str], is_time: bool) -> Iterator[Record]:
  count = volume.shape[-1]
  if count == 1 or (count <= MAX_CHANNELS and not is_time):
    yield whole(volume, record | {'channels': names if parts > 1 else numbered(count)})
    return
  for t in range(count):
    meta = record['meta'] | {'notes': f'volume {t} of {count} in time'}
    yield whole(volume[..., t : t + 1], record | {'channels': numbered(1), 'part': f't{t:03d}', 'meta': meta})


def _is_time(image) -> bool:
  """Whether the last axis is time by NRRD's header; a ValueError where another one is."""
  kinds = [image.GetMetaData(k) if image.HasMetaDataKey(k) else '' for k in (
    f'NRRD_kinds[{i}]' for i in range(image.GetDimension()))]
  if 'time' in kinds[:-1]:
    raise ValueError(f'kinds are {", ".join(kinds)}: expected time, if there is such an axis, to be the last one')
  return len(kinds) == 4 and kinds[-1] == 'time'


def _names(image, parts: int) -> list[str]:
  """R, G, B of three unsigned components; vectors, such as displacements, are no colours."""
  colour = parts == 3 and 'unsigned' in _type(image)
  return ['R', 'G', 'B'] if colour else numbered(parts)


def _type(image) -> str:
  """ITK's words for the type of a component, of an image or of a reader that has its header."""
  import SimpleITK as sitk

  kind = image.GetPixelIDValue() if hasattr(image, 'GetPixelIDValue') else image.GetPixelID()
  return sitk.GetPixelIDValueAsString(kind)


def _affine(image) -> np.ndarray:
  """(x, y, z) -> RAS, mm. A fourth axis is left out."""
  rank = image.GetDimension()
  affine = np.eye(4)
  affine[:3, :3] = (np.reshape(image.GetDirection(), (rank, rank)) * image.GetSpacing())[:3, :3]
  affine[:3, 3] = image.GetOrigin()[:3]
  return from_lps(affine)


def _check_header(path: pathlib.Path) -> str:
  """The name of ITK's reader of this file. Refuses what that would not: a header may point at any file of the machine,
  and MetaImage's reader writes beyond its arrays when one tells of many axes."""
  with open(path, 'rb') as f:
    head = f.read(_HEAD)
  if head.startswith(b'NRRD'):
    head, end, _ = head.replace(b'\r\n', b'\n').partition(b'\n\n')  # pixels may follow
    if not end and len(head) >= _HEAD:
      raise ValueError(f'its header does not end within {_HEAD >> 10} KiB')
  elif not _DATA_FILE.search(head):
    raise ValueError(f'its header does not name its pixels within {_HEAD >> 10} KiB')
  for axes in _AXES.findall(head):
    if not 2 <= int(axes) <= 4:
      raise ValueError(f'has {int(axes)} axes: expected 2, 3 or 4')
  for field, told in _DECIMALS.findall(head):
    raise ValueError(f'{field.decode()} is {told.strip().decode("latin1")!r}: expected numbers with a decimal point')
  for name in _DATA_FILE.findall(head):
    _check_data_file(path, name.decode('utf-8', 'replace').strip())
  return 'NrrdImageIO' if head.startswith(b'NRRD') else 'MetaImageIO'


def _check_data_file(path: pathlib.Path, name: str) -> None:
  place = pathlib.PurePath(name.replace('\\', '/'))
  if place.is_absolute() or '..' in place.parts:
    raise ValueError(f'its pixels lie in {name}, outside the folder of the header')
  if name.upper().startswith('LIST') or '%' in name:
    raise ValueError('its pixels lie in several files: expected one')
  if name != 'LOCAL' and not (path.parent / place).exists():
    raise ValueError(f'its pixels lie in {name}, which is not there: expected that file beside the header')
  if (path.parent / place).is_symlink():
    raise ValueError(f'its pixels lie behind a link, {name}')
  if (path.parent / place).exists() and not (path.parent / place).is_file():
    raise ValueError(f'its pixels lie in {name}, which is no regular file')
