"""A corpus in an object store (s3://, gs://, any URL that fsspec knows), read record by record by range requests.

The manifest and the metadata, which are small, are copied into $JAXMED_CACHE (~/.cache/jaxmed by default), once for
each version of the corpus. Of a shard the footer is read when the shard is first needed, and then the bytes of one
record a request: no shard is ever fetched whole, so the first batch comes at once and the local disk does not fill up.

ArrayRecord's own reader opens local files alone. What it would do is little: an ArrayRecord file is a file of Riegeli
chunks (google/riegeli, doc/riegeli_records_file_format.md) whose last block names a footer, which holds the offset of
each chunk (google/array_record, cpp/array_record_writer.cc).
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxmed import files
from jaxmed.data.corpus import labels, manifest
from jaxmed.data.corpus.corpus_format import COLUMNS, MANIFEST, shard_name
from jaxmed.data.corpus.source import Source, check_counts, metadata
from jaxmed.errors import Unavailable, UserError, need

SMALL = ('features.json', 'dataset_info.json', 'stats.json', MANIFEST)
MAYBE = (labels.FILE,)  # of some corpora
TRIES, PAUSE = 4, 0.5  # how often a request is tried, and the seconds before the second, doubled each time
TAIL = 1 << 20  # bytes before a shard's last block that are read with it, in the hope that the footer is among them
PACKAGES = {'s3': 's3fs', 's3a': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs', 'az': 'adlfs', 'abfs': 'adlfs'}

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_MAGIC = 0x71930E704FDAE05E
_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Url:
  """Where a corpus lies, in the place of a folder's path."""

  text: str

  @property
  def name(self) -> str:
    """The last part."""
    return self.text.rstrip('/').rpartition('/')[2]

  def resolve(self) -> 'Url':
    """Itself."""
    return self

  def is_dir(self) -> bool:
    """Not one on this machine."""
    return False

  def __truediv__(self, other: str) -> Any:
    raise UserError(f'{self} lies in an object store: copy it to a disk for what reads or writes files beside it')

  def __str__(self) -> str:
    return self.text


def open_remote(url: str) -> Source:
  """Opens a corpus by its URL.

  Raises:
    UserError: a package for the store is missing, no access, no corpus there, or a damaged one.
  """
  url = url.rstrip('/')
  system, root = _system(url)
  folder = _copied(system, root, url)
  table = manifest.Manifest(manifest.Columns(folder / MANIFEST))
  lost = [c for c in COLUMNS.names if c not in table.column_names]
  if lost:
    raise UserError(f'{url}/{MANIFEST} has no column {lost[0]!r}: prepare it again')
  builder = metadata(folder, url)
  check_counts(builder, table, url)
  readers, bricks, places, lengths = {}, {}, {}, {}
  for split, info in builder.info.splits.items():
    names = [os.path.basename(path) for path in info.filepaths]
    raw = Records(url, names, list(info.shard_lengths))
    readers[split] = Examples(raw, builder.info.features)
    bricks[split] = Records(url, [shard_name(f'{split}-bricks', i, len(names)) for i in range(len(names))], [])
    own = [shard_name(f'{split}-places', i, len(names)) for i in range(len(names))]
    if system.exists(f'{root}/{own[0]}'):
      places[split] = Records(url, own, [])
    lengths[split] = np.cumsum(info.shard_lengths)
  stats = files.read_json(folder / 'stats.json')
  told = folder / labels.FILE
  classes = {url: labels.read(told)} if told.is_file() else {}
  return Source(Url(url), table, stats, readers, bricks, lengths, (), classes, places)  # type: ignore[arg-type]


def _system(url: str) -> tuple[Any, str]:
  """fsspec's file system and the path in it."""
  fsspec = need('fsspec', 'remote')
  scheme = url.partition('://')[0]
  try:
    return fsspec.core.url_to_fs(url)
  except ImportError as e:
    package = PACKAGES.get(scheme, scheme)
    raise UserError(f"{url} needs {package}: pip install {'jaxmed[remote]' if package == 's3fs' else package}") from e
  except ValueError as e:
    raise UserError(f'{url}: {" ".join(str(e).split())}') from e


def cache_folder() -> pathlib.Path:
  """Where manifests of corpora in object stores are kept."""
  return pathlib.Path(os.environ.get('JAXMED_CACHE') or pathlib.Path.home() / '.cache' / 'jaxmed')


def _copied(system: Any, root: str, url: str) -> pathlib.Path:
  """A local folder with the small files of this version of the corpus."""
  try:
    small = [*SMALL, *(name for name in MAYBE if system.exists(f'{root}/{name}'))]
    versions = [system.ukey(f'{root}/{name}') for name in small]
  except FileNotFoundError as e:
    raise UserError(f'{url} is no corpus: it has no {e.filename or MANIFEST} ({_line(e)}); expected what '
                    '`jaxmed prepare` writes') from e
  except Exception as e:  # each store raises its own kinds: no such bucket, no credentials, no connection
    raise UserError(f'cannot read {url}: {_line(e)}') from e
  folder = cache_folder() / hashlib.sha256(repr((url, versions)).encode()).hexdigest()[:24]
  for name in small:
    if not (folder / name).is_file():
      with files.writing(folder / name) as part:
        tried(lambda: system.get_file(f'{root}/{name}', str(part)), f'{url}/{name}')  # noqa: B023
  return folder


def _line(e: BaseException) -> str:
  return ' '.join(str(e).split()) or type(e).__name__


def tried(request: Callable[[], _T], what: str) -> _T:
  """The answer of a store, asked again where it fails. Unavailable: it goes on failing. UserError: it is gone."""
  for n in range(TRIES):
    try:
      return request()
    except FileNotFoundError as e:
      raise UserError(f'{what} does not exist (any more): {_line(e)}') from e
    except (PermissionError, UserError):
      raise
    except Exception as e:
      if n == TRIES - 1:
        raise Unavailable(f'cannot read {what}: {_line(e)} (tried {TRIES} times); go on with --resume RUN') from e
      time.sleep(PAUSE * 2**n)
  raise AssertionError('unreachable')


class Records:
  """The records of several ArrayRecord files of an object store as bytes, by place or by file and row.

  Threads may share it; it can be pickled.
  """

  def __init__(self, url: str, names: Sequence[str], lengths: Sequence[int]):
    """`lengths` are the records of each file, which places run over; () where files and rows are asked for."""
    self.url, self.names, self.lengths = url, list(names), list(lengths)
    self._ends = np.cumsum(self.lengths)
    self._system, self._root = _system(url)
    self._indices: dict[int, Index] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, place: int) -> bytes:
    shard = int(np.searchsorted(self._ends, place, side='right'))
    return self.read(shard, [place - int(self._ends[shard]) + self.lengths[shard]])[0]

  def __getitems__(self, places: Sequence[int]) -> list[bytes]:
    return [self[place] for place in places]

  def read(self, shard: int, rows: Sequence[int]) -> list[bytes]:
    """The records of rows of one file."""
    index, path, what = self._index(shard), f'{self._root}/{self.names[shard]}', f'{self.url}/{self.names[shard]}'
    chunks = [index.chunk(row) for row in rows]
    wanted = enumerate(sorted({number for number, _ in chunks}))
    runs = [[n for _, n in run] for _, run in itertools.groupby(wanted, lambda pair: pair[1] - pair[0])]
    spans = [(index.span(run[0])[0], index.span(run[-1])[1]) for run in runs]  # neighbours by one request
    if len(spans) == 1:
      data = [tried(lambda: self._system.cat_file(path, start=spans[0][0], end=spans[0][1]), what)]
    else:
      starts, ends = zip(*spans)
      data = tried(lambda: self._system.cat_ranges([path] * len(spans), list(starts), list(ends)), what)
    found = {}
    for run, whole, (begin, _) in zip(runs, data, spans):
      for n in run:
        start, end = index.span(n)
        found[n] = unpacked(joined(whole[start - begin:end - begin], start), what)
    return [found[number][place] for number, place in chunks]

  def _index(self, shard: int) -> 'Index':
    with self._lock:
      if shard not in self._indices:
        path, what = f'{self._root}/{self.names[shard]}', f'{self.url}/{self.names[shard]}'
        size = int(tried(lambda: self._system.info(path), what)['size'])
        read = lambda start, end: tried(lambda: self._system.cat_file(path, start=start, end=end), what)
        self._indices[shard] = read_index(read, size, what)
      return self._indices[shard]

  def __getstate__(self) -> dict:
    return {'url': self.url, 'names': self.names, 'lengths': self.lengths}

  def __setstate__(self, state: dict) -> None:
    self.__init__(**state)  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Examples:
  """The records as TFDS's data source gives them."""

  data_source: Records
  features: Any

  def __len__(self) -> int:
    return len(self.data_source)

  def __getitem__(self, place: int) -> dict[str, Any]:
    return self.features.deserialize_example_np(self.data_source[place])

  def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
    return [self.features.deserialize_example_np(data) for data in self.data_source.__getitems__(places)]


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
  """Where the chunks of an ArrayRecord file lie.

  Attributes:
    offsets: [K + 1] where each chunk begins, and the last one ends at the latest.
    firsts: [K + 1] the first record of each, and their number.
    size: of the file.
  """

  offsets: np.ndarray
  firsts: np.ndarray
  size: int

  def chunk(self, row: int) -> tuple[int, int]:
    """The chunk that holds a record, and the record's place in it."""
    if not 0 <= row < self.firsts[-1]:
      raise IndexError(f'record {row} of {self.firsts[-1]}')
    number = int(np.searchsorted(self.firsts, row, side='right')) - 1
    return number, row - int(self.firsts[number])

  def span(self, number: int) -> tuple[int, int]:
    """The bytes of a chunk in the file."""
    return int(self.offsets[number]), int(self.offsets[number + 1])


def read_index(read: Callable[[int, int], bytes], size: int, what: str) -> Index:
  """The index of a file of `size` bytes, of which `read(start, end)` gives bytes.

  Raises:
    UserError: it is no whole ArrayRecord file.
  """
  if size < _BLOCK or size % _BLOCK:
    raise UserError(f'{what} is no whole ArrayRecord file: {size} bytes are no blocks of 64 KiB; prepare it again')
  last = size - _BLOCK
  begin = max(0, last - TAIL)
  try:
    tail = read(begin, size)
    [postscript] = unpacked(joined(tail[last - begin:], last), what, count=1)
    fields = _fields(postscript)
    if fields.get(2) != _MAGIC:
      raise ValueError('its last block is no postscript')
    at = fields[1]
    footer = tail[at - begin:last - begin] if at >= begin else read(at, last)
    rows = [_fields(entry) for entry in unpacked(joined(footer, at), what)]
    chunks = [(row[1], row.get(3, 0)) for row in rows if row.get(3)]
  except (ValueError, KeyError, IndexError, struct.error) as e:
    raise UserError(f'{what} is no whole ArrayRecord file: {_line(e)}; prepare it again') from e
  offsets = np.array([*(offset for offset, _ in chunks), at], np.int64)
  return Index(offsets, np.concatenate([[0], np.cumsum([n for _, n in chunks])]).astype(np.int64), size)


def joined(data: bytes, begin: int) -> bytes:
  """Bytes of a file from `begin` on, without the headers that Riegeli puts at each multiple of 64 KiB."""
  parts, at = [], 0
  while at < len(data):
    place = (begin + at) % _BLOCK
    if place == 0:
      at += _BLOCK_HEADER
      place = _BLOCK_HEADER
    room = _BLOCK - place
    parts.append(data[at:at + room])
    at += room
  return b''.join(parts)


def unpacked(chunk: bytes, what: str, count: int | None = None) -> list[bytes]:
  """The records of a chunk of type 'r' (simple), from its header on.

  Raises:
    ValueError: it is cut short, or of another type.
  """
  _, size, _, kind, decoded = struct.unpack_from('<QQQQQ', chunk)
  number = kind >> 8
  data = chunk[_CHUNK_HEADER:_CHUNK_HEADER + size]
  if kind & 255 != ord('r') or len(data) != size:
    raise ValueError(f'a chunk of {what} is cut short or of another kind')
  packing, (length, at) = data[:1], _varint(data, 1)
  sizes = _expanded(packing, data[at:at + length])
  values = _expanded(packing, data[at + length:])
  if len(values) != decoded:
    raise ValueError(f'a chunk of {what} holds {len(values)} bytes, not {decoded}')
  out, place, begin = [], 0, 0
  for _ in range(number if count is None else min(count, number)):
    length, place = _varint(sizes, place)
    out.append(values[begin:begin + length])
    begin += length
  return out


def _expanded(packing: bytes, data: bytes) -> bytes:
  if packing == b'\0':
    return data
  if packing != b'z':
    raise ValueError(f'compressed by {packing!r}, not zstd')
  import imagecodecs

  size, at = _varint(data, 0)
  try:
    return bytes(imagecodecs.zstd_decode(data[at:], out=size)) if size else b''
  except RuntimeError as e:
    raise ValueError(f'damaged: {e}') from e


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """A varint of Protocol Buffers and where it ends."""
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _fields(message: bytes) -> dict[int, int]:
  """The numbers of a Protocol Buffers message by field; nested ones are left out."""
  out, at = {}, 0
  while at < len(message):
    key, at = _varint(message, at)
    if key & 7 == 0:
      out[key >> 3], at = _varint(message, at)
    elif key & 7 == 1:
      out[key >> 3], at = int.from_bytes(message[at:at + 8], 'little'), at + 8
    elif key & 7 == 2:
      length, at = _varint(message, at)
      at += length
    else:
      raise ValueError(f'field of kind {key & 7}')
  return out
