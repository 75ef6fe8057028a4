"""Detection of single lesions: connected components of a mask found, missed or made up by a prediction.

Components touch by faces, edges or corners (26 neighbours of a voxel, 8 of a pixel), as in nnDetection and the
challenges of lesions; `connectivity=1` asks for faces. Two rules say when a lesion counts as found:

  'touch'  any of its voxels is predicted. A predicted component is a false positive where it has no voxel of any
           lesion. One component may find several lesions, and several may find one, without a penalty.
  'iou'    one predicted component is its partner, with an intersection over union of at least `least`. Partners are
           chosen for the largest number of lesions found, then for the largest sum of IoU; all other predicted
           components are false positives. MetricsReloaded (Maier-Hein et al., 2024) calls this optimal matching.
"""

import dataclasses

import numpy as np
from scipy import ndimage, optimize

from jaxmed.errors import UserError, choose
from jaxmed.evaluate.surface import check_grid

RULES = ('touch', 'iou')


@dataclasses.dataclass(frozen=True)
class Detection:
  """Of one case: found [n] says of each lesion whether it was found; voxels [n] is their size; false_positives counts
  predicted components without a lesion, and components all of them."""

  found: np.ndarray
  voxels: np.ndarray
  false_positives: int
  components: int

  @property
  def sensitivity(self) -> float:
    """Share of the lesions that were found; NaN without any."""
    return float(self.found.mean()) if len(self.found) else float('nan')


def detect(truth: np.ndarray, predicted: np.ndarray, rule: str = 'touch', least: float = 0.1,
           connectivity: int | None = None) -> Detection:
  """Which lesions of a mask [*size] bool a prediction [*size] bool finds.

  Args:
    rule: of RULES, see the module. least: smallest IoU of partners, above 0; of no effect for 'touch'.
    connectivity: how many axes a step between neighbours may change; by default all.
  Raises:
    UserError: masks of different grids, an unknown rule, or a `least` outside of 0 to 1.
  """
  choose('lesion rule', rule, RULES)
  if not 0 < least <= 1:
    raise UserError(f'smallest IoU of lesions is {least}: expected a number above 0, 1 at most')
  truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
  check_grid(truth.shape, predicted.shape, (1,) * truth.ndim)
  (lesions, n), (found, m) = components(truth, connectivity), components(predicted, connectivity)
  both = truth & predicted
  shared = np.bincount((lesions[both] - 1).astype(np.int64) * m + found[both] - 1, minlength=n * m).reshape(n, m)
  voxels, sizes = (np.bincount(x[x > 0], minlength=k + 1)[1:] for x, k in ((lesions, n), (found, m)))
  if rule == 'touch':
    hits = shared > 0
    return Detection(np.asarray(hits.any(axis=1)), voxels, int(m - hits.any(axis=0).sum()), m)
  rows, columns = _partners(shared / np.maximum(voxels[:, None] + sizes - shared, 1), least)
  return Detection(np.isin(np.arange(n), rows), voxels, m - len(columns), m)


def components(mask: np.ndarray, connectivity: int | None = None) -> tuple[np.ndarray, int]:
  """The number of its component, from 1, at each voxel of a mask (0 outside), and how many there are."""
  structure = ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim)
  labels, count = ndimage.label(mask, structure)
  return labels, int(count)


def largest(mask: np.ndarray, connectivity: int | None = None) -> np.ndarray:
  """The largest component of a mask, of equal ones the first; the mask itself where it has one or none."""
  labels, count = components(mask, connectivity)
  return mask if count < 2 else labels == 1 + int(np.bincount(labels[labels > 0])[1:].argmax())


def _partners(iou: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
  """Rows and columns of the pairs of an IoU table [n, m], each row and column in one at most."""
  value = np.where(iou >= least, 1 + min(iou.shape, default=0) + iou, 0)  # a pair more outweighs any sum of IoU
  rows, columns = optimize.linear_sum_assignment(value, maximize=True)
  kept = iou[rows, columns] >= least
  return rows[kept], columns[kept]
