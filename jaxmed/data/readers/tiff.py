"""TIFF by tifffile: several pages or samples become channels, named by OME or ImageJ where present."""

import logging
import os
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np

from jaxmed.data.readers import DEFAULT, MAX_CHANNELS, Options, Record, check_size, cut, numbered, stem


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the image of a file as [H, W, C], or a volume (whole or its planes, by `options.volumes`).

  A file of several images of different sizes gives the first one.

  Axes are tifffile's. C, S and an unnamed page axis (I or Q, at most MAX_CHANNELS long) are channels; Z, T
  and a longer unnamed page axis are the slices of a volume [D, H, W, C]. 'min is white' pixels are inverted.

  Raises:
    ValueError, tifffile.TiffFileError, struct.error: damaged or truncated, or axes of another kind.
  """
  import tifffile

  with _no_complaints(), tifffile.TiffFile(path) as tif:
    series, first = _alike(tif), tif.series[0].keyframe
    check_size((len(series), *series[0].shape), series[0].dtype)
    axes = series[0].axes if len(series) == 1 else 'I' + series[0].axes
    array = series[0].asarray() if len(series) == 1 else np.stack([s.asarray() for s in series])
    if first.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == 'u':
      array = np.array(2**first.bitspersample - 1, array.dtype) - array
    names = _ome_names(tif) or _imagej_names(tif)
    rgb = first.photometric == tifffile.PHOTOMETRIC.RGB
  volume = _arrange(array, axes)
  if rgb and 'S' in axes and volume.shape[-1] == 4:
    volume = volume[..., :3]  # alpha is no measurement
  count = volume.shape[-1]
  if len(names) != count or len(set(names)) != count:
    names = ['R', 'G', 'B'] if rgb and count == 3 else numbered(count)
  record = {'channels': names, 'spacing': None, 'subject': stem(path), 'source': 'tiff', 'part': ''}
  if len(volume) == 1:
    yield record | {'image': volume[0]}
  else:
    yield from cut(volume, record, options)


def _alike(tif) -> list:
  """Series that are pages of one image (as some writers store them); else the first one alone."""
  series = tif.series
  first = series[0]
  same = all((s.shape, s.dtype, s.axes) == (first.shape, first.dtype, first.axes) for s in series)
  return list(series) if same else [first]


def _arrange(array: np.ndarray, axes: str) -> np.ndarray:
  """Any axes -> [D, H, W, C], with D = 1 for a single plane."""
  unknown = set(axes) - set('TZCIQSYX')
  if unknown or 'Y' not in axes or 'X' not in axes:
    raise ValueError(f'axes {axes} of shape {list(array.shape)} are not those of an image')
  def is_depth(axis: int) -> bool:
    return axes[axis] in 'TZ' or (axes[axis] in 'IQ' and array.shape[axis] > MAX_CHANNELS)
  depth = [i for i in range(array.ndim) if is_depth(i)]
  channel = [i for i in range(array.ndim) if axes[i] in 'CSIQ' and i not in depth]
  y, x = axes.index('Y'), axes.index('X')
  moved = array.transpose(depth + [y, x] + channel)
  return moved.reshape(-1, array.shape[y], array.shape[x], int(np.prod([array.shape[i] for i in channel])))


def _ome_names(tif) -> list[str]:
  if not tif.ome_metadata:
    return []
  root = ElementTree.fromstring(tif.ome_metadata)
  image = next((e for e in root.iter() if e.tag.endswith('}Image') or e.tag == 'Image'), None)
  if image is None:
    return []
  channels = [e for e in image.iter() if e.tag.endswith('Channel')]
  return [e.get('Name') or '' for e in channels if e.get('Name') or e.get('ID')]


def _imagej_names(tif) -> list[str]:
  labels = (tif.imagej_metadata or {}).get('Labels') or []
  return [str(s) for s in ([labels] if isinstance(labels, str) else labels)]


class _no_complaints(logging.Handler):
  """tifffile logs a page that it cannot read and goes on without it; here that ends the reading."""

  def emit(self, record: logging.LogRecord) -> None:
    self.seen.append(record.getMessage())

  def __enter__(self) -> None:
    self.seen: list[str] = []
    logger = logging.getLogger('tifffile')
    logger.addHandler(self)
    self.propagate, logger.propagate = logger.propagate, False

  def __exit__(self, kind, value, trace) -> None:
    logger = logging.getLogger('tifffile')
    logger.removeHandler(self)
    logger.propagate = self.propagate
    if kind is None and self.seen:
      raise ValueError(self.seen[0])
