"""Videos by PyAV: a frame every so many seconds."""

import os
from collections.abc import Iterator

import numpy as np

from jaxmed.data.readers.types import DEFAULT, Options, Record, check_size, numbered, stand_in, stem
from jaxmed.errors import need

# What FFmpeg is allowed to see in a file: left to guess, it would take a text for a playlist and open what that names.
_FORMATS = {'.mp4': 'mov', '.mov': 'mov', '.avi': 'avi', '.mkv': 'matroska', '.webm': 'matroska'}
_SLACK = 1.0  # seconds that a stream may end before the length that it declares


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the first frame at or after 0, `every`, 2 `every` ... seconds as [H, W, C] (parts 't000' ...),
  or all of them as one clip [T, H, W, C] ('whole').

  C is 3 (R, G, B, uint8), or 1 where the video is gray (uint8 or uint16). Frames are turned as the file says. The time
  of a frame since the first is meta's `frame_seconds`.

  Raises:
    ValueError: damaged, or cut: it lacks frames that its container counts; of containers that count none, bytes, or
      more than a second of the length that they declare.
    UserError: PyAV is not installed.
  """
  av = need('av', 'video')
  record: Record = {'subject': stem(path), 'source': 'video', 'spacing': None, 'part': ''}
  frames = _frames(av, path, options.every)
  if options.volumes == 'slices':
    for i, (seconds, image) in enumerate(frames):
      yield record | {'image': image, 'channels': _names(image), 'part': f't{i:03d}',
                      'meta': {'orientation': 'native', 'frame_seconds': seconds}}
    return
  kept: list[np.ndarray] = []
  times: list[float] = []
  for seconds, image in frames:
    check_size((len(kept) + 1, *image.shape), image.dtype)
    times.append(seconds)
    kept.append(image)
  step = {'frame_seconds': float(np.median(np.diff(times)))} if len(times) > 1 else {}
  yield record | {'image': np.stack(kept), 'channels': _names(kept[0]), 'meta': {'orientation': 'native'} | step}


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline. Decodes no frame: times come from the packets."""
  av = need('av', 'video')
  try:
    with av.open(os.fspath(path), format=_format(path), options={'protocol_whitelist': 'file'}) as container:
      if not container.streams.video:
        raise ValueError('holds no video')
      stream = container.streams.video[0]
      shape = stream.height, stream.width, 1
      times = sorted(float(p.pts * stream.time_base) for p in container.demux(stream) if p.pts is not None and p.size)
  except av.error.FFmpegError as e:
    raise ValueError(f'FFmpeg: {e.strerror}') from e
  if not times:
    raise ValueError('holds no frame')
  taken, count = 0, 0
  for time in times:
    if time - times[0] >= taken * options.every - 1e-6:
      taken, count = _next(time - times[0], options.every), count + 1
  record: Record = {'channels': numbered(1), 'spacing': None, 'part': ''}
  if options.volumes == 'whole':
    yield record | {'image': stand_in(count, *shape)}
  else:
    yield from (record | {'image': stand_in(*shape)} for _ in range(count))


def _next(seconds: float, every: float) -> int:
  """The number of the frame to take after one at that time."""
  return int((seconds + 1e-6) / every) + 1


def _names(image: np.ndarray) -> list[str]:
  return ['R', 'G', 'B'] if image.shape[-1] == 3 else numbered(1)


def _frames(av, path: str | os.PathLike, every: float) -> Iterator[tuple[float, np.ndarray]]:
  """(seconds since the first frame, [H, W, C]) of the frames that are taken."""
  try:
    with av.open(os.fspath(path), format=_format(path), options={'protocol_whitelist': 'file'}) as container:
      if not container.streams.video:
        raise ValueError('holds no video')
      stream = container.streams.video[0]
      check_size((stream.height, stream.width, 4), np.dtype(np.uint8))
      stream.thread_type = 'AUTO'
      first, last, taken = None, 0.0, 0
      packets: list[tuple[float, float]] = []
      for frame in _decoded(container, stream, packets):
        first = frame.time if first is None else first
        if first is None or frame.time is None:
          raise ValueError('its frames have no times')
        last = frame.time - first
        if last >= taken * every - 1e-6:
          taken = _next(last, every)
          yield last, _pixels(frame)
      if first is None:
        raise ValueError('holds no frame')
      _check_whole(path, container, stream, packets, first)
  except av.error.FFmpegError as e:
    raise ValueError(f'FFmpeg: {e.strerror}') from e


def _decoded(container, stream, packets: list[tuple[float, float]]) -> Iterator:
  """The frames; `packets` gets (start, end) in seconds of what the file holds, decoded or not."""
  for packet in container.demux(stream):
    if packet.dts is not None or packet.pts is not None or packet.size:  # the last packet is empty: it flushes
      start = packet.dts if packet.pts is None else packet.pts
      start, length = (float((t or 0) * packet.time_base) for t in (start, packet.duration))
      packets.append((start, start + length))
    yield from packet.decode()


def _pixels(frame) -> np.ndarray:
  if frame.is_corrupt:
    raise ValueError(f'the frame at {frame.time:.2f} s is damaged')
  gray = len(frame.format.components) == 1 and not frame.format.has_palette
  deep = gray and frame.format.components[0].bits > 8
  image = frame.to_ndarray(format='gray16le' if deep else 'gray' if gray else 'rgb24')
  image = image[..., None] if gray else image
  return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))  # degrees against the clock


def _check_whole(path: str | os.PathLike, container, stream, packets: list[tuple[float, float]], first: float) -> None:
  """Raises a ValueError where the file lacks what its container tells of: frames, else bytes, else seconds."""
  if stream.frames:
    if len(packets) < stream.frames:
      raise ValueError(f'is cut: holds {len(packets)} of {stream.frames} frames')
    return
  with open(path, 'rb') as f:
    end = _matroska_end(f.read(4096))
  if end is not None:
    if end > os.path.getsize(path):
      raise ValueError(f'is cut: holds {os.path.getsize(path)} of {end} bytes')
    return
  declared = float(stream.duration * stream.time_base) if stream.duration else None
  if declared is None and container.duration and not container.streams.audio:
    declared = container.duration / 1e6
  if declared is None:
    return
  last = max(end for _, end in packets)
  held = last if declared > first else last - first  # some containers give the end, some the length
  if held + _SLACK < declared - 1 / float(stream.average_rate or 1):
    raise ValueError(f'is cut: ends after {held:.1f} of {declared:.1f} s')


def _matroska_end(head: bytes) -> int | None:
  """Where the segment of a Matroska file ends (RFC 9559), None for another file and for a stream of unknown length."""
  if not head.startswith(b'\x1a\x45\xdf\xa3'):
    return None
  size, at = _ebml_size(head, 4)
  at += max(0, size)
  if head[at : at + 4] != b'\x18\x53\x80\x67':
    return None
  size, at = _ebml_size(head, at + 4)
  return None if size < 0 else at + size


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
  """A size of EBML (RFC 8794) and the place behind it; -1 where it is unknown."""
  width = 9 - data[at].bit_length() if at < len(data) and data[at] else 9
  value = int.from_bytes(data[at : at + width]) & ((1 << 7 * width) - 1)
  return -1 if width > 8 or value == (1 << 7 * width) - 1 else value, at + width


def _format(path: str | os.PathLike) -> str:
  with open(path, 'rb') as f:
    head = f.read(12)
  if head[4:8] == b'ftyp':
    return 'mov'
  if head.startswith(b'RIFF') and head[8:] == b'AVI ':
    return 'avi'
  if head.startswith(b'\x1a\x45\xdf\xa3'):
    return 'matroska'
  return _FORMATS.get(os.path.splitext(os.fspath(path))[1].lower(), 'mov')
