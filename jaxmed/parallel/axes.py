"""The axes of the mesh and their sizes: arithmetic that needs no device, and no JAX."""

import math
from collections.abc import Mapping

AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor')  # slowest links first, fastest last
BATCH_AXES = ('replica', 'data', 'fsdp')


def filled(sizes: Mapping[str, int], count: int) -> dict[str, int] | None:
  """The size of every axis over `count` devices, one of 0 taking what the others leave; None if they do not fit.

  Where data and fsdp are both 0 the model decides how they share what is left (`layout.fitted`); here data takes all.
  """
  shape = {axis: sizes.get(axis, 1) for axis in AXES}
  if open_mesh(sizes):
    shape['fsdp'] = 1
  fixed, open_ = math.prod(n for n in shape.values() if n), list(shape.values()).count(0)
  if open_ > 1 or fixed < 1 or count % fixed or (not open_ and fixed != count):
    return None
  return {axis: n or count // fixed for axis, n in shape.items()}


def open_mesh(sizes: Mapping[str, int]) -> bool:
  """Whether the split of devices between data and fsdp is left to the model."""
  return sizes.get('data', 1) == 0 == sizes.get('fsdp', 1)
