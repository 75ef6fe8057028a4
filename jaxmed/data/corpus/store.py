"""Large volumes as bricks, so that a crop reads what it shows and not the whole volume.

A volume [D, H, W, C] of more than CHUNK_BYTES is cut into bricks of EDGE^3 voxels with all channels (smaller at the far
borders), in C order. Each brick is one row of the file beside the record's shard: `bricks-SPLIT-00003-of-00010.
array_record` for `corpus-SPLIT.array_record-00003-of-00010`, which is no file of the TFDS data set. The record itself
then holds, instead of pixels, three little-endian int64: MAGIC, the row of its first brick, the edge.

A brick is a chunk of Blosc2: the bits of its little-endian values transposed, then LZ4 (HC, level 9). The low bits of
values are mostly noise, which is stored as it is and costs nothing to read. tools/bench_records.py measures this beside
other codecs: it takes more bytes than zstd of differences, and decodes several times as fast. Bricks of earlier
versions, zstd of bytes stored apart of differences along the second axis, are read too.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

EDGE = 32
CHUNK_BYTES = 8 << 20
MAGIC = 0x4B434952424D584A  # 'JXMBRICK'
ZSTD = b'\x28\xb5\x2f\xfd'  # how what zstd packs begins

Slices = tuple[slice, ...]


def is_chunked(image: np.ndarray) -> bool:
  """Whether an image [D, H, W, C] is stored in bricks."""
  return image.ndim == 4 and image.nbytes > CHUNK_BYTES


def index(first: int, edge: int) -> bytes:
  """What a record holds instead of pixels: where its bricks begin, and their edge."""
  return np.array([MAGIC, first, edge], '<i8').tobytes()


def parse(image: bytes, size: int) -> tuple[int, int] | None:
  """(row of the first brick, edge) of a record whose pixels take `size` bytes, or None where the pixels are here."""
  if len(image) == size or len(image) != 24:
    return None
  magic, first, edge = np.frombuffer(image, '<i8').tolist()
  return (first, edge) if magic == MAGIC else None


def bricks(shape: Sequence[int], edge: int) -> Iterator[Slices]:
  """The places of all bricks of a grid of that shape, in the order of their rows."""
  axes = [[slice(at, min(at + edge, n)) for at in range(0, n, edge)] for n in shape]
  return itertools.product(*axes)


def encode(brick: np.ndarray) -> bytes:
  """Packs a brick [d, h, w, C] of any real type of 1, 2 or 4 bytes."""
  import imagecodecs

  little = np.ascontiguousarray(brick, brick.dtype.newbyteorder('<'))
  # The size of a value is taken from an array alone: of bytes it is 8, whatever `typesize` says.
  return bytes(imagecodecs.blosc2_encode(little, level=9, compressor='lz4hc', shuffle='bitshuffle',  # type: ignore
                                         numthreads=1))


def decode(data: bytes, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """The brick of `encode`.

  Raises:
    ValueError: the data are damaged.
  """
  import imagecodecs

  dtype = np.dtype(dtype).newbyteorder('<')
  try:
    if data[:4] == ZSTD:
      return _summed(np.frombuffer(imagecodecs.zstd_decode(data), np.uint8).reshape(dtype.itemsize, *shape), dtype)
    if int.from_bytes(data[12:16], 'little') != len(data):  # Blosc2 does not look beyond the end
      raise ValueError('it has another length than it says')
    return np.frombuffer(imagecodecs.blosc2_decode(data, numthreads=1), dtype).reshape(shape)
  except (RuntimeError, ValueError) as e:
    raise ValueError(f'a brick of {len(data)} bytes is damaged: {e}') from e


def _summed(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A brick of an earlier version from the bytes [itemsize, d, h, w, C] of its differences along the second axis."""
  steps = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(f'<u{dtype.itemsize}')[..., 0]
  return np.add.accumulate(steps, axis=1, dtype=steps.dtype).view(dtype)


def window(
    read: Callable[[list[int]], Sequence[bytes]], shape: Sequence[int], dtype: np.dtype, first: int, edge: int,
    at: Slices,
) -> np.ndarray:
  """The part `at` (three slices with start and stop inside the grid) of a volume in bricks.

  Args:
    read: gives the data of rows.
    shape: [D, H, W, C] of the volume.
    dtype: of its voxels.
    first: row of its first brick.
    edge: of its bricks.
    at: what is wanted.
  """
  grid = [-(-n // edge) for n in shape[:3]]
  needed = list(itertools.product(*(range(s.start // edge, -(-s.stop // edge)) for s in at)))
  rows = [first + (z * grid[1] + y) * grid[2] + x for z, y, x in needed]
  dtype = np.dtype(dtype).newbyteorder('<')
  out = np.empty([*(s.stop - s.start for s in at), shape[3]], dtype)
  for place, data in zip(needed, read(rows) if rows else ()):
    begin = [p * edge for p in place]
    size = [min(edge, n - b) for b, n in zip(begin, shape)]
    low = [max(s.start, b) for s, b in zip(at, begin)]
    high = [min(s.stop, b + n) for s, b, n in zip(at, begin, size)]
    part = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(low, high, begin))
    into = tuple(slice(lo - s.start, hi - s.start) for lo, hi, s in zip(low, high, at))
    out[into] = decode(data, [*size, shape[3]], dtype)[part]
  return out


class Files:
  """The brick files of one split, opened when they are first read. Threads may share it; it can be pickled."""

  def __init__(self, paths: Sequence[str]):
    self.paths = list(paths)
    self._lock = threading.Lock()
    self._open: dict[int, Any] = {}

  def read(self, shard: int, rows: list[int]) -> Sequence[bytes]:
    """The data of rows of the file beside a shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    with self._lock:
      if shard not in self._open:
        self._open[shard] = ArrayRecordReader(self.paths[shard], 'readahead_buffer_size:0',
                                              file_reader_buffer_size=32768)
    return self._open[shard].read(rows)

  def __getstate__(self) -> dict:
    return {'paths': self.paths}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state['paths'])  # type: ignore[misc]
