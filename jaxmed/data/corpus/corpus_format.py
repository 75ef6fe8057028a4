"""What a corpus is on disk, and how it is written.

A folder that TensorFlow Datasets reads without TensorFlow
(`tfds.builder_from_directory(folder).as_data_source(split='train')`), and more:

  corpus-SPLIT.array_record-00000-of-00001          records, group size 1, zstd
  bricks-SPLIT-00000-of-00001.array_record          pixels of large volumes (see jaxmed.data.corpus.store)
  places-SPLIT-00000-of-00001.array_record          where the classes of masks lie (see jaxmed.data.corpus.places)
  features.json, dataset_info.json                  TFDS metadata
  manifest.parquet                                  one row a record, in the order of the plan
  stats.json                                        per channel: count, mean, std, low, high of the train split
  labels.json                                       names of the values of masks, where somebody gave them
  rejects.csv                                       path, reason: files that could not be read
  card.md, mosaic.png                               what is in it

Where a table gave them, records hold `text`, `mask` (integers on the image's grid) and `signal` [T, C] with
`signal_rate` (Hz), too; where their cell was empty they are empty.

One specification holds for pixels of any rank and type: the array travels as raw bytes (C order, little
endian) beside its type and shape. The same input gives the same bytes, however many processes wrote them.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxmed import files
from jaxmed.data.corpus import labels, places, store
from jaxmed.data.corpus.stats import Stats

NAME = 'corpus'
SPLITS = ('train', 'val', 'test')
BESIDE = ('bricks', 'places')  # kinds of files that lie beside a shard
MANIFEST = 'manifest.parquet'
# A shard is closed when its pixels reach this many bytes before compression.
SHARD_BYTES = 256 << 20

COLUMNS = pa.schema([
  ('id', pa.string()), ('subject', pa.string()), ('source', pa.string()), ('split', pa.string()),
  ('row', pa.int64()), ('channels', pa.list_(pa.string())), ('shape', pa.list_(pa.int32())),
  ('dtype', pa.string()), ('spacing', pa.list_(pa.float32())), ('path', pa.string()), ('sha256', pa.string()),
])


def is_corpus(folder: str | os.PathLike) -> bool:
  """Whether a folder is what `prepare` writes, judged by its manifest."""
  return pathlib.Path(folder, MANIFEST).is_file()


def fields_of(types: Mapping[str, Any]) -> tuple[str, ...]:
  """Which of the fields that only some corpora have follow from a manifest's columns."""
  return tuple(name for name in ('text', 'mask', 'signal') if name in types)


def features(fields: Sequence[str] = ()):
  """The TFDS features of a corpus with the fields that only some have."""
  import tensorflow_datasets as tfds

  f = tfds.features
  data = lambda: f.Tensor(shape=(), dtype=np.object_)
  optional = {
    'text': {'text': f.Text()},
    'mask': {'mask': data(), 'mask_dtype': f.Text()},
    'signal': {'signal': data(), 'signal_dtype': f.Text(), 'signal_shape': f.Tensor(shape=(None,), dtype=np.int32),
               'signal_rate': f.Tensor(shape=(), dtype=np.float64)},
  }
  more = {k: v for name in fields for k, v in optional[name].items()}
  return f.FeaturesDict(more | {
    'id': f.Text(), 'subject': f.Text(), 'source': f.Text(),
    'image': f.Tensor(shape=(), dtype=np.object_), 'dtype': f.Text(),
    'shape': f.Tensor(shape=(None,), dtype=np.int32), 'channels': f.Sequence(f.Text()),
    'spacing': f.Tensor(shape=(None,), dtype=np.float32),
  })


def decode(example: dict[str, Any]) -> dict[str, Any]:
  """A TFDS example of a corpus -> a record with `image` as an array (see jaxmed.data.readers).

  `text`, `mask`, and `signal` with `signal_rate` (None where unknown), are there where the record has them. Where the
  pixels lie in bricks, `image` is what `store.parse` gives, and `shape` and `dtype` are there too; so with `mask`,
  and `mask_shape` and `mask_dtype`.
  """
  dtype = np.dtype(_text(example['dtype'])).newbyteorder('<')
  spacing = [float(s) for s in example['spacing']]
  shape = [int(n) for n in example['shape']]
  out: dict[str, Any] = {
    'channels': [_text(c) for c in example['channels']], 'spacing': spacing or None,
    'id': _text(example['id']), 'subject': _text(example['subject']), 'source': _text(example['source']),
  }
  if example.get('text'):
    out['text'] = _text(example['text'])
  if example.get('signal'):
    signal = np.frombuffer(example['signal'], np.dtype(_text(example['signal_dtype'])).newbyteorder('<'))
    out |= {'signal': signal.reshape(example['signal_shape']), 'signal_rate': float(example['signal_rate']) or None}
  if example.get('mask'):
    out |= _mask(example, shape[:-1])
  bricks = store.parse(example['image'], int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
  if bricks is not None:
    return {'image': bricks, 'shape': shape, 'dtype': dtype} | out
  return {'image': np.frombuffer(example['image'], dtype).reshape(shape)} | out


def _mask(example: dict[str, Any], grid: list[int]) -> dict[str, Any]:
  dtype = np.dtype(_text(example['mask_dtype'])).newbyteorder('<')
  bricks = store.parse(example['mask'], int(np.prod(grid, dtype=np.int64)) * dtype.itemsize)
  if bricks is not None:
    return {'mask': bricks, 'mask_dtype': dtype, 'mask_shape': [*grid, 1]}
  return {'mask': np.frombuffer(example['mask'], dtype).reshape(grid)}


class Writer:
  """Writes records as shards into an existing empty folder, and keeps their rows and statistics.

  Attributes:
    rows: of the manifest; `row` counts within the split.
    stats: of the channels.
    shards: {split: [records, bytes] of each shard}. Their files are `part(split, i)`.
  """

  def __init__(self, folder: pathlib.Path, block: int = 0, fields: Sequence[str] = ()):
    from tensorflow_datasets.core import example_serializer

    self.folder = folder
    self.stats = Stats(block)
    self.rows: list[dict[str, Any]] = []
    self.shards: dict[str, list[list[int]]] = {}
    self._features = features(fields)
    self._fields = tuple(fields)
    self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
    self._open: dict[str, Any] = {}
    self._bricks: dict[str, int] = {}  # rows in the brick file beside the open shard

  def add(self, record: dict[str, Any], split: str, path: str, sha256: str, extra: Mapping[str, Any]) -> None:
    """Appends a record (with its `id`) to a split; `extra` holds the values of further columns."""
    image = record['image']
    shards = self._room(split, image.nbytes)
    example = {k: record[k] for k in ('id', 'subject', 'source', 'channels')} | {
      'image': self._pixels(split, image), 'dtype': image.dtype.name, 'shape': np.array(image.shape, np.int32),
      'spacing': np.array(record['spacing'] or [], np.float32),
    }
    example |= self._optional(split, record)
    # Protobuf orders the fields of a map by chance unless it is told not to.
    proto = self._serializer.get_tf_example(self._features.encode_example(example))
    row = sum(n for n, _ in shards)
    self._open[split].write(proto.SerializeToString(deterministic=True))
    shards[-1][0] += 1
    shards[-1][1] += image.nbytes
    self.stats.add(image, record['channels'], split)
    counts = self._places(split, record) if 'mask' in self._fields else {}
    self.rows.append({
      'id': record['id'], 'subject': record['subject'], 'source': record['source'],
      'split': split, 'row': row,
      'channels': record['channels'], 'shape': list(image.shape), 'dtype': image.dtype.name,
      'spacing': record['spacing'], 'path': path, 'sha256': sha256,
    } | dict(extra) | ({labels.VALUES: list(counts), labels.VOXELS: list(counts.values())} if counts else {}))

  def close(self) -> None:
    """Closes open shards; their errors (a full disk) surface here at the latest."""
    while self._open:
      self._open.popitem()[1].close()

  def _optional(self, split: str, record: dict[str, Any]) -> dict[str, Any]:
    """The fields that only some corpora have, empty where the record lacks them."""
    out: dict[str, Any] = {}
    if 'text' in self._fields:
      out['text'] = record.get('text') or ''
    if 'mask' in self._fields:
      mask = record.get('mask')
      out['mask'] = b'' if mask is None else self._pixels(split, mask[..., None])
      out['mask_dtype'] = '' if mask is None else mask.dtype.name
    if 'signal' in self._fields:
      signal = record.get('signal', np.zeros((0, 0), np.float32))
      out |= {'signal': _little(signal), 'signal_dtype': signal.dtype.name,
              'signal_shape': np.array(signal.shape, np.int32), 'signal_rate': record.get('signal_rate') or 0.0}
    return out

  def _places(self, split: str, record: dict[str, Any]) -> dict[int, int]:
    """Writes where the classes of a mask lie; returns the pixels of each value, {} of a record without a mask."""
    mask, key = record.get('mask'), f'{split}-places'
    counts = record.get('mask_counts') or ({} if mask is None else labels.counted(mask))
    if key not in self._open:
      self._open[key] = self._create(self.part(key, len(self.shards[split]) - 1), 'group_size:1,zstd:3')
    self._open[key].write(places.drawn(mask, counts))
    return counts

  def _pixels(self, split: str, image: np.ndarray) -> bytes:
    if not store.is_chunked(image):
      return _little(image)
    key = f'{split}-bricks'
    if key not in self._open:
      self._open[key] = self._create(self.part(key, len(self.shards[split]) - 1), 'group_size:1,uncompressed')
      self._bricks[split] = 0
    first = self._bricks[split]
    for at in store.bricks(image.shape[:3], store.EDGE):
      self._open[key].write(store.encode(image[at]))
      self._bricks[split] += 1
    return store.index(first, store.EDGE)

  def _room(self, split: str, size: int) -> list[list[int]]:
    """The shards of a split, the last of which is open and takes `size` bytes more."""
    shards = self.shards.setdefault(split, [])
    if not shards or (shards[-1][0] and shards[-1][1] + size > SHARD_BYTES):
      for key in (split, *(f'{split}-{kind}' for kind in BESIDE)):
        if key in self._open:
          self._open.pop(key).close()
      shards.append([0, 0])
      self._open[split] = self._create(self.part(split, len(shards) - 1), 'group_size:1,zstd:3')
    return shards

  def _create(self, path: pathlib.Path, options: str):
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), options)

  def part(self, key: str, i: int) -> pathlib.Path:
    """Where shard i lies; the key is a split, or 'SPLIT-bricks' or 'SPLIT-places' for what lies beside it."""
    return self.folder / f'{key}-{i:05d}.part'


def shard_name(key: str, i: int, count: int) -> str:
  """The file of shard i of `count`; the key is as for `Writer.part`."""
  split, _, kind = key.partition('-')
  number = f'{i:05d}-of-{count:05d}'
  return f'{kind}-{split}-{number}.array_record' if kind else f'{NAME}-{split}.array_record-{number}'


def write_metadata(folder: pathlib.Path, shards: Mapping[str, Sequence[Sequence[int]]], fields: Sequence[str] = (),
                   ) -> None:
  """Writes what TFDS needs to read a folder; `shards` holds [records, bytes] of each shard of each split."""
  import tensorflow_datasets as tfds

  pattern = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
  infos = []
  for split in sorted(shards, key=SPLITS.index):
    template = tfds.core.ShardedFileTemplate(
      dataset_name=NAME, data_dir=folder, filetype_suffix='array_record', split=split, template=pattern)
    infos.append(tfds.core.SplitInfo(
      name=split, shard_lengths=[n for n, _ in shards[split]], num_bytes=sum(b for _, b in shards[split]),
      filename_template=template))
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features(fields), split_infos=infos, version='1.0.0',
    filename_template=pattern, check_data=False, description='Medical images of any rank and channels.')


def write_rejects(path: pathlib.Path, rejects: Sequence[Sequence[str]]) -> None:
  """Writes a CSV with the columns path and reason."""
  files.write_csv(path, [('path', 'reason'), *([files.shown(word) for word in pair] for pair in rejects)])


def _little(array: np.ndarray) -> bytes:
  return np.ascontiguousarray(array, array.dtype.newbyteorder('<')).tobytes()


def _text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else value
