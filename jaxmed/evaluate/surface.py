"""Distances between the surfaces of two masks: HD95, NSD, ASSD and MASD of areas and of volumes, spacing included.

There are two definitions of a surface, which give different numbers, so that a table has to name the one that it used:

  'surfel'  pieces of a marching-cubes surface at the corners between voxels (in 2D pieces of a contour), each with its
            area in mm^2 (length in mm). google-deepmind/surface-distance: what "NSD" means in Nikolov et al., 2018, and
            in MONAI with use_subvoxels.
  'voxel'   voxels of the mask that an erosion by the face-connected element takes away, each counting once.
            MetricsReloaded (Maier-Hein et al., 2024) and MONAI's default. What lies at the end of the image is surface,
            so that all voxels of a volume of one slice are.

Masks are bool [*size] of 2 or 3 axes, spacings mm along these axes. Everything is of NumPy and SciPy, on the host.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from jaxmed.errors import UserError, choose

KINDS = ('surfel', 'voxel')
_Facets = tuple[tuple[float, ...], ...]
# Of each way in which 2^rank neighbours can be in a mask, one example: bit i of the code is the corner whose place in
# the last axes is written by the bits of 2^rank - 1 - i. A facet is the normal of a flat piece of the surface, as long
# as its area, in units of the voxel; only sizes of its entries matter. The other ways are these turned, mirrored, or
# with inside and outside exchanged. The areas are those of surface-distance:surface_distance/lookup_tables.py.
_CORNERS: Mapping[int, Mapping[int, _Facets]] = {
  2: {0: (), 1: ((1 / 2,) * 2,), 3: ((1, 0),), 6: ((1, 1),)},
  3: {0: (), 1: ((1 / 8,) * 3,), 3: ((1 / 2, 1 / 2, 0),), 6: ((1 / 4,) * 3,), 7: ((1 / 2, 0, 0), (3 / 8,) * 3),
      15: ((1, 0, 0),), 22: ((3 / 8,) * 3,), 23: ((3 / 4,) * 3,), 24: ((1 / 4,) * 3,),
      25: ((0, 1 / 2, 1 / 2), (1 / 8,) * 3), 27: ((1 / 2,) * 3, (0, 1 / 4, 1 / 4), (1 / 4, 0, 1 / 4)),
      30: ((1 / 2, 0, 0), (1 / 2,) * 3), 60: ((1, 1, 0),), 105: ((1 / 2,) * 3,)},
}


@dataclasses.dataclass(frozen=True)
class Distances:
  """From each piece of one surface to the nearest piece of the other one.

  Attributes:
    kind: of KINDS.
    truth: [n] mm, from the surface of the truth to that of the prediction; inf where there is none.
    predicted: [m] mm, the other way round.
    truth_area, predicted_area: [n], [m], area of each piece (mm^2, in 2D mm), or 1 for each voxel.
  """

  kind: str
  truth: np.ndarray
  predicted: np.ndarray
  truth_area: np.ndarray
  predicted_area: np.ndarray


def distances(truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], kind: str = 'surfel') -> Distances:
  """The distances between the surfaces of two masks [*size] of bool.

  Args:
    spacing: mm along each axis; ones for distances in pixels.
    kind: what a surface is, see the module.
  Raises:
    UserError: masks of different grids or of other than 2 or 3 axes, or a spacing that does not suit them.
  """
  choose('surface', kind, KINDS)
  truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
  check_grid(truth.shape, predicted.shape, spacing)
  box = _box(truth | predicted)
  surfaces, areas = [], []
  for mask in (truth, predicted):
    mask = np.pad(mask[box], 1)
    surface, area = _surfels(mask, spacing) if kind == 'surfel' else _border(mask)
    surfaces.append(surface)
    areas.append(area)
  return Distances(kind, _from(surfaces[0], surfaces[1], spacing), _from(surfaces[1], surfaces[0], spacing), *areas)


def check_grid(truth: Sequence[int], predicted: Sequence[int], spacing: Sequence[float]) -> None:
  """A UserError where two grids and a spacing do not fit each other."""
  words = lambda size: 'x'.join(map(str, size))
  if tuple(truth) != tuple(predicted):
    raise UserError(f'a mask of {words(truth)} and a prediction of {words(predicted)}; expected the same grid')
  if len(truth) not in _CORNERS:
    raise UserError(f'a mask of {words(truth)} has {len(truth)} axes; expected 2 or 3')
  if len(spacing) != len(truth) or not all(0 < s < float('inf') for s in spacing):
    raise UserError(f'spacing {", ".join(f"{s:g}" for s in spacing)} of a mask of {words(truth)}; expected '
                    f'{len(truth)} numbers of mm above 0')


def hausdorff(found: Distances, percent: float = 95.0) -> float:
  """The percentile of the distances, the larger one of both directions (mm); 100 gives the Hausdorff distance.

  Of surfels the share of the area, without interpolation (surface-distance); of voxels `np.percentile`, linear between
  ranks (MetricsReloaded, MONAI). Percentiles of both directions pooled, as of medpy's hd95, are smaller numbers.
  """
  sides = ((found.truth, found.truth_area), (found.predicted, found.predicted_area))
  if not all(len(d) for d, _ in sides):
    return float('nan') if not any(len(d) for d, _ in sides) else float('inf')
  if found.kind == 'voxel':
    return max(float(np.percentile(d, percent)) for d, _ in sides)
  return max(_percentile(d, area, percent) for d, area in sides)


def nsd(found: Distances, tolerance: float) -> float:
  """Normalised surface distance: share of both surfaces within `tolerance` mm of the other one, 0 to 1.

  Of two empty masks NaN, of one 0. Nikolov et al., 2018 (arXiv 1809.04430).
  """
  area = found.truth_area.sum() + found.predicted_area.sum()
  near = found.truth_area[found.truth <= tolerance].sum() + found.predicted_area[found.predicted <= tolerance].sum()
  return float(near / area) if area else float('nan')


def directed(found: Distances) -> tuple[float, float]:
  """Mean distance (mm) from the truth to the prediction, and from the prediction to the truth, weighted by area."""
  mean = lambda d, area: float((d * area).sum() / area.sum()) if len(d) else float('nan')
  return mean(found.truth, found.truth_area), mean(found.predicted, found.predicted_area)


def masd(found: Distances) -> float:
  """Mean average surface distance (mm): the mean of the two directed means."""
  return float(np.mean(directed(found)))


def assd(found: Distances) -> float:
  """Average symmetric surface distance (mm): the mean over the pieces of both surfaces together, weighted by area."""
  area = found.truth_area.sum() + found.predicted_area.sum()
  total = (found.truth * found.truth_area).sum() + (found.predicted * found.predicted_area).sum()
  return float(total / area) if area else float('nan')


def diagonal(size: Sequence[int], spacing: Sequence[float]) -> float:
  """The length of the diagonal of an image (mm): what stands for a distance of which one surface does not exist.

  The challenges of BraTS count 373.13 for 240 x 240 x 155 voxels of 1 mm in this way.
  """
  return float(np.linalg.norm(np.asarray(size, float) * np.asarray(spacing, float)))


def _from(surface: np.ndarray, other: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
  """The distance [n] of each piece of a surface to the nearest one of the other; both are bool maps of a grid."""
  if not other.any():
    return np.full(int(surface.sum()), np.inf)
  return ndimage.distance_transform_edt(~other, sampling=spacing)[surface]


def _border(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The voxels of a mask that have a neighbour outside, as a map, and ones."""
  border = mask & ~ndimage.binary_erosion(mask)
  return border, np.ones(int(border.sum()))


def _surfels(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  """The corners between voxels that a surface passes, as a map [*size - 1], and the area at each."""
  rank = mask.ndim
  code = np.zeros([n - 1 for n in mask.shape], np.uint8)
  for bit, place in enumerate(itertools.product((1, 0), repeat=rank)):
    code |= mask[tuple(slice(p, p + n) for p, n in zip(place, code.shape))].astype(np.uint8) << bit
  surface = (code > 0) & (code < 2 ** 2**rank - 1)
  return surface, _areas(tuple(float(s) for s in spacing))[code[surface]]


@functools.lru_cache(maxsize=64)
def _areas(spacing: tuple[float, ...]) -> np.ndarray:
  """The area [2 ** 2 ** rank] of the surface at a corner for each code of its neighbours."""
  rank = len(spacing)
  scale = np.prod(spacing) / np.array(spacing)  # a facet across an axis spans the other ones
  bits = np.arange(2**rank).reshape((2,) * rank)[(slice(None, None, -1),) * rank]
  out = np.zeros(2 ** 2**rank)
  for example, facets in _CORNERS[rank].items():
    inside = (example >> bits) & 1
    for axes in itertools.permutations(range(rank)):
      area = sum(float(np.linalg.norm(np.array(facet)[list(axes)] * scale)) for facet in facets)
      for mirrored in itertools.product((1, -1), repeat=rank):
        code = int((inside.transpose(axes)[tuple(slice(None, None, m) for m in mirrored)] << bits).sum())
        out[[code, 2 ** 2**rank - 1 - code]] = area
  return out


def _percentile(d: np.ndarray, area: np.ndarray, percent: float) -> float:
  """The distance that a share of the area does not exceed."""
  order = np.argsort(d, kind='stable')
  share = np.cumsum(area[order]) / area.sum()
  return float(d[order[min(int(np.searchsorted(share, percent / 100)), len(d) - 1)]])


def _box(mask: np.ndarray) -> tuple[slice, ...]:
  """The smallest box around a mask; an empty one where there is nothing."""
  out = []
  for axis in range(mask.ndim):
    places = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
    out.append(slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0))
  return tuple(out)
