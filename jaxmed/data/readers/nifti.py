"""NIfTI by nibabel, turned to RAS: whole volumes or axial slices."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed.data.readers import DEFAULT, MAX_CHANNELS, Options, Record, check_size, cut, numbered, stem

_TO_MM = {'meter': 1e3, 'mm': 1.0, 'micron': 1e-3, 'unknown': 1.0}


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields a volume [D, H, W, C] ('whole') or its axial planes [H, W, C] ('slices').

  The axes are turned to the closest RAS axes and stored as [z, y, x]: the index grows towards superior,
  anterior and right. Spacing is mm in that order. A fourth axis of at most MAX_CHANNELS is channels. Integers
  without a scale stay as stored; with one they become float32.

  Raises:
    nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError: damaged or truncated, not 3D or 4D.
  """
  import nibabel

  image: Any = nibabel.load(path)
  shape = tuple(n for i, n in enumerate(image.shape) if i < 3 or n > 1)  # drop trailing axes of length one
  if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] > MAX_CHANNELS):
    raise ValueError(f'shape {list(image.shape)}: expected a volume [X, Y, Z] with at most {MAX_CHANNELS} '
                     'channels')
  check_size(shape, image.get_data_dtype())
  array = _pixels(image).reshape(*shape[:3], -1)
  to_ras = nibabel.orientations.io_orientation(image.affine)
  array = nibabel.orientations.apply_orientation(array, to_ras)
  # apply_orientation moves axis i of the file to axis to_ras[i, 0]; the zooms follow.
  zooms = np.empty(3)
  zooms[to_ras[:, 0].astype(int)] = image.header.get_zooms()[:3]
  scale = _TO_MM[image.header.get_xyzt_units()[0]]
  volume = array.transpose(2, 1, 0, 3)  # [X, Y, Z, C] -> [Z, Y, X, C]
  record = {'channels': numbered(volume.shape[-1]), 'spacing': [float(s) * scale for s in zooms[::-1]],
            'subject': stem(path), 'source': 'nifti', 'part': ''}
  yield from cut(volume, record, options)


def _pixels(image) -> np.ndarray:
  data = np.asanyarray(image.dataobj)
  return data.astype(np.float32) if data.dtype.kind == 'f' else data
