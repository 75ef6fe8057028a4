"""CZI of ZEISS microscopes, by its published structure (ZISRAW File Format Specification 1.2.2, and libCZI's notes on
zstd): scenes, mosaics, channels, planes and times."""

import dataclasses
import functools
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np

from jaxmed.data.readers import slide
from jaxmed.data.readers.tiff import records
from jaxmed.data.readers.types import DEFAULT, Options, Record, check_size, number, numbered, stand_in, stem

# Pixel type -> (type of a sample, samples). Colour is stored as B, G, R (and A).
_PIXELS = {0: ('<u1', 1), 1: ('<u2', 1), 2: ('<f4', 1), 3: ('<u1', 3), 4: ('<u2', 3), 8: ('<f4', 3), 9: ('<u1', 4),
           12: ('<i4', 1)}
_RAW, _JPEG, _JPEG_XR, _ZSTD0, _ZSTD1 = 0, 1, 4, 5, 6
_ENTRY = struct.Struct('<2sIqIIB5xI')  # schema, pixel type, position, file part, compression, pyramid, dimensions
_DIMENSION = struct.Struct('<4siIfI')  # name, start, size, start coordinate, stored size
_SEGMENT = 32  # bytes before a segment's content
_MOSAIC = 'M'  # number of a tile, whose place is its X and Y
_READ = 'XYZCTS' + _MOSAIC
_CACHE = 256 << 20  # bytes of decoded blocks that are kept while tiles are cut


@dataclasses.dataclass(frozen=True)
class Block:
  """A piece of pixels in the file; `at` is {dimension: (start, size)} in pixels of full resolution, `stored` the shape
  (y, x) that it has in the file, which is smaller in a pyramid."""

  position: int
  pixels: int
  compression: int
  at: dict[str, tuple[int, int]]
  stored: tuple[int, int]

  @property
  def factor(self) -> int:
    """How much coarser than full resolution it is."""
    return max(1, round(self.at['X'][1] / max(1, self.stored[1])))

  def start(self, axis: str) -> int:
    return self.at.get(axis, (0, 1))[0]

  def end(self, axis: str) -> int:
    return sum(self.at.get(axis, (0, 1)))


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the images of a file, arranged as a TIFF's (see readers.tiff); several scenes are parts 's00', 's01' ...

  Tiles of a mosaic are laid where they lie, later ones over earlier ones; what no tile covers is 0. A pyramid may be
  cut into tiles of tissue, see `options.slides`; else its levels are left out. Pixels are raw, zstd, JPEG or JPEG XR.

  Raises:
    ValueError: damaged, several files, another compression, or dimensions beside time, channel and space (rotations,
      illuminations, phases, views) with more than one value.
  """
  yield from _read(path, options, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  yield from _read(path, options, False)


def _read(path: str | os.PathLike, options: Options, pixels: bool) -> Iterator[Record]:
  with open(path, 'rb') as f:
    blocks, told = _index(f)
    scenes = sorted({b.start('S') for b in blocks})
    record: Record
    for scene in scenes:
      own = [b for b in blocks if b.start('S') == scene]
      record = {'subject': stem(path), 'source': 'czi', 'part': f's{scene:02d}' if len(scenes) > 1 else '',
                'spacing': _spacing(told), 'meta': {'orientation': 'native'}}
      if _is_slide(own, options):
        yield from _tiles(f, own, told, record, options, pixels)
        continue
      volumes, axes, colour = _volumes(f, [b for b in own if b.factor == 1], pixels)
      record['channels'] = ['R', 'G', 'B'] if colour and volumes.shape[-1] == 3 else _names(told, volumes.shape[-1])
      yield from records(volumes, axes, record, options)


def _is_slide(blocks: list[Block], options: Options) -> bool:
  side = lambda a: max(b.end(a) for b in blocks) - min(b.start(a) for b in blocks)
  return options.slides == 'tiles' or (any(b.factor > 1 for b in blocks) and side('Y') * side('X') > slide.LARGE)


def _tiles(f: BinaryIO, blocks: list[Block], told, record: Record, options: Options, pixels: bool) -> Iterator[Record]:
  """The tiles of a scene; its part goes before theirs."""
  spacing = record['spacing']
  if spacing is None:
    raise ValueError('does not say how large its pixels are: no tiles of a stated resolution can be cut')
  if any(len({b.start(a) for b in blocks}) > 1 for a in 'ZT'):
    raise ValueError('has several planes or times: it is not cut into tiles')
  kinds = {b.pixels for b in blocks}
  if len(kinds) > 1 or not kinds <= set(_PIXELS):
    raise ValueError('its pixels are of several types, or of one that is not read')
  count = len({b.start('C') for b in blocks})
  names = ('R', 'G', 'B') if _PIXELS[blocks[0].pixels][1] > 1 and count == 1 else tuple(_names(told, count))
  levels = tuple(_level(f, blocks, factor) for factor in sorted({b.factor for b in blocks}))
  whole = slide.Slide(levels, (spacing[1] * 1e3, spacing[2] * 1e3), names)
  for tile in slide.tiles(whole, record, options, pixels):
    yield tile | {'part': record['part'] + tile['part']}


def _level(f: BinaryIO, blocks: list[Block], factor: int) -> slide.Level:
  own = sorted((b for b in blocks if b.factor == factor), key=lambda b: b.start(_MOSAIC))
  low = {a: min(b.start(a) for b in blocks) for a in 'YXC'}
  shape = [max(1, (max(b.end(a) for b in blocks) - low[a]) // factor) for a in 'YX']
  dtype, samples = np.dtype(_PIXELS[own[0].pixels][0]), min(3, _PIXELS[own[0].pixels][1])
  count = max(b.end('C') for b in blocks) - low['C']
  largest = max(b.stored[0] * b.stored[1] for b in own) * dtype.itemsize * samples
  decoded = functools.lru_cache(max(4, _CACHE // max(1, largest)))(lambda i: _decode(f, own[i]))

  def read_box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    check_size((y1 - y0, x1 - x0, count * samples), dtype)
    # What no block covers was not scanned: white in colour, dark in fluorescence.
    out = np.full((y1 - y0, x1 - x0, count * samples), 255 if samples == 3 and dtype.itemsize == 1 else 0, dtype)
    for i, block in enumerate(own):
      y, x = (round((block.start(a) - low[a]) / factor) for a in 'YX')
      top, bottom, left, right = max(y, y0), min(y + block.stored[0], y1), max(x, x0), min(x + block.stored[1], x1)
      if top < bottom and left < right:
        part = decoded(i)[top - y : bottom - y, left - x : right - x]
        part = part[..., 2::-1] if samples == 3 else part
        c = (block.start('C') - low['C']) * samples
        out[top - y0 : bottom - y0, left - x0 : right - x0, c : c + samples] = part
    return out
  return slide.Level((shape[0], shape[1]), read_box)


def _index(f: BinaryIO) -> tuple[list[Block], ElementTree.Element | None]:
  """All blocks, and the metadata."""
  head = _segment(f, 0, 'ZISRAWFILE', 80)
  part, directory, metadata = struct.unpack('<Iqq', head[48:68])
  if part:
    raise ValueError('is one of several files: only whole files are read')
  content = _segment(f, directory, 'ZISRAWDIRECTORY')
  (count,) = struct.unpack_from('<I', content)
  blocks, at = [], 128
  for _ in range(count):
    block, at = _entry(content, at)
    blocks.append(block)
  if not any(b.factor == 1 for b in blocks):
    raise ValueError('holds no image')
  for name in sorted({n for b in blocks for n in b.at} - set(_READ)):
    if len(values := {b.at.get(name, (0, 1)) for b in blocks}) > 1 or max(size for _, size in values) > 1:
      raise ValueError(f'has several values of its dimension {name}: only time, channel and space are read')
  if not metadata:
    return blocks, None
  xml = _segment(f, metadata, 'ZISRAWMETADATA')
  (size,) = struct.unpack_from('<I', xml)
  return blocks, ElementTree.fromstring(xml[256 : 256 + size])


def _segment(f: BinaryIO, position: int, name: str, least: int = 128) -> bytes:
  """The content of the segment of that name at a place in the file."""
  end = f.seek(0, os.SEEK_END)
  if not 0 <= position <= end - _SEGMENT:
    raise ValueError(f'its {name} lies outside the file')
  f.seek(position)
  found, allocated, used = struct.unpack('<16sqq', f.read(_SEGMENT))
  size = used or allocated
  if found.rstrip(b'\0') != name.encode() or not least <= size <= end - position - _SEGMENT:
    raise ValueError(f'its {name} is damaged or truncated')
  return f.read(size)


def _entry(content: bytes, at: int) -> tuple[Block, int]:
  """The entry of a directory at a place in it, and the place behind it."""
  schema, pixels, position, part, compression, _, count = _ENTRY.unpack_from(content, at)
  if schema != b'DV' or part or count > 16:
    raise ValueError('its directory is damaged, or its pixels lie in other files')
  at += _ENTRY.size
  sizes, kept = {}, {}
  for _ in range(count):
    name, start, size, _, stored = _DIMENSION.unpack_from(content, at)
    axis = name.rstrip(b'\0').decode('ascii')
    sizes[axis], kept[axis] = (start, size), stored or size
    at += _DIMENSION.size
  if not {'X', 'Y'} <= set(sizes):
    raise ValueError('a piece of it does not say where it lies')
  return Block(position, pixels, compression, sizes, (kept['Y'], kept['X'])), at


def _volumes(f: BinaryIO, blocks: list[Block], pixels: bool) -> tuple[np.ndarray, str, bool]:
  """(array [T, D, H, W, C] of one scene's blocks, its axes, whether it is in colour)."""
  kinds = {b.pixels for b in blocks}
  if not kinds <= set(_PIXELS):
    raise ValueError(f'pixels of type {sorted(kinds - set(_PIXELS))[0]} are not read')
  types = [np.dtype(_PIXELS[k][0]) for k in kinds]
  samples = {min(3, _PIXELS[k][1]) for k in kinds}
  if len(samples) > 1:
    raise ValueError('some channels are in colour and some are not')
  depth = samples.pop()
  low = {a: min(b.start(a) for b in blocks) for a in 'TZYXC'}
  size = {a: max(b.end(a) for b in blocks) - low[a] for a in 'TZYXC'}
  shape = (*(size[a] for a in 'TZYX'), size['C'] * depth)
  dtype = np.result_type(*types)
  check_size(shape, dtype)
  axes = ''.join(a for a in 'TZ' if size[a] > 1)
  if not pixels:
    return stand_in(*shape), axes, depth == 3
  out = np.zeros(shape, dtype)
  for block in sorted(blocks, key=lambda b: b.start(_MOSAIC)):
    t, z, y, x, c = (slice(block.start(a) - low[a], block.end(a) - low[a]) for a in 'TZYXC')
    image = _decode(f, block)  # [H, W, samples]
    out[t, z, y, x, c.start * depth : c.stop * depth] = image[..., 2::-1] if depth == 3 else image
  return out, axes, depth == 3


def _decode(f: BinaryIO, block: Block) -> np.ndarray:
  """[H, W, samples] of a block, as stored.

  Raises:
    ValueError: damaged, or of another compression. imagecodecs raises its own errors.
  """
  import imagecodecs

  content = _segment(f, block.position, 'ZISRAWSUBBLOCK', 16)
  metadata, _, size = struct.unpack_from('<IIq', content)
  (count,) = struct.unpack_from('<I', content, 16 + _ENTRY.size - 4)
  begin = max(256, 16 + _ENTRY.size + count * _DIMENSION.size) + metadata
  data = content[begin : begin + size]
  kind, samples = _PIXELS[block.pixels]
  dtype = np.dtype(kind)
  shape = (*block.stored, samples)
  check_size(shape, dtype)
  expected = int(np.prod(shape)) * dtype.itemsize
  if block.compression in (_JPEG, _JPEG_XR):
    image = (imagecodecs.jpeg_decode if block.compression == _JPEG else imagecodecs.jpegxr_decode)(data)
    image = image.reshape(shape)
    return image[..., ::-1] if samples == 3 else image  # these codecs give R, G, B
  if block.compression == _RAW:
    raw: bytes | bytearray = data
  elif block.compression == _ZSTD0:
    raw = imagecodecs.zstd_decode(data, out=expected)
  elif block.compression == _ZSTD1:
    raw = _zstd1(data, expected, dtype.itemsize)
  else:
    raise ValueError(f'compression {block.compression} is not read')
  if len(raw) != expected:
    raise ValueError(f'a piece of it is truncated: {len(raw)} of {expected} bytes')
  return np.frombuffer(raw, dtype).reshape(shape)


def _zstd1(data: bytes, expected: int, itemsize: int) -> bytes:
  """zstd behind a header: its size (1 or 3), and in the latter case chunk 1 with a flag: low bytes before high ones."""
  import imagecodecs

  if data[:1] not in (b'\x01', b'\x03') or (data[0] == 3 and data[1] != 1):
    raise ValueError('the header of a zstd block is damaged')
  raw = imagecodecs.zstd_decode(data[data[0] :], out=expected)
  if data[0] == 3 and data[2] & 1 and itemsize == 2:
    return np.frombuffer(raw, np.uint8).reshape(2, -1).T.tobytes()
  return bytes(raw)


def _spacing(told: ElementTree.Element | None) -> list[float | None] | None:
  """mm along z, y, x (z None where unknown)."""
  metres = {e.get('Id'): number(e.findtext('Value'), f'Distance {e.get("Id")}') for e in _all(told, 'Distance')}
  zyx = [metres.get(a, 0.0) * 1e3 or None for a in 'ZYX']
  return zyx if zyx[1] and zyx[2] else None


def _names(told: ElementTree.Element | None, count: int) -> list[str]:
  found = next(iter(_all(told, 'Dimensions')), None)
  names = [e.get('Name') or '' for e in _all(found, 'Channel')]
  return names if len(names) == count == len(set(names)) and all(names) else numbered(count)


def _all(told: Any, tag: str) -> list[ElementTree.Element]:
  return [] if told is None else list(told.iter(tag))
