"""Where voxels lie: axes turned to the closest RAS axes, as every volume is stored."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
  """Turns a volume to the closest RAS axes.

  Args:
    array: [X, Y, Z, ...], the axes in any orientation.
    affine: [4, 4], voxel indices (x, y, z) to RAS space in mm.

  Returns:
    [Z, Y, X, ...], whose index grows towards superior, anterior and right; a dict of `spacing` (mm along z, y, x)
    and `meta` (orientation, direction and origin, see readers.META).

  Raises:
    ValueError: the affine is singular or not finite.
  """
  from nibabel import orientations

  affine = np.asarray(affine, np.float64)
  if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
    raise ValueError('the affine is singular or not finite: where the voxels lie is unknown')
  turn = orientations.io_orientation(affine)
  if np.isnan(turn).any():
    raise ValueError('the affine maps two axes to one: where the voxels lie is unknown')
  turned = affine @ orientations.inv_ornt_aff(turn, array.shape[:3])
  array = orientations.apply_orientation(array, turn)
  zooms = np.linalg.norm(turned[:3, :3], axis=0)
  volume = array.transpose(2, 1, 0, *range(3, array.ndim))
  return volume, {'spacing': [float(s) for s in zooms[::-1]], 'meta': {'orientation': 'RAS', **place(turned)}}


def place(affine: np.ndarray) -> dict[str, list[float]]:
  """`direction` and `origin` of readers.META from a [4, 4] affine (x, y, z) -> RAS, mm."""
  unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
  return {'direction': [float(v) for v in unit.ravel()], 'origin': [float(v) for v in affine[:3, 3]]}


def from_lps(affine: np.ndarray) -> np.ndarray:
  """An affine into DICOM's and ITK's LPS space -> the one into RAS space."""
  return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def shifted(record: dict[str, Any], start: Sequence[float] | None) -> dict[str, Any]:
  """The record with `origin` moved to a voxel `start` mm along its axes ([z,] y, x) from the old one; None, where that
  is unknown, drops the origin."""
  meta = record.get('meta', {})
  if 'origin' not in meta or 'direction' not in meta:
    return record
  if start is None:
    return record | {'meta': {k: v for k, v in meta.items() if k != 'origin'}}
  xyz = np.array([*start[::-1], 0.0][:3])
  moved = np.array(meta['origin']) + np.reshape(meta['direction'], (3, 3)) @ xyz
  return record | {'meta': meta | {'origin': [float(v) for v in moved]}}
