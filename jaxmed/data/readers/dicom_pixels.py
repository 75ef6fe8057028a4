"""DICOM pixels as numbers that mean something: bits, colour, modality transform, inversion, window."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmed.data.readers.dicom_headers import EXTRA, frame_count
from jaxmed.data.readers.types import check_size
from jaxmed.errors import UserError, need

_COLOUR = ('RGB', 'YBR_FULL', 'YBR_FULL_422', 'YBR_ICT', 'YBR_RCT')
_JPEG_EXTENDED = '1.2.840.10008.1.2.4.51'
# GDCM, which pydicom would take for most of these, ends the whole process at some damaged frames: it is never asked.
_BY_IMAGECODECS = {
  _JPEG_EXTENDED: 'jpeg_decode',  # of more than 8 bits, which none of pydicom's decoders reads
  '1.2.840.10008.1.2.4.57': 'jpeg8_decode', '1.2.840.10008.1.2.4.70': 'jpeg8_decode',  # lossless
  '1.2.840.10008.1.2.4.80': 'jpegls_decode', '1.2.840.10008.1.2.4.81': 'jpegls_decode',
}
_PLUGINS = {
  '1.2.840.10008.1.2.4.50': 'pillow', _JPEG_EXTENDED: 'pillow', '1.2.840.10008.1.2.5': 'pydicom',
  **{f'1.2.840.10008.1.2.4.{n}': 'pylibjpeg' for n in (90, 91, 201, 202, 203)},  # JPEG 2000 and HTJ2K
}
# MPEG-2, MPEG-4 and HEVC, whose UIDs may have a fragmentable twin.
_MPEG = '1.2.840.10008.1.2.4.10'
_VIDEOS = {f'{_MPEG}{n}' for n in range(9)} | {f'{_MPEG}{n}.1' for n in range(9)}
# Numbers with units: what is shown white for low values still is stored low for low.
_QUANTITIES = ('CT', 'PT')


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Frames [T, H, W, C] of a file after the modality transform, with their units, window and bits.

  `low` and `high` are the ends of the range that the stored bits can hold, after the transform.
  """

  frames: np.ndarray
  window: list[float] | None
  intensity: str
  notes: tuple[str, ...] = ()


def decode(data: Any, index: int | None = None) -> np.ndarray:
  """Frames as stored: [T, H, W, C], C being 3 for colour (RGB; palettes resolved) and 1 otherwise.

  Bits above the highest stored one (overlays) and below the lowest are left out; the sign is extended.

  Raises:
    ValueError: no pixels, colour of an unknown kind, or more than readers.MAX_BYTES; pydicom raises its own errors.
    UserError: a decoder is not installed.
  """
  pixels = need('pydicom.pixels', EXTRA)
  syntax = data.file_meta.TransferSyntaxUID
  if syntax in _VIDEOS:
    raise ValueError(f'TransferSyntaxUID is {syntax} ({syntax.name}): a video in DICOM is not read; expected images, '
                     'or the video as a file of its own')
  if not any(k in data for k in ('PixelData', 'FloatPixelData', 'DoubleFloatPixelData')):
    raise ValueError('holds no pixels')
  kind, samples = str(data.get('PhotometricInterpretation') or ''), int(data.get('SamplesPerPixel') or 1)
  if samples not in (1, 3) or (samples == 3 and kind not in _COLOUR):
    raise ValueError(f'{samples} samples a pixel of photometric interpretation {kind!r} are not read')
  count = frame_count(data) if index is None else 1
  bits = int(data.get('BitsAllocated') or 8)
  size = np.dtype(f'u{max(1, bits // 8)}')
  check_size((count, int(data.Rows), int(data.Columns), 3 if kind == 'PALETTE COLOR' else samples), size)
  if index is None and count > 1 and 'PixelData' in data and not syntax.is_encapsulated and kind != 'YBR_FULL_422':
    one = max(1, int(data.Rows) * int(data.Columns) * samples * bits)
    _check_frames(data, count, min(count, 8 * len(data.PixelData) / one))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    array = _decoded(pixels, data, index)
    _check_frames(data, count, array.size / max(1, int(data.Rows) * int(data.Columns) * samples))
    if kind == 'PALETTE COLOR':
      array = pixels.apply_color_lut(array, data)[..., :3]
      samples = 3
  return np.asarray(array).reshape(count, int(data.Rows), int(data.Columns), samples)


def _check_frames(data: Any, count: int, found: float) -> None:
  if found != count:
    raise ValueError(f'NumberOfFrames is {data.get("NumberOfFrames")}: the pixels are {found:g} frames of Rows '
                     f'{data.Rows}, Columns {data.Columns} and SamplesPerPixel {data.get("SamplesPerPixel")}')


def _decoded(pixels, data: Any, index: int | None) -> np.ndarray:
  syntax = data.file_meta.TransferSyntaxUID
  stored, high = int(data.get('BitsStored') or 0), data.get('HighBit')
  shift = int(high) + 1 - stored if high is not None and stored else 0
  if shift > 0 and not syntax.is_encapsulated:
    array = pixels.pixel_array(data, index=index, correct_unused_bits=False)
    spare = 8 * array.dtype.itemsize - stored
    return (array << (spare - shift)) >> spare  # of a signed type, the right shift extends the sign
  if syntax in _BY_IMAGECODECS and (syntax != _JPEG_EXTENDED or stored > 8):
    return _decode_frames(data, index, _BY_IMAGECODECS[syntax], stored)
  try:
    return pixels.pixel_array(data, index=index, decoding_plugin=_PLUGINS.get(syntax, ''))
  except StopIteration as e:
    raise ValueError(f'NumberOfFrames is {data.get("NumberOfFrames")}: the pixels are fewer frames') from e
  except RuntimeError as e:
    if 'missing dependencies' in str(e):
      raise UserError(f"{syntax.name} needs a decoder: pip install 'jaxmed[{EXTRA}]'") from e
    raise ValueError(f'{syntax.name}: the decoder cannot read the pixels') from e


def _decode_frames(data: Any, index: int | None, codec: str, stored: int) -> np.ndarray:
  """Frames of JPEG or JPEG-LS by imagecodecs: [(T,) H, W (, C)]."""
  import imagecodecs
  from pydicom.encaps import generate_frames, get_frame
  from pydicom.pixels import convert_color_space

  count = frame_count(data)
  coded = generate_frames(data.PixelData, number_of_frames=count) if index is None else [
    get_frame(data.PixelData, index, number_of_frames=count)]
  samples = int(data.SamplesPerPixel)
  rgb = {'colorspace': 'RGB', 'outcolorspace': 'RGB'} if codec == 'jpeg8_decode' and samples == 3 else {}
  frames = []
  for frame in coded:
    if _jpeg_shape(frame) != (int(data.Rows), int(data.Columns), samples):
      raise ValueError(f'a frame of {_jpeg_shape(frame)} rows, columns and samples is not as large as declared')
    frames.append(getattr(imagecodecs, codec)(frame, **rgb))
  if len(frames) != (count if index is None else 1):
    raise ValueError(f'NumberOfFrames is {data.get("NumberOfFrames")}: the pixels are {len(frames)} frames')
  array = np.stack(frames)
  if str(data.PhotometricInterpretation).startswith('YBR_FULL'):
    array = convert_color_space(array, str(data.PhotometricInterpretation), 'RGB')
  if int(data.PixelRepresentation):  # JPEG knows no sign
    spare = 8 * array.dtype.itemsize - stored
    array = (array.view(f'i{array.dtype.itemsize}') << spare) >> spare
  return array


def _jpeg_shape(frame: bytes) -> tuple[int, int, int]:
  """Rows, columns and samples by the frame header of JPEG (ITU-T T.81, B.2.2) or JPEG-LS (T.87).

  Raises:
    ValueError: no such header.
  """
  at = 2
  while at + 10 <= len(frame) and frame[at] == 0xFF:
    marker = frame[at + 1]
    if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
      return int.from_bytes(frame[at + 5 : at + 7]), int.from_bytes(frame[at + 7 : at + 9]), frame[at + 9]
    at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4])  # a marker may be filled up by FF
  raise ValueError('a frame is no JPEG: it has no header')


def transform(data: Any, raw: np.ndarray, value: Callable[[str], Any]) -> Pixels:
  """The modality transform, then MONOCHROME1 inverted: low + high - x, with the ends of the range that the bits
  stored can hold, after the transform. Values with units (CT, PET) are not inverted.

  Where one of slope and intercept is missing it is 1, or 0, which is noted. A rescale of whole numbers gives integers
  (int16 for CT where they fit), any other float32. The window (the first one) is in the same units and inverted alike;
  it is not applied.
  """
  modality = str(data.get('Modality') or '')
  window = _window(value)
  low, high = _range(data, raw)
  frames, ends, intensity = _modality(data, raw, value, modality, (low, high))
  notes = _half_told(value) if raw.shape[-1] == 1 and not data.get('ModalityLUTSequence') else ()
  if str(data.get('PhotometricInterpretation')) == 'MONOCHROME1':
    if modality in _QUANTITIES:
      notes += ('MONOCHROME1, not inverted: the values have units',)
    else:
      frames, window = _invert(frames, ends, window, str(value('VOILUTFunction') or 'LINEAR'))
  return Pixels(frames, window, intensity, notes)


def _half_told(value: Callable[[str], Any]) -> tuple[str, ...]:
  """What is noted where a header has one of both numbers of a rescale."""
  missing = [f'{name} is missing: {default} was taken'
             for name, default in (('RescaleSlope', 1), ('RescaleIntercept', 0)) if value(name) in (None, '')]
  return tuple(missing) if len(missing) == 1 else ()


def _range(data: Any, raw: np.ndarray) -> tuple[int, int]:
  bits = int(data.get('BitsStored') or 8 * raw.dtype.itemsize)
  return (-(1 << bits - 1), (1 << bits - 1) - 1) if raw.dtype.kind == 'i' else (0, (1 << bits) - 1)


def _modality(data, raw, value, modality, ends):
  """Pixels, the ends of their range, and what the numbers are."""
  intensity = {'MR': 'mr', 'PT': 'pet'}.get(modality, 'native')
  if raw.shape[-1] != 1 or raw.dtype.kind == 'f':
    return raw, ends, intensity
  if data.get('ModalityLUTSequence'):
    from pydicom.pixels import apply_modality_lut

    bits = int(data.ModalityLUTSequence[0].LUTDescriptor[2])
    return apply_modality_lut(raw, data), (0, (1 << bits) - 1), intensity
  told = tuple(None if v == '' else v for v in (value('RescaleSlope'), value('RescaleIntercept')))
  if told == (None, None):
    return raw, ends, intensity
  slope, intercept = (float(1 - i if v is None else v) for i, v in enumerate(told))
  if not np.isfinite([slope, intercept]).all() or slope == 0:
    raise ValueError(f'RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}: expected finite numbers, the slope '
                     'not 0')
  if modality == 'CT' and str(value('RescaleType') or 'HU').upper() in ('HU', 'US', 'HU_MOD'):
    intensity = 'hu'
  ends = tuple(sorted(e * slope + intercept for e in ends))
  if not slope.is_integer() or not intercept.is_integer():
    return (raw * slope + intercept).astype(np.float32), ends, intensity
  if (slope, intercept) == (1, 0) and intensity != 'hu':
    return raw, ends, intensity
  whole = raw.astype(np.int64) * int(slope) + int(intercept)
  if intensity == 'hu':
    ends_now, types = (whole.min(), whole.max()), (np.int16, np.int32)
  else:  # by what the bits can hold: all images of a kind get one type
    ends_now, types = ends, (raw.dtype, np.int16, np.uint16, np.int32)
  return whole.astype(_fitting(ends_now, types)), ends, intensity


def _fitting(ends, types) -> np.dtype:
  """The first type that holds both ends; int64 where none does."""
  fits = (np.dtype(t) for t in types if np.iinfo(t).min <= ends[0] and ends[1] <= np.iinfo(t).max)
  return next(fits, np.dtype(np.int64))


def _invert(frames, ends, window, function: str):
  low, high = ends
  if frames.min() < low or frames.max() > high:
    raise ValueError(f'pixels {frames.min()} to {frames.max()} go beyond what the bits stored can hold')
  if frames.dtype.kind == 'f':
    frames = np.float32(low + high) - frames
  else:
    frames = (int(low) + int(high) - frames.astype(np.int64)).astype(frames.dtype)  # within the same ends
  # A linear window of centre c is centred at c - 0.5 (DICOM PS3.3 C.11.2.1.2).
  if window:
    window = [low + high - window[0] + (0 if function == 'LINEAR_EXACT' else 1), window[1]]
  return frames, window


def _window(value: Callable[[str], Any]) -> list[float] | None:
  found = []
  for name in ('WindowCenter', 'WindowWidth'):
    number = value(name)
    if number is not None and not isinstance(number, str) and hasattr(number, '__len__'):
      number = number[0] if len(number) else None
    if number is None or number == '':
      return None
    found.append(float(number))
  return found if np.isfinite(found).all() and found[1] > 0 else None
