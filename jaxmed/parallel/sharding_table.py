"""How a state lies on the devices, as a table that people can read before a run starts."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import psutil
from jax.sharding import AbstractMesh

from jaxmed.parallel import mesh as mesh_lib

SHARE = 0.4  # of a device's memory for the state, the rest is for activations


@dataclasses.dataclass(frozen=True)
class Row:
  """Arrays of one name (differing numbers are *), shape and sharding: their count and bytes a device."""

  name: str
  shape: tuple[int, ...]
  sharding: str
  count: int
  bytes: int


def bytes_per_device(tree: Any) -> int:
  """Bytes of a pytree of arrays (or shapes with shardings) that one device holds."""
  return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _bytes(x: Any) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def rows(tree: Any) -> list[Row]:
  """One row for each group of such arrays of a nested dict, in order of first appearance."""
  found: dict[tuple, Row] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = '/'.join(str(getattr(k, 'key', k)) for k in path)
    alike, shape, sharding = re.sub(r'\d+', '*', name), x.shape, _text(x.sharding.spec)
    old = found.get((alike, shape, sharding))
    new = Row(alike, shape, sharding, old.count + 1, old.bytes + _bytes(x)) if old else Row(
        name, shape, sharding, 1, _bytes(x))
    found[alike, shape, sharding] = new
  return list(found.values())


def _text(spec: Any) -> str:
  """A partition spec in words: for each axis the mesh axes that cut it, '-' for none; '' where nothing is cut."""
  parts = ['-' if a is None else a if isinstance(a, str) else '+'.join(a) for a in spec]
  return ', '.join(parts) if any(p != '-' for p in parts) else ''


def table(state: Any, memory: int | None = None) -> str:
  """The parameters of a training state array by array, then what each part of it takes on one device.

  Args:
    state: a TrainState of shapes with shardings. memory: bytes of a device.
  """
  lines = [('parameters', 'shape', 'sharding', 'MB/device')]
  for r in rows(state.params):
    times = f' ({r.count} of them)' if r.count > 1 else ''
    lines.append((r.name + times, 'x'.join(map(str, r.shape)) or '1', r.sharding or 'everywhere',
                  f'{r.bytes / 1e6:.3f}'))
  width = [max(len(line[i]) for line in lines) for i in range(4)]
  text = [f'{a:{width[0]}}  {b:{width[1]}}  {c:{width[2]}}  {d:>{width[3]}}' for a, b, c, d in lines]
  return '\n'.join([*text, total(state, memory)])


def total(state: Any, memory: int | None = None) -> str:
  """What the parts of a training state take on one device, in one line."""
  parts = {name: bytes_per_device(getattr(state, name)) for name in ('params', 'moments', 'target', 'extra', 'average')}
  said = ', '.join(f'{name} {size / 1e6:.1f} MB' for name, size in parts.items() if size)
  whole = sum(parts.values())
  of = f' of {memory / 1e9:.1f} GB ({100 * whole / memory:.1f} %)' if memory else ''
  return f'state on each device: {said}; {whole / 1e6:.1f} MB{of}, activations come on top'


def fitted(boxed: Any, sizes: Mapping[str, int], memory: float) -> dict[str, int]:
  """Sizes of a mesh that cuts parameters, moments and teacher over as few devices as let a device hold its part.

  Args:
    boxed: shapes of a training state whose parameters carry logical axes. sizes: of a mesh with fsdp = 1, whose data
      axis is to be shared. memory: bytes of a device, of which the state may take SHARE.
  """
  shape = dict(sizes)
  for fsdp in (n for n in range(1, sizes['data'] + 1) if sizes['data'] % n == 0):
    shape |= {'data': sizes['data'] // fsdp, 'fsdp': fsdp}
    if bytes_per_device(on_mesh(boxed, shape)) <= SHARE * memory:
      break
  return shape


def on_mesh(boxed: Any, sizes: Mapping[str, int]) -> Any:
  """Shapes and shardings of a boxed state on a mesh whose devices need not exist."""
  unreal: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  return mesh_lib.placed(boxed, mesh_lib.shardings(boxed, unreal))


def device_memory() -> int | None:
  """Bytes of the first local device: what its allocator may take, on a CPU its share of the host's memory."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return int(stats['bytes_limit'])
  return psutil.virtual_memory().total // jax.local_device_count() if device.platform == 'cpu' else None
