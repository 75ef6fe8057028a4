"""The named mesh, and how logical axes of parameters and batches become shardings on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmed.errors import UserError
from jaxmed.parallel.axes import AXES, BATCH_AXES, filled

# Logical axis -> mesh axis. Names that are not here are replicated, and so is a dimension that does not divide.
RULES = {'embed': 'fsdp', 'mlp': 'tensor', 'heads': 'tensor', 'prototypes': 'tensor'}
# The same for what a step computes; 'embed' is whole there: weights are gathered, activations stay where they are.
ACTIVATIONS = {'batch': BATCH_AXES, 'tokens': ('sequence',), 'heads': ('tensor',), 'mlp': ('tensor',)}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the mesh over all devices, or over those given; one axis may be 0, which takes what the others leave.

  Where devices lie in several slices (TPU) or nodes (GPU), the first of the axes replica, data and fsdp that can be cut
  so runs over whole ones, and the others stay inside of one, where links are fast.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or do not fit the slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  whole = filled(sizes, count)
  if whole is None:
    wanted = ' x '.join(f'{a}={sizes.get(a, 1) or "rest"}' for a in AXES)
    raise UserError(f'mesh {wanted} does not fit {count} devices: the sizes must multiply to {count}')
  shape = [whole[axis] for axis in AXES]
  slices: dict[int, list[Any]] = {}
  for d in devices:
    slices.setdefault(getattr(d, 'slice_index', None) or 0, []).append(d)
  cut = next((i for i, a in enumerate(AXES) if a in BATCH_AXES and shape[i] % len(slices) == 0), None)
  if cut is None or len({len(s) for s in slices.values()}) > 1:
    raise UserError(f'{count} devices in {len(slices)} slices: mesh.replica, mesh.data or mesh.fsdp must be a multiple '
                    f'of {len(slices)}')
  shape[cut] //= len(slices)
  grids = [_grid(tuple(shape), slices[n]) for n in sorted(slices)]
  return Mesh(np.concatenate(grids, axis=cut), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _grid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
  """Devices of one slice as an array in which neighbours are near each other."""
  try:
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices).devices
  except NotImplementedError as e:
    wanted = ' x '.join(f'{a}={n}' for a, n in zip(AXES, shape, strict=True) if n > 1)
    raise UserError(f'mesh {wanted} cannot be laid along the links of a slice: choose sizes that are products of its '
                    f'sides ({" ".join(str(e).split())[:120]})') from e


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a global batch is cut."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over every axis that holds different samples."""
  return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def shardings(abstract: Any, mesh: Mesh) -> Any:
  """Shardings of a pytree whose parameters are boxed with logical names (flax `LogicallyPartitioned`).

  The result has the structure of the unboxed tree.
  """
  def one(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return replicated(mesh)
    return NamedSharding(mesh, _by_rules(leaf.names, leaf.value.shape, mesh.shape))
  return jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def _by_rules(names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> P:
  """How a parameter with these logical axes lies on a mesh of these sizes, see RULES."""
  out, used = [], set()
  for name, size in zip(names, shape, strict=True):
    axis = RULES.get(name or '')
    fits = axis is not None and axis not in used and sizes.get(axis, 1) > 1 and size % sizes[axis] == 0
    used |= {axis} if fits else set()
    out.append(axis if fits else None)
  return P(*out)


def weight(x: jax.Array, names: Sequence[str | None], gathered: bool) -> jax.Array:
  """A weight, or its gradient, as it lies on the surrounding mesh; or whole along fsdp, as a product needs it."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape) | ({'fsdp': 1} if gathered else {})
  return jax.lax.with_sharding_constraint(x, _by_rules(names, x.shape, sizes))


def on_host(sharding: NamedSharding) -> NamedSharding:
  """The same sharding in the memory of the device's host.

  Raises:
    UserError: the backend has no such memory.
  """
  kinds = {m.kind for m in sharding.mesh.devices.flat[0].addressable_memories()}
  if 'pinned_host' not in kinds:
    raise UserError(f'optimizer.offload: this backend has no pinned host memory, only {", ".join(sorted(kinds))}')
  return sharding.with_memory_kind('pinned_host')


def axis_size(axis: str) -> int:
  """Size of an axis of the mesh that the surrounding `jax.set_mesh` names; 1 without one."""
  return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def platform() -> str:
  """Of the surrounding mesh, which need not lie here (programs are compiled for pods elsewhere); else this host's."""
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return getattr(device, 'platform', None) or jax.default_backend()


def spec(names: Sequence[str | None], shape: Sequence[int]) -> P:
  """How an activation lies on the surrounding mesh, by the logical name of each axis (see ACTIVATIONS).

  An axis that does not divide is not cut.
  """
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  out: list[Any] = []
  for name, size in zip(names, shape, strict=True):
    axes = tuple(a for a in ACTIVATIONS.get(name or '', ()) if sizes.get(a, 1) > 1)
    out.append(axes if axes and size % math.prod(sizes[a] for a in axes) == 0 else None)
  return P(*out)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says where an activation lies, see `spec`; gradients are held to the same. Without a mesh it says nothing."""
  if math.prod(dict(jax.sharding.get_abstract_mesh().shape).values()) == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape))


def placed(boxed: Any, where: Any) -> Any:
  """Shapes of a boxed pytree without its boxes, each with its sharding."""
  put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(put, nn.unbox(boxed), where)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays, sharded over the mesh, from this process's part [b, ...] of each."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
