"""ND2 of Nikon microscopes by the package nd2: positions, channels, planes and times."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed.data.readers.tiff import arrange, records
from jaxmed.data.readers.types import DEFAULT, Options, Record, check_size, numbered, stand_in, stem
from jaxmed.errors import need

_AXES = 'TPZCYXS'


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the images of a file as a TIFF's (see readers.tiff); each position of the stage is a part 's00' ... where
  there are several.

  Raises:
    ValueError: damaged, or axes of another kind; nd2 raises its own errors.
    UserError: nd2 is not installed.
  """
  yield from _read(path, options, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  yield from _read(path, options, False)


def _read(path: str | os.PathLike, options: Options, pixels: bool) -> Iterator[Record]:
  nd2 = need('nd2', 'microscopes')
  with nd2.ND2File(os.fspath(path)) as file:
    sizes = dict(file.sizes)
    if set(sizes) - set(_AXES) or not {'Y', 'X'} <= set(sizes):
      raise ValueError(f'axes {"".join(sizes)} are not those of an image')
    axes = ''.join(a for a in sizes if a != 'P')
    check_size([sizes[a] for a in axes], file.dtype)
    colour = sizes.get('S', 1) == 3 and sizes.get('C', 1) == 1
    record: Record
    for position in range(sizes.get('P', 1)):
      array = _position(file, position if 'P' in sizes else None) if pixels else stand_in(*(sizes[a] for a in axes))
      volumes = arrange(array, axes)
      record = {'subject': stem(path), 'source': 'nd2', 'part': f's{position:02d}' if sizes.get('P', 1) > 1 else '',
                'spacing': _spacing(file), 'meta': {'orientation': 'native'}}
      record['channels'] = ['R', 'G', 'B'] if colour else _names(file, volumes.shape[-1])
      yield from records(volumes, axes, record, options)


def _position(file: Any, position: int | None) -> np.ndarray:
  """The pixels of a position; nd2 leaves a frame that the file lacks blank, here it is an error."""
  chunks = getattr(getattr(file, '_rdr', None), 'chunkmap', None)  # legacy files have none
  for index in range(int(file.attributes.sequenceCount or 0)):
    if chunks and f'ImageDataSeq|{index}!'.encode() not in chunks:
      raise ValueError(f'lacks frame {index}')
  return file.asarray(position=position)


def _spacing(file: Any) -> list[float | None] | None:
  """mm along z, y, x (z None where unknown)."""
  channels = file.metadata.channels or []
  if not channels or not all(channels[0].volume.axesCalibrated[:2]):
    return None
  x, y, z = channels[0].volume.axesCalibration
  return [z / 1e3 if z > 0 and channels[0].volume.axesCalibrated[2] else None, y / 1e3, x / 1e3]


def _names(file: Any, count: int) -> list[str]:
  names = [str(c.channel.name or '') for c in file.metadata.channels or []]
  return names if len(names) == count == len(set(names)) and all(names) else numbered(count)
