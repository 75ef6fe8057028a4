"""What a mask says of each structure: its volume, the mean intensity in it, and whether it may be cut off.

TotalSegmentator (totalsegmentator/statistics.py) reports the same numbers on the same grid, that of the image as it is
stored. It gives 0 for a structure that touches the end of the image, as for one that is absent; here its numbers stay
and a column says so.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

BORDER = 3  # voxels from the end of an axis that count as touching it, as TotalSegmentator counts them
HEAD = ('name', 'value', 'structure', 'voxels', 'volume_mm3', 'touches_border')


def head(channels: Sequence[str]) -> list[str]:
  """The columns of a table: HEAD, and a mean intensity for each channel."""
  return [*HEAD, *(f'mean_{name}' for name in channels)]


def rows(name: str, mask: np.ndarray, record: dict[str, Any], values: Sequence[int], names: Sequence[str],
         channels: Sequence[str]) -> list[list[Any]]:
  """A row for each class but the background (0) of a mask [*size] on the grid of its image, see `head`.

  Volumes are in mm^3 (of a 2D image mm^2), '' where the spacing is unknown; intensities are as stored, '' where there
  is nothing. An axis too short to have a middle says nothing of borders.
  """
  voxel = float(np.prod(record['spacing'])) if record['spacing'] else None
  edge = np.ones(mask.shape, bool)
  edge[tuple(slice(BORDER, -BORDER) if n > 2 * BORDER else slice(None) for n in mask.shape)] = False
  out = []
  for value, word in zip(values, names, strict=True):
    if value == 0:
      continue
    inside = mask == value
    count = int(np.count_nonzero(inside))
    means = {c: f'{record["image"][..., i][inside].mean(dtype=np.float64):.6g}' for i, c in enumerate(
      record['channels'])} if count else {}
    out.append([name, value, word, count, '' if voxel is None else f'{count * voxel:.6g}', int((inside & edge).any()),
                *(means.get(c, '') for c in channels)])
  return out
