"""OME-Zarr of both layouts: axes, units, names, plates, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from jaxmed.data import readers

zarr = pytest.importorskip('zarr')
WHOLE = readers.Options(volumes='whole')
UNITS = {'t': 'second', 'z': 'micrometer', 'y': 'micrometer', 'x': 'micrometer'}
KINDS = {'t': 'time', 'c': 'channel', 'z': 'space', 'y': 'space', 'x': 'space'}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def ome(axes: str, scale, version: str, labels=()) -> dict:
  told = {'multiscales': [{
    'version': version,
    'axes': [{'name': a, 'type': KINDS[a]} | ({'unit': UNITS[a]} if a in UNITS else {}) for a in axes],
    'datasets': [{'path': str(i), 'coordinateTransformations': [{'type': 'scale', 'scale': [float(s) * 2**i for s in scale]}]}
                 for i in range(2)]}]}
  return told | ({'omero': {'channels': [{'label': n} for n in labels]}} if labels else {})


def write(path, pixels, axes, scale, version='0.5', labels=()):
  v2 = version == '0.4'
  group = zarr.open_group(str(path), mode='w', zarr_format=2 if v2 else 3)
  told = ome(axes, scale, version, labels)
  group.attrs.update(told if v2 else {'ome': told | {'version': version}})
  chunks = tuple(min(4, n) for n in pixels.shape)
  for i, level in enumerate((pixels, pixels[..., ::2, ::2])):
    array = group.create_array(str(i), shape=level.shape, dtype=level.dtype, chunks=chunks)
    array[...] = level
  return path


@pytest.mark.parametrize('version', ['0.4', '0.5'])
def test_axes_scale_and_names(tmp_path, rng, version):
  pixels = rng.integers(1, 60000, (3, 5, 6, 7)).astype(np.uint16)
  path = write(tmp_path / 'a.zarr', pixels, 'czyx', [1, 2.0, 0.5, 0.25], version, ['DAPI', 'actin', 'tubulin'])
  assert readers.is_folder_format(path)
  assert readers.kind(path) == 'zarr'
  [record] = readers.read(path, WHOLE)
  assert np.array_equal(record['image'], pixels.transpose(1, 2, 3, 0))
  assert record['channels'] == ['DAPI', 'actin', 'tubulin']
  assert record['spacing'] == pytest.approx([2e-3, 0.5e-3, 0.25e-3])
  assert record['subject'] == 'a'
  assert 'notes' not in record['meta']
  slices = list(readers.read(path))
  assert [s['part'] for s in slices] == [f'z{z:03d}' for z in range(5)]


def test_time_planes_and_a_folder_of_another_name(tmp_path, rng):
  pixels = rng.integers(1, 255, (3, 1, 6, 7)).astype(np.uint8)
  path = write(tmp_path / 'folder', pixels, 'tcyx', [0.1, 1, 0.5, 0.25])
  assert readers.is_folder_format(path)
  assert not readers.is_folder_format(tmp_path)
  found = list(readers.read(path))
  assert [r['part'] for r in found] == ['t000', 't001', 't002']
  assert found[2]['meta']['frame_seconds'] == pytest.approx(0.2)
  assert found[2]['spacing'] == pytest.approx([0.5e-3, 0.25e-3])
  assert np.array_equal(found[2]['image'][..., 0], pixels[2, 0])


def test_a_plate_gives_all_its_images(tmp_path, rng):
  root = tmp_path / 'plate.zarr'
  zarr.open_group(str(root), mode='w').attrs['ome'] = {'plate': {'wells': [{'path': 'A/1'}, {'path': 'B/2'}]}}
  images = {}
  for well in ('A/1', 'B/2'):
    zarr.open_group(str(root / well), mode='w').attrs['ome'] = {'well': {'images': [{'path': '0'}]}}
    images[f'{well}/0'] = rng.integers(1, 255, (2, 6, 7)).astype(np.uint8)
    write(root / well / '0', images[f'{well}/0'], 'cyx', [1, 1, 1])
  found = {r['part']: r['image'] for r in readers.read(root)}
  assert found.keys() == images.keys()
  assert all(np.array_equal(found[k], images[k].transpose(1, 2, 0)) for k in images)


def test_a_plate_is_read_without_what_is_not_there(tmp_path, rng):
  root = tmp_path / 'plate.zarr'
  wells = ['A/1', 'A/2', 'B/1']
  zarr.open_group(str(root), mode='w').attrs['ome'] = {'plate': {'wells': [{'path': w} for w in wells]}}
  pixels = rng.integers(1, 255, (2, 6, 7)).astype(np.uint8)
  for well, fields in (('A/1', '01'), ('B/1', '0')):  # A/2 is missing, and so are the second fields
    zarr.open_group(str(root / well), mode='w').attrs['ome'] = {'well': {'images': [{'path': p} for p in '01']}}
    for field in fields:
      write(root / well / field, pixels, 'cyx', [1, 1, 1], labels=['DAPI', 'actin'])
  shutil.rmtree(root / 'A/1/1/0')  # the finest level
  found = list(readers.read(root))
  assert [r['part'] for r in found] == ['A/1/0', 'B/1/0']
  assert all(np.array_equal(r['image'], pixels.transpose(1, 2, 0)) for r in found)
  assert all(r['channels'] == ['DAPI', 'actin'] for r in found)
  assert found[0]['meta']['notes'] == 'the plate lists what is not there: A/1/1, A/2, B/1/1'
  assert len(list(readers.outline(root))) == 2
  for well in ('A', 'B'):
    shutil.rmtree(root / well)
  with pytest.raises(ValueError, match='none of the images of its plate is there: A/1, A/2, B/1'):
    list(readers.read(root))
  path = write(tmp_path / 'a.zarr', pixels, 'cyx', [1, 1, 1])
  shutil.rmtree(path / '0')
  with pytest.raises(ValueError, match=r"multiscales.datasets\[0\].path is '0': expected an array"):
    list(readers.read(path))


def test_refusals_and_missing_chunks(tmp_path, rng):
  pixels = rng.integers(1, 255, (1, 8, 8)).astype(np.uint8)
  path = write(tmp_path / 'a.zarr', pixels, 'cyx', [1, 1, 1])
  (path / '0/c/0/1/1').unlink()
  [record] = readers.read(path)
  assert record['meta']['notes'].startswith('1 of 4 chunks are missing')
  assert not record['image'][4:, 4:].any()
  meta = json.loads((path / '0/zarr.json').read_text())
  (path / '0/zarr.json').write_text(json.dumps(meta | {'shape': [1, 8, 2_000_000]}))
  with pytest.raises(ValueError, match='only 3 of 1000000 chunks'):
    list(readers.read(path))
  meta = json.loads((path / 'zarr.json').read_text())
  meta['attributes']['ome']['multiscales'][0]['datasets'][0]['path'] = '../other/0'
  (path / 'zarr.json').write_text(json.dumps(meta))
  with pytest.raises(ValueError, match='outside its folder'):
    list(readers.read(path))
  path = write(tmp_path / 'b.zarr', pixels, 'cyx', [1, 1, 1], '0.4')
  meta = json.loads((path / '0/.zarray').read_text())
  (path / '0/.zarray').write_text(json.dumps(meta | {'filters': [{'id': 'pickle', 'protocol': 5}]}))
  with pytest.raises(ValueError, match='pickle'):
    list(readers.read(path))
  zarr.open_group(str(tmp_path / 'c.zarr'), mode='w')
  with pytest.raises(ValueError, match='lists no multiscales'):
    list(readers.read(tmp_path / 'c.zarr'))
