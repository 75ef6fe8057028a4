"""PBM, PGM, PPM and PFM by their specification (netpbm.sourceforge.net), with the values that they store."""

import dataclasses
import re
from typing import BinaryIO

import numpy as np

from jaxmed.data.readers.types import check_size

_GAP, _NUMBER = rb'(?:\s|#[^\r\n]*[\r\n])+', rb'(-?[\d.eE+-]+)'


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file begins with: its kind ('1' to '6' of P1 to P6, 'f' and 'F' of PFM), the largest value (of PFM: 1 or -1,
  which tells the order of the bytes), and where the pixels begin."""

  kind: str
  width: int
  height: int
  top: float
  start: int

  @property
  def samples(self) -> int:
    """Values of a pixel."""
    return 3 if self.kind in '36F' else 1


def header(f: BinaryIO) -> Header | None:
  """The header of an open file, None of another format.

  Raises:
    ValueError: it is damaged, or the image too large.
  """
  head = f.read(1 << 12)
  if not re.match(rb'P[1-6Ff]\s', head):
    return None
  kind = head[1:2].decode()
  found = re.match(rb'P.' + (_GAP + _NUMBER) * (2 if kind in '14' else 3) + rb'\s', head)
  try:
    width, height, top = [float(n) for n in found.groups()] + [1.0] * (kind in '14') if found else (0, 0, 0)
  except ValueError:
    width = height = top = 0.0
  holds = width >= 1 and height >= 1 and width == int(width) and height == int(height) and top != 0
  if found is None or not holds or (kind in '2356' and not (1 <= top < 65536 and top == int(top))):
    raise ValueError(f'header of P{kind} is {head[:24]!r}: expected width, height and the largest value')
  check_size((int(height), int(width), 3), np.dtype(np.float32))
  return Header(kind, int(width), int(height), top, found.end())


def decode(f: BinaryIO, told: Header) -> np.ndarray:
  """[H, W, C] as stored: uint8 or uint16, of PFM float32; bits become 0 and 255, which is white.

  Raises:
    ValueError: truncated, several images, or values beyond the largest one.
  """
  f.seek(told.start)
  data = f.read()
  count = told.width * told.height * told.samples
  values, rest = _text(data, told, count) if told.kind in '123' else _binary(data, told, count)
  if values.size != count or rest:
    found = f'{values.size} of {count}' if values.size != count else f'more than the {count}'
    raise ValueError(f'holds {found} values that its header tells of')
  image = values.reshape(told.height, told.width, told.samples)
  if told.kind in 'Ff':
    return np.ascontiguousarray(image[::-1], np.float32)  # rows from the bottom
  if told.kind in '14':
    return np.where(image > 0, np.uint8(0), np.uint8(255))
  if image.min() < 0 or image.max() > told.top:
    raise ValueError(f'holds values {image.min()} to {image.max()}: its header tells of 0 to {told.top:g}')
  return image.astype(np.uint16 if told.top > 255 else np.uint8)


def _text(data: bytes, told: Header, count: int) -> tuple[np.ndarray, bytes]:
  """The values of a plain file, and what follows them."""
  text = re.sub(rb'#[^\r\n]*', b'', data)
  words = re.findall(rb'[01]', text) if told.kind == '1' else text.split()
  return np.array([int(w) for w in words[:count]], np.int64), b' '.join(words[count:])


def _binary(data: bytes, told: Header, count: int) -> tuple[np.ndarray, bytes]:
  """The values of a raw file (few where it is cut), and what follows them."""
  dtype = np.dtype(('<f4' if told.top < 0 else '>f4') if told.kind in 'Ff' else '>u2' if told.top > 255 else 'u1')
  length = told.height * -(-told.width // 8) if told.kind == '4' else count * dtype.itemsize
  rest = data[length:].strip()
  if told.kind != '4':
    return np.frombuffer(data[: min(length, len(data) // dtype.itemsize * dtype.itemsize)], dtype), rest
  rows = np.frombuffer(data[:length], np.uint8)
  if len(rows) < length:
    return rows[:0], rest
  return np.unpackbits(rows.reshape(told.height, -1), axis=1)[:, : told.width], rest
