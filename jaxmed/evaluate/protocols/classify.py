"""Classification of records by a label: probes on frozen features beside two baselines on the same rows."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate import probes
from jaxmed.evaluate.protocols.protocol import Answers, FeatureProtocol, lone_subject
from jaxmed.evaluate.protocols.tasks import TRAINED, Task, encoded, make_task


@dataclasses.dataclass(frozen=True)
class Classify(FeatureProtocol):
  """kNN and logistic regression on the vectors of records.

  Probes are fitted on the rows of split 'train' that have the label; the logistic penalty is chosen on split 'val'
  (without one, on 20 % of the training subjects); scores are of split 'test'. Rows whose class no training row has stay
  in, as errors, in accuracy and balanced accuracy, are left out of macro AUROC, and are named in 'notes'.
  """

  name: ClassVar[str] = 'classify'
  task: ClassVar[str] = 'classification of records by a label'
  methods: ClassVar[Mapping[str, str]] = {'knn': 'kNN', 'logistic': 'logistic'}
  metrics: ClassVar[Mapping[str, str]] = statistics.LABELS

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """Scores [..., M, K] of the classes; of the logistic regression also its 'penalty'."""
    test = x['test'].reshape(-1, x['test'].shape[-1])  # one fit for all sets
    classes, shape = len(task.classes), x['test'].shape[:-1]
    if method == 'knn':
      return Answers(probes.knn(x['train'], task.train.y, test, classes).reshape(*shape, classes))
    fit = task.fit
    val_x, val_y = (x['val'], task.val.y) if task.val else (x['train'][~fit], task.train.y[~fit])
    scores, info = probes.logistic(x['train'][fit], task.train.y[fit], val_x, val_y, test, classes)
    failed, fits = info.get('unconverged'), len(info['grid']) + 1
    trouble = f'{failed} of {fits} fits did not converge' if failed else ''
    return Answers(scores.reshape(*shape, classes), {'penalty': info}, trouble)

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro AUROC."""
    return statistics.score(task.test.y, values, task.known)

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    return statistics.resampled(task.test.y, values, task.test.subjects, draws=draws, seed=seed,
                                auroc_classes=task.known)

  def chance(self, task: Task) -> dict[str, float]:
    """What a constant answer, the commonest training class, gets on the test rows; 0.5 for AUROC."""
    common = np.bincount(task.train.y).argmax()
    return dict(accuracy=float((task.test.y == common).mean()), auroc=0.5,
                balanced_accuracy=float(np.any(task.test.y == common) / len(np.unique(task.test.y))))

  def notes(self, task: Task) -> list[str]:
    """A penalty chosen without a val split, classes that only some splits have, a single test subject."""
    notes, classes = [], task.classes
    if task.val is None:
      notes.append(f'no val split: the penalty was chosen on {np.count_nonzero(~task.fit)} train rows, cut by subject')
    seen, counts = set(task.known), collections.Counter(task.test.y.tolist())
    lacking = [f'{classes[c]} ({counts[c]} rows)' for c in sorted(counts) if c not in seen]
    if lacking:
      notes.append('test classes that no training row has, counted as errors and left out of AUROC: '
                   + ', '.join(lacking))
    absent = [classes[c] for c in sorted(seen) if c not in counts]
    if absent:
      notes.append('classes without a test row, left out of AUROC: ' + ', '.join(absent))
    return notes + lone_subject(task)


def answers_of(encoder: Any, source: Any, label: str, *, feature: str = 'mean', batch_size: int = 64,
               seed: int = 0) -> dict[str, Any]:
  """What the probes say of each test row: {'y': [M], 'subjects': [M], 'known': classes that the probes can learn,
  'knn': [M, K], 'logistic': [M, K]}; arguments and errors as of `Classify.run`."""
  task, protocol = make_task(source, label, seed), Classify()
  features = encoded(encoder, task, feature, batch_size, TRAINED)
  scores = {method: protocol.answers(method, features, task).values for method in protocol.methods}
  return {'y': task.test.y, 'subjects': task.test.subjects, 'known': task.known} | scores


def best_row(
  result: Mapping[str, Any], metric: str = 'balanced_accuracy', features: str = TRAINED
) -> dict[str, Any]:
  """The row of `features` with the highest `metric`, out of what `Classify.run` returned."""
  rows: Sequence[dict[str, Any]] = [r for r in result['rows'] if r['features'] == features]
  return max(
    rows, key=lambda r: -1.0 if r['metrics'][metric]['value'] is None else r['metrics'][metric]['value']
  )
