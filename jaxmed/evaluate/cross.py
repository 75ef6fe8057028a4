"""Retrieval between two kinds of records, of which each may belong to several of the other: functions of arrays."""

import json
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from jaxmed.evaluate import metrics

_CHUNK = 2**23  # similarities held at once: 64 MiB of float64
_DIGITS = 10  # of similarities: closer ones are equal, whatever the order of a sum


def ranked(queries: np.ndarray, gallery: np.ndarray, right: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
  """Of each query the rank (from 1) of its first right candidate [Q], and its average precision [Q].

  Among equally similar candidates (to 10 digits of the cosine) wrong ones come first. Recall at k is rank <= k: any
  right candidate is a hit, as in google-research/big_vision, evaluators/proj/image_text/image_text_retrieval.py.

  Args:
    queries, gallery: unit vectors [Q, D], [G, D]. right: [Q, G], what belongs to what.
  Returns:
    float64; NaN for a query to which nothing belongs.
  """
  queries, gallery = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
  rank, precision = np.full(len(queries), np.nan), np.full(len(queries), np.nan)
  place = np.arange(1, len(gallery) + 1)
  step = max(1, _CHUNK // max(len(gallery), 1))
  for start in range(0, len(queries), step):
    rows = slice(start, start + step)
    hit = right[rows].toarray().astype(bool)
    far = np.round(-(queries[rows] @ gallery.T), _DIGITS)
    order = np.lexsort((hit, far), axis=1)
    hit = np.take_along_axis(hit, order, axis=1)
    some = hit.any(axis=1)
    found = np.cumsum(hit, axis=1)
    rank[rows] = np.where(some, hit.argmax(axis=1) + 1.0, np.nan)
    precision[rows] = np.where(some, (hit * found / place).sum(axis=1) / np.maximum(hit.sum(axis=1), 1), np.nan)
  return rank, precision


def best(queries: np.ndarray, gallery: np.ndarray, count: int) -> np.ndarray:
  """The places [Q, count] of the most similar candidates, best first."""
  near = np.round(np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T, _DIGITS)
  return np.argsort(-near, axis=1, kind='stable')[:, :count]


def median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Medians [R] of values [M] that are there `weights` [R, M] times (whole numbers); NaN where nothing is."""
  order = np.argsort(values, kind='stable')
  ranked_values, until = np.asarray(values)[order], np.cumsum(weights[:, order], axis=1)
  half = until[:, -1:] / 2
  low = ranked_values[np.minimum((until < half).sum(axis=1), len(values) - 1)]
  high = ranked_values[np.minimum((until <= half).sum(axis=1), len(values) - 1)]
  return np.where(half[:, 0] > 0, (low + high) / 2, np.nan)


def resampled_median(values: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int, seed: int) -> np.ndarray:
  """Medians [draws] on resampled subjects, see `metrics.resampled`; NaN [1] for a single subject."""
  parts = [median(values, w) for w in metrics.resampled_weights(subjects, draws=draws, seed=seed)]
  return np.concatenate(parts) if parts else np.full(1, np.nan)


def captions_of(text: str) -> list[str]:
  """The texts of a record: those of a JSON list, else the text alone."""
  if text.startswith('['):
    try:
      found = json.loads(text)
    except ValueError:
      return [text]
    if isinstance(found, list) and found and all(isinstance(t, str) for t in found):
      return [t for t in found if t.strip()]
  return [text] if text.strip() else []


def belongs(ours: Sequence[set], theirs: Sequence[set]) -> sparse.csr_array:
  """[M, T]: which two have a key in common, given the keys of each."""
  place = {key: i for i, key in enumerate(dict.fromkeys(k for some in (*ours, *theirs) for k in sorted(some)))}
  def table(sets: Sequence[set]) -> sparse.csr_array:
    rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    columns = np.array([place[k] for s in sets for k in s], np.int64)
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(sets), len(place)))
  return sparse.csr_array(table(ours) @ table(theirs).T)
