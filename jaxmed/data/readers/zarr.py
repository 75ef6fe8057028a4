"""OME-Zarr 0.1 to 0.5 (https://ngff.openmicroscopy.org) by zarr: the level of full resolution."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed.data.readers.types import DEFAULT, Options, Record, check_size, number, numbered, stand_in, stem, whole
from jaxmed.errors import need

_AXES = 'tczyx'
_MANY = 1000  # chunks: of more, one in a thousand must be there
_TO_MM = {'meter': 1e3, 'centimeter': 10.0, 'millimeter': 1.0, 'micrometer': 1e-3, 'nanometer': 1e-6, 'angstrom': 1e-7}
_TO_SECONDS = {'second': 1.0, 'millisecond': 1e-3, 'microsecond': 1e-6, 'minute': 60.0, 'hour': 3600.0}


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the image of a folder as [H, W, C], or its volumes: one record for each time (part 't000').

  A plate (0.4 and 0.5) and a bioformats2raw folder give the records of all their images (part 'A/1/0t000' ...); wells
  and images that a plate lists and that are not there are noted.
  Channel names are those of `omero`, spacing that of the axes' units and scales. Chunks that are missing hold the
  fill value, as Zarr wants it, and are noted.

  Raises:
    ValueError: no OME-Zarr, axes of another kind, a level outside the folder, pixels that a pickle would decode.
    UserError: zarr is not installed.
  """
  del options
  yield from _read(path, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  del options
  yield from _read(path, False)


def _read(path: str | os.PathLike, pixels: bool) -> Iterator[Record]:
  zarr = need('zarr', 'medical')
  try:
    group = zarr.open_group(str(path), mode='r')
  except (UnicodeDecodeError, json.JSONDecodeError) as e:
    raise ValueError(f'its metadata (zarr.json or .zgroup, .zattrs) do not parse ({e}): expected JSON') from e
  missing: list[str] = []
  images = list(_images(group, missing))
  if not images:
    raise ValueError(f'none of the images of its plate is there: {_listed(missing)}' if missing else
                     'is not OME-Zarr: its metadata lists no multiscales')
  note = f'the plate lists what is not there: {_listed(missing)}' if missing else ''
  for inner, image in images:
    yield from _read_image(image, inner, stem(path), pixels, note)


def _listed(names: list[str]) -> str:
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _attributes(group) -> dict[str, Any]:
  """What 0.5 keeps under `ome` and earlier versions keep at the top."""
  attributes = dict(group.attrs)
  return attributes.get('ome') or attributes


def _images(group, missing: list[str]) -> Iterator[tuple[str, Any]]:
  """(path, group) of every image: the group itself, the wells of a plate, or bioformats2raw's numbered groups. What a
  plate lists and lacks goes into `missing`."""
  told = _attributes(group)
  if 'multiscales' in told:
    yield '', group
  elif 'plate' in told:
    for well in _field(told['plate'], 'plate', 'wells'):
      place = _inside(_field(well, 'plate.wells', 'path'))
      if (inner := group.get(place)) is None:
        missing.append(place)
        continue
      for image in _field(_field(_attributes(inner), place, 'well'), f'{place}: well', 'images'):
        name = _inside(_field(image, f'{place}: well.images', 'path'))
        if (found := inner.get(name)) is None or _lacks_level(found):
          missing.append(f'{place}/{name}')
        else:
          yield f'{place}/{name}', found
  elif 'bioformats2raw.layout' in told:
    for name in sorted((k for k in group.group_keys() if k.isdigit()), key=int):
      yield name, group[name]


def _field(told: Any, where: str, name: str) -> Any:
  if not isinstance(told, dict) or name not in told:
    raise ValueError(f'{where} has no {name}: expected the metadata of an OME-Zarr plate')
  return told[name]


def _lacks_level(group) -> bool:
  """Whether the image's finest level is not there."""
  scales: Any = _attributes(group).get('multiscales')
  return bool(scales) and group.get(_inside(scales[0]['datasets'][0]['path'])) is None


def _inside(path: str) -> str:
  parts = pathlib.PurePosixPath(str(path).replace('\\', '/'))
  if parts.is_absolute() or '..' in parts.parts:
    raise ValueError(f'refers to {path}, outside its folder')
  return str(path)


def _read_image(group, inner: str, subject: str, pixels: bool, note: str) -> Iterator[Record]:
  told = _attributes(group)
  if not (scales := (told.get('multiscales') or [{}])[0]).get('datasets'):
    raise ValueError(f'{inner or "its metadata"}: multiscales has no datasets: expected the paths of its levels')
  level = scales['datasets'][0]
  if (array := group.get(_inside(level['path']))) is None:
    raise ValueError(f'multiscales.datasets[0].path is {level["path"]!r}: expected an array of that name in the folder')
  _check_array(array)
  names, units = _axes(scales, array.ndim)
  scale = _scale(scales, level, array.ndim)
  spacing = [_TO_MM[units[a]] * scale[names.index(a)] for a in 'zyx' if a in names and units[a] in _TO_MM]
  size = dict(zip(names, array.shape))
  spacing = spacing if len(spacing) == sum(a in names for a in 'zyx') else []
  meta: dict[str, Any] = {'orientation': 'native'}
  missing = array.nchunks - array.nchunks_initialized
  if array.nchunks > _MANY and missing > 0.999 * array.nchunks:
    raise ValueError(f'only {array.nchunks - missing} of {array.nchunks} chunks are there')
  notes = [f'{missing} of {array.nchunks} chunks are missing: their pixels are the fill value'] if missing > 0 else []
  if notes := [*filter(None, (note,)), *notes]:
    meta['notes'] = '; '.join(notes)
  record = {'subject': subject, 'source': 'zarr', 'channels': _channels(told, size.get('c', 1)), 'meta': meta}
  for t in range(size.get('t', 1)):
    when = {'frame_seconds': t * scale[names.index('t')] * _TO_SECONDS[units['t']]} if (
      't' in names and size['t'] > 1 and units['t'] in _TO_SECONDS) else {}
    part = inner + (f't{t:03d}' if size.get('t', 1) > 1 else '')
    at = tuple(t if a == 't' else slice(None) for a in names)
    volume = _volume(array[at] if pixels else stand_in(*(n for a, n in zip(names, array.shape) if a != 't')), names)
    here = record | {'part': part, 'meta': meta | when}
    if len(volume) == 1:
      yield here | {'image': volume[0], 'spacing': spacing[-2:] or None}
    else:
      yield whole(volume, here | {'spacing': spacing or None})


def _check_array(array) -> None:
  check_size(array.shape, array.dtype)
  if array.dtype.kind not in 'biuf':
    raise ValueError(f'pixels of type {array.dtype} are not real numbers')
  if 'pickle' in json.dumps(array.metadata.to_dict(), default=str).lower():
    raise ValueError('its pixels are pickled: a pickle can run any code, so none is opened')


def _axes(scales: dict, rank: int) -> tuple[str, dict[str, str]]:
  """The axes' names as a string ('tczyx'), and the unit of each. Versions before 0.4 name them only, or not at all."""
  axes = scales.get('axes') or list(_AXES)
  axes = [a if isinstance(a, dict) else {'name': a} for a in axes]
  names = ''.join(str(a.get('name')).lower() for a in axes)
  if len(names) != rank or set(names) - set(_AXES) or len(set(names)) < rank or not {'y', 'x'} <= set(names):
    raise ValueError(f'axes {names} of {rank} are not those of an image: expected some of {_AXES}')
  return names, {str(a['name']).lower(): str(a.get('unit') or '') for a in axes}


def _scale(scales: dict, level: dict, rank: int) -> np.ndarray:
  """The product of the level's scale and the scale that all levels share."""
  scale = np.ones(rank)
  for transform in (level.get('coordinateTransformations') or []) + (scales.get('coordinateTransformations') or []):
    if transform.get('type') == 'scale':
      scale = scale * [number(s, 'scale of coordinateTransformations') for s in transform['scale']]
  return scale


def _channels(told: dict, count: int) -> list[str]:
  labels = [str(c.get('label') or '') for c in (told.get('omero') or {}).get('channels') or []]
  return labels if len(labels) == count and len(set(labels)) == count and all(labels) else numbered(count)


def _volume(array: np.ndarray, names: str) -> np.ndarray:
  """[D, H, W, C] of an array whose axes are `names` without t."""
  left = names.replace('t', '')
  for axis in 'zc':
    if axis not in left:
      array, left = array[None], axis + left
  return array.transpose([left.index(a) for a in 'zyxc'])
