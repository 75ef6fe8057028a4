"""TIFF: pixel size, time, several images, big files; slides cut into tiles of tissue at a stated resolution."""

import struct

import numpy as np
import pytest
import tifffile

from jaxmed.data import readers
from jaxmed.data.readers import slide
from jaxmed.data.readers.dicom_headers import load
from jaxmed.data.readers.dicom_slide import open_slide
from tests.data.readers import dicoms

WHOLE = readers.Options(volumes='whole')


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def one(path, options=WHOLE):
  [record] = readers.read(path, options)
  return record


@pytest.mark.parametrize('unit, size', [('µm', 0.25), ('nm', 250.0), ('mm', 0.00025)])
def test_spacing_of_ome_and_names_and_time(tmp_path, rng, unit, size):
  pixels = rng.integers(0, 60000, (3, 4, 2, 8, 9)).astype(np.uint16)
  tifffile.imwrite(tmp_path / 'a.ome.tif', pixels, bigtiff=True, metadata={
    'axes': 'TZCYX', 'PhysicalSizeX': size, 'PhysicalSizeXUnit': unit, 'PhysicalSizeY': 2 * size,
    'PhysicalSizeYUnit': unit, 'PhysicalSizeZ': 4 * size, 'PhysicalSizeZUnit': unit, 'TimeIncrement': 100.0,
    'TimeIncrementUnit': 'ms', 'Channel': {'Name': ['DAPI', 'actin']}})
  found = list(readers.read(tmp_path / 'a.ome.tif', WHOLE))
  assert [r['part'] for r in found] == ['t000', 't001', 't002']
  assert np.array_equal(found[2]['image'], pixels[2].transpose(0, 2, 3, 1))
  assert found[2]['spacing'] == pytest.approx([1e-3, 0.5e-3, 0.25e-3])
  assert found[2]['meta']['frame_seconds'] == pytest.approx(0.2)
  assert found[0]['channels'] == ['DAPI', 'actin']
  assert [r['part'] for r in readers.read(tmp_path / 'a.ome.tif')][:2] == ['t000z000', 't000z001']


def test_spacing_of_imagej_and_of_resolution_tags(tmp_path, rng):
  pixels = rng.integers(0, 255, (5, 8, 9)).astype(np.uint8)
  tifffile.imwrite(tmp_path / 'i.tif', pixels, imagej=True, resolution=(4.0, 2.0),
                   metadata={'axes': 'ZYX', 'unit': 'um', 'spacing': 1.5})
  assert one(tmp_path / 'i.tif')['spacing'] == pytest.approx([1.5e-3, 0.5e-3, 0.25e-3])
  tifffile.imwrite(tmp_path / 't.tif', pixels, imagej=True, metadata={'axes': 'TYX', 'finterval': 0.5})
  clip = one(tmp_path / 't.tif')
  assert clip['image'].shape == (5, 8, 9, 1)
  assert clip['meta']['frame_seconds'] == pytest.approx(0.5)
  parts = list(readers.read(tmp_path / 't.tif'))
  assert [p['part'] for p in parts] == ['t000', 't001', 't002', 't003', 't004']
  assert parts[4]['meta']['frame_seconds'] == pytest.approx(2.0)
  tifffile.imwrite(tmp_path / 'cm.tif', pixels[0], resolution=(20000, 10000), resolutionunit='CENTIMETER')
  assert one(tmp_path / 'cm.tif')['spacing'] == pytest.approx([1e-3, 0.5e-3])
  tifffile.imwrite(tmp_path / 'inch.tif', pixels[0], resolution=(508, 508), resolutionunit='INCH')
  assert one(tmp_path / 'inch.tif')['spacing'] == pytest.approx([0.05, 0.05])
  for dpi in (72, 300):  # for printers
    tifffile.imwrite(tmp_path / 'dpi.tif', pixels[0], resolution=(dpi, dpi), resolutionunit='INCH')
    assert one(tmp_path / 'dpi.tif')['spacing'] is None


def test_several_images_are_parts_and_ome_never_leaves_its_file(tmp_path, rng):
  images = [rng.integers(0, 255, s).astype(np.uint8) for s in ((8, 9), (8, 9), (5, 6))]
  with tifffile.TiffWriter(tmp_path / 'a.ome.tif', ome=True) as w:
    for image in images:
      w.write(image, metadata={'axes': 'YX'})
  found = list(readers.read(tmp_path / 'a.ome.tif'))
  assert [r['part'] for r in found] == ['s00', 's01', 's02']
  assert all(np.array_equal(r['image'][..., 0], i) for r, i in zip(found, images))
  with tifffile.TiffWriter(tmp_path / 'b.tif') as w:
    for image in images[1:]:
      w.write(image)
  assert [r['image'].shape for r in readers.read(tmp_path / 'b.tif')] == [(8, 9, 1), (5, 6, 1)]
  tifffile.imwrite(tmp_path / 'secret.tif', images[0])
  xml = ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
         'DimensionOrder="XYZCT" Type="uint8" SizeX="9" SizeY="8" SizeZ="1" SizeC="2" SizeT="1">'
         '<TiffData FirstC="0" IFD="0"><UUID FileName="c.ome.tif">urn:uuid:1</UUID></TiffData>'
         '<TiffData FirstC="1" IFD="0"><UUID FileName="../secret.tif">urn:uuid:2</UUID></TiffData>'
         '</Pixels></Image></OME>')
  (tmp_path / 'd').mkdir()
  tifffile.imwrite(tmp_path / 'd/c.ome.tif', images[1], description=xml, metadata=None)
  record = one(tmp_path / 'd/c.ome.tif')
  assert np.array_equal(record['image'][..., 0], images[1])


def test_damaged_tags_are_refused_at_once(tmp_path, rng):
  tifffile.imwrite(tmp_path / 'a.ome.tif', rng.integers(0, 255, (8, 9)).astype(np.uint8), bigtiff=True)
  data = bytearray((tmp_path / 'a.ome.tif').read_bytes())
  at = data.index(struct.pack('<HHQQ', 257, 4, 1, 8))  # ImageLength: one number, 8
  data[at + 4 : at + 12] = struct.pack('<Q', 1 << 58)  # 2^58 numbers
  (tmp_path / 'a.ome.tif').write_bytes(data)
  with pytest.raises(ValueError, match='TiffTag 257'):
    one(tmp_path / 'a.ome.tif')


def write_slide(path, rng, mpp=0.25, side=1024) -> np.ndarray:
  """A white slide with one square of coloured noise, as a pyramid of three levels."""
  full = np.full((side, side + 256, 3), 245, np.uint8)
  full[256:768, 512:1024] = rng.integers(0, 200, (512, 512, 3)) // [1, 4, 2]
  with tifffile.TiffWriter(path, bigtiff=True) as w:
    options = {'tile': (128, 128), 'photometric': 'rgb', 'compression': 'deflate'}
    w.write(full, subifds=2, resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit='CENTIMETER', **options)
    for step in (2, 4):
      w.write(full[::step, ::step], subfiletype=1, **options)
  return full


def test_slide_gives_tiles_of_tissue(tmp_path, rng):
  full = write_slide(tmp_path / 'a.tif', rng)
  options = readers.Options(slides='tiles', mpp=0.25, tile=256)
  tiles = list(readers.read(tmp_path / 'a.tif', options))
  assert [t['meta']['tile_xy'] for t in tiles] == [[512, 256], [768, 256], [512, 512], [768, 512]]
  for tile in tiles:
    x, y = tile['meta']['tile_xy']
    assert np.array_equal(tile['image'], full[y : y + 256, x : x + 256])
    assert tile['part'] == f'x{x}y{y}'
    assert tile['channels'] == ['R', 'G', 'B']
    assert tile['spacing'] == pytest.approx([0.25e-3] * 2)
    assert tile['meta']['level_mpp'] == 0.25
  # The level of half the size is what 0.5 microns per pixel is read from.
  tiles = list(readers.read(tmp_path / 'a.tif', readers.Options(slides='tiles', mpp=0.5, tile=256)))
  assert [t['meta']['tile_xy'] for t in tiles] == [[512, 0], [512, 512]]  # half tissue, each
  assert np.array_equal(tiles[1]['image'], full[512:1024:2, 512:1024:2])
  # Between levels the next finer one is made smaller.
  found = list(readers.read(tmp_path / 'a.tif', readers.Options(slides='tiles', mpp=0.4, tile=64)))
  inside = next(t for t in found if t['meta']['tile_xy'] == [614, 307])
  assert inside['image'].mean() == pytest.approx(full[307:409, 614:717].mean(), rel=0.02)


def test_slides_that_cannot_be_cut_as_asked_are_refused(tmp_path, rng, monkeypatch):
  write_slide(tmp_path / 'a.svs', rng, mpp=1.0)
  with pytest.raises(ValueError, match='1 microns per pixel: coarser than mpp=0.5'):
    list(readers.read(tmp_path / 'a.svs'))
  tifffile.imwrite(tmp_path / 'b.svs', np.zeros((600, 600, 3), np.uint8), tile=(128, 128), photometric='rgb')
  with pytest.raises(ValueError, match='how large its pixels'):
    list(readers.read(tmp_path / 'b.svs'))
  tifffile.imwrite(tmp_path / 'c.svs', np.full((600, 600, 3), 240, np.uint8), tile=(128, 128), photometric='rgb',
                   resolution=(20000, 20000), resolutionunit='CENTIMETER')
  with pytest.raises(ValueError, match='none of 4 tiles is tissue'):
    list(readers.read(tmp_path / 'c.svs'))
  write_slide(tmp_path / 'd.tif', rng)
  assert one(tmp_path / 'd.tif')['image'].shape == (1024, 1280, 3)
  monkeypatch.setattr(slide, 'LARGE', 1_000_000)
  assert len(list(readers.read(tmp_path / 'd.tif'))) == 2


def test_fluorescence_slide(tmp_path, rng):
  full = np.zeros((2, 512, 512), np.uint16)
  full[:, 256:, :256] = rng.integers(1000, 60000, (2, 256, 256))
  with tifffile.TiffWriter(tmp_path / 'a.ome.tif', ome=True) as w:
    w.write(full, subifds=1, tile=(128, 128), metadata={
      'axes': 'CYX', 'PhysicalSizeX': 0.5, 'PhysicalSizeY': 0.5, 'Channel': {'Name': ['DAPI', 'CD3']}})
    w.write(full[:, ::2, ::2], subfiletype=1, tile=(128, 128))
  [tile] = readers.read(tmp_path / 'a.ome.tif', readers.Options(slides='tiles'))
  assert np.array_equal(tile['image'], full[:, 256:, :256].transpose(1, 2, 0))
  assert tile['channels'] == ['DAPI', 'CD3']


def test_openslide_gives_the_same_tiles(tmp_path, rng):
  pytest.importorskip('openslide')
  full = write_slide(tmp_path / 'a.tif', rng)
  with slide.open_openslide(tmp_path / 'a.tif') as opened:
    assert opened.mpp == pytest.approx((0.25, 0.25))
    assert opened.levels[0].shape == (1024, 1280)
    assert np.array_equal(opened.levels[0].read(250, 300, 500, 560), full[250:300, 500:560])
    mask = slide.tissue_mask(opened)
    assert mask[300:700, 600:1000].mean() > 0.9
    assert not mask[:250].any()


@pytest.mark.parametrize('sparse', [False, True])
def test_a_slide_in_dicom_gives_tiles_and_no_label(tmp_path, rng, sparse):
  full = np.full((300, 400, 3), 240, np.uint8)
  full[64:192, 128:256] = rng.integers(0, 200, (128, 128, 3)) // [1, 4, 2]
  order = rng.permutation(35) if sparse else None
  files = [dicoms.slide_level(full[::2, ::2], 1.0, 'half'), dicoms.slide_level(full, 0.5, 'full', order=order),
           dicoms.slide_level(full[:64, :64], 0.5, 'label', flavour='LABEL')]
  paths = dicoms.write(tmp_path / 'd', files, rng)
  [group], rejects = readers.groups('dicom', paths, tmp_path)
  assert [r for _, r in rejects] == ['no image: the label of a slide']
  tiles = list(readers.read_group(group, readers.Options(mpp=0.5, tile=64)))
  assert [t['meta']['tile_xy'] for t in tiles] == [[128, 64], [192, 64], [128, 128], [192, 128]]
  for tile in tiles:
    x, y = tile['meta']['tile_xy']
    assert np.array_equal(tile['image'], full[y : y + 64, x : x + 64])
    assert tile['meta']['modality'] == 'SM'
    assert tile['spacing'] == pytest.approx([0.5e-3] * 2)
  found = list(readers.read_group(group, readers.Options(mpp=1.0, tile=32)))
  assert [t['meta']['tile_xy'] for t in found] == [[128, 64], [192, 64], [128, 128], [192, 128]]
  assert np.array_equal(found[3]['image'], full[128:192:2, 192:256:2])
  opened = open_slide([load(paths[1])], {})
  assert np.array_equal(opened.levels[0].read(50, 300, 100, 400), full[50:300, 100:400])


def test_otsu_is_scikit_images():
  from skimage.filters import threshold_otsu

  rng = np.random.default_rng(1)
  values = np.concatenate([rng.normal(0, 1, 3000), rng.normal(6, 2, 1000)])
  width = np.ptp(values) / 256
  assert abs(slide.otsu(values) - threshold_otsu(values)) <= width
