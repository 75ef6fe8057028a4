"""Whole slides: tiles of tissue at a stated resolution, by tifffile or, for formats that need it, by OpenSlide."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxmed.data.readers import tiff_colour
from jaxmed.data.readers.tiff_pages import channel_names, no_complaints, open_tiff, pixel_size
from jaxmed.data.readers.types import DEFAULT, SUFFIXES, Options, Record, check_size, number, stand_in, stem, suffix
from jaxmed.data.resize import resize
from jaxmed.errors import need

# Formats that are no TIFF pyramids, or whose levels tifffile does not put together.
OPENSLIDE = ('.mrxs', '.vms', '.vmu', '.bif', '.svslide')
LARGE = 100_000_000  # pixels: a larger pyramid is cut into tiles unless the user says otherwise
TISSUE = 0.25  # of a tile must be tissue
_MASK_SIDE = 2048  # pixels at most along a side of the image that tissue is looked for in
_MIN_SATURATION = 0.05  # below it nothing is tissue, however blank the slide


@dataclasses.dataclass(frozen=True)
class Level:
  """One resolution: its shape (H, W), and a function (y0, y1, x0, x1) -> [h, w, C]."""

  shape: tuple[int, int]
  read: Callable[[int, int, int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slide:
  """Levels, the finest first; microns per pixel of the finest along y and x; names of the channels; what else is
  known of all tiles (see readers.META)."""

  levels: tuple[Level, ...]
  mpp: tuple[float, float]
  channels: tuple[str, ...]
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)


def wanted(path: str | os.PathLike, options: Options) -> bool:
  """Whether a TIFF is to be cut into tiles: the user says so, or it is a pyramid of more than LARGE pixels."""
  if options.slides == 'tiles':
    return True
  with no_complaints(), open_tiff(path) as tif:
    first = tif.series[0]
    sizes = dict(zip(first.axes, first.shape))
    return len(first.levels) > 1 and sizes.get('Y', 0) * sizes.get('X', 0) > LARGE


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields the tiles [tile, tile, C] of a slide that are tissue for at least a quarter, row by row.

  Tiles lie side by side at `options.mpp` microns per pixel, read from the coarsest level that is not coarser and made
  smaller by a triangle filter; those that would reach beyond the edge are left out. Tissue is where the saturation (of
  colour) or the intensity (of fluorescence) of a coarse level is above Otsu's threshold. Labels are not looked at. Part
  'x1024y512' and `tile_xy` are a tile's corner in pixels of the finest level.

  Raises:
    ValueError: no resolution is told, or one coarser than asked for; no tissue; damaged.
    UserError: zarr, or OpenSlide for the formats that need it, is not installed.
  """
  with _open(path) as slide:
    yield from tiles(slide, {'subject': stem(path), 'source': 'slide'}, options)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline. The coarsest level is read, which tells where tissue is."""
  with _open(path) as slide:
    yield from tiles(slide, {}, options, pixels=False)


def tiles(slide: Slide, record: Record, options: Options, pixels: bool = True) -> Iterator[Record]:
  """Yields the tiles of an open slide. See `read`; without `pixels`, stand-ins (see `outline`)."""
  level, scale = _level(slide, options)
  tissue = tissue_mask(slide)
  tile = [options.tile * options.mpp / m for m in slide.mpp]  # pixels of the finest level along y, x
  height, width = slide.levels[0].shape
  rows, columns = int(height // tile[0]), int(width // tile[1])
  found = 0
  for r, c in ((r, c) for r in range(rows) for c in range(columns)):
    box = [r * tile[0], (r + 1) * tile[0], c * tile[1], (c + 1) * tile[1]]
    if _covered(tissue, box, slide.levels[0].shape) >= TISSUE:
      found += 1
      tile_ = _tile(slide, level, scale, box, options) if pixels else {
        'image': stand_in(options.tile, options.tile, len(slide.channels)), 'spacing': None, 'part': ''}
      yield record | tile_ | {'channels': list(slide.channels)}
  if not found:
    raise ValueError(f'none of {rows * columns} tiles is tissue')


def _tile(slide: Slide, level: Level, scale: tuple[float, float], box, options: Options) -> Record:
  y0, x0 = round(box[0]), round(box[2])
  ends = [int(round(b / scale[i // 2])) for i, b in enumerate(box)]
  region = level.read(ends[0], max(ends[1], ends[0] + 1), ends[2], max(ends[3], ends[2] + 1))
  return {
    'image': resize(region, (options.tile, options.tile)), 'spacing': [options.mpp / 1e3] * 2, 'part': f'x{x0}y{y0}',
    'meta': slide.meta | {'orientation': 'native', 'tile_xy': [x0, y0], 'level_mpp': float(options.mpp)},
  }


def _level(slide: Slide, options: Options) -> tuple[Level, tuple[float, float]]:
  """The coarsest level that is as fine as asked for (1 % aside), and how much coarser than the finest it is."""
  if max(slide.mpp) > 1.01 * options.mpp:
    raise ValueError(f'its finest level has {max(slide.mpp):.3g} microns per pixel: coarser than mpp={options.mpp:g}')
  full = slide.levels[0].shape
  for level in sorted(slide.levels, key=lambda lv: lv.shape[0] * lv.shape[1]):
    scale = full[0] / level.shape[0], full[1] / level.shape[1]
    if max(scale[0] * slide.mpp[0], scale[1] * slide.mpp[1]) <= 1.01 * options.mpp:
      return level, scale
  return slide.levels[0], (1.0, 1.0)


def tissue_mask(slide: Slide) -> np.ndarray:
  """[h, w] bool, of the coarsest level, every n-th pixel of it where it is large."""
  level = min(slide.levels, key=lambda lv: lv.shape[0] * lv.shape[1])
  height, width = level.shape
  check_size((height, width, len(slide.channels)), np.dtype(np.uint8))
  step = -(-max(height, width) // _MASK_SIDE)
  image = level.read(0, height, 0, width)[::step, ::step].astype(np.float32)
  if len(slide.channels) != 3:
    value = image.mean(axis=-1)
    return value > otsu(value)
  high = image.max(axis=-1)
  saturation = (high - image.min(axis=-1)) / np.maximum(high, 1)
  return saturation > max(otsu(saturation), _MIN_SATURATION)


def otsu(values: np.ndarray) -> float:
  """The threshold between two classes of values whose variance within the classes is least (Otsu, 1979); 256 bins."""
  counts, edges = np.histogram(values, bins=256)
  centres = (edges[:-1] + edges[1:]) / 2
  low, high = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
  below = np.cumsum(counts * centres) / np.maximum(low, 1)
  above = np.cumsum((counts * centres)[::-1])[::-1] / np.maximum(high, 1)
  between = low[:-1] * high[1:] * (below[:-1] - above[1:]) ** 2
  best = np.flatnonzero(between == between.max())
  return float(edges[1:][(best[0] + best[-1]) // 2])  # an empty valley is cut in its middle


def _covered(mask: np.ndarray, box, shape: tuple[int, int]) -> float:
  y0, y1 = (int(b * mask.shape[0] / shape[0]) for b in box[:2])
  x0, x1 = (int(b * mask.shape[1] / shape[1]) for b in box[2:])
  return float(mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean())


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[Slide]:
  if SUFFIXES.get(suffix(path) or '') == 'slide' and suffix(path) in OPENSLIDE:
    with open_openslide(path) as slide:
      yield slide
    return
  zarr = need('zarr', 'medical')
  with no_complaints(), open_tiff(path) as tif:
    series = tif.series[0]
    extra = [a for a, n in zip(series.axes, series.shape) if a not in 'YXSC' and n > 1]
    if extra or 'Y' not in series.axes or 'X' not in series.axes or {'S', 'C'} <= set(series.axes):
      raise ValueError(f'axes {series.axes} of shape {list(series.shape)} are not those of a slide')
    size = (pixel_size(tif, 0, series.keyframe) or [None] * 3)[1:]
    if size[0] is None or size[1] is None:
      raise ValueError('does not say how large its pixels are: no tiles of a stated resolution can be cut')
    told = tiff_colour.samples(tif, series.keyframe)
    if (way := tiff_colour.orientation(series.keyframe)) != 1:
      raise ValueError(f'Orientation is {way}: expected 1 of a slide that is cut into tiles')
    levels = [_tiff_level(zarr, series, i, told) for i in range(len(series.levels))]
    count = len(told.names) * dict(zip(series.axes, series.shape)).get('C', 1)
    names = channel_names(tif, 0, count, told.names)
    yield Slide(tuple(levels), (size[0] * 1e3, size[1] * 1e3), tuple(names))


def _tiff_level(zarr, series, index: int, told: tiff_colour.Samples) -> Level:
  level = series.levels[index]
  array = zarr.open_array(series.aszarr(level=index), mode='r')
  axes = level.axes

  def read_box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    box = {'Y': slice(y0, y1), 'X': slice(x0, x1), 'C': slice(None), 'S': slice(None)}
    part = np.asarray(array[tuple(box.get(a, 0) for a in axes)])
    left = [a for a in axes if a in box]
    part = np.moveaxis(part, left.index('S'), -1) if 'S' in left else part[..., None]
    part = tiff_colour.values(part, series.keyframe, told)
    left = [a for a in left if a != 'S']
    return np.moveaxis(part, left.index('C'), 2)[..., 0] if 'C' in left else part
  return Level((level.shape[axes.index('Y')], level.shape[axes.index('X')]), read_box)


@contextlib.contextmanager
def open_openslide(path: str | os.PathLike) -> Iterator[Slide]:
  """A slide by OpenSlide; transparent pixels, which were not scanned, become white."""
  openslide = need('openslide', 'slides')
  with openslide.OpenSlide(pathlib.Path(path)) as handle:
    mpp = [number(handle.properties.get(f'openslide.mpp-{a}'), f'openslide.mpp-{a}') for a in 'yx']
    if not all(mpp):
      raise ValueError('does not say how large its pixels are: no tiles of a stated resolution can be cut')

    def level(i: int) -> Level:
      width, height = handle.level_dimensions[i]
      down = handle.level_downsamples[i]

      def read_box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        rgba = np.asarray(handle.read_region((round(x0 * down), round(y0 * down)), i, (x1 - x0, y1 - y0)))
        alpha = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha)) // 255).astype(np.uint8)
      return Level((height, width), read_box)
    yield Slide(tuple(level(i) for i in range(handle.level_count)), (mpp[0], mpp[1]), ('R', 'G', 'B'))
