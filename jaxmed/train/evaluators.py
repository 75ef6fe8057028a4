"""What looks at a run while it trains, by name: its held-out loss, the health of its features, two probes of labels.

An evaluator is a frozen dataclass, see `contracts.Evaluator`; its field `every` is the number of steps between looks.
EVALUATORS has them by name, and takes an own one like any other: `EVALUATORS['mine'] = Mine`. The config key
`evaluators` names those of a run, each maybe with its steps: 'loss,health,knn:500'. Without it a run has all those that
its corpus and method can serve.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.contracts import Evaluator
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics, overlap, phases, probes, regression, segments
from jaxmed.train import verdict

HEALTH = 'health'  # what tells collapse, see `monitor.watch`


@dataclasses.dataclass(frozen=True)
class Health:
  """Whether features tell images apart, on held-out images or, without any, on training ones."""

  every: int

  needs: ClassVar[str] = 'a method with features, and two records for each device'

  def wants(self, probe: Any) -> bool:
    """Whether the method has features."""
    return bool(probe.feature) and probe.health_rows > 1

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """What `evaluate.health.measure` gives."""
    return snapshot.probe.health(snapshot.state)


@dataclasses.dataclass(frozen=True)
class Loss:
  """The method's loss on held-out records, with the same views and masks each time."""

  every: int

  needs: ClassVar[str] = 'records of split val'

  def wants(self, probe: Any) -> bool:
    """Whether the corpus has held-out records."""
    return len(probe.val) > 0

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """{'val_loss'}."""
    return {'val_loss': snapshot.probe.held_out(snapshot.state)}


@dataclasses.dataclass(frozen=True)
class _Labels:
  """Base of the probes of `loader.label`: fitted on split train, judged on split val."""

  every: int

  needs: ClassVar[str] = 'a method with features, loader.label, and labelled records of splits train and val'
  name: ClassVar[str]
  scores: ClassVar[Callable[..., np.ndarray]]

  def wants(self, probe: Any) -> bool:
    """Whether the method has features and both splits have labels."""
    return bool(probe.feature) and all(len(part) for part in probe.labelled)

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """The accuracy, under the name of the probe."""
    train_x, train_y, val_x, val_y, classes = snapshot.labelled
    scores = type(self).scores(train_x, train_y, val_x, classes)
    return {self.name: float((scores.argmax(axis=1) == val_y).mean())}


class KNN(_Labels):
  """Accuracy of weighted nearest neighbours."""

  name = 'knn'
  scores = staticmethod(probes.knn)


class Ridge(_Labels):
  """Accuracy of a linear probe in closed form."""

  name = 'ridge'
  scores = staticmethod(probes.ridge)


@dataclasses.dataclass(frozen=True)
class Dice:
  """Dice of a method of masks on held-out records at the size of a view: mean over cases, then over classes."""

  every: int

  needs: ClassVar[str] = 'a method that predicts masks, and records of split val with a mask'

  def wants(self, probe: Any) -> bool:
    """Whether the method predicts masks and there are some."""
    return probe.predicts == 'mask' and len(probe.told) > 0

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """{'dice', 'dice/NAME' of each foreground class that the records have}, see `evaluate.overlap.dice_of_cases`."""
    both, total = snapshot.probe.answers(snapshot.state, snapshot.probe.told)
    scores = overlap.mean(overlap.dice_of_cases(both, total), 0)
    names = snapshot.probe.trainer.objective.names
    found = {f'dice/{name}': float(score) for name, score in zip(names, scores, strict=True) if np.isfinite(score)}
    return found | ({'dice': float(np.nanmean(scores))} if found else {})


@dataclasses.dataclass(frozen=True)
class Head:
  """What a method's own head predicts of held-out records: accuracy and AUROC of classes, error and R2 of a number."""

  every: int

  needs: ClassVar[str] = 'a method that predicts loader.label, and records of split val with one'

  def wants(self, probe: Any) -> bool:
    """Whether the method predicts the label and there are some."""
    return probe.predicts in ('label', 'number') and len(probe.told) > 0

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """{'val_accuracy', 'val_balanced_accuracy', 'val_auroc'}, or {'val_mae', 'val_r2'}."""
    answers, truth = snapshot.probe.answers(snapshot.state, snapshot.probe.told)
    if snapshot.probe.predicts == 'number':
      return {f'val_{name}': value for name, value in regression.score(truth, answers).items()}
    known = truth >= 0  # the others are of classes that training does not know
    if not known.any():
      return {}
    return {f'val_{name}': value for name, value in metrics.score(truth[known], answers[known]).items()}


@dataclasses.dataclass(frozen=True)
class Phases:
  """Phases of held-out videos: frames by the mean over phases, then over videos, and segments."""

  every: int

  needs: ClassVar[str] = 'a method that predicts the phases of windows, and records of split val'

  def wants(self, probe: Any) -> bool:
    """Whether the method predicts phases and there are held-out records."""
    return probe.predicts == 'phases' and len(probe.val) > 0

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """{'val_accuracy', 'val_jaccard', 'val_edit', 'val_f1@10', ...}, see `evaluate.phases` and `evaluate.segments`."""
    videos = snapshot.probe.videos(snapshot.state)
    if not videos:
      return {}
    classes = range(len(snapshot.probe.spec.classes))
    frames = phases.score([phases.counts(y, p, classes) for y, p in videos], 'video')
    parts = segments.score([y for y, _ in videos], [p for _, p in videos])
    return {f'val_{m}': frames[m]['value'] for m in ('accuracy', 'jaccard')} | {
        f'val_{m}': value for m, value in parts.items() if m != 'accuracy'}


EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    HEALTH: Health, 'loss': Loss, 'knn': KNN, 'ridge': Ridge, 'dice': Dice, 'head': Head, 'phases': Phases}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The evaluators of a run.

  Attributes:
    probe: what they share of the run, see `probe.Probe`. steps: length of the run. evaluators: by name, in their order.
  """

  probe: Any
  steps: int
  evaluators: Mapping[str, Evaluator]

  def due(self, step: int) -> tuple[str, ...]:
    """Names of those that look at a step; all look at the last one."""
    return tuple(name for name, e in self.evaluators.items() if step == self.steps or step % e.every == 0)

  def __call__(self, state: Any, names: tuple[str, ...]) -> dict[str, float]:
    """The values that the named evaluators measure; they share one snapshot, so records are embedded once.

    Where the run ends, also what the untrained encoder and pixels reach, see `verdict.beside`.
    """
    snapshot = self.probe.at(state)
    out: dict[str, float] = {}
    for name in names:
      out |= self.evaluators[name](snapshot)
    return out | (verdict.beside(snapshot, names) if int(state.step) == self.steps else {})

  def first(self, state: Any) -> dict[str, float]:
    """Health before the first step, also where it is not among the evaluators; {} for a method without features."""
    health = Health(1)
    return health(self.probe.at(state)) if health.wants(self.probe) else {}

  def tells_collapse(self, names: tuple[str, ...]) -> bool:
    """Whether a run is to look for collapse after these: where health is fresh, or is none of the evaluators."""
    return HEALTH in names or HEALTH not in self.evaluators


def parse(text: str) -> dict[str, int]:
  """The names of 'loss,knn:500' with their steps; 0 means the steps of the run.

  Raises:
    UserError: an unknown name (naming the nearest), one that stands twice, or steps that are no positive number.
  """
  out: dict[str, int] = {}
  for word in filter(None, (word.strip() for word in text.split(','))):
    name, colon, steps = word.partition(':')
    choose('evaluator', name, EVALUATORS)
    if name in out:
      raise UserError(f'evaluators={text} has {name} twice')
    if colon and not (steps.isdecimal() and int(steps) > 0):
      raise UserError(f'evaluators has {word!r}: expected a number of steps, such as {name}:500')
    out[name] = int(steps or 0)
  return out


def evaluation(text: str, every: int, steps: int, probe: Any) -> Evaluation:
  """The evaluators that `text` names, or without any all that the run can serve.

  Args:
    text: the config key `evaluators`. every: steps of those that have none of their own. steps: length of the run.
    probe: what they share of the run, see `probe.Probe`.
  Raises:
    UserError: as of `parse`; an evaluator that is named and that the run cannot serve.
  """
  asked = parse(text)
  made = {name: EVALUATORS[name](every=n or every) for name, n in (asked or dict.fromkeys(EVALUATORS, 0)).items()}
  wanted = {name: e for name, e in made.items() if e.wants(probe)}
  if asked and len(wanted) < len(made):
    name = next(name for name in made if name not in wanted)
    raise UserError(f'evaluators={name} cannot look at this run: it needs {made[name].needs}')
  return Evaluation(probe, steps, wanted)
