"""PNG and JPEG by Pillow; colour PNG of 16 bit by imagecodecs, as Pillow would halve its depth."""

import os
import pathlib
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from jaxmed.data.readers.types import DEFAULT, Options, Record, numbered, stand_in, stem

_RGB = ['R', 'G', 'B']


def read(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields one record: [H, W, 1] ('gray') or [H, W, 3] ('R', 'G', 'B'), uint8 or uint16.

  Palettes are resolved, an alpha channel is dropped (it is no measurement), the EXIF orientation is applied.

  Raises:
    OSError, SyntaxError, ValueError: damaged or truncated.
    PIL.Image.DecompressionBombError: more than 2 * PIL.Image.MAX_IMAGE_PIXELS pixels are declared.
  """
  del options
  depth, colour, pixels = _png_header(path)
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
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    with Image.open(path) as handle:
      width, height = handle.size
  yield {'image': stand_in(height, width, 1), 'channels': numbered(1), 'spacing': None, 'part': ''}


def _decode(path: str | os.PathLike) -> np.ndarray:
  with warnings.catch_warnings():
    # Pillow warns at half of the size that it refuses; whole-slide exports lie between.
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    with Image.open(path) as handle:
      image = ImageOps.exif_transpose(handle)
      image.load()
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
