"""From what the user wrote to everything that a run is made of."""

import collections
import dataclasses
import difflib
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow.compute as pc
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import files, objectives
from jaxmed.augment import color, intensity
from jaxmed.augment.views import ViewMaker
from jaxmed.data.corpus import joint, vocabulary
from jaxmed.data.corpus.vocabulary import Vocabulary
from jaxmed.data.feed import lacking, sampling
from jaxmed.errors import UserError, choose
from jaxmed.models import registry
from jaxmed.objectives.networks import Clock
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import loggers
from jaxmed.train.build import view_sizes
from jaxmed.train.optimizer import Optimizer
from jaxmed.train.step import Trainer

# Images that a run sees where the user gives neither steps nor epochs: minutes on a CPU, hours on an accelerator.
CPU_IMAGES, ACCELERATOR_IMAGES = 20_000, 5_000_000

# What may change when a run goes on: nothing that alters the weights it ends with.
RESUMABLE = ('checkpoint_every', 'eval_every', 'log_every', 'data', 'mesh', 'checkpoint', 'watchdog', 'loader.threads',
             'on_collapse', 'on_spike', 'evaluation', 'leak_encoder', 'on_leak', 'loggers')
NO_VOCABULARY = Vocabulary()
UNKNOWN = config_lib.CHOICES['loader.unknown']
ON_LEAK = config_lib.CHOICES['on_leak']
MIXTURE = tuple(f.name for f in dataclasses.fields(sampling.Mixture))  # keys of `loader`
# Keys that runs of earlier versions lack, whose defaults do what those did.
ADDED = ('on_spike', 'evaluation', 'leak_encoder', 'on_leak', 'loggers', 'checkpoint.minutes', 'checkpoint.keep_every',
         'watchdog.minutes', 'mesh.sequence', 'loader.sources', 'loader.held_out', 'loader.missing',
         'loader.vocabulary', 'loader.unknown', 'augment.channel_temperature', *(f'loader.{key}' for key in MIXTURE),
         'optimizer.moments', 'optimizer.offload', 'init_parts',
         *(f'augment.{name}' for name in view_sizes.LISTS))


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """What a run must know of its data, saved in RUN/data.json so that a run can be read without its corpus.

  channels: [{'name', 'mean', 'std'}], the vocabulary; where a vocabulary file knows more, 'aliases' and 'features' too,
  see `data.vocabulary`. slots: most channels of a record. masked: whether some
  records have fewer. mixed: whether records differ in their channels. dtype: of batches. rows: records to train on.
  classes: of the label, () for none.
  """

  channels: tuple[dict[str, Any], ...]
  slots: int
  masked: bool
  dtype: str
  rows: int
  size: tuple[int, ...]  # median grid of the records
  classes: tuple[str, ...] = ()
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)
  mixed: bool = False

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Channel names by id."""
    return tuple(c['name'] for c in self.channels)

  @property
  def ids(self) -> dict[str, int]:
    """The id of each channel by its name and aliases."""
    return vocabulary.ids_of(self.channels)


def resolve(user: Mapping[str, Any], spec: DataSpec) -> ConfigDict:
  """The full config of a run: defaults, then the method's, then what the user set, then what is still open.

  Raises:
    UserError: an unknown key, method or model (naming the nearest), a value of another type, or a conflict.
  """
  method = str(user.get('method', 'mae'))
  objective = objectives.get(method)
  config = config_lib.base()
  on_cpu = jax.default_backend() == 'cpu'
  size = _image_size(user, spec)
  model = str(user.get('model', '')) or _choose_model(spec, size, on_cpu)
  config.objective = ConfigDict(objectives.default_options(method))
  config.encoder = ConfigDict(registry.default_options(model))
  wants = dict(objective.DEFAULTS)
  wants['encoder'] = {k: v for k, v in wants.get('encoder', {}).items() if k in config.encoder}  # families differ
  wants['augment'] = _wanted_views(wants.get('augment', {}), user)
  for values in (wants, user, {'method': method, 'model': model, 'image_size': size}):
    config_lib.update(config, values)
  check_values(config)
  _fill_sizes(config, objective, spec, on_cpu)
  _fill_views(config, objective)
  _fill_objective(config, spec)
  return config


def _wanted_views(wants: dict[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
  """A method's wishes for views, without changes of colour where the user's normalisation rules them out."""
  loader = user.get('loader')
  normalize = loader.get('normalize', 'corpus') if isinstance(loader, Mapping) else 'corpus'
  if str(normalize).partition(':')[0] in intensity.COLORED:
    return wants
  return {k: v for k, v in wants.items() if k not in ('color', 'grayscale')}


# Smallest and largest values; zero of the first ones means "chosen here".
_RANGES: dict[str, tuple[float, float]] = {
    'steps': (0, math.inf), 'epochs': (0, math.inf), 'batch_size': (0, math.inf), 'learning_rate': (0, math.inf),
    'checkpoint_every': (0, math.inf), 'eval_every': (0, math.inf), 'seed': (0, 2**31 - 1), 'log_every': (1, math.inf),
    'loader.threads': (1, 256), 'checkpoint.keep': (1, math.inf), 'optimizer.accumulate': (1, math.inf),
    'checkpoint.keep_every': (0, math.inf), 'checkpoint.minutes': (0, math.inf),
    'optimizer.b1': (0, 1 - 1e-9), 'optimizer.b2': (0, 1 - 1e-9), 'optimizer.ema': (0, 1 - 1e-9),
    'optimizer.weight_decay': (0, math.inf), 'optimizer.warmup_steps': (0, math.inf), 'optimizer.clip': (0, math.inf),
    'optimizer.warmup_epochs': (0, math.inf), 'optimizer.final_learning_rate': (0, math.inf),
    'optimizer.patch_embed_scale': (0, math.inf), 'optimizer.bias_scale': (0, math.inf),
}


def check_values(config: ConfigDict) -> None:
  """Ranges and choices of what no other part checks when it is built."""
  values = config_lib.flat(config)
  for key, (low, high) in _RANGES.items():
    if not low <= values[key] <= high:
      wanted = f'at least {low}' if math.isinf(high) else f'between {low} and {round(high, 6)}'
      raise UserError(f'{key} must be {wanted}, not {values[key]}')
  intensity.parse_mode(config.loader.normalize)
  for key, choices in config_lib.CHOICES.items():
    for value in values[key] if isinstance(values[key], tuple) else (values[key],):
      choose(key, value, choices)
  loggers.check(config.loggers)
  sampling.Mixture(**{key: config.loader[key] for key in MIXTURE})
  size = config.loader.load_size
  config.loader.load_size = size * len(config.image_size) if len(size) == 1 else size
  rank = len(config.image_size)
  if size and (len(config.loader.load_size) != rank or not all(type(n) is int and n > 0 for n in size)):
    raise UserError(f'loader.load_size takes {rank} positive whole numbers, not {size}')


def _image_size(user: Mapping[str, Any], spec: DataSpec) -> tuple[int, ...]:
  rank = len(spec.size)
  size = user.get('image_size') or ()
  size = tuple(size) if isinstance(size, (tuple, list)) else (size,)
  if not all(isinstance(n, int) and n > 0 for n in size):
    raise UserError(f'image_size takes positive whole numbers, not {user.get("image_size")!r}')
  if not size:
    patch = 8 if max(spec.size) <= 96 else 16
    top = 224 if rank == 2 else 64
    return tuple(max(patch, min(n, top) // patch * patch) for n in spec.size)
  size = size * rank if len(size) == 1 else size
  if len(size) != rank:
    raise UserError(f'image_size {size} has {len(size)} axes, but the images have {rank}: {spec.size}')
  return size


def _choose_model(spec: DataSpec, size: tuple[int, ...], on_cpu: bool) -> str:
  width = 'micro' if on_cpu else 'tiny' if spec.rows < 20_000 else 'small' if spec.rows < 200_000 else 'base'
  patch = 16 if all(n % 16 == 0 and n > 96 for n in size) else 8 if all(n % 8 == 0 for n in size) else 4
  return f'channel_vit_{width}/{patch}'


def _fill_sizes(config: ConfigDict, objective: Any, spec: DataSpec, on_cpu: bool) -> None:
  """Batch, length, rate: zero means chosen here."""
  batch = config.batch_size or min(64 if on_cpu else 64 * jax.device_count(), spec.rows)
  if batch > spec.rows:
    raise UserError(f'batch_size {batch} is larger than the {spec.rows} training records')
  shards = mesh_lib.batch_shards(mesh_lib.make_mesh(config.mesh))
  if not config.batch_size:
    batch = max(batch // shards, 1) * shards
  check_divides(batch, shards, config.optimizer.accumulate)
  config.batch_size = batch
  if not config.steps:
    budget = CPU_IMAGES if on_cpu else ACCELERATOR_IMAGES
    config.epochs = config.epochs or float(np.clip(budget / spec.rows, 1, 400))
    config.steps = max(1, math.ceil(config.epochs * spec.rows / batch))
  config.epochs = config.steps * batch / spec.rows
  rate, reference = objective.LEARNING_RATE
  config.learning_rate = config.learning_rate or rate * math.sqrt(batch / reference)
  epochs = config.optimizer.warmup_epochs
  config.optimizer.warmup_steps = (
      config.optimizer.warmup_steps or math.ceil(epochs * spec.rows / batch) or config.steps // 10)
  config.checkpoint_every = config.checkpoint_every or max(config.steps // 10, min(100, config.steps))
  config.eval_every = config.eval_every or max(config.steps // 5, 1)
  if not config.loader.load_size:
    fit = [min(n, max(s, round(1.5 * s))) for n, s in zip(spec.size, config.image_size, strict=True)]
    config.loader.load_size = tuple(max(n, s) for n, s in zip(fit, config.image_size, strict=True))


def _fill_views(config: ConfigDict, objective: Any) -> None:
  """Sizes of views; whether there are as many as the method needs."""
  augment, rank = config.augment, len(config.image_size)
  needs = objective.DEFAULTS.get('augment', {}).get('views', 1)
  if (needs > 1) != (augment.views > 1) or (needs == 1 and augment.local_views):
    takes = 'compares views: augment.views must be at least 2' if needs > 1 else 'takes one view and no local ones'
    raise UserError(f'method {config.method} {takes}, not augment.views={augment.views} '
                    f'local_views={augment.local_views}')
  if augment.local_views and not augment.local_size:
    patch = registry.create_model(config.model, tuple(config.image_size), 1, **config.encoder).patch_size
    augment.local_size = tuple(max(round(n * 3 / 7 / p), 1) * p for n, p in zip(config.image_size, patch, strict=True))
  for name in ('local_size', 'gram_size'):
    size = augment[name] * rank if len(augment[name]) == 1 else augment[name]
    if size and (len(size) != rank or not all(type(n) is int and n > 0 for n in size)):
      raise UserError(f'augment.{name} takes {rank} positive whole numbers, not {augment[name]}')
    augment[name] = size
  view_sizes.check(config)


def _fill_objective(config: ConfigDict, spec: DataSpec) -> None:
  if 'num_classes' in config.objective:
    config.objective.num_classes = len(spec.classes)
    if not config.loader.label and config.objective.get('class_weight', 1.0):  # by default the method is about classes
      raise UserError(f'method {config.method} needs loader.label=COLUMN, a column of the manifest')


def data_spec(source: Any, label: str, known: Vocabulary = NO_VOCABULARY,
              lack: lacking.Lack | None = None) -> DataSpec:
  """Looks at the manifest and statistics of a `data.corpus.source.Source` (already reduced to the rows to train on).

  Channels that `known` gives one name are one channel; a UserError where a record has two of them. With `lack`
  (loader.missing) records differ in their channels.
  """
  if not len(source):
    raise UserError('the corpus has no record to train on')
  codes, sets = source.distinct('channels')
  places, shapes = source.distinct('shape')
  of_set, of_shape = (np.bincount(x, minlength=len(y)) for x, y in ((codes, sets), (places, shapes)))
  if len({len(s) for s in shapes}) > 1:
    raise UserError(f'the corpus mixes images and volumes (shapes {shapes[0]} and others): prepare them separately')
  channels = _channels(source, sets, known)
  counts = {len(row) for row in sets}
  dtypes = source.distinct('dtype')[1]
  dtype = dtypes[0] if len(dtypes) == 1 else 'float32'
  size = tuple(_median(axis, of_shape) for axis in np.array([s[:-1] for s in shapes]).T)
  classes = tuple(source.classes(label)) if label else ()
  summary = {
      'records': len(source), 'subjects': pc.count_distinct(source.column('subject'), mode='all').as_py(),
      'sources': _counted(*source.distinct('source')),
      'channel_sets': _commonest(('+'.join(row) for row in sets), of_set),
      'sizes': _commonest(('x'.join(map(str, s[:-1])) for s in shapes), of_shape),
  }
  lacks = lack is not None
  return DataSpec(channels, max(counts), len(counts) > 1 or lacks,
                  dtype if dtype in ('uint8', 'uint16', 'int16') else 'float32', len(source), size, classes, summary,
                  len(sets) > 1 or lacks)


def _channels(source: Any, sets: list, known: Vocabulary) -> tuple[dict[str, Any], ...]:
  """The entries of `DataSpec.channels`, from the sets of channels of the records."""
  for row in sets:
    own = [known.name(c) for c in row]
    twice = [c for c in row if own.count(known.name(c)) > 1]
    if twice:
      raise UserError(f'{source.path} has records with the channels {" and ".join(twice)}, which are both '
                      f'{known.name(twice[0])!r} in the vocabulary: give one of them another name')
  by_name: dict[str, list[str]] = {}
  for name in source.channels:
    by_name.setdefault(known.name(name), []).append(name)
  out = []
  for name, own in by_name.items():
    stats = joint.merged([{name: source.stats[n]} for n in own])[name]
    entry = {'name': name, 'mean': stats['mean'], 'std': stats['std']}
    aliases = sorted({*known.aliases(name), *own} - {name})
    entry |= {'aliases': aliases} if aliases else {}
    out.append(entry | ({'features': known.features[name]} if name in known.features else {}))
  return tuple(out)


def vocabulary_of(user: Mapping[str, Any], source: Any) -> Vocabulary:
  """What the file of loader.vocabulary says; tells of channels that it lacks, or raises, as loader.unknown wants."""
  loader = dict(user.get('loader', {}))
  if not loader.get('vocabulary'):
    return NO_VOCABULARY
  known = vocabulary.read(str(loader['vocabulary']))
  action = choose('loader.unknown', str(loader.get('unknown', 'warn')), UNKNOWN)
  for name in known.unknown(source.channels):
    near = difflib.get_close_matches(name, list(known.names), n=3, cutoff=0.4)
    text = (f'{source.path} has the channel {name!r}, which {loader["vocabulary"]} does not name' +
            (f' (near it: {", ".join(near)})' if near else ''))
    if action == 'error':
      raise UserError(text)
    if action == 'warn' and jax.process_index() == 0:
      print(f'jaxmed: {text}', file=sys.stderr, flush=True)
  return known


def _median(values: np.ndarray, counts: np.ndarray) -> int:
  """The median of values that occur so often, rounded down."""
  order = np.argsort(values, kind='stable')
  ends, n = np.cumsum(counts[order]), int(counts.sum())
  low, high = (values[order][np.searchsorted(ends, k, side='right')] for k in ((n - 1) // 2, n // 2))
  return int((int(low) + int(high)) / 2)


def _counted(codes: np.ndarray, values: list) -> dict[str, int]:
  return dict(zip(map(str, values), np.bincount(codes, minlength=len(values)).tolist(), strict=True))


def _commonest(values: Iterable[str], counts: np.ndarray) -> dict[str, int]:
  """The ten most frequent values; equal ones by name."""
  total: collections.Counter[str] = collections.Counter()
  for value, n in sorted(zip(values, counts.tolist(), strict=True)):
    total[value] += n
  return dict(total.most_common(10))


def check_same(spec: DataSpec, source: Any) -> None:
  """A run goes on only with the records that it began with: their order depends on how many there are."""
  if len(source) != spec.rows or {spec.ids.get(c, c) for c in source.channels} != set(spec.ids.values()):
    tell = lambda rows, names: f'{rows} records to train on with channels {", ".join(names)}'
    raise UserError(f'{source.path} has {tell(len(source), source.channels)}, but the run began with '
                    f'{tell(spec.rows, spec.vocabulary)}: give the same corpus with --data')
  widest = max(map(len, source.distinct('channels')[1]))
  if widest > spec.slots:
    raise UserError(f'{source.path} has a record of {widest} channels, but the run began with at most {spec.slots}, '
                    'for which its batches have room: give the same corpus with --data')


def check_divides(batch: int, shards: int, accumulate: int, advice: str = '') -> None:
  """Raises a UserError where a batch does not divide over devices and microbatches, naming the nearest or `advice`."""
  unit = shards * accumulate
  if batch % unit:
    advice = advice or f'nearest is {max(round(batch / unit), 1) * unit}'
    raise UserError(f'batch_size {batch} does not divide over {shards} devices x {accumulate} microbatches: {advice}')


def check_shares(config: ConfigDict, mesh: Any) -> None:
  """Whether this many devices and processes can share the batch; they may be others than those a run began with."""
  shards = mesh_lib.batch_shards(mesh)
  check_divides(config.batch_size, shards, config.optimizer.accumulate, 'use another number of devices, or mesh.tensor')
  if shards % jax.process_count():
    raise UserError(f'mesh {dict(mesh.shape)} puts the same part of a batch on {jax.process_count()} processes: its '
                    'data, replica and fsdp axes together must be a multiple of the number of processes')


def build(config: ConfigDict, spec: DataSpec) -> Trainer:
  """The trainer that a resolved config describes."""
  model = registry.create_model(config.model, tuple(config.image_size), len(spec.channels),
                                vocabulary.described(spec.channels), **config.encoder)
  if config.augment.channel_sampling == 'diverse' and not model.supports.channel_vectors:
    raise UserError(f'augment.channel_sampling=diverse looks at channel embeddings, of which {config.model} has none: '
                    'take hcs, or a channel_vit')
  method = objectives.get(config.method)
  clock = Clock(config.steps, spec.rows / config.batch_size)
  objective = method(encoder=model, **config.objective, **objectives.filled(method, clock=clock, rows=spec.rows))
  table = lambda key: tuple(float(c[key]) for c in spec.channels)
  place = len(spec.channels) if spec.mixed and not model.per_channel else 0
  whole = np.issubdtype(spec.dtype, np.integer)
  augment = {k: v for k, v in config.augment.items() if k not in view_sizes.LISTS}
  view = ViewMaker(tuple(config.image_size), table('mean'), table('std'), config.loader.normalize, place,
                   rgb=color.rgb_ids(spec.vocabulary), top=float(np.iinfo(spec.dtype).max) if whole else 1.0, **augment)
  o = {k: v for k, v in config.optimizer.items() if k not in ('accumulate', 'ema', 'offload', 'warmup_epochs')}
  optimizer = Optimizer(config.learning_rate, config.steps, **o)
  return Trainer(objective, optimizer, view, config.seed, config.optimizer.accumulate, config.optimizer.ema,
                 config.optimizer.offload, config.on_spike == 'skip', *view_sizes.views(config, view))


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


def save(run: pathlib.Path, config: ConfigDict, spec: DataSpec) -> None:
  """Writes RUN/config.json and RUN/data.json."""
  files.write_json(run / 'data.json', dataclasses.asdict(spec))
  files.write_json(run / 'config.json', config_lib.to_dict(config))


def load(run: str | pathlib.Path) -> tuple[ConfigDict, DataSpec]:
  """Reads back what `save` wrote."""
  run = pathlib.Path(run)
  if not (run / 'config.json').is_file():
    raise UserError(f'{run} is not a run: it has no config.json')
  values = files.read_json(run / 'config.json')
  values = values if isinstance(values, dict) else {}
  have, wanted = config_lib.flat(config_lib.from_dict(values)), config_lib.flat(config_lib.base())
  lost = [key for key in wanted if key not in have and not (key in ADDED and have)]
  if lost:
    raise UserError(f'{run / "config.json"} has no {lost[0]}: it is damaged or of another version')
  # A run of an earlier version goes on as it began: what it lacks does by default what it did.
  config = config_lib.from_dict(config_lib.merge(config_lib.to_dict(config_lib.base()), values))
  data = files.read_json(run / 'data.json')
  try:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    spec = DataSpec(**fields)
  except (TypeError, AttributeError) as e:
    raise UserError(f'{run / "data.json"} is damaged or of another version: {e}') from e
  return config, spec
