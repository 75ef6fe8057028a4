"""Corruptions of images in stored intensities, in five severities: functions of arrays, and a source that applies them.

The families are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) that medical images know, with
ghosting and bias field of magnetic resonance (Perez-Garcia et al. 2021, arXiv 2003.04696) and changes of stain (Ruifrok
and Johnston 2001; Tellez et al. 2018). Severities are ours: in standard deviations of a channel over the corpus, and in
fractions of the image's side, so that they suit any modality and size.
"""

import dataclasses
import functools
import io
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.augment import color
from jaxmed.augment import intensity as intensity_lib
from jaxmed.data.corpus.source import PIXELS, Source
from jaxmed.data.resize import resize
from jaxmed.errors import UserError, choose

SEVERITIES = (1, 2, 3, 4, 5)
_HELD = 1 << 30  # bytes of clean images that are kept for the next severity
_8BIT = 'uint8'


@dataclasses.dataclass(frozen=True)
class Image:
  """What a corruption knows of an image beside its pixels.

  names: of its C channels. std: [C], deviation of each channel over the corpus, in stored units. top: the largest value
  of the stored type, 0 for floating point.
  """

  names: tuple[str, ...]
  std: np.ndarray
  top: float


Change = Callable[[np.ndarray, Image, int, np.random.Generator], np.ndarray]


def noise(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Adds Gaussian noise of 0.1, 0.2, 0.35, 0.5, 0.75 deviations of the channel."""
  return x + _at(severity, 0.1, 0.2, 0.35, 0.5, 0.75) * image.std * rng.standard_normal(x.shape)


def blur(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Gaussian blur with a deviation of 1, 1.5, 2, 3, 4 % of each side."""
  from scipy.ndimage import gaussian_filter
  share = _at(severity, 0.01, 0.015, 0.02, 0.03, 0.04)
  return gaussian_filter(x, [*(share * n for n in x.shape[:-1]), 0], mode='mirror')


def compression(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """JPEG of quality 60, 35, 20, 12, 7: red, green and blue together, each other channel as gray."""
  quality, out = int(_at(severity, 60, 35, 20, 12, 7)), x.copy()
  rgb = color.rgb_ids(image.names)
  groups = [rgb[i:i + 3] for i in range(0, len(rgb), 3)] + [(c,) for c in range(x.shape[-1]) if c not in rgb]
  for group in groups:
    out[..., list(group)] = _jpeg(x[..., list(group)], quality)
  return out


def brightness(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Adds, or takes away, 0.25, 0.5, 0.75, 1, 1.5 deviations of the channel; the same sign for all channels."""
  return x + rng.choice([-1, 1]) * _at(severity, 0.25, 0.5, 0.75, 1.0, 1.5) * image.std


def contrast(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Shrinks the distance from the mean of each channel of the image to 75, 60, 45, 30, 15 %."""
  mean = x.mean(axis=tuple(range(x.ndim - 1)))
  return mean + (x - mean) * _at(severity, 0.75, 0.6, 0.45, 0.3, 0.15)


def ghosting(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Weakens every second to fourth line of k-space along an axis of the plane by 20, 35, 50, 70, 90 %.

  The lines at the centre stay. The image has faint copies of itself along the axis, as of a periodic motion.
  """
  axis, every = x.ndim - 2 - int(rng.integers(2)), int(rng.integers(2, 5))
  n = x.shape[axis]
  weight = np.ones(n)
  weight[::every] = 1 - _at(severity, 0.2, 0.35, 0.5, 0.7, 0.9)
  middle = max(1, n // 50)
  weight[:middle] = weight[n - middle + 1:] = 1.0  # lowest frequencies, of either sign
  spectrum = np.fft.fft(x, axis=axis) * weight.reshape(-1, *[1] * (x.ndim - 1 - axis))
  return np.real(np.fft.ifft(spectrum, axis=axis))


def bias_field(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Multiplies by a smooth field with coefficients in +- 0.1, 0.2, 0.3, 0.45, 0.6, see `augment.intensity.bias_field`.

  What is multiplied is the distance from the smallest value of the channel in the image.
  """
  grid = x.shape[:-1]
  count = math.comb(intensity_lib.DEGREE + len(grid), intensity_lib.DEGREE)
  coefficients = _at(severity, 0.1, 0.2, 0.3, 0.45, 0.6) * rng.uniform(-1, 1, (1, 1, count))
  field = np.asarray(_field(coefficients.astype(np.float32), grid))[0]
  low = x.min(axis=tuple(range(x.ndim - 1)))
  return low + (x - low) * field


def stain(x: np.ndarray, image: Image, severity: int, rng: np.random.Generator) -> np.ndarray:
  """More or less of haematoxylin, eosin and DAB: factors 1 +- s and shifts +- s of the optical density of each.

  s is 0.05, 0.1, 0.15, 0.2, 0.3; see `augment.color.stain`.
  """
  s, out = _at(severity, 0.05, 0.1, 0.15, 0.2, 0.3), x.copy()
  factor, shift = s * rng.choice([-1, 1], (2, 1, 3)).astype(np.float32)
  rgb = color.rgb_ids(image.names)
  for i in range(0, len(rgb), 3):
    group = list(rgb[i:i + 3])
    planes = np.moveaxis(x[..., group], -1, 0)[:, None].astype(np.float32) / image.top
    out[..., group] = np.moveaxis(np.asarray(_stain(planes, 1 + factor, shift))[:, 0], 0, -1) * image.top
  return out


KINDS: dict[str, Change] = {
    f.__name__: f for f in (noise, blur, compression, brightness, contrast, ghosting, bias_field, stain)}


def suited(source: Any) -> dict[str, str]:
  """{corruption: '' where it suits all records of the source, else why it does not}.

  compression: of 8-bit images in 2D. stain: of images with red, green and blue in an unsigned type. ghosting and bias
  field: of images without these.
  """
  channels, dtypes = source.distinct('channels')[1], source.distinct('dtype')[1]
  plane = all(len(shape) == 3 for shape in source.distinct('shape')[1])
  coloured = [bool(color.rgb_ids(names)) for names in channels]
  unsigned = all(np.dtype(d).kind == 'u' for d in dtypes)
  out = dict.fromkeys(KINDS, '')
  if not plane or set(dtypes) != {_8BIT}:
    out['compression'] = 'images are not all 8-bit and 2D'
  if not all(coloured) or not unsigned:
    out['stain'] = 'images do not all have red, green and blue in an unsigned type'
  if any(coloured):
    out['ghosting'] = out['bias_field'] = 'some images have red, green and blue'
  return out


def corrupt(x: np.ndarray, names: Sequence[str], std: np.ndarray, kind: str, severity: int,
            seed: Sequence[int]) -> np.ndarray:
  """An image [*grid, C] of any number type, corrupted; of the same type, cut to its range.

  Args:
    names: of the channels. std: [C], deviations over the corpus in stored units. seed: the same numbers give the same
      corruption, which grows with the severity.
  Raises:
    UserError: an unknown corruption or severity.
  """
  change = KINDS[choose('corruption', kind, KINDS)]
  if severity not in SEVERITIES:
    raise UserError(f'severity {severity}: expected one of 1 .. 5')
  whole = x.dtype.kind in 'iu'
  info = np.iinfo(x.dtype) if whole else None
  image = Image(tuple(names), np.asarray(std, np.float64), float(info.max) if info else 0.0)
  out = change(x.astype(np.float64), image, severity, np.random.default_rng(seed))
  if info:
    out = np.clip(np.rint(out), info.min, info.max)
  return out.astype(x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Corrupted(Source):
  """A source whose images have the encoder's grid and one corruption, the same one of a record at each reading.

  Attributes:
    size: the grid. kind: the corruption, '' for none. severity: 1 .. 5. seed: of what is random, with the record's id.
    held: clean images by their places, which several such sources share, at most 1 GiB.
  """

  size: tuple[int, ...] = ()
  kind: str = ''
  severity: int = 1
  seed: int = 0
  held: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

  def record(self, i: int, wanted: Sequence[str] = PIXELS) -> dict[str, Any]:
    """The record of row i, its image resized and corrupted."""
    if 'image' not in wanted:
      return super().record(i, wanted)
    i = self._row(i)
    place = int(self._key[i]), int(self._place[i])
    image = self.held.get(place)
    record = super().record(i, wanted if image is None else tuple(w for w in wanted if w != 'image'))
    if image is None:
      image = resize(record['image'], self.size)
      if (len(self.held) + 1) * image.nbytes <= _HELD:
        self.held[place] = image
    if self.kind:
      std = np.array([self.stats[c]['std'] for c in record['channels']])
      seed = self.seed, zlib.crc32(self.table['id'][i].as_py().encode()), list(KINDS).index(self.kind)
      image = corrupt(image, record['channels'], std, self.kind, self.severity, seed)
    return record | {'image': image}


def corrupted(source: Source, size: Sequence[int], kinds: Sequence[str], severities: Sequence[int],
              seed: int = 0) -> dict[tuple[str, int], Corrupted]:
  """The source with each corruption and severity, {(kind, severity): source}; ('', 0) is the clean one."""
  fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source)}
  held: dict[tuple[int, int], np.ndarray] = {}
  make = functools.partial(Corrupted, **fields, size=tuple(size), seed=seed, held=held)
  return {('', 0): make()} | {(k, s): make(kind=k, severity=s) for k, s in itertools.product(kinds, severities)}


def _at(severity: int, *amounts: float) -> float:
  return amounts[severity - 1]


def _jpeg(x: np.ndarray, quality: int) -> np.ndarray:
  from PIL import Image as Pillow
  buffer = io.BytesIO()
  pixels = x.astype(np.uint8)
  Pillow.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(buffer, 'JPEG', quality=quality)
  with Pillow.open(buffer) as image:
    return np.asarray(image, np.float64).reshape(x.shape)


_field = jax.jit(intensity_lib.bias_field, static_argnums=1)
_stain = jax.jit(color.stain)
