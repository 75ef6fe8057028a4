"""Records as small grey pictures, read in threads."""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmed.data.corpus.source import Source
from jaxmed.data.resize import resize
from jaxmed.parallel.devices import cores

_CHUNK = 32  # records a task


def each(source: Source, work: Callable[[np.ndarray], Any], title: str, progress: bool = False) -> list[Any]:
  """`work` of the image [H, W, C] of each record, in order; of a volume or video its middle plane.

  In as many threads as there are cores, with a bar where `progress`.
  """
  from tqdm import tqdm

  codes, shapes = source.distinct('shape')
  ranks = np.array([len(s) for s in shapes], int)[codes]
  chunks = [range(a, min(a + _CHUNK, len(source))) for a in range(0, len(source), _CHUNK)]
  out: list[Any] = []
  pool = concurrent.futures.ThreadPoolExecutor(cores())
  try:
    with tqdm(total=len(source), desc=title, unit='image', disable=None if progress else True) as bar:
      for results in pool.map(lambda rows: [work(image) for image in _planes(source, rows, ranks)], chunks):
        out += results
        bar.update(len(results))
  finally:
    pool.shutdown(cancel_futures=True)
  return out


def _planes(source: Source, rows: Sequence[int], ranks: np.ndarray) -> list[np.ndarray]:
  if (ranks[rows] == 3).all():
    return [record['image'] for record in source.__getitems__(rows)]
  return [_plane(source, i) if ranks[i] == 4 else source[i]['image'] for i in rows]


def _plane(source: Source, i: int) -> np.ndarray:
  depth, height, width = source.table['shape'][i].as_py()[:3]
  return source.window(i, (depth // 2, 0, 0), (1, height, width))[0]


def grey(image: np.ndarray) -> np.ndarray:
  """[H, W, C] of any real type -> float32 [H, W] between 0 and 255.

  The mean of the channels, each scaled from its own least and greatest value; a constant channel is 0.
  """
  wide = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
  low, high = wide.min(axis=(0, 1)), wide.max(axis=(0, 1))
  scale = np.where(high > low, 255 / np.where(high > low, high - low, 1), 0)
  return ((wide - low) * scale).mean(axis=2, dtype=np.float32)


def small(image: np.ndarray, side: int) -> np.ndarray:
  """The grey picture of an image as uint8 [side, side]."""
  fitted = resize(grey(image)[..., None], (side, side))[..., 0]
  return np.clip(np.rint(fitted), 0, 255).astype(np.uint8)
