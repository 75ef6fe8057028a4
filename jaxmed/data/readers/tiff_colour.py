"""What the samples of a TIFF mean: which are colours, which are none, and how the rows lie (TIFF 6.0)."""

import dataclasses
from typing import Any

import numpy as np

from jaxmed.data.readers.types import numbered

# PhotometricInterpretation: its name, and how many of the samples are colours (None: any number).
_WHITE, _BLACK, _RGB, _PALETTE, _MASK, _INKS, _YCBCR = range(7)
_READ: dict[int, int | None] = {_WHITE: 1, _BLACK: None, _RGB: 3, _PALETTE: 1, _MASK: 1, _INKS: None, _YCBCR: 3,
                                34892: None, 51177: 1, 52527: 1}  # LinearRaw, DepthMap and SemanticMask of DNG
_NAMES = {8: 'CIELab', 9: 'ICCLab', 10: 'ITULab', 32803: 'a colour filter array', 32844: 'LogL', 32845: 'LogLuv'}
_ORIENTATION, _SUBFILE, _INKSET, _INKNAMES, _COEFFICIENTS, _REFERENCE = 274, 255, 332, 333, 529, 532
# Compressions whose decoder gives R, G, B of YCbCr already: JPEG, JPEG 2000, JPEG XR, WebP, JPEG XL.
_DECODED = {6, 7, 22610, 33007, 34712, 34892, 34927, 34934, 50001, 50002, 52546}
_APERIO_YCBCR = 33003
_ALPHA = {1: 'alpha that the colours are multiplied by', 2: 'alpha'}


@dataclasses.dataclass(frozen=True)
class Samples:
  """How the samples of a pixel become channels: those that stay, the names of the channels, and what is noted."""

  kept: tuple[int, ...]
  names: tuple[str, ...]
  notes: tuple[str, ...] = ()


def is_secondary(page) -> bool:
  """Whether a page is a smaller copy or a transparency mask of another one (NewSubfileType, SubfileType)."""
  tags = getattr(page, 'tags', None)  # a page of a long series has none
  old = tags is not None and 254 not in tags and tags.valueof(_SUBFILE) == 2
  return bool(page.is_reduced or page.is_mask or old or page.photometric == _MASK)


def samples(tif, page, wanted: int | None = None, palette: bool = True) -> Samples:
  """What becomes of a page's samples; `wanted` is how many names the user gave, which may say that none is alpha.

  Alpha is what ExtraSamples calls so. tifffile writes a stack of four channels as RGB with alpha unless it is told
  otherwise: four samples of it that lie apart, or have more than 8 bits, are four channels.

  Raises:
    ValueError: tags that mean something that is not read.
  """
  _check(page)
  count, extra = int(page.samplesperpixel), tuple(int(e) for e in page.extrasamples or ())
  if page.photometric == _PALETTE and palette:
    table = _display_table(tif, page)
    return Samples((0,), ('gray',), (table,)) if table else Samples((0,), ('R', 'G', 'B'))
  alpha = [count - len(extra) + i for i, kind in enumerate(extra) if kind in _ALPHA and count > len(extra)]
  notes = [f'sample {i} left out: {_ALPHA[extra[i - count]]}' for i in alpha]
  deep = int(page.planarconfig) == 2 or page.dtype.itemsize > 1
  stack = page.photometric == _RGB and extra == (2,) and deep and (page.is_shaped or 'tifffile' in str(page.software))
  if alpha and (wanted == count or stack):
    alpha, notes = [], ['sample 3 is a channel, not alpha, as tifffile writes stacks'] if stack else []
  kept = tuple(i for i in range(count) if i not in alpha)
  return Samples(kept, _names(page, len(kept)), tuple(notes))


def values(array: np.ndarray, page, told: Samples) -> np.ndarray:
  """Samples [..., S] as stored -> channels [..., C]: palettes and YCbCr resolved, low for dark, alpha left out.

  Raises:
    ValueError: an index beyond the palette, or min-is-white of floating point.
  """
  if page.photometric == _PALETTE and len(told.names) == 3:
    return _resolved(array[..., 0], np.asarray(page.colormap))
  out = array if len(told.kept) == array.shape[-1] else array[..., list(told.kept)]
  if page.photometric == _WHITE:
    return np.concatenate([_inverted(out[..., :1], int(page.bitspersample)), out[..., 1:]], axis=-1)
  if _is_ycbcr(page):
    return np.concatenate([_rgb(out[..., :3], page), out[..., 3:]], axis=-1)
  return out


def orientation(page) -> int:
  """1 to 8, as Orientation says; 1 where it says nothing."""
  return int(page.tags.valueof(_ORIENTATION, 1) or 1)


def turned(volume: np.ndarray, way: int) -> np.ndarray:
  """[..., H, W, C] as it is to be shown: rows from the top, columns from the left; 5 to 8 exchange both."""
  volume = volume.swapaxes(-3, -2) if way >= 5 else volume
  rows, columns = way in (3, 4, 7, 8), way in (2, 3, 6, 7)  # that run the other way, once they lie as shown
  return volume[..., ::-1 if rows else 1, ::-1 if columns else 1, :]


def _check(page) -> None:
  kind = int(page.photometric)
  if kind not in _READ:
    raise ValueError(f'PhotometricInterpretation is {kind} ({_NAMES.get(kind, "unknown")}): expected gray, RGB, '
                     'palette, YCbCr or inks (0 to 6)')
  if page.dtype is None:
    raise ValueError(f'SampleFormat is {page.sampleformat} of {page.bitspersample} bits: expected integers or floating '
                     'point of a usual size')
  if isinstance(page.bitspersample, tuple) and kind != _RGB:
    raise ValueError(f'BitsPerSample is {page.bitspersample}: expected one number for all samples')
  if (colours := _READ[kind]) and page.samplesperpixel < colours:
    raise ValueError(f'SamplesPerPixel is {page.samplesperpixel}: expected at least {colours} for '
                     f'PhotometricInterpretation {kind}')
  if kind == _PALETTE and (page.colormap is None or page.dtype.kind not in 'bu'):
    raise ValueError('PhotometricInterpretation is 3 (palette), but there is no ColorMap for its values')
  if _is_ycbcr(page) and (page.is_subsampled or page.dtype != np.uint8):
    raise ValueError(f'YCbCr of {page.dtype}, YCbCrSubSampling {page.subsampling}, Compression '
                     f'{int(page.compression)}: expected uint8 without subsampling, or JPEG')


def _display_table(tif, page) -> str:
  """What is noted where a colour map only says how to show intensities, as programs of microscopes write it."""
  kinds = ('imagej', 'ome', 'fluoview', 'stk', 'lsm', 'micromanager', 'metaseries')
  shown = any(getattr(tif, f'is_{k}') for k in kinds)
  return 'ColorMap left out: it says how to show intensities' if shown else ''


def _names(page, count: int) -> tuple[str, ...]:
  if page.photometric in (_RGB, _YCBCR) and count == 3:
    return ('R', 'G', 'B')
  if page.photometric == _INKS:
    told = tuple(n for n in str(page.tags.valueof(_INKNAMES) or '').split('\0') if n)
    if len(told) == count == len(set(told)):
      return told
    if count == 4 and page.tags.valueof(_INKSET, 1) == 1:
      return ('C', 'M', 'Y', 'K')
  return tuple(numbered(count))


def _resolved(index: np.ndarray, table: np.ndarray) -> np.ndarray:
  """[..., 3] of indices and a table [3, N] of 16 bits: uint8 where no colour needs more."""
  index = index.astype(np.uint8) if index.dtype.kind == 'b' else index
  if index.size and int(index.max()) >= table.shape[1]:
    raise ValueError(f'index {int(index.max())} lies beyond its ColorMap of {table.shape[1]} colours')
  if table.max() < 256:  # some writers leave the high byte out
    table = table.astype(np.uint8)
  elif not (table % 257).any() or not (table % 256).any():
    table = (table >> 8).astype(np.uint8)
  return np.moveaxis(table[:, index], 0, -1)


def _inverted(array: np.ndarray, bits: int) -> np.ndarray:
  if array.dtype.kind in 'bi':
    return ~array
  if array.dtype.kind != 'u':
    raise ValueError('PhotometricInterpretation is 0 (min is white) of floating point: expected integers, as nothing '
                     'says which value is black')
  return np.array(2**bits - 1, array.dtype) - array


def _is_ycbcr(page) -> bool:
  """Whether the decoder leaves Y, Cb and Cr."""
  apart = int(page.planarconfig) != 1 or bool(page.extrasamples)  # decoded plane by plane, or without a colour space
  compression = int(page.compression)
  return compression == _APERIO_YCBCR or (page.photometric == _YCBCR and (apart or compression not in _DECODED))


def _rgb(array: np.ndarray, page) -> np.ndarray:
  """Y, Cb, Cr -> R, G, B by the tags YCbCrCoefficients and ReferenceBlackWhite (TIFF 6.0, sections 20 and 21)."""
  red, green, blue = _rationals(page, _COEFFICIENTS, (0.299, 0.587, 0.114))
  low = _rationals(page, _REFERENCE, (0, 255, 128, 255, 128, 255))
  y, cb, cr = ((array[..., i].astype(np.float64) - low[2 * i]) * (span / (low[2 * i + 1] - low[2 * i]))
               for i, span in enumerate((255, 127, 127)))
  r, b = y + cr * (2 - 2 * red), y + cb * (2 - 2 * blue)
  g = (y - blue * b - red * r) / green
  return np.stack([r, g, b], axis=-1).round().clip(0, 255).astype(np.uint8)


def _rationals(page, tag: int, default: tuple[float, ...]) -> tuple[float, ...]:
  told: Any = page.tags.valueof(tag)
  if told is None:
    return default
  pairs = np.asarray(told, np.float64).reshape(-1, 2) if len(told) == 2 * len(default) else np.ones((0, 2))
  if len(pairs) != len(default) or not pairs[:, 1].all():
    raise ValueError(f'tag {tag} holds {told}: expected {len(default)} fractions')
  return tuple(float(v) for v in pairs[:, 0] / pairs[:, 1])
