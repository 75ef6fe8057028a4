"""PNG, JPEG and other images of one plane by Pillow; by imagecodecs where Pillow would halve their depth (colour of 16
bit); the family of PNM by readers.pnm, as Pillow would scale their values."""

import os
import pathlib
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from jaxmed.data.readers import pnm
from jaxmed.data.readers.types import DEFAULT, Options, Record, numbered, stand_in, stem

_RGB = ['R', 'G', 'B']
# What Pillow may take a file for, whatever its suffix: other formats run programs, or lose what pixels mean.
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'GIF', 'WEBP', 'TGA', 'PCX', 'QOI', 'JPEG2000')
_ANIMATED = ('PNG', 'GIF', 'WEBP')


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields one record: [H, W, 1] ('gray') or [H, W, 3] ('R', 'G', 'B'), uint8 or uint16 (PFM: float32).

  Palettes are resolved, an alpha channel is dropped (it is no measurement), the EXIF orientation is applied.

  Raises:
    OSError, SyntaxError, ValueError: damaged or truncated, or several frames.
    PIL.Image.DecompressionBombError: more than 2 * PIL.Image.MAX_IMAGE_PIXELS pixels are declared.
  """
  del options
  depth, colour, pixels = _png_header(path)
  with open(path, 'rb') as f:
    image = pnm.decode(f, told) if (told := pnm.header(f)) else None
  if image is None:
    if depth == 16 and colour != 0:
      _refuse_bomb(pixels)
      image = _decode_deep(path, colour)
    else:
      image = _decode(path)
  names = numbered(1) if image.shape[-1] == 1 else _RGB
  yield {'image': image, 'channels': names, 'spacing': None, 'subject': stem(path), 'source': 'image',
         'part': ''}


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """See readers.outline."""
  del options
  with open(path, 'rb') as f:
    told = pnm.header(f)
  if told:
    width, height = told.width, told.height
  else:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      with Image.open(path, formats=FORMATS) as handle:
        width, height = handle.size
  yield {'image': stand_in(height, width, 1), 'channels': numbered(1), 'spacing': None, 'part': ''}


def _decode(path: str | os.PathLike) -> np.ndarray:
  with warnings.catch_warnings():
    # Pillow warns at half of the size that it refuses; whole-slide exports lie between.
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    with Image.open(path, formats=FORMATS) as handle:
      kind, frames = str(handle.format), getattr(handle, 'n_frames', 1)
      if kind in _ANIMATED and frames > 1:
        raise ValueError(f'is an animation of {frames} frames ({kind}): expected one frame, or a video')
      image = ImageOps.exif_transpose(handle)
      image.load()
  if kind == 'JPEG2000' and (deep := _decode_jpeg2000(path, image.mode)) is not None:
    return deep
  if image.mode in ('I', 'I;16', 'I;16L', 'I;16B', 'F', 'L'):
    return np.asarray(image)[..., None]
  if image.mode in ('1', 'LA', 'La'):
    return np.asarray(image.convert('L'))[..., None]
  return np.asarray(image.convert('RGB'))


def _decode_deep(path: str | os.PathLike, colour: int) -> np.ndarray:
  import imagecodecs

  image = np.asarray(imagecodecs.png_decode(pathlib.Path(path).read_bytes()))
  if image.ndim == 2:
    image = image[..., None]
  return image[..., :-1] if colour in (4, 6) else image  # colour types 4 and 6 carry alpha


def _decode_jpeg2000(path: str | os.PathLike, mode: str) -> np.ndarray | None:
  """[H, W, C] of more than 8 bits, without alpha; None of 8 bits."""
  import imagecodecs

  image = np.asarray(imagecodecs.jpeg2k_decode(pathlib.Path(path).read_bytes()))
  if image.dtype.itemsize == 1:
    return None
  image = image if image.ndim == 3 else image[..., None]
  return image[..., :-1] if mode in ('LA', 'RGBA') else image


def _refuse_bomb(pixels: int) -> None:
  limit = Image.MAX_IMAGE_PIXELS
  if limit is not None and pixels > 2 * limit:
    raise Image.DecompressionBombError(f'{pixels} pixels are declared; more than {2 * limit} are refused')


def _png_header(path: str | os.PathLike) -> tuple[int, int, int]:
  """Bit depth, colour type and number of pixels of a PNG; zeros for another file."""
  with open(path, 'rb') as f:
    head = f.read(26)
  if len(head) < 26 or not head.startswith(b'\x89PNG'):
    return 0, 0, 0
  width, height, depth, colour = struct.unpack('>IIBB', head[16:26])
  return depth, colour, width * height
