"""What a way to select says of the rows that it was given."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Which rows go, and why.

  Attributes:
    reason: object [N], a word for each row that goes, '' for rows that stay. value: float64 [N], what was measured, NaN
      for nothing. like: int64 [N], the row that stays in the place of each, -1 for none.
  """

  reason: np.ndarray
  value: np.ndarray
  like: np.ndarray

  @property
  def keep(self) -> np.ndarray:
    """bool [N]."""
    return self.reason == ''

  @classmethod
  def of(cls, gone: np.ndarray, reason: str, value: np.ndarray | None = None) -> 'Verdict':
    """One reason for all rows that go."""
    words = np.full(len(gone), '', object)
    words[gone] = reason
    return cls(words, np.full(len(gone), np.nan) if value is None else value, np.full(len(gone), -1))

  @classmethod
  def duplicates(cls, like: np.ndarray, value: np.ndarray) -> 'Verdict':
    """From the row that each row is like (-1 for rows that stay), and how much."""
    return dataclasses.replace(cls.of(like >= 0, 'duplicate', np.where(like >= 0, value, np.nan)), like=like)
