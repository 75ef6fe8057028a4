"""Features of records as `jaxmed embed` writes them: near-duplicates by their cosine, and nearest neighbours.

Up to EXACT pairs are compared all; beyond that faiss looks up neighbours in the nearest of many cells (IVF), which
misses a few.
"""

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed.data.curate import greedy
from jaxmed.errors import UserError, need

EXACT = 1 << 32  # pairs
_BLOCK = 1 << 24  # similarities at once
_PROBES = 32  # cells that faiss looks into
_TRAINED = 64  # rows a cell that the cells are fitted to


def stored(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
  """Features [N, D] and ids [N] of a file that `jaxmed embed` wrote; a UserError where it is none."""
  try:
    with np.load(path, allow_pickle=False) as f:
      return f['features'], f['id']
  except FileNotFoundError as e:
    raise UserError(f'{path} does not exist: expected features that `jaxmed embed` writes') from e
  except (OSError, ValueError, KeyError, EOFError) as e:
    raise UserError(f'{path} holds no features and ids: expected a file that `jaxmed embed` writes ({e})') from e


def of_ids(features: np.ndarray, names: np.ndarray, ids: pa.ChunkedArray, told: str) -> np.ndarray:
  """Features [M, D] with names [M], ordered by `ids` and L2-normalised; errors name their file."""
  if features.ndim != 2 or len(features) != len(names):
    raise UserError(f'{told} has features {features.shape} for {len(names)} ids: expected [N, D] and N')
  at = pc.index_in(ids, value_set=pa.array(names.tolist(), pa.string()))
  if at.null_count:
    lost = ids.filter(pc.is_null(at))
    raise UserError(f'{told} lacks {len(lost)} of {len(ids)} records, the first is {lost[0].as_py()}: embed the whole '
                    'corpus')
  return unit(features[at.to_numpy()])


def unit(x: np.ndarray) -> np.ndarray:
  """Rows of length 1 in float32; rows of zeros stay."""
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def near_duplicates(x: np.ndarray, threshold: float, groups: np.ndarray | None = None) -> np.ndarray:
  """int64 [N]: the kept row whose cosine with each row reaches the threshold, -1 for rows that are kept.

  Args:
    x: [N, D] of length 1. groups: [N], compare within equal values only.
  """
  if groups is not None:
    return greedy.in_groups(groups, lambda rows: near_duplicates(x[rows], threshold))

  def match(rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return within(x[rows], x[kept], threshold)

  return greedy.first_come(len(x), match, lambda rows: x[rows] @ x[rows].T >= threshold)


def within(queries: np.ndarray, index: np.ndarray, threshold: float) -> np.ndarray:
  """int64 [Q]: the place in `index` of the most similar row where its cosine reaches the threshold, -1 elsewhere."""
  if not len(queries) or not len(index):
    return np.full(len(queries), -1, np.int64)
  found, cosine = _search(queries, index, 1)
  return np.where(cosine[:, 0] >= threshold, found[:, 0], -1)


def nearest(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The `count` rows most similar by cosine to each, itself among them: places [N, count] (-1 for none), cosines."""
  x = unit(x)
  return _search(x, x, count)


def _search(queries: np.ndarray, index: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  if len(queries) * len(index) > EXACT:
    return _cells(queries, index, count)
  places, cosines = [], []
  step = max(_BLOCK // len(index), 1)
  for start in range(0, len(queries), step):
    similar = queries[start:start + step] @ index.T
    top = similar.argmax(axis=1)[:, None] if count == 1 else np.argpartition(-similar, count - 1, axis=1)[:, :count]
    places.append(top)
    cosines.append(np.take_along_axis(similar, top, axis=1))
  return np.concatenate(places), np.concatenate(cosines)


def _cells(queries: np.ndarray, index: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  faiss: Any = need('faiss', 'curate')
  cells = max(1, min(int(4 * len(index) ** 0.5), len(index) // _TRAINED))
  ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(index.shape[1]), index.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
  ivf.train(np.ascontiguousarray(index[::max(1, len(index) // (_TRAINED * cells))]))
  ivf.add(np.ascontiguousarray(index))
  ivf.nprobe = min(_PROBES, cells)
  cosines, places = ivf.search(np.ascontiguousarray(queries), count)
  return places, cosines
