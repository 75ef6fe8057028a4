"""The pages of a TIFF file and what its metadata says of them (OME, ImageJ, Aperio, resolution tags)."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from jaxmed.data.readers import ome_set
from jaxmed.data.readers.types import number, numbered

_TO_MM = {
  'm': 1e3, 'cm': 10.0, 'mm': 1.0, 'µm': 1e-3, 'μm': 1e-3, 'um': 1e-3, 'micron': 1e-3, 'microns': 1e-3,
  'micrometer': 1e-3, '\\u00b5m': 1e-3, 'nm': 1e-6, 'å': 1e-7, 'pm': 1e-9, 'inch': 25.4, 'in': 25.4,
  'millimeter': 1.0, 'centimeter': 10.0, 'nanometer': 1e-6,
}
_TO_SECONDS = {'s': 1.0, 'sec': 1.0, 'ms': 1e-3, 'µs': 1e-6, 'min': 60.0, 'h': 3600.0}
# Dots per inch that programs write for screens and printers: they say nothing of what was imaged.
_PRINT = (72, 96, 100, 150, 200, 300, 600, 1200)


def open_tiff(path: str | os.PathLike):
  """An open file. OME's metadata is left aside where they name other files: each file is read as what it holds, see
  readers.ome_set.

  Raises:
    ValueError: the first page's tags are damaged, or the XML of OME is.
  """
  import tifffile

  with no_complaints():  # before anything is made of damaged tags: that may take for ever
    tif = tifffile.TiffFile(path)
  try:
    if (root := ome_root(tif)) is not None and (ome_set.others(root, ome_uuid(tif), path) or _is_binary(tif)):
      tif.close()
      return tifffile.TiffFile(path, is_ome=False)
  except ValueError:
    tif.close()
    raise
  return tif


def ome_root(tif) -> ElementTree.Element | None:
  """OME's metadata, of the file itself or, where it says so, of the one beside it that holds them; None without."""
  root = _own_root(tif)
  if root is None or (beside := ome_set.companion(root, tif.filehandle.path)) is None:
    return root
  with open(beside, 'rb') as f:
    return ome_set.parse(f.read(), os.path.basename(beside))


def ome_uuid(tif) -> str | None:
  """The UUID that the file has in its set."""
  root = _own_root(tif)
  return None if root is None else root.get('UUID')


def _own_root(tif) -> ElementTree.Element | None:
  text = tif.pages.first.description
  return ome_set.parse(text, 'ImageDescription') if text[-10:].strip().endswith('OME>') else None


def _is_binary(tif) -> bool:
  root = _own_root(tif)
  return root is not None and root.find('{*}BinaryOnly') is not None


def channel_names(tif, index: int, count: int, otherwise: Sequence[str] = ()) -> list[str]:
  """OME's or ImageJ's channel names where their number fits, else the other ones, else numbers."""
  names = ome_names(tif, index) or _imagej_names(tif)
  if len(names) == count == len(set(names)) and all(names):
    return names
  return list(otherwise) if len(otherwise) == count else numbered(count)


def pixel_size(tif, index: int, page) -> list[float | None] | None:
  """Spacing in mm along z, y, x (z None where unknown), or None: of OME, ImageJ, Aperio's MPP or resolution tags."""
  if ome_root(tif) is not None:
    pixels = _ome_pixels(tif, index)
    zyx = [_ome_length(pixels, a) for a in 'ZYX']
    return zyx if zyx[1] and zyx[2] else None
  resolution = [v for v in page.get_resolution()[::-1]] if 'XResolution' in page.tags else [0, 0]  # of y, x
  if tif.is_imagej:
    told = tif.imagej_metadata or {}
    mm = _TO_MM.get(str(told.get('unit') or '').strip().lower())
    depth = number(told.get('spacing'), 'spacing')
    return [depth * mm or None, *(mm / r for r in resolution)] if mm and min(resolution) > 0 else None
  if tif.is_svs and (mpp := _aperio_mpp(page)):
    return [None, mpp / 1e3, mpp / 1e3]
  mm = {2: 25.4, 3: 10.0}.get(int(page.resolutionunit or 1))
  if mm is None or min(resolution) <= 1 or (mm == 25.4 and any(round(r) in _PRINT for r in resolution)):
    return None
  return [None, *(mm / r for r in resolution)]


def _aperio_mpp(page) -> float:
  import tifffile

  return number(tifffile.tifffile.svs_description_metadata(page.description).get('MPP'), 'MPP')


def seconds(tif, index: int) -> float | None:
  """Seconds between frames, by OME or ImageJ."""
  if ome_root(tif) is not None:
    pixels = _ome_pixels(tif, index)
    unit = _TO_SECONDS.get(pixels.get('TimeIncrementUnit') or 's', 0.0)
    return number(pixels.get('TimeIncrement'), 'TimeIncrement') * unit or None
  return number((tif.imagej_metadata or {}).get('finterval'), 'finterval') or None if tif.is_imagej else None


def _ome_image(tif, index: int) -> Any:
  root = ome_root(tif)
  images = [] if root is None else list(root.findall('.//{*}Image'))
  return images[index] if 0 <= index < len(images) else None


def _ome_pixels(tif, index: int) -> dict[str, str]:
  image = _ome_image(tif, index)
  found = [] if image is None else [e for e in image if e.tag.split('}')[-1] == 'Pixels']
  return dict(found[0].attrib) if found else {}


def _ome_length(pixels: dict[str, str], axis: str) -> float | None:
  mm = _TO_MM.get((pixels.get(f'PhysicalSize{axis}Unit') or 'µm').lower(), 0.0)
  return number(pixels.get(f'PhysicalSize{axis}'), f'PhysicalSize{axis}') * mm or None


def ome_names(tif, index: int) -> list[str]:
  """The names of an image's channels, '' where one has none."""
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
      raise ValueError(_plain(self.seen[0]))


def _plain(complaint: str) -> str:
  """A complaint about a tag with the tag's name and what it may hold."""
  import tifffile

  if not (found := re.match(r'<tifffile\.TiffTag (\d+) .*raised .*?[\'"(](-?\d+) is not a valid (\w+)', complaint)):
    return complaint
  code, value, values = found.groups()
  name = str(tifffile.TIFF.TAGS.get(int(code)) or f'tag {code}')  # type: ignore[call-overload]
  valid = sorted(int(v) for v in getattr(tifffile, values, ()))
  return f'{name} is {value}: expected one of {", ".join(map(str, valid))}'

