"""First come, first kept: a row stays unless it is like one that stays before it."""

from collections.abc import Callable

import numpy as np

BASE = 512  # rows that are compared with each other at once


def first_come(count: int, match: Callable[[np.ndarray, np.ndarray], np.ndarray],
               alike: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """int64 [count]: the kept row that each row is like, -1 for rows that are kept.

  What is kept is the same as by comparing each row with all rows kept before it. Halves are taken one after the other:
  what the first keeps is an index for the second, so that only rows that are kept are ever looked up.

  Args:
    match: (rows [Q], kept rows [K]) -> [Q], a place among the kept that each row is like, or -1.
    alike: rows [B] -> bool [B, B], whether they are alike; symmetric.
  """
  like = np.full(count, -1, np.int64)

  def solve(rows: np.ndarray) -> np.ndarray:
    if len(rows) <= BASE:
      return few(rows)
    half = len(rows) // 2
    kept, rest = solve(rows[:half]), rows[half:]
    found = match(rest, kept)
    hit = found >= 0
    like[rest[hit]] = kept[found[hit]]
    return np.concatenate([kept, solve(rest[~hit])])

  def few(rows: np.ndarray) -> np.ndarray:
    pairs = np.triu(alike(rows), 1)
    gone = np.zeros(len(rows), bool)
    for i in np.flatnonzero(pairs.any(axis=1)):
      if not gone[i]:
        new = pairs[i] & ~gone
        like[rows[new]] = rows[i]
        gone |= new
    return rows[~gone]

  solve(np.arange(count))
  return like


def along_pairs(count: int, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
  """As above, from a list of the similar pairs of rows (earlier < later)."""
  like = np.full(count, -1, np.int64)
  for i in np.lexsort((earlier, later)):
    a, b = earlier[i], later[i]
    if like[a] < 0 and like[b] < 0:
      like[b] = a
  return like


def in_groups(groups: np.ndarray, one: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """`one` (rows [B] -> places in them that each is like, or -1) within each group; rows of the whole come back."""
  like = np.full(len(groups), -1, np.int64)
  order = np.argsort(groups, kind='stable')
  for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
    if len(rows) > 1:
      found = one(rows)
      hit = found >= 0
      like[rows[hit]] = rows[found[hit]]
  return like
