"""Small stand-ins for a corpus and an encoder: the methods that evaluation calls, nothing else."""

import dataclasses

import numpy as np
import pyarrow as pa

from jaxmed.errors import choose


@dataclasses.dataclass(frozen=True)
class FakeSource:
  table: pa.Table
  images: np.ndarray  # [N, H, W, C]
  channels: tuple[str, ...] = ('T1', 'GM')

  def __len__(self):
    return len(self.table)

  def select(self, split=None, label=None):
    keep = np.ones(len(self), bool)
    if split is not None:
      keep &= np.array([s == split for s in self.table['split'].to_pylist()], bool)
    if label is not None:
      choose('column', label, self.table.column_names)
      keep &= np.array([v is not None for v in self.table[label].to_pylist()], bool)
    rows = np.flatnonzero(keep)
    return dataclasses.replace(
      self, table=self.table.take(pa.array(rows, pa.int64())), images=self.images[rows]
    )

  def keep(self, rows):
    return dataclasses.replace(self, table=self.table.filter(pa.array(rows)), images=self.images[rows])

  def column(self, name):
    return self.table[name]

  def codes(self, label, classes):
    return np.array(
      [-1 if v is None else classes.index(str(v)) for v in self.table[label].to_pylist()], np.int32
    )

  def classes(self, label):
    return tuple(sorted({str(v) for v in self.table[label].to_pylist() if v is not None}))


@dataclasses.dataclass(frozen=True)
class FakeEncoder:
  """Features are a fixed random projection of the pixels; noise tells 'untrained' from 'trained'."""

  noise: float = 0.0
  image_size: tuple[int, ...] = (6, 6)
  vocabulary: tuple[str, ...] = ('DAPI', 'GM', 'T1')
  nan_rows: int = 0

  def embed_source(self, source, batch_size):
    flat = source.images.reshape(len(source), -1).astype(np.float32) / 255
    x = flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 16))
    x = (x + self.noise * np.random.default_rng(1).normal(size=x.shape)).astype(np.float32)
    x[:self.nan_rows] = np.nan
    return {'cls': -x, 'mean': x}


def eval_batches(source, *, batch_size, size, vocabulary):
  """Padded batches as jaxmed.data.feed.pipeline gives them; every second record has its channels turned."""
  assert tuple(size) == source.images.shape[1:3]
  n, ids = len(source), [vocabulary.index(c) for c in source.channels]
  for start in range(0, n, batch_size):
    index = np.arange(start, start + batch_size)
    index = np.where(index < n, index, -1)
    image = source.images[index].copy()
    channels = np.tile(np.array(ids, np.int32), (batch_size, 1))
    odd = index % 2 == 1
    image[odd], channels[odd] = image[odd][..., ::-1], channels[odd][:, ::-1]
    mask = np.broadcast_to((index >= 0)[:, None], channels.shape)
    image[index < 0] = 255  # padding must not be read
    yield dict(image=image, channels=channels, channel_mask=mask, index=index.astype(np.int32))


def make_source(rows=240, num_classes=3, splits=('train', 'val', 'test'), subjects_per_split=12, seed=0):
  """Images whose mean follows the class, with subjects that stay in one split; 10 rows lack the label."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, num_classes, rows)
  split = np.array(splits)[np.arange(rows) % len(splits)]
  base = np.random.default_rng(5).integers(60, 180, (num_classes, 6, 6, 2))
  images = np.clip(base[y] + 45 * rng.normal(size=(rows, 6, 6, 2)), 0, 255).astype(np.uint8)
  names = [f'{s}-{i}' for s, i in zip(split, rng.integers(0, subjects_per_split, rows), strict=True)]
  region = [None if i < 10 else 'abcdefgh'[c] for i, c in enumerate(y)]
  table = pa.table(dict(id=[f'r{i}' for i in range(rows)], subject=names, split=split.tolist(), region=region,
                        grade=[None if r is None else int(c) for r, c in zip(region, y, strict=True)],
                        nothing=pa.nulls(rows, pa.string())))
  return FakeSource(table, images)
