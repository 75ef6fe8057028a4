"""Samples of several records: windows of K rows of one group in order, such as frames of a case or visits of a subject.

Which rows a window has is arithmetic on its number: groups lie one after the other, and so do the windows of a group.
"""

import bisect
import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed.errors import UserError

BLANK = -1  # row of a place that a short group leaves empty


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """The windows of a source, as many of each group as show all of its rows (those that the stride does not skip).

  Attributes:
    order: [N] rows, group by group, each in order.
    starts: [G + 1] where each group begins in `order`.
    firsts: [G + 1] the first window of each group; the last number is that of all windows.
    length: rows K of a window.
    stride: rows between the starts of two windows of a group.
  """

  order: np.ndarray
  starts: np.ndarray
  firsts: np.ndarray
  length: int
  stride: int

  def __len__(self) -> int:
    return int(self.firsts[-1])

  def rows(self, i: int) -> np.ndarray:
    """The rows of window i, [K] int32 in order; BLANK after the last ones of a short group."""
    group = bisect.bisect_right(self.firsts, i) - 1
    begin = int(self.starts[group]) + (i - int(self.firsts[group])) * self.stride
    found = self.order[begin : min(begin + self.length, int(self.starts[group + 1]))]
    return np.pad(found.astype(np.int32), (0, self.length - len(found)), constant_values=BLANK)

  def heads(self, source: Any) -> Any:
    """The first records of all windows, as a source: what a mixture of windows goes by."""
    counts = np.diff(self.firsts)
    within = np.arange(len(self)) - self.firsts[:-1].repeat(counts)
    begins = self.starts[:-1].repeat(counts) + within * self.stride
    return dataclasses.replace(source, table=source.table.take(self.order[begins]))


def make(source: Any, length: int, group: str = '', order: str = '', stride: int = 0) -> Windows | None:
  """The windows of a source (see jaxmed.data.corpus.source), None where `length` is 0.

  Args:
    source: rows to make windows of.
    length: rows K of a window.
    group: column whose values are groups; '' for all rows as one. A row without a value is a group of its own.
    order: column to sort the rows of a group by, ties and '' as they stand; rows without a value come last.
    stride: rows between starts; 0 for K.

  Raises:
    UserError: an unknown column (the nearest is named), one that has no order.
  """
  if not length:
    return None
  stride = stride or length
  codes = _codes(source, group)
  rows = np.lexsort((_ranks(source, order), codes))
  sizes = np.bincount(codes, minlength=1)
  counts = np.where(sizes > 0, np.minimum(1 + -(-np.maximum(sizes - length, 0) // stride), -(-sizes // stride)), 0)
  total = lambda numbers: np.concatenate([[0], np.cumsum(numbers)])
  return Windows(rows.astype(np.int32) if len(rows) < 2**31 else rows, total(sizes), total(counts), length, stride)


def thin(source: Any, most: int, group: str = '') -> Any:
  """Whole groups, evenly spaced, of at most `most` rows in all; of a single longer one, its first rows."""
  if len(source) <= most:
    return source
  codes = _codes(source, group)
  sizes = np.bincount(codes)
  count = max(1, most * len(sizes) // len(source))
  while True:
    groups = np.unique(np.linspace(0, len(sizes) - 1, count).astype(int))
    if sizes[groups].sum() <= most or count == 1:
      break
    count = max(1, count * 3 // 4)
  rows = np.flatnonzero(np.isin(codes, groups))[:most]
  return dataclasses.replace(source, table=source.table.take(rows))


def _codes(source: Any, group: str) -> np.ndarray:
  """The group of each row, int64 [N], numbered without gaps."""
  if not group:
    return np.zeros(len(source), np.int64)
  codes, values = source.distinct(group)
  codes = codes.astype(np.int64)
  for code, value in enumerate(values):
    if value is None or value != value:
      alone = codes == code
      codes[alone] = len(values) + np.arange(alone.sum())
  return np.unique(codes, return_inverse=True)[1]


def _ranks(source: Any, order: str) -> np.ndarray:
  """The place of each row by a column, [N]."""
  if not order:
    return np.arange(len(source))
  column = source.column(order)
  try:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pc.rank(column, tiebreaker='first').to_numpy()  # nulls at the end
  except pa.ArrowException as e:
    raise UserError(f'loader.window_order={order} holds {source.column_type(order)}, which has no order') from e
