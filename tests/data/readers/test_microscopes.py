"""CZI as ZEISS's own library writes it, and ND2 as far as it can be written here."""

import io
import struct

import imagecodecs
import numpy as np
import pytest

from jaxmed.data import readers
from jaxmed.data.readers import czi, shaping, slide
from tests.data.readers import czis, nd2s

WHOLE = readers.Options(volumes='whole')


def pixels(shape, dtype, t=0, z=0):
  """What czis.py says lies in a plane: [H, W, C]."""
  height, width, count = shape
  y, x, c = np.mgrid[:height, :width, :count]
  return (((y * width + x) * 7 + 1000 * t + 300 * c + 50 * z) % (60000 if dtype == np.uint16 else 251)).astype(dtype)


@pytest.fixture
def sample(tmp_path):
  def write(name):
    path = tmp_path / f'{name}.czi'
    path.write_bytes(czis.unpack(name))
    return path

  return write


def test_czi_times_channels_and_planes(sample):
  found = list(readers.read(sample('tczyx'), WHOLE))
  assert [r['part'] for r in found] == ['t000', 't001']
  for t, record in enumerate(found):
    assert record['image'].shape == (3, 10, 12, 2)
    assert record['image'].dtype == np.uint16
    for z in range(3):
      assert np.array_equal(record['image'][z], pixels((10, 12, 2), np.uint16, t, z))
    assert record['channels'] == ['DAPI', 'actin']
    assert record['spacing'] == pytest.approx([2e-3, 0.5e-3, 0.25e-3])
    assert record['source'] == 'czi'
  planes = list(readers.read(sample('tczyx')))
  assert len(planes) == len(list(readers.outline(sample('tczyx')))) * 3 == 6
  assert planes[4]['part'] == 't001z001'


def test_czi_colour_mosaic_and_zstd(sample):
  [record] = readers.read(sample('rgb'))
  blue = pixels((10, 12, 1), np.uint8)
  assert np.array_equal(record['image'], np.concatenate([blue // 3, blue // 2, blue], -1))
  assert record['channels'] == ['R', 'G', 'B']
  assert record['spacing'] == pytest.approx([1e-3, 1e-3])
  [record] = readers.read(sample('mosaic'))
  assert np.array_equal(record['image'], pixels((10, 12, 2), np.uint16))
  assert record['channels'] == ['a', 'b']
  assert record['spacing'] is None
  [record] = readers.read(sample('zstd'), WHOLE)
  assert np.array_equal(record['image'], np.stack([pixels((10, 12, 1), np.uint16, z=z) for z in (0, 1)]))
  for name in ('rgb', 'mosaic', 'zstd'):
    assert len(list(readers.outline(sample(name), WHOLE))) == 1


@pytest.mark.parametrize('compression, encode, kind', [
  (4, lambda a: imagecodecs.jpegxr_encode(a, level=1.0), 1), (4, lambda a: imagecodecs.jpegxr_encode(a, level=1.0), 3),
  (1, lambda a: imagecodecs.jpeg_encode(a, level=100), 3), (5, lambda a: imagecodecs.zstd_encode(a.tobytes()), 1),
])
def test_czi_codecs(compression, encode, kind):
  """A block put together here: the library writes neither JPEG nor JPEG XR."""
  dtype, samples = np.dtype(czi._PIXELS[kind][0]), czi._PIXELS[kind][1]
  y, x, c = np.mgrid[:16, :24, :samples]
  image = (y * 9 + x * 2 + c * 30).astype(dtype)
  data = encode(image.squeeze())
  entry = struct.pack('<2sIqIIB5xI', b'DV', kind, 0, 0, compression, 0, 0)
  content = (struct.pack('<IIq', 0, 0, len(data)) + entry).ljust(256, b'\0') + data
  file = io.BytesIO(struct.pack('<16sqq', b'ZISRAWSUBBLOCK', len(content), len(content)) + content)
  found = czi._decode(file, czi.Block(0, kind, compression, {'Y': (0, 16), 'X': (0, 24)}, (16, 24)))
  found = found[..., ::-1] if samples == 3 else found  # stored as B, G, R
  assert np.abs(found.astype(int) - image).max() <= (3 if compression == 1 else 0)


@pytest.mark.parametrize('kind', [3, 1])
def test_czi_slide_gives_tiles_of_tissue(tmp_path, monkeypatch, kind):
  """A mosaic of 4 x 5 blocks at negative places, with a level of half the size; tissue is one corner."""
  rng = np.random.default_rng(0)
  samples = czi._PIXELS[kind][1]
  full = np.full((256, 320, 3), 245, np.uint8) if samples == 3 else np.zeros((256, 320, 1), np.uint16)
  full[64:192, 128:256] = rng.integers(0, 200, (128, 128, 3)) // [1, 4, 2] if samples == 3 else rng.integers(500, 60000, (128, 128, 1))
  blocks = []
  for factor in (1, 2):
    level = full[::factor, ::factor]
    for y in range(0, 256, 64 * factor):
      for x in range(0, 320, 64 * factor):
        part = level[y // factor :, x // factor :][:64, :64]
        at = {'X': (x - 500, part.shape[1] * factor, part.shape[1]), 'Y': (y - 70, part.shape[0] * factor, part.shape[0]),
              'C': (0, 1, 1), 'M': (len(blocks), 1, 1)}
        blocks.append((part[..., ::-1] if samples == 3 else part, at))
  path = czis.write(tmp_path / 'a.czi', blocks, kind, 0.5)
  [image] = readers.read(path)
  assert np.array_equal(image['image'], full)
  options = readers.Options(slides='tiles', tile=64, mpp=0.5)
  found = list(readers.read(path, options))
  assert [t['meta']['tile_xy'] for t in found] == [[128, 64], [192, 64], [128, 128], [192, 128]]
  for tile in found:
    x, y = tile['meta']['tile_xy']
    assert np.array_equal(tile['image'], full[y : y + 64, x : x + 64])
    assert tile['spacing'] == pytest.approx([0.5e-3] * 2)
  assert len(list(readers.outline(path, options))) == 4
  coarse = readers.read(path, readers.Options(slides='tiles', tile=32, mpp=1.0))
  half = next(t for t in coarse if t['meta']['tile_xy'] == [128, 64])
  assert np.array_equal(half['image'], full[64:128:2, 128:192:2])  # from the level of half the size
  monkeypatch.setattr(slide, 'LARGE', 1000)
  assert len(list(readers.read(path, readers.Options(tile=64)))) == 4


def test_damaged_czi_is_refused(sample):
  path = sample('tczyx')
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for size in (20, 100, 600, 5000, len(whole) - 200):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError):
      list(readers.read(path))
  directory = struct.unpack('<q', whole[32 + 52 : 32 + 60])[0]
  huge = bytearray(whole)
  at = whole.index(b'X\0\0\0', directory)
  huge[at + 8 : at + 12] = struct.pack('<I', 2**31 - 1)
  huge[at + 16 : at + 20] = struct.pack('<I', 2**31 - 1)
  path.write_bytes(huge)
  with pytest.raises(ValueError, match='GiB of pixels'):
    list(readers.read(path))
  for _ in range(150):  # anything but a crash, a hang or much memory
    broken = bytearray(whole)
    for place in rng.integers(0, len(whole), 5):
      broken[place] = rng.integers(256)
    path.write_bytes(broken)
    try:
      list(readers.read(path))
    except Exception as e:
      assert not isinstance(e, (MemoryError, KeyError, IndexError)), repr(e)


def test_nd2_channels_planes_and_colour(tmp_path):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 60000, (4, 10, 12, 2)).astype(np.uint16)
  path = nd2s.write(tmp_path / 'a.nd2', frames, ['DAPI', 'actin'], 0.25, 1.5)
  [record] = readers.read(path, WHOLE)
  assert np.array_equal(record['image'], frames)
  assert record['channels'] == ['DAPI', 'actin']
  assert record['spacing'] == pytest.approx([1.5e-3, 0.25e-3, 0.25e-3])
  planes = list(readers.read(path))
  assert [p['part'] for p in planes] == ['z000', 'z001', 'z002', 'z003']
  assert sum(shaping.count(r, readers.DEFAULT) for r in readers.outline(path)) == 4
  [record] = readers.read(nd2s.write(tmp_path / 'b.nd2', frames[:1], ['DAPI', 'actin'], 0.5))
  assert np.array_equal(record['image'], frames[0])
  assert record['spacing'] == pytest.approx([0.5e-3, 0.5e-3])
  colour = rng.integers(0, 255, (1, 8, 9, 3)).astype(np.uint8)
  [record] = readers.read(nd2s.write(tmp_path / 'c.nd2', colour, ['Brightfield'], 0.5, colour=True))
  assert record['channels'] == ['R', 'G', 'B']
  assert np.array_equal(record['image'], colour[0])


def test_damaged_nd2_is_refused(tmp_path):
  frames = np.random.default_rng(0).integers(0, 60000, (4, 10, 12, 2)).astype(np.uint16)
  path = nd2s.write(tmp_path / 'a.nd2', frames, ['a', 'b'], 0.25, 1.5, lost=2)
  with pytest.raises(ValueError, match='lacks frame 2'):
    list(readers.read(path))
  whole = path.read_bytes()
  for size in (10, 5000, len(whole) - 9):
    path.write_bytes(whole[:size])
    with pytest.raises(Exception) as e:
      list(readers.read(path))
    assert str(e.value)
