"""Signals of PhysioNet: a header .hea and the samples beside it, in format 16 or 212.

WFDB Applications Guide, header(5) and signal(5).
"""

import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from jaxmed.data.readers.types import check_size

_GAIN = re.compile(r'^([-+.\deE]+)?(?:\(([-+]?\d+)\))?(?:/(\S+))?$')
_DEFAULT_GAIN = 200.0  # where the header says none, or 0


class Channel(NamedTuple):
  """A line of a header: physical units are (sample - baseline) / gain. checksum: None where there is none."""

  file: str
  form: str
  gain: float
  baseline: float
  checksum: int | None
  name: str


def header(path: str | os.PathLike) -> tuple[list[Channel], int, float]:
  """Channels, the number of samples of each, and their rate in Hz.

  Raises:
    ValueError: no header of one segment and one file in a format that is read.
  """
  lines = [line for line in pathlib.Path(path).read_text(encoding='utf-8', errors='replace').splitlines()
           if line.strip() and not line.startswith('#')]
  words = lines[0].split() if lines else []
  if len(words) < 4 or '/' in words[0]:
    raise ValueError('is no WFDB header of one segment with a number of samples')
  try:
    count, rate, samples = int(words[1]), float(re.split(r'[/(]', words[2])[0]), int(words[3])
  except ValueError as e:
    raise ValueError(f'is no WFDB header: its first line is {lines[0]!r}') from e
  if not 0 < count < len(lines) or samples < 1 or not rate > 0:
    raise ValueError(f'is no WFDB header: it tells of {count} channels, {samples} samples and {rate:g} Hz')
  channels = [_channel(line) for line in lines[1:count + 1]]
  if len({(c.file, c.form) for c in channels}) > 1 or channels[0].form not in ('16', '212'):
    raise ValueError(f'has samples in {", ".join(sorted({f"{c.file} (format {c.form})" for c in channels}))}: expected '
                     'one file of format 16 or 212')
  return channels, samples, rate


def read(path: str | os.PathLike) -> tuple[np.ndarray, float, list[str]]:
  """A signal [T, C] float32 in physical units, its rate in Hz, and the names of its channels.

  Raises:
    ValueError: damaged, or of another size or checksum than the header tells of; a value that is none.
  """
  path = pathlib.Path(path)
  channels, samples, rate = header(path)
  check_size((samples, len(channels)), np.dtype(np.float32))
  data = (path.parent / pathlib.PurePath(channels[0].file).name).read_bytes()
  total = samples * len(channels)
  stored, absent = _of_16(data, total) if channels[0].form == '16' else _of_212(data, total)
  stored = stored.reshape(samples, len(channels))
  for k, c in enumerate(channels):
    if c.checksum is not None and (int(stored[:, k].sum()) - c.checksum) % 65536:
      raise ValueError(f'channel {c.name} has another checksum than the header says')
  if (stored == absent).any():
    raise ValueError('has samples that are marked as missing')
  gain, baseline = (np.array([getattr(c, k) for c in channels]) for k in ('gain', 'baseline'))
  return ((stored - baseline) / gain).astype(np.float32), rate, [c.name for c in channels]


def _channel(line: str) -> Channel:
  words = line.split(maxsplit=8)
  if len(words) < 2:
    raise ValueError(f'is no WFDB header: a line of a channel is {line!r}')
  match = _GAIN.match(words[2]) if len(words) > 2 else None
  try:
    gain = float(match[1]) if match and match[1] else 0.0
    zero = int(words[4]) if len(words) > 4 else 0
    checksum = int(words[6]) if len(words) > 6 else None
  except ValueError as e:
    raise ValueError(f'is no WFDB header: a line of a channel is {line!r}') from e
  baseline = float(match[2]) if match and match[2] else float(zero)
  return Channel(words[0], words[1], gain or _DEFAULT_GAIN, baseline, checksum, words[8] if len(words) > 8 else '')


def _of_16(data: bytes, total: int) -> tuple[np.ndarray, int]:
  """Samples of 16 bits, and the value of one that is missing."""
  if len(data) != 2 * total:
    raise ValueError(f'holds {len(data)} bytes of samples: its header tells of {2 * total}')
  return np.frombuffer(data, '<i2').astype(np.int64), -(1 << 15)


def _of_212(data: bytes, total: int) -> tuple[np.ndarray, int]:
  """Two samples of 12 bits in three bytes: low bits of the first, high bits of both, low bits of the other."""
  size = 3 * (total // 2) + 2 * (total % 2)
  if not size <= len(data) <= size + 1:
    raise ValueError(f'holds {len(data)} bytes of samples: its header tells of {size}')
  bytes_ = np.frombuffer(data[:size] + b'\0' * (-size % 3), np.uint8).astype(np.int64).reshape(-1, 3)
  first, second = bytes_[:, 0] | (bytes_[:, 1] & 15) << 8, bytes_[:, 2] | (bytes_[:, 1] >> 4) << 8
  values = np.stack([first, second], axis=1).reshape(-1)[:total]
  return values - ((values >> 11) << 12), -(1 << 11)
