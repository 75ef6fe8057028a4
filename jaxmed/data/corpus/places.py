"""Where the classes of a mask lie: a sample of the places of each, stored beside the records.

`places-SPLIT-00003-of-00010.array_record` has a row for each record of the shard of that number: int64 n, the values
[n] of its classes above 0 and how many places there are of each [n], then the places, uint32, as flat positions in the
mask (C order), ascending in each class and each as its distance from the one before.

nnU-Net keeps 10,000 places of a class or 1 % of its pixels, whichever are more (MIC-DKFZ/nnUNet,
nnunetv2/preprocessing/preprocessors/default_preprocessor.py). MOST are enough here: a thousand epochs of its default
run draw about 1,700 forced patches of each of 100 cases, of all classes together, and a crop that shows a place shows
its neighbours, too. The pixels of a class, in C order, are cut into so many stretches of equal length and one of each
is taken, by a hash: places are spread over the whole of it, and the same mask gives the same ones.
"""

from collections.abc import Mapping

import numpy as np

from jaxmed.data.corpus.labels import BACKGROUND, slabs

MOST = 1000


def drawn(mask: np.ndarray | None, counts: Mapping[int, int]) -> bytes:
  """The places of the classes of a mask [*grid], packed. `counts`: pixels of each value, see `labels.counted`."""
  wanted = {value: _ranks(value, count) for value, count in counts.items() if value > BACKGROUND}
  found: dict[int, list[np.ndarray]] = {value: [] for value in wanted}
  seen, base = dict.fromkeys(wanted, 0), 0
  for slab in slabs(mask) if mask is not None and wanted else ():
    flat = slab.ravel()
    places = np.flatnonzero(flat > BACKGROUND)
    order = np.argsort(flat[places], kind='stable')
    values, firsts, sizes = np.unique(flat[places][order], return_index=True, return_counts=True)
    for value, first, size in zip(values.tolist(), firsts.tolist(), sizes.tolist()):
      ranks = wanted[value] - seen[value]
      own = ranks[(ranks >= 0) & (ranks < size)]
      found[value].append(base + places[order[first + own]])
      seen[value] += size
    base += flat.size
  each = [np.concatenate(parts) for parts in found.values()]
  head = np.array([len(wanted), *wanted, *map(len, each)], '<i8')
  steps = [np.diff(places, prepend=0).astype('<u4') for places in each]
  return head.tobytes() + b''.join(s.tobytes() for s in steps)


def _ranks(value: int, count: int) -> np.ndarray:
  """Which of the `count` pixels of a class are taken, ascending [min(count, MOST)]."""
  number = min(count, MOST)
  edges = np.arange(number + 1, dtype=np.int64) * count // number
  x = np.arange(number, dtype=np.uint64) + np.uint64(value * 0x9E3779B97F4A7C15 % 2**64)
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)  # SplitMix64
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return edges[:-1] + (x % np.diff(edges).astype(np.uint64)).astype(np.int64)


def parse(data: bytes) -> dict[int, np.ndarray]:
  """{value of a class: its places [n] int64} of what `drawn` packed.

  Raises:
    ValueError: the data are damaged.
  """
  if len(data) < 8:
    raise ValueError(f'{len(data)} bytes are no places')
  count = int(np.frombuffer(data, '<i8', 1)[0])
  if count < 0 or len(data) < 8 * (1 + 2 * count):
    raise ValueError(f'{len(data)} bytes are no places of {count} classes')
  head = np.frombuffer(data, '<i8', 1 + 2 * count)
  steps = np.frombuffer(data, '<u4', offset=head.nbytes)
  ends = np.cumsum(head[1 + count:])
  if len(steps) != (int(ends[-1]) if count else 0):
    raise ValueError(f'{len(steps)} places where {ends[-1:]} were counted')
  parts = np.split(steps, ends[:-1]) if count else []
  return {value: np.cumsum(part, dtype=np.int64) for value, part in zip(head[1:1 + count].tolist(), parts)}
