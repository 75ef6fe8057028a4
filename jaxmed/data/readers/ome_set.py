"""One file of an OME-TIFF set, whose metadata list planes of several files (OME model, TiffData).

Each file is read as what it holds: its own planes, with the names of their channels, whether or not the others are
there.
"""

import dataclasses
import os
from typing import Any
from xml.etree import ElementTree

import numpy as np


@dataclasses.dataclass(frozen=True)
class Planes:
  """The pages of one image that lie in a file, with what tifffile's series have; `channels` are their numbers."""

  index: int
  channels: tuple[int, ...]
  pages: tuple[Any, ...]
  grid: tuple[int, int, int]  # times, planes, channels

  keyframe = property(lambda self: self.pages[0])
  dtype = property(lambda self: self.pages[0].dtype)
  shape = property(lambda self: (*self.grid, *self.pages[0].shape))
  axes = property(lambda self: 'TZC' + self.pages[0].axes)

  def asarray(self) -> np.ndarray:
    """The pixels, of that shape."""
    return np.stack([p.asarray() for p in self.pages]).reshape(self.shape)


def parse(text: str | bytes, where: str) -> ElementTree.Element:
  """The root of some OME-XML; a ValueError says where it lies and what is wrong."""
  try:
    return ElementTree.fromstring(text)
  except ElementTree.ParseError as e:
    raise ValueError(f'{where} holds OME-XML that does not parse ({e}): expected well-formed XML') from e


def companion(root: ElementTree.Element, path: str) -> str | None:
  """The file beside `path` that holds the metadata of a file with pixels alone, where it says so and this is there."""
  found = root.find('{*}BinaryOnly')
  name = '' if found is None else found.get('MetadataFile') or ''
  beside = os.path.join(os.path.dirname(os.path.abspath(path)), name)
  return beside if name and os.path.basename(name) == name and os.path.isfile(beside) else None


def others(root: ElementTree.Element, own: str | None, path: str | os.PathLike) -> list[str]:
  """The other files of the set, sorted; none where there is no set. `own` is the file's UUID.

  A file that has another name than its only one in the metadata was renamed.
  """
  name = os.path.basename(path)
  told = {e.get('FileName') or '': (e.text or '').strip() for e in root.findall('.//{*}UUID')}
  names = sorted(n for n, uuid in told.items() if n and n != name and not (own and uuid == own))
  renamed = name not in told and len(names) == 1 and own is None and not is_there(path, names[0])
  return [] if renamed else names


def is_there(path: str | os.PathLike, name: str) -> bool:
  """Whether a file of the set lies beside another one."""
  return os.path.exists(os.path.join(os.path.dirname(os.path.abspath(path)), name))


def own_planes(root: ElementTree.Element, own: str | None, tif: Any, name: str) -> list[Planes]:
  """What of each image lies in a file; empty where the metadata do not say, or its planes make no whole grid."""
  found = []
  for index, image in enumerate(root.findall('.//{*}Image')):
    if (pixels := image.find('{*}Pixels')) is None:
      continue
    pages = _pages(pixels, own, name)
    if not pages:
      continue
    axes = [sorted({at[i] for at in pages}) for i in range(3)]
    places = [(t, z, c) for t in axes[0] for z in axes[1] for c in axes[2]]
    if set(places) != set(pages) or max(pages.values()) >= len(tif.pages):
      return []
    chosen = tuple(tif.pages[pages[at]] for at in places)
    if any((p.shape, p.dtype, p.axes) != (chosen[0].shape, chosen[0].dtype, chosen[0].axes) for p in chosen):
      return []
    found.append(Planes(index, tuple(axes[2]), chosen, (len(axes[0]), len(axes[1]), len(axes[2]))))
  return found


def _pages(pixels: ElementTree.Element, own: str | None, name: str) -> dict[tuple[int, int, int], int]:
  """{(time, plane, channel): page} of a file."""
  order = [a for a in (pixels.get('DimensionOrder') or 'XYCZT') if a in 'CZT']
  size = {a: max(1, int(pixels.get(f'Size{a}') or 1)) for a in 'CZT'}
  size['C'] = len(pixels.findall('{*}Channel')) or size['C']  # samples of colour are one channel
  found: dict[tuple[int, int, int], int] = {}
  for data in pixels.findall('{*}TiffData'):
    uuid = data.find('{*}UUID')
    if uuid is not None and uuid.get('FileName') != name and not (own and (uuid.text or '').strip() == own):
      continue
    at = {a: int(data.get(f'First{a}') or 0) for a in 'CZT'}
    start = at[order[0]] + size[order[0]] * (at[order[1]] + size[order[1]] * at[order[2]])
    total = size['C'] * size['Z'] * size['T']
    count = int(data.get('PlaneCount') or (1 if data.get('IFD') else total))
    for k in range(min(count, total - start)):
      rest, place = start + k, {}
      for axis in order:
        rest, place[axis] = divmod(rest, size[axis])
      found[place['T'], place['Z'], place['C']] = int(data.get('IFD') or 0) + k
  return found
