"""What a corpus with masks is like, as nnU-Net's planner wants it: spacings, shapes, intensities of the foreground.

Spacings and shapes are those of the manifest. Intensities come from the pixels whose mask is above 0, of at most
`MOST_READ` records and with the same number of draws from each, as in MIC-DKFZ/nnUNet fingerprint_extractor.py; which
reads every record, and first cuts images to what is not zero.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxmed.data.corpus.labels import BACKGROUND, VALUES, labels_of
from jaxmed.errors import UserError

MOST_READ = 200  # records
DRAWS = 1 << 22  # pixels of a channel, in all
PERCENTILES = (0.5, 50.0, 99.5)
SEED = 1234


@dataclasses.dataclass(frozen=True)
class Foreground:
  """Intensities of a channel where a mask is above 0, in native units: percentiles 0.5, 50 and 99.5 and moments."""

  low: float
  median: float
  high: float
  mean: float
  std: float

  @property
  def constants(self) -> str:
    """LOW:HIGH:MEAN:STD, as loader.normalize takes them."""
    return ':'.join(f'{value:.6g}' for value in (self.low, self.high, self.mean, self.std))


@dataclasses.dataclass(frozen=True)
class Fingerprint:
  """Of the training records.

  Attributes:
    spacings, shapes: [N, rank] of each record, in mm (1 where unknown) and voxels. known: whether spacings are.
    classes: {name: records that have it}, the background first; None for the number where the manifest does not say.
    foreground: {channel: Foreground} in the order of the vocabulary; {} without masks, or where a channel has none.
    masks: records that have one. read: those read.
  """

  spacings: np.ndarray
  shapes: np.ndarray
  known: bool
  classes: dict[str, int | None]
  foreground: dict[str, Foreground]
  masks: int
  read: int

  @property
  def constants(self) -> str:
    """loader.normalize of the foreground, or '' without one: one group of numbers for each channel, if several."""
    return ':'.join(['foreground', *(f.constants for f in self.foreground.values())]) if self.foreground else ''


def fingerprint(source: Any, most: int = MOST_READ, draws: int = DRAWS) -> Fingerprint:
  """The fingerprint of the rows of a source, see jaxmed.data.corpus.source; usually its training split.

  Args:
    most: records whose pixels are read, evenly spread. draws: pixels of a channel that percentiles come from, in all.
  Raises:
    UserError: no record, or records of two and of three axes.
  """
  if not len(source):
    raise UserError(f'{source.path} has no training record')
  shapes = [tuple(shape[:-1]) for shape in source.column('shape').to_pylist()]
  ranks = sorted({len(shape) for shape in shapes})
  if len(ranks) > 1:
    raise UserError(f'{source.path} has records of {ranks[0]} and of {ranks[-1]} axes: plan for a corpus, or a '
                    'selection of it (CORPUS@NAME), of one kind')
  spacings = source.column('spacing').to_pylist()
  known = all(spacings)
  masked = _masked(source)
  rows = masked
  if len(masked) > most:
    rows = masked[np.linspace(0, len(masked) - 1, most).astype(int)]
  return Fingerprint(
      np.array([s or (1.0,) * ranks[0] for s in spacings]), np.array(shapes), known,
      _classes(source) if len(masked) else {}, _foreground(source, rows, draws), len(masked), len(rows))


def _masked(source: Any) -> np.ndarray:
  """Rows that have a mask."""
  names = source.table.column_names
  column = VALUES if VALUES in names else 'mask' if 'mask' in names else None
  return np.flatnonzero(source.column(column).is_valid().to_numpy()) if column else np.zeros(0, int)


def _classes(source: Any) -> dict[str, int | None]:
  """{name: records that have it} of the classes of the masks."""
  labels = labels_of(source)
  counts: dict[int, int] = {}
  if VALUES not in source.table.column_names:
    return dict.fromkeys(labels.names)
  for values in source.column(VALUES).to_pylist():
    for value in values or ():
      counts[value] = counts.get(value, 0) + 1
  return {name: counts.get(value, 0) for value, name in zip(labels.values, labels.names, strict=True)}


def _foreground(source: Any, rows: np.ndarray, draws: int) -> dict[str, Foreground]:
  """Of each channel, from pixels drawn with replacement, as many of each record."""
  rng = np.random.default_rng(SEED)
  found: dict[str, list[np.ndarray]] = {}
  for row in rows.tolist():
    record = source.record(row)
    inside = record['mask'] > BACKGROUND
    if inside.any():
      for c, name in enumerate(record['channels']):
        pixels = record['image'][..., c][inside]
        found.setdefault(name, []).append(rng.choice(pixels, max(draws // len(rows), 1)))
  if any(name not in found for name in source.channels):
    return {}
  return {name: _summary(np.concatenate(found[name])) for name in source.channels}


def _summary(pixels: np.ndarray) -> Foreground:
  low, median, high = np.percentile(pixels, PERCENTILES).tolist()
  wide = pixels.astype(np.float64)
  return Foreground(low, median, high, float(wide.mean()), float(wide.std()))
