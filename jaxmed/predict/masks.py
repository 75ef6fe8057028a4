"""Masks as files: NIfTI with the header and orientation of the image, PNG and TIFF for images."""

import pathlib
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.data import readers
from jaxmed.data.readers import nifti
from jaxmed.errors import UserError

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


def write(path: pathlib.Path, mask: np.ndarray, record: dict[str, Any], like: pathlib.Path | None = None) -> None:
  """Writes a mask [*size] of integers >= 0, whole or not at all, in the smallest unsigned type.

  Args:
    record: of the image, on whose grid the mask lies; its `meta` says where a volume is.
    like: a NIfTI file; the mask gets its axes, affine, codes and units.
  """
  mask = mask.astype(np.uint8 if mask.max(initial=0) < 256 else np.uint16 if mask.max() < 65536 else np.int32)
  end = readers.suffix(path)
  with files.writing(path) as part:
    if end in ('.nii', '.nii.gz'):
      part.write_bytes(_nifti(mask, record, like, end))
    elif end in ('.tif', '.tiff'):
      import tifffile
      tifffile.imwrite(part, mask, photometric='minisblack', compression='zlib')
    else:
      if mask.ndim != 2 or mask.dtype.itemsize > 2:
        raise UserError(f'{path}: a PNG holds a mask [H, W] of values below 65536, not {list(mask.shape)} up to '
                        f'{mask.max()}')
      from PIL import Image
      Image.fromarray(mask).save(part, format='PNG')


def read(path: pathlib.Path) -> np.ndarray:
  """What `write` wrote, [*size] of integers; volumes as [z, y, x] in RAS."""
  try:
    return readers.read_masks(path, readers.Options(volumes='whole'))[0]['image']
  except ValueError as e:
    raise UserError(f'{path} is no mask that jaxmed wrote: {e}') from e


def _nifti(mask: np.ndarray, record: dict[str, Any], like: pathlib.Path | None, end: str) -> bytes:
  import gzip

  import nibabel
  from nibabel import orientations

  if mask.ndim != 3:
    raise UserError(f'{record.get("subject")}: a mask of {mask.ndim} axes; a NIfTI file takes a volume')
  array = mask.transpose(2, 1, 0)
  if like is None:
    image = nibabel.Nifti1Image(array, affine_of(record))
    image.header.set_xyzt_units('mm')
  else:
    header, affine = nifti.header_of(like)
    turn = orientations.ornt_transform(_RAS, orientations.io_orientation(affine))
    array = orientations.apply_orientation(array, turn)
    image = (nibabel.Nifti2Image if header['sizeof_hdr'] == 540 else nibabel.Nifti1Image)(array, None, header)
    image.header.set_data_dtype(mask.dtype)
    image.header.set_slope_inter(1, 0)
    image.header['cal_min'] = image.header['cal_max'] = 0
  data = image.to_bytes()
  return gzip.compress(data, 6, mtime=0) if end == '.nii.gz' else data


def affine_of(record: dict[str, Any]) -> np.ndarray:
  """The affine [4, 4] of voxel indices (x, y, z) to RAS space (mm) of a volume [z, y, x]; ones for what is unknown."""
  meta = record.get('meta', {})
  spacing = np.array((record['spacing'] or [1.0] * 3)[::-1])
  direction = np.reshape(meta.get('direction') or np.eye(3), (3, 3))
  out = np.eye(4)
  out[:3, :3] = direction * spacing
  out[:3, 3] = meta.get('origin') or (0.0, 0.0, 0.0)
  return out
