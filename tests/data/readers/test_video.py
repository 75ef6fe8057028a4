"""Videos encoded here by PyAV: which frames are taken, their times, colour, turning, and what is refused."""

import struct

import numpy as np
import pytest

from jaxmed.data import readers

av = pytest.importorskip('av')
RATE, FRAMES = 10, 35


def value(i: int) -> np.ndarray:
  """A frame [48, 64, 3] whose brightness tells its number and whose left half is darker."""
  frame = np.full((48, 64, 3), 7 * i, np.uint8)
  frame[:, :32] //= 2
  return frame


def encode(path, codec: str, pix_fmt: str, rate: int = RATE):
  with av.open(str(path), 'w') as out:
    stream = out.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
    for i in range(FRAMES):
      for packet in stream.encode(av.VideoFrame.from_ndarray(value(i), format='rgb24')):
        out.mux(packet)
    for packet in stream.encode():
      out.mux(packet)
  return path


CODECS = [('mkv', 'ffv1', 'bgr0'), ('mp4', 'mpeg4', 'yuv420p'), ('mov', 'mpeg4', 'yuv420p'),
          ('avi', 'mjpeg', 'yuvj420p'), ('webm', 'libvpx-vp9', 'yuv420p')]


@pytest.mark.parametrize('suffix, codec, pix_fmt', CODECS)
def test_a_frame_a_second(tmp_path, suffix, codec, pix_fmt):
  path = encode(tmp_path / f'a.{suffix}', codec, pix_fmt)
  found = list(readers.read(path))
  assert [r['part'] for r in found] == ['t000', 't001', 't002', 't003']
  assert [r['meta']['frame_seconds'] for r in found] == pytest.approx([0, 1, 2, 3])
  for record, i in zip(found, (0, 10, 20, 30)):
    assert record['image'].shape == (48, 64, 3)
    error = np.abs(record['image'].astype(int) - value(i)).max(axis=2)
    assert error[:, 40:].max() <= (0 if codec == 'ffv1' else 8)
  assert found[0]['channels'] == ['R', 'G', 'B']
  [clip] = readers.read(path, readers.Options(volumes='whole', every=0.5))
  assert clip['image'].shape == (7, 48, 64, 3)
  assert clip['meta']['frame_seconds'] == pytest.approx(0.5)


def test_every_frame_and_gray_and_slow_videos(tmp_path):
  path = encode(tmp_path / 'a.mkv', 'ffv1', 'gray')
  found = list(readers.read(path, readers.Options(every=0.01)))
  assert len(found) == FRAMES
  assert found[0]['image'].shape == (48, 64, 1)
  assert found[0]['channels'] == ['gray']
  assert found[30]['image'].mean() > found[10]['image'].mean() + 80
  slow = encode(tmp_path / 'slow.mkv', 'ffv1', 'bgr0', rate=1)
  found = list(readers.read(slow, readers.Options(every=2.5)))
  assert [r['meta']['frame_seconds'] for r in found][:4] == pytest.approx([0, 3, 5, 8])


def test_a_turned_video_is_turned(tmp_path):
  path = encode(tmp_path / 'a.mp4', 'mpeg4', 'yuv420p')
  data = bytearray(path.read_bytes())
  at = data.index(b'tkhd') + 44  # type, version and flags, five times of 4 bytes, 8 reserved, 4 x 2: then the matrix
  assert struct.unpack('>9i', data[at : at + 36])[:5] == (1 << 16, 0, 0, 0, 1 << 16)
  # (x, y) -> (48 - y, x): shown after a quarter turn clockwise, as telephones store upright videos.
  data[at : at + 36] = struct.pack('>9i', 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
  path.write_bytes(data)
  image = list(readers.read(path))[3]['image']
  assert image.shape == (64, 48, 3)
  np.testing.assert_allclose(image.astype(int), np.rot90(value(30), -1), atol=12)


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_a_held_last_frame_and_a_late_first_one_are_no_cut(tmp_path, suffix):
  from fractions import Fraction

  for name, starts, held in (('held', [0, 40, 80, 120, 5000], 5000), ('late', [100_000 + 40 * i for i in range(60)], 40)):
    path = tmp_path / f'{name}.{suffix}'
    with av.open(str(path), 'w') as out:
      stream = out.add_stream('mpeg4', rate=25)
      stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, 'yuv420p', Fraction(1, 1000)
      stream.codec_context.time_base = Fraction(1, 1000)
      packets = []
      for i, start in enumerate(starts):
        frame = av.VideoFrame.from_ndarray(value(i % 30), format='rgb24')
        frame.pts, frame.time_base = start, Fraction(1, 1000)
        packets += stream.encode(frame)
      for packet in packets + stream.encode():
        packet.duration = held if packet.pts == starts[-1] else 40
        out.mux(packet)
    found = list(readers.read(path, readers.Options(every=0.001)))
    assert [r['meta']['frame_seconds'] for r in found] == pytest.approx([(s - starts[0]) / 1e3 for s in starts])
    assert len(list(readers.outline(path, readers.Options(every=0.001)))) == len(starts)
    if suffix == 'mkv':
      path.write_bytes(path.read_bytes()[:-100])
      with pytest.raises(ValueError, match=r'is cut: holds \d+ of \d+ bytes|FFmpeg'):
        list(readers.read(path))


def test_cut_and_disguised_files_are_refused(tmp_path):
  for suffix, codec, pix_fmt in CODECS:
    path = encode(tmp_path / f'a.{suffix}', codec, pix_fmt)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(ValueError):
      list(readers.read(path))
  secret = encode(tmp_path / 'secret.mp4', 'mpeg4', 'yuv420p')
  playlist = f'#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n'
  (tmp_path / 'b.avi').write_text(playlist)
  (tmp_path / 'b.mp4').write_text(playlist)
  for name in ('b.avi', 'b.mp4'):
    with pytest.raises(ValueError, match='FFmpeg'):
      list(readers.read(tmp_path / name))
