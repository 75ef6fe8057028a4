"""Balanced samples by hierarchical k-means (Vo et al. 2024, arXiv 2405.15613, the curation of DINOv3's data).

Clusters of features are themselves clustered, level by level, and each level's centres are fitted again on as many
points of each cluster (those nearest to its centre), so that they spread evenly over what there is rather than over
what there is much of. A sample is then drawn from the top: every cluster gives the same share, or all that it has.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.data.curate import clusters

_NEAREST = 16  # points of each cluster that its level is fitted again on
_AGAIN = 2  # times


def waterfill(sizes: np.ndarray, total: int) -> np.ndarray:
  """int64 [C]: how many to take of each cluster so that they are `total`, and as equal as their sizes allow.

  min(size, t) for a level t; where no whole t gives the total, the first clusters with room give one more. All of
  them where there are not enough.
  """
  sizes = np.asarray(sizes, np.int64)
  total = min(int(total), int(sizes.sum()))
  rising = np.sort(sizes)
  below = np.concatenate([[0], np.cumsum(rising)])  # of the i smallest clusters
  left = len(sizes) - np.arange(len(sizes))  # that are at least as large as the i-th
  reached = below[:-1] + left * rising  # taken where the level is the i-th size
  i = int(np.searchsorted(reached, total))
  if i == len(sizes):
    return sizes.copy()
  level = (total - below[i]) // left[i]
  take = np.minimum(sizes, level)
  room = np.flatnonzero(sizes > level)
  take[room[:total - int(take.sum())]] += 1
  return take


def tree(x: np.ndarray, levels: Sequence[int], seed: int) -> list[np.ndarray]:
  """For each level, from the finest, the cluster of each cluster below it: [N] into levels[0], [levels[0]] into ..."""
  parents, points = [], x
  for level, count in enumerate(levels):
    centres = clusters.kmeans(points, count, seed + level)
    for _ in range(_AGAIN):
      which, far = clusters.assign(points, centres)
      centres = centres[np.unique(which)]
      centres = clusters.kmeans(points[_closest(which, far)], len(centres), seed + level, centres)
    which, _ = clusters.assign(points, centres)
    used, which = np.unique(which, return_inverse=True)
    parents.append(which)
    points = centres[used]
  return parents


def _closest(which: np.ndarray, far: np.ndarray) -> np.ndarray:
  """The rows of each cluster that are nearest to its centre, _NEAREST of them at most, in rising order."""
  order = np.lexsort((far, which))
  group = which[order]
  begin = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
  rank = np.arange(len(order)) - np.repeat(begin, np.diff([*begin, len(order)]))
  return np.sort(order[rank < _NEAREST])


def sample(parents: Sequence[np.ndarray], total: int, seed: int) -> np.ndarray:
  """Rows of a balanced sample, rising: shares from the top level down, and within the finest clusters at random."""
  whole = np.arange(len(parents[0]))
  at = [whole]  # the cluster of each row at each level, from the rows themselves
  for parent in parents:
    at.append(parent[at[-1]])
  share = np.array([total])
  group = np.zeros(len(whole), np.int64)  # of each row, in the level above
  for level in range(len(parents), 0, -1):
    share = _shared(at[level], group, share)
    group = at[level]
  rng = np.random.default_rng(seed)
  order = np.lexsort((rng.random(len(whole)), group))
  begin = np.searchsorted(group[order], np.arange(len(share)))
  rank = np.arange(len(order)) - begin[group[order]]
  return np.sort(order[rank < share[group[order]]])


def _shared(child: np.ndarray, parent: np.ndarray, share: np.ndarray) -> np.ndarray:
  """The share of each child cluster, from the shares of its parents; both are given row by row."""
  sizes = np.bincount(child)
  of = np.zeros(len(sizes), np.int64)
  of[child] = parent
  out = np.zeros(len(sizes), np.int64)
  for p, total in enumerate(share):
    mine = np.flatnonzero(of == p)
    out[mine] = waterfill(sizes[mine], int(total))
  return out


def balanced(x: np.ndarray, levels: Sequence[int], total: int, seed: int) -> np.ndarray:
  """bool [N]: which rows of features [N, D] a balanced sample of `total` takes."""
  keep = np.zeros(len(x), bool)
  keep[sample(tree(x, levels, seed), total, seed)] = True
  return keep
