"""What the values of masks mean: the classes of a corpus, and how often each value occurs.

`prepare` writes for each record with a mask which values occur (manifest column `mask_values`) and in how many pixels
(`mask_voxels`), and labels.json, {value: name}, where somebody gave names.
"""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed import files
from jaxmed.errors import UserError

FILE = 'labels.json'
VALUES, VOXELS = 'mask_values', 'mask_voxels'
COLUMNS = {VALUES: pa.list_(pa.int32()), VOXELS: pa.list_(pa.int64())}
ABSENT = -1  # pixels that the mask says nothing of
BACKGROUND = 0
MOST_READ = 200  # masks that are read where nothing else tells their values
_SLAB = 1 << 22  # pixels that are counted at a time
_SPAN = 1 << 16  # values up to which counting needs no sorting


@dataclasses.dataclass(frozen=True)
class Labels:
  """The classes of masks.

  Attributes:
    values: stored values of the classes, ascending, so the background (0) comes first.
    names: of the classes, in the same order.
  """

  values: tuple[int, ...]
  names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.values)


def labels_of(source: Any) -> Labels:
  """The classes of a source's masks (see jaxmed.data.corpus.source).

  They are those of labels.json; for a corpus without one the values of the manifest's column `mask_values`; for one of
  an earlier version, which has no such column, those of at most MOST_READ masks, which is said on standard error.

  Raises:
    UserError: no record has a mask, or two corpora give a value different names.
  """
  named: dict[int, str] = {}
  for corpus, names in source.labels.items():
    for value, name in names.items():
      if named.setdefault(value, name) != name:
        raise UserError(f'{source.path}: value {value} of masks is {name!r} in {corpus}, {named[value]!r} in another '
                        f'corpus: give both the same {FILE}')
  if not named or len(source.labels) < max(len(source.datasets), 1):
    named = {value: str(value) for value in _found(source)} | named
  values = tuple(sorted(named))
  return Labels(values, tuple(named[value] for value in values))


def _found(source: Any) -> list[int]:
  """The values that occur in the masks of some rows."""
  if VALUES in source.table.column_names:
    found = pc.unique(pc.list_flatten(source.column(VALUES))).to_pylist()
  elif 'mask' in source.table.column_names:
    found = _read(source)
  else:
    raise UserError(f'{source.path} has no masks: expected a corpus that was prepared with some, see jaxmed prepare '
                    '--table and --layout')
  kept = sorted(v for v in found if v is not None and v != ABSENT)
  if not kept:
    raise UserError(f'the masks of {source.path} hold no class in these rows')
  return kept


def _read(source: Any) -> set[int]:
  rows = np.flatnonzero(source.column('mask').is_valid().to_numpy())
  taken = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_READ)).astype(int))] if len(rows) else rows
  print(f'jaxmed: {source.path} does not say which values its masks hold: {len(taken)} of {len(rows)} masks are read '
        f'for it; prepared again it has the column {VALUES}', file=sys.stderr, flush=True)
  masks = (source.record(int(i), ('mask',)).get('mask') for i in taken)
  return {value for mask in masks if mask is not None for value in counted(mask)}


def counted(mask: np.ndarray) -> dict[int, int]:
  """{value: pixels that have it} of a mask [*grid] of integers, ascending; little memory is needed beside it."""
  total: collections.Counter[int] = collections.Counter()
  for slab in slabs(mask):
    low, high = int(slab.min()), int(slab.max())
    if high - low < _SPAN:
      counts = np.bincount(slab.ravel().astype(np.int64) - low)
      values = np.flatnonzero(counts)
      total.update(dict(zip((values + low).tolist(), counts[values].tolist())))
    else:
      total.update(dict(zip(*(x.tolist() for x in np.unique(slab, return_counts=True)))))
  return dict(sorted(total.items()))


def slabs(mask: np.ndarray) -> list[np.ndarray]:
  """A mask [N, ...] in pieces along its first axis."""
  step = max(1, _SLAB // max(mask[0].size, 1))
  return [mask[i:i + step] for i in range(0, len(mask), step)]


def read(path: pathlib.Path) -> dict[int, str]:
  """{value: name} of a file that says {"1": "liver"} or, as nnU-Net does, {"liver": 1}.

  Raises:
    UserError: damaged, another form, a value or name twice.
  """
  content = files.read_json(path)
  form = f'{path} must be JSON of the form {{"0": "background", "1": "liver", ...}}'
  if not isinstance(content, Mapping) or not content:
    raise UserError(form)
  backwards = all(type(v) is int for v in content.values())
  names: dict[int, str] = {}
  for key, word in content.items():
    value, name = (word, key) if backwards else (_whole(key), word)
    if value is None or not isinstance(name, str) or not name:
      raise UserError(f'{form}; {key!r} has {word!r}')
    if value in names:
      raise UserError(f'{path} names the value {value} twice: {names[value]!r} and {name!r}')
    names[value] = name
  return checked(names, path)


def checked(names: Mapping[int, str], where: Any) -> dict[int, str]:
  """The names in the order of their values; a UserError for a value that no class can have, or a name twice."""
  for value in names:
    if not 0 <= value < 2**31:
      raise UserError(f'{where} names the value {value} ({names[value]!r}): expected 0 for the background and more for '
                      'classes')
  first: dict[str, int] = {}
  for value, name in names.items():
    if first.setdefault(name, value) != value:
      raise UserError(f'{where} gives the name {name!r} to the values {first[name]} and {value}: expected one each')
  return dict(sorted(names.items()))


def _whole(text: str) -> int | None:
  return int(text) if text.lstrip('-').isdecimal() else None
