"""Readers give the pixels, axes, names and spacing that independent code put into the files."""

import io
import struct
import zipfile
import zlib

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxmed.data import readers
from jaxmed.errors import UserError


def one(path, **options):
  found = list(readers.read(path, readers.Options(**options)))
  assert len(found) == 1
  return found[0]


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def png(array: np.ndarray, colour: int) -> bytes:
  """A 16-bit PNG, written from the specification."""
  h, w = array.shape[:2]
  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, colour, 0, 0, 0))
          + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('dtype, channels', [(np.uint8, 1), (np.uint8, 3), (np.uint16, 1)])
def test_png_pixels(tmp_path, rng, dtype, channels):
  pixels = rng.integers(0, np.iinfo(dtype).max, (5, 7, channels), dtype=dtype, endpoint=True)
  Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / 'a.png')
  record = one(tmp_path / 'a.png')
  assert record['image'].dtype == dtype
  assert np.array_equal(record['image'], pixels)
  assert record['channels'] == (['gray'] if channels == 1 else ['R', 'G', 'B'])
  assert record['subject'] == 'a'
  assert record['spacing'] is None


@pytest.mark.parametrize('colour, samples, kept', [(2, 3, 3), (6, 4, 3), (4, 2, 1)])
def test_png_of_16_bit_colour_keeps_its_depth(tmp_path, rng, colour, samples, kept):
  pixels = rng.integers(0, 65536, (4, 6, samples)).astype(np.uint16)
  (tmp_path / 'a.png').write_bytes(png(pixels, colour))
  assert np.array_equal(one(tmp_path / 'a.png')['image'], pixels[..., :kept])


def test_alpha_and_palette_and_orientation(tmp_path, rng):
  rgba = rng.integers(0, 256, (4, 6, 4)).astype(np.uint8)
  Image.fromarray(rgba).save(tmp_path / 'rgba.png')
  assert np.array_equal(one(tmp_path / 'rgba.png')['image'], rgba[..., :3])
  palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode=None).convert('P')
  palette.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
  palette.putdata([0, 1, 1, 0])
  palette.save(tmp_path / 'p.png')
  assert one(tmp_path / 'p.png')['image'][0].tolist() == [[10, 20, 30], [40, 50, 60]]
  exif = Image.Exif()
  exif[0x0112] = 6  # shown after a quarter turn clockwise
  gray = np.arange(64 * 32, dtype=np.uint32).reshape(32, 64).astype(np.uint8)
  Image.fromarray(gray).save(tmp_path / 't.png', exif=exif)
  assert np.array_equal(one(tmp_path / 't.png')['image'][..., 0], np.rot90(gray, -1))


@pytest.mark.parametrize('suffix', ['bmp', 'dib', 'webp', 'gif', 'tga', 'pcx', 'qoi', 'ppm', 'pnm', 'jp2', 'j2k', 'jfif'])
def test_what_pillow_decodes_is_read(tmp_path, rng, suffix):
  colour = rng.integers(0, 256, (8, 9, 3)).astype(np.uint8)
  gray = colour[..., 0]
  how = {'webp': {'lossless': True}, 'jp2': {'irreversible': False}}.get(suffix, {})
  for name, pixels in (('c', colour), ('g', gray))[:1 if suffix in ('gif', 'qoi') else 2]:
    path = tmp_path / f'{name}.{suffix}'
    Image.fromarray(pixels).save(path, **how, **({'format': 'JPEG'} if suffix == 'jfif' else {}))
    record = one(path)
    with Image.open(path) as written:
      expected = np.asarray(written.convert('RGB' if written.mode not in ('L', 'P') or name == 'c' else 'L'))
    assert np.array_equal(record['image'], expected if expected.ndim == 3 else expected[..., None])
    if suffix not in ('gif', 'jfif'):  # of few colours, or with loss
      assert np.array_equal(record['image'].reshape(8, 9, -1)[..., :pixels.shape[-1] if name == 'c' else 1],
                            pixels.reshape(8, 9, -1))
    assert next(readers.outline(path))['image'].shape[:2] == (8, 9)


@pytest.mark.parametrize('kind, top, dtype', [(2, 255, 'u1'), (5, 200, 'u1'), (5, 4095, '>u2'), (6, 65535, '>u2'), (3, 700, '>u2')])
def test_pnm_keeps_the_values_that_it_stores(tmp_path, rng, kind, top, dtype):
  pixels = rng.integers(0, top + 1, (5, 7, 3 if kind in (3, 6) else 1))
  head = f'P{kind} # by hand\n# more\n7 5\n{top}\n'.encode()
  body = pixels.astype(dtype).tobytes() if kind > 3 else ' '.join(map(str, pixels.ravel())).encode() + b'\n'
  (tmp_path / 'a.pnm').write_bytes(head + body)
  record = one(tmp_path / 'a.pnm')
  assert np.array_equal(record['image'], pixels)
  assert record['image'].dtype == (np.uint8 if top < 256 else np.uint16)
  for broken in (head + body[:-2 if kind > 3 else -9], head + body + b'12 12', head.replace(b'7 5', b'7 0') + body):
    (tmp_path / 'a.pnm').write_bytes(broken)
    with pytest.raises(ValueError, match=r'values that its header tells of|header of P\d is'):
      one(tmp_path / 'a.pnm')


def test_bits_floats_deep_jpeg_2000_and_animations(tmp_path, rng):
  bits = rng.random((5, 11)) > 0.5
  Image.fromarray(bits).save(tmp_path / 'a.pbm')
  assert np.array_equal(one(tmp_path / 'a.pbm')['image'][..., 0], bits * np.uint8(255))
  (tmp_path / 'b.pbm').write_bytes(b'P1\n3 2\n010\n1 1 0\n')
  assert one(tmp_path / 'b.pbm')['image'][..., 0].tolist() == [[255, 0, 255], [0, 0, 255]]
  floats = rng.random((4, 5, 3)).astype('<f4')
  (tmp_path / 'a.pfm').write_bytes(b'PF\n5 4\n-1.0\n' + floats[::-1].tobytes())
  assert np.array_equal(one(tmp_path / 'a.pfm')['image'], floats)
  imagecodecs = pytest.importorskip('imagecodecs')
  deep = rng.integers(0, 65536, (16, 20, 3)).astype(np.uint16)
  (tmp_path / 'a.jp2').write_bytes(imagecodecs.jpeg2k_encode(deep, level=0, reversible=True))
  assert np.array_equal(one(tmp_path / 'a.jp2')['image'], deep)
  frames = [Image.fromarray(rng.integers(0, 255, (8, 8)).astype(np.uint8)) for _ in range(3)]
  for suffix in ('gif', 'webp', 'png'):
    frames[0].save(tmp_path / f'a.{suffix}', save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match='animation of 3 frames .*expected one frame'):
      one(tmp_path / f'a.{suffix}')
  (tmp_path / 'x.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
  with pytest.raises(OSError, match='cannot identify'):  # other formats run programs
    one(tmp_path / 'x.png')
  (tmp_path / 'x.heic').write_bytes(b'abc')
  with pytest.raises(ValueError, match=r'no reader for .heic; known: .*\.webp'):
    one(tmp_path / 'x.heic')


def test_content_decides_over_suffix(tmp_path, rng):
  pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
  np.save(tmp_path / 'x.npy', pixels)
  (tmp_path / 'x.npy').rename(tmp_path / 'x.png')
  assert np.array_equal(one(tmp_path / 'x.png')['image'], pixels)


def test_tiff_pages_become_channels(tmp_path, rng):
  pixels = rng.integers(0, 60000, (5, 8, 9)).astype(np.uint16)
  with tifffile.TiffWriter(tmp_path / 'a.tif') as w:
    for page in pixels:
      w.write(page, contiguous=False, compression='zlib')
  record = one(tmp_path / 'a.tif')
  assert np.array_equal(record['image'], np.moveaxis(pixels, 0, -1))
  assert record['channels'] == ['c0', 'c1', 'c2', 'c3', 'c4']


@pytest.mark.parametrize('kind', ['imagej', 'ome'])
def test_tiff_channel_names(tmp_path, rng, kind):
  pixels = rng.integers(0, 60000, (3, 8, 9)).astype(np.uint16)
  names = ['DAPI', 'actin', 'tubulin']
  if kind == 'imagej':
    tifffile.imwrite(tmp_path / 'a.tif', pixels, imagej=True, metadata={'axes': 'CYX', 'Labels': names})
  else:
    tifffile.imwrite(tmp_path / 'a.ome.tif', pixels, metadata={'axes': 'CYX', 'Channel': {'Name': names}})
  record = one(next(tmp_path.iterdir()))
  assert record['channels'] == names
  assert np.array_equal(record['image'], np.moveaxis(pixels, 0, -1))


def ome_set(folder, names, pixels, missing=()):
  """Files of one channel [Z, H, W] each, by the model of OME: every file lists the planes of all."""
  depth, height, width = pixels.shape[1:]
  uuids = [f'urn:uuid:{i}' for i in range(len(names))]
  data = ''.join(f'<TiffData FirstC="{c}" FirstZ="{z}" FirstT="0" IFD="{z}" PlaneCount="1"><UUID FileName="{n}.ome.tif">'
                 f'{uuids[c]}</UUID></TiffData>' for c, n in enumerate(names) for z in range(depth))
  channels = ''.join(f'<Channel ID="Channel:0:{c}" Name="{n}"/>' for c, n in enumerate(names))
  for c, name in enumerate(names):
    told = (f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuids[c]}">'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="{width}" '
            f'SizeY="{height}" SizeZ="{depth}" SizeC="{len(names)}" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">'
            f'{channels}{data}</Pixels></Image></OME>')
    if name not in missing:
      tifffile.imwrite(folder / f'{name}.ome.tif', pixels[c], description=told, metadata=None, photometric='minisblack')


@pytest.mark.parametrize('names', [['DAPI', 'actin'], ['DAPI', 'actin', 'tubulin']])
@pytest.mark.parametrize('gone', [0, 1])
def test_files_of_an_ome_set_are_read_without_the_missing_one(tmp_path, rng, names, gone):
  pixels = rng.integers(0, 60000, (len(names), 2, 8, 9)).astype(np.uint16)
  ome_set(tmp_path, names, pixels, missing=names[gone])
  for c, name in enumerate(names):
    if c == gone:
      continue
    record = one(tmp_path / f'{name}.ome.tif', volumes='whole')
    assert record['channels'] == [name]
    assert np.array_equal(record['image'][..., 0], pixels[c])
    assert record['meta']['notes'] == f'1 of {len(names)} files of its OME set are missing: {names[gone]}.ome.tif'
    assert next(readers.outline(tmp_path / f'{name}.ome.tif'))['image'].shape == record['image'].shape
  ome_set(tmp_path, names, pixels)
  record = one(tmp_path / 'actin.ome.tif', volumes='whole')
  assert record['channels'] == ['actin']
  assert 'notes' not in record['meta']
  (tmp_path / 'actin.ome.tif').rename(tmp_path / 'renamed.ome.tif')  # still known by its UUID
  assert one(tmp_path / 'renamed.ome.tif', volumes='whole')['channels'] == ['actin']


def test_ome_metadata_beside_the_pixels(tmp_path, rng):
  pixels = rng.integers(0, 60000, (2, 2, 8, 9)).astype(np.uint16)
  ome_set(tmp_path, ['a', 'b'], pixels)
  with tifffile.TiffFile(tmp_path / 'a.ome.tif') as tif:
    (tmp_path / 'x.companion.ome').write_text(tif.pages[0].description)
  told = ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
          '<BinaryOnly MetadataFile="x.companion.ome" UUID="urn:uuid:9"/></OME>')
  tifffile.imwrite(tmp_path / 'b.ome.tif', pixels[1], description=told, metadata=None, photometric='minisblack')
  record = one(tmp_path / 'b.ome.tif', volumes='whole')
  assert record['channels'] == ['b']
  assert np.array_equal(record['image'][..., 0], pixels[1])
  (tmp_path / 'x.companion.ome').unlink()
  record = one(tmp_path / 'b.ome.tif')
  assert record['channels'] == ['c0', 'c1']
  assert 'BinaryOnly' in record['meta']['notes']


def test_metadata_that_do_not_hold_are_named(tmp_path):
  pixels = np.ones((8, 9), np.uint16)
  for told, said in (('<OME><Image></OME>', 'ImageDescription holds OME-XML that does not parse .mismatched tag'),
                     ('<OME><Image ID="Image:0"><Pixels ID="P:0" DimensionOrder="XYZCT" Type="uint16" SizeX="9" SizeY="8" '
                      'SizeZ="1" SizeC="1" SizeT="1" PhysicalSizeX="0,5" PhysicalSizeY="0.5"><TiffData/></Pixels></Image>'
                      '</OME>', "PhysicalSizeX is '0,5': expected a number with a decimal point"),
                     ('ImageJ=1.53\nimages=1\nunit=micron\nspacing=0,5\n', "spacing is '0,5'")):
    tifffile.imwrite(tmp_path / 'a.tif', pixels, description=told, metadata=None)
    with pytest.raises(ValueError, match=said):
      one(tmp_path / 'a.tif')


def test_tiff_volume_and_colour_and_inversion(tmp_path, rng):
  pixels = rng.integers(0, 255, (4, 2, 6, 7)).astype(np.uint8)
  tifffile.imwrite(tmp_path / 'v.tif', pixels, imagej=True, metadata={'axes': 'ZCYX'})
  whole = one(tmp_path / 'v.tif', volumes='whole')['image']
  assert np.array_equal(whole, pixels.transpose(0, 2, 3, 1))
  slices = list(readers.read(tmp_path / 'v.tif'))
  assert [s['part'] for s in slices] == ['z000', 'z001', 'z002', 'z003']
  assert np.array_equal(slices[2]['image'], whole[2])
  rgba = rng.integers(0, 255, (6, 7, 4)).astype(np.uint8)
  tifffile.imwrite(tmp_path / 'c.tif', rgba, photometric='rgb', extrasamples=['unassalpha'])
  record = one(tmp_path / 'c.tif')
  assert record['channels'] == ['R', 'G', 'B']
  assert np.array_equal(record['image'], rgba[..., :3])
  tifffile.imwrite(tmp_path / 'w.tif', rgba[..., 0], photometric='miniswhite')
  assert np.array_equal(one(tmp_path / 'w.tif')['image'][..., 0], 255 - rgba[..., 0])


@pytest.mark.parametrize('shape, dtype, how, channels', [
  ((4, 9, 8), np.uint16, {}, 'c0 c1 c2 c3'), ((9, 8, 4), np.uint16, {}, 'c0 c1 c2 c3'),  # as tifffile writes stacks
  ((4, 9, 8), np.uint8, {}, 'c0 c1 c2 c3'), ((9, 8, 4), np.uint8, {}, 'R G B'),
  ((9, 8, 4), np.uint8, {'photometric': 'rgb', 'extrasamples': ['unspecified']}, 'c0 c1 c2 c3'),
  ((9, 8, 4), np.uint16, {'photometric': 'rgb', 'extrasamples': ['assocalpha'], 'metadata': None, 'software': ''}, 'R G B'),
  ((9, 8, 5), np.uint8, {'photometric': 'rgb', 'extrasamples': ['unspecified', 'unassalpha']}, 'c0 c1 c2 c3'),
  ((9, 8, 2), np.uint8, {'photometric': 'minisblack', 'planarconfig': 'contig', 'extrasamples': ['unassalpha']}, 'gray'),
  ((9, 8, 4), np.uint8, {'photometric': 'separated'}, 'C M Y K')])
def test_only_alpha_is_left_out(tmp_path, rng, shape, dtype, how, channels):
  pixels = rng.integers(0, 255, shape).astype(dtype)
  tifffile.imwrite(tmp_path / 'a.tif', pixels, **how)
  record = one(tmp_path / 'a.tif')
  last = np.moveaxis(pixels, 0, -1) if shape[0] == 4 else pixels
  assert record['channels'] == channels.split()
  assert np.array_equal(record['image'], last[..., :len(record['channels'])])
  assert next(readers.outline(tmp_path / 'a.tif'))['image'].shape == record['image'].shape
  if shape[-1] == 4 and 'R' in channels:  # names for all samples say that none is alpha
    assert np.array_equal(one(tmp_path / 'a.tif', channels=tuple('wxyz'))['image'], last)
    assert record['meta']['notes'].startswith('sample 3 left out: alpha')


def test_tiff_palettes_and_bilevel_are_as_pillow_reads_them(tmp_path, rng):
  index = rng.integers(0, 16, (9, 8)).astype(np.uint8)
  colours = rng.integers(0, 256, (3, 256)).astype(np.uint16)
  for name, table in (('a', colours * 257), ('b', colours << 8), ('c', colours)):
    tifffile.imwrite(tmp_path / f'{name}.tif', index, photometric='palette', colormap=table)
    record = one(tmp_path / f'{name}.tif')
    assert record['channels'] == ['R', 'G', 'B']
    assert np.array_equal(record['image'], np.moveaxis(colours[:, index], 0, -1))
    assert record['image'].dtype == np.uint8
  assert np.array_equal(one(tmp_path / 'a.tif')['image'], np.asarray(Image.open(tmp_path / 'a.tif').convert('RGB')))
  [mask] = readers.read_masks(tmp_path / 'a.tif', readers.DEFAULT)
  assert np.array_equal(mask['image'], index)
  bits = rng.random((9, 8)) > 0.5
  for photometric, white in (('miniswhite', 0), ('minisblack', 1)):
    tifffile.imwrite(tmp_path / 'w.tif', bits, photometric=photometric)
    assert np.array_equal(one(tmp_path / 'w.tif')['image'][..., 0], np.where(bits == white, 255, 0))
    assert np.array_equal(one(tmp_path / 'w.tif')['image'][..., 0], np.asarray(Image.open(tmp_path / 'w.tif').convert('L')))
  deep = rng.integers(0, 4096, (8, 8)).astype(np.uint16)
  tifffile.imwrite(tmp_path / 'd.tif', deep, photometric='miniswhite', bitspersample=12)
  assert np.array_equal(one(tmp_path / 'd.tif')['image'][..., 0], 4095 - deep)
  tifffile.imwrite(tmp_path / 's.tif', deep.astype(np.int16), photometric='miniswhite')
  assert np.array_equal(one(tmp_path / 's.tif')['image'][..., 0], -1 - deep.astype(np.int16))


@pytest.mark.parametrize('way', range(1, 9))
def test_tiff_orientation(tmp_path, rng, way):
  pixels = rng.integers(0, 255, (9, 8)).astype(np.uint8)
  tifffile.imwrite(tmp_path / 'a.tif', pixels, extratags=[(274, 'H', 1, way)], resolution=(400, 250),
                   resolutionunit='CENTIMETER')
  record = one(tmp_path / 'a.tif')
  exif = Image.Exif()
  exif[0x0112] = way
  Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
  assert np.array_equal(record['image'], one(tmp_path / 'a.png')['image'])  # turned by Pillow
  assert record['spacing'] == pytest.approx([0.04, 0.025] if way < 5 else [0.025, 0.04])


def test_tiff_ycbcr_is_as_pillow_converts_it(tmp_path, rng):
  pixels = rng.integers(0, 256, (9, 8, 3)).astype(np.uint8)
  for how in ({}, {'planarconfig': 'separate'}):
    shown = np.moveaxis(pixels, -1, 0) if how else pixels
    tifffile.imwrite(tmp_path / 'a.tif', shown, photometric='ycbcr', subsampling=(1, 1), compression='zlib', **how)
    record = one(tmp_path / 'a.tif')
    expected = np.asarray(Image.fromarray(pixels, 'YCbCr').convert('RGB'), int)
    assert np.abs(record['image'] - expected).max() <= 2  # its tables are of whole numbers
    assert record['channels'] == ['R', 'G', 'B']


def tiff(tags: dict[int, tuple[str, tuple]], pixels: bytes) -> bytes:
  """A little-endian TIFF of one strip, written from the specification; values of more than 4 bytes follow the tags."""
  tags = tags | {273: ('I', (0,)), 279: ('I', (len(pixels),))}
  rest, entries, end = b'', b'', 8 + 2 + 12 * len(tags) + 4
  for code, (kind, told) in sorted(tags.items()):
    if code == 273:
      told = (end + 100,)
    data = struct.pack(f'<{len(told)}{kind}', *told)
    data = data.ljust(4, b'\0') if len(data) <= 4 else struct.pack('<I', end + len(rest := rest + data) - len(data))
    entries += struct.pack('<HHI', code, {'H': 3, 'I': 4}[kind], len(told)) + data
  body = struct.pack('<2sHIH', b'II', 42, 8, len(tags)) + entries + bytes(4) + rest
  return body.ljust(end + 100, b'\0') + pixels


def test_tiff_bits_fill_order_and_what_is_refused(tmp_path, rng):
  plain = {256: ('I', (16,)), 257: ('I', (4,)), 258: ('H', (1,)), 259: ('H', (1,)), 262: ('H', (1,)), 277: ('H', (1,)),
           278: ('I', (4,))}
  def read(pixels: bytes, **tags):
    (tmp_path / 'a.tif').write_bytes(tiff(plain | {int(k[1:]): ('H', (v,)) for k, v in tags.items()}, pixels))
    return one(tmp_path / 'a.tif')['image'][..., 0]
  bits = rng.integers(0, 2, (4, 16))
  assert np.array_equal(read(np.packbits(bits, axis=1).tobytes()), 255 * bits)
  assert np.array_equal(read(np.packbits(bits, axis=1, bitorder='little').tobytes(), t266=2), 255 * bits)
  for depth in (2, 4, 12):
    stored = rng.integers(0, 2**depth, (4, 16))
    packed = np.packbits((stored[..., None] >> np.arange(depth)[::-1] & 1).reshape(4, -1), axis=1).tobytes()
    assert np.array_equal(read(packed, t258=depth), stored)
    assert np.array_equal(read(packed, t258=depth, t262=0), 2**depth - 1 - stored)
  for tags, said in (({'t262': 32803}, 'PhotometricInterpretation is 32803 .a colour filter array.: expected gray'),
                     ({'t262': 8}, 'CIELab'), ({'t262': 7}, 'PhotometricInterpretation is 7: expected one of 0, 1'), ({'t262': 32845}, 'LogLuv'), ({'t274': 9}, 'Orientation is 9: expected one of 1, 2'),
                     ({'t262': 3}, 'no ColorMap'), ({'t262': 2}, 'SamplesPerPixel is 1: expected at least 3'),
                     ({'t258': 128, 't339': 1}, 'SampleFormat is 1 of 128 bits: expected')):
    with pytest.raises(ValueError, match=said):
      read(bytes(1024), **{'t258': 8} | tags)
  tifffile.imwrite(tmp_path / 'f.tif', np.ones((4, 4), np.float32), photometric='miniswhite')
  with pytest.raises(ValueError, match='min is white. of floating point'):
    one(tmp_path / 'f.tif')
  with tifffile.TiffWriter(tmp_path / 'w.tif') as w:
    for way in (1, 6):
      w.write(np.ones((4, 5), np.uint8), contiguous=False, extratags=[(274, 'H', 1, way)], metadata=None)
  with pytest.raises(ValueError, match=r'Orientation differs between pages of one image: \[1, 6\]'):
    one(tmp_path / 'w.tif')


def test_tiff_masks_and_smaller_copies_are_left_out(tmp_path, rng):
  pixels = rng.integers(0, 255, (8, 8)).astype(np.uint8)
  for extra in ({'subfiletype': 1}, {'subfiletype': 4}, {'extratags': [(255, 'H', 1, 2)]}, {'photometric': 'mask'}):
    with tifffile.TiffWriter(tmp_path / 'a.tif') as w:
      w.write(pixels, metadata=None)
      w.write(pixels[::2, ::2] > 9, metadata=None, **{'photometric': 'minisblack'} | extra)
    assert np.array_equal(one(tmp_path / 'a.tif')['image'][..., 0], pixels)


def test_arrays(tmp_path, rng):
  def saved(shape, dtype=np.float32, **options):
    array = (rng.random(shape) * 100).astype(dtype)
    np.save(tmp_path / 'a.npy', array)
    return array, list(readers.read(tmp_path / 'a.npy', readers.Options(**options)))
  a, [r] = saved((5, 6), np.uint8)
  assert np.array_equal(r['image'], a[..., None])
  assert r['image'].dtype == np.uint8
  a, [r] = saved((20, 21, 3), np.float64)
  assert r['image'].dtype == np.float32
  assert np.array_equal(r['image'], a.astype(np.float32))
  a, [r] = saved((20, 21, 22), np.int64, volumes='whole')
  assert r['image'].dtype == np.int32
  assert np.array_equal(r['image'], a[..., None])
  a, found = saved((20, 21, 22), '>i2')
  assert len(found) == 20
  assert np.array_equal(found[7]['image'], a[7, ..., None])
  a, found = saved((2, 9, 8, 3))
  assert len(found) == 2
  assert found[1]['image'].shape == (9, 8, 3)
  a, [r] = saved((3, 20, 21), channels=('a', 'b', 'c'))
  assert np.array_equal(r['image'], np.moveaxis(a, 0, -1))
  assert r['channels'] == ['a', 'b', 'c']
  with pytest.raises(ValueError, match='not clear'):
    saved((3, 20, 21))
  a, [r] = saved((4, 4), bool)
  assert np.array_equal(r['image'][..., 0], a * np.uint8(255))


def test_npz(tmp_path, rng):
  image = rng.integers(0, 9, (20, 21, 2)).astype(np.int16)
  np.savez_compressed(tmp_path / 'a.npz', image=image, channels=['x', 'y'], spacing=[0.5, 0.25], other=image)
  record = one(tmp_path / 'a.npz')
  assert np.array_equal(record['image'], image)
  assert record['channels'] == ['x', 'y']
  assert record['spacing'] == [0.5, 0.25]
  for spacing, said in (([np.nan, 1], "spacing is 'nan'"), ([0, 1], 'expected 2 numbers of mm above 0'),
                        ([1, 1, 1], 'expected 2 numbers'), (['0,5', '1'], "spacing is '0,5': expected a number")):
    np.savez(tmp_path / 's.npz', image=image, spacing=spacing)
    with pytest.raises(ValueError, match=said):
      one(tmp_path / 's.npz')
  np.savez(tmp_path / 'b.npz', left=image, right=image)
  with pytest.raises(ValueError, match=r'left.*right'):
    one(tmp_path / 'b.npz')
  np.save(tmp_path / 'p.npy', np.array([{}], object), allow_pickle=True)
  with pytest.raises(ValueError, match=r'[Pp]ickle|object'):
    one(tmp_path / 'p.npy')


def test_nifti_is_turned_to_ras(tmp_path, rng):
  pixels = rng.integers(-500, 2000, (4, 5, 6)).astype(np.int16)  # file axes: [superior, left, posterior]
  affine = np.array([[0, -2.0, 0, 0], [0, 0, -3.0, 0], [1.5, 0, 0, 0], [0, 0, 0, 1]])
  nibabel.save(nibabel.Nifti1Image(pixels, affine), tmp_path / 'sub-1_T1w.nii.gz')
  record = one(tmp_path / 'sub-1_T1w.nii.gz', volumes='whole')
  # [z, y, x]: z is the file's first axis, y its third reversed, x its second reversed.
  expected = pixels.transpose(0, 2, 1)[:, ::-1, ::-1]
  assert record['image'].dtype == np.int16
  assert np.array_equal(record['image'][..., 0], expected)
  assert record['spacing'] == [1.5, 3.0, 2.0]
  assert record['subject'] == 'sub-1_T1w'
  slices = list(readers.read(tmp_path / 'sub-1_T1w.nii.gz'))
  assert len(slices) == 4
  assert np.array_equal(slices[3]['image'][..., 0], expected[3])
  assert slices[3]['spacing'] == [3.0, 2.0]
  assert slices[3]['part'] == 'z003'


def test_nifti_scale_units_and_fourth_axis(tmp_path, rng):
  pixels = rng.integers(0, 100, (4, 5, 6, 2)).astype(np.int16)
  image = nibabel.Nifti1Image(pixels, np.diag([10, 20, 30, 1.0]))
  image.header.set_slope_inter(0.5, -3)
  image.header.set_xyzt_units('micron')
  nibabel.save(image, tmp_path / 'a.nii')
  record = one(tmp_path / 'a.nii', volumes='whole')
  stored = np.asarray(nibabel.load(tmp_path / 'a.nii').dataobj.get_unscaled())
  assert record['image'].dtype == np.float32
  assert record['image'].shape == (6, 5, 4, 2)
  np.testing.assert_allclose(record['image'], (stored * 0.5 - 3).transpose(2, 1, 0, 3), rtol=1e-6)
  np.testing.assert_allclose(record['spacing'], [0.03, 0.02, 0.01], rtol=1e-6)


def damaged(tmp_path, rng) -> dict:
  noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
  Image.fromarray(noise).save(tmp_path / 'cut.png')
  Image.fromarray(noise).save(tmp_path / 'cut.jpg')
  tifffile.imwrite(tmp_path / 'cut.tif', noise, compression='zlib')
  with tifffile.TiffWriter(tmp_path / 'pages.tif') as w:
    for i in range(3):
      w.write(noise[..., i], contiguous=False)
  np.save(tmp_path / 'cut.npy', noise)
  np.savez_compressed(tmp_path / 'cut.npz', noise)
  nibabel.save(nibabel.Nifti1Image(noise.astype(np.int16), np.eye(4)), tmp_path / 'cut.nii.gz')
  nibabel.save(nibabel.Nifti1Image(noise.astype(np.int16), np.eye(4)), tmp_path / 'raw.nii')
  return {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize('fraction', [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_raise(tmp_path, rng, fraction):
  for name, data in damaged(tmp_path, rng).items():
    (tmp_path / name).write_bytes(data[:int(len(data) * fraction)])
    try:
      list(readers.read(tmp_path / name, readers.Options(volumes='whole')))
    except UserError:
      raise
    except Exception:
      continue
    pytest.fail(f'{name} was read although it was cut')


def test_garbage_raises(tmp_path, rng):
  for suffix in readers.SUFFIXES:
    (tmp_path / f'a{suffix}').write_bytes(rng.bytes(5000))
    try:
      found = list(readers.read(tmp_path / f'a{suffix}'))
    except Exception:
      continue
    pytest.fail(f'{suffix}: {len(found)} records from noise')


def test_bombs_are_refused_before_decoding(tmp_path):
  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  for depth, colour in ((8, 2), (16, 2)):
    head = struct.pack('>IIBBBBB', 60000, 60000, depth, colour, 0, 0, 0)
    body = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')
    (tmp_path / 'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + body)
    with pytest.raises(Image.DecompressionBombError):
      one(tmp_path / 'bomb.png')
  header = io.BytesIO()
  fields = {'descr': '<f4', 'fortran_order': False, 'shape': (10**5, 10**6)}
  np.lib.format.write_array_header_1_0(header, fields)
  with zipfile.ZipFile(tmp_path / 'bomb.npz', 'w') as z:
    z.writestr('image.npy', header.getvalue())
  with pytest.raises(ValueError, match='GiB'):
    one(tmp_path / 'bomb.npz')


def test_non_finite_pixels_and_wrong_names(tmp_path):
  pixels = np.ones((8, 8), np.float32)
  for bad in (np.nan, np.inf):
    pixels[2, 3] = bad
    np.save(tmp_path / 'a.npy', pixels)
    with pytest.raises(ValueError, match='1 of 64 pixels'):
      one(tmp_path / 'a.npy')
  np.save(tmp_path / 'c.npy', np.ones((8, 8), complex))
  with pytest.raises(ValueError, match='complex'):
    one(tmp_path / 'c.npy')
  np.save(tmp_path / 'd.npy', np.ones((8, 8)))
  with pytest.raises(ValueError, match='has 1 channels, but 2 names'):
    one(tmp_path / 'd.npy', channels=('T1', 'T2'))
  with pytest.raises(UserError, match='slices'):
    readers.Options(volumes='slice')


def test_hdf5(tmp_path, rng):
  import h5py

  image = rng.integers(0, 9, (20, 21, 2)).astype(np.int16)
  with h5py.File(tmp_path / 'a.h5', 'w') as f:
    f.create_dataset('scan/image', data=image, compression='gzip').attrs['spacing'] = [0.5, 0.25]
    f['channels'] = ['x', 'y']
  record = one(tmp_path / 'a.h5')
  assert np.array_equal(record['image'], image)
  assert record['channels'] == ['x', 'y']
  assert record['spacing'] == [0.5, 0.25]
  with h5py.File(tmp_path / 'two.h5', 'w') as f:
    f['left'] = f['right'] = image
    f['deep'] = image
  with pytest.raises(ValueError, match=r'expected one array'):
    one(tmp_path / 'two.h5')
  with h5py.File(tmp_path / 'link.h5', 'w') as f:
    f['image'] = h5py.ExternalLink(str(tmp_path / 'a.h5'), '/scan/image')
  with pytest.raises(ValueError, match=r'expected one array'):
    one(tmp_path / 'link.h5')
  with h5py.File(tmp_path / 'virtual.h5', 'w') as f:
    layout = h5py.VirtualLayout(shape=image.shape, dtype=image.dtype)
    layout[...] = h5py.VirtualSource(str(tmp_path / 'a.h5'), 'scan/image', shape=image.shape)
    f.create_virtual_dataset('image', layout)
  with pytest.raises(ValueError, match='other files'):
    one(tmp_path / 'virtual.h5')
  with h5py.File(tmp_path / 'bomb.h5', 'w') as f:
    f.create_dataset('image', shape=(10**6, 10**6), dtype='f4', chunks=(64, 64))
  with pytest.raises(ValueError, match='GiB'):
    one(tmp_path / 'bomb.h5')
