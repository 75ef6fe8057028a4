"""Whether the largest component of a class is kept alone, chosen on records that were not trained on.

The rule is that of nnU-Net v2 (nnunetv2/postprocessing/remove_connected_components.py): all foreground together is
tried first, and taken where the mean Dice rises and that of no class falls; then each class alone, where its own Dice
rises. Components touch by faces, edges or corners.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxmed.evaluate.lesions import largest

MODES = ('none', 'auto')
FOREGROUND = 'foreground'


@dataclasses.dataclass(frozen=True)
class Change:
  """Keeps the largest component of some classes.

  Attributes:
    groups: of values, each of which is one structure; what is not of its largest component becomes 0.
    names: of the groups.
  """

  groups: tuple[tuple[int, ...], ...]
  names: tuple[str, ...] = ()

  def __call__(self, mask: np.ndarray) -> np.ndarray:
    """The mask [*size] changed."""
    for values in self.groups:
      inside = np.isin(mask, values)
      mask = np.where(inside & ~largest(inside), 0, mask)
    return mask


def choose(pairs: Iterable[tuple[np.ndarray, np.ndarray]], classes: Sequence[tuple[int, str]]) -> Change:
  """The change that raises Dice.

  Args:
    pairs: (truth, prediction) of each record, [*size] integers; where the truth is negative nothing is counted.
    classes: (value, name) of each class but the background.
  """
  values = [value for value, _ in classes]
  whole = Change((tuple(values),), (FOREGROUND,))
  each = [Change(((value,),), (name,)) for value, name in classes]
  tables: list[list[np.ndarray]] = [[] for _ in range(2 + 2 * len(each))]
  for truth, predicted in pairs:  # all ways at once, as predictions are not kept
    start = whole(predicted)
    ways = [predicted, start, *(change(predicted) for change in each), *(change(start) for change in each)]
    for table, way in zip(tables, ways, strict=True):
      table.append(_dice(truth, way, values))
  plain, together, *rest = (_means(np.stack(t)) for t in tables)
  joined = _mean(together) > _mean(plain) and not (together < plain).any()
  base = together if joined else plain
  alone = rest[len(each):] if joined else rest[:len(each)]
  kept = [change for i, change in enumerate(each) if alone[i][i] > base[i]]
  chosen = ([whole] if joined else []) + kept
  return Change(tuple(g for c in chosen for g in c.groups), tuple(n for c in chosen for n in c.names))


def _dice(truth: np.ndarray, predicted: np.ndarray, values: Sequence[int]) -> np.ndarray:
  """Dice [K] of a record; NaN where a class is in neither map."""
  known, out = truth >= 0, []
  for value in values:
    a, b = known & (truth == value), known & (predicted == value)
    total = np.count_nonzero(a) + np.count_nonzero(b)
    out.append(2 * np.count_nonzero(a & b) / total if total else np.nan)
  return np.array(out)


def _means(dice: np.ndarray) -> np.ndarray:
  """Over records [N, K], NaN left out."""
  there = ~np.isnan(dice)
  count = there.sum(axis=0)
  return np.divide(np.where(there, dice, 0).sum(axis=0), count, out=np.full(dice.shape[1], np.nan), where=count > 0)


def _mean(dice: np.ndarray) -> float:
  return float(_means(dice[:, None])[0])
