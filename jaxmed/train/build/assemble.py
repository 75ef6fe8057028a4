"""From a full config to what a run computes with: trainer, shapes of a batch, order of the records, mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmed import objectives
from jaxmed.augment import color
from jaxmed.augment.views import ViewMaker
from jaxmed.data.corpus import vocabulary
from jaxmed.data.feed import sampling
from jaxmed.errors import UserError
from jaxmed.models import registry
from jaxmed.objectives.networks import Clock
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.parallel import process, sharding_table
from jaxmed.parallel.axes import filled, open_mesh
from jaxmed.parallel.mesh import make_mesh
from jaxmed.train.build import groups, towers, view_sizes
from jaxmed.train.build.data_spec import DataSpec
from jaxmed.train.build.resolve import MIXTURE
from jaxmed.train.optimizer import Optimizer
from jaxmed.train.step import Trainer


def build(config: ConfigDict, spec: DataSpec) -> Trainer:
  """The trainer that a resolved config describes."""
  model = registry.create_model(config.model, tuple(config.image_size), len(spec.channels),
                                vocabulary.described(spec.channels), **config.encoder)
  if config.augment.channel_sampling == 'diverse' and not model.supports.channel_vectors:
    raise UserError(f'augment.channel_sampling=diverse looks at channel embeddings, of which {config.model} has none: '
                    'take hcs, or a channel_vit')
  method = objectives.get(config.method)
  clock = Clock(config.steps, spec.rows / config.batch_size)
  others = towers.models(config, len(spec.channels), vocabulary.described(spec.channels))
  objective = method(encoder=model, **config.objective,
                     **objectives.filled(method, clock=clock, rows=spec.rows, towers=others))
  table = lambda key: tuple(float(c[key]) for c in spec.channels)
  place = len(spec.channels) if spec.mixed and not model.per_channel else 0
  whole = np.issubdtype(spec.dtype, np.integer)
  augment = {k: v for k, v in config.augment.items() if k not in view_sizes.LISTS}
  view = ViewMaker(tuple(config.image_size), table('mean'), table('std'), config.loader.normalize, place,
                   rgb=color.rgb_ids(spec.vocabulary), top=float(np.iinfo(spec.dtype).max) if whole else 1.0, **augment)
  o = config.optimizer
  return Trainer(objective, optimizer_of(config, method), view, config.seed, o.accumulate, o.ema, o.offload,
                 config.on_spike == 'skip', *view_sizes.views(config, view))


def optimizer_of(config: ConfigDict, method: Any) -> Optimizer:
  """The optimizer that a config describes, with the groups of method and config."""
  o = {k: v for k, v in config.optimizer.items()
       if k not in ('accumulate', 'ema', 'offload', 'warmup_epochs', 'options', 'groups')}
  trained = tuple(towers.path_of(name) for name in method.TOWERS if not config.towers.get(name, {}).get('fixed'))
  own = groups.of(config.optimizer.groups.to_dict(), method.GROUPS)
  return Optimizer(
      config.learning_rate, config.steps, options=tuple(sorted(config.optimizer.options.to_dict().items())),
      groups=own, towers=trained, freeze=groups.names(config.freeze), **o)


def batch_shapes(config: ConfigDict, spec: DataSpec, mesh: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch as it reaches the step."""
  b, c = config.batch_size, spec.slots
  sharding = None if mesh is None else mesh_lib.batch_sharding(mesh)
  shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, np.dtype(dtype), sharding=sharding)
  out = {
      'image': shape((b, *config.loader.load_size, c), spec.dtype), 'channels': shape((b, c), 'int32'),
      'label': shape((b,), 'int32'), 'index': shape((b,), 'int32'),
  }
  return out | ({'channel_mask': shape((b, c), 'bool')} if spec.masked else {})


def reading(config: ConfigDict, spec: DataSpec) -> dict[str, Any]:
  """How this process reads batches of records for the step: arguments that `data.pipeline`'s functions share."""
  classes = {'label': config.loader.label, 'classes': spec.classes} if spec.classes else {}
  return dict(size=tuple(config.loader.load_size), vocabulary=spec.ids, fit=config.loader.fit,
              process_index=jax.process_index(), process_count=jax.process_count(), **classes)


def sampler(config: ConfigDict, source: Any) -> sampling.Sampler | None:
  """Which record stands where in the run's stream; None for a plain shuffle."""
  mixture = sampling.Mixture(**{key: config.loader[key] for key in MIXTURE})
  return sampling.make(source, mixture, config.seed, config.batch_size, config.steps)


def mesh_of(config: Any, spec: DataSpec, trainer: Trainer) -> Mesh:
  """The mesh of a run. With mesh.data=0 and mesh.fsdp=0 the state decides how many devices share a copy of it."""
  sizes = dict(config.mesh)
  if open_mesh(sizes):
    memory = min(process.gather('device memory', sharding_table.device_memory() or 0))
    whole = filled(sizes, jax.device_count())
    if memory and whole:
      boxed = jax.eval_shape(trainer.create, batch_shapes(config, spec))
      sizes = sharding_table.fitted(boxed, whole, memory)
  return make_mesh(sizes)
