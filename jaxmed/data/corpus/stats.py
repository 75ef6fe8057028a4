"""Numbers of each channel over a corpus, in one pass and in bounded memory; those of parts can be merged."""

import dataclasses
import os
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

# Percentiles come from at most this many pixels of a channel, drawn at random. The rank of an estimated
# 0.5th percentile is then off by about 0.02 points (one standard error, half full reservoir).
CAPACITY = 1 << 18
_PERCENTILES = (0.5, 99.5)
_MERGED = 2**32 - 1  # stands for a block in the seed of draws among what blocks have drawn


@dataclasses.dataclass
class Channel:
  """A running summary of one channel: count, mean, sum of squared deviations (Chan et al. 1979), pixels.

  Every pixel has the same chance 2**-halvings of being among `drawn`, whichever image it came from.
  """

  rng: np.random.Generator
  count: int = 0
  mean: float = 0.0
  m2: float = 0.0
  halvings: int = 0
  drawn: list[np.ndarray] = dataclasses.field(default_factory=list)
  held: int = 0

  def add(self, pixels: np.ndarray) -> None:
    """Adds the pixels of one image, any shape, any real type."""
    pixels = np.ascontiguousarray(pixels).reshape(-1)
    self._combine(pixels.size, *_moments(pixels))
    self._draw(pixels)

  def _combine(self, n: int, mean: float, m2: float) -> None:
    delta = mean - self.mean
    total = self.count + n
    self.m2 += m2 + delta * delta * self.count * n / total
    self.mean += delta * n / total
    self.count = total

  def _draw(self, pixels: np.ndarray) -> None:
    if self.halvings:
      # With replacement, but the number is the right one; repeats are rare when few of many are drawn.
      number = self.rng.binomial(pixels.size, 0.5**self.halvings)
      pixels = pixels[self.rng.integers(0, pixels.size, number)]
    self._keep(pixels.astype(np.float32))

  def _keep(self, pixels: np.ndarray) -> None:
    self.drawn.append(pixels)
    self.held += pixels.size
    while self.held > CAPACITY:
      self._halve()

  def _halve(self) -> None:
    every = np.concatenate(self.drawn)
    self.drawn = [every[self.rng.random(every.size) < 0.5]]
    self.held = self.drawn[0].size
    self.halvings += 1

  def merge(self, other: 'Channel') -> None:
    """Adds what another channel has seen. The order of several merges matters for the last bits."""
    if not self.count:
      self.count, self.mean, self.m2, self.halvings = other.count, other.mean, other.m2, other.halvings
      self._keep(np.concatenate(other.drawn))
      return
    self._combine(other.count, other.mean, other.m2)
    pixels = np.concatenate(other.drawn)
    while self.halvings < other.halvings:
      self._halve()
    for _ in range(self.halvings - other.halvings):
      pixels = pixels[self.rng.random(pixels.size) < 0.5]
    self._keep(pixels)

  def summary(self) -> dict[str, float | int]:
    """count, mean, std (population), low and high: the 0.5th and 99.5th percentiles, in native units."""
    low, high = np.percentile(np.concatenate(self.drawn), _PERCENTILES)
    return {'count': self.count, 'mean': self.mean, 'std': (self.m2 / self.count) ** 0.5,
            'low': float(low), 'high': float(high)}


def _moments(pixels: np.ndarray) -> tuple[float, float]:
  """Mean and sum of squared deviations in float64; of small integers by counting, which is much faster.

  Sums are NumPy's own: those of BLAS depend on how many threads it takes.
  """
  if pixels.dtype in (np.uint8, np.uint16) and pixels.size > 1 << (8 * pixels.itemsize - 2):
    counts = np.bincount(pixels)
    values = np.arange(len(counts), dtype=np.float64)
    mean = float(np.sum(counts * values)) / pixels.size
    return mean, float(np.sum(counts * (values - mean) ** 2))
  wide = pixels.astype(np.float64)
  mean = float(wide.mean())
  wide -= mean
  return mean, float(np.sum(np.square(wide, out=wide)))


class Stats:
  """Summaries of every channel of the train split, and of the others for channels that train lacks.

  `block` is the number of the part of the corpus that they are of: each part draws its own pixels.
  """

  def __init__(self, block: int = 0) -> None:
    self.block = block
    self._channels: dict[tuple[bool, str], Channel] = {}

  def add(self, image: np.ndarray, channels: list[str], split: str) -> None:
    """Adds an image [..., C] with its C channel names."""
    for c, name in enumerate(channels):
      self._channel(split == 'train', name).add(image[..., c])

  def merge(self, other: 'Stats') -> None:
    """Adds the statistics of another part of the corpus."""
    for (train, name), channel in other._channels.items():
      self._channel(train, name).merge(channel)

  def save(self, path: str | os.PathLike) -> None:
    """Writes an .npz that `load` reads."""
    keys = list(self._channels)
    channels = [self._channels[k] for k in keys]
    arrays: dict[str, Any] = {f'drawn{i}': np.concatenate(c.drawn) for i, c in enumerate(channels)}
    numbers = [(train, c.count, c.halvings) for (train, _), c in zip(keys, channels)]
    np.savez(path, names=np.array([name for _, name in keys], str), numbers=np.array(numbers, np.int64).reshape(-1, 3),
             moments=np.array([(c.mean, c.m2) for c in channels], np.float64).reshape(-1, 2), **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike, block: int = 0) -> 'Stats':
    """Reads what `save` wrote; only to be merged into others, for the state of the draws is not kept."""
    out = cls(block)
    with np.load(path) as store:
      for i, (name, (train, count, halvings)) in enumerate(zip(store['names'], store['numbers'].tolist())):
        channel = out._channel(bool(train), str(name))
        channel.count, channel.halvings = count, halvings
        channel.mean, channel.m2 = store['moments'][i].tolist()
        channel.drawn = [store[f'drawn{i}']]
        channel.held = channel.drawn[0].size
    return out

  def summary(self) -> dict[str, dict[str, Any]]:
    """{channel name: count, mean, std, low, high, split}; split is 'train' or 'other'."""
    names = sorted({name for _, name in self._channels})
    out = {}
    for name in names:
      train = (True, name) in self._channels
      out[name] = self._channels[train, name].summary() | {'split': 'train' if train else 'other'}
    return out

  def _channel(self, train: bool, name: str) -> Channel:
    if (train, name) not in self._channels:
      # The seed comes from the name, so that a corpus is the same whatever else lies in it.
      rng = np.random.default_rng([zlib.crc32(name.encode()), train, self.block])
      self._channels[train, name] = Channel(rng)
    return self._channels[train, name]


def merged(parts: Iterable[Stats]) -> Stats:
  """The statistics of a corpus, merged from its parts in order."""
  total = Stats(_MERGED)
  for part in parts:
    total.merge(part)
  return total
