"""How many machines and devices a TPU slice has.

Sources: Google Cloud's documentation "TPU VM" (accelerator types, runtime versions) and "Plan TPUs in GKE" (topologies,
machine types). Names count chips for v5e and v6e and cores, two a chip, for the others. JAX shows one device a chip,
for v2, v3 and TPU7x two.
"""

import dataclasses
import math

from jaxmed.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice: its machines, the chips of each, and the JAX devices of all."""

  hosts: int
  chips: int
  devices: int


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A generation: units of the number in its name a chip, JAX devices a chip, largest slice on one machine (chips)."""

  units: int
  devices: int
  single: int
  runtime: str = ''


VM = {  # prefix of --accelerator
    'v2': _Kind(2, 2, 4, 'tpu-ubuntu2204-base'), 'v3': _Kind(2, 2, 4, 'tpu-ubuntu2204-base'),
    'v4': _Kind(2, 1, 4, 'tpu-ubuntu2204-base'), 'v5p': _Kind(2, 1, 4, 'v2-alpha-tpuv5'),
    'v5litepod': _Kind(1, 1, 8, 'v2-alpha-tpuv5-lite'), 'v6e': _Kind(1, 1, 8, 'v2-alpha-tpuv6e'),
}
GKE = {  # label cloud.google.com/gke-tpu-accelerator
    'tpu-v3-slice': _Kind(1, 2, 4), 'tpu-v4-podslice': _Kind(1, 1, 4), 'tpu-v5p-slice': _Kind(1, 1, 4),
    'tpu-v5-lite-podslice': _Kind(1, 1, 8), 'tpu-v6e-slice': _Kind(1, 1, 8), 'tpu7x': _Kind(1, 2, 4),
}


def of_type(accelerator: str) -> tuple[Slice, str]:
  """The slice that a Cloud TPU type names ('v5litepod-16'), and the runtime version of its machines.

  Raises:
    UserError: an unknown generation, or a size that it does not have.
  """
  name, _, number = accelerator.partition('-')
  kind = VM[choose('TPU type', name, VM)]
  chips, rest = divmod(int(number), kind.units)
  if rest or not _whole(chips, kind):
    raise UserError(f'--accelerator {accelerator}: {name} has no slice of {number}; sizes are '
                    + ', '.join(f'{name}-{kind.units * n}' for n in (1, 4, 8, 16, 32) if _whole(n, kind)) + ' ...')
  return _slice(chips, kind, 0), kind.runtime


def of_topology(accelerator: str, topology: str, chips_per_node: int) -> Slice:
  """The slice of a GKE node pool. chips_per_node: 0 takes one machine where the slice fits, otherwise 4."""
  kind = GKE[choose('--tpu', accelerator, GKE)]
  sides = [int(n) for n in topology.split('x')]
  flat = 2 if kind.single == 8 else 3
  if len(sides) != flat and accelerator != 'tpu-v3-slice':
    raise UserError(f'--topology {topology}: {accelerator} has {flat} sides, such as {"4x4" if flat == 2 else "2x2x4"}')
  chips = math.prod(sides)
  if not _whole(chips, kind) or (chips_per_node and chips % chips_per_node):
    raise UserError(f'--topology {topology} has {chips} chips, which do not fill machines of '
                    f'{chips_per_node or 4} chips')
  return _slice(chips, kind, chips_per_node)


def _whole(chips: int, kind: _Kind) -> bool:
  """Whether a slice has so many chips: full machines of 4, or one chip of the generations that share machines."""
  return chips > 0 and (chips % 4 == 0 or (chips == 1 and kind.single == 8))


def _slice(chips: int, kind: _Kind, each: int) -> Slice:
  each = each or (chips if chips <= kind.single else 4)
  return Slice(chips // each, each, chips * kind.devices)
