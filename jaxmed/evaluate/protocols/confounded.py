"""Classification where a confounder goes with the label in training, and the other way round in the test."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import confounding, grouped, tables
from jaxmed.evaluate.confounding import Design
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.compared import PROBES
from jaxmed.evaluate.protocols.origins import SPLITS, Origins, origins
from jaxmed.evaluate.protocols.protocol import lone_subject
from jaxmed.evaluate.protocols.tasks import Task, sizes
from jaxmed.evaluate.report import shifts

LEAST = {'train': 4, 'val': 2, 'test': 2}  # rows of a cell at correlation 0
TOLERANCE = 0.04  # of a correlation
METRICS = {'id': 'ID accuracy', 'ood': 'OOD accuracy', 'gap': 'gap, ID - OOD'}


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Rows of a confounded problem.

  Attributes:
    rows: {'train', 'val', 'id', 'ood': bool, the rows of their split}; id and ood are parts of the test rows.
    home: cells [K, M] that go together in training. correlations: {the same: what came out}.
  """

  rows: dict[str, np.ndarray]
  home: np.ndarray
  correlations: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Confounded:
  """kNN and logistic regression, fitted where label and confounder go together, asked where they do not.

  Training, validation and ID test rows have the correlation, OOD test rows the reversed one; see `confounding` for what
  that is with more than two classes or values. The two test parts share no row and have the same size. As in KnoBo
  (arXiv 2405.14839), with one difference: ID is a test of its own there is no choice on, not the validation rows.

  Attributes:
    confounder: column that goes with the label. correlation: of label and confounder, 0 .. 1.
    splits: 'corpus' for its own; 'new' cuts all rows anew by subject, for encoders that never saw the labels.
  """

  confounder: str = ''
  correlation: float = 0.95
  splits: str = 'corpus'

  name: ClassVar[str] = 'confounded'
  task: ClassVar[str] = 'classification where a confounder is reversed in the test'

  def __post_init__(self):
    check_correlation('confounded.correlation', self.correlation)
    choose('confounded.splits', self.splits, SPLITS)

  def check(self, source: Any, label: str, seed: int = 0) -> None:
    """A UserError where the rows do not allow it, before anything is embedded."""
    choose_rows(self._origins(source, label, seed), self.correlation, seed)

  def run(self, encoder: Any, source: Any, label: str, *, untrained: Any = None, beside: Mapping[str, Any] = {},
          feature: str = 'mean', batch_size: int = 64, seed: int = 0, draws: int = 1000,
          pixels: bool = True) -> dict[str, Any]:
    """Balanced accuracy on both test parts and their difference; arguments as of `FeatureProtocol.run`.

    Returns:
      The dict of `FeatureProtocol.run` with the metrics of METRICS, and confounder, correlation, correlations {part:
      what came out}, parts {part: rows}, home {class: values that go with it in training}.
    Raises:
      UserError: as of `origins.origins`; a cell with too few rows.
    """
    o = self._origins(source, label, seed)
    chosen = choose_rows(o, self.correlation, seed)
    those = compared.encoders(encoder, feature, untrained, beside)
    sets = compared.feature_sets(those, o.task, batch_size, pixels)
    y = {split: o.task.parts[split].y[chosen.rows[split]] for split in ('train', 'val')}
    found = {}
    for name, x in sets.items():
      x = {split: x[split][chosen.rows[split]] for split in y} | {'test': x['test']}
      for method in PROBES:
        predicted = compared.classified(method, x, y, len(o.task.classes))
        found[name, method] = scored(predicted, o.task, chosen, draws, seed)
    notes = [*o.notes, *missed(chosen, self.correlation), *([] if untrained is not None else [compared.MISSING]),
             *lone_subject(o.task)]
    return described(o, chosen, self.correlation) | compared.rows_of(found) | dict(
        label=label, feature=feature, notes=notes, draws=draws, seed=seed)

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return tables.text_table(result, METRICS, PROBES) + summary(result)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return tables.html_table(result, METRICS, PROBES) + compared.note(summary(result))

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each score and each difference."""
    return tables.csv_rows(result)

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """{'gap': accuracies on both test parts side by side}."""
    return {'gap': lambda path: shifts.bars(result, {'id': 'ID', 'ood': 'OOD'}, PROBES, path,
                                           f'Label {result["label"]}, confounder {result["confounder"]}')}

  def _origins(self, source: Any, label: str, seed: int) -> Origins:
    return origins(source, label, self.confounder, 'confounded.confounder', self.splits, seed)


def check_correlation(option: str, value: Any) -> None:
  """A UserError where it is not between 0 and 1."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
    raise UserError(f'{option}={value}: expected a number from 0 to 1')


def choose_rows(o: Origins, correlation: float, seed: int) -> Chosen:
  """The same rows for the same seed; each split is as large as its scarcest cell allows."""
  task, values, rng = o.task, o.values, np.random.default_rng(seed)
  home = confounding.homes(len(task.classes), len(values))
  plans = {'train': [Design(home, correlation)], 'val': [Design(home, correlation)],
           'test': [Design(home, correlation), Design(confounding.turned(home), correlation)]}
  rows, found = {}, {}
  for split, designs in plans.items():
    part, place = task.parts[split], o.places[split]
    size = confounding.check(o.counts[split], [designs], LEAST[split], task.classes, values, f'{split} rows')
    order = confounding.order_by_subject(part.subjects, rng)
    for name, design, along in zip((split,) if split != 'test' else ('id', 'ood'), designs, (order, order[::-1])):
      rows[name] = confounding.take(part.y, place, confounding.cells(size, design), along)
      found[name] = confounding.correlation(part.y[rows[name]], place[rows[name]], home)
  return Chosen(rows, home, found)


def missed(chosen: Chosen, correlation: float) -> list[str]:
  """A note where cells are too small for the correlation that was asked for."""
  far = {name: r for name, r in chosen.correlations.items() if name != 'ood' and abs(r - correlation) > TOLERANCE}
  told = ', '.join(f'{name} {r:.2f}' for name, r in far.items())
  return [f'cells are too small for the correlation {correlation:g}: {told}'] if far else []


def scored(predicted: np.ndarray, task: Task, chosen: Chosen, draws: int,
           seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """ID, OOD and gap of predictions [M] of the test rows, and the same [draws] on resampled subjects."""
  where = np.stack([chosen.rows['id'], chosen.rows['ood']])
  value, drawn = grouped.balanced_accuracies(task.test.y, np.stack([predicted] * 2), task.test.subjects, where,
                                             draws=draws, seed=seed)
  named = lambda a: {'id': a[..., 0], 'ood': a[..., 1], 'gap': a[..., 0] - a[..., 1]}
  return {k: float(v) for k, v in named(value).items()}, named(drawn)


def described(o: Origins, chosen: Chosen, correlation: float) -> dict[str, Any]:
  """What a result says of the rows."""
  classes = len(o.task.classes)
  home = {c: [o.values[m] for m in np.flatnonzero(row)] for c, row in zip(o.task.classes, chosen.home, strict=True)}
  return dict(confounder=o.column, values=list(o.values), classes=list(o.task.classes), correlation=correlation,
              correlations=chosen.correlations, parts={k: int(v.sum()) for k, v in chosen.rows.items()}, home=home,
              chance={'id': 1 / classes, 'ood': 1 / classes, 'gap': 0.0}, **sizes(o.task))


def summary(result: Mapping[str, Any]) -> str:
  """Which rows were used, in words."""
  home = '; '.join(f'{c} with {", ".join(v)}' for c, v in result['home'].items())
  parts = ', '.join(f'{n:,} {k} ({result["correlations"][k]:+.2f})' for k, n in result['parts'].items())
  return (f'Confounder {result["confounder"]!r}; in training {home}.\n'
          f'Rows used (correlation with that): {parts}.\n')
