"""Reads XLA's optimised HLO text: FLOPs, memory traffic and collectives of one device, loops times their length.

`cost_analysis()` counts the body of a loop once, so it is of no use for scanned models. This reader follows fusions,
calls, loops (their number of rounds from `known_trip_count`, or from the condition and the start of the counter) and
the dearest branch of conditionals. The text is that of jaxlib 0.10 to 0.12, for CPU, GPU and TPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxmed.parallel.flops import taps
from jaxmed.plan import custom

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
         'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
         'partition-id', 'replica-id', 'async-update', 'async-start', 'opt-barrier', 'custom-call', 'iota', 'domain'}
_SHAPE = re.compile(r'([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?')
_NAME = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array. far: whether it lies in the main memory of the device, not in the fast memory on the chip."""

  dtype: str
  dims: tuple[int, ...]
  far: bool = True

  @property
  def size(self) -> float:
    """Bytes."""
    return math.prod(self.dims) * BYTES.get(self.dtype, 0)

  @property
  def traffic(self) -> float:
    """Bytes that reading or writing it moves over the main memory's bus."""
    return self.size if self.far else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO. shapes: of its result (a tuple's flat); operands: names; attributes: the rest of the line."""

  name: str
  kind: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  inside: str
  attributes: str

  def called(self, key: str) -> str | None:
    """The computation that an attribute names."""
    found = re.search(rf'\b{key}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in order; the root is the last that says so."""

  name: str
  instructions: Mapping[str, Instruction]
  root: str

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    """Names of the parameters by number."""
    return {int(i.inside): i.name for i in self.instructions.values() if i.kind == 'parameter'}


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of one device. size: bytes of its operand (of its result for an all-gather); group: devices
  that take part in one; axes: names of the mesh axes that a group spans; times: how often a step runs it.
  """

  kind: str
  size: float
  group: int
  axes: tuple[str, ...]
  times: int
  name: str = ''

  @property
  def moved(self) -> float:
    """Bytes that a device sends in a step by the best ring: (n-1)/n of the size, twice that for an all-reduce."""
    share = 1.0 if self.kind == 'collective-permute' else (self.group - 1) / self.group
    return self.times * self.size * share * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one device and step. unknown: loops whose number of rounds could not be read, which count once,
  and kernels that nothing is known of, which count nothing."""

  flops: int
  traffic: float
  collectives: tuple[Collective, ...]
  unknown: tuple[str, ...] = ()


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """All computations by name, and the name of the entry."""
  found: dict[str, Computation] = {}
  entry, name, root = '', '', ''
  rows: dict[str, Instruction] = {}
  for line in text.splitlines():
    if name and line.startswith('}'):
      found[name] = Computation(name, rows, root or next(reversed(rows), ''))
      name = ''
    elif name:
      row = _instruction(line)
      if row:
        rows[row.name] = row
        root = row.name if line.lstrip().startswith('ROOT ') else root
    elif line.endswith('{') and not line.startswith('HloModule'):
      head = _NAME.search(line) or re.match(r'(?:ENTRY )?([\w.\-]+)', line)
      if head:
        name, root, rows = head[1], '', {}
        entry = name if line.startswith('ENTRY') else entry
  return found, entry


def _instruction(line: str) -> Instruction | None:
  left, equals, right = line.partition(' = ')
  name = left.strip().removeprefix('ROOT ').lstrip('%')
  if not equals or ' ' in name:
    return None
  right = re.sub(r'/\*.*?\*/', '', right)
  end = _close(right, 0) if right.startswith('(') else right.find(' ')
  open_ = right.find('(', end)
  close = _close(right, open_)
  inside = right[open_ + 1 : close - 1]
  return Instruction(name, right[end:open_].strip(), _shapes(right[:end]), tuple(_NAME.findall(inside)), inside,
                     right[close:])


def _close(text: str, start: int) -> int:
  """One past the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if not depth:
      return i + 1
  return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
  near = lambda layout: bool(re.search(r'S\([1-9]\d*\)', layout or ''))
  return tuple(Shape(m[1], tuple(int(n.lstrip('<=')) for n in m[2].split(',') if n), not near(m[3]))
               for m in _SHAPE.finditer(text))


def cost(text: str, mesh: Mapping[str, int] | None = None) -> Cost:
  """Cost of a program; `mesh` names the axes that collectives run over (sizes in the order of the device numbers)."""
  return _Reader(text, dict(mesh or {})).cost()


class _Reader:
  """One program, its computations counted once each."""

  def __init__(self, text: str, mesh: dict[str, int]):
    self.computations, self.entry = parse(text)
    self.mesh = mesh
    found = re.search(r'num_partitions=(\d+)', text[: text.find('\n')])
    self.devices = math.prod(mesh.values()) if mesh else int(found[1]) if found else 1
    self.flops_of = functools.lru_cache(maxsize=None)(self._flops)
    self.unknown: list[str] = []

  def cost(self) -> Cost:
    traffic, collectives = 0.0, []
    for row, where, times, fused in self._walk(self.entry, 1, False):
      if not fused:
        traffic += times * self._traffic(row, where)
      kind = row.kind.removesuffix('-start')
      if kind in COLLECTIVES and not _continued(row, where):
        collectives.append(self._collective(row, kind, where, times))
    return Cost(self.flops_of(self.entry), traffic, tuple(c for c in collectives if c.group > 1),
                tuple(dict.fromkeys(self.unknown)))

  def _walk(self, name: str, times: int, fused: bool) -> Iterator[tuple[Instruction, Computation, int, bool]]:
    """Every instruction that runs, with its computation, how often, and whether it is a part of a fusion."""
    where = self.computations[name]
    for row in where.instructions.values():
      yield row, where, times, fused
      for callee, more in self._callees(row, where):
        yield from self._walk(callee, times * more, fused or row.kind in ('fusion', 'async-start'))

  def _callees(self, row: Instruction, where: Computation) -> list[tuple[str, int]]:
    if row.kind == 'while':
      return [(row.called('body') or '', self._rounds(row, where))]
    if row.kind == 'conditional':
      names = re.search(r'branch_computations=\{([^}]*)\}', row.attributes)
      branches = _NAME.findall(names[1]) if names else [
          row.called(f'{side}_computation') or '' for side in ('true', 'false')]
      return [(max(branches, key=self.flops_of), 1)]
    if row.kind == 'call':
      return [(row.called('to_apply') or '', 1)]
    callee = row.called('calls') if row.kind in ('fusion', 'async-start', 'custom-call') else None
    return [(callee, 1)] if callee in self.computations else []

  def _rounds(self, row: Instruction, where: Computation) -> int:
    known = re.search(r'known_trip_count[^}]*?"?n"?\s*:\s*"?(\d+)', row.attributes)
    rounds = int(known[1]) if known else self._bounds(row, where)
    if rounds is None:
      self.unknown.append(row.name)
      return 1
    return rounds

  def _bounds(self, row: Instruction, where: Computation) -> int | None:
    """End less start of a counter that grows by one until it is not less than a constant."""
    test = self.computations[row.called('condition') or '']
    root = test.instructions[test.root]
    limits = [int(i.inside) for i in test.instructions.values()
              if i.kind == 'constant' and re.fullmatch(r'\d+', i.inside)]
    picks = [i for i in test.instructions.values() if i.kind == 'get-tuple-element']
    compare = root
    if root.kind == 'fusion':
      inner = self.computations[root.called('calls') or '']
      compare = inner.instructions[inner.root]
      limits += [int(i.inside) for i in inner.instructions.values()
                 if i.kind == 'constant' and re.fullmatch(r'\d+', i.inside)]
    if len(limits) != 1 or len(picks) != 1 or 'direction=LT' not in compare.attributes:
      return None
    number = int(re.search(r'index=(\d+)', picks[0].attributes)[1])  # type: ignore[index]
    start = where.instructions[row.operands[0]]
    while start.kind == 'tuple' and number < len(start.operands) or start.kind in ('copy', 'bitcast', 'convert'):
      start = where.instructions[start.operands[number if start.kind == 'tuple' else 0]]
    low = int(start.inside) if start.kind == 'constant' and re.fullmatch(r'-?\d+', start.inside) else 0
    return max(limits[0] - low, 0)

  def _flops(self, name: str) -> int:
    where, total = self.computations[name], 0
    for row in where.instructions.values():
      if row.kind == 'dot':
        left = where.instructions[row.operands[0]].shapes[0].dims
        axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', row.attributes)
        contracted = [int(n) for n in axes[1].split(',') if n] if axes else []
        total += 2 * math.prod(row.shapes[0].dims) * math.prod(left[d] for d in contracted)
      elif row.kind == 'convolution':
        total += _convolution(row, *(where.instructions[o].shapes[0].dims for o in row.operands[:2]))
      elif kernel := self._kernel(row):
        total += custom.flops(kernel, *(where.instructions[o].shapes[0].dims for o in row.operands[:2]))
      total += sum(times * self.flops_of(callee) for callee, times in self._callees(row, where))
    return total

  def _kernel(self, row: Instruction) -> custom.Kernel | None:
    """What is known of a kernel that XLA cannot look into; one that is not known is said so and costs nothing."""
    if row.kind != 'custom-call' or 'custom_call_target="tpu_custom_call"' not in row.attributes:
      return None
    kernel = custom.known(row.name)
    if kernel is None:
      self.unknown.append(row.name)
    return kernel

  def _traffic(self, row: Instruction, where: Computation) -> float:
    """Bytes that an instruction which is not fused reads and writes; of a slice or an update in place, its part."""
    inputs = [where.instructions[o] for o in row.operands if o in where.instructions]
    if kernel := self._kernel(row):
      lengths = [i.shapes[0].dims[2] for i in inputs[:2]]
      return custom.traffic(kernel, lengths, [i.shapes[0].traffic for i in inputs], sum(s.traffic for s in row.shapes))
    if row.kind in _FREE or row.kind.endswith('-done'):
      return 0.0
    if row.kind == 'fusion' and row.called('calls') in self.computations:
      inner = self.computations[row.called('calls') or '']
      read = [self._read(inner, n, i) for n, i in enumerate(inputs)]
      return sum(read) + self._written(inner, row)
    if row.kind in ('dynamic-slice', 'slice', 'gather'):
      return sum(s.traffic for s in row.shapes) * (2 if inputs and inputs[0].shapes[0].far else 1)
    if row.kind == 'dynamic-update-slice':
      return 2 * inputs[1].shapes[0].size if row.shapes[0].far else inputs[1].shapes[0].traffic
    if row.kind == 'copy-start':  # (target, source, context)
      return sum(s.traffic for s in row.shapes[:2])
    if row.kind.endswith('slice-start'):  # (source, target, context)
      return (row.shapes[1].size if row.shapes[0].far else 0.0) + row.shapes[1].traffic
    return sum(s.traffic for i in inputs for s in i.shapes) + sum(s.traffic for s in row.shapes)

  def _read(self, inner: Computation, number: int, given: Instruction) -> float:
    """Bytes of an operand that a fusion reads: slices of it, nothing where it is only updated in place."""
    whole = sum(s.traffic for s in given.shapes)
    name = inner.parameters.get(number)
    if not whole or name is None:
      return whole
    read, names = 0.0, {name}
    for row in inner.instructions.values():
      uses = [n for n, o in enumerate(row.operands) if o in names]
      if not uses:
        continue
      if row.kind == 'bitcast':
        names.add(row.name)
      elif row.kind in ('dynamic-slice', 'slice') and uses == [0]:
        read += row.shapes[0].size
      elif row.kind == 'fusion' and row.called('calls') in self.computations:
        read += sum(self._read(self.computations[row.called('calls') or ''], n, given) for n in uses)
      elif row.kind != 'dynamic-update-slice' or uses != [0]:
        return whole
    return min(read, whole)

  def _written(self, inner: Computation, row: Instruction) -> float:
    """Bytes that a fusion writes."""
    root = inner.instructions[inner.root]
    parts = [inner.instructions[o] for o in root.operands] if root.kind == 'tuple' else [root]
    if len(parts) != len(row.shapes):
      return sum(s.traffic for s in row.shapes)
    total = 0.0
    for part, shape in zip(parts, row.shapes, strict=True):
      while part.kind == 'bitcast':
        part = inner.instructions[part.operands[0]]
      nested = self.computations.get(part.called('calls') or '') if part.kind == 'fusion' else None
      if nested and len(part.shapes) == 1:
        total += self._written(nested, dataclasses.replace(part, shapes=(shape,)))
      elif shape.far:
        updates = part.kind == 'dynamic-update-slice'
        total += inner.instructions[part.operands[1]].shapes[0].size if updates else shape.size
    return total

  def _collective(self, row: Instruction, kind: str, where: Computation, times: int) -> Collective:
    members = self._groups(row.attributes, kind)
    group = 2 if kind == 'collective-permute' else members.shape[1]
    size = sum(s.size for o in row.operands for s in where.instructions[o].shapes)
    if kind == 'all-gather':
      size *= group
    elif kind == 'all-reduce' and where.name.startswith('all-reduce-scatter'):  # how XLA:TPU writes a reduce-scatter
      kind = 'reduce-scatter'
    return Collective(kind, size, group, self._axes(members), times, row.name)

  def _groups(self, attributes: str, kind: str) -> np.ndarray:
    """Device numbers [groups, members]; for a permutation the pairs that send."""
    if kind == 'collective-permute':
      pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', attributes)
      return np.array([[int(n) for n in p.split(',')] for p in re.findall(r'(\d+,\d+)', pairs[1])] if pairs else [[0]])
    return groups(attributes, self.devices)

  def _axes(self, members: np.ndarray) -> tuple[str, ...]:
    """Names of the mesh axes along which the members of a group differ."""
    if not self.mesh or members.max(initial=0) >= self.devices:
      return ()
    places = np.stack(np.unravel_index(members, tuple(self.mesh.values())))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(self.mesh, differ, strict=True) if d)


def _continued(row: Instruction, where: Computation) -> bool:
  """Whether this is a later piece of an asynchronous collective, which XLA:TPU spreads over several fusions."""
  return 'chain_id=' in row.attributes and not any(
      'AsyncCollectiveStart' in other.attributes for other in where.instructions.values())


def groups(attributes: str, devices: int) -> np.ndarray:
  """Device numbers [groups, members] of `replica_groups=`, in any of XLA's ways to write them.

  '{{0,1},{2,3}}'; '[2,4]<=[8]' and '[4,2]<=[2,4]T(1,0)', an iota of 8, transposed; "mesh['a'=2,'b'=4] {'b'}" with an
  optional 'device_ids=([4,2]T(1,0))' in between; '{}' for all devices.
  """
  text = attributes.partition('replica_groups=')[2]
  if text.startswith('{{'):
    rows = text[1 : text.index('}}') + 1]
    return np.array([[int(n) for n in r.split(',')] for r in re.findall(r'\{([\d,]+)\}', rows)])
  iota = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
  mesh = re.match(r"mesh\[([^\]]*)\](?:,? *device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *\{([^}]*)\}", text)
  if mesh:
    sizes = {n: int(s) for n, s in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    order = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes.values()))
    return _mesh_groups(order, sizes, mesh[4])
  return np.arange(devices)[None]


def _mesh_groups(order: np.ndarray, sizes: dict[str, int], axes: str) -> np.ndarray:
  """Groups along the named axes of a mesh; 'x':(a)b is the part b of an axis that a comes before."""
  shape: list[int] = []
  chosen: list[int] = []
  parts = dict((n, (int(a), int(b)) if a else None)
               for n, a, b in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes))
  for name, size in sizes.items():
    part = parts.get(name)
    cut = [part[0], part[1], size // part[0] // part[1]] if part else [size]
    if name in parts:
      chosen.append(len(shape) + (1 if part else 0))
    shape += cut
  rest = [n for n in range(len(shape)) if n not in chosen]
  members = math.prod(shape[n] for n in chosen)
  return order.reshape(shape).transpose(rest + chosen).reshape(-1, members)


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def _iota(dims: str, turned: str | None) -> np.ndarray:
  sizes = _ints(dims)
  out = np.arange(math.prod(sizes)).reshape(sizes)
  return out.transpose(_ints(turned)).reshape(-1) if turned else out.reshape(-1)


def _convolution(row: Instruction, x: tuple[int, ...], kernel: tuple[int, ...]) -> int:
  """FLOPs; XLA:TPU writes products as convolutions whose batches are dilated spatial axes."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', row.attributes)
  assert labels, row
  left, right, out = labels[1], labels[2], labels[3]
  y = row.shapes[0].dims
  window = dict(re.findall(r'(\w+)=([\w\-]+)', (re.search(r'window=\{([^}]*)\}', row.attributes) or [''])[0][8:]))
  at = lambda key, n, default: int(window[key].split('x')[n].split('_')[0]) if key in window else default
  macs = y[out.index('b')] * y[out.index('f')] * kernel[right.index('i')]
  for n in range(len(left) - 2):
    d = str(n)
    macs *= taps(x[left.index(d)], kernel[right.index(d)], y[out.index(d)], at('stride', n, 1), at('pad', n, 0),
                 at('lhs_dilate', n, 1), at('rhs_dilate', n, 1))
  return 2 * macs
