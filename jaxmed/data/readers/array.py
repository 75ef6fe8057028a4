"""Arrays: NumPy's .npy and .npz (never with pickled objects) and HDF5 by h5py."""

import os
from collections.abc import Iterator

import numpy as np

from jaxmed.data.readers.types import (
  DEFAULT,
  MAX_CHANNELS,
  Options,
  Record,
  check_size,
  number,
  numbered,
  stand_in,
  stem,
  whole,
)
from jaxmed.errors import need


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the image of an array file. An .npz or HDF5 file holds one array, or one named `image`; `channels` (names)
  and `spacing` (mm along the grid axes) may lie beside it, in HDF5 also as its attributes.

  What the axes are, MAX_CHANNELS being 16:
    [H, W]        one channel
    [a, b, c]     [H, W, C] when c <= 16 and c < a, b; a volume [D, H, W] when all three are above 16;
                  [C, H, W] only when channel names are given and there are as many of them as a
    [a, b, c, d]  a volume [D, H, W, C] when d <= 16
  Everything else is refused rather than guessed.

  Raises:
    ValueError: axes that are not clear, several arrays, pickled objects, truncated files, HDF5 whose pixels lie in
      other files. h5py raises OSError for damaged ones.
    UserError: HDF5, and h5py is not installed.
  """
  yield from _read(path, options, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  yield from _read(path, options, False)


def _read(path: str | os.PathLike, options: Options, pixels: bool) -> Iterator[Record]:
  array, names, spacing = _load(path, pixels)
  told = list(options.channels) if options.channels else names
  volume, is_volume = _arrange(array, told)
  rank = volume.ndim - 1
  if spacing is not None and (len(spacing) != rank or not all(0 < s < float('inf') for s in spacing)):
    raise ValueError(f'spacing is {spacing}: expected {rank} numbers of mm above 0, of the axes of the grid')
  names = names if len(names) == volume.shape[-1] else numbered(volume.shape[-1])
  record = {'channels': names, 'spacing': spacing, 'subject': stem(path), 'source': 'array', 'part': ''}
  yield whole(volume, record) if is_volume else record | {'image': volume}


def _load(path: str | os.PathLike, pixels: bool) -> tuple[np.ndarray, list[str], list[float] | None]:
  # A memory map checks the file's length before anything is allocated.
  with open(path, 'rb') as f:
    magic = f.read(8)
  if magic == b'\x89HDF\r\n\x1a\n':
    return _load_hdf5(path, pixels)
  if magic.startswith(b'\x93NUMPY'):
    array = np.load(path, mmap_mode='r', allow_pickle=False)
    check_size(array.shape, array.dtype)
    return array, [], None
  with np.load(path, allow_pickle=False) as store:
    key = _only([k for k in store.files if k not in ('channels', 'spacing')])
    shape = _check_npz(store, key)
    names = [str(s) for s in np.atleast_1d(store['channels'])] if 'channels' in store.files else []
    spacing = [number(s, 'spacing') for s in store['spacing']] if 'spacing' in store.files else None
    return store[key] if pixels else stand_in(*shape), names, spacing


def _only(keys: list[str]) -> str:
  if 'image' in keys:
    return 'image'
  if len(keys) != 1:
    raise ValueError(f"holds arrays {keys}: expected one array, or one named 'image'")
  return keys[0]


def _load_hdf5(path: str | os.PathLike, pixels: bool) -> tuple[np.ndarray, list[str], list[float] | None]:
  h5py = need('h5py', 'medical')
  with h5py.File(path, 'r') as store:
    found: dict = {}
    # Links are not followed: they may lead to other files.
    store.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    key = _only([k for k, d in found.items() if k not in ('channels', 'spacing') and d.ndim > 1])
    image = found[key]
    if image.external or image.is_virtual:
      raise ValueError(f'the pixels of {key!r} lie in other files')
    check_size(image.shape, image.dtype)
    told = {k: found[k][()] if k in found else image.attrs.get(k) for k in ('channels', 'spacing')}
    names = [] if told['channels'] is None else [_text(s) for s in np.atleast_1d(told['channels'])]
    spacing = None if told['spacing'] is None else [number(_text(s), 'spacing') for s in np.atleast_1d(told['spacing'])]
    return image[()] if pixels else stand_in(*image.shape), names, spacing


def _text(value) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def _check_npz(store, key: str) -> tuple[int, ...]:
  """The shape of a member, from its header alone: a zip can declare terabytes of zeros."""
  with store.zip.open(f'{key}.npy') as f:
    version = np.lib.format.read_magic(f)
    lib = np.lib.format
    shape, _, dtype = (lib.read_array_header_1_0 if version == (1, 0) else lib.read_array_header_2_0)(f)
  check_size(shape, dtype)
  return shape


def _arrange(array: np.ndarray, names: list[str]) -> tuple[np.ndarray, bool]:
  shape = array.shape
  if array.ndim == 2:
    return array[..., None], False
  if array.ndim == 3:
    if names and len(names) == shape[0] and len(names) != shape[2]:
      return np.moveaxis(array, 0, -1), False
    if shape[2] <= MAX_CHANNELS and shape[2] < min(shape[:2]):
      return array, False
    if min(shape) > MAX_CHANNELS:
      return array[..., None], True
  if array.ndim == 4 and shape[3] <= MAX_CHANNELS:
    return array, True
  raise ValueError(f'axes of shape {list(shape)} are not clear: expected [H, W], [H, W, C], [D, H, W] or '
                   f'[D, H, W, C] with at most {MAX_CHANNELS} channels')
