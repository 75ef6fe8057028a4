"""Classification metrics and their bootstrap intervals over subjects.

Rows of one subject are not independent, so subjects are resampled with replacement and all rows of a subject
move together (cluster bootstrap, percentile interval). A resample is a vector of weights, how often each
subject was drawn, and every metric here is computed for many such vectors at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError

METRICS = ('accuracy', 'balanced_accuracy', 'auroc')
LABELS = {'accuracy': 'accuracy', 'balanced_accuracy': 'balanced accuracy', 'auroc': 'macro AUROC'}
_CHUNK = 2**22  # row weights held at once: 32 MiB of float64


def score(y: np.ndarray, scores: np.ndarray, auroc_classes: Sequence[int] | None = None) -> dict[str, float]:
  """Accuracy, balanced accuracy and macro AUROC by scikit-learn.

  AUROC is one-vs-rest and averaged over the classes of `auroc_classes` (default: all) that y has and that are
  not all of y; see `absent_classes` for the others. It is NaN if no class is left.

  Args:
    y: [M] integers in 0..K-1. scores: [M, K], larger means likelier; the prediction is the largest.
  """
  from sklearn.metrics import accuracy_score, roc_auc_score
  y, scores = _checked(y, scores)
  predicted = scores.argmax(axis=1)
  # scikit-learn's balanced_accuracy_score warns about predicted classes that y lacks; this is its definition.
  recall = [float((predicted[y == c] == c).mean()) for c in np.unique(y)]
  usable = _usable(y, scores.shape[1], auroc_classes)
  auroc = [float(roc_auc_score(y == c, scores[:, c])) for c in usable]
  return dict(accuracy=float(accuracy_score(y, predicted)), balanced_accuracy=float(np.mean(recall)),
              auroc=float(np.mean(auroc)) if auroc else float('nan'))


def absent_classes(y: np.ndarray, num_classes: int) -> tuple[int, ...]:
  """The classes of 0..num_classes - 1 that y has no row of: macro AUROC leaves them out."""
  return tuple(c for c in range(num_classes) if not np.any(np.asarray(y) == c))


def intervals(
  y: np.ndarray,
  scores: np.ndarray,
  subjects: Sequence | np.ndarray,
  *,
  draws: int = 1000,
  seed: int = 0,
  auroc_classes: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
  """Each metric with its 95 % percentile bootstrap interval over subjects.

  In a resample that lacks a class, the means over classes are over those it has. With a single subject there
  is no interval: 'low' and 'high' are NaN.

  Args:
    y: [M] integers. scores: [M, K]. subjects: [M], equal values move together.

  Returns:
    {metric: {'value', 'low', 'high'}} for accuracy, balanced_accuracy, auroc.
  """
  ask: dict[str, Any] = dict(draws=draws, seed=seed, auroc_classes=auroc_classes)
  return summarised(score(y, scores, auroc_classes), resampled(y, scores, subjects, **ask))


def resampled(y: np.ndarray, scores: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000, seed: int = 0,
              auroc_classes: Sequence[int] | None = None) -> dict[str, np.ndarray]:
  """Each metric [draws] on resampled subjects: the same ones wherever `subjects`, `draws` and `seed` are the same."""
  y, scores = _checked(y, scores)
  return _bootstrap(y, [scores], subjects, draws, seed, auroc_classes)[0]


def summarised(values: Mapping[str, float], drawn: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """{metric: {'value', 'low', 'high'}} of values and what resamples give, NaN left out."""
  return {m: _interval(value, drawn[m]) for m, value in values.items()}


def resampled_means(values: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000,
                    seed: int = 0) -> np.ndarray:
  """Means [draws, K] of rows [M, K] on resampled subjects: the same ones as of `resampled`.

  A NaN is no part of the mean of its column; a resample of nothing else has NaN, and so has a single subject.
  """
  values = np.asarray(values, np.float64)
  names, subject = _subjects(subjects, len(values), draws)
  if len(names) < 2:
    return np.full((1, values.shape[1]), np.nan)
  there = ~np.isnan(values)
  total, count = (np.zeros((len(names), values.shape[1])) for _ in range(2))
  np.add.at(total, subject, np.where(there, values, 0.0))
  np.add.at(count, subject, there)
  parts = []
  for counts in resamples(len(names), draws, seed, max(1, _CHUNK // len(values))):
    n = counts @ count
    parts.append(np.divide(counts @ total, n, out=np.full(n.shape, np.nan), where=n > 0))
  return np.concatenate(parts)


def resampled_sums(values: np.ndarray, subjects: Sequence | np.ndarray, *, draws: int = 1000,
                   seed: int = 0) -> np.ndarray:
  """Sums [draws, K] of rows [M, K] over resampled subjects, the same ones as of `resampled`; NaN for a single subject.

  A metric that is a function of sums over rows has its resamples by these.
  """
  values = np.asarray(values, np.float64)
  names, subject = _subjects(subjects, len(values), draws)
  if len(names) < 2:
    return np.full((1, values.shape[1]), np.nan)
  total = np.zeros((len(names), values.shape[1]))
  np.add.at(total, subject, values)
  return np.concatenate([counts @ total for counts in resamples(len(names), draws, seed, max(1, _CHUNK // len(names)))])


def resampled_counts(codes: np.ndarray, size: int, subjects: Sequence | np.ndarray, *, draws: int = 1000,
                     seed: int = 0) -> np.ndarray:
  """How many rows [draws, size] of each code in 0..size - 1 resampled subjects have; negative codes are not counted.

  As of `resampled_sums` with rows that are one-hot, without making these.
  """
  codes = np.asarray(codes, np.int64)
  names, subject = _subjects(subjects, len(codes), draws)
  if len(names) < 2:
    return np.full((1, size), np.nan)
  total, ok = np.zeros((len(names), size)), codes >= 0
  np.add.at(total, (subject[ok], codes[ok]), 1.0)
  return np.concatenate([counts @ total for counts in resamples(len(names), draws, seed, max(1, _CHUNK // len(names)))])


def resampled_weights(subjects: Sequence | np.ndarray, *, draws: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
  """Yields how often each row is drawn, [<=draws, M], `draws` in all; nothing for a single subject."""
  names, subject = _subjects(subjects, len(subjects), draws)
  if len(names) > 1:
    for counts in resamples(len(names), draws, seed, max(1, _CHUNK // len(subject))):
      yield counts[:, subject]


def difference(value_a: Mapping[str, float], drawn_a: Mapping[str, np.ndarray], value_b: Mapping[str, float],
               drawn_b: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """Differences a - b by metric, {metric: {'value', 'low', 'high'}}; both were drawn on the same resamples."""
  return {m: _interval(value_a[m] - value_b[m], drawn_a[m] - drawn_b[m]) for m in value_a}


def paired_difference(
  y: np.ndarray,
  scores_a: np.ndarray,
  scores_b: np.ndarray,
  subjects: Sequence | np.ndarray,
  *,
  draws: int = 1000,
  seed: int = 0,
  auroc_classes: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
  """Metric of a minus metric of b, with a 95 % interval: both are computed on the same resampled subjects.

  Takes and returns what `intervals` does; identical scores give exactly 0.
  """
  y, scores_a = _checked(y, scores_a)
  y, scores_b = _checked(y, scores_b)
  a, b = score(y, scores_a, auroc_classes), score(y, scores_b, auroc_classes)
  drawn_a, drawn_b = _bootstrap(y, [scores_a, scores_b], subjects, draws, seed, auroc_classes)
  return difference(a, drawn_a, b, drawn_b)


def difference_over_runs(
  y: np.ndarray,
  pairs: Sequence[tuple[np.ndarray, np.ndarray]],
  subjects: Sequence | np.ndarray,
  *,
  draws: int = 1000,
  seed: int = 0,
  auroc_classes: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
  """Mean over runs of metric of a minus metric of b, with a 95 % interval over runs and subjects together.

  A resample draws runs with replacement and, independently, subjects, the same ones for all runs and both members of a
  pair (crossed bootstrap). Of few runs it knows little of their spread: n of them understate it by (n - 1) / n.

  Args:
    pairs: for each run the scores [M, K] of a and of b. The others as of `intervals`, whose form is returned.
  """
  if not pairs:
    raise UserError('intervals: no runs; expected one pair of scores or more')
  many = [_checked(y, scores)[1] for pair in pairs for scores in pair]
  y = _checked(y, many[0])[0]
  drawn = _bootstrap(y, many, subjects, draws, seed, auroc_classes)
  values = [score(y, scores, auroc_classes) for scores in many]
  out = {}
  for m in METRICS:
    each = np.stack([a[m] - b[m] for a, b in zip(drawn[::2], drawn[1::2], strict=True)], axis=1)  # [R, runs]
    runs = next(resamples(len(pairs), len(each), seed + 1)) / len(pairs)
    value = np.mean([a[m] - b[m] for a, b in zip(values[::2], values[1::2], strict=True)])
    out[m] = _interval(float(value), (each * runs).sum(axis=1))
  return out


def resamples(num_subjects: int, draws: int, seed: int, chunk: int | None = None) -> Iterator[np.ndarray]:
  """Yields [<=chunk, num_subjects] counts, `draws` rows in all: how often each subject is in each resample.

  Each row sums to num_subjects. The rows do not depend on `chunk`.
  """
  rng = np.random.default_rng(seed)
  even = np.full(num_subjects, 1 / num_subjects)
  chunk = chunk or draws
  for start in range(0, draws, chunk):
    yield rng.multinomial(num_subjects, even, size=min(chunk, draws - start)).astype(np.float64)


def weighted_auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """AUROC of one class under many weightings of the rows: P(score+ > score-) + P(score+ = score-) / 2.

  Args:
    positive: [M] bool. score: [M]. weights: [R, M], not negative.

  Returns:
    [R] float64; NaN where the weights leave no positive or no negative row.
  """
  order = np.argsort(score, kind='stable')
  ranked, w = np.asarray(score)[order], weights[:, order]
  pos = np.asarray(positive, bool)[order]
  starts = np.flatnonzero(
    np.concatenate([[True], ranked[1:] != ranked[:-1]])
  )  # first row of each distinct score
  w_pos, w_neg = w * pos, w * ~pos
  if len(starts) < len(ranked):
    w_pos, w_neg = np.add.reduceat(w_pos, starts, axis=1), np.add.reduceat(w_neg, starts, axis=1)
  below = np.cumsum(w_neg, axis=1)
  below -= w_neg / 2  # negatives of smaller score, and half of those that tie
  wins = np.einsum('rm,rm->r', w_pos, below)
  pairs = w_pos.sum(axis=1) * w_neg.sum(axis=1)
  return np.divide(wins, pairs, out=np.full(len(w), np.nan), where=pairs > 0)


def weighted_average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Average precision of one class under many weightings of the rows: the sum over distinct scores, from the highest,
  of precision times the growth of recall; equal scores are one threshold (as scikit-learn's).

  Takes and returns what `weighted_auroc` does; NaN where the weights leave no positive row.
  """
  order = np.argsort(-np.asarray(score), kind='stable')
  ranked, w = np.asarray(score)[order], weights[:, order]
  ends = np.flatnonzero(np.concatenate([ranked[1:] != ranked[:-1], [True]]))  # last row of each distinct score
  hits = np.cumsum(w * np.asarray(positive, bool)[order], axis=1)[:, ends]
  taken = np.cumsum(w, axis=1)[:, ends]
  precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
  total = hits[:, -1]
  area = (precision * np.diff(hits, axis=1, prepend=0.0)).sum(axis=1)
  return np.divide(area, total, out=np.full(len(w), np.nan), where=total > 0)


def _bootstrap(y: np.ndarray, many: list[np.ndarray], subjects: Sequence | np.ndarray, draws: int, seed: int,
               auroc_classes: Sequence[int] | None) -> list[dict[str, np.ndarray]]:
  """For each array of scores: {metric: [draws]}, all on the same resamples."""
  names, subject = _subjects(subjects, len(y), draws)
  if len(names) < 2:
    return [{m: np.full(1, np.nan) for m in METRICS} for _ in many]
  usable = _usable(y, many[0].shape[1], auroc_classes)
  totals, hits = _by_subject(y, y, subject), [_by_subject(y, s.argmax(axis=1), subject) for s in many]
  parts: list[dict[str, list]] = [{m: [] for m in METRICS} for _ in many]
  for counts in resamples(len(names), draws, seed, max(1, _CHUNK // len(y))):
    weights = counts[:, subject]  # [R, M]
    seen = counts @ totals  # [R, K] rows of each class
    for part, scores, hit in zip(parts, many, hits, strict=True):
      right = counts @ hit
      part['accuracy'].append(right.sum(axis=1) / seen.sum(axis=1))
      recall = np.divide(right, seen, out=np.full(seen.shape, np.nan), where=seen > 0)
      part['balanced_accuracy'].append(_nanmean(recall))
      auroc = [weighted_auroc(y == c, scores[:, c], weights) for c in usable]
      part['auroc'].append(_nanmean(np.stack(auroc, axis=1)) if auroc else np.full(len(counts), np.nan))
  return [{m: np.concatenate(values) for m, values in part.items()} for part in parts]


def _subjects(subjects: Sequence | np.ndarray, rows: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
  """The names of the subjects, and which of them each row belongs to."""
  subjects = np.asarray([str(s) for s in subjects])
  if len(subjects) != rows:
    raise UserError(f'intervals: {len(subjects)} subjects for {rows} rows; expected one a row')
  if draws < 1:
    raise UserError(f'intervals: draws={draws} is not positive (the usual number is 1000)')
  names, subject = np.unique(subjects, return_inverse=True)
  return names, subject


def _by_subject(y: np.ndarray, predicted: np.ndarray, subject: np.ndarray) -> np.ndarray:
  """[S, K] float64: rows of each subject and class whose prediction is right."""
  table = np.zeros((subject.max() + 1, y.max() + 1))
  right = predicted == y
  np.add.at(table, (subject[right], y[right]), 1.0)
  return table


def _usable(y: np.ndarray, num_classes: int, wanted: Sequence[int] | None) -> list[int]:
  wanted = range(num_classes) if wanted is None else wanted
  return [int(c) for c in wanted if 0 < np.count_nonzero(y == c) < len(y)]


def _nanmean(x: np.ndarray) -> np.ndarray:
  """Mean of each row without its NaNs; NaN, without a warning, for rows of NaN alone."""
  ok = ~np.isnan(x)
  n = ok.sum(axis=1)
  return np.divide(np.where(ok, x, 0).sum(axis=1), n, out=np.full(len(x), np.nan), where=n > 0)


def _interval(value: float, drawn: np.ndarray) -> dict[str, float]:
  drawn = drawn[~np.isnan(drawn)]
  low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
  return dict(value=float(value), low=float(low), high=float(high))


def _checked(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  y, scores = np.asarray(y, np.int64), np.asarray(scores, np.float64)
  if scores.ndim != 2 or len(y) != len(scores) or not len(y):
    raise UserError(
      f'metrics: labels {y.shape} and scores {scores.shape}; expected [M] and [M, K] with M > 0'
    )
  if y.min() < 0 or y.max() >= scores.shape[1]:
    raise UserError(
      f'metrics: labels {y.min()}..{y.max()}; expected 0..{scores.shape[1] - 1}, the columns of scores'
    )
  if np.isnan(scores).any():
    raise UserError(
      f'metrics: {int(np.isnan(scores).any(axis=1).sum())} rows of scores hold NaN; expected numbers'
    )
  return y, scores
