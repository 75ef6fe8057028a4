"""What accelerators can do, as their makers publish it, and the names of clusters of them.

Rates are peaks of one chip (a GPU counts as one): bf16 FLOP/s without sparsity, bytes, bytes/s. `link` is what one chip
can send, over all its links together, inside its fast domain (a TPU slice, an NVLink node); `network` its share of what
its host can send beyond. Vendors give both directions of a link together: halves are stored here.
"""

import dataclasses
import math

from jaxmed.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator. kinds: beginnings of JAX's `device_kind`. domain: chips of a fast domain, 0 for a whole slice."""

  name: str
  kinds: tuple[str, ...]
  flops: float
  memory: float
  bandwidth: float
  link: float
  network: float
  host: int  # chips of one host
  domain: int
  source: str


_CLOUD = 'Google Cloud TPU documentation, '
_TPU = 'docs.cloud.google.com/tpu/docs/'
CHIPS = {c.name: c for c in (
    Chip('v4', ('TPU v4',), 275e12, 32 * 2**30, 1200e9, 300e9, 6.25e9, 4, 0,
         f'{_CLOUD}{_TPU}v4 (275 TFLOP/s, 32 GiB, 1200 GB/s); six links of 50 GB/s each way: Jouppi et al. 2023, '
         'arXiv 2304.01433, from memory; network: assumed as for v5p'),
    Chip('v5e', ('TPU v5 lite', 'TPU v5e'), 197e12, 16e9, 819e9, 200e9, 3.125e9, 8, 0,
         f'{_CLOUD}{_TPU}v5e (197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s both ways, 2 x 100 Gbit/s a host of 8)'),
    Chip('v5p', ('TPU v5p', 'TPU v5'), 459e12, 95e9, 2765e9, 600e9, 6.25e9, 4, 0,
         f'{_CLOUD}{_TPU}v5p (459 TFLOP/s, 95 GB, 2765 GB/s, 4800 Gbit/s: read as one way, as the 1600 Gbit/s of '
         'v5e are, which its page now gives as 400 GB/s both ways); network: 50 Gbit/s a chip, from memory'),
    Chip('v6e', ('TPU v6 lite', 'TPU v6e'), 918e12, 32e9, 1638e9, 400e9, 12.5e9, 8, 0,
         f'{_CLOUD}{_TPU}v6e (918 TFLOP/s, 32 GB, 1638 GB/s, 800 GB/s both ways); network: 25.6 Tbit/s a pod of 256, '
         'same page, from memory'),
    Chip('a100', ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM-80GB'), 312e12, 80e9, 2039e9, 300e9, 25e9, 8, 8,
         'NVIDIA A100 datasheet, SXM 80 GB (312 TFLOP/s, 2039 GB/s, NVLink 600 GB/s both ways); DGX A100: 200 Gbit/s a '
         'GPU'),
    Chip('a100-40g', ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM-40GB'), 312e12, 40e9, 1555e9, 300e9, 25e9, 8, 8,
         'NVIDIA A100 datasheet, SXM 40 GB (1555 GB/s); else as a100'),
    Chip('h100', ('NVIDIA H100 80GB',), 989.4e12, 80e9, 3350e9, 450e9, 50e9, 8, 8,
         'NVIDIA H100 datasheet, SXM (989.4 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways); DGX H100: 400 Gbit/s each'),
    Chip('h200', ('NVIDIA H200',), 989.4e12, 141e9, 4800e9, 450e9, 50e9, 8, 8,
         'NVIDIA H200 datasheet, SXM (141 GB, 4.8 TB/s); else as h100'),
)}


def of(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind`, None for one that is not in the table."""
  found = [(len(kind), c) for c in CHIPS.values() for kind in c.kinds if device_kind.startswith(kind)]
  return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Chips to plan for. shape: of one TPU slice, () for GPUs. chips: of all slices."""

  chip: Chip
  chips: int
  shape: tuple[int, ...] = ()
  slices: int = 1

  @property
  def name(self) -> str:
    """As the user writes it."""
    size = 'x'.join(map(str, self.shape)) if self.shape else str(self.chips)
    return f'{self.chip.name}:{size}' + (f'*{self.slices}' if self.slices > 1 else '')

  @property
  def compiled(self) -> bool:
    """Whether a compiler for it runs without one."""
    return bool(self.shape)

  @property
  def hosts(self) -> int:
    """Machines that feed it."""
    return max(self.chips // self.chip.host, 1)

  @property
  def domain(self) -> int:
    """Chips that are joined by the fast network."""
    return self.chip.domain or self.chips // self.slices


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SMALL = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4')


def _solid(most: int) -> tuple[str, ...]:
  """Cuboids of whole cubes of 4 x 4 x 4 chips, sides growing."""
  sides = range(4, 25, 4)
  cubes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= most]
  return _SMALL + tuple('x'.join(map(str, s)) for s in cubes)


TOPOLOGIES = {'v4': _solid(4096), 'v5e': _FLAT, 'v5p': _solid(6144), 'v6e': _FLAT}


def parse(text: str, slices: int = 1) -> Cluster:
  """'v5e:16x16', 'v5e:16x16*2' (two slices), 'h100:64' -> the cluster.

  Raises:
    UserError: an unknown chip, shape or number, naming the nearest.
  """
  text, star, times = text.lower().replace(' ', '').partition('*')
  name, _, size = text.partition(':')
  chip = CHIPS[choose('chip of --topology', name, CHIPS)]
  if star and (not times.isdigit() or int(times) < 1):
    raise UserError(f'--topology {text}*{times}: the number of slices must be a whole number, for example {text}*2')
  slices = int(times) if star else slices
  if name in TOPOLOGIES:
    offered = [f'{name}:{s}' for s in TOPOLOGIES[name]]
    shape = tuple(int(n) for n in choose('topology', f'{name}:{size}', offered).partition(':')[2].split('x'))
    return Cluster(chip, math.prod(shape) * slices, shape, slices)
  if slices > 1:
    raise UserError(f'--topology {text}: slices are for TPUs; give the number of GPUs, for example {name}:64')
  if not size.isdigit() or int(size) < 1 or (int(size) > chip.domain and int(size) % chip.domain):
    near = max(round(int(size) / chip.domain), 1) * chip.domain if size.isdigit() else 8 * chip.domain
    raise UserError(f'unknown topology {text!r}: {name} takes a number of GPUs, whole nodes of {chip.domain}: '
                    f'did you mean {name}:{near}?')
  return Cluster(chip, int(size))
