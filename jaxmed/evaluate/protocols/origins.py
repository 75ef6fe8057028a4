"""Labelled rows that also have a second column, such as the centre that an image comes from."""

import dataclasses
from typing import Any

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import confounding
from jaxmed.evaluate.protocols import tasks
from jaxmed.evaluate.protocols.compared import with_val
from jaxmed.evaluate.protocols.tasks import Part, Task

SPLITS = ('corpus', 'new')


@dataclasses.dataclass(frozen=True)
class Origins:
  """A task whose rows all have the column; there is always a val part.

  Attributes:
    column: its name. values: the origins in order. places: {split: [n], the place of each row's value among these}.
    notes: what a reader must know of the rows.
  """

  task: Task
  column: str
  values: tuple[str, ...]
  places: dict[str, np.ndarray]
  notes: tuple[str, ...]

  @property
  def counts(self) -> dict[str, np.ndarray]:
    """{split: rows of each class and value [K, M]}."""
    shape = len(self.task.classes), len(self.values)
    return {s: confounding.counted(p.y, self.places[s], shape) for s, p in self.task.parts.items()}


def origins(source: Any, label: str, column: str, option: str, splits: str, seed: int) -> Origins:
  """The rows that have label and column.

  Args:
    option: what sets the column, for errors.
    splits: 'corpus' for its own; 'new' cuts all rows anew by subject, for encoders that never saw these labels.
  Raises:
    UserError: no column, an unknown one, that of the label, a single value, one that determines the label or is an
      identifier; the errors of `tasks.make_task`.
  """
  names = source.table.column_names
  choose('column of the corpus', label, names)
  if not column:
    raise UserError(f'{option} is not set: expected a column, such as --option {option}=centre (there are '
                    f'{", ".join(n for n in names if n != label)})')
  choose(f'column for {option}', column, names)
  if column == label:
    raise UserError(f'{option}={column} is the label itself: expected another column')
  labelled = source.select(label=label)
  both = labelled.select(label=column)
  lost = len(labelled) - len(both)
  notes = [f'{lost} of {len(labelled)} labelled rows have no {column!r} and are left out'] if lost else []
  if not len(both):
    raise UserError(f'column {column!r} is empty in all {lost} rows with the label {label!r}: expected two or more '
                    'values')
  values = tuple(both.classes(column))
  if len(values) < 2:
    raise UserError(f'column {column!r}: all {len(both)} labelled rows are {values[0]!r}; expected two or more values')
  if len(values) > max(2, len(both) // 2):
    raise UserError(f'column {column!r}: {len(values)} different values in {len(both)} rows; expected values with '
                    'several rows each (is it an identifier?)')
  task = tasks.make_task(both, label, seed) if splits == 'corpus' else _anew(both, label, column, values, seed)
  task, more = with_val(task)
  places = {s: np.asarray(p.source.codes(column, values), np.int64) for s, p in task.parts.items()}
  out = Origins(task, column, values, places, (*notes, *more))
  if confounding.determined(np.sum(list(out.counts.values()), axis=0)):
    raise UserError(f'column {column!r} determines the label {label!r}: each of its values has rows of one class '
                    'alone, so nothing tells them apart')
  return out


def _anew(source: Any, label: str, column: str, values: tuple[str, ...], seed: int) -> Task:
  """All rows with splits cut anew."""
  classes = tuple(source.classes(label))
  y, subjects = np.asarray(source.codes(label, classes), np.int64), tasks.subjects_of(source)
  split = confounding.cut_anew(y, np.asarray(source.codes(column, values)), subjects, seed)
  parts = {}
  for name in tasks.SPLITS:
    rows = split == name
    if not rows.any():
      raise UserError(f'label {label!r}: {len(set(subjects))} subjects are too few to cut train, val and test')
    parts[name] = Part(source.keep(rows), y[rows], subjects[rows])
  return Task(label, classes, parts['train'], parts['val'], parts['test'], np.ones(len(parts['train'].y), bool))

