"""What a dry run counts from headers is what is read, in every format and for every way of cutting."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from jaxmed.data import readers
from jaxmed.data.readers import shaping
from tests.data.readers import dicoms

WAYS = [{}, {'volumes': 'whole'}, {'plane': 'acquired'}, {'spacing': (1.3,)}, {'plane': 'acquired', 'spacing': (0.6, 2.0, 1.0)}]
AXIAL, CORONAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def agree(path, **more):
  """Whether header and pixels tell the same number, for all WAYS; returns the numbers."""
  numbers = []
  for way in WAYS:
    options = readers.Options(**(way | more))
    told = sum(shaping.count(r, options) for r in readers.outline(path, options))
    read = list(readers.read(path, options))
    assert told == len(read), (path.name, way)
    assert all(o['image'].shape[:-1] == r['image'].shape[:-1] for o, r in zip(readers.outline(path, options), read)
               if not (o.get('volume') or options.spacing))
    numbers.append(told)
  return numbers


def test_files_of_arrays(tmp_path, rng):
  import h5py

  volume = rng.integers(0, 900, (18, 20, 22)).astype(np.int16)
  Image.fromarray(volume[0].astype(np.uint8)).save(tmp_path / 'a.png')
  np.save(tmp_path / 'a.npy', volume)
  np.save(tmp_path / 'b.npy', volume[..., :3])
  np.savez(tmp_path / 'a.npz', image=volume, spacing=[3.0, 1.0, 1.0])
  with h5py.File(tmp_path / 'a.h5', 'w') as f:
    f['image'] = volume
    f['image'].attrs['spacing'] = [1.3, 1.0, 1.0]
  affine = np.eye(4)[[1, 2, 0, 3]] @ np.diag([1.0, 1.5, 3.0, 1.0])
  nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / 'a.nii.gz')
  nibabel.save(nibabel.Nifti1Image(rng.integers(0, 9, (5, 6, 7, 18)).astype(np.uint8), affine), tmp_path / 't.nii')
  nibabel.save(nibabel.Nifti1Image(rng.integers(0, 9, (5, 6, 7, 1, 2)).astype(np.uint8), affine), tmp_path / 'c.nii')
  image = sitk.GetImageFromArray(volume)
  image.SetSpacing((1.0, 4.0, 1.5))
  for name in ('a.nrrd', 'a.mha'):
    sitk.WriteImage(image, str(tmp_path / name))
  sitk.WriteImage(sitk.GetImageFromArray(volume[..., :3], isVector=True), str(tmp_path / 'rgb.mha'))
  numbers = {p.name: agree(p) for p in sorted(tmp_path.iterdir())}
  assert numbers['a.png'] == numbers['b.npy'] == [1] * 5
  assert numbers['a.npy'] == [18, 1, 18, 18, 18]
  assert numbers['a.npz'] == [18, 1, 18, 42, 90]
  assert numbers['a.h5'] == [18, 1, 18, 18, 39]  # arrays have no orientation, so their planes are the first axis
  assert numbers['a.nii.gz'][0] != numbers['a.nii.gz'][2]
  assert numbers['t.nii'][:2] == [18 * 5, 18]
  assert numbers['a.nrrd'][0] == 18
  assert numbers['a.nrrd'][2] == 20


def test_tiff_and_slides(tmp_path, rng):
  pixels = rng.integers(0, 60000, (3, 4, 2, 18, 19)).astype(np.uint16)
  told = {'axes': 'TZCYX', 'PhysicalSizeX': 1.0, 'PhysicalSizeXUnit': 'mm', 'PhysicalSizeY': 1.0, 'PhysicalSizeYUnit': 'mm',
          'PhysicalSizeZ': 5.0, 'PhysicalSizeZUnit': 'mm'}
  tifffile.imwrite(tmp_path / 'a.ome.tif', pixels, metadata=told)
  tifffile.imwrite(tmp_path / 't.tif', pixels[:, 0, 0], imagej=True, metadata={'axes': 'TYX'})
  with tifffile.TiffWriter(tmp_path / 's.ome.tif', ome=True) as w:
    w.write(pixels[0, 0, 0], metadata={'axes': 'YX'})
    w.write(pixels[0, :, 0], metadata={'axes': 'ZYX'})
  assert agree(tmp_path / 'a.ome.tif') == [12, 3, 12, 45, 99]
  assert agree(tmp_path / 't.tif') == [3, 1, 3, 3, 3]
  assert agree(tmp_path / 's.ome.tif')[:2] == [5, 2]
  slide = np.full((256, 256, 3), 240, np.uint8)
  slide[:128, :192] = rng.integers(0, 255, (128, 192, 3))
  tifffile.imwrite(tmp_path / 'slide.tif', slide, resolution=(20000, 20000), resolutionunit='CENTIMETER', tile=(64, 64))
  assert agree(tmp_path / 'slide.tif', slides='tiles', tile=64, mpp=0.5) == [6] * 5


def test_zarr_and_video(tmp_path, rng):
  from tests.data.readers.test_video import CODECS, encode
  from tests.data.readers.test_zarr import write

  pixels = rng.integers(1, 255, (3, 5, 6, 7)).astype(np.uint8)
  assert agree(write(tmp_path / 'a.zarr', pixels, 'tzyx', [1, 2000.0, 1000, 1000])) == [15, 3, 15, 24, 51]
  assert agree(write(tmp_path / 'b.zarr', pixels, 'czyx', [1, 2.0, 1, 1], '0.4'))[:2] == [5, 1]
  for suffix, codec, pix_fmt in CODECS:
    path = encode(tmp_path / f'a.{suffix}', codec, pix_fmt)
    assert agree(path) == [4, 1, 4, 4, 4]
    assert agree(path, every=0.35)[:2] == [10, 1]


@pytest.mark.parametrize('axes, step, expected', [
  (AXIAL, (0, 0, 4.0), [9, 1, 9, 28, 60]), (CORONAL, (0, 4.0, 0), [10, 1, 9, 7, 18]),
])
def test_series(tmp_path, rng, axes, step, expected):
  volume = rng.integers(0, 900, (9, 10, 12)).astype(np.int16)
  found = dicoms.series(volume, axes, step, spacing=(0.9, 0.9))
  paths = dicoms.write(tmp_path / 's', found, rng)
  [group], _ = readers.groups('dicom', paths, tmp_path)
  numbers = []
  for way in WAYS:
    options = readers.Options(**way)
    [outline] = readers.outline_group(group, options)
    numbers.append(shaping.count(outline, options))
    assert numbers[-1] == len(list(readers.read_group(group, options))), way
  assert numbers == expected


def test_dicom_of_one_file(tmp_path, rng):
  volume = rng.integers(0, 900, (6, 10, 12)).astype(np.int16)
  clip = dicoms.image(volume.astype(np.uint8), sop_class=dicoms.US, series='u', FrameTime='40')
  enhanced = dicoms.enhanced(np.concatenate([volume, volume + 1]), AXIAL, (0, 0, 3.0), values=[0] * 6 + [1000] * 6, series='e')
  slide = dicoms.slide_level(rng.integers(0, 255, (128, 128, 3)).astype(np.uint8), 0.5, 'v')
  for name, data, expected in (('clip', clip, [6, 1]), ('enhanced', enhanced, [12, 2]), ('slide', slide, [4, 4]),
                               ('plain', dicoms.image(volume[0], series='p'), [1, 1])):
    [path] = dicoms.write(tmp_path / name, [data], rng)
    [group], _ = readers.groups('dicom', [path], tmp_path)
    for way, number in zip(WAYS, expected):
      options = readers.Options(tile=64, **way)
      assert sum(shaping.count(r, options) for r in readers.outline_group(group, options)) == number, name
      assert len(list(readers.read_group(group, options))) == number, name


def test_pixels_decide_where_a_crop_comes_before_the_planes(tmp_path):
  np.save(tmp_path / 'a.npy', np.zeros((18, 20, 22), np.uint8))
  [outline] = readers.outline(tmp_path / 'a.npy')
  assert shaping.count(outline, readers.Options(crop='foreground')) is None
  assert shaping.count(outline, readers.Options(crop='foreground', volumes='whole')) == 1
