"""Images whose channels lie in files that do not say so: a layout does (see readers.Parts and prepare.benchmarks)."""

import bisect
import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmed.data import readers
from jaxmed.data.readers import wfdb
from jaxmed.data.readers.types import Options, Parts, Record, stand_in
from jaxmed.errors import need

_AT_ONCE = 64  # rows that are read in one go


def read_parts(parts: Parts, options: Options, rows: Any = None) -> Iterator[Record]:
  """Yields the images of some files, as the readers of these files do.

  Raises:
    ValueError: files or widths that do not fit each other, several images in a file, and as their readers do.
  """
  yield from _of_way(parts, options, True, rows)


def outline_parts(parts: Parts, options: Options) -> Iterator[Record]:
  """See readers.outline."""
  yield from _of_way(parts, options, False)


def _of_way(parts: Parts, options: Options, pixels: bool, rows: Any = None) -> Iterator[Record]:
  if parts.way == 'member':
    yield _member(parts, options, pixels, rows)
  elif parts.way == 'rows':
    yield from _rows(parts, pixels, rows)
  elif parts.way == 'video':
    yield from _frames(parts, options, pixels)
  else:
    yield from _joined(parts, options, pixels)


def _frames(parts: Parts, options: Options, pixels: bool) -> Iterator[Record]:
  """The frames of a video with what spans say of them; a clip, and an outline, which has no times, without that.

  Raises:
    ValueError: the annotation goes on for longer than the video, by more than two rows of a second.
  """
  reader = readers.reader_of(parts.files[0])
  seconds, i = 0.0, 0
  begins = [span[0] for span in parts.spans]
  for record in (reader.read if pixels else reader.outline)(parts.files[0], options):
    time = record.get('meta', {}).get('frame_seconds')
    if time is None or options.volumes == 'whole':
      yield record
      continue
    seconds, i = time, bisect.bisect_right(begins, time + 1e-6)
    told: dict[str, Any] = {}
    for begin, end, columns in parts.spans[:i]:
      if begin - 1e-6 <= time < end - 1e-6:
        told |= columns
    yield record | {'told': told}
  if pixels and options.volumes != 'whole' and parts.until - seconds > options.every + 2:
    raise ValueError(f'its annotation goes on to {parts.until:.0f} s, but the video has no frame after '
                     f'{seconds:.0f} s: it ends early, or its annotation is of another video or frame rate')


def digest(parts: Parts) -> str:
  """The hash of the rows that are read, in the order and the bytes of their data sets: of one file that all items share
  a hash each would be read over and over."""
  found = hashlib.sha256()
  if parts.way == 'member':
    found.update(_bytes(parts))
    return found.hexdigest()
  for first, end, store in _runs(parts):
    _read(store, first, end, found)
  return found.hexdigest()


def _read(store, first: int, end: int, found: Any) -> list[np.ndarray]:
  """Rows of the data sets; `found`, a hash or None, takes their bytes."""
  arrays = [store[key][first:end] for key in ('sen1', 'sen2', 'label')]
  for array in arrays if found is not None else ():
    found.update(array.tobytes())
  return arrays


def _bytes(parts: Parts) -> bytes:
  """A member of an archive."""
  assert parts.rows is not None
  with open(parts.files[0], 'rb') as f:
    f.seek(parts.rows[0])
    data = f.read(parts.rows[1] - parts.rows[0])
  if len(data) < parts.rows[1] - parts.rows[0]:
    raise ValueError('ends before its archive says')
  return data


def _member(parts: Parts, options: Options, pixels: bool, found: Any = None) -> Record:
  """The image of a member, by the reader of its suffix; its bytes go into the hash `found`."""
  data = _bytes(parts)
  if found is not None:
    found.update(data)
  with tempfile.TemporaryDirectory() as scratch:
    file = pathlib.Path(scratch, f'member{parts.values[0]}')
    file.write_bytes(data)
    return _single(file, options, pixels)


def _drawn(parts: Parts, pixels: bool) -> Record:
  """A signal as an image [channels, samples, 1]."""
  if pixels:
    image = np.ascontiguousarray(wfdb.read(parts.files[0])[0].T)[..., None]
  else:
    channels, samples, _ = wfdb.header(parts.files[0])
    image = stand_in(len(channels), samples, 1)
  return {'image': image, 'channels': list(parts.channels), 'spacing': None, 'subject': parts.files[0].stem,
          'source': 'array', 'part': ''}


def _joined(parts: Parts, options: Options, pixels: bool) -> Iterator[Record]:
  if parts.way == 'stack':
    records = [_single(file, options, pixels) for file in parts.files]
    yield _stacked(records, parts, pixels)
  elif parts.way == 'signal':
    yield _drawn(parts, pixels)
  elif parts.way == 'tape':
    yield _folded(_single(parts.files[0], options, pixels), parts, pixels)
  else:
    named = dataclasses.replace(options, channels=parts.channels)
    record = _single(parts.files[0], named, pixels)
    count = record['image'].shape[-1]
    if count != len(parts.channels):
      raise ValueError(f'has {count} channels, expected {len(parts.channels)} ({", ".join(parts.channels)})')
    yield record | {'channels': list(parts.channels)}


def _single(file, options: Options, pixels: bool) -> Record:
  """The one image of a file."""
  reader = readers.reader_of(file)
  found = list((reader.read if pixels else reader.outline)(file, options))
  if len(found) != 1:
    raise ValueError(f'{file.name} holds {len(found)} images: expected one')
  return found[0]


def _stacked(records: list[Record], parts: Parts, pixels: bool) -> Record:
  first = records[0]
  for file, record in zip(parts.files, records, strict=True):
    shape, own = list(first['image'].shape[:-1]), list(record['image'].shape[:-1])
    if record['image'].shape[-1] != 1:
      raise ValueError(f'{file.name} has {record["image"].shape[-1]} channels: expected one')
    if own != shape:
      raise ValueError(f'{file.name} has the grid {own}, {parts.files[0].name} {shape}')
    if record['spacing'] and first['spacing'] and not np.allclose(record['spacing'], first['spacing'], rtol=0.01):
      raise ValueError(f'{file.name} has the spacing {record["spacing"]}, {parts.files[0].name} {first["spacing"]} mm')
  grid = first['image'].shape[:-1]
  image = np.concatenate([r['image'] for r in records], axis=-1) if pixels else stand_in(*grid, len(records))
  return first | {'image': image, 'channels': list(parts.channels)}


def _folded(record: Record, parts: Parts, pixels: bool) -> Record:
  image, count = record['image'], len(parts.channels)
  height, width = image.shape[:2]
  if image.ndim != 3 or image.shape[-1] != 1 or width != count * parts.width:
    raise ValueError(f'has the shape {list(image.shape)}: expected {count} channels side by side, each {parts.width} '
                     'pixels wide')
  folded = image.reshape(height, count, parts.width) if pixels else stand_in(height, count, parts.width)
  return record | {'image': np.moveaxis(folded, 1, -1), 'channels': list(parts.channels)}


def _rows(parts: Parts, pixels: bool, found: Any = None) -> Iterator[Record]:
  """Patches of one HDF5 file of So2Sat (see benchmarks.so2sat); their bytes go into the hash `found`."""
  name = parts.files[0].name
  for first, end, store in _runs(parts):
    if pixels:
      *bands, labels = _read(store, first, end, found)
      images = np.concatenate([band.astype(np.float32) for band in bands], axis=-1)
    else:
      labels = store['label'][first:end]
      images = stand_in(end - first, *store['sen1'].shape[1:-1], len(parts.channels))
    for i, image, label in zip(range(first, end), images, labels, strict=True):
      place = np.flatnonzero(label)
      zone = parts.values[int(place[0])] if len(place) == 1 else None
      yield {'image': image, 'channels': list(parts.channels), 'spacing': None, 'subject': f'{name}/{i}',
             'source': 'array', 'part': f'{i:06d}', 'told': {'subject': f'{name}/{i}', 'label': zone}}


def _runs(parts: Parts) -> Iterator[tuple]:
  """(first, end, open file) of few rows after few rows."""
  h5py = need('h5py', 'medical')
  assert parts.rows is not None
  with h5py.File(parts.files[0], 'r') as store:
    for first in range(parts.rows[0], parts.rows[1], _AT_ONCE):
      yield first, min(first + _AT_ONCE, parts.rows[1]), store
