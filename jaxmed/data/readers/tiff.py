"""TIFF by tifffile: several pages or samples become channels, named by OME or ImageJ where present."""

import logging
import os
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np

from jaxmed.data.readers import DEFAULT, MAX_CHANNELS, Options, Record, check_size, numbered, stand_in, stem, whole

_TO_MM = {
  'm': 1e3, 'cm': 10.0, 'mm': 1.0, 'µm': 1e-3, 'μm': 1e-3, 'um': 1e-3, 'micron': 1e-3, 'microns': 1e-3,
  'micrometer': 1e-3, '\\u00b5m': 1e-3, 'nm': 1e-6, 'å': 1e-7, 'pm': 1e-9, 'inch': 25.4, 'in': 25.4,
  'millimeter': 1.0, 'centimeter': 10.0, 'nanometer': 1e-6,
}
_TO_SECONDS = {'s': 1.0, 'sec': 1.0, 'ms': 1e-3, 'µs': 1e-6, 'min': 60.0, 'h': 3600.0}
# Dots per inch that programs write for screens and printers: they say nothing of what was imaged.
_PRINT = (72, 96, 100, 150, 200, 300, 600, 1200)


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the images of a file as [H, W, C], or volumes [D, H, W, C].

  Axes are tifffile's. C, S and an unnamed page axis (I or Q, at most MAX_CHANNELS long) are channels; Z and a longer
  unnamed page axis are the slices of a volume [D, H, W, C]. With Z, each time (T) is a part 't000' ...; alone, T is
  the first axis of a clip [T, H, W, C], whose planes are these parts. Images of one file are parts 's00' ..., except
  pages of one shape without OME's metadata, which are channels. 'Min is white' pixels are inverted. Spacing is OME's,
  ImageJ's or that of the resolution tags, where these are not what is written for printers.

  A pyramid may be cut into tiles, see `options.slides`.

  Raises:
    ValueError, tifffile.TiffFileError, struct.error: damaged or truncated, or axes of another kind.
  """
  yield from _read(path, options, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline. Of slides the coarsest level is read, which tells where tissue is."""
  yield from _read(path, options, False)


def _read(path: str | os.PathLike, options: Options, pixels: bool) -> Iterator[Record]:
  from jaxmed.data.readers import slide

  if slide.wanted(path, options):
    yield from (slide.read if pixels else slide.outline)(path, options)
    return
  with no_complaints():
    tif = open_tiff(path)
    images = _images(tif)
  with tif:
    for part, index, series in images:
      with no_complaints():
        volumes, axes, record = _load(tif, index, series, pixels)
      yield from records(volumes, axes, record | {'subject': stem(path), 'source': 'tiff', 'part': part}, options)


def records(volumes: np.ndarray, axes: str, record: Record, options: Options) -> Iterator[Record]:
  """The records of [T, D, H, W, C]."""
  if 'T' in axes and len(volumes) > 1:
    yield from _in_time(volumes, record, options)
  elif volumes.shape[1] == 1:
    yield record | {'image': volumes[0, 0], 'spacing': record['spacing'] and record['spacing'][1:]}
  else:
    yield whole(volumes[0], record | {'spacing': _known(record['spacing'])})


def _in_time(volumes: np.ndarray, record: Record, options: Options) -> Iterator[Record]:
  step = record['meta'].get('frame_seconds')
  record = record | {'meta': {k: v for k, v in record['meta'].items() if k != 'frame_seconds'}}
  if volumes.shape[1] == 1 and options.volumes == 'whole':
    meta = record['meta'] | ({'frame_seconds': step} if step else {})
    yield record | {'image': volumes[:, 0], 'spacing': None, 'meta': meta}
    return
  for t, volume in enumerate(volumes):
    meta = record['meta'] | ({'frame_seconds': step * t} if step else {})
    here = record | {'part': f'{record["part"]}t{t:03d}', 'meta': meta}
    if len(volume) == 1:
      yield here | {'image': volume[0], 'spacing': record['spacing'] and record['spacing'][1:]}
    else:
      yield whole(volume, here | {'spacing': _known(record['spacing'])})


def _known(spacing: list | None) -> list[float] | None:
  return spacing if spacing and None not in spacing else None


def open_tiff(path: str | os.PathLike):
  """An open file. OME's metadata is left aside where they name other files: each file is read as what it holds.

  Raises:
    ValueError: the first page's tags are damaged.
  """
  import tifffile

  with no_complaints():  # before anything is made of damaged tags: that may take for ever
    tif = tifffile.TiffFile(path)
  if tif.is_ome:
    named = {e.get('FileName') or '' for e in _ome(tif).iter() if e.tag.endswith('UUID')} - {'', os.path.basename(path)}
    if len(named) > 1 or any('/' in n or '\\' in n or os.path.exists(_beside(path, n)) for n in named):
      tif.close()
      return tifffile.TiffFile(path, is_ome=False)
  return tif


def _beside(path, name: str) -> str:
  return os.path.join(os.path.dirname(os.path.abspath(path)), name)


def _images(tif) -> list[tuple[str, int, list]]:
  """(part, index among the file's images, series) of each image. Reduced ones and slides' labels are left out."""
  series = [s for s in tif.series if not s.keyframe.is_reduced] or list(tif.series[:1])
  if any(getattr(tif, f'is_{kind}') for kind in ('svs', 'ndpi', 'scn', 'bif', 'philips', 'qpi')):
    series = series[:1]
  first = series[0]
  alike = all((s.shape, s.dtype, s.axes) == (first.shape, first.dtype, first.axes) for s in series)
  if len(series) == 1 or (alike and not tif.is_ome):
    return [('', 0, series)]
  return [(f's{i:02d}', i, [s]) for i, s in enumerate(series)]


def _load(tif, index: int, series: list, pixels: bool) -> tuple[np.ndarray, str, Record]:
  """Pixels [T, D, H, W, C], the axes' names, and the record without them."""
  import tifffile

  first = series[0].keyframe
  check_size((len(series), *series[0].shape), series[0].dtype)
  axes = series[0].axes if len(series) == 1 else 'I' + series[0].axes
  several = [len(series)] if len(series) > 1 else []
  if not pixels:
    array = stand_in(*several, *series[0].shape)
  else:
    array = np.stack([s.asarray() for s in series]) if several else series[0].asarray()
  if pixels and first.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == 'u':
    array = np.array(2**first.bitspersample - 1, array.dtype) - array
  volume = arrange(array, axes)
  rgb = first.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
  if rgb and 'S' in axes and volume.shape[-1] == 4:
    volume = volume[..., :3]  # alpha is no measurement
  meta = {'orientation': 'native'} | ({'frame_seconds': step} if (step := _seconds(tif, index)) else {})
  return volume, axes, {'channels': channel_names(tif, index, volume.shape[-1], rgb),
                        'spacing': pixel_size(tif, index, first), 'meta': meta}


def channel_names(tif, index: int, count: int, rgb: bool) -> list[str]:
  """OME's or ImageJ's names if there are as many as channels, else R, G, B or numbers."""
  names = _ome_names(tif, index) or _imagej_names(tif)
  if len(names) == count == len(set(names)) and all(names):
    return names
  return ['R', 'G', 'B'] if rgb and count == 3 else numbered(count)


def arrange(array: np.ndarray, axes: str) -> np.ndarray:
  """Any axes -> [T, D, H, W, C], with T = D = 1 for a single plane."""
  unknown = set(axes) - set('TZCIQSYX')
  if unknown or 'Y' not in axes or 'X' not in axes:
    raise ValueError(f'axes {axes} of shape {list(array.shape)} are not those of an image')
  def is_depth(axis: int) -> bool:
    return axes[axis] == 'Z' or (axes[axis] in 'IQ' and array.shape[axis] > MAX_CHANNELS)
  time = [i for i in range(array.ndim) if axes[i] == 'T']
  depth = [i for i in range(array.ndim) if is_depth(i)]
  channel = [i for i in range(array.ndim) if axes[i] in 'CSIQ' and i not in depth]
  y, x = axes.index('Y'), axes.index('X')
  sizes = [int(np.prod([array.shape[i] for i in group])) for group in (time, depth, [y], [x], channel)]
  return array.transpose([*time, *depth, y, x, *channel]).reshape(sizes)


def pixel_size(tif, index: int, page) -> list[float | None] | None:
  """Spacing in mm along z, y, x (z None where unknown), or None: of OME, ImageJ, Aperio's MPP or resolution tags."""
  if tif.is_ome:
    pixels = _ome_pixels(tif, index)
    zyx = [_ome_length(pixels, a) for a in 'ZYX']
    return zyx if zyx[1] and zyx[2] else None
  resolution = [v for v in page.get_resolution()[::-1]] if 'XResolution' in page.tags else [0, 0]  # of y, x
  if tif.is_imagej:
    told = tif.imagej_metadata or {}
    mm = _TO_MM.get(str(told.get('unit') or '').strip().lower())
    depth = float(told.get('spacing') or 0)
    return [depth * mm or None, *(mm / r for r in resolution)] if mm and min(resolution) > 0 else None
  if tif.is_svs and (mpp := _aperio_mpp(page)):
    return [None, mpp / 1e3, mpp / 1e3]
  mm = {2: 25.4, 3: 10.0}.get(int(page.resolutionunit or 1))
  if mm is None or min(resolution) <= 1 or (mm == 25.4 and any(round(r) in _PRINT for r in resolution)):
    return None
  return [None, *(mm / r for r in resolution)]


def _aperio_mpp(page) -> float:
  import tifffile

  return float(tifffile.tifffile.svs_description_metadata(page.description).get('MPP') or 0)


def _seconds(tif, index: int) -> float | None:
  """Seconds between frames, by OME or ImageJ."""
  if tif.is_ome:
    pixels = _ome_pixels(tif, index)
    unit = _TO_SECONDS.get(pixels.get('TimeIncrementUnit') or 's', 0.0)
    return float(pixels.get('TimeIncrement') or 0) * unit or None
  return float((tif.imagej_metadata or {}).get('finterval') or 0) or None if tif.is_imagej else None


def _ome(tif) -> ElementTree.Element:
  return ElementTree.fromstring(tif.ome_metadata)


def _ome_image(tif, index: int) -> Any:
  images = [e for e in _ome(tif).iter() if e.tag.split('}')[-1] == 'Image'] if tif.ome_metadata else []
  return images[index] if index < len(images) else None


def _ome_pixels(tif, index: int) -> dict[str, str]:
  image = _ome_image(tif, index)
  found = [] if image is None else [e for e in image if e.tag.split('}')[-1] == 'Pixels']
  return dict(found[0].attrib) if found else {}


def _ome_length(pixels: dict[str, str], axis: str) -> float | None:
  mm = _TO_MM.get((pixels.get(f'PhysicalSize{axis}Unit') or 'µm').lower(), 0.0)
  return float(pixels.get(f'PhysicalSize{axis}') or 0) * mm or None


def _ome_names(tif, index: int) -> list[str]:
  image = _ome_image(tif, index)
  channels = [] if image is None else [e for e in image.iter() if e.tag.endswith('Channel')]
  return [e.get('Name') or '' for e in channels if e.get('Name') or e.get('ID')]


def _imagej_names(tif) -> list[str]:
  labels = (tif.imagej_metadata or {}).get('Labels') or []
  return [str(s) for s in ([labels] if isinstance(labels, str) else labels)]


class no_complaints(logging.Handler):
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
