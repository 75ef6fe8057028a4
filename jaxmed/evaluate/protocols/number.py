"""A number as the target of probes, such as an age."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import probes, regression, tables
from jaxmed.evaluate.protocols.probing import Probing
from jaxmed.evaluate.protocols.protocol import Answers, lone_subject
from jaxmed.evaluate.protocols.tasks import TRAINED, Task, assembled

_SHOWN = 500  # points of the picture


@dataclasses.dataclass(frozen=True)
class Number(Probing):
  """Probes of a number."""

  kind: ClassVar[str] = 'number'
  task: ClassVar[str] = 'regression of a number'
  offered: ClassVar[tuple[str, ...]] = ('knn', 'ridge')
  metrics: ClassVar[Mapping[str, str]] = {'r2': tables.NAMES['r2'], 'mae': tables.NAMES['mae']}

  def task_of(self, source: Any, label: str, seed: int) -> Task:
    """The rows that have the number, y [n]."""
    y = read(source, label)
    task = assembled(source, label, (), y, ~np.isnan(y), seed)
    if len(np.unique(task.train.y)) < 2:
      raise UserError(f'label {label!r}: all {len(task.train.y)} training rows are {task.train.y[0]:g}; expected '
                      'different numbers')
    return task

  def predict(self, method: str, train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray],
              asked: np.ndarray, task: Task, refit: bool = True) -> Answers:
    """Numbers [M, 1]; of the ridge regression also its 'penalty'."""
    if method == 'knn':
      return Answers(probes.knn_mean(train[0], train[1][:, None], asked))
    values, info = probes.ridge_numbers(*train, *val, asked, refit=refit)
    return Answers(values[:, None], {'penalty': info})

  def content(self, y: np.ndarray, task: Task) -> tuple[np.ndarray, list[str]]:
    """Each part needs numbers below and above the middle."""
    above = y > np.median(y)
    return np.stack([above, ~above], axis=1), ['the upper half of the numbers', 'the lower half of the numbers']

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """R2 and mean absolute error."""
    return regression.score(task.test.y, values[:, 0])

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    return regression.resampled(task.test.y, values[:, 0], task.test.subjects, draws=draws, seed=seed)

  def chance(self, task: Task) -> dict[str, float]:
    """What the mean of the training rows gets."""
    return regression.score(task.test.y, np.full(len(task.test.y), task.train.y.mean()))

  def notes(self, task: Task) -> list[str]:
    """That it is a number where nobody said so, a single test subject."""
    count = len(np.unique(np.concatenate([p.y for p in task.parts.values()])))
    notes = [f'target number: the column holds {count} different numbers; classify.target=classes takes them as classes'
             ] if self.target == 'auto' else []
    return notes + lone_subject(task)

  def details(self, name: str, method: str, x: Mapping[str, np.ndarray], answers: Answers, task: Task, draws: int,
              seed: int) -> dict[str, Any]:
    """Of the trained features some numbers as they are and as they are told."""
    rows = np.unique(np.linspace(0, len(task.test.y) - 1, min(_SHOWN, len(task.test.y))).round().astype(int))
    pairs = np.stack([task.test.y[rows], answers.values[rows, 0]], axis=1)
    return {'pairs': [[float(f'{v:.6g}') for v in pair] for pair in pairs]} if name == TRAINED else {}

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """Numbers as they are against those told, and the curves of few labels."""
    from jaxmed.evaluate.report import curves
    few = result.get('few_labels')
    out: dict[str, Callable[[Any], None]] = {'few_labels': lambda path: curves.few_labels(few, path)} if few else {}
    return {'numbers': lambda path: curves.numbers(result['rows'], result['label'], path)} | out


def read(source: Any, label: str) -> np.ndarray:
  """The numbers [N] float64 of a column, NaN where it says nothing; a UserError names what is no finite number."""
  choose('column', label, source.table.column_names)
  out: dict[Any, float] = {None: np.nan, '': np.nan}
  for value in source.table[label].unique().to_pylist():
    if value in out:
      continue
    try:
      out[value] = float(value)
    except (TypeError, ValueError) as e:
      raise UserError(f'label {label!r} holds {value!r}; expected numbers, or another classify.target') from e
    if np.isinf(out[value]):
      raise UserError(f'label {label!r} holds {value}; expected finite numbers')
  return np.array([out.get(v, np.nan) for v in source.table[label].to_pylist()], np.float64)
