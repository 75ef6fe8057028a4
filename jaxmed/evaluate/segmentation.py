"""Every metric of one segmented case, class by class, and their means over cases and subjects.

What is counted where a class is not in both maps, so that nothing is silently dropped:

  outcome       Dice, IoU  NSD  HD95, ASSD, MASD            lesions
  both          value      value  value (mm)                value
  missed        0          0    diagonal of the image (mm)  sensitivity 0
  hallucinated  0          0    diagonal of the image (mm)  false positives
  absent        none       none none                        none

The counts of the four outcomes stand beside each mean. Other programs count otherwise: MONAI leaves out a class that
the truth lacks, predicted or not, and averages an HD95 of missed classes to 0; surface-distance gives infinity;
MetricsReloaded gives Dice 1 to two empty maps. Means are over cases, then over classes; intervals resample subjects.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import lesions, surface
from jaxmed.evaluate.metrics import resampled_means
from jaxmed.evaluate.overlap import OUTCOMES

LABELS = {'dice': 'Dice', 'iou': 'IoU', 'nsd': 'NSD', 'hd95': 'HD95', 'assd': 'ASSD', 'masd': 'MASD',
          'volume_difference': 'volume difference', 'volume_error': 'volume error', 'sensitivity': 'lesion sensitivity',
          'false_positives': 'false positives'}
SURFACE = ('nsd', 'hd95', 'assd', 'masd')
LESIONS = ('sensitivity', 'false_positives')
LOWER = ('hd95', 'assd', 'masd', 'volume_error', 'false_positives')  # the lower one is the better


@dataclasses.dataclass(frozen=True)
class Ask:
  """What is measured of a case.

  Attributes:
    tolerance: of NSD, in mm. surface: of `surface.KINDS`; '' measures no distances, which take most of the time.
    lesions: rule of `lesions.RULES`; '' looks at no components. least: smallest IoU of the rule 'iou'.
  """

  tolerance: float = 1.0
  surface: str = 'surfel'
  lesions: str = ''
  least: float = 0.1

  def __post_init__(self):
    choose('surface', self.surface, ('', *surface.KINDS))
    choose('lesion rule', self.lesions, ('', *lesions.RULES))
    if not 0 <= self.tolerance < float('inf'):
      raise UserError(f'tolerance of NSD is {self.tolerance}: expected mm, 0 or more')

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of what is measured, in the order of LABELS."""
    off = (() if self.surface else SURFACE) + (() if self.lesions else LESIONS)
    return tuple(m for m in LABELS if m not in off)


def case(truth: np.ndarray, predicted: np.ndarray, values: Sequence[int], spacing: Sequence[float],
         ask: Ask = Ask()) -> dict[str, np.ndarray]:
  """Every metric of a prediction for each class.

  Args:
    truth, predicted: integers [*size], 2 or 3 axes. Where the truth is negative nothing is counted: it belongs to no
      class in either map.
    values: the K classes by their values in both.
    spacing: mm along each axis; ones for pixels.
  Returns:
    {metric: [K] float64}, NaN where it does not exist, and 'outcome' [K], places in `overlap.OUTCOMES`.
    'volume_difference' is predicted minus true volume (mm^3, in 2D mm^2), 'volume_error' its size as a share of the
    true volume (NaN where that is 0), 'volume' and 'volume_predicted' are the volumes. Of lesions 'lesions' are counted
    too.
  Raises:
    UserError: grids that differ, or a spacing that does not suit them.
  """
  truth, predicted = np.asarray(truth), np.asarray(predicted)
  surface.check_grid(truth.shape, predicted.shape, spacing)
  known = truth >= 0
  rows = [_one(known & (truth == v), known & (predicted == v), spacing, ask) for v in values]
  return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def _one(truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], ask: Ask) -> dict[str, float]:
  """The metrics of one class, of two bool maps."""
  n, m, both = (int(np.count_nonzero(x)) for x in (truth, predicted, truth & predicted))
  outcome = OUTCOMES[0 if n and m else 1 if n else 2 if m else 3]
  nan, voxel = float('nan'), float(np.prod(spacing))
  out = {'outcome': OUTCOMES.index(outcome), 'dice': 2 * both / (n + m) if n + m else nan,
         'iou': both / (n + m - both) if n + m else nan, 'volume': n * voxel, 'volume_predicted': m * voxel,
         'volume_difference': (m - n) * voxel if n + m else nan, 'volume_error': abs(m - n) / n if n else nan}
  if ask.surface:
    out |= _surfaces(truth, predicted, spacing, ask, outcome)
  if ask.lesions:
    found = lesions.detect(truth, predicted, ask.lesions, ask.least)
    out |= {'sensitivity': found.sensitivity, 'false_positives': found.false_positives, 'lesions': len(found.found)}
  return out


def _surfaces(truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], ask: Ask,
              outcome: str) -> dict[str, float]:
  if outcome == 'absent':
    return dict.fromkeys(SURFACE, float('nan'))
  if outcome != 'both':
    return dict.fromkeys(SURFACE, surface.diagonal(truth.shape, spacing)) | {'nsd': 0.0}
  found = surface.distances(truth, predicted, spacing, ask.surface)
  return {'nsd': surface.nsd(found, ask.tolerance), 'hd95': surface.hausdorff(found), 'assd': surface.assd(found),
          'masd': surface.masd(found)}


def outcomes(cases: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Cases [K] of each outcome, of what `case` gave of N cases; the four add up to N."""
  found = np.stack([c['outcome'] for c in cases])
  return {name: (found == i).sum(axis=0) for i, name in enumerate(OUTCOMES)}


def by_class(cases: Sequence[Mapping[str, np.ndarray]], metric: str) -> np.ndarray:
  """The mean [K] of a metric over cases; NaN where no case says anything.

  Sensitivity is of all lesions of all cases together, so that a case counts by its lesions.
  """
  return _ratio(*_sums(cases, metric))


def score(cases: Sequence[Mapping[str, np.ndarray]], metric: str) -> float:
  """The mean over classes of `by_class`; NaN where no class says anything."""
  return float(_nanmean(by_class(cases, metric)[None])[0])


def resampled(cases: Sequence[Mapping[str, np.ndarray]], metric: str, subjects: Sequence[str] | np.ndarray, *,
              draws: int = 1000, seed: int = 0) -> np.ndarray:
  """`score` [draws] on resampled subjects, whose cases move together; NaN of a single subject."""
  total, count = (np.stack(x) for x in zip(*(_terms(c, metric) for c in cases), strict=True))
  ask = dict(draws=draws, seed=seed)
  return _nanmean(_ratio(resampled_means(total, subjects, **ask), resampled_means(count, subjects, **ask)))


def _sums(cases: Sequence[Mapping[str, np.ndarray]], metric: str) -> tuple[np.ndarray, np.ndarray]:
  return tuple(np.sum(x, axis=0) for x in zip(*(_terms(c, metric) for c in cases), strict=True))  # type: ignore


def _terms(one: Mapping[str, np.ndarray], metric: str) -> tuple[np.ndarray, np.ndarray]:
  """What a case adds to the numerator and the denominator [K] of a mean."""
  value = one[metric]
  weight = one['lesions'] if metric == 'sensitivity' else np.isfinite(value).astype(np.float64)
  return np.where(np.isfinite(value), value, 0) * weight, weight


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) > 0)


def _nanmean(x: np.ndarray) -> np.ndarray:
  """Means of rows without their NaN; NaN of nothing else."""
  there = ~np.isnan(x)
  return _ratio(np.where(there, x, 0).sum(axis=-1), there.sum(axis=-1))
