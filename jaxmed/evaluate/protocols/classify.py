"""Classification of records by a label: probes on frozen features beside two baselines on the same rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jaxmed.evaluate import tables
from jaxmed.evaluate.protocols import labels, number
from jaxmed.evaluate.protocols.classes import Classes, Ordinal
from jaxmed.evaluate.protocols.probing import Probing
from jaxmed.evaluate.protocols.protocol import FeatureProtocol
from jaxmed.evaluate.protocols.tasks import TRAINED, encoded, make_task

KINDS: dict[str, type[Probing]] = {'classes': Classes, 'ordinal': Ordinal, 'labels': labels.Labels,
                                   'number': number.Number}
FEW = 20  # different numbers that are still classes


@dataclasses.dataclass(frozen=True)
class Classify(Classes):
  """Probes of a label on frozen features: classes, grades, several labels or a number.

  Probes are fitted on the rows of split 'train' that have the label; the logistic penalty is chosen on split 'val'
  (without one, on 20 % of the training subjects); scores are of split 'test'. Rows whose class no training row has stay
  in, as errors, in accuracy and balanced accuracy, are left out of macro AUROC, and are named in 'notes'.

  Attributes:
    target: 'classes'; 'ordinal', classes in an order; 'labels', several of yes and no (columns A,B, or one of lists or
      of text with '|'); 'number'. 'auto' takes several columns, lists and '|' as labels, more than 20 different
      numbers as a number, and all else as classes.
    probes: 'knn', 'logistic', 'ridge' (of a number), and on patch tokens 'capi', 'vjepa', comma-separated; empty: knn
      and logistic, of a number knn and ridge.
    order: classes from the lowest to the highest, of an ordinal target whose classes are no numbers.
    positive: class of the operating point; empty: the one of two that is called 1, true, yes or positive.
    sensitivity: of the operating point, reached on validation rows, such as 0.95; 0: none.
    fractions: percentages of the training subjects for few labels, such as 1,5,10,25,50,100; empty: none.
    seeds: draws of these.
    attentive_steps: updates of 'capi' and 'vjepa'; 0: 20 passes over the training rows, at least 500.
  """

  def resolved(self, source: Any, label: str) -> FeatureProtocol:
    """The kind of target that the option names or the column asks for."""
    kind = KINDS[kind_of(source, label) if self.target == 'auto' else self.target]
    return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return _of(result).tables(result)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return _of(result).html(result)

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Any]:
    """{name: what writes a PNG to a path}."""
    return _of(result).drawings(result, source)


def kind_of(source: Any, label: str) -> str:
  """What the option target=auto takes a label as."""
  if label not in source.table.column_names:
    return 'labels' if ',' in label else 'classes'
  if labels.is_list(source, label):
    return 'labels'
  column = source.table[label]
  if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
    return 'classes'
  return 'number' if len(column.unique().drop_null()) > FEW else 'classes'


def _of(result: Mapping[str, Any]) -> Probing:
  """The kind that a result is of; one of an earlier version is of classes."""
  return KINDS[result.get('target', 'classes')]()


def answers_of(encoder: Any, source: Any, label: str, *, feature: str = 'mean', batch_size: int = 64,
               seed: int = 0) -> dict[str, Any]:
  """What the probes say of each test row: {'y': [M], 'subjects': [M], 'known': classes that the probes can learn,
  'knn': [M, K], 'logistic': [M, K]}; arguments and errors as of `Classify.run`."""
  task, protocol = make_task(source, label, seed), Classes()
  features = encoded(encoder, task, feature, batch_size, TRAINED)
  scores = {method: protocol.answers(method, features, task).values for method in protocol.methods}
  return {'y': task.test.y, 'subjects': task.test.subjects, 'known': task.known} | scores


def best_row(result: Mapping[str, Any], metric: str = '', features: str = TRAINED) -> dict[str, Any]:
  """The row of `features` with the best `metric`, by default the headline, out of what `Classify.run` returned."""
  metric = metric or result.get('headline', 'balanced_accuracy')
  rows: Sequence[dict[str, Any]] = [r for r in result['rows'] if r['features'] == features]
  sign = -1.0 if metric in tables.LOWER else 1.0
  value = lambda row: row['metrics'][metric]['value']
  return max(rows, key=lambda row: float('-inf') if value(row) is None else sign * value(row))
