"""Crops that are made to show a class of the mask, a part of the stream: nnU-Net's oversampling of the foreground.

Whether a crop is forced follows from its position in the stream. A forced crop draws one of the classes that its record
has, all alike, then one of the stored places of that class (see jaxmed.data.corpus.places), and lies with that place in
its centre, moved back into the image where it would leave it. A record without a class gives a random crop.

MIC-DKFZ/nnUNet, nnunetv2/training/dataloading/data_loader.py, get_bbox moves a crop back at the lower border alone, and
shows padding beyond the upper one. Here it is moved back at both, as random crops are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from jaxmed.errors import UserError, choose

RULES = ('slots', 'exact')


@dataclasses.dataclass(frozen=True)
class Foreground:
  """Which crops of a stream are forced.

  Attributes:
    fraction: of the crops, p.
    rule: 'slots', nnU-Net's: those at the places of a batch from round(B (1 - p)) on, so 1 of 2 for p = 0.33; 'exact':
      of the first n crops of the stream floor(n p), for each n.
    batch_size: elements B of the global batch.
  """

  fraction: float
  rule: str = 'slots'
  batch_size: int = 1

  def __post_init__(self):
    choose('loader.foreground_rule', self.rule, RULES)
    if not 0 <= self.fraction <= 1:
      raise UserError(f'loader.foreground is {self.fraction}: expected a fraction of the crops, 0 to 1')

  def forced(self, position: int) -> bool:
    """Whether the crop at a position of the stream is forced."""
    if self.rule == 'slots':
      return position % self.batch_size >= round(self.batch_size * (1 - self.fraction))
    share = Fraction(repr(self.fraction))  # exactly what was written: the position may have any number of digits
    return math.floor((position + 1) * share) > math.floor(position * share)


def make(source: Any, fraction: float, rule: str, batch_size: int) -> Foreground | None:
  """The rule of a run, None where no crop is forced.

  Raises:
    UserError: the corpus has no places of classes.
  """
  if not fraction:
    return None
  if not source.places:
    raise UserError(f'loader.foreground={fraction:g} draws crops around the classes of masks, of which {source.path} '
                    'stores no places: prepare it (again) with masks')
  return Foreground(fraction, rule, batch_size)


def centre(places: Mapping[int, np.ndarray], grid: Sequence[int], rng: np.random.Generator) -> tuple[int, ...] | None:
  """A place of one of the classes, as an index of the grid; None where there is no class."""
  values = [value for value in places if len(places[value])]
  if not values:
    return None
  own = places[values[int(rng.integers(len(values)))]]
  return tuple(int(n) for n in np.unravel_index(int(own[int(rng.integers(len(own)))]), tuple(grid)))


def start(place: Sequence[int], grid: Sequence[int], size: Sequence[int]) -> list[int]:
  """Where a crop begins that has a place in its centre, inside the grid; 0 along an axis that it covers."""
  return [min(max(at - want // 2, 0), max(have - want, 0)) for at, have, want in zip(place, grid, size, strict=True)]
