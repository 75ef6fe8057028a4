"""From a full config to what a run computes with: trainer, shapes of a batch, order of the records, mesh."""

import math
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmed import objectives
from jaxmed.augment import color
from jaxmed.augment.views import ViewMaker
from jaxmed.contracts import Field
from jaxmed.data.corpus import vocabulary
from jaxmed.data.feed import fields as fields_lib
from jaxmed.data.feed import foreground, sampling
from jaxmed.data.feed import windows as windows_lib
from jaxmed.data.feed.lacking import Lack
from jaxmed.data.feed.windows import Windows
from jaxmed.errors import UserError
from jaxmed.models import registry
from jaxmed.objectives.networks import Clock
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.parallel import process, sharding_table
from jaxmed.parallel.axes import filled, open_mesh
from jaxmed.parallel.mesh import make_mesh
from jaxmed.train.build import adapting, groups, towers, view_sizes, wording
from jaxmed.train.build.data_spec import DataSpec
from jaxmed.train.build.resolve import MIXTURE, samples
from jaxmed.train.optimizer import Optimizer
from jaxmed.train.step import Trainer
from jaxmed.train.width import Width, compared


def build(config: ConfigDict, spec: DataSpec) -> Trainer:
  """The trainer that a resolved config describes."""
  model = registry.create_model(config.model, tuple(config.image_size), len(spec.channels),
                                vocabulary.described(spec.channels), **config.encoder)
  model = adapting.attached(model, config)
  if config.augment.channel_sampling == 'diverse' and not model.supports.channel_vectors:
    raise UserError(f'augment.channel_sampling=diverse looks at channel embeddings, of which {config.model} has none: '
                    'take hcs, or a channel_vit')
  method = objectives.get(config.method)
  clock = Clock(config.steps, samples(config, spec) / config.batch_size)
  others = towers.models(config, len(spec.channels), vocabulary.described(spec.channels))
  names = dict(zip(spec.mask_values, spec.mask_names))
  known = objectives.filled(method, clock=clock, rows=spec.rows, towers=others, stored=spec.mask_values,
                            bases=math.prod(config.augment.tiles), window=config.loader.window,
                            names=tuple(names.get(v, str(v)) for v in config.objective.get('values', ())))
  given = {k: FrozenDict(v.to_dict()) if isinstance(v, ConfigDict) else v for k, v in config.objective.items()}
  objective = method(encoder=model, **given, **known)
  table = lambda key: tuple(float(c[key]) for c in spec.channels)
  place = len(spec.channels) if spec.mixed and not model.per_channel else 0
  whole = np.issubdtype(spec.dtype, np.integer)
  augment = {k: v for k, v in config.augment.items() if k not in view_sizes.LISTS}
  view = ViewMaker(tuple(config.image_size), table('mean'), table('std'), config.loader.normalize, place,
                   rgb=color.rgb_ids(spec.vocabulary), top=float(np.iinfo(spec.dtype).max) if whole else 1.0, **augment)
  o = config.optimizer
  width = None
  if o.scaling == 'mup':
    views = jax.eval_shape(view, jax.random.key(0), batch_shapes(config, spec))
    width = compared(objective, o.base_width, o.base_heads, views)
  return Trainer(objective, optimizer_of(config, method, width), view, config.seed, o.accumulate, o.ema, o.offload,
                 config.on_spike == 'skip', *view_sizes.views(config, view), width)


def optimizer_of(config: ConfigDict, method: Any, width: Width | None = None) -> Optimizer:
  """The optimizer that a config describes, with the groups of method and config, and rates by `width`."""
  o = {k: v for k, v in config.optimizer.items()
       if k not in ('accumulate', 'ema', 'offload', 'warmup_epochs', 'options', 'groups', 'scaling', 'base_width',
                    'base_heads')}
  fixed = lambda name: config.towers.get(name, {'fixed': name in method.OPTIONAL}).get('fixed')
  trained = tuple(towers.path_of(name) for name in method.TOWERS if not fixed(name))
  own = groups.of(config.optimizer.groups.to_dict(), method.GROUPS)
  return Optimizer(
      config.learning_rate, config.steps, options=tuple(sorted(config.optimizer.options.to_dict().items())),
      groups=own, towers=trained, freeze=groups.names(config.freeze), growth=width.growth if width else (),
      adapted=(towers.path_of(towers.IMAGE),) if config.adapter.name else (), beside=adapting.beside(config), **o)


def fields(config: ConfigDict, spec: DataSpec) -> tuple[Field, ...]:
  """What a sample of a run is made of; pipeline, padding and shapes follow from this list."""
  return fields_lib.of(objectives.get(config.method).FIELDS, size=config.loader.load_size, slots=spec.slots,
                       dtype=spec.dtype, masked=spec.masked, **lengths(config, spec))


def lengths(config: ConfigDict, spec: DataSpec) -> dict[str, Any]:
  """Sizes of texts, signals, boxes, classes of masks, and whether there is an extent, as arguments of `fields.of`."""
  steps, channels = spec.signal or (0, 0)
  return {'text_length': config.loader.text_length, 'signal': (config.loader.signal_length or steps, channels),
          'boxes': spec.boxes, 'extent': config.loader.fit == 'aspect', 'labels': len(spec.mask_values)}


def batch_shapes(config: ConfigDict, spec: DataSpec, mesh: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch as it reaches the step."""
  lead = (config.batch_size, *([config.loader.window] if config.loader.window else []))
  sharding = None if mesh is None else mesh_lib.batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
          for name, (shape, dtype) in fields_lib.shapes(fields(config, spec), *lead).items()}


def reading(config: ConfigDict, spec: DataSpec) -> dict[str, Any]:
  """How this process reads batches of records for the step: arguments that `data.pipeline`'s functions share."""
  classes = {'label': config.loader.label, 'classes': spec.classes} if spec.classes else {}
  classes |= {'number': config.loader.label} if spec.number else {}
  return dict(size=tuple(config.loader.load_size), vocabulary=spec.ids, fit=config.loader.fit, labels=spec.mask_values,
              fields=fields(config, spec), texts=wording.of(spec.texts), process_index=jax.process_index(),
              process_count=jax.process_count(),
              **classes)


def windows(config: ConfigDict, source: Any) -> Windows | None:
  """The windows of a source that are a run's samples; None where each record is one."""
  loader = config.loader
  return windows_lib.make(source, loader.window, loader.window_group, loader.window_order, loader.window_stride)


def sampler(config: ConfigDict, source: Any, windows: Windows | None = None) -> sampling.Sampler | None:
  """Which record, or window, stands where in the run's stream; None for a plain shuffle."""
  mixture = sampling.Mixture(**{key: config.loader[key] for key in MIXTURE})
  if windows is not None and not mixture.plain:
    source = windows.heads(source)
  return sampling.make(source, mixture, config.seed, config.batch_size // config.loader.crops, config.steps)


def stream(config: ConfigDict, source: Any, lack: Lack | None) -> dict[str, Any]:
  """The run's stream of samples, as arguments of `pipeline.train_batches`: windows, their order, missing channels,
  crops of a record, and crops that must show a class."""
  samples = windows(config, source)
  loader = config.loader
  forced = foreground.make(source, loader.foreground, loader.foreground_rule,
                           config.batch_size // loader.crops)
  return {'windows': samples, 'sampler': sampler(config, source, samples), 'lack': lack, 'foreground': forced,
          'crops': loader.crops}


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
