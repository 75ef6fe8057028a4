"""How much two pictures share, and how much one holds: SSIM, normalised mutual information, entropy.

All are of small grey pictures (`pictures.small`), uint8 [N, side, side], so that they cost the same for every image.
"""

from collections.abc import Callable

import numpy as np

from jaxmed.data.curate import greedy
from jaxmed.data.curate.features import nearest

SIDE = 64
WINDOW = 7  # pixels along the side of SSIM's window
BINS = 32
_PAIRS = 1 << 7  # that are measured at once: what fits a cache


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[P] in [-1, 1]: structural similarity of pairs of pictures uint8 [P, H, W] (Wang et al. 2004).

  The mean over all whole windows of 7 x 7 pixels, with the sample covariance and K1 = 0.01, K2 = 0.03, as
  skimage.metrics.structural_similarity computes it by default.
  """
  a, b = a.astype(np.int32), b.astype(np.int32)  # sums of a window are whole numbers, and fit
  mean = lambda x: _window_sums(x) / WINDOW**2
  unbiased = WINDOW**2 / (WINDOW**2 - 1)
  ma, mb = mean(a), mean(b)
  va, vb = unbiased * (mean(a * a) - ma * ma), unbiased * (mean(b * b) - mb * mb)
  cov = unbiased * (mean(a * b) - ma * mb)
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  values = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
  return values.mean(axis=(1, 2))


def _window_sums(x: np.ndarray) -> np.ndarray:
  """[P, H, W] -> [P, H - 6, W - 6]: sums over all whole windows of 7 x 7, as 4 + 2 + 1 along each axis."""
  for _ in range(2):
    n = x.shape[1] - WINDOW + 1
    two = x[:, :-1] + x[:, 1:]
    x = np.swapaxes(two[:, :n] + two[:, 2:n + 2] + two[:, 4:n + 4] + x[:, 6:], 1, 2)
  return x


def mutual_information(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[P] in [0, 1]: normalised mutual information of pairs of pictures uint8 [P, H, W].

  (H(a) + H(b)) / H(a, b) - 1 (Studholme et al. 1999, less one), from joint histograms of 32 x 32 bins: 0 for
  independent pictures, 1 where each tells the other. Two constant pictures tell each other.
  """
  pairs = len(a)
  bins = lambda x: x.reshape(pairs, -1).astype(np.int64) * BINS // 256
  place = (np.arange(pairs)[:, None] * BINS + bins(a)) * BINS + bins(b)
  joint = np.bincount(place.reshape(-1), minlength=pairs * BINS * BINS).reshape(pairs, BINS, BINS) / a[0].size
  both = _bits(joint.reshape(pairs, -1))
  each = _bits(joint.sum(axis=2)) + _bits(joint.sum(axis=1))
  return np.where(both > 0, each / np.where(both > 0, both, 1) - 1, 1.0)


def entropy(a: np.ndarray) -> np.ndarray:
  """[N] bits a pixel, 0 to 8: Shannon entropy of the histogram of the 256 values of pictures uint8 [N, H, W]."""
  place = np.arange(len(a))[:, None] * 256 + a.reshape(len(a), -1)
  counts = np.bincount(place.reshape(-1), minlength=len(a) * 256).reshape(len(a), 256)
  return _bits(counts / a[0].size)


def _bits(p: np.ndarray) -> np.ndarray:
  return -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(axis=1)


def redundant(pictures: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], np.ndarray], threshold: float,
              neighbours: int, groups: np.ndarray | None = None) -> np.ndarray:
  """int64 [N]: the kept picture with which the measure of each reaches the threshold, -1 for those that are kept.

  Args:
    pictures: uint8 [N, H, W]. groups: [N], compare each with the `neighbours` before it of the same value (the slices
      of a volume); without, with the `neighbours` that correlate most with it in the whole set.
  """
  earlier, later = _along(groups, neighbours) if groups is not None else _most_like(pictures, neighbours)
  value = [measure(pictures[earlier[i:i + _PAIRS]], pictures[later[i:i + _PAIRS]])
           for i in range(0, len(earlier), _PAIRS)]
  near = np.concatenate([np.zeros(0), *value]) >= threshold
  return greedy.along_pairs(len(pictures), earlier[near], later[near])


def _along(groups: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of rows at most `neighbours` apart within their group."""
  order = np.argsort(groups, kind='stable')
  pairs = []
  for step in range(1, min(neighbours, len(order) - 1) + 1):
    same = groups[order[:-step]] == groups[order[step:]]
    pairs.append((order[:-step][same], order[step:][same]))
  join = lambda k: np.concatenate([np.zeros(0, np.int64), *(p[k] for p in pairs)])
  return join(0), join(1)


def _most_like(pictures: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
  """Each row with those that correlate most with it, when reduced to a quarter of the side; each pair once."""
  n, side = len(pictures), max(pictures.shape[1] // 4, 1)
  step = pictures.shape[1] // side
  tiny = pictures[:, :side * step, :side * step].reshape(n, side, step, side, step).mean(axis=(2, 4), dtype=np.float32)
  tiny = tiny.reshape(n, -1)
  found, _ = nearest(tiny - tiny.mean(axis=1, keepdims=True), min(neighbours + 1, n))
  rows = np.repeat(np.arange(n), found.shape[1])
  pairs = np.stack([np.minimum(rows, found.reshape(-1)), np.maximum(rows, found.reshape(-1))], axis=1)
  pairs = np.unique(pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs[:, 0] >= 0)], axis=0)
  return pairs[:, 0], pairs[:, 1]
