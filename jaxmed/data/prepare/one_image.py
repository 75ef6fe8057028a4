"""Training images of instruments from one background: the synthesis of "Rethinking Surgical Instrument Segmentation:
A Background Image Can Be All You Need" (Wang et al. 2022; numbers of
lofrienger/Single_SurgicalScene_For_Segmentation).

One background and two pictures of each tool, with masks, are changed into variants (50 of the background), and
blended (80 % one tool, 20 % two), and chains of operations are mixed (AugMix: width 3, depth 1 to 3,
x' = (1 - m) x + m sum_i w_i chain_i(x), w ~ Dirichlet(1), m ~ Beta(1, 1)). The mask is the union of the masks that are
pasted. Everything follows from (seed, number of the image).

Differs from the published code, on purpose:
  - A tool covers its mask; there, pure white of a tool becomes transparent, so that highlights are holes in the image
    but not in the mask.
  - The rotations, shears and shifts of its sets III and IV move image and mask together, once an image before the
    chains; there, chains move the image alone.
  - m weighs the chains, as in AugMix; there, it weighs the image. Beta(1, 1) is symmetric, so the law is the same.
  - Mixing is done once, when the corpus is made; there, anew in each epoch.
  - Changes of hue are gains of the channels; perspective is left out.

Background and tools come from the generator of `surgery`; what is trained is judged on its videos of another seed, or
look, whose backgrounds are others.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxmed.data.prepare import surgery
from jaxmed.errors import UserError, choose

CLASSES = ('background', 'instrument')
TYPES = {'mask': pa.string(), 'tools': pa.string(), 'variant': pa.int32(), 'mixing': pa.string()}
MIXING = ('none', 'I', 'II', 'III', 'IV')
WIDTH, DEPTH, LEVEL = 3, 3, 3
PICTURES = 2  # of each tool
TWO = 0.2  # fraction of the images with two tools
HELD_OUT = 0.1  # of the variants of the background, in val

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]
Sprite = tuple[str, np.ndarray, np.ndarray]  # tool, image [S, S, 3] float32, mask [S, S] bool


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What to make.

  Attributes:
    seed: of all that is drawn, background and tools included. images: how many. size: pixels of a side. mixing: 'none',
      or the set of operations: 'I' (autocontrast, equalise, posterise, solarise), 'II' (and colour, contrast,
      brightness, sharpness), 'III' (I, after a rotation, shear and shift) or 'IV' (II after one).
    variants: of the background.
  """

  seed: int = 0
  images: int = 1000
  size: int = 64
  mixing: str = 'II'
  variants: int = 50

  def __post_init__(self):
    choose('--mixing of one_image', self.mixing, MIXING)
    for name, low, high in (('images', 10, 1_000_000), ('size', 24, 512), ('variants', 10, 10_000)):
      if not low <= vars(self)[name] <= high:
        raise UserError(f'--{name} {vars(self)[name]}: expected {low} to {high}')


def told(wanted: Wanted) -> str:
  """What a card says of the corpus."""
  return (f'Synthetic: one generated background and {PICTURES * len(surgery.TOOLS)} pictures of tools, changed, pasted '
          f'and mixed (jaxmed.data.prepare.one_image, seed {wanted.seed}). There is no image of a patient in it.')


def subjects(wanted: Wanted) -> list[tuple[str, str]]:
  """(split, subject) of each image: the variant of the background is the subject, so that val has other ones."""
  val = max(1, round(wanted.variants * HELD_OUT))
  order = [n % wanted.variants for n in range(wanted.images)]
  return [('val' if k < val else 'train', f'background-{wanted.seed}-{k:04d}') for k in order]


def records(wanted: Wanted) -> Iterator[Cut]:
  """Yields (record, split, path, sha256 of the pixels, extra columns) of all images."""
  background, sprites = pictures(wanted.seed, wanted.size)
  for n, (split, subject) in enumerate(subjects(wanted)):
    image, mask, tools = made(background, sprites, wanted, n)
    extra = {'mask': 'generated', 'tools': '|'.join(tools), 'variant': n % wanted.variants, 'mixing': wanted.mixing}
    record = {'image': image, 'channels': ['R', 'G', 'B'], 'spacing': None, 'mask': mask, 'id': f'one-image/{n:06d}',
              'source': 'one_image', 'subject': subject}
    yield record, split, f'one_image/seed-{wanted.seed}', hashlib.sha256(image.tobytes()).hexdigest(), extra


def pictures(seed: int, size: int) -> tuple[np.ndarray, list[Sprite]]:
  """One background [S, S, 3] float32 without tools, and PICTURES of each tool of the generator, on their masks."""
  wanted = surgery.Wanted(seed, 3, 400, size)
  tracks = surgery.tracked(wanted, 0)
  fields = vars(tracks)
  first = lambda some: surgery.Tracks(**{k: x if k == 'entry' else x[some] for k, x in fields.items()})
  own, texture = surgery.look(seed, 0), surgery.textured(wanted, 0)
  clean = dataclasses.replace(first([0]), inside=np.zeros((1, len(surgery.TOOLS))))
  background = surgery.layers(own, clean, texture, size)[0][0]
  rng, sprites = np.random.default_rng((seed, 5)), []
  for tool, name in enumerate(surgery.TOOLS):
    for _ in range(PICTURES):
      inside, tip = np.zeros((1, len(surgery.TOOLS))), tracks.tip[:1].copy()
      inside[0, tool], tip[0, tool] = 1.0, rng.uniform(.35, .65, 2)
      image, mask = surgery.layers(own, dataclasses.replace(first([0]), inside=inside, tip=tip), texture, size)
      sprites.append((name, image[0], mask[0] == 2 + tool))
  return background, sprites


def made(background: np.ndarray, sprites: Sequence[Sprite], wanted: Wanted, number: int,
         ) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """(image [S, S, 3] uint8, mask [S, S] uint8, tools) of a number: a variant of the background, tools, mixing."""
  base = np.random.default_rng((wanted.seed, 6, number % wanted.variants))
  image = changed(background, base)
  rng = np.random.default_rng((wanted.seed, 7, number))
  mask, tools = np.zeros(image.shape[:2], bool), []
  for k in rng.permutation(len(sprites))[:2 if rng.uniform() < TWO else 1]:
    name, picture, shape = sprites[k]
    picture, shape = tool_changed(picture, shape, rng)
    image, mask = pasted(image, mask, picture, shape)
    tools.append(name)
  if wanted.mixing in ('III', 'IV'):
    image, mask = moved(image, mask, rng)
  if wanted.mixing != 'none':
    image = mixed(image, OPERATIONS[wanted.mixing], rng)
  return image.round().clip(0, 255).astype(np.uint8), mask.astype(np.uint8), tools


def pasted(image: np.ndarray, mask: np.ndarray, picture: np.ndarray, shape: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray]:
  """The image where a picture covers its shape [S, S] exactly, and the union of the masks."""
  return np.where(shape[..., None], picture, image), mask | shape


def changed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A variant of a background: flips, crop, brightness, colour, gain, contrast, a hole, an affine map; each with its
  published probability (0.3 where none is said)."""
  size = len(image)
  image = image[:, ::-1] if rng.uniform() < .5 else image
  image = image[::-1] if rng.uniform() < .2 else image
  if rng.uniform() < .3:
    share = rng.uniform(.05, .5)
    corner = rng.uniform(0, share, 2) * size
    image = warped(image, np.eye(2) * (1 - share), corner, 'reflect')
  if rng.uniform() < .3:
    image = image + rng.uniform(-40, 40)
  if rng.uniform() < .3:
    image = image + rng.uniform(-20, 20, 3)
  if rng.uniform() < .3:
    image = image * rng.uniform(.5, 1.5)
  if rng.uniform() < .3:
    image = 127.5 + (image - 127.5) * rng.uniform(.5, 2)
  if rng.uniform() < .15:
    (y, x), side = rng.integers(0, size, 2), max(size // 5, 1)
    image = image.copy()
    image[y:y + side, x:x + side] = 127.5
  if rng.uniform() < .3:
    image = warped(image, *affine(rng, size, (.8, 1.2), .2, 45, 20), 'reflect')
  return np.clip(image, 0, 255).astype(np.float32)


def tool_changed(picture: np.ndarray, shape: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """A variant of a tool, picture and mask alike: flips, an affine map (0.6), blur (0.4)."""
  from scipy import ndimage
  for axis, chance in ((1, .5), (0, .2)):
    if rng.uniform() < chance:
      picture, shape = np.flip(picture, axis), np.flip(shape, axis)
  if rng.uniform() < .6:
    way = affine(rng, len(picture), (.9, 1.1), .1, 45, 0)
    moved_shape = warped(shape, *way, 'constant')
    if moved_shape.any():
      picture, shape = warped(picture, *way, 'nearest'), moved_shape
  if rng.uniform() < .4:
    picture = ndimage.gaussian_filter(picture, (rng.uniform(0, 1),) * 2 + (0,))
  return picture, shape


def moved(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Image and mask under one rotation (30 degrees at most), shear and shift, as of AugMix at LEVEL."""
  degree = 30 * LEVEL / 10
  way = affine(rng, len(image), (1, 1), LEVEL / 30, degree, np.degrees(np.arctan(.3 * LEVEL / 10)))
  return warped(image, *way, 'reflect'), warped(mask, *way, 'reflect')


def affine(rng: np.random.Generator, size: int, scale: Sequence[float], shift: float, degrees: float, shear: float
           ) -> tuple[np.ndarray, np.ndarray]:
  """(matrix, offset) that lead a place of the result to one of the source, about the centre."""
  turn, slant = np.radians(rng.uniform(-degrees, degrees)), np.tan(np.radians(rng.uniform(-shear, shear)))
  rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
  low, high = scale
  matrix = rotation @ np.array([[1, slant], [0, 1]]) / rng.uniform(low, high)
  centre = np.full(2, (size - 1) / 2)
  return matrix, centre - matrix @ centre + rng.uniform(-shift, shift, 2) * size


def warped(image: np.ndarray, matrix: np.ndarray, offset: np.ndarray, beyond: str) -> np.ndarray:
  """An image [S, S, 3] by linear interpolation, or a mask [S, S] of bool by the nearest pixel."""
  from scipy import ndimage
  if image.dtype == bool:
    return ndimage.affine_transform(image.astype(np.uint8), matrix, offset, order=0, mode=beyond) > 0
  planes = [ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode=beyond) for c in range(3)]
  return np.stack(planes, axis=-1)


def mixed(image: np.ndarray, operations: Sequence[Callable], rng: np.random.Generator) -> np.ndarray:
  """An image [S, S, 3] of 0 .. 255 with chains of operations of its values, mixed as AugMix does."""
  weights, much = rng.dirichlet(np.ones(WIDTH)), rng.beta(1, 1)
  total = np.zeros_like(image)
  for weight in weights:
    x = image
    for _ in range(int(rng.integers(1, DEPTH + 1))):
      x = operations[int(rng.integers(len(operations)))](x, rng.uniform(0, LEVEL) / 10, rng)
    total += np.float32(weight) * x
  return ((1 - much) * image + much * total).clip(0, 255)


def _autocontrast(x, level, rng):
  low, high = x.min(axis=(0, 1)), x.max(axis=(0, 1))
  return (x - low) * (255 / np.maximum(high - low, 1))


def _equalise(x, level, rng):
  ranks = [np.searchsorted(np.sort(x[..., c], axis=None), x[..., c], side='right') for c in range(3)]
  return np.stack(ranks, axis=-1).astype(np.float32) * (255 / x[..., 0].size)


def _posterise(x, level, rng):
  step = 2.0 ** (8 - max(4 - int(4 * level), 1))
  return np.floor(x / step) * step


def _solarise(x, level, rng):
  return np.where(x < 256 - 256 * level, x, 255 - x)


def _towards(other: Callable[[np.ndarray], Any]) -> Callable:
  """An operation that goes from, or towards, another image by up to 1.8 times the level, as PIL's enhancers do."""
  def operation(x, level, rng):
    factor = 1 + rng.choice((-1, 1)) * 1.8 * level
    return (factor * x + (1 - factor) * other(x)).clip(0, 255)
  return operation


def _soft(x):
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode='edge')
  size = len(x)
  return sum(padded[i:i + size, j:j + size] for i in range(3) for j in range(3)) / 9


_FIRST = (_autocontrast, _equalise, _posterise, _solarise)
_SECOND = (*_FIRST, _towards(lambda x: x.mean(axis=-1, keepdims=True)), _towards(lambda x: x.mean()),
           _towards(lambda x: 0.0), _towards(_soft))
OPERATIONS = {'I': _FIRST, 'II': _SECOND, 'III': _FIRST, 'IV': _SECOND}
