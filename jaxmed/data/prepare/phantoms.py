"""Abdominal phantoms: synthetic volumes of soft organs with masks, for trials of segmentation; made by no scanner.

A phantom is a cube of about 300 mm, [z, y, x] growing to superior, anterior and right, of `size` voxels a side. Organs
are ellipsoids in a body of muscle and fat, bent by a smooth field that each subject draws, with places, axes and angles
of its own; soft at their edges, as partial volume makes them. CLASSES names their values. The kidneys differ by their
side alone, so a method that flips left and right mixes them up. Stomach and loops of bowel have no class, though some
look like one. One subject in five has no lesion.

CT is in Hounsfield units, int16, with noise; a subject is scanned in one of PHASES of contrast (column `phase`), which
changes what vessels, kidneys and spleen look like. MR is a remap of the same anatomy, uint16: other intensities of each
tissue, whose order is another one, a smooth bias, a gain of each subject and Rician noise. Masks of a subject are the
same in both, and so is its split.

Intensities are round numbers near those of textbooks, not fitted to data. What is learned here shows that a method
works and transfers, nothing of any patient or scanner.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from jaxmed.errors import UserError, choose

CLASSES = ('background', 'liver', 'spleen', 'kidney_right', 'kidney_left', 'aorta', 'vertebra', 'liver_lesion')
MODALITIES, PHASES = ('ct', 'mr'), ('native', 'arterial', 'portal')
TYPES = {'mask': pa.string(), 'phase': pa.string(), 'modality': pa.string(), 'intensity': pa.string()}
FIELD = 300.0  # mm of a side, give or take a twelfth by subject
SHARES = (0.7, 0.1, 0.2)  # of subjects in train, val, test, by their numbers

Shape = tuple[tuple[float, ...], tuple[float, ...]]
# Centre (z, y, x) and half axes of each ellipsoid, in half sides of the cube; x > 0 is the patient's right.
_BODY = ((0.0, 0.0, 0.0), (1.6, 0.68, 0.88))
_MUSCLE = ((0.0, 0.0, 0.0), (1.6, 0.58, 0.77))
_INNER = ((0.0, 0.06, 0.0), (1.5, 0.46, 0.64))
_OTHERS: dict[str, Shape] = {'stomach': ((0.38, 0.22, -0.26), (0.2, 0.17, 0.2))}
_ORGANS: dict[str, Shape] = {
  'liver': ((0.3, 0.1, 0.3), (0.42, 0.33, 0.3)), 'spleen': ((0.34, -0.18, -0.5), (0.26, 0.16, 0.12)),
  'kidney_right': ((-0.22, -0.24, 0.32), (0.26, 0.12, 0.12)),
  'kidney_left': ((-0.14, -0.24, -0.34), (0.26, 0.12, 0.12)),
  'aorta': ((0.0, -0.2, -0.07), (3.0, 0.065, 0.065)), 'vertebra': ((0.0, -0.4, 0.0), (3.0, 0.14, 0.16))}
# Intensity of each tissue, HU: native, arterial, portal; and MR, arbitrary units.
_CT = {'air': (-1000,) * 3, 'fat': (-100,) * 3, 'muscle': (50, 55, 60), 'inner': (-60,) * 3, 'stomach': (25, 30, 30),
       'bowel': (30, 45, 60), 'liver': (58, 75, 110), 'spleen': (48, 130, 120), 'kidney': (34, 160, 180),
       'aorta': (42, 320, 150), 'vertebra': (220, 220, 230), 'liver_lesion': (35, 45, 60)}
_MR = {'air': 5, 'fat': 420, 'muscle': 120, 'inner': 330, 'stomach': 90, 'bowel': 160, 'liver': 210, 'spleen': 140,
       'kidney': 170, 'aorta': 30, 'vertebra': 260, 'liver_lesion': 130}
_NOISE = {'ct': 14.0, 'mr': 12.0}

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What to make.

  Attributes:
    seed: of all that is drawn. subjects: how many. size: voxels of a side. modality: one of MODALITIES.
  """

  seed: int = 0
  subjects: int = 20
  size: int = 64
  modality: str = 'ct'

  def __post_init__(self):
    choose('modality of phantoms', self.modality, MODALITIES)
    if not 3 <= self.subjects <= 100_000:
      raise UserError(f'--subjects {self.subjects}: expected 3 to 100000, one for each split at least')
    if not 16 <= self.size <= 512:
      raise UserError(f'--size {self.size}: expected 16 to 512 voxels a side')


def told(wanted: Wanted) -> str:
  """What a card says of the corpus."""
  return (f'Synthetic: abdominal phantoms made by a generator (jaxmed.data.prepare.phantoms, seed {wanted.seed}, '
          f'modality {wanted.modality}), by no scanner. They show that a method works, and nothing of any patient.')


def subjects(wanted: Wanted) -> list[tuple[str, str]]:
  """(split, subject) of each phantom, without making it; no split is empty."""
  val = max(1, round(wanted.subjects * SHARES[1]))
  test = max(1, round(wanted.subjects * SHARES[2]))
  train = wanted.subjects - val - test
  of = lambda n: 'train' if n < train else 'val' if n < train + val else 'test'
  return [(of(n), f'phantom-{wanted.seed}-{n:04d}') for n in range(wanted.subjects)]


def records(wanted: Wanted) -> Iterator[Cut]:
  """Yields (record, split, path, sha256 of the pixels, extra columns) of the whole corpus, in a fixed order."""
  for number, (split, subject) in enumerate(subjects(wanted)):
    mask, tissues, spacing = anatomy(wanted.size, (wanted.seed, number))
    rng = np.random.default_rng((wanted.seed, number, 1 + MODALITIES.index(wanted.modality)))
    phase = PHASES[int(rng.integers(len(PHASES)))] if wanted.modality == 'ct' else None
    pixels = ct(tissues, phase, rng) if phase else mr(tissues, rng)
    record = {'image': pixels[..., None], 'channels': [wanted.modality.upper()], 'spacing': [spacing] * 3, 'mask': mask,
              'id': subject, 'source': f'phantoms-{wanted.modality}', 'subject': subject}
    extra = {'mask': 'generated', 'phase': phase, 'modality': wanted.modality.upper(),
             'intensity': 'hu' if phase else 'mr'}
    yield record, split, f'phantoms/seed-{wanted.seed}', hashlib.sha256(pixels.tobytes()).hexdigest(), extra


def anatomy(size: int, key: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
  """A mask [size, size, size] uint8, the share of each tissue in each voxel {name: [size]^3} (they sum to 1), and the
  spacing, mm. The same key gives the same anatomy at any size."""
  rng = np.random.default_rng((*key, 0))
  scale = float(rng.uniform(11 / 12, 13 / 12))
  grid = _bent(size, rng)
  soft = 2 / size  # a voxel, in half sides
  mask, shares = np.zeros(grid.shape[1:], np.uint8), {'air': np.ones(grid.shape[1:])}
  shape: Any
  for name, shape in (('fat', _BODY), ('muscle', _MUSCLE), ('inner', _INNER)):
    _lay(shares, name, _depth(grid, _drawn(shape, rng, 0.02)), soft)
  for name, shape in [*_OTHERS.items(), *((f'bowel{k}', _loop(rng)) for k in range(6))]:
    _lay(shares, name.rstrip('0123456789'), _depth(grid, _drawn(shape, rng, 0.08)), soft)
  for name, shape in _ORGANS.items():
    depth = _depth(grid, _drawn(shape, rng, 0.06))
    _lay(shares, name.partition('_')[0], depth, soft)
    mask[depth > 0] = CLASSES.index(name)
  for depth in _lesions(grid, rng):
    depth = np.where(mask == CLASSES.index('liver'), depth, np.minimum(depth, -soft))  # inside the liver alone
    _lay(shares, 'liver_lesion', depth, soft)
    mask[depth > 0] = CLASSES.index('liver_lesion')
  return mask, shares, FIELD * scale / size


def ct(tissues: Mapping[str, np.ndarray], phase: str, rng: np.random.Generator) -> np.ndarray:
  """HU [*grid] int16 of a phase; each tissue varies by subject, enhancement by up to a sixth."""
  at = PHASES.index(phase)
  value = {n: v[0] + (v[at] - v[0]) * rng.uniform(5 / 6, 7 / 6) + rng.normal(0, 3) for n, v in _CT.items()}
  image = _mixed(tissues, value)
  return (image + rng.normal(0, _NOISE['ct'], image.shape)).round().clip(-1024, 3071).astype(np.int16)


def mr(tissues: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
  """Intensities [*grid] uint16 of the same anatomy: other ones, a bias field, a gain and Rician noise."""
  value = {n: v * rng.uniform(0.9, 1.1) for n, v in _MR.items()}
  image = _mixed(tissues, value)
  axes = [np.linspace(-1, 1, n) for n in image.shape]
  slope = rng.uniform(-0.25, 0.25, 3)
  z, y, x = np.meshgrid(*(a * axis for a, axis in zip(slope, axes)), indexing='ij', sparse=True)
  field = np.exp(z + y + x)
  image = image * field * rng.uniform(0.7, 1.4)
  real, other = (rng.normal(0, _NOISE['mr'], image.shape) for _ in range(2))
  return np.hypot(image + real, other).round().clip(0, 65535).astype(np.uint16)


def _mixed(tissues: Mapping[str, np.ndarray], value: Mapping[str, float]) -> np.ndarray:
  """The mean of the tissues' values by their shares."""
  return np.sum([share * value[name] for name, share in tissues.items()], axis=0)


def _bent(size: int, rng: np.random.Generator) -> np.ndarray:
  """Coordinates [3, z, y, x] of the voxels' centres in [-1, 1], bent by a few waves of long period."""
  axis = (np.arange(size) + 0.5) * 2 / size - 1
  grid = np.stack(np.meshgrid(axis, axis, axis, indexing='ij'))
  bend = np.zeros_like(grid)
  for _ in range(4):
    wave, phase, way = rng.uniform(-2.5, 2.5, 3), rng.uniform(0, 2 * np.pi), rng.normal(0, 0.02, 3)
    bend += way[:, None, None, None] * np.sin(np.einsum('a,azyx->zyx', wave, grid) + phase)
  return grid + bend


def _drawn(shape: Shape, rng: np.random.Generator, much: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Centre, half axes and rotation of a subject's own ellipsoid."""
  centre = np.array(shape[0]) + rng.normal(0, much / 2, 3) * (np.array(shape[1]) < 1)
  axes = np.array(shape[1]) * rng.uniform(1 - 2 * much, 1 + 2 * much, 3)
  z, y, x = rng.normal(0, 1.5 * much, 3)
  turn = np.eye(3)
  for a, b, angle in ((1, 2, z), (0, 2, y), (0, 1, x)):
    step = np.eye(3)
    step[a, a] = step[b, b] = np.cos(angle)
    step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
    turn = turn @ step
  return centre, axes, turn


def _depth(grid: np.ndarray, shape: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
  """About how far inside an ellipsoid each place lies, in half sides of the cube; below 0 outside."""
  centre, axes, turn = shape
  own = np.einsum('ab,bzyx->azyx', turn, grid - centre[:, None, None, None]) / axes[:, None, None, None]
  return (1 - np.sqrt((own**2).sum(axis=0))) * axes.min()


def _lay(shares: dict[str, np.ndarray], name: str, depth: np.ndarray, soft: float) -> None:
  """Lays a tissue over the others, in part where its edge runs through a voxel."""
  part = np.clip(depth / soft + 0.5, 0, 1)
  for other in shares:
    shares[other] *= 1 - part
  shares[name] = shares.get(name, 0) + part


def _loop(rng: np.random.Generator) -> Shape:
  """A piece of bowel in the lower front."""
  centre = rng.uniform((-0.85, 0.1, -0.45), (-0.35, 0.36, 0.45))
  return tuple(centre.tolist()), tuple(rng.uniform(0.07, 0.16, 3).tolist())


def _lesions(grid: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
  """Depths inside one to three balls in the liver's middle; none in a fifth of the subjects."""
  number = int(rng.integers(1, 4)) * int(rng.uniform() < 0.8)
  centre, axes = (np.array(v) for v in _ORGANS['liver'])
  for _ in range(number):
    place = centre + axes * rng.uniform(-0.5, 0.5, 3)
    yield _depth(grid, (place, np.full(3, rng.uniform(0.06, 0.13)), np.eye(3)))
