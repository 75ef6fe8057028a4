"""Which record stands where in an endless stream: mixtures of groups, and balanced subjects, as a function of position.

Nothing is drawn one after the other. The stream's position says in closed form which group is due and how often it was
due before; that number, divided by the group's size, is its epoch, and every epoch of a group has an order of its own.
So a run may begin at any step, on any number of processes, and no stream or permutation is ever written out.
"""

import bisect
import dataclasses
import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data.corpus.manifest import name_of
from jaxmed.errors import UserError, choose

SCHEDULES = ('step', 'linear')
SUBJECTS = ('', 'balanced')
N_CHANNELS, HAS_MASK = 'n_channels', 'has_mask'
MOST_GROUPS = 10_000
LINEAR_STAGES = 64  # a linear change is cut into at most so many stages of constant shares
ENDLESS = 1 << 40  # positions of a last stage, which is not cut off at the end of a run

_MASK = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Mixture:
  """How records are drawn; the defaults leave them in the order of Grain's shuffle.

  Attributes:
    balance: a column of the manifest whose values are the groups ('' for none); or N_CHANNELS, how many channels a
      record has, so that every batch has nearly the same number in all; or HAS_MASK, whether it has a
      mask, 'yes' or 'no'.
    alpha: a group of n records has a share in proportion to n^alpha: 1 as they are, 0 all alike (mT5, Xue et al. 2021,
      arXiv 2010.11934, names it so; it is 1 / T of a temperature T, and 0.3 there).
    weights: shares instead, 'CT=2,MR=1' or, from fractions of the run on, '0:CT=1,MR=1;0.5:CT=1,MR=3'. '*' is each
      value that is not named; a weight of 0 leaves a value out.
    schedule: 'step' or 'linear', how weights get from one such fraction to the next.
    subjects: 'balanced' takes subjects of a group alike, and then their records in turn.
  """

  balance: str = ''
  alpha: float = 1.0
  weights: str = ''
  schedule: str = 'step'
  subjects: str = ''

  def __post_init__(self):
    choose('loader.schedule', self.schedule, SCHEDULES)
    choose('loader.subjects', self.subjects, SUBJECTS)
    if not 0 <= self.alpha <= 1:
      raise UserError(f'loader.alpha must be between 0 (groups alike) and 1 (as they are), not {self.alpha}')
    if not self.balance and (self.weights or self.alpha != 1):
      raise UserError('loader.weights and loader.alpha share out the values of a column: name it with loader.balance')
    if self.weights and self.alpha != 1:
      raise UserError(f'loader.alpha={self.alpha} and loader.weights exclude each other: weights are the shares')

  @property
  def plain(self) -> bool:
    """Whether records come in the order of Grain's shuffle."""
    return not self.balance and not self.subjects


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stretch of the stream with constant shares: which group each of its positions takes.

  A Huffman tree of the groups, the rare ones deep. Of n positions that reach a node, a go left, evenly spread: before
  position m that are round(m a / n). Over the whole stage every group gets its quota to the element; up to any position
  the number is at most 1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + ...) = 1.7 from its share (each level adds half an element, of
  which a group has its part, and weights rise as Fibonacci's numbers do towards the root).

  Attributes:
    length: positions.
    quotas: those of each group, which sum to `length`.
    nodes: (left, right, left's positions, all positions) of each inner node, the root last; a child >= 0 is a node, a
      child -1 - g is group g.
  """

  length: int
  quotas: tuple[int, ...]
  nodes: tuple[tuple[int, int, int, int], ...]

  def place(self, m: int) -> tuple[int, int]:
    """The group of position m, and how often it was due before in this stage."""
    if not self.nodes:
      return next(g for g, quota in enumerate(self.quotas) if quota), m
    node = len(self.nodes) - 1
    while node >= 0:
      left, right, lefts, total = self.nodes[node]
      half = total // 2
      before = (m * lefts + half) // total
      if ((m + 1) * lefts + half) // total > before:
        node, m = left, before
      else:
        node, m = right, m - before
    return -1 - node, m


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """Position in the endless stream of elements -> row.

  Attributes:
    seed: with the position it determines the row.
    names: of the groups.
    order: rows, group by group (and subject by subject).
    starts: [G + 1] where each group begins in `order`.
    stages: of constant shares; after the last one they begin again.
    subjects: [S + 1] where each subject of each group begins in `order`, None where subjects are not balanced.
    firsts: [G + 1] where each group begins in `subjects`.
  """

  seed: int
  names: tuple[str, ...]
  order: np.ndarray
  starts: np.ndarray
  stages: tuple[Stage, ...]
  subjects: np.ndarray | None = None
  firsts: np.ndarray | None = None

  def __call__(self, position: int) -> int:
    """The row of an element."""
    group, visit = self.visit(position)
    if self.subjects is not None and self.firsts is not None:
      first = int(self.firsts[group])
      turn, place = divmod(visit, int(self.firsts[group + 1]) - first)
      subject = first + permuted(place, int(self.firsts[group + 1]) - first, (self.seed, 1, group, turn))
      low, high = int(self.subjects[subject]), int(self.subjects[subject + 1])
      epoch, place = divmod(turn, high - low)
      return int(self.order[low + permuted(place, high - low, (self.seed, 2, subject, epoch))])
    low, high = int(self.starts[group]), int(self.starts[group + 1])
    epoch, place = divmod(visit, high - low)
    return int(self.order[low + permuted(place, high - low, (self.seed, 0, group, epoch))])

  def visit(self, position: int) -> tuple[int, int]:
    """The group of an element, and how often it was due before since the stream began."""
    begins, visits = self._sums
    lap, place = divmod(position, begins[-1])
    k = bisect.bisect_right(begins, place) - 1
    group, before = self.stages[k].place(place - begins[k])
    return group, before + visits[k][group] + lap * visits[-1][group]

  @functools.cached_property
  def _sums(self) -> tuple[list[int], list[tuple[int, ...]]]:
    """Positions before each stage, and visits of each group before it; both go on to the end of the last."""
    begins, visits = [0], [(0,) * len(self.names)]
    for part in self.stages:
      begins.append(begins[-1] + part.length)
      visits.append(tuple(a + b for a, b in zip(visits[-1], part.quotas)))
    return begins, visits


def make(source: Any, mixture: Mixture, seed: int, batch_size: int = 1, steps: int = 0) -> Sampler | None:
  """The sampler of a source (see jaxmed.data.corpus.source), None where Grain's shuffle does it.

  Args:
    source: rows to draw from.
    mixture: how.
    seed: with the position it determines the row.
    batch_size: elements a step.
    steps: of the whole run; a schedule is in fractions of it.

  Raises:
    UserError: an unknown column or value, a bad text, too many groups; the nearest choice is named.
  """
  if mixture.plain:
    return None
  names, codes = _groups(source, mixture.balance)
  sizes = np.bincount(codes, minlength=len(names))
  if mixture.weights:
    points = parse_weights(mixture.weights, names, f'{mixture.balance} of {source.path}')
    stages = _scheduled(points, mixture.schedule, batch_size, steps)
  else:
    stages = (stage([float(n)**mixture.alpha for n in sizes], ENDLESS),)
  starts = np.concatenate([[0], np.cumsum(sizes)])
  if not mixture.subjects:
    return Sampler(seed, names, _compact(np.argsort(codes, kind='stable')), starts, stages)
  subjects, _ = source.distinct('subject')
  both = codes.astype(np.int64) * (int(subjects.max(initial=0)) + 1) + subjects
  order = np.argsort(both, kind='stable')
  begins = np.flatnonzero(np.diff(both[order], prepend=-1))
  firsts = np.searchsorted(begins, starts)
  return Sampler(seed, names, _compact(order), starts, stages, np.append(begins, len(order)), firsts)


def _groups(source: Any, balance: str) -> tuple[tuple[str, ...], np.ndarray]:
  """Sorted names of the groups, and the one of each row, int32 [N]."""
  if not balance:
    return ('all',), np.zeros(len(source), np.int32)
  if balance == HAS_MASK:
    choose(f'column of {source.path}', 'mask', source.table.column_names)
    lacks = source.column('mask').is_null().to_numpy()
    known, codes = np.unique(np.where(lacks, 'no', 'yes'), return_inverse=True)
    return tuple(known.tolist()), codes.astype(np.int32)
  codes, values = source.distinct('channels' if balance == N_CHANNELS else balance)
  if balance == N_CHANNELS:
    counts, places = np.unique([len(v) for v in values], return_inverse=True)
    codes, values = places[codes], counts.tolist()
  if len(values) > MOST_GROUPS:
    raise UserError(f'loader.balance={balance} has {len(values)} values, more than {MOST_GROUPS}: '
                    'loader.subjects=balanced takes subjects alike')
  names = [name_of(v) for v in values]
  ranks = np.argsort(np.argsort(np.array(names, object), kind='stable'))
  return tuple(sorted(names)), ranks.astype(np.int32)[codes]


def parse_weights(text: str, names: Sequence[str], kind: str) -> list[tuple[float, tuple[float, ...]]]:
  """'0:CT=1,MR=1;0.5:CT=1,MR=3' -> [(fraction of the run, share of each of `names`)], the first at 0.

  Raises:
    UserError: an unknown or missing name (the nearest is given), a bad number, fractions that do not rise from 0.
  """
  points = []
  for part in text.split(';'):
    head, colon, rest = part.partition(':')
    at = _number(head) if colon else None
    fraction, told = (at, rest) if at is not None else (0.0, part)
    points.append((fraction, _shares(told, names, kind)))
  fractions = [at for at, _ in points]
  if fractions[0] != 0 or any(b <= a for a, b in zip(fractions, fractions[1:])) or not fractions[-1] < 1:
    raise UserError(f'loader.weights {text!r} begins its parts at {fractions}: expected fractions of the run that rise '
                    "from 0 and stay below 1, such as '0:CT=1,MR=1;0.5:CT=1,MR=3'")
  return points


def _shares(text: str, names: Sequence[str], kind: str) -> tuple[float, ...]:
  given: dict[str, float] = {}
  for pair in text.split(','):
    name, equals, number = pair.strip().rpartition('=')
    value = _number(number)
    if not equals or value is None or value < 0:
      raise UserError(f'loader.weights has {pair.strip()!r}: expected VALUE=WEIGHT, a weight of at least 0, such as '
                      f"'{names[0]}=1'")
    if name != '*':
      choose(f'value in loader.weights of column {kind}', name, names)
    if name in given:
      raise UserError(f'loader.weights names {name!r} twice in {text!r}')
    given[name] = value
  lost = [name for name in names if name not in given]
  if lost and '*' not in given:
    raise UserError(f"loader.weights {text!r} says nothing of {lost[0]!r}: add it, or '*=0' to leave all others out")
  shares = [given.get(name, given.get('*', 0.0)) for name in names]
  if not sum(shares) > 0:
    raise UserError(f'loader.weights {text!r} leaves nothing to draw from')
  return tuple(share / math.fsum(shares) for share in shares)


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def _scheduled(points: Sequence[tuple[float, tuple[float, ...]]], schedule: str, batch: int, steps: int
               ) -> tuple[Stage, ...]:
  """Stages of constant shares. A stage begins with a step; one that is shorter than a step is none."""
  if len(points) == 1:
    return (stage(points[0][1], ENDLESS),)
  if steps < 1:
    raise UserError('loader.weights changes during the run: its number of steps must be known')
  ends = [at for at, _ in points[1:]] + [1.0]
  pieces = []  # (first step, shares)
  for k, ((begin, shares), end) in enumerate(zip(points, ends)):
    after = points[min(k + 1, len(points) - 1)][1]
    count = max(1, min(int(LINEAR_STAGES * (end - begin)), round(steps * (end - begin)))) if schedule == 'linear' else 1
    for i in range(count):
      middle = (i + 0.5) / count if schedule == 'linear' else 0.0
      mixed = tuple(a + (b - a) * middle for a, b in zip(shares, after))
      pieces.append((round(steps * (begin + (end - begin) * i / count)), mixed))
  lengths = [b - a for (a, _), (b, _) in zip(pieces, [*pieces[1:], (steps, ())])]
  return tuple(stage(shares, n * batch) for (_, shares), n in zip(pieces, lengths) if n > 0)


def stage(weights: Sequence[float], length: int) -> Stage:
  """A stage of `length` positions, whose groups' numbers are their weights' to less than one."""
  quotas = apportioned(weights, length)
  heap = [(quota, -1 - g) for g, quota in enumerate(quotas) if quota]
  heapq.heapify(heap)
  nodes: list[tuple[int, int, int, int]] = []
  while len(heap) > 1:
    (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
    heapq.heappush(heap, (a + b, len(nodes)))
    nodes.append((left, right, a, a + b))
  return Stage(length, quotas, tuple(nodes))


def apportioned(weights: Sequence[float], total: int) -> tuple[int, ...]:
  """Whole numbers in proportion to weights that sum to `total` (largest remainders; the first of equal ones)."""
  whole = math.fsum(weights)
  exact = [w / whole * total for w in weights]
  counts = [math.floor(x) for x in exact]
  by_rest = sorted(range(len(weights)), key=lambda g: (counts[g] - exact[g], g))
  for g in by_rest[:total - sum(counts)]:
    counts[g] += 1
  return tuple(counts)


def permuted(i: int, n: int, key: Sequence[int]) -> int:
  """The image of i in a pseudo-random permutation of 0..n-1 that the key chooses.

  A Feistel network over the least power of two that holds n, walked until it is below n (Black and Rogaway 2002); few
  elements are sorted by their hashes instead.
  """
  mixed = 0
  for number in key:
    mixed = _hash(mixed ^ number)
  if n <= 32:
    return sorted(range(n), key=lambda k: _hash(mixed ^ k))[i]
  low = (n - 1).bit_length() // 2
  high = (n - 1).bit_length() - low
  while True:
    left, right, a, b = i >> low, i & ((1 << low) - 1), high, low
    for turn in range(6):
      left, right = right, left ^ (_hash(mixed + (turn << 56) + right) & ((1 << a) - 1))
      a, b = b, a
    i = left << low | right
    if i < n:
      return i


def _hash(x: int) -> int:
  """SplitMix64 (Steele, Lea and Flood 2014)."""
  x = (x + 0x9E3779B97F4A7C15) & _MASK
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
  x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
  return x ^ x >> 31


def _compact(rows: np.ndarray) -> np.ndarray:
  return rows.astype(np.int32) if len(rows) < 2**31 else rows


def parse_values(text: str, key: str) -> Mapping[str, tuple[str, ...]]:
  """'site=A,B;subject=7' -> {'site': ('A', 'B'), 'subject': ('7',)}; `key` is the option in errors."""
  out: dict[str, tuple[str, ...]] = {}
  for part in filter(None, (p.strip() for p in text.split(';'))):
    column, equals, values = part.partition('=')
    names = tuple(v.strip() for v in values.split(',') if v.strip())
    if not equals or not column.strip() or not names:
      raise UserError(f"{key} has {part!r}: expected COLUMN=VALUE,VALUE such as 'site=A,B'")
    out[column.strip()] = out.get(column.strip(), ()) + names
  return out
