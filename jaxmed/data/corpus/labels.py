"""The classes of the masks of a corpus: the values that masks store, and their names."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmed.errors import UserError

MOST = 255  # more are no classes
BACKGROUND = 'background'  # the name of the value 0
THREADS = 4


@dataclasses.dataclass(frozen=True)
class Labels:
  """Values of masks that are classes, rising, and a name for each."""

  values: tuple[int, ...]
  names: tuple[str, ...]


def labels_of(source: Any) -> Labels:
  """The values in the masks of a source's records but -1, which says nothing; 0 is called the background.

  Masks are read whole, once.

  Raises:
    UserError: more than 255 values.
  """
  rows = np.flatnonzero(source.column('mask').is_valid().to_numpy())

  def values(i: int) -> set[int]:
    mask = source.record(int(i), ('mask',)).get('mask')
    return set() if mask is None else set(np.unique(mask).tolist())

  with ThreadPoolExecutor(THREADS) as pool:
    found = sorted(set().union(*pool.map(values, rows)) - {-1})
  if len(found) > MOST:
    raise UserError(f'the masks of {source.path} hold {len(found)} values; expected at most {MOST} classes (are they of '
                    'instances?)')
  return Labels(tuple(found), tuple(BACKGROUND if v == 0 else str(v) for v in found))
