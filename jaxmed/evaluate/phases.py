"""Accuracy, precision, recall and Jaccard of the phases of videos, strict and with relaxed boundaries.

Papers differ in how they aggregate more than in their models, so every score names its aggregation, of BY:

  'phase'   each video by itself, its precision, recall and Jaccard clipped at 1; a phase's mean over the videos that
            have it; the mean over phases. The deviation is over phases, that of accuracy over videos. The published
            tables of Cholec80 (YuemingJin/TMRNet, code/eval/result/matlab-eval/Main.m).
  'video'   the mean over the phases of a video, then over videos; the deviation is over videos.
  'pooled'  frames of all videos together, then the mean over phases; the deviation is over phases.

A phase that the truth of a video lacks says nothing there, as published: frames wrongly given to it lower the other
phases alone. A phase that is never predicted has no precision and leaves that mean, which is optimistic.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate.overlap import mean
from jaxmed.evaluate.segments import segments

METRICS = ('accuracy', 'precision', 'recall', 'jaccard')
BY = ('phase', 'video', 'pooled')
COMPAT = ('', 'tmrnet')


@dataclasses.dataclass(frozen=True)
class Relaxation:
  """Which errors near the border of a phase are accepted (YuemingJin/TMRNet, matlab-eval/Evaluate.m).

  In the first `frames` of a run of a phase in the truth, predictions of an earlier phase are accepted where the place
  of the predicted phase minus that of the true one is in `late` (the transition is predicted late); in the last
  `frames` those in `early`. A shorter run has both borders all over it. Places are those of `classes`: another order of
  the same phases is another metric.

  Attributes:
    frames: 10 s, as published, are 10 at one frame a second.
    late, early: accepted differences of phases that `late_of` and `early_of` do not name.
    late_of, early_of: {place of a phase from 0: accepted differences}. The defaults are those of Cholec80, its phases
      in the order Preparation, CalotTriangleDissection, ClippingCutting, GallbladderDissection, GallbladderPackaging,
      CleaningCoagulation, GallbladderRetraction.
  """

  frames: int = 10
  late: tuple[int, ...] = (-1,)
  early: tuple[int, ...] = (1,)
  late_of: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=lambda: {5: (-1, -2), 6: (-1, -2)})
  early_of: Mapping[int, tuple[int, ...]] = dataclasses.field(
      default_factory=lambda: {place: (1, 2) for place in (3, 4, 5, 6)})

  def __post_init__(self):
    if self.frames < 0:
      raise UserError(f'relaxed boundaries of {self.frames} frames: expected 0 or more')


# Of M2CAI16 (the same rules in its script, matlab-eval, for 8 phases): TrocarPlacement, then Preparation,
# CalotTriangleDissection, ClippingCutting, GallbladderDissection, GallbladderPackaging, CleaningCoagulation,
# GallbladderRetraction.
M2CAI16 = Relaxation(late_of={6: (-1, -2), 7: (-1, -2)}, early_of={place: (1, 2) for place in (4, 5, 6, 7)})


@dataclasses.dataclass(frozen=True)
class Counts:
  """Frames of one video, float64 [K] by phase: `hits` are those of `union` (true or predicted as the phase) that are
  right or accepted, `truth` and `predicted` those of either. `right` of all `frames` are right or accepted."""

  hits: np.ndarray
  union: np.ndarray
  truth: np.ndarray
  predicted: np.ndarray
  right: float
  frames: float

  def metrics(self, clip: bool = True) -> dict[str, np.ndarray]:
    """{metric: [K], accuracy: []}; NaN where the truth lacks a phase, and of precision where it is never predicted.

    Accepted frames of neighbours count as hits of a phase without being frames of it, so that relaxed precision and
    recall exceed 1, as published, where they are not clipped.
    """
    some = self.truth > 0
    out = {name: np.divide(self.hits, below, out=np.full(len(some), np.nan), where=some & (below > 0))
           for name, below in (('precision', self.predicted), ('recall', self.truth), ('jaccard', self.union))}
    out = {name: np.minimum(value, 1.0) for name, value in out.items()} if clip else out
    return {'accuracy': np.asarray(self.right / self.frames if self.frames else np.nan), **out}


def counts(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[int],
           relaxation: Relaxation | None = None, compat: str = '') -> Counts:
  """The counts of one video.

  Args:
    truth, predicted: integers [T], a frame each. Frames whose truth is negative are left out.
    classes: the K phases by their values, in the order of the workflow.
    relaxation: None for the strict metric.
    compat: 'tmrnet' accepts what the published script does: it tests the last frames of a run for early transitions
      and accepts the first ones instead, so that early transitions are punished and errors at the start forgiven.
  Raises:
    UserError: arrays that do not match, or a true phase that `classes` lacks.
  """
  choose('compat', compat, COMPAT)
  truth, predicted = np.asarray(truth), np.asarray(predicted)
  if truth.shape != predicted.shape or truth.ndim != 1:
    raise UserError(f'phases: truth {truth.shape} and prediction {predicted.shape}; expected two rows of one length')
  known, order = truth >= 0, np.asarray(classes)
  truth, predicted = truth[known], predicted[known]
  if strange := sorted(set(truth.tolist()) - set(order.tolist())):
    raise UserError(f'phases: the truth has {strange[0]}, which is none of the classes {order.tolist()}')
  away = 10 * len(order) + 10  # the place of a predicted value that is no class: no difference accepts it
  place = {value: i for i, value in enumerate(order.tolist())}
  pairs = zip(truth.tolist(), predicted.tolist(), strict=True)
  difference = np.array([place.get(p, away) - place[t] for t, p in pairs], np.int64)
  if relaxation is not None:
    for value, begin, end in zip(*segments(truth), strict=True):
      _accept(difference[begin:end], place[int(value)], relaxation, compat)
  ok = difference == 0
  is_true, is_predicted = truth[:, None] == order, predicted[:, None] == order  # [T, K]
  union = is_true | is_predicted
  total = lambda x: x.sum(axis=0).astype(np.float64)
  return Counts(total(union & ok[:, None]), total(union), total(is_true), total(is_predicted), float(ok.sum()),
                float(len(ok)))


def _accept(run: np.ndarray, place: int, relaxation: Relaxation, compat: str) -> None:
  """Sets accepted differences of a run of one phase to 0, in place."""
  t = min(relaxation.frames, len(run))
  if not t:
    return
  late = relaxation.late_of.get(place, relaxation.late)
  early = relaxation.early_of.get(place, relaxation.early)
  run[:t][np.isin(run[:t], late)] = 0
  accepted = np.isin(run[-t:], early)
  (run[:t] if compat == 'tmrnet' else run[-t:])[accepted] = 0


def score(videos: Sequence[Counts], by: str = 'phase') -> dict[str, dict[str, Any]]:
  """{metric: {'value', 'deviation', 'of'}} of the counts of videos; 'of' is what the deviation (N - 1) is over.

  Args:
    by: of BY, see the module.
  Raises:
    UserError: no video, or an unknown aggregation.
  """
  choose('aggregation of phases', by, BY)
  if not videos:
    raise UserError('phases: no video; expected the counts of one or more')
  if by == 'pooled':
    total = Counts(*(np.sum([getattr(v, f.name) for v in videos], axis=0) for f in dataclasses.fields(Counts)))
    return {m: _summary(np.atleast_1d(x), 'phases') for m, x in total.metrics().items()}
  each: dict[str, np.ndarray] = {m: np.stack([v.metrics()[m] for v in videos]) for m in METRICS}
  out = {'accuracy': _summary(each['accuracy'], 'videos')}
  for m in METRICS[1:]:
    out[m] = _summary(mean(each[m], 0 if by == 'phase' else 1), 'phases' if by == 'phase' else 'videos')
  return out


def _summary(values: np.ndarray, of: str) -> dict[str, Any]:
  there = values[~np.isnan(values)]
  return {'value': float(there.mean()) if len(there) else float('nan'),
          'deviation': float(there.std(ddof=1)) if len(there) > 1 else float('nan'), 'of': of}
