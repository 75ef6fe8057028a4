"""TIFF by tifffile: several pages or samples become channels, named by OME or ImageJ where present."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from jaxmed.data.readers import ome_set, slide, tiff_colour
from jaxmed.data.readers.tiff_pages import (
  channel_names,
  no_complaints,
  ome_names,
  ome_root,
  ome_uuid,
  open_tiff,
  pixel_size,
  seconds,
)
from jaxmed.data.readers.types import (
  DEFAULT,
  MAX_CHANNELS,
  Options,
  Record,
  check_size,
  stand_in,
  stem,
  whole,
)


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the images of a file as [H, W, C], or volumes [D, H, W, C].

  Axes are tifffile's. C, S and an unnamed page axis (I or Q, at most MAX_CHANNELS long) are channels; Z and a longer
  unnamed page axis are the slices of a volume [D, H, W, C]. With Z, each time (T) is a part 't000' ...; alone, T is
  the first axis of a clip [T, H, W, C], whose planes are these parts. Images of one file are parts 's00' ..., except
  pages of one shape without OME's metadata, which are channels. Colours, alpha and orientation: see
  readers.tiff_colour; smaller copies and transparency masks are left out. Spacing is OME's, ImageJ's or that of the
  resolution tags, where these are not what is written for printers.

  A pyramid may be cut into tiles, see `options.slides`.

  Raises:
    ValueError, tifffile.TiffFileError, struct.error: damaged or truncated, or axes of another kind.
  """
  yield from _read(path, options, True)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline. Of slides the coarsest level is read, which tells where tissue is."""
  yield from _read(path, options, False)


def read_indices(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields what `read` does, with the numbers of colours where there is a palette: labels of a mask."""
  yield from _read(path, options, True, palette=False)


def _read(path: str | os.PathLike, options: Options, pixels: bool, palette: bool = True) -> Iterator[Record]:
  if slide.wanted(path, options):
    yield from (slide.read if pixels else slide.outline)(path, options)
    return
  with no_complaints():
    tif = open_tiff(path)
    images, note = _own(tif, path)
    images = images or _images(tif)
  with tif:
    for part, index, series in images:
      with no_complaints():
        volumes, axes, record = _load(tif, index, series, options.channels if palette else None, pixels, palette)
      record['meta'] |= {'notes': '; '.join(filter(None, (record['meta'].get('notes'), note)))} if note else {}
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


def _own(tif, path: str | os.PathLike) -> tuple[list[tuple[str, int, list]], str]:
  """What `_images` gives of a file of an OME set, and a note on what is missing; nothing of another file."""
  if tif.is_ome or (root := ome_root(tif)) is None:
    return [], ''
  if not (others := ome_set.others(root, ome_uuid(tif), path)) and not list(root.findall('.//{*}Image')):
    return [], 'the file with its metadata (BinaryOnly) is missing: names and spacing are unknown'
  missing = [n for n in others if not ome_set.is_there(path, n)]
  note = f'{len(missing)} of {len(others) + 1} files of its OME set are missing: {", ".join(missing[:3])}'
  planes = ome_set.own_planes(root, ome_uuid(tif), tif, os.path.basename(path))
  several = len(planes) > 1
  return [(f's{p.index:02d}' if several else '', p.index, [p]) for p in planes], note if missing else ''


def _images(tif) -> list[tuple[str, int, list]]:
  """(part, index among the file's images, series) of each image. Reduced ones and slides' labels are left out."""
  series = [s for s in tif.series if not tiff_colour.is_secondary(s.keyframe)] or list(tif.series[:1])
  if any(getattr(tif, f'is_{kind}') for kind in ('svs', 'ndpi', 'scn', 'bif', 'philips', 'qpi')):
    series = series[:1]
  first = series[0]
  alike = all((s.shape, s.dtype, s.axes) == (first.shape, first.dtype, first.axes) for s in series)
  if len(series) == 1 or (alike and not tif.is_ome):
    return [('', 0, series)]
  return [(f's{i:02d}', i, [s]) for i, s in enumerate(series)]


def _load(tif, index: int, series: list, names: Sequence[str] | None, pixels: bool, palette: bool = True,
          ) -> tuple[np.ndarray, str, Record]:
  """Pixels [T, D, H, W, C], the axes' names, and the record without them."""
  first = series[0].keyframe
  told = tiff_colour.samples(tif, first, len(names) if names else None, palette)
  check_size((len(series), *series[0].shape, len(told.names) if 'S' not in series[0].axes else 1), series[0].dtype)
  _check_pages([p for s in series for p in s.pages])
  axes = series[0].axes if len(series) == 1 else 'I' + series[0].axes
  several = [len(series)] if len(series) > 1 else []
  if not pixels:
    array = stand_in(*several, *series[0].shape)
  else:
    array = np.stack([s.asarray() for s in series]) if several else series[0].asarray()
  array, axes = _samples_last(array, axes)
  array = tiff_colour.values(array, first, told) if pixels else stand_in(*array.shape[:-1], len(told.names))
  way = tiff_colour.orientation(first)
  volume = tiff_colour.turned(arrange(array, axes), way)
  meta = {'orientation': 'native'} | ({'frame_seconds': step} if (step := seconds(tif, index)) else {})
  meta |= {'notes': '; '.join(told.notes)} if told.notes else {}
  z, y, x = pixel_size(tif, index, first) or (None, None, None)
  return volume, axes, {'channels': _names(tif, index, series[0], volume.shape[-1], told.names), 'meta': meta,
                        'spacing': None if y is None else [z, x, y] if way >= 5 else [z, y, x]}


def _names(tif, index: int, series, count: int, otherwise: Sequence[str]) -> list[str]:
  """The names of the channels; of a file of an OME set, of those that it holds."""
  if isinstance(series, ome_set.Planes):
    names = ome_names(tif, index)
    own = [names[c] for c in series.channels if c < len(names)]
    return own if len(own) == count == len(set(own)) and all(own) else channel_names(tif, -1, count, otherwise)
  return channel_names(tif, index if tif.is_ome or ome_root(tif) is None else -1, count, otherwise)


def _samples_last(array: np.ndarray, axes: str) -> tuple[np.ndarray, str]:
  if 'S' not in axes:
    return array[..., None], axes + 'S'
  return np.moveaxis(array, axes.index('S'), -1), axes.replace('S', '') + 'S'


def _check_pages(pages: list) -> None:
  """Raises a ValueError where pages of one image lie in different ways or have different colours."""
  pages = [p for p in pages if getattr(p, 'tags', None) is not None]  # of a long series, the first alone
  ways = sorted({tiff_colour.orientation(p) for p in pages})
  if len(ways) > 1:
    raise ValueError(f'Orientation differs between pages of one image: {ways}')
  tables = [p.colormap for p in pages if p.colormap is not None]
  if any(not np.array_equal(t, tables[0]) for t in tables[1:]):
    raise ValueError('ColorMap differs between pages of one image: expected one for all')


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
