"""SemDeDup: near-duplicates in meaning, sought within clusters (Abbas et al. 2023, arXiv 2303.09540)."""

import numpy as np

from jaxmed.data.curate import clusters

_BLOCK = 1 << 24


def semdedup(x: np.ndarray, count: int, epsilon: float, seed: int) -> np.ndarray:
  """int64 [N]: the row before it that each row is most like, -1 for rows that are kept.

  Within each of `count` k-means clusters rows are ordered from the farthest from the centre to the nearest (by cosine),
  and a row goes where its cosine with any row before it is above 1 - epsilon, whether that one goes or not: of a group
  of duplicates the one farthest from the centre stays (section 3 of the paper).

  Args:
    x: float32 [N, D] of length 1.
  """
  like = np.full(len(x), -1, np.int64)
  which, cosine = clusters.spherical(x, count, seed)
  order = np.lexsort((np.arange(len(x)), cosine, which))
  for rows in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
    _one(x, rows, 1 - epsilon, like)
  return like


def _one(x: np.ndarray, rows: np.ndarray, limit: float, like: np.ndarray) -> None:
  step = max(_BLOCK // len(rows), 1)
  for start in range(0, len(rows), step):
    part = rows[start:start + step]
    before = rows[:start + len(part)]
    similar = x[part] @ x[before].T
    similar[np.arange(len(before)) >= start + np.arange(len(part))[:, None]] = -np.inf
    best = similar.argmax(axis=1)
    gone = similar[np.arange(len(part)), best] > limit
    like[part[gone]] = before[best[gone]]
