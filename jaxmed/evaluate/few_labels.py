"""Few labels: nested parts of the training subjects, and what a curve of scores over them says."""

import math
from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError


def nested_order(subjects: np.ndarray, content: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
  """Subjects in an order whose beginnings are the parts, and how many it takes until they hold everything.

  The first ones cover all of `content` with as few subjects as the greedy choice finds; the others follow so that each
  beginning has the rarer content in its proportion.

  Args:
    subjects: [N] of the rows. content: [N, K] bool, what each row shows, such as its class; each is in some row.
  Returns:
    Names [S], and the length of the shortest beginning that has every column of `content`.
  """
  rng = np.random.default_rng(seed)
  names, row = np.unique(subjects, return_inverse=True)
  shows = np.zeros((len(names), content.shape[1]), bool)
  np.logical_or.at(shows, row, content)
  tie = rng.permutation(len(names))
  chosen: list[int] = []
  lacking = shows.any(axis=0)
  while lacking.any():
    fresh = (shows & lacking).sum(axis=1)
    best = int(max(np.flatnonzero(fresh == fresh.max()), key=lambda i: tie[i]))
    chosen.append(best)
    lacking = lacking & ~shows[best]
  count = shows.sum(axis=0)
  kind = np.where(shows, count, len(names) + 1).argmin(axis=1)  # the rarest content of each subject
  place = np.zeros(len(names))
  for k in np.unique(kind).tolist():
    turn = lambda i: (chosen.index(i) if i in chosen else len(names), tie[i])
    of = sorted(np.flatnonzero(kind == k).tolist(), key=turn)
    place[of] = (np.arange(len(of)) + rng.random(len(of))) / len(of)
  rest = sorted(set(range(len(names))) - set(chosen), key=lambda i: place[i])
  return names[chosen + rest], len(chosen)


def parts(subjects: np.ndarray, content: np.ndarray, names: Sequence[str], fractions: Sequence[float],
          seed: int) -> list[np.ndarray]:
  """Rows bool [N] of each percentage of the subjects; every part holds the smaller ones.

  Raises:
    UserError: a part that has no row of some content, by its name in `names`, and the least percentage that has all.
  """
  order, needed = nested_order(subjects, content, seed)
  out = []
  for fraction in fractions:
    count = max(1, round(fraction / 100 * len(order)))
    rows = np.isin(subjects, order[:count])
    lacking = np.flatnonzero(content.any(axis=0) & ~content[rows].any(axis=0))
    if len(lacking):
      least = math.ceil(1000 * needed / len(order)) / 10
      raise UserError(f'classify.fractions: {fraction:g} % of {len(order)} training subjects ({count}) leave no row of '
                      f'{names[lacking[0]]}; the least percentage that has all is {least:g}')
    out.append(rows)
  return out


def area(fractions: Sequence[float], scores: np.ndarray) -> np.ndarray:
  """Mean height of the curve over the logarithm of the fraction: the area under it by its width.

  Args:
    fractions: [F] rising. scores: [..., F].
  Returns:
    [...]; the score itself where there is one fraction.
  """
  x, scores = np.log(np.asarray(fractions, np.float64)), np.asarray(scores, np.float64)
  if len(x) == 1:
    return scores[..., 0]
  return (np.diff(x) * (scores[..., 1:] + scores[..., :-1]) / 2).sum(axis=-1) / (x[-1] - x[0])


def crossing(fractions: Sequence[float], scores: Sequence[float] | np.ndarray,
             other: Sequence[float] | np.ndarray) -> float | None:
  """The least fraction at which the `other` curve is as high, between fractions along straight lines over their
  logarithm; None where it never is."""
  x = np.log(np.asarray(fractions, np.float64))
  gap = np.asarray(scores, np.float64) - np.asarray(other, np.float64)
  for i, g in enumerate(gap):
    if g <= 0:
      if i == 0 or gap[i - 1] <= 0:
        return float(fractions[i])
      return float(np.exp(x[i - 1] + (x[i] - x[i - 1]) * gap[i - 1] / (gap[i - 1] - g)))
  return None
