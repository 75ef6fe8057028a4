"""A concept bottleneck with a prior beside a linear probe, maybe with a confounder that is reversed in the test."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import bottleneck, grouped, tables
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.confounded import (
  METRICS,
  check_correlation,
  choose_rows,
  described,
  missed,
  scored,
  summary,
)
from jaxmed.evaluate.protocols.origins import SPLITS, origins
from jaxmed.evaluate.protocols.protocol import lone_subject
from jaxmed.evaluate.protocols.tasks import TRAINED, Task, make_task, sizes
from jaxmed.evaluate.report import shifts

METHODS = {'linear': 'linear probe', 'bottleneck': 'bottleneck', 'no_prior': 'bottleneck, no prior'}


@dataclasses.dataclass(frozen=True)
class Problem:
  """The task, its concepts with their prior [classes, concepts], and the rows of a confounded problem if it is one.

  told: {split: {concept: what its column says}}. found: what `described` says. score(predicted, draws, seed).
  """

  task: Task
  concepts: tuple[str, ...]
  prior: np.ndarray
  told: dict[str, dict[str, np.ndarray]]
  rows: dict[str, np.ndarray]
  found: dict[str, Any]
  score: Callable[[np.ndarray, int, int], Any]
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class Bottleneck:
  """Classes from the probabilities of named concepts alone, with a table of what is known of them as prior (KnoBo).

  A concept is a column of the corpus: 0 or 1, nothing where it is not known. Each is found in the features by balanced
  logistic regression on all labelled training rows; a linear layer on the probabilities is drawn to the table by
  weight * mean |tanh(W) - table|. Beside it stand a logistic probe of the features and the bottleneck without prior.

  Attributes:
    table: JSON file {class: {concept: 1, -1 or 0}}, also 'yes', 'no', 'unknown'. weight: of the prior.
    epochs: of the linear layer (Adam 1e-3, batches of 64), the best one on val rows.
    confounder: column that is reversed in the test, see the protocol confounded; without it the test is all test rows.
    correlation: of label and confounder. splits: 'corpus' or 'new', as of confounded.
  """

  table: str = ''
  weight: float = 1.0
  epochs: int = bottleneck.EPOCHS
  confounder: str = ''
  correlation: float = 0.95
  splits: str = 'corpus'

  name: ClassVar[str] = 'bottleneck'
  task: ClassVar[str] = 'classification through named concepts, with a prior'

  def __post_init__(self):
    compared.positive('bottleneck.epochs', self.epochs)
    check_correlation('bottleneck.correlation', self.correlation)
    choose('bottleneck.splits', self.splits, SPLITS)
    if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not self.weight >= 0:
      raise UserError(f'bottleneck.weight={self.weight}: expected a number, 0 or more')

  def check(self, source: Any, label: str, seed: int = 0) -> None:
    """A UserError where rows, table or concepts do not allow it, before anything is embedded."""
    self._problem(source, label, seed)

  def run(self, encoder: Any, source: Any, label: str, *, untrained: Any = None, beside: Mapping[str, Any] = {},
          feature: str = 'mean', batch_size: int = 64, seed: int = 0, draws: int = 1000,
          pixels: bool = True) -> dict[str, Any]:
    """Balanced accuracy of bottleneck and linear probe; arguments as of `FeatureProtocol.run`.

    Returns:
      The dict of `FeatureProtocol.run` with the metrics 'id' and, with a confounder, 'ood' and 'gap'; and concepts
      [{name, accuracy (balanced, on val rows that tell it), rows {split: told}}], weights [classes][concepts] (tanh of
      those of the trained encoder), prior [classes][concepts], and what `Confounded.run` says of its rows.
    Raises:
      UserError: the table or a concept is not as wanted; as of `confounded` or `tasks.make_task`.
    """
    p = self._problem(source, label, seed)
    sets = compared.feature_sets(compared.encoders(encoder, feature, untrained, beside), p.task, batch_size, pixels)
    found, more = {}, {}
    for name, x in sets.items():
      grounding = bottleneck.ground(x['train'], p.told['train'])
      predicted, head = self._predicted(x, grounding, p, seed)
      for method, answers in predicted.items():
        found[name, method] = p.score(answers, draws, seed)
      if name == TRAINED:
        more = dict(weights=np.tanh(head.weights).T.round(4).tolist(), prior=p.prior.tolist(),
                    concepts=_concepts(p, grounding(x['val'])))
    notes = [*p.notes, *([] if untrained is not None else [compared.MISSING]), *lone_subject(p.task)]
    return p.found | compared.rows_of(found) | more | dict(label=label, feature=feature, notes=notes, draws=draws,
                                                           seed=seed)

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return tables.text_table(result, _metrics(result), METHODS) + _told(result)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return tables.html_table(result, _metrics(result), METHODS) + compared.note(_told(result))

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each score and each difference."""
    return tables.csv_rows(result)

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """{'accuracy': of all kinds of features and methods, 'weights': of the trained bottleneck beside the prior}."""
    names = [c['name'] for c in result['concepts']]
    shown = {'tanh of the weights': result['weights'], 'prior': result['prior']}
    parts = {m: m.upper() for m in _metrics(result) if m != 'gap'}
    return {'accuracy': lambda path: shifts.bars(result, parts, METHODS, path, f'Label {result["label"]}'),
            'weights': lambda path: shifts.heat(shown, result['classes'], names, path)}

  def _predicted(self, x: Mapping[str, np.ndarray], grounding: bottleneck.Grounding, p: Problem,
                 seed: int) -> tuple[dict[str, np.ndarray], bottleneck.Head]:
    """{method: classes [M] of the test rows}, and the head with the prior."""
    y = {s: p.task.parts[s].y[p.rows[s]] for s in ('train', 'val')}
    x = {s: x[s][p.rows[s]] for s in y} | {'test': x['test']}
    c = {s: grounding(x[s]) for s in x}
    fit = lambda weight: bottleneck.fit_head(c['train'], y['train'], c['val'], y['val'], p.prior, weight,
                                             epochs=self.epochs, seed=seed)
    heads = {'bottleneck': fit(self.weight), 'no_prior': fit(0.0)}
    return ({'linear': compared.classified('logistic', x, y, len(p.task.classes))}
            | {name: head(c['test']).argmax(axis=1) for name, head in heads.items()}), heads['bottleneck']

  def _problem(self, source: Any, label: str, seed: int) -> Problem:
    if not self.table:
      raise UserError('bottleneck.table is not set: expected a JSON file {class: {concept: 1, -1 or 0}}')
    if self.confounder:
      o = origins(source, label, self.confounder, 'bottleneck.confounder', self.splits, seed)
      chosen = choose_rows(o, self.correlation, seed)
      task, rows, notes = o.task, chosen.rows, [*o.notes, *missed(chosen, self.correlation)]
      found = described(o, chosen, self.correlation)
      score = lambda predicted, draws, s: scored(predicted, task, chosen, draws, s)
    else:
      task, notes = compared.with_val(make_task(source, label, seed))
      rows = {s: np.ones(len(task.parts[s].y), bool) for s in ('train', 'val')}
      found = dict(classes=list(task.classes), chance={'id': 1 / len(task.classes)}, **sizes(task))
      score = lambda predicted, draws, s: _alone(predicted, task, draws, s)
    concepts, prior = bottleneck.read_table(self.table, task.classes)
    told: dict[str, dict[str, np.ndarray]] = {s: {} for s in ('train', 'val')}
    for name in concepts:
      choose(f'column for the concept of {self.table}', name, source.table.column_names)
      for s in told:
        told[s][name] = bottleneck.told(task.parts[s].source.table[name].to_pylist(), name)
    bottleneck.check_told(told['train'])
    return Problem(task, concepts, prior, told, rows, found, score, notes)


def _alone(predicted: np.ndarray, task: Task, draws: int,
           seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Balanced accuracy of all test rows."""
  value, drawn = grouped.balanced_accuracies(task.test.y, predicted, task.test.subjects, draws=draws, seed=seed)
  return {'id': float(value[0])}, {'id': drawn[:, 0]}


def _told(result: Mapping[str, Any]) -> str:
  """Rows and concepts in words."""
  names = ', '.join(f'{c["name"]} {c["accuracy"]:.2f}' if c['accuracy'] is not None else f'{c["name"]} n/a'
                    for c in result['concepts'])
  return (summary(result) if 'confounder' in result else '') + f'Concepts (accuracy on val rows): {names}.\n'


def _metrics(result: Mapping[str, Any]) -> dict[str, str]:
  return METRICS if 'confounder' in result else {'id': 'balanced accuracy'}


def _concepts(p: Problem, probability: np.ndarray) -> list[dict[str, Any]]:
  """How well each concept is found on val rows, None where they do not have both kinds."""
  out = []
  for i, name in enumerate(p.concepts):
    truth = p.told['val'][name]
    recall = [float(((probability[:, i] >= 0.5) == v)[truth == v].mean()) for v in (0, 1) if np.any(truth == v)]
    out.append({'name': name, 'accuracy': float(np.mean(recall)) if len(recall) == 2 else None,
                'rows': {s: int(np.count_nonzero(told[name] >= 0)) for s, told in p.told.items()}})
  return out
