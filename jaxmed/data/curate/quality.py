"""Images that teach nothing: blank, blurred, saturated, or of another intensity than all others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data.corpus.source import Source
from jaxmed.data.curate import pictures
from jaxmed.data.curate.verdict import Verdict

_NORMAL = 1.4826  # standard deviations of a normal distribution in a median absolute deviation


def measured(image: np.ndarray) -> dict[str, Any]:
  """Numbers of one image [H, W, C].

  common: share of pixels in the fullest of 256 equal bins between least and greatest value, in the channel where it is
  least. top: share of pixels at the channel's greatest value, likewise. mean, std: of each channel. sharp: `sharpness`
  of the grey picture.
  """
  flat = np.nan_to_num(image.reshape(-1, image.shape[-1]).astype(np.float32))
  low, high = flat.min(axis=0), flat.max(axis=0)
  bins = ((flat - low) / np.where(high > low, high - low, 1) * 255.999).astype(np.int64)
  fullest = [np.bincount(bins[:, c]).max() for c in range(flat.shape[1])]
  grey = pictures.grey(image)
  return {'common': min(fullest) / len(flat), 'top': float((flat == high).mean(axis=0).min()), 'sharp': sharpness(grey),
          'mean': flat.mean(axis=0, dtype=np.float64), 'std': flat.std(axis=0, dtype=np.float64)}


def sharpness(grey: np.ndarray) -> float:
  """Variance of the Laplacian (four neighbours, without the border) over the variance; 0 where there is none."""
  inner = grey[1:-1, 1:-1].astype(np.float64)
  variance = float(grey.var(dtype=np.float64))
  if not inner.size or not variance:
    return 0.0
  return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var()) / variance


def judge(source: Source, options: Mapping[str, float], progress: bool = False) -> Verdict:
  """Which images go; the first reason that holds of blank, flat, blurred, saturated, outlier.

  Args:
    options: blank: most that `common` may be. flat: least standard deviation, as a share of the channel's in the
      corpus, in the channel where that is greatest. blur: least `sharp`, as a share of the median of images with the
      same channels. saturated: most that `top` may be. outlier: most median absolute deviations (scaled to standard
      deviations) that the mean of a channel may lie from the median of the channel's means.
  """
  found = pictures.each(source, measured, 'quality', progress)
  codes, sets = source.distinct('channels')
  names = [sets[code] for code in codes]
  column = lambda key: np.array([m[key] for m in found], np.float64)
  spread = np.array([max(s / source.stats[n]['std'] if source.stats[n]['std'] else 0.0 for n, s in zip(row, m['std']))
                     for row, m in zip(names, found)])
  reasons = {  # name -> (value, whether it goes)
    'blank': (common := column('common'), common > options['blank']),
    'flat': (spread, spread < options['flat']),
    'blurred': (relative := _relative(column('sharp'), names), relative < options['blur']),
    'saturated': (top := column('top'), top > options['saturated']),
    'outlier': (z := outlying([m['mean'] for m in found], names), z > options['outlier']),
  }
  words, values = np.full(len(found), '', object), np.full(len(found), np.nan)
  for name, (value, gone) in reasons.items():
    new = gone & (words == '')
    words[new], values[new] = name, value[new]
  return Verdict(words, values, np.full(len(found), -1))


def _relative(sharp: np.ndarray, names: Sequence[Sequence[str]]) -> np.ndarray:
  """Sharpness over the median of images with the same channels."""
  kinds = np.unique([','.join(n) for n in names], return_inverse=True)[1]
  medians = np.array([np.median(sharp[kinds == k]) for k in range(kinds.max(initial=-1) + 1)])
  middle = medians[kinds] if len(kinds) else sharp
  return np.where(middle > 0, sharp / np.where(middle > 0, middle, 1), 1.0)


def outlying(means: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> np.ndarray:
  """[N]: the greatest robust z-score of the means of each image's channels, among all images that have the channel."""
  rows = np.repeat(np.arange(len(names)), [len(n) for n in names])
  values = np.concatenate([np.zeros(0), *means])
  channels = np.array([c for row in names for c in row], str)
  out = np.zeros(len(names))
  for name in np.unique(channels):
    mine = channels == name
    away = np.abs(values[mine] - np.median(values[mine]))
    mad = np.median(away)
    if mad > 0:
      np.maximum.at(out, rows[mine], away / (_NORMAL * mad))
  return out
