"""What every protocol shares: the labelled rows of each split, features of them, and the two baselines."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data.corpus.source import Source
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import pixels
from jaxmed.evaluate.remembered import Remembered, digest

TRAINED, UNTRAINED, PIXELS = 'trained', 'untrained', 'pixels (PCA)'
SPLITS = ('train', 'val', 'test')


@dataclasses.dataclass(frozen=True)
class Part:
  """The labelled rows of one split: its source, subjects [n] (str), and y: indices of classes [n] (int64), several
  labels [n, L] (1, 0, or -1 for unknown), or numbers [n] (float64)."""

  source: Any
  y: np.ndarray
  subjects: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
  """Three parts, the classes (of several labels their names, of numbers none), which training rows fit the penalty
  search (the rest judges it), and what a reader must know of how the label was read."""

  label: str
  classes: tuple[str, ...]
  train: Part
  val: Part | None
  test: Part
  fit: np.ndarray  # bool [len(train)]: all True if there is a val split
  notes: tuple[str, ...] = ()

  @property
  def parts(self) -> dict[str, Part]:
    """The splits that are there, by name."""
    return {s: p for s, p in zip(SPLITS, (self.train, self.val, self.test), strict=True) if p is not None}

  @property
  def known(self) -> list[int]:
    """Classes that the probes can learn: the classes of the train and val rows."""
    seen = set(self.train.y) | (set(self.val.y) if self.val else set())
    return sorted(int(c) for c in seen)


def make_task(source: Any, label: str, seed: int, order: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple) -> Task:
  """The labelled rows of each split; `order` puts the classes in order, which is alphabetic.

  Raises:
    UserError: unknown column, no test or training rows, a single class, a subject in two splits.
  """
  classes = order(tuple(source.classes(label))) if label in source.table.column_names else ()
  if not classes:
    source.select(label=label)  # an unknown column raises here, with the nearest name
    raise UserError(f'label {label!r} is empty in every row; expected a column with two or more classes')
  train, val, test = _present(source, label, [part_of(source, split, label, classes) for split in SPLITS])
  _check_classes(train, label, classes)
  check_subjects(dict(train=train, val=val, test=test))
  fit = np.ones(len(train.y), bool) if val is not None else cut(train, label, seed)
  return Task(label, classes, train, val, test, fit)


def _present(source: Any, label: str, parts: Sequence[Part | None]) -> tuple[Part, Part | None, Part]:
  """Train, val and test, or a UserError where train or test has no row."""
  train, val, test = parts
  if train is None or test is None:
    has = ', '.join(sorted({str(s) for s in source.table['split'].to_pylist()}))
    raise UserError(f'no row of split {"train" if train is None else "test"!r} has the label {label!r}; expected train '
                    f'and test rows (the splits present are: {has})')
  return train, val, test


def assembled(source: Any, label: str, names: tuple[str, ...], y: np.ndarray, known: np.ndarray, seed: int,
              notes: tuple[str, ...] = ()) -> Task:
  """The task of a label that is no class.

  Args:
    y: [N, ...] of each row of the source. known: bool [N], rows that have it. names: of several labels.
  Raises:
    UserError: no test or training rows, a subject in two splits.
  """
  split = np.array([str(s) for s in source.table['split'].to_pylist()])
  rows = {s: (split == s) & known for s in SPLITS}
  parts = [Part(source.keep(r), y[r], subjects_of(source.keep(r))) if r.any() else None for r in rows.values()]
  train, val, test = _present(source, label, parts)
  check_subjects(dict(train=train, val=val, test=test))
  fit = np.ones(len(train.y), bool)
  if val is None:
    kinds = train.y > np.median(train.y) if y.ndim == 1 else np.unique(train.y, axis=0, return_inverse=True)[1].ravel()
    fit = cut(dataclasses.replace(train, y=kinds), label, seed)
    notes = (*notes, f'no val split: choices were made on {np.count_nonzero(~fit)} train rows, cut by subject')
  return Task(label, names, train, val, test, fit, notes)


def part_of(source: Any, split: str, label: str, classes: tuple[str, ...]) -> Part | None:
  """The labelled rows of a split; None without any."""
  present = {str(s) for s in source.table['split'].to_pylist()}
  if split not in present:
    return None
  part = source.select(split=split, label=label)
  if not len(part):
    return None
  return Part(part, np.asarray(part.codes(label, classes), np.int64), subjects_of(part))


def subjects_of(source: Any) -> np.ndarray:
  """Subjects [n] (str) of the rows. A row without one stands for itself, with a prefix that no subject has."""
  ids, names = source.table['id'].to_pylist(), source.table['subject'].to_pylist()
  return np.array([f'row {i}' if s is None else str(s) for i, s in zip(ids, names, strict=True)])


def _check_classes(train: Part, label: str, classes: tuple[str, ...]) -> None:
  seen = np.unique(train.y)
  if len(seen) < 2:
    raise UserError(f'label {label!r}: all {len(train.y)} training rows are {classes[seen[0]]!r}; '
                    'expected two or more classes')
  if len(seen) > max(2, len(train.y) // 2):
    raise UserError(
      f'label {label!r}: {len(seen)} different values in {len(train.y)} training rows; expected classes '
      'with several rows each (is it an identifier, or a measurement: classify.target=number?)'
    )


def check_subjects(parts: Mapping[str, Any]) -> None:
  """A UserError where a subject has rows in two of the parts {split: Part, or another with `subjects`, or None}."""
  home: dict[str, str] = {}
  for split, part in parts.items():
    for subject in sorted({str(s) for s in part.subjects}) if part else ():
      if subject in home:
        raise UserError(
          f'subject {subject!r} has rows in {home[subject]} and in {split}; expected one split a '
          'subject, or the scores would be of memorised subjects'
        )
      home[subject] = split


def cut(train: Part, label: str, seed: int) -> np.ndarray:
  """Bool [n]: the training rows to fit on, when 20 % of the subjects (at least one) judge the penalty."""
  subjects = np.unique(train.subjects)
  if len(subjects) < 2:
    raise UserError(
      f'label {label!r}: no val split, and the training rows are of one subject, so none can be cut; '
      "expected rows of split 'val' or two or more training subjects"
    )
  rng, best = np.random.default_rng(seed), None
  for _ in range(50):  # a cut that takes the only subject of a class is drawn again
    held = rng.permutation(subjects)[:math.ceil(0.2 * len(subjects))]
    fit = ~np.isin(train.subjects, held)
    if best is None or len(np.unique(train.y[fit])) > len(np.unique(train.y[best])):
      best = fit
    if len(np.unique(train.y[best])) == len(np.unique(train.y)):
      break
  if best is None or len(np.unique(train.y[best])) < 2:
    raise UserError(
      f'label {label!r}: no val split, and without 20 % of the training subjects a single class is left; '
      "expected rows of split 'val' or more training subjects of each class"
    )
  return best


def encoded(encoder: Any, task: Task, feature: str, batch_size: int, name: str,
            splits: Sequence[str] = SPLITS) -> dict[str, np.ndarray]:
  """{split: [n, D]} features of one encoder; a UserError where one is not finite."""
  out = {}
  for split, part in task.parts.items():
    if split not in splits:
      continue
    found = encoder.embed_source(part.source, batch_size)
    x = np.asarray(found[choose('feature', feature, found)], np.float32)
    if len(x) != len(part.y):
      raise UserError(f'{name} encoder: {len(x)} features for {len(part.y)} {split} rows; expected one a row')
    bad = np.count_nonzero(~np.isfinite(x).all(axis=1))
    if bad:
      raise UserError(
        f'{name} encoder: {bad} of {len(x)} {split} rows have features that are NaN or infinite; '
        'expected finite numbers (did the training diverge?)'
      )
    out[split] = x
  return out


def pixel_features(encoder: Any, task: Task, batch_size: int,
                   splits: Sequence[str] = SPLITS) -> dict[str, np.ndarray]:
  """{split: [n, D]} principal components of raw pixels, fitted on the training rows."""
  wanted = {s for s in task.parts if s == 'train' or s in splits}
  remembers = isinstance(encoder, Remembered) and all(type(p.source) is Source for p in task.parts.values())
  parts = {s: p.source for s, p in task.parts.items() if remembers or s in wanted}  # another task wants the others
  make = lambda: pixels.source_features(encoder, *parts.values(), batch_size=batch_size)
  found = encoder.once(('pixels', *map(digest, parts.values())), make) if remembers else make()
  return {s: x for s, x in zip(parts, found, strict=True) if s in wanted}


def sizes(task: Task) -> dict[str, dict[str, int]]:
  """Rows and subjects of each split, 0 for one that is not there."""
  parts = task.parts
  return dict(splits={s: len(parts[s].y) if s in parts else 0 for s in SPLITS},
              subjects={s: len(set(parts[s].subjects)) if s in parts else 0 for s in SPLITS})


def plain(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
  """NaN is not JSON: a value that does not exist becomes None."""
  return {m: {k: float(v) if np.isfinite(v) else None for k, v in i.items()} for m, i in found.items()}
