"""Common rules of a study: functions of a cell that give config values, relative to the base of the study.

At the values of the base a rule changes nothing. A rule sees what those before it gave, so rules of the learning rate
multiply: `rules=(sqrt_batch, inverse_width)`. Any function of a cell is a rule:

  def longer_warmup(cell):
    return {'optimizer.warmup_steps': min(500, cell['steps'] // 5)}
"""

from collections.abc import Callable, Mapping
from typing import Any

Cell = Mapping[str, Any]
Rule = Callable[[Cell], dict[str, Any]]


def _scaled(cell: Cell, factor: float) -> dict[str, Any]:
  return {'learning_rate': cell['learning_rate'] * factor}


def sqrt_batch(cell: Cell) -> dict[str, Any]:
  """Rate in proportion to the square root of the batch (Krizhevsky 2014, arXiv 1404.5997, section 5).

  Only where the base or an axis gives a rate: one that is chosen follows the batch so by itself.
  """
  return _scaled(cell, (cell['batch_size'] / cell['base']['batch_size'])**0.5) if cell['given_rate'] else {}


def linear_batch(cell: Cell) -> dict[str, Any]:
  """Rate in proportion to the batch (Goyal et al. 2017, arXiv 1706.02677); as `sqrt_batch`."""
  ratio = cell['batch_size'] / cell['base']['batch_size']
  return _scaled(cell, ratio if cell['given_rate'] else ratio**0.5)


def inverse_width(cell: Cell) -> dict[str, Any]:
  """Rate in proportion to 1 / width, as Adam's for hidden matrices in muP (Yang et al. 2022, arXiv 2203.03466).

  It stands for all parameters here; `optimizer.scaling=mup` tells them apart.
  """
  return _scaled(cell, cell['base']['width'] / cell['width'])


def sqrt_width(cell: Cell) -> dict[str, Any]:
  """Rate in proportion to 1 / the square root of the width."""
  return _scaled(cell, (cell['base']['width'] / cell['width'])**0.5)


def power(key: str, exponent: float) -> Rule:
  """Rate in proportion to a power of any number of the cell: power('seen', -0.25), power('params', -0.1)."""
  return lambda cell: _scaled(cell, (cell[key] / cell['base'][key])**exponent)


def warmup(share: float = 0.1, most: int = 0) -> Rule:
  """Warm-up of a share of the steps, at most so many; 0: no limit."""
  def rule(cell: Cell) -> dict[str, Any]:
    steps = round(share * cell['steps'])
    return {'optimizer.warmup_steps': min(steps, most) if most else steps}
  return rule


def least_epochs(epochs: float) -> Rule:
  """At least so many passes over the records of the cell, where what is equal gives fewer."""
  return lambda cell: {'epochs': epochs} if cell['epochs'] < epochs else {}
