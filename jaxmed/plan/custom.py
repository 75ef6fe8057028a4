"""What kernels that XLA cannot look into cost: JAX's flash attention for TPU (see jaxmed/models/layers/flash.py).

Counted from the shapes of their operands, as the kernels are written in JAX 0.10 and 0.12: queries, keys and values
[B, H, N, Dh] come first. Each kernel holds a block of one side and passes over the other, so what belongs to the other
side is read once for each block.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxmed.models.layers.flash import block


@dataclasses.dataclass(frozen=True)
class Kernel:
  """products: of [N, M] and Dh; again: the operands (numbers) that it reads for each block of operand `held`."""

  products: int
  again: tuple[int, ...]
  held: int


# Operands: queries, keys, values, segments of queries, of keys; backwards then sums, tops, gradient, its products.
KERNELS = {
    'flash_attention': Kernel(2, (1, 2, 4), 0),
    'flash_mha_bwd_dkv': Kernel(4, (0, 3, 5, 6, 7, 8), 1),
    'flash_mha_bwd_dq': Kernel(3, (1, 2, 4), 0),
}


def known(name: str) -> Kernel | None:
  """The kernel that an instruction of this name runs."""
  return next((kernel for start, kernel in KERNELS.items() if name.startswith(start)), None)


def flops(kernel: Kernel, queries: Sequence[int], keys: Sequence[int]) -> int:
  """Of one call on queries [B, H, N, Dh] and keys [B, H, M, Dh]."""
  return 2 * kernel.products * math.prod(queries) * keys[2]


def traffic(kernel: Kernel, lengths: Sequence[int], inputs: Sequence[float], outputs: float) -> float:
  """Bytes from and to main memory: each input and output once, plus the inputs read again for each further block.

  Args:
    lengths: of queries and of keys. inputs: bytes of each operand, segments may be missing. outputs: of all results.
  """
  passes = lengths[kernel.held] // block(lengths[kernel.held])
  shift = 0 if len(inputs) in (5, 9) else 2  # without segments what follows them moves up
  again = [n - (shift if n > 4 else 0) for n in kernel.again if not (shift and n in (3, 4))]
  return sum(inputs) + outputs + (passes - 1) * sum(inputs[n] for n in again)
