"""NumPy arrays, .npy and .npz, never with pickled objects."""

import os
from collections.abc import Iterator

import numpy as np

from jaxmed.data.readers import DEFAULT, MAX_CHANNELS, Options, Record, check_size, cut, numbered, stem


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the image of an array file. An .npz holds one array, or one named `image`; `channels` (names) and
  `spacing` (mm along the grid axes) may lie beside it.

  What the axes are, MAX_CHANNELS being 16:
    [H, W]        one channel
    [a, b, c]     [H, W, C] when c <= 16 and c < a, b; a volume [D, H, W] when all three are above 16;
                  [C, H, W] only when channel names are given and there are as many of them as a
    [a, b, c, d]  a volume [D, H, W, C] when d <= 16
  Everything else is refused rather than guessed.

  Raises:
    ValueError: axes that are not clear, several arrays, pickled objects, truncated files.
  """
  array, names, spacing = _load(path)
  told = list(options.channels) if options.channels else names
  volume, is_volume = _arrange(array, told)
  names = names if len(names) == volume.shape[-1] else numbered(volume.shape[-1])
  record = {'channels': names, 'spacing': spacing, 'subject': stem(path), 'source': 'array', 'part': ''}
  if is_volume:
    yield from cut(volume, record, options)
  else:
    yield record | {'image': volume}


def _load(path: str | os.PathLike) -> tuple[np.ndarray, list[str], list[float] | None]:
  # A memory map checks the file's length before anything is allocated.
  with open(path, 'rb') as f:
    is_npy = f.read(6) == b'\x93NUMPY'
  if is_npy:
    array = np.load(path, mmap_mode='r', allow_pickle=False)
    check_size(array.shape, array.dtype)
    return array, [], None
  with np.load(path, allow_pickle=False) as store:
    keys = [k for k in store.files if k not in ('channels', 'spacing')]
    key = 'image' if 'image' in keys else keys[0] if len(keys) == 1 else None
    if key is None:
      raise ValueError(f"holds arrays {keys}: expected one array, or one named 'image'")
    _check_npz(store, key)
    names = [str(s) for s in np.atleast_1d(store['channels'])] if 'channels' in store.files else []
    spacing = [float(s) for s in store['spacing']] if 'spacing' in store.files else None
    return store[key], names, spacing


def _check_npz(store, key: str) -> None:
  """Reads only the header of a member: a zip can declare terabytes of zeros."""
  with store.zip.open(f'{key}.npy') as f:
    version = np.lib.format.read_magic(f)
    lib = np.lib.format
    shape, _, dtype = (lib.read_array_header_1_0 if version == (1, 0) else lib.read_array_header_2_0)(f)
  check_size(shape, dtype)


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
