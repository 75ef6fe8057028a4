"""What a run takes on a cluster that is not there: the real step compiled for TPUs, arithmetic for GPUs."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed.contracts import FIELDS
from jaxmed.data.feed import tokenizers
from jaxmed.errors import UserError
from jaxmed.parallel import chips, flops, sharding_table
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.parallel.axes import open_mesh
from jaxmed.parallel.chips import Cluster
from jaxmed.plan import hlo, roofline, worker
from jaxmed.plan.hlo import Collective
from jaxmed.plan.roofline import Bounds, Width
from jaxmed.train.build import assemble, data_spec, resolve, towers
from jaxmed.train.build.rundir import load_tower
from jaxmed.train.step import Trainer
from jaxmed.train.utilization import model_flops

ROWS, CLASSES, PER_CHIP = 1_000_000, 1000, 64
MASK_CLASSES = 2  # of masks, the background among them
SIGNAL, BOXES = (5000, 12), 16  # steps and channels of a signal, boxes of a record: 10 s of a 12-lead ECG at 500 Hz


@dataclasses.dataclass(frozen=True)
class Request:
  """What to plan: a config as the user wrote it, the images, the cluster."""

  user: dict[str, Any]
  cluster: Cluster
  channels: int = 3
  rows: int = ROWS


@dataclasses.dataclass(frozen=True)
class Job:
  """A request worked out: resolved config, trainer, sizes of the mesh, and the step's shapes on it."""

  config: ConfigDict
  spec: data_spec.DataSpec
  trainer: Trainer
  mesh: dict[str, int]
  cluster: Cluster

  @property
  def shards(self) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(self.mesh[a] for a in mesh_lib.BATCH_AXES)

  @property
  def item(self) -> int:
    """Bytes of a number in the encoder's products."""
    return np.dtype(jax.numpy.dtype(str(self.config.encoder.get('dtype', 'float32')))).itemsize

  @property
  def gathered(self) -> int:
    """Bytes of a number in a gather of weights."""
    return min(self.item, 2) if self.cluster.compiled else self.item


def prepare(request: Request) -> Job:
  """Resolves a request as `train` would on that cluster, without data.

  Raises:
    UserError: an unknown key or value, a mesh that does not fit the chips, a batch that does not divide.
  """
  user, chips_ = towers.short(request.user), request.cluster.chips
  wanted = user.pop('mesh', {}) or {}
  if not user.get('model'):
    raise UserError('a plan needs the model: give model=NAME, for example model=vit_base/16')
  user.setdefault('batch_size', min(PER_CHIP * chips_, request.rows))
  if 'label' in objectives.get(str(user.get('method', 'mae'))).REQUIRED:
    user = config_lib.merge({'loader': {'label': 'label'}}, user)
  spec = assumed(user, request)
  config = resolve.resolve(user, spec)
  config_lib.update(config, {'mesh': wanted})
  towers.opened(config, load_tower)
  mesh = mesh_sizes(config.mesh, chips_)
  trainer = assemble.build(config, spec)
  if open_mesh(config.mesh):
    boxed = jax.eval_shape(trainer.create, assemble.batch_shapes(config, spec))
    mesh = sharding_table.fitted(boxed, mesh, request.cluster.chip.memory)
  job = Job(config, spec, trainer, mesh, request.cluster)
  resolve.check_divides(config.batch_size, job.shards, config.optimizer.accumulate)
  return job


def assumed(user: Mapping[str, Any], request: Request) -> data_spec.DataSpec:
  """What a run would know of its data: images of the size that it trains on, unsigned bytes."""
  size = config_lib.given(user, 'image_size') or 224
  size = tuple(size) if isinstance(size, (tuple, list)) else (size,)
  rank = max(len(size), str(user['model']).rpartition('/')[2].count('x') + 1, 2)
  size = size * rank if len(size) == 1 else size
  channels = tuple({'name': f'channel{i}', 'mean': 0.5, 'std': 0.25} for i in range(request.channels))
  method = objectives.get(str(user.get('method', 'mae')))
  classes = tuple(f'class{i}' for i in range(CLASSES)) if method.PREDICTS == 'label' else ()
  words = dict(user.get('loader', {})).get('tokenizer', '')
  return data_spec.DataSpec(channels, request.channels, False, 'uint8', request.rows, size, classes,
                            holds=FIELDS, signal=SIGNAL, boxes=BOXES,
                            mask_values=tuple(range(MASK_CLASSES)),
                            mask_names=tuple(f'class{i}' for i in range(MASK_CLASSES)),
                            number=(0.0, 1.0) if data_spec.numeric(user) else (),
                            texts={'vocab_size': tokenizers.size_of(str(words))} if words else {})


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
  """The mesh over `count` devices, the axis that is 0 filled in, as `make_mesh` does over real ones.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  shape = mesh_lib.filled(sizes, count)
  if shape is None:
    fixed = math.prod(n for n in (sizes.get(a, 1) for a in mesh_lib.AXES) if n)
    wanted = ' x '.join(f'mesh.{a}={sizes.get(a, 1) or "rest"}' for a in mesh_lib.AXES)
    near = max(n for n in range(1, count + 1) if count % n == 0 and n <= max(fixed, 1))
    raise UserError(f'{wanted} does not fit {count} devices: the sizes must multiply to {count}, the fixed ones for '
                    f'example to {near}')
  return shape


def width(job: Job, model: float) -> Width:
  """Tokens that pass the student's blocks on one device, from the FLOPs: six a parameter and token."""
  encoder = job.trainer.objective.encoder
  dim, depth = getattr(encoder, 'embed_dim', 0), getattr(encoder, 'depth', 0)
  if not isinstance(dim, int) or not isinstance(depth, int) or not dim * depth:
    return Width()
  weights = depth * dim**2 * (4 + 2 * getattr(encoder, 'mlp_ratio', 4.0))
  return Width(model / 6 / weights / job.shards, dim, depth)


def compile_step(job_values: Mapping[str, Any]) -> dict[str, Any]:
  """The work of `worker`: compiles and reads the program."""
  from jax.experimental import topologies
  cluster = chips.parse(job_values['cluster'])
  job = prepare(Request(dict(job_values['user']), cluster, job_values['channels'], job_values['rows']))
  shape = 'x'.join(map(str, cluster.shape))
  more = {'num_slices': cluster.slices} if cluster.slices > 1 else {}
  described = topologies.get_topology_desc(f'{cluster.chip.name}:{shape}', platform='tpu', **more)
  devices: list[Any] = list(described.devices)
  mesh = mesh_lib.make_mesh(job.mesh, devices)
  batch = assemble.batch_shapes(job.config, job.spec, mesh)
  began = time.monotonic()
  try:
    program: Any = job.trainer.compile(job.trainer.abstract(batch, mesh), batch, mesh,
                                       towers.fixed_shapes(job.config, job.trainer.objective, mesh))
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return {'over': _exhausted(str(e)), 'seconds': time.monotonic() - began}
  memory, text = program.memory_analysis(), program.as_text()
  if job_values.get('text'):
    with open(job_values['text'], 'w', encoding='utf-8') as f:
      f.write(text)
  return {'seconds': time.monotonic() - began, 'peak': memory.peak_memory_in_bytes,
          'arguments': memory.argument_size_in_bytes, 'temporary': memory.temp_size_in_bytes,
          'kind': devices[0].device_kind, 'cost': dataclasses.asdict(hlo.cost(text, job.mesh))}


def _exhausted(text: str) -> dict[str, float]:
  """Bytes that the compiler wanted and had, from its error."""
  size = r'([\d.]+)([KMGT])'
  found = re.search(rf'Used {size} of {size}', text) or re.search(rf'\({size}\) exceeds available HBM \({size}\)', text)
  unit = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  return {'used': float(found[1]) * unit[found[2]], 'has': float(found[3]) * unit[found[4]]} if found else {}


@dataclasses.dataclass(frozen=True)
class Traced:
  """Of a global step, by its jaxpr. model: FLOPs without, executed: with rematerialisation; live: bytes at once.
  boxed: shapes of the state, with the logical axes of parameters.
  """

  model: int
  executed: int
  live: int
  boxed: Any

  def times(self, factor: int) -> 'Traced':
    """The same step on a batch `factor` times as large."""
    return Traced(factor * self.model, factor * self.executed, factor * self.live, self.boxed)


def trace(config: ConfigDict, spec: data_spec.DataSpec) -> Traced:
  """Looks at the jaxpr of a step, and at the one without rematerialisation."""
  trainer, batch = assemble.build(config, spec), assemble.batch_shapes(config, spec)
  boxed = jax.eval_shape(trainer.create, batch)
  jaxpr = jax.make_jaxpr(trainer.step)(nn.unbox(boxed), batch, towers.fixed_shapes(config, trainer.objective)).jaxpr
  return Traced(model_flops(config, spec), flops.count_jaxpr(jaxpr), roofline.live_bytes(jaxpr), boxed)


def analyse(job: Job, traced: Traced | None = None) -> dict[str, Any]:
  """The plan without a compiler: exact FLOPs and state, the least communication, an estimate of activations.

  Memory traffic is taken to be the state and the gradients twice, and the activations three times.
  """
  traced = traced or trace(job.config, job.spec)
  state = sharding_table.on_mesh(traced.boxed, job.mesh)
  sizes = roofline.state_bytes(state)
  needed = roofline.least(state, job.mesh, job.item, width(job, traced.model), job.gathered)
  local = math.ceil(traced.live / job.shards / job.mesh['tensor'])
  kept = sum(sizes.values()) + sizes['parameters']
  bounds = Bounds(traced.executed / job.cluster.chips / job.cluster.chip.flops,
                  (2 * kept + 3 * local) / job.cluster.chip.bandwidth,
                  roofline.network_seconds(needed, job.mesh, job.cluster))
  return _report(job, 'analytic', traced.model, None, sizes, local, kept + local, None, needed, bounds)


def plan(request: Request, text: str = '') -> dict[str, Any]:
  """The plan of a run: compiled where there is a compiler for the cluster, otherwise analytic.

  text: a file for the optimised program.
  """
  if request.cluster.compiled:
    worker.check()
  job = prepare(request)
  rough = analyse(job)
  if not request.cluster.compiled:
    return rough
  found = worker.run({'user': request.user, 'cluster': request.cluster.name, 'channels': request.channels,
                      'rows': request.rows, 'text': text})
  if 'over' in found:
    known = 'used' in found['over']  # otherwise the peak stays an estimate, and only the refusal is the compiler's
    peak = found['over']['used'] if known else rough['memory']['peak']
    return rough | {'memory': rough['memory'] | {'peak': peak, 'compiler': known, 'fits': False}, 'refused': True}
  return merge(job, rough, found)


def merge(job: Job, rough: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
  """A plan from what the compiler found, beside the analytic one."""
  cost = found['cost']
  have = [Collective(**{**c, 'axes': tuple(c['axes'])}) for c in cost['collectives']]
  least = [Collective(**{**c, 'axes': tuple(c['axes'])}) for c in rough['least']]
  chip = job.cluster.chip
  bounds = Bounds(cost['flops'] / chip.flops, cost['traffic'] / chip.bandwidth,
                  roofline.network_seconds(have, job.mesh, job.cluster))
  sizes = {name: rough['memory'][name] for name in roofline.STATE.values()}
  out = _report(job, 'compiled', rough['flops']['model'], cost['flops'] * job.cluster.chips, sizes,
                found['peak'] - found['arguments'], found['peak'], have, least, bounds)
  return out | {'compile_seconds': found['seconds'], 'unknown_loops': cost['unknown']}


def _report(job: Job, how: str, model: int, compiled: int | None, sizes: dict[str, int], local: int, peak: int,
            have: list[Collective] | None, least: list[Collective], bounds: Bounds) -> dict[str, Any]:
  config, cluster = job.config, job.cluster
  images = config.batch_size / bounds.step / cluster.hosts
  record = math.prod(config.loader.load_size) * job.spec.slots * np.dtype(job.spec.dtype).itemsize
  moved = lambda found: sum(c.moved for c in found)
  return {
      'how': how, 'cluster': cluster.name, 'chips': cluster.chips, 'hosts': cluster.hosts, 'mesh': job.mesh,
      'method': config.method, 'model': config.model, 'dtype': str(config.encoder.get('dtype', 'float32')),
      'remat': str(config.encoder.get('remat', '')), 'batch_size': config.batch_size, 'steps': config.steps,
      'memory': sizes | {'activations': local, 'peak': peak, 'chip': cluster.chip.memory, 'compiler': how == 'compiled',
                         'fits': peak <= cluster.chip.memory},
      'flops': {'model': model, 'compiled': compiled, 'ratio': compiled / model if compiled else None},
      'collectives': None if have is None else [dataclasses.asdict(c) | {'moved': c.moved} for c in have],
      'least': [dataclasses.asdict(c) for c in least],
      'network': {'moved': None if have is None else moved(have), 'least': moved(least)},
      'seconds': dataclasses.asdict(bounds) | {'step': bounds.step}, 'bound_by': bounds.by,
      'mfu': bounds.mfu(model, cluster), 'images_per_second': config.batch_size / bounds.step,
      'days': config.steps * bounds.step / 86400, 'samples': config.steps * config.batch_size,
      'input': {'images_per_second': images, 'bytes_per_second': images * record}}
