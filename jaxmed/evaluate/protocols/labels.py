"""Several yes-or-no labels a record as the target of probes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate import multilabel, probes, tables
from jaxmed.evaluate.protocols.probing import Probing
from jaxmed.evaluate.protocols.protocol import Answers, lone_subject
from jaxmed.evaluate.protocols.tasks import SPLITS, Task, assembled, plain

_YES, _NO = ('1', '1.0', 'true', 'yes'), ('0', '0.0', 'false', 'no')
_UNKNOWN = ('-1', '-1.0', 'nan', 'u', 'uncertain', 'unknown', '')
SEPARATOR = '|'


@dataclasses.dataclass(frozen=True)
class Labels(Probing):
  """Probes of several labels, each by itself."""

  kind: ClassVar[str] = 'labels'
  task: ClassVar[str] = 'several labels a record'
  offered: ClassVar[tuple[str, ...]] = ('knn', 'logistic')
  metrics: ClassVar[Mapping[str, str]] = {m: tables.NAMES[m] for m in multilabel.METRICS}

  def task_of(self, source: Any, label: str, seed: int) -> Task:
    """The rows of which a label is known, y [n, L]: 1, 0, or -1 for unknown."""
    names, y = read(source, label)
    known = np.asarray((y >= 0).any(axis=1))
    split = np.array([str(s) for s in source.table['split'].to_pylist()])
    lost = [f'{np.count_nonzero(y[split == s] < 0)} {s}' for s in SPLITS if (split == s).any()]
    notes = []
    if (y[np.isin(split, SPLITS)] < 0).any():
      notes.append(f'labels that are uncertain or missing, left out: {", ".join(lost)}, of {len(names)} a row')
    task = assembled(source, label, names, y, known, seed, tuple(notes))
    if not self.learnable(task).any():
      raise UserError(f'label {label!r}: no label has rows of both values among the training rows; expected 0 and 1')
    return task

  def learnable(self, task: Task) -> np.ndarray:
    """Bool [L]: labels that rows to fit on have both values of, and rows to choose on some."""
    y = task.train.y[task.fit]
    val = task.val.y if task.val else task.train.y[~task.fit]
    return (y == 1).any(axis=0) & (y == 0).any(axis=0) & (val >= 0).any(axis=0)

  def predict(self, method: str, train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray],
              asked: np.ndarray, task: Task, refit: bool = True) -> Answers:
    """Probabilities [M, L]; NaN of a label that cannot be learnt."""
    (x, y), (val_x, val_y) = train, val
    out, penalties, failed = np.full((len(asked), y.shape[1]), np.nan), {}, 0
    learnable = self.learnable(task) & (y == 1).any(axis=0) & (y == 0).any(axis=0)
    if method == 'knn':
      masks, group = np.unique(y >= 0, axis=1, return_inverse=True)  # labels known on the same rows share neighbours
      for g in range(masks.shape[1]):
        some, rows = np.flatnonzero((group.ravel() == g) & learnable), masks[:, g]
        if len(some):
          out[:, some] = probes.knn_mean(x[rows], y[rows][:, some], asked)
      return Answers(out)
    for k in np.flatnonzero(learnable):
      rows, val_rows = y[:, k] >= 0, val_y[:, k] >= 0
      scores, info = probes.logistic(x[rows], y[rows, k], val_x[val_rows], val_y[val_rows, k], asked, 2, refit=refit)
      out[:, k], penalties[task.classes[k]] = scores[:, 1], info['C']
      failed += info['unconverged']
    return Answers(out, {'penalties': penalties}, f'{failed} fits did not converge' if failed else '')

  def content(self, y: np.ndarray, task: Task) -> tuple[np.ndarray, list[str]]:
    """Yes and no of each label that can be learnt."""
    some = np.flatnonzero(self.learnable(task))
    return (np.concatenate([y[:, some] == 1, y[:, some] == 0], axis=1),
            [f'label {task.classes[k]!r} = {v}' for v in (1, 0) for k in some])

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Macro AUROC and macro average precision."""
    return {m: float(multilabel.macro(v)) for m, v in multilabel.score(*self._judged(values, task)).items()}

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    drawn = multilabel.resampled(*self._judged(values, task), task.test.subjects, draws=draws, seed=seed)
    return {m: multilabel.macro(v) for m, v in drawn.items()}

  def details(self, name: str, method: str, x: Mapping[str, np.ndarray], answers: Answers, task: Task, draws: int,
              seed: int) -> dict[str, Any]:
    """AUROC and average precision of each label, with the number of test rows that have it."""
    asked = self._judged(answers.values, task)
    value, drawn = multilabel.score(*asked), multilabel.resampled(*asked, task.test.subjects, draws=draws, seed=seed)
    out = {}
    for k, label in enumerate(task.classes):
      cells = statistics.summarised({m: v[k] for m, v in value.items()}, {m: v[:, k] for m, v in drawn.items()})
      y = asked[0][:, k]
      out[label] = plain(cells) | {'positive': int((y == 1).sum()), 'known': int((y >= 0).sum())}
    return {'labels': out}

  def chance(self, task: Task) -> dict[str, float]:
    """0.5 for AUROC, the mean prevalence for average precision."""
    y = self._judged(np.zeros(task.test.y.shape), task)[0]
    rate = [(y[:, k] == 1).sum() / (y[:, k] >= 0).sum() for k in range(y.shape[1]) if (y[:, k] == 1).any()]
    return {'auroc': 0.5, 'ap': float(np.mean(rate)) if rate else float('nan')}

  def notes(self, task: Task) -> list[str]:
    """Labels that cannot be learnt or judged, a single test subject."""
    some, y = self.learnable(task), task.test.y
    notes = [f'target labels: {len(task.classes)} of them, each judged by itself'] if self.target == 'auto' else []
    lost = [task.classes[k] for k in np.flatnonzero(~some)]
    if lost:
      notes.append('labels of one value among the training rows, or of none among the validation rows, left out: '
                   + ', '.join(lost))
    for told, flat in (('no test row has, left out', ~(y == 1).any(axis=0)),
                       ('no test row lacks, left out of AUROC', ~(y == 0).any(axis=0))):
      names = [task.classes[k] for k in np.flatnonzero(some & flat)]
      if names:
        notes.append(f'labels that {told}: {", ".join(names)}')
    return notes + lone_subject(task)

  def more_tables(self, result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Few labels, and the trained features label by label."""
    rows = [r for r in result['rows'] if r['features'] == result['rows'][0]['features']]
    out = [[label, f'{cells["positive"]:,} of {cells["known"]:,}', tables.METHODS[r['method']],
            *(tables.interval(cells[m]) for m in multilabel.METRICS)]
           for r in rows for label, cells in r['labels'].items()]
    return [*super().more_tables(result), ('By label, trained', ['label', 'test rows', 'method', 'AUROC', 'AP'], out)]

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """The curves of few labels."""
    from jaxmed.evaluate.report import curves
    few = result.get('few_labels')
    return {'few_labels': lambda path: curves.few_labels(few, path)} if few else {}

  def _judged(self, values: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Test labels, those that cannot be learnt as unknown, and scores without NaN."""
    lost = np.isnan(values).any(axis=0) | ~self.learnable(task)
    return np.where(lost, -1, task.test.y), np.where(lost, 0.0, values)


def read(source: Any, label: str) -> tuple[tuple[str, ...], np.ndarray]:
  """Names [L] and values [N, L] (1, 0, -1 for unknown) of columns 'a,b', or of one column of lists or of text 'a|b'.

  A row of such a column has all its labels and no other; an empty one is unknown, an empty list has none.

  Raises:
    UserError: an unknown column, or a value that is neither yes, no nor unknown.
  """
  names = (label,) if label in source.table.column_names else tuple(n.strip() for n in label.split(','))
  for name in names:
    choose('column', name, source.table.column_names)
  if len(names) == 1 and is_list(source, label):
    split = lambda v: [t.strip() for t in str(v).split(SEPARATOR) if t.strip()]
    found = [v if v is None or isinstance(v, list) else split(v) for v in source.table[label].to_pylist()]
    names = tuple(sorted({str(t) for v in found if v for t in v}))
    place = {name: k for k, name in enumerate(names)}
    y = np.zeros((len(found), len(names)), np.int8)
    for i, v in enumerate(found):
      y[i] = -1 if v is None else 0
      for t in v or ():
        y[i, place[str(t)]] = 1
    return names, y
  return names, np.stack([_flags(source, name) for name in names], axis=1)


def is_list(source: Any, name: str) -> bool:
  """Whether a column holds lists, or text with '|' in it."""
  column = source.table[name]
  if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
    return True
  return any(isinstance(v, str) and SEPARATOR in v for v in column.unique().to_pylist())


def _flags(source: Any, name: str) -> np.ndarray:
  """The values [N] of one column of yes and no."""
  code: dict[Any, int] = {}
  for value in source.table[name].unique().to_pylist():
    text = '' if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip().lower()
    if text not in (*_YES, *_NO, *_UNKNOWN):
      raise UserError(f'label column {name!r} holds {value!r}; expected 1, 0, or -1 or nothing where it is unknown')
    code[value] = 1 if text in _YES else 0 if text in _NO else -1
  return np.array([code.get(v, -1) for v in source.table[name].to_pylist()], np.int8)
