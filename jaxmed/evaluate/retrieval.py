"""Retrieval of images by image, as pure functions on arrays: what stands where in the ranking of a gallery."""

import numpy as np

_CHUNK = 2**23  # similarities held at once: 64 MiB of float64


def retrieval(query_x: np.ndarray, query_y: np.ndarray, query_subjects: np.ndarray, gallery_x: np.ndarray,
              gallery_y: np.ndarray, gallery_subjects: np.ndarray, ranks: tuple[int, ...] = (1, 5, 10)) -> np.ndarray:
  """Whether each query finds an image of its class, and how well those are ranked.

  The gallery is ranked by cosine similarity, equal ones in its own order. Images of the query's subject, itself among
  them, are no part of its gallery. Recall at k is 1 where one of the first k images has the query's class (as Recall@K
  in metric learning: Jegou et al. 2011), average precision the mean over the images of that class of the precision at
  their ranks.

  Args:
    query_x, gallery_x: features [M, D], [G, D]. query_y, gallery_y: integers. query_subjects, gallery_subjects: names.
    ranks: each k.
  Returns:
    [M, len(ranks) + 1] float64: recall at each k, then average precision. NaN for a query without an image of its
    class.
  """
  queries, gallery = _unit(query_x), _unit(gallery_x)
  gallery_y = np.asarray(gallery_y)
  subjects = np.unique(np.concatenate([query_subjects, gallery_subjects]), return_inverse=True)[1]
  query_subjects, gallery_subjects = subjects[:len(queries)], subjects[len(queries):]
  out = np.full((len(queries), len(ranks) + 1), np.nan)
  place = np.arange(1, len(gallery) + 1)
  step = max(1, _CHUNK // max(len(gallery), 1))
  for start in range(0, len(queries), step):
    rows = slice(start, start + step)
    own = query_subjects[rows, None] == gallery_subjects  # [m, G]
    order = np.argsort(np.where(own, np.inf, -(queries[rows] @ gallery.T)), axis=1, kind='stable')
    alike = (np.asarray(query_y)[rows, None] == gallery_y) & ~own
    hit = np.take_along_axis(alike, order, axis=1)
    found = np.cumsum(hit, axis=1)  # [m, G]: how many images of the class up to each rank
    some = np.flatnonzero(hit.any(axis=1))
    for i, k in enumerate(ranks):
      out[start + some, i] = found[some, min(k, len(gallery)) - 1] > 0
    out[start + some, -1] = (hit * found / place)[some].sum(axis=1) / found[some, -1]
  return out


def chance(alike: np.ndarray, size: np.ndarray, ranks: tuple[int, ...] = (1, 5, 10)) -> np.ndarray:
  """What `retrieval` gives on average where the gallery is shuffled.

  Args:
    alike: [M], images of each query's class in its gallery. size: [M], all of them.
  Returns:
    [M, len(ranks) + 1]; NaN where `alike` is 0.
  """
  alike, size = np.asarray(alike, np.float64), np.asarray(size, np.float64)
  out = np.full((len(alike), len(ranks) + 1), np.nan)
  some = alike > 0
  r, n = alike[some], size[some]
  for i, k in enumerate(ranks):
    missed = np.ones(len(r))
    for j in range(k):  # the chance that none of k draws is alike
      missed *= np.maximum(n - r - j, 0) / np.maximum(n - j, 1)
    out[some, i] = 1 - missed
  harmonic = np.array([(1 / np.arange(1, int(m) + 1)).sum() for m in n])
  out[some, -1] = (harmonic + (r - 1) / np.maximum(n - 1, 1) * (n - harmonic)) / n
  return out


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
