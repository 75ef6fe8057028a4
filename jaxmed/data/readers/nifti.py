"""NIfTI by nibabel, turned to RAS."""

import os
from collections.abc import Callable, Iterator
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

_TO_MM = {'meter': 1e3, 'mm': 1.0, 'micron': 1e-3, 'unknown': 1.0}
_TO_SECONDS = {'sec': 1.0, 'msec': 1e-3, 'usec': 1e-6, 'unknown': 1.0}


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the volumes [D, H, W, C] of a file.

  The axes are turned to the closest RAS axes and stored as [z, y, x]: the index grows towards superior,
  anterior and right. Spacing is mm in that order. A fourth axis of at most MAX_CHANNELS is channels, a longer one is
  time: each of its volumes is read as a part 't000', 't001' .... Integers without a scale stay as stored; with one
  they become float32.

  Raises:
    nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError: damaged or truncated, not 3D or 4D.
  """
  del options
  yield from _read(path, _pixels)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  del options
  yield from _read(path, lambda image: stand_in(*image.shape))


def _read(path: str | os.PathLike, pixels: Callable[[Any], np.ndarray]) -> Iterator[Record]:
  import nibabel

  image: Any = nibabel.load(path)
  shape = tuple(n for i, n in enumerate(image.shape) if i < 3 or n > 1)  # drop trailing axes of length one
  if len(shape) not in (3, 4):
    raise ValueError(f'shape {list(image.shape)}: expected a volume [X, Y, Z] or [X, Y, Z, channels or time]')
  check_size(shape, image.get_data_dtype())
  space, time = image.header.get_xyzt_units()
  affine = np.diag([_TO_MM[space]] * 3 + [1.0]) @ image.affine
  volume, where = to_ras(pixels(image).reshape(*shape[:3], -1), affine)
  # Zooms and affine may differ in files of some writers: spacing stays what the header calls it.
  zooms = np.empty(3)
  zooms[nibabel.orientations.io_orientation(image.affine)[:, 0].astype(int)] = image.header.get_zooms()[:3]
  where['spacing'] = [float(s) * _TO_MM[space] for s in zooms[::-1]]
  record = where | {'subject': stem(path), 'source': 'nifti', 'part': ''}
  count = volume.shape[-1]
  if count <= MAX_CHANNELS:
    yield whole(volume, record | {'channels': numbered(count)})
    return
  step = float(image.header.get_zooms()[3]) * _TO_SECONDS.get(time, 0.0) if len(image.header.get_zooms()) > 3 else 0.0
  for t in range(count):
    meta = where['meta'] | {'notes': f'volume {t} of {count} in time'} | ({'frame_seconds': t * step} if step else {})
    yield whole(volume[..., t : t + 1], record | {'channels': numbered(1), 'part': f't{t:03d}', 'meta': meta})


def _pixels(image) -> np.ndarray:
  data = np.asanyarray(image.dataobj)
  return data.astype(np.float32) if data.dtype.kind == 'f' else data
