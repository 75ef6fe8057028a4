"""Memory, least communication and the bounds on a step's time: arithmetic on shapes, shardings and published rates."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.extend import core

from jaxmed.parallel.chips import Cluster
from jaxmed.parallel.sharding_table import bytes_per_device
from jaxmed.plan.hlo import Collective

STATE = {'params': 'parameters', 'moments': 'optimizer', 'target': 'target', 'average': 'average', 'extra': 'extra'}


def state_bytes(state: Any) -> dict[str, int]:
  """Bytes of the parts of a `TrainState` on one device."""
  return {name: bytes_per_device(getattr(state, field)) for field, name in STATE.items()}


def live_bytes(jaxpr: Any) -> int:
  """Most bytes that are alive at once of what a jaxpr computes, its inputs not counted; no fusion is assumed.

  Values of a scan's body are freed before its next round; what is kept for the backward pass is an output of the scan.
  """
  last = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, core.Literal)}
  last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, core.Literal)}
  ends: dict[int, list[int]] = {}
  alive = most = 0
  for n, eqn in enumerate(jaxpr.eqns):
    inner = [j.jaxpr if isinstance(j, core.ClosedJaxpr) else j for j in core.jaxprs_in_params(eqn.params)]
    made = sum(_bytes(v.aval) for v in eqn.outvars if v in last)
    most = max(most, alive + max(made, max((live_bytes(j) for j in inner), default=0)))
    alive += made - sum(ends.pop(n, []))
    for v in eqn.outvars:
      if v in last:
        ends.setdefault(last[v], []).append(_bytes(v.aval))
  return most


def _bytes(aval: Any) -> int:
  return math.prod(getattr(aval, 'shape', ())) * getattr(getattr(aval, 'dtype', None), 'itemsize', 0)


@dataclasses.dataclass(frozen=True)
class Width:
  """What tensor parallelism adds: tokens that a device's samples have, residual width and depth of the blocks."""

  tokens: float = 0.0
  embed_dim: int = 0
  depth: int = 0


def least(state: Any, mesh: Mapping[str, int], item: int, width: Width = Width(),
          gathered: int = 0) -> list[Collective]:
  """The collectives that a sharding needs, each once a step: what compiled ones are measured against.

  With n the devices that an axis (or several) has, and bytes those of a parameter in the dtype of the products (`item`
  bytes a number; XLA converts before it sends):
    data parallel (replica, data): all-reduce of each gradient, 2 (n-1)/n bytes;
    fsdp: all-gather of each parameter sharded over it, forward and backward, and reduce-scatter of its gradient,
      (n-1)/n bytes each; the rest of the data parallel all-reduce then is over 1/n of the bytes. A parameter that a
      teacher (target) has too is gathered once more, for its forward pass. What fsdp does not shard is all-reduced over
      fsdp with the data axes;
    tensor: four all-reduces a block, of the residual stream [tokens, embed_dim], two each way (Shoeybi et al. 2019,
      arXiv 1909.08053); parameters sharded over it count with their part.
  `gathered` is the size of a number in a gather, where it differs: a TPU multiplies float32 in bfloat16 by default, so
  XLA gathers it as that. Statistics of the loss and of norms, single numbers and vectors, are not counted. It is a
  measure, not a bound: a compiler that keeps a gathered weight for the backward pass (those outside the loop over
  layers) sends a little less.
  """
  gathered = gathered or item
  data, shards = mesh['replica'] * mesh['data'], mesh['fsdp']
  sharded, whole = _split(state.params, mesh)
  taught, _ = _split(state.target, mesh)
  outer = tuple(a for a in ('replica', 'data') if mesh[a] > 1)
  every = outer + (('fsdp',) if shards > 1 else ())
  out = [Collective('all-reduce', sharded * item / shards, data, outer, 1, 'gradients of sharded parameters'),
         Collective('all-reduce', whole * item, data * shards, every, 1, 'gradients'),
         Collective('all-gather', sharded * gathered, shards, ('fsdp',), 2, 'parameters, forward and backward'),
         Collective('all-gather', taught * gathered, shards, ('fsdp',), 1, 'parameters of the teacher'),
         Collective('reduce-scatter', sharded * item, shards, ('fsdp',), 1, 'gradients')]
  if mesh['tensor'] > 1:
    size = width.tokens * width.embed_dim * item
    out.append(Collective('all-reduce', size, mesh['tensor'], ('tensor',), 4 * width.depth, 'activations'))
  return [c for c in out if c.group > 1 and c.size]


def _split(tree: Any, mesh: Mapping[str, int]) -> tuple[float, float]:
  """Numbers of parameters of a tensor shard: those that fsdp shards (before it does), and the others."""
  sharded = whole = 0.0
  for x in jax.tree.leaves(tree):
    axes = {a for part in x.sharding.spec if part for a in ((part,) if isinstance(part, str) else part)}
    size = math.prod(x.shape) / (mesh['tensor'] if 'tensor' in axes else 1)
    if 'fsdp' in axes:
      sharded += size
    else:
      whole += size
  return sharded, whole


def network_seconds(collectives: Iterable[Collective], mesh: Mapping[str, int], cluster: Cluster) -> float:
  """Least time on the network: every link busy, both levels (fast domain, between domains) used in turn.

  A group larger than a fast domain of m members does its part inside over `link` and sends 1/m between domains.
  """
  inner = near = far = 0.0
  for c in collectives:
    inner = _inside(c, mesh, cluster.domain)
    outer = c.group / inner
    twice = 2 if c.kind == 'all-reduce' else 1
    if c.kind == 'all-to-all':
      near += c.times * c.size * (inner - 1) / c.group
      far += c.times * c.size * (c.group - inner) / c.group
    elif c.kind == 'collective-permute':
      near += c.moved
    else:
      near += c.times * twice * c.size * (inner - 1) / inner
      far += c.times * twice * c.size / inner * (outer - 1) / outer
  return near / cluster.chip.link + far / cluster.chip.network


def _inside(c: Collective, mesh: Mapping[str, int], domain: int) -> int:
  """Members of a group that share a fast domain; devices are numbered with the last axis of the mesh fastest."""
  names = list(mesh)
  used = [names.index(a) for a in c.axes if a in names]
  stride = math.prod(mesh[a] for a in names[max(used) + 1 :]) if used else 1
  return min(c.group, max(domain // stride, 1))


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Least seconds of a step by each resource, and what follows from the largest of them."""

  compute: float
  memory: float
  network: float

  @property
  def step(self) -> float:
    """Seconds, everything overlapped perfectly."""
    return max(self.compute, self.memory, self.network)

  @property
  def by(self) -> str:
    """The resource that bounds."""
    return max(('compute', 'memory', 'network'), key=lambda name: getattr(self, name))

  def mfu(self, model_flops: float, cluster: Cluster) -> float:
    """Model FLOPs of a step over what the chips could do in its least time."""
    return model_flops / (cluster.chips * cluster.chip.flops * self.step)
