"""Whole slides in DICOM (PS3.3 A.32.8): a file a level, whose frames are the tiles of one large matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.data.readers.dicom_headers import frame_count, frame_values
from jaxmed.data.readers.dicom_pixels import decode
from jaxmed.data.readers.slide import Level, Slide
from jaxmed.data.readers.types import check_size


def open_slide(levels: Sequence[Any], meta: dict[str, Any]) -> Slide:
  """A slide from the data sets of its levels, the finest first; the tiles are decoded when a region is read.

  Raises:
    ValueError: several optical paths or focal planes, or no pixel spacing.
  """
  finest = levels[0]
  for name in ('NumberOfOpticalPaths', 'TotalPixelMatrixFocalPlanes'):
    if any(int(data.get(name) or 1) > 1 for data in levels):
      raise ValueError(f'a slide with {name} above 1 is not read')
  spacing = frame_values(finest, 0)('PixelSpacing')
  if not spacing or not min(spacing) > 0:
    raise ValueError('does not say how large its pixels are: no tiles of a stated resolution can be cut')
  names = ('R', 'G', 'B') if int(finest.SamplesPerPixel) == 3 else ('gray',)
  return Slide(tuple(_level(data) for data in levels), (float(spacing[0]) * 1e3, float(spacing[1]) * 1e3), names, meta)


def _level(data: Any) -> Level:
  height, width = int(data.TotalPixelMatrixRows), int(data.TotalPixelMatrixColumns)
  rows, columns = int(data.Rows), int(data.Columns)
  frames = _frames(data, -(-width // columns))

  def read_box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    top, left, bottom, right = y0 // rows, x0 // columns, -(-y1 // rows), -(-x1 // columns)  # in tiles
    shape = ((bottom - top) * rows, (right - left) * columns, int(data.SamplesPerPixel))
    dtype = np.dtype(f'u{int(data.BitsAllocated) // 8}')
    check_size(shape, dtype)
    # What has no tile was not scanned: white in colour, dark in fluorescence.
    out = np.full(shape, 255 if shape[2] == 3 else 0, dtype)
    for r in range(top, bottom):
      for c in range(left, right):
        if (r, c) in frames:
          y, x = (r - top) * rows, (c - left) * columns
          out[y : y + rows, x : x + columns] = decode(data, frames[r, c])[0]
    return out[y0 - top * rows : min(y1, height) - top * rows, x0 - left * columns : min(x1, width) - left * columns]
  return Level((height, width), read_box)


def _frames(data: Any, across: int) -> dict[tuple[int, int], int]:
  """{(row, column) of a tile: its frame}: row by row, or as each frame says.

  Raises:
    ValueError: tiles that do not lie on one grid.
  """
  if str(data.get('DimensionOrganizationType') or '') == 'TILED_FULL' or 'PerFrameFunctionalGroupsSequence' not in data:
    return {divmod(i, across): i for i in range(frame_count(data))}
  found = {}
  for i in range(frame_count(data)):
    value = frame_values(data, i)
    y, x = (int(value(f'{a}PositionInTotalImagePixelMatrix')) - 1 for a in ('Row', 'Column'))
    if y % int(data.Rows) or x % int(data.Columns):
      raise ValueError(f'tile {i} lies at row {y}, column {x}: not on a grid of tiles')
    found[y // int(data.Rows), x // int(data.Columns)] = i
  return found
