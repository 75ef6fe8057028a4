"""Which 64-bit hashes lie within a few bits of which: exact, without looking at all pairs.

Hashes that differ in at most r bits agree wholly in m of r + m blocks of bits, whichever the r bits are (pigeonhole;
multi-index hashing, Norouzi et al., arXiv 1307.2982, is m = 1). So for each choice of m blocks the hashes are sorted by
their bits there, and only those with equal bits are compared. The more hashes, the greater an m pays.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

BITS = 64
FEW = 1 << 20  # pairs that are compared without further ado
_CANDIDATES = 1 << 22  # pairs that are compared at once: 40 bytes each
_KEY = 24  # bits of a key at most; its table of places takes 4 bytes * 2**_KEY


def spread(hashes: np.ndarray, sample: int = 1 << 20) -> np.ndarray:
  """A permutation of a hash's bits after which all blocks of adjacent bits are equally selective.

  Images share much (a dark border): some bits hardly vary. Sorted by how much they vary and dealt out like cards (in
  bit-reversed order), they lie evenly. Any order of bits gives the same distances.
  """
  some = np.ascontiguousarray(hashes[::max(1, len(hashes) // sample)])
  share = np.zeros(BITS)
  for part in np.array_split(some, (len(some) >> 16) + 1):
    share += np.unpackbits(part.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=0)
  order = np.argsort(np.abs(share - len(some) / 2), kind='stable')
  places = np.array([int(f'{i:06b}'[::-1], 2) for i in range(BITS)])
  return order[places]


def permuted(hashes: np.ndarray, order: np.ndarray) -> np.ndarray:
  """The hashes with their bits in another order (of `spread`)."""
  out = np.empty_like(hashes)
  for start in range(0, len(hashes), 1 << 18):
    part = np.ascontiguousarray(hashes[start:start + (1 << 18)])
    bits = np.unpackbits(part.view(np.uint8).reshape(-1, 8), axis=1)[:, order]
    packed = np.ascontiguousarray(np.packbits(bits, axis=1))
    out[start:start + len(part)] = packed.view(np.uint64).reshape(-1)
  return out


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Numbers of differing bits of uint64 arrays that broadcast."""
  return np.bitwise_count(a ^ b)


def match(queries: np.ndarray, index: np.ndarray, radius: int) -> np.ndarray:
  """int64 [Q]: the place in `index` of a hash within `radius` bits of each query, -1 where there is none.

  Exact: there is a place if and only if there is such a hash. Best with hashes whose bits were `spread`.
  """
  found = np.full(len(queries), -1, np.int64)
  if not len(queries) or not len(index):
    return found
  if len(queries) * len(index) <= FEW:
    near = distances(queries[:, None], index) <= radius
    return np.where(near.any(axis=1), near.argmax(axis=1), -1)
  left = np.arange(len(queries))
  agree, room = agreeing(len(queries), len(index), radius)
  for blocks in tables(radius, agree, room):
    keys = _keys(index, blocks)
    order, places = _sorted(keys, _width(blocks))
    asked = _keys(queries[left], blocks)
    first = places[asked]
    _compare(queries, left, index, order, first, places[asked + 1] - first, radius, found)
    left = left[found[left] < 0]
    if not len(left):
      break
  return found


def agreeing(queries: int, index: int, radius: int) -> tuple[int, int]:
  """How many blocks should agree, and most bits of a key: what makes the least work, in units of one comparison."""
  room = min(index.bit_length() + 2, _KEY)

  def work(m: int) -> float:
    bits = min(BITS * m / (radius + m), room)
    return math.comb(radius + m, m) * (2 * index + 2 * queries + 2**bits / 4 + queries * index / 2**bits)

  return min(range(1, 5), key=work), room


def tables(radius: int, agree: int, room: int = _KEY) -> Iterator[list[tuple[int, int]]]:
  """Every choice of `agree` of radius + agree blocks, as (first bit, bits) of each; at most `room` bits in all."""
  count = radius + agree
  edges = [BITS * i // count for i in range(count + 1)]
  for chosen in itertools.combinations(range(count), agree):
    blocks, left = [], room
    for i in chosen:
      width = min(edges[i + 1] - edges[i], left)
      left -= width
      if width:
        blocks.append((edges[i], width))
    yield blocks


def _width(blocks: list[tuple[int, int]]) -> int:
  return sum(width for _, width in blocks)


def _keys(hashes: np.ndarray, blocks: list[tuple[int, int]]) -> np.ndarray:
  """The bits of the blocks as one number, int64 for use as an index."""
  out = np.zeros(len(hashes), np.uint64)
  for start, width in blocks:
    out = (out << np.uint64(width)) | ((hashes >> np.uint64(start)) & np.uint64((1 << width) - 1))
  return out.astype(np.int64)


def _sorted(keys: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Places by rising key (equal ones in order), and where each key begins among them [2**bits + 1]."""
  packed = (keys << 32) | np.arange(len(keys))  # sorting numbers is several times faster than argsort
  packed.sort()
  counts = np.bincount(keys, minlength=1 << bits)
  return packed & 0xFFFFFFFF, np.concatenate([[0], np.cumsum(counts)])


def _compare(queries, left, index, order, first, count, radius, found) -> None:
  """Fills `found` from the candidates order[first : first + count] of the queries `left`, some at a time."""
  some = np.flatnonzero(count)
  ends = np.cumsum(count[some])
  start, done = 0, 0
  while start < len(some):
    stop = max(start + 1, int(np.searchsorted(ends, done + _CANDIDATES, side='right')))
    rows = some[start:stop]
    number = count[rows]
    who = np.repeat(left[rows], number)
    begins = np.cumsum(number) - number
    where = order[np.arange(len(who)) + np.repeat(first[rows] - begins, number)]
    hit = np.flatnonzero(distances(queries[who], index[where]) <= radius)[::-1]
    found[who[hit]] = where[hit]  # the last assignment stays: the first place
    start, done = stop, int(ends[stop - 1])
