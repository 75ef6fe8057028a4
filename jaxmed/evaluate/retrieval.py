"""Retrieval of images by image, as pure functions on arrays: what stands where in the ranking of a gallery."""

import importlib.util
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from jaxmed.errors import choose
from jaxmed.evaluate import metrics

DISTANCES = ('cosine', 'euclidean')
FAISS_FROM = 50_000  # images of a gallery from which faiss is worth its index
_CHUNK = 2**23  # similarities held at once: 64 MiB of float64
_DIGITS = 10  # of similarities: closer ones are equal, whatever the order of a sum
_SLACK = 1e-4  # error of a similarity in faiss's float32


class Rule(NamedTuple):
  """Which images of the gallery a query has: those of its own code if `same`, else those of another one.

  query [M], gallery [G]: integers. A negative one is unknown: such an image is in no gallery, such a query has none.
  """

  query: np.ndarray
  gallery: np.ndarray
  same: bool


def names(ranks: Sequence[int]) -> dict[str, str]:
  """The metrics of `retrieval` in the order of its columns, and how tables call them."""
  return ({f'recall_at_{k}': f'recall@{k}' for k in ranks}
          | {f'ndcg_at_{max(ranks)}': f'nDCG@{max(ranks)}', 'map_at_r': 'mAP@R', 'map': 'mAP'})


def retrieval(query_x: np.ndarray, query_y: np.ndarray, gallery_x: np.ndarray, gallery_y: np.ndarray,
              rules: Sequence[Rule] = (), ranks: Sequence[int] = (1, 5, 10), metric: str = 'cosine', depth: int = 0,
              engine: str = 'auto') -> np.ndarray:
  """Whether each query finds an image of its class, and how well those are ranked.

  The gallery of a query is what all rules leave of it, ranked by similarity. Among equally similar images (to 10 digits
  of the cosine, or of the squared distance in units of the largest squared norm) those of other classes come first: a
  constant feature scores the worst that it can. With R images of the query's class in its gallery:

  - recall at k is 1 where one of the first k images has the class (Recall@K of metric learning: Jegou et al. 2011);
  - nDCG at k, for the largest k, has gain 1 for an image of the class, over that of the best ranking;
  - mAP@R is the mean over the first R ranks of the precision there, 0 where another class stands (Musgrave et al.,
    arXiv 2003.08505);
  - average precision is the mean over the R images of the precision at their ranks. With `depth` it looks at so many
    ranks, and R is at most the depth in both.

  Args:
    query_x, gallery_x: features [M, D], [G, D]. query_y, gallery_y: integers. ranks: each k. metric: of DISTANCES.
    depth: ranks that are looked at, at least the largest k; 0 for all.
    engine: 'numpy', 'faiss' (exact, with a depth alone) or 'auto': faiss where it is installed and the gallery large.
      Both give the same.
  Returns:
    [M, len(ranks) + 3] float64, the columns of `names`. NaN for a query without an image of its class.
  """
  depth = min(max(depth, *ranks), len(gallery_x)) if depth else len(gallery_x)
  alike, _ = counts(query_y, gallery_y, rules)
  out = np.full((len(query_x), len(ranks) + 3), np.nan)
  place = np.arange(1, depth + 1)
  gain = 1 / np.log2(place + 1)
  for rows, order, there in ranked(query_x, query_y, gallery_x, gallery_y, rules, metric, depth, engine):
    some = alike[rows] > 0
    rows, r = rows[some], np.minimum(alike[rows][some], depth)
    hit = ((np.asarray(query_y)[rows, None] == np.asarray(gallery_y)[order[some]]) & there[some])
    found = np.cumsum(hit, axis=1)  # [m, depth]: how many images of the class up to each rank
    for i, k in enumerate(ranks):
      out[rows, i] = found[:, min(k, depth) - 1] > 0
    top = min(max(ranks), depth)
    out[rows, -3] = (hit[:, :top] @ gain[:top]) / np.cumsum(gain)[np.minimum(r, top) - 1]
    precision = hit * found / place
    out[rows, -2] = (precision * (place <= r[:, None])).sum(axis=1) / r
    out[rows, -1] = precision.sum(axis=1) / r
  return out


def ranked(query_x: np.ndarray, query_y: np.ndarray, gallery_x: np.ndarray, gallery_y: np.ndarray,
           rules: Sequence[Rule], metric: str, depth: int, engine: str = 'auto'
           ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields (rows [m] of queries, places [m, depth] in the gallery, nearest first, which of these count [m, depth])."""
  choose('retrieval metric', metric, DISTANCES)
  queries, gallery = _comparable(query_x, gallery_x, metric)
  query_y, gallery_y = np.asarray(query_y), np.asarray(gallery_y)
  wanted = engine == 'faiss' or (engine == 'auto' and len(gallery) >= FAISS_FROM)
  left = np.arange(len(queries))
  if wanted and depth < len(gallery) and importlib.util.find_spec('faiss') is not None:
    done = np.zeros(len(queries), bool)
    for rows, order, there in _by_faiss(queries, query_y, gallery, gallery_y, rules, metric, depth):
      done[rows] = True
      yield rows, order, there
    left = np.flatnonzero(~done)
  step = max(1, _CHUNK // max(len(gallery), 1))
  for start in range(0, len(left), step):
    rows = left[start:start + step]
    key = _keys(queries[rows], gallery, metric)
    key += (query_y[rows, None] == gallery_y) * 10.0**-(_DIGITS + 1)
    key[~_allowed(rules, rows, len(gallery))] = np.inf
    yield rows, *_first(key, depth)


def counts(query_y: np.ndarray, gallery_y: np.ndarray, rules: Sequence[Rule] = ()) -> tuple[np.ndarray, np.ndarray]:
  """[M], [M]: images of the class of each query in its gallery, and all images there."""
  queried, stored = np.ones(len(query_y), bool), np.ones(len(gallery_y), bool)
  for rule in rules:
    queried, stored = queried & (rule.query >= 0), stored & (rule.gallery >= 0)
  same = [r for r in rules if r.same]
  out = []
  for classes in ((query_y, gallery_y),), ():
    total = np.zeros(len(query_y), np.int64)
    for picked in itertools.chain.from_iterable(  # inclusion and exclusion
        itertools.combinations([r for r in rules if not r.same], n) for n in range(len(rules) - len(same) + 1)):
      pairs = [*classes, *((r.query, r.gallery) for r in (*same, *picked))]
      total += (-1) ** len(picked) * _equal(pairs, queried, stored)
    out.append(np.where(queried, total, 0))
  return out[0], out[1]


def chance(alike: np.ndarray, size: np.ndarray, ranks: Sequence[int] = (1, 5, 10), depth: int = 0) -> np.ndarray:
  """What `retrieval` gives on average where the gallery is shuffled.

  Args:
    alike: [M], images of each query's class in its gallery. size: [M], all of them. depth: as of `retrieval`.
  Returns:
    [M, len(ranks) + 3]; NaN where `alike` is 0.
  """
  alike, size = np.asarray(alike, np.int64), np.asarray(size, np.int64)
  out = np.full((len(alike), len(ranks) + 3), np.nan)
  some = alike > 0
  r, n = alike[some], size[some]
  if not len(r):
    return out
  deep = np.minimum(max(depth, *ranks), n) if depth else n
  for i, k in enumerate(ranks):
    missed = np.ones(len(r))
    for j in range(k):  # the chance that none of k draws is alike
      missed *= np.maximum(n - r - j, 0) / np.maximum(n - j, 1)
    out[some, i] = 1 - missed
  gains = np.cumsum(1 / np.log2(np.arange(2, max(ranks) + 2)))
  top = np.minimum(max(ranks), deep)
  out[some, -3] = r / n * gains[top - 1] / gains[np.minimum(r, top) - 1]
  harmonic = np.cumsum(1 / np.arange(1, deep.max() + 1))
  # The precision at rank i, where the class stands there, is on average (1 + (i - 1)(r - 1)/(n - 1)) / i.
  share = lambda last: r / n * (harmonic[last - 1] + (r - 1) / np.maximum(n - 1, 1) * (last - harmonic[last - 1]))
  most = np.minimum(r, deep)
  out[some, -2], out[some, -1] = share(most) / most, share(deep) / most
  return out


def clusters(x: np.ndarray, count: int, metric: str = 'cosine', seed: int = 0) -> np.ndarray:
  """KMeans clusters [N] of features [N, D]; of unit vectors where the metric is 'cosine'."""
  from sklearn.cluster import KMeans
  from sklearn.exceptions import ConvergenceWarning
  x = _unit(x) if metric == 'cosine' else np.asarray(x, np.float64)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # fewer different features than clusters
    return KMeans(min(count, len(x)), n_init=4, random_state=seed).fit_predict(x)


def nmi(table: np.ndarray) -> np.ndarray:
  """Normalised mutual information [...] of counts [..., clusters, classes], over the arithmetic mean of the entropies;
  1 where both are one group, as scikit-learn has it."""
  table = np.asarray(table, np.float64)
  p = table / np.maximum(table.sum(axis=(-2, -1), keepdims=True), 1e-300)
  entropy = lambda q: -(q * np.log(np.where(q > 0, q, 1))).sum(axis=-1)
  a, b = entropy(p.sum(axis=-1)), entropy(p.sum(axis=-2))
  mutual = np.maximum(a + b - entropy(p.reshape(*p.shape[:-2], -1)), 0)
  return np.where(a + b > 1e-12, 2 * mutual / np.maximum(a + b, 1e-12), 1.0)


def clustering_score(y: np.ndarray, groups: np.ndarray) -> float:
  """NMI of classes [M] and clusters [M]."""
  cells, shape = _cells(y, groups)
  return float(nmi(np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)))


def resampled_score(y: np.ndarray, groups: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000,
                    seed: int = 0) -> np.ndarray:
  """The same [draws] on resampled subjects, as of `metrics.resampled`; NaN of a single subject."""
  (cells, shape), (people, subject) = _cells(y, groups), np.unique(np.asarray(subjects), return_inverse=True)
  if len(people) < 2:
    return np.full(1, np.nan)
  table = sparse.csr_array((np.ones(len(cells)), (subject, cells)), shape=(len(people), shape[0] * shape[1]))
  chunk = max(1, _CHUNK // (shape[0] * shape[1]))
  return np.concatenate([nmi((table.T @ drawn.T).T.reshape(-1, *shape))
                         for drawn in metrics.resamples(len(people), draws, seed, chunk)])


def _cells(y: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
  """The cell [M] of each row in a table of clusters by classes, and the shape of that table."""
  y, groups = (np.unique(a, return_inverse=True)[1] for a in (y, groups))
  return groups * (y.max() + 1) + y, (int(groups.max()) + 1, int(y.max()) + 1)


def _by_faiss(queries: np.ndarray, query_y: np.ndarray, gallery: np.ndarray, gallery_y: np.ndarray,
              rules: Sequence[Rule], metric: str, depth: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """As `ranked`, of the queries whose first places are certain: exact inner products in float32 find more than are
  needed, their similarities are computed again, and a query whose last place might tie with what was not found is left
  to the caller. Queries that share the codes of all rules that leave out much search an index of their own."""
  import faiss
  most = [int(np.unique(r.gallery, return_counts=True)[1].max()) for r in rules]
  wide = [r for r, n in zip(rules, most, strict=True) if r.same or n > depth]
  spare = sum(n for r, n in zip(rules, most, strict=True) if not (r.same or n > depth))
  codes = np.stack([np.zeros(len(queries), np.int64), *(r.query for r in wide)])
  code = np.unique(codes, axis=1, return_inverse=True)[1].ravel()
  for group in range(code.max() + 1):
    rows = np.flatnonzero(code == group)
    inside = np.flatnonzero(_allowed(wide, rows[:1], len(gallery))[0])
    fetch = min(depth + spare + 16, len(inside))
    if fetch < depth:
      continue
    index = faiss.IndexFlatIP(queries.shape[1] + 1)
    # The inner product with one more number, -|g|^2 / 2, ranks by distance.
    last = np.zeros(len(gallery)) if metric == 'cosine' else -np.square(gallery).sum(axis=1) / 2
    index.add(np.ascontiguousarray(np.column_stack([gallery, last])[inside], np.float32))
    step = max(1, _CHUNK // fetch)
    for start in range(0, len(rows), step):
      part = rows[start:start + step]
      asked = np.ascontiguousarray(np.column_stack([queries[part], np.ones(len(part))]), np.float32)
      near, found = index.search(asked, fetch)
      place = inside[found]
      key = np.stack([_keys(queries[i][None], gallery[p], metric)[0] for i, p in zip(part, place, strict=True)])
      key += (query_y[part, None] == gallery_y[place]) * 10.0**-(_DIGITS + 1)
      key[~_allowed(rules, part, fetch, place)] = np.inf
      order, there = _first(key, depth)
      limit = -near[:, -1] if metric == 'cosine' else np.square(queries[part]).sum(axis=1) - 2 * near[:, -1]
      last_key = np.take_along_axis(key, order[:, -1:], axis=1)[:, 0]
      sure = (last_key < limit - _SLACK) if fetch < len(inside) else np.ones(len(part), bool)
      yield part[sure], np.take_along_axis(place, order, axis=1)[sure], there[sure]


def _allowed(rules: Sequence[Rule], rows: np.ndarray, size: int, places: np.ndarray | None = None) -> np.ndarray:
  """bool [m, size]: what the rules leave of the gallery of each row, or of its `places` [m, size]."""
  out = np.ones((len(rows), size), bool)
  for rule in rules:
    own, other = rule.query[rows, None], rule.gallery[None] if places is None else rule.gallery[places]
    out = out & ((own == other) == rule.same) & (own >= 0) & (other >= 0)
  return out


def _first(key: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
  """The places [m, depth] of the smallest keys, in order, and which of these are finite."""
  if depth < key.shape[1]:
    some = np.argpartition(key, depth - 1, axis=1)[:, :depth]
    order = np.take_along_axis(some, np.argsort(np.take_along_axis(key, some, axis=1), axis=1, kind='stable'), axis=1)
  else:
    order = np.argsort(key, axis=1, kind='stable')
  return order, np.isfinite(np.take_along_axis(key, order, axis=1))


def _keys(queries: np.ndarray, gallery: np.ndarray, metric: str) -> np.ndarray:
  """[m, G] float64, smaller for nearer: minus the cosine, or the squared distance, rounded."""
  near = queries @ gallery.T
  if metric == 'cosine':
    return np.round(-near, _DIGITS)
  far = np.square(queries).sum(axis=1)[:, None] + np.square(gallery).sum(axis=1) - 2 * near
  return np.round(np.maximum(far, 0), _DIGITS)


def _comparable(query_x: np.ndarray, gallery_x: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Features in float64: unit vectors, or around the mean of the gallery with a largest norm of 1."""
  if metric == 'cosine':
    return _unit(query_x), _unit(gallery_x)
  middle = np.asarray(gallery_x, np.float64).mean(axis=0)
  queries, gallery = np.asarray(query_x, np.float64) - middle, np.asarray(gallery_x, np.float64) - middle
  largest = max(np.linalg.norm(a, axis=1).max(initial=0.0) for a in (queries, gallery))
  return queries / max(largest, 1e-30), gallery / max(largest, 1e-30)


def _equal(pairs: Sequence[tuple[np.ndarray, np.ndarray]], queried: np.ndarray, stored: np.ndarray) -> np.ndarray:
  """[M]: images of the gallery, of those `stored`, that have all codes of a query."""
  if not pairs:
    return np.full(len(queried), np.count_nonzero(stored))
  both = np.stack([np.concatenate([q, np.asarray(g)[stored]]) for q, g in pairs])
  code = np.unique(both, axis=1, return_inverse=True)[1].ravel()
  found = np.bincount(code[len(queried):], minlength=code.max(initial=0) + 1)
  return found[code[:len(queried)]]


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
