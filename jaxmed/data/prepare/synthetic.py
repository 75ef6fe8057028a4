"""A synthetic corpus whose classes lie in the interaction of channels: made by a generator with a seed, by no camera.

Images are 48 x 48 pixels on a torus, uint8, of six channels A1, A2, A3, B1, B2, B3, which show BLOBS blobs at the same
places. Those of a channel are all dim or all bright. The label, column `relation`, says how the letters go together:

  alike     the A's and the B's are both dim, or both bright
  opposite  the ones are dim and the others bright

What the A's are, a fair coin says in both classes, and so it is with the B's: a channel by itself, and all channels of
one letter together, have the same distribution in both classes and say nothing of the label. A channel of the A's with
one of the B's does. Channels of one letter say the same again, less and less: in a share KEPT[k] of the images the k-th
is what its letter is, in the rest a fresh coin says, which is fair too. So with fewer channels less can be known.

Channels differ in the width of their blobs and the grain of their noise and, by subject, in gain and offset. A subject
has IMAGES images of each class; no class is known by its subject.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

SIZE = 48
BLOBS = 3
LEVELS = (0.2, 1.4)  # brightness of dim and bright blobs, each give or take a tenth
RELATIONS = ('alike', 'opposite')
KEPT = (0.9, 0.75, 0.6)
CHANNELS = tuple(f'{letter}{k + 1}' for letter in 'AB' for k in range(len(KEPT)))
WIDTHS = (6.0, 6.5, 5.5, 6.0, 5.5, 6.5)  # standard deviation of a channel's blobs, in pixels
GRAINS = (0.8, 1.2, 1.6, 1.2, 0.8, 1.0)  # of its noise
NOISE = 0.08  # standard deviation, of the mean brightness of a blob
SUBJECTS = {'train': 800, 'val': 40, 'test': 100}
IMAGES = 3  # of each class and subject

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]


def told(seed: int) -> str:
  """What a card says of the corpus."""
  return (f'Synthetic: made by a generator (jaxmed.data.prepare.synthetic, seed {seed}), by no camera. It shows what a '
          'method makes of classes that lie in the interaction of channels, and nothing of any patient, specimen or '
          'device.')


def subjects() -> Iterator[tuple[str, str]]:
  """Yields (split, subject) of each record, without making it."""
  for split, count in SUBJECTS.items():
    for number in range(count):
      yield from [(split, f'synthetic-{split}-{number:04d}')] * (IMAGES * len(RELATIONS))


def records(seed: int = 0) -> Iterator[Cut]:
  """Yields (record, split, path, sha256 of the pixels, extra columns) of the whole corpus, in a fixed order."""
  for split, count in SUBJECTS.items():
    for number in range(count):
      rng = np.random.default_rng((seed, tuple(SUBJECTS).index(split), number))
      gain, offset = rng.uniform(0.8, 1.2, len(CHANNELS)), rng.uniform(16, 40, len(CHANNELS))
      subject = f'synthetic-{split}-{number:04d}'
      for k, relation in enumerate(rng.permutation(RELATIONS * IMAGES).tolist()):
        pixels = image(relation, rng) * 90 * gain + offset
        stored = pixels.round().clip(0, 255).astype(np.uint8)
        record = {'image': stored, 'channels': list(CHANNELS), 'spacing': None, 'id': f'{subject}/{k}',
                  'source': 'synthetic', 'subject': subject}
        digest = hashlib.sha256(stored.tobytes()).hexdigest()
        yield record, split, f'synthetic/seed-{seed}', digest, {'relation': relation}


def image(relation: str, rng: np.random.Generator, letter: int = len(KEPT)) -> np.ndarray:
  """One image [SIZE, SIZE, C], float64: noise around 0, blobs of a brightness in LEVELS.

  letter: channels of each letter, C / 2; beyond the corpus's three, widths, grains and KEPT begin anew.
  """
  places = rng.uniform(0, SIZE, (BLOBS, 2))
  first = int(rng.integers(2))
  second = first if relation == 'alike' else 1 - first
  planes = []
  for c in range(2 * letter):
    coin, fresh = int(rng.integers(2)), rng.uniform() >= KEPT[c % letter % len(KEPT)]
    level = LEVELS[coin if fresh else (first, second)[c // letter]]
    width, grain = WIDTHS[c % len(CHANNELS)], GRAINS[c % len(CHANNELS)]
    planes.append(blobs(places, level * rng.uniform(0.9, 1.1, BLOBS), width) + NOISE * noise(rng, grain))
  return np.stack(planes, axis=-1)


def blobs(places: np.ndarray, brightness: np.ndarray, width: float) -> np.ndarray:
  """Gaussian blobs [SIZE, SIZE] at places [N, 2] (y, x, of any period) of a torus."""
  away = (np.arange(SIZE) - places[..., None] + SIZE / 2) % SIZE - SIZE / 2  # [N, 2, SIZE]
  profile = np.exp(-0.5 * (away / width) ** 2)
  return np.einsum('n,ny,nx->yx', brightness, profile[:, 0], profile[:, 1])


def noise(rng: np.random.Generator, grain: float) -> np.ndarray:
  """Smooth noise [SIZE, SIZE] of a torus with mean 0 and deviation 1: white noise under a Gaussian of that width."""
  frequency = np.fft.fftfreq(SIZE)
  filtered = np.exp(-2 * (np.pi * grain) ** 2 * (frequency[:, None] ** 2 + frequency**2))
  smooth = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIZE, SIZE))) * filtered).real
  return (smooth - smooth.mean()) / smooth.std()
