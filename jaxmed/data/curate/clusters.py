"""k-means on features of length 1."""

import numpy as np

from jaxmed.data.curate.features import unit

_LLOYD = 50_000  # rows; with more of them each step of k-means sees a part
_BLOCK = 1 << 24


def kmeans(x: np.ndarray, k: int, seed: int, start: np.ndarray | None = None) -> np.ndarray:
  """float32 [k, D]: centres of the rows of x [N, D] by scikit-learn, Lloyd or minibatches of many rows.

  They begin with `start` [k, D], or by k-means++.
  """
  from sklearn.cluster import KMeans, MiniBatchKMeans

  k = min(k, len(x))
  init = 'k-means++' if start is None else start
  if len(x) > _LLOYD:
    fitted = MiniBatchKMeans(k, init=init, random_state=seed, n_init=1, batch_size=max(4096, 4 * k)).fit(x)
  else:
    fitted = KMeans(k, init=init, random_state=seed, n_init=1).fit(x)
  return np.asarray(fitted.cluster_centers_, np.float32)


def assign(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The nearest centre of each row by Euclidean distance, int64 [N], and the squared distance [N]."""
  which, far = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
  lengths = (centres**2).sum(axis=1)
  step = max(_BLOCK // len(centres), 1)
  for start in range(0, len(x), step):
    part = x[start:start + step]
    squared = lengths - 2 * part @ centres.T
    best = squared.argmin(axis=1)
    which.append(best)
    far.append(np.take_along_axis(squared, best[:, None], axis=1)[:, 0] + (part**2).sum(axis=1))
  return np.concatenate(which), np.maximum(np.concatenate(far), 0)


def spherical(x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """k-means of rows of length 1 with centres of length 1: cluster of each row, and its cosine with the centre."""
  centres = unit(kmeans(x, k, seed))
  which, _ = assign(x, centres)
  return which, np.einsum('nd,nd->n', x, centres[which])
