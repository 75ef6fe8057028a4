"""What a corpus is on disk, and how it is written.

A folder that TensorFlow Datasets reads without TensorFlow
(`tfds.builder_from_directory(folder).as_data_source(split='train')`), and more:

  corpus-SPLIT.array_record-00000-of-00001   records, group size 1, zstd
  features.json, dataset_info.json           TFDS metadata
  manifest.parquet                           one row a record, in the order in which records were read
  stats.json                                 per channel: count, mean, std, low, high of the train split
  rejects.csv                                path, reason: files that could not be read

One specification holds for pixels of any rank and type: the array travels as raw bytes (C order, little
endian) beside its type and shape. The same input gives the same bytes.
"""

import contextlib
import csv
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.data.stats import Stats
from jaxmed.errors import UserError

NAME = 'corpus'
SPLITS = ('train', 'val', 'test')
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


def features():
  """The TFDS features of a corpus."""
  import tensorflow_datasets as tfds

  f = tfds.features
  return f.FeaturesDict({
    'id': f.Text(), 'subject': f.Text(), 'source': f.Text(),
    'image': f.Tensor(shape=(), dtype=np.object_), 'dtype': f.Text(),
    'shape': f.Tensor(shape=(None,), dtype=np.int32), 'channels': f.Sequence(f.Text()),
    'spacing': f.Tensor(shape=(None,), dtype=np.float32),
  })


def decode(example: dict[str, Any]) -> dict[str, Any]:
  """A TFDS example of a corpus -> a record with `image` as an array (see jaxmed.data.readers)."""
  dtype = np.dtype(_text(example['dtype'])).newbyteorder('<')
  image = np.frombuffer(example['image'], dtype).reshape(example['shape'])
  spacing = [float(s) for s in example['spacing']]
  return {
    'image': image, 'channels': [_text(c) for c in example['channels']], 'spacing': spacing or None,
    'id': _text(example['id']), 'subject': _text(example['subject']), 'source': _text(example['source']),
  }


class Writer:
  """Writes shards, manifest, statistics and metadata into an existing empty folder."""

  def __init__(self, folder: pathlib.Path):
    from tensorflow_datasets.core import example_serializer

    self.folder = folder
    self.stats = Stats()
    self._features = features()
    self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
    self._shards: dict[str, list[list[int]]] = {}  # split -> [records, bytes] of each shard
    self._open: dict[str, Any] = {}
    self.rows: list[dict[str, Any]] = []

  def add(self, record: dict[str, Any], split: str, path: str, sha256: str, extra: dict[str, Any]) -> None:
    """Appends a record (with its `id`) to a split; `extra` holds the values of the table's other columns."""
    image = record['image']
    little = np.ascontiguousarray(image, image.dtype.newbyteorder('<'))
    example = {k: record[k] for k in ('id', 'subject', 'source', 'channels')} | {
      'image': little.tobytes(), 'dtype': image.dtype.name, 'shape': np.array(image.shape, np.int32),
      'spacing': np.array(record['spacing'] or [], np.float32),
    }
    # Protobuf orders the fields of a map by chance unless it is told not to.
    proto = self._serializer.get_tf_example(self._features.encode_example(example))
    data = proto.SerializeToString(deterministic=True)
    shards = self._shards.setdefault(split, [])
    row = sum(n for n, _ in shards)
    self._shard(split, little.nbytes).write(data)
    shards[-1][0] += 1
    shards[-1][1] += little.nbytes
    self.stats.add(image, record['channels'], split)
    self.rows.append({
      'id': record['id'], 'subject': record['subject'], 'source': record['source'],
      'split': split, 'row': row,
      'channels': record['channels'], 'shape': list(image.shape), 'dtype': image.dtype.name,
      'spacing': record['spacing'], 'path': path, 'sha256': sha256,
    } | extra)

  def finish(self, rejects: list[tuple[str, str]], types: dict[str, pa.DataType]) -> None:
    """Closes the shards and writes everything beside them; `types` are those of the extra columns."""
    self.close()
    for split, shards in self._shards.items():
      for i in range(len(shards)):
        os.rename(self._part(split, i), self.folder / self._file(split, i, len(shards)))
    write_rejects(self.folder / 'rejects.csv', rejects)
    files.write_json(self.folder / 'stats.json', self.stats.summary())
    names = dict.fromkeys([*COLUMNS.names, *types, *(k for r in self.rows for k in r)])
    kinds = {field.name: field.type for field in COLUMNS} | types
    table = pa.table({n: pa.array([r.get(n) for r in self.rows], type=kinds.get(n)) for n in names})
    pq.write_table(table, self.folder / MANIFEST)
    self._write_metadata()

  def close(self) -> None:
    """Closes open shards; their errors (a full disk) surface here at the latest."""
    while self._open:
      self._open.popitem()[1].close()

  def _shard(self, split: str, size: int):
    from array_record.python.array_record_module import ArrayRecordWriter

    shards = self._shards[split]
    if not shards or (shards[-1][0] and shards[-1][1] + size > SHARD_BYTES):
      if split in self._open:
        self._open.pop(split).close()
      shards.append([0, 0])
      self._open[split] = ArrayRecordWriter(str(self._part(split, len(shards) - 1)), 'group_size:1,zstd:3')
    return self._open[split]

  def _part(self, split: str, i: int) -> pathlib.Path:
    return self.folder / f'{split}-{i:05d}.part'

  def _file(self, split: str, i: int, count: int) -> str:
    return f'{NAME}-{split}.array_record-{i:05d}-of-{count:05d}'

  def _write_metadata(self) -> None:
    import tensorflow_datasets as tfds

    pattern = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    infos = []
    for split in sorted(self._shards, key=SPLITS.index):
      template = tfds.core.ShardedFileTemplate(
        dataset_name=NAME, data_dir=self.folder, filetype_suffix='array_record', split=split,
        template=pattern)
      infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[n for n, _ in self._shards[split]],
        num_bytes=sum(b for _, b in self._shards[split]), filename_template=template))
    tfds.folder_dataset.write_metadata(
      data_dir=self.folder, features=self._features, split_infos=infos, version='1.0.0',
      filename_template=pattern, check_data=False, description='Medical images of any rank and channels.')


def write_rejects(path: pathlib.Path, rejects: list[tuple[str, str]]) -> None:
  """Writes a CSV with the columns path and reason."""
  with files.writing(path) as part, open(part, 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows([('path', 'reason'), *rejects])


@contextlib.contextmanager
def building(out: str | os.PathLike, overwrite: bool) -> Iterator[pathlib.Path]:
  """Yields a new folder OUT.part; renamed to OUT on success, removed on any failure.

  Raises:
    UserError: OUT exists (with `overwrite`: and is no corpus), the place cannot be written, the disk is full.
  """
  out = pathlib.Path(os.path.abspath(out))
  part = out.with_name(out.name + '.part')
  _check_free(out, overwrite)
  try:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    _swap(part, out)
  except UserError as e:
    if _is_full(e):
      raise UserError(f'the disk is full: nothing was kept of {out}') from e
    raise
  except Exception as e:  # array_record raises RuntimeError, pyarrow OSError, protobuf others
    if _is_full(e):
      raise UserError(f'the disk is full: nothing was kept of {out}') from e
    if isinstance(e, OSError):
      raise UserError(f'cannot write {out}: {e.strerror or e}') from e
    raise
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _swap(part: pathlib.Path, out: pathlib.Path) -> None:
  old = out.with_name(out.name + '.old')
  shutil.rmtree(old, ignore_errors=True)
  if out.exists():
    os.rename(out, old)
  try:
    os.rename(part, out)
  except OSError:
    if old.exists():
      os.rename(old, out)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _check_free(out: pathlib.Path, overwrite: bool) -> None:
  if not os.path.lexists(out):
    return
  if not overwrite:
    raise UserError(f'{out} exists: choose another folder, or say overwrite')
  empty = out.is_dir() and not any(out.iterdir())
  if not empty and not is_corpus(out):
    raise UserError(f'{out} is no corpus, so it is not overwritten: choose another folder, or remove it')


def _is_full(error: BaseException | None) -> bool:
  while error is not None:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def _text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else value
