"""The records of each split that have a mask, and the classes of their pixels: what protocols of pixels share."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.data.feed import fields
from jaxmed.data.resize import nearest
from jaxmed.errors import UserError
from jaxmed.evaluate.protocols.tasks import SPLITS, check_subjects, subjects_of

MOST_CLASSES = 255  # more are no classes


@dataclasses.dataclass(frozen=True)
class Part:
  """The records of one split that have a mask.

  Attributes:
    source: their rows. subjects: [n] (str). size: the grid that masks are brought to, by the nearest pixel.
    packed: their masks, compressed, as int32. values: [K] the value of each class in the masks.
  """

  source: Any
  subjects: np.ndarray
  size: tuple[int, ...]
  packed: tuple[bytes, ...]
  values: np.ndarray

  def codes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The class [n, *size] of each pixel of some rows, int16; -1 for a value that is no class."""
    stored = np.stack([np.frombuffer(zlib.decompress(self.packed[i]), np.int32) for i in rows])
    place = np.searchsorted(self.values, stored).clip(0, len(self.values) - 1)
    return np.where(self.values[place] == stored, place, -1).astype(np.int16).reshape(len(stored), *self.size)


@dataclasses.dataclass(frozen=True)
class MaskTask:
  """Three parts, the classes by their values in the masks, and which training rows are fitted on (the rest judges)."""

  train: Part
  val: Part | None
  test: Part
  fit: np.ndarray  # bool [len(train)]: all True if there is a val split
  known: np.ndarray  # bool [K]: whether a training or validation mask has the class
  notes: tuple[str, ...] = ()

  @property
  def parts(self) -> dict[str, Part]:
    """The splits that are there, by name."""
    return {s: p for s, p in zip(SPLITS, (self.train, self.val, self.test), strict=True) if p is not None}

  @property
  def values(self) -> np.ndarray:
    """The value [K] of each class."""
    return self.train.values


def make_task(source: Any, size: tuple[int, ...], ignore: Sequence[int], held: float, seed: int) -> MaskTask:
  """The records with masks of each split; masks are read once, at the grid `size`.

  Args:
    source: a jaxmed.data.corpus.source.Source with splits.
    ignore: values that are no class; -1 never is.
    held: fraction of training subjects that judge choices where there is no val split.

  Raises:
    UserError: no masks; no test or training rows with one; a subject in two splits; fewer than two classes in the
      training masks, or more than 255 in all; a mask of another rank than `size`.
  """
  parts, present = check(source), {}
  for split, part in parts.items():
    packed, present[split] = _read(part.source, size)
    parts[split] = dataclasses.replace(part, size=size, packed=packed)
  found, known = _classes(present, ignore, source)
  parts = {split: dataclasses.replace(part, values=found) for split, part in parts.items()}
  absent = [v for v in ignore if not any(v in row for rows in present.values() for row in rows)]
  notes = [f'no mask holds {", ".join(map(str, absent))}, which was to be ignored'] if absent else []
  train = parts['train']
  fit = np.ones(len(train.packed), bool)
  if 'val' not in parts:
    fit = _cut(train.subjects, present['train'], held, seed)
    notes.append(f'no val split: choices were made on {np.count_nonzero(~fit)} train rows, cut by subject')
  return MaskTask(train, parts.get('val'), parts['test'], fit, known, tuple(notes))


def check(source: Any) -> dict[str, Part]:
  """The rows with a mask of each split, by the manifest alone, {split: Part without masks}; errors of `make_task`."""
  if 'mask' not in fields.held(source):
    raise UserError(f"{source.path} has no masks in these rows: expected a column 'mask' of files in the table that it "
                    'was prepared with')
  parts = {}
  for split in SPLITS:
    rows = source.select(split=split, label='mask')
    if len(rows):
      parts[split] = Part(rows, subjects_of(rows), (), (), np.zeros(0, np.int32))
  for split in ('train', 'test'):
    if split not in parts:
      raise UserError(f'no row of split {split!r} of {source.path} has a mask; expected train and test rows')
  check_subjects(parts)
  return parts


def _read(source: Any, size: tuple[int, ...]) -> tuple[tuple[bytes, ...], list[set[int]]]:
  """The masks of all rows, packed, and the values that each has."""
  packed, values = [], []
  for i in range(len(source)):
    record = source.record(i, ('mask',))
    mask, name = record.get('mask'), record['id']
    if mask is None:
      raise UserError(f'{source.path}: record {name} has a mask in the manifest, none in its shard; prepare it again')
    if mask.ndim != len(size):
      raise UserError(f'{source.path}: the mask of {name} has {mask.ndim} axes, and the encoder takes '
                      f'{"x".join(map(str, size))}')
    mask = np.ascontiguousarray(nearest(mask, size), np.int32)
    packed.append(zlib.compress(mask.tobytes(), 1))
    values.append(set(np.unique(mask).tolist()))
  return tuple(packed), values


def _classes(present: dict[str, list[set[int]]], ignore: Sequence[int], source: Any) -> tuple[np.ndarray, np.ndarray]:
  """The values that are classes, and which of them the masks of train and val have."""
  of = lambda splits: set().union(*(row for s in splits for row in present.get(s, ()))) - {-1, *ignore}
  values, known, train = sorted(of(SPLITS)), of(('train', 'val')), sorted(of(('train',)))
  if len(values) > MOST_CLASSES:
    raise UserError(f'the masks of {source.path} hold {len(values)} values; expected at most {MOST_CLASSES} classes '
                    '(are they of instances?)')
  if len(train) < 2:
    some = f'only {train[0]}' if train else 'nothing'
    raise UserError(f'the training masks of {source.path} hold {some} besides {", ".join(map(str, (-1, *ignore)))}, '
                    'which are ignored; expected two or more classes')
  return np.array(values, np.int32), np.isin(values, sorted(known))


def _cut(subjects: np.ndarray, present: list[set[int]], held: float, seed: int) -> np.ndarray:
  """Bool [n]: the training rows to fit on, without a fraction of the subjects (at least one) that judges choices."""
  names = np.unique(subjects)
  if len(names) < 2:
    raise UserError('no val split, and the training rows with masks are of one subject, so none can be cut; expected '
                    "rows of split 'val' or two or more training subjects")
  rng, best, most = np.random.default_rng(seed), np.ones(len(subjects), bool), -1
  for _ in range(50):  # a cut that takes the only subject of a class is drawn again
    fit = ~np.isin(subjects, rng.permutation(names)[:math.ceil(held * len(names))])
    count = len(set().union(*(values for values, kept in zip(present, fit, strict=True) if kept)))
    if count > most:
      best, most = fit, count
  return best
