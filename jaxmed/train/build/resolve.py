"""From the user's values to the full config of a run: defaults, the method's wishes, what the data decide; checks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed.augment import intensity
from jaxmed.contracts import FIELDS
from jaxmed.data.feed import sampling
from jaxmed.data.feed.fields import ALWAYS
from jaxmed.errors import UserError, choose
from jaxmed.models import registry
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import evaluators, loggers, rules, width
from jaxmed.train.build import adapting, towers, view_sizes
from jaxmed.train.build.data_spec import DataSpec, same_aspect

# Images that a run sees where the user gives neither steps nor epochs: minutes on a CPU, hours on an accelerator. On a
# CPU fewer where an image has many tokens: CPU_TOKENS of all views together.
CPU_IMAGES, ACCELERATOR_IMAGES = 20_000, 5_000_000
CPU_TOKENS = 2_600_000
# Width of an encoder below which the rate of a method, which is one of ViT-S and wider, rises as the inverse of it: at
# 64 to 256 the best rate of short runs falls with a slope of -1 (docs/results/mup.md).
RATED_WIDTH = 384
MICRO_WIDTH = 128  # of `micro` encoders of convolutions, as of the transformers of that name
# What may change when a run goes on: nothing that alters the weights it ends with.
RESUMABLE = ('checkpoint_every', 'eval_every', 'log_every', 'data', 'mesh', 'checkpoint', 'watchdog', 'loader.threads',
             'on_collapse', 'on_spike', 'evaluation', 'leak_encoder', 'on_leak', 'loggers', 'evaluators')
ON_LEAK = config_lib.CHOICES['on_leak']
METHOD = config_lib.SECTIONS['']['method'].default
# What a run wants where the user names no method, over that of METHOD: milder views than SimCLR's, which keep colours,
# intensities and the size of things (docs/results/defaults.md).
UNNAMED: dict[str, dict[str, Any]] = {
    'augment': {'scale': (0.2, 1.0), 'brightness': 0.4, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.0,)}}
MIXTURE = tuple(f.name for f in dataclasses.fields(sampling.Mixture))  # keys of `loader`


def check(user: Mapping[str, Any]) -> None:
  """Raises a UserError for whatever is wrong with the user's values by themselves, before any data are opened."""
  user = towers.short(user)
  config = config_lib.base()
  config.objective = ConfigDict(objectives.default_options(str(user.get('method', METHOD))))
  if user.get('model'):
    config.encoder = ConfigDict(registry.default_options(str(user['model'])))
  config_lib.update(config, {k: v for k, v in user.items() if k != 'encoder' or user.get('model')})
  towers.filled(objectives.get(config.method), config.towers)
  check_values(config)


def resolve(user: Mapping[str, Any], spec: DataSpec) -> ConfigDict:
  """The full config of a run: defaults, the method's wishes, the user's values, then the keys still open.

  Raises:
    UserError: an unknown key, method or model (naming the nearest), a value of another type, or a conflict.
  """
  user = towers.short(user)
  method = str(user.get('method', METHOD))
  objective = objectives.get(method)
  config = config_lib.base()
  on_cpu = jax.default_backend() == 'cpu'
  size = _image_size(user, spec)
  model = str(user.get('model', '')) or _choose_model(spec, size, on_cpu, _open(user))
  config.objective = ConfigDict(objectives.default_options(method))
  config.encoder = ConfigDict(registry.default_options(model))
  wants = {k: v for k, v in objective.DEFAULTS.items() if k != 'towers'}
  wants['encoder'] = {k: v for k, v in wants.get('encoder', {}).items() if k in config.encoder}  # families differ
  if not user.get('method'):
    wants = config_lib.merge(wants, UNNAMED)
  wants['augment'] = _wanted_views(wants.get('augment', {}), user)
  for values in (wants, user, {'method': method, 'model': model, 'image_size': size}):
    config_lib.update(config, values)
  config.towers = ConfigDict(towers.filled(objective, config.towers))
  towers.fit_vocabulary(objective, config.towers, spec.texts.get('vocab_size', 0))
  check_values(config)
  config.loader.load_size = _by_axis('loader.load_size', config.loader.load_size, len(size))
  check_fields(config, objective, spec)
  _fill_sizes(config, objective, spec, on_cpu)
  _fill_views(config, objective)
  _fill_objective(config, spec)
  adapting.fill(config)
  return config


def _wanted_views(wants: dict[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
  """A method's wishes for views, without changes of colour where the user's normalisation rules them out."""
  loader = user.get('loader')
  normalize = loader.get('normalize', 'corpus') if isinstance(loader, Mapping) else 'corpus'
  if str(normalize).partition(':')[0] in intensity.COLORED:
    return wants
  return {k: v for k, v in wants.items() if k not in ('color', 'grayscale')}


# Smallest and largest values; the lowest one of the first ones stands for what is chosen here (config.AUTO).
_RANGES: dict[str, tuple[float, float]] = {
    'steps': (0, math.inf), 'epochs': (0, math.inf), 'batch_size': (0, math.inf), 'learning_rate': (0, math.inf),
    'checkpoint_every': (0, math.inf), 'eval_every': (0, math.inf), 'seed': (0, 2**31 - 1), 'log_every': (1, math.inf),
    'loader.threads': (1, 256), 'checkpoint.keep': (1, math.inf), 'optimizer.accumulate': (1, math.inf),
    'checkpoint.keep_every': (0, math.inf), 'checkpoint.minutes': (0, math.inf),
    'optimizer.b1': (0, 1 - 1e-9), 'optimizer.b2': (0, 1 - 1e-9), 'optimizer.ema': (0, 1 - 1e-9),
    'optimizer.weight_decay': (0, math.inf), 'optimizer.warmup_steps': (-1, math.inf), 'optimizer.clip': (0, math.inf),
    'loader.crops': (1, math.inf), 'loader.foreground': (0, 1), 'loader.records': (0, math.inf),
    'loader.records_seed': (0, 2**31 - 1),
    'loader.text_length': (1, math.inf), 'loader.signal_length': (0, math.inf), 'loader.window': (0, math.inf),
    'loader.window_stride': (0, math.inf), 'optimizer.warmup_epochs': (-1, math.inf),
    'optimizer.final_learning_rate': (0, math.inf),
    'optimizer.patch_embed_scale': (0, math.inf), 'optimizer.bias_scale': (0, math.inf),
    'optimizer.base_width': (1, math.inf), 'optimizer.base_heads': (0, math.inf),
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
  rules.check('optimizer.name', config.optimizer.name)
  own = [str(group.get('name', '')) for group in config.optimizer.groups.values() if isinstance(group, ConfigDict)]
  width.check(config.optimizer.scaling, [n.removeprefix(rules.FREE) for n in (config.optimizer.name, *own) if n])
  if config.optimizer.ema and config.optimizer.name.startswith(rules.FREE):
    raise UserError(f'optimizer.ema={config.optimizer.ema} and {config.optimizer.name} both average the weights: set '
                    'optimizer.ema=0')
  if config.init_map and not config.init:
    raise UserError(f'init_map={config.init_map} maps the parts of a run: give it with init=RUN')
  adapting.check(config)
  evaluators.parse(config.evaluators)
  sampling.Mixture(**{key: config.loader[key] for key in MIXTURE})
  if config.loader.crops > 1 and (config.loader.fit != 'crop' or config.loader.window):
    what = f'fit={config.loader.fit}' if config.loader.fit != 'crop' else f'window={config.loader.window}'
    raise UserError(f'loader.crops={config.loader.crops} cuts a record several times: it needs loader.fit=crop and no '
                    f'loader.window, not loader.{what}')
  if config.loader.foreground and (config.loader.fit != 'crop' or config.loader.window):
    what = f'fit={config.loader.fit}' if config.loader.fit != 'crop' else f'window={config.loader.window}'
    raise UserError(f'loader.foreground={config.loader.foreground:g} chooses where a record is cropped: it needs '
                    f'loader.fit=crop and no loader.window, not loader.{what}')


def _by_axis(name: str, size: tuple, rank: int) -> tuple[int, ...]:
  """A size of one number as one of each axis, others as they are; a UserError names the key of a wrong one."""
  sizes = size * rank if len(size) == 1 else size
  if size and (len(sizes) != rank or not all(type(n) is int and n > 0 for n in sizes)):
    raise UserError(f'{name} takes {rank} positive whole numbers, not {size}')
  return sizes


def _image_size(user: Mapping[str, Any], spec: DataSpec) -> tuple[int, ...]:
  rank = len(spec.size)
  size = config_lib.given(user, 'image_size') or ()
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


def _open(user: Mapping[str, Any]) -> bool:
  """Whether the user names no method, and nothing that one kind of encoder alone has."""
  return not (user.get('method') or user.get('encoder') or dict(user.get('augment', {})).get('channel_sampling'))


def _choose_model(spec: DataSpec, size: tuple[int, ...], on_cpu: bool, free: bool) -> str:
  """A ChannelViT; on a CPU a ViT, of many times fewer tokens, where all records have the same channels, if `free`."""
  family = 'vit' if on_cpu and free and not spec.mixed and len(spec.channels) > 1 else 'channel_vit'
  width = 'micro' if on_cpu else 'tiny' if spec.rows < 20_000 else 'small' if spec.rows < 200_000 else 'base'
  patch = 16 if all(n % 16 == 0 and n > 96 for n in size) else 8 if all(n % 8 == 0 for n in size) else 4
  return f'{family}_{width}/{patch}'


def _fill_sizes(config: ConfigDict, objective: Any, spec: DataSpec, on_cpu: bool) -> None:
  """Batch, length, rate: zero means chosen here."""
  rows = samples(config, spec)
  batch = config.batch_size or min(64 if on_cpu else 64 * jax.device_count(), rows)
  if batch > rows:
    kind = 'windows' if config.loader.window else 'records'
    raise UserError(f'batch_size {batch} is larger than the {rows} training {kind}')
  shards = mesh_lib.batch_shards(mesh_lib.make_mesh(config.mesh))
  if not config.batch_size:
    batch = max(batch // shards, 1) * shards
  check_divides(batch, shards, config.optimizer.accumulate)
  config.batch_size = batch
  if not config.steps:
    budget = _cpu_images(config, spec) if on_cpu else ACCELERATOR_IMAGES
    config.epochs = config.epochs or float(np.clip(budget / rows, 1, 400))
    config.steps = max(1, math.ceil(config.epochs * rows / batch))
  config.epochs = config.steps * batch / rows
  rate, reference = objective.LEARNING_RATE
  config.learning_rate = config.learning_rate or _narrow(config) * rate * math.sqrt(batch / reference)
  warm = config.optimizer
  if warm.warmup_steps < 0:
    warm.warmup_steps = config.steps // 10 if warm.warmup_epochs < 0 else math.ceil(warm.warmup_epochs * rows / batch)
  config.checkpoint_every = config.checkpoint_every or max(config.steps // 10, min(100, config.steps))
  config.eval_every = config.eval_every or max(config.steps // 5, 1)
  _fill_loading(config, spec)


def _cpu_images(config: ConfigDict, spec: DataSpec) -> int:
  """Images that a run on a CPU sees."""
  model: Any = registry.create_model(config.model, tuple(config.image_size), len(spec.channels), **config.encoder)
  place = math.prod(model.patch_size) if '/' in config.model else 8 ** len(config.image_size)  # strides: as dear
  patches = math.prod(config.image_size) // place
  tokens = patches * (spec.slots if model.per_channel else 1) * config.augment.views
  return int(np.clip(CPU_TOKENS // tokens, 1000, CPU_IMAGES))


def _narrow(config: ConfigDict) -> float:
  """The factor on a method's rate for an encoder narrower than those that the rate is of; muP's is of its base."""
  width = config.encoder.get('embed_dim', MICRO_WIDTH if config.model.endswith('_micro') else RATED_WIDTH)
  return max(1.0, RATED_WIDTH / (config.optimizer.base_width if config.optimizer.scaling == 'mup' else width))


def _fill_loading(config: ConfigDict, spec: DataSpec) -> None:
  """The grid of loaded arrays, and whether records keep their aspect in it."""
  loader, plane = config.loader, slice(-2, None)  # the first of three axes, slices or frames, goes by itself
  if config.augment.tiles:
    _fill_tiles(config, spec)
  if not loader.load_size:
    fit = [min(n, max(s, round(1.5 * s))) for n, s in zip(spec.size, config.image_size, strict=True)]
    if loader.fit in ('auto', 'aspect'):  # the shorter side as long as without; at most twice as many pixels
      share = max(n / have for n, have in zip(fit[plane], spec.size[plane], strict=True))
      fit[plane] = [min(round(share * have), 2 * n) for n, have in zip(fit[plane], spec.size[plane], strict=True)]
    loader.load_size = tuple(max(n, s) for n, s in zip(fit, config.image_size, strict=True))
  if loader.fit == 'auto':
    even = not spec.uneven and same_aspect(spec.size[plane], loader.load_size[plane])
    loader.fit = 'resize' if even else 'aspect'


def _fill_tiles(config: ConfigDict, spec: DataSpec) -> None:
  """Tiles of each axis, and records as large as all of them: cut where they are that large, else resized."""
  augment, loader, rank = config.augment, config.loader, len(config.image_size)
  augment.tiles = (1,) * (rank - 2) + augment.tiles * 2 if len(augment.tiles) == 1 else augment.tiles
  if len(augment.tiles) != rank or not all(type(n) is int and n > 0 for n in augment.tiles):
    raise UserError(f'augment.tiles takes one positive whole number for the last two axes, or {rank}, not '
                    f'{augment.tiles}')
  whole = tuple(n * parts for n, parts in zip(config.image_size, augment.tiles, strict=True))
  loader.load_size = loader.load_size or whole
  if loader.fit == 'aspect' or any(n % parts for n, parts in zip(loader.load_size, augment.tiles, strict=True)):
    raise UserError(f'augment.tiles {augment.tiles} cut records into equal parts: loader.fit must be crop or resize, '
                    f'and loader.load_size, {loader.load_size}, divide by them')
  large = not spec.uneven and all(have >= n for have, n in zip(spec.size, loader.load_size, strict=True))
  loader.fit = ('crop' if large else 'resize') if loader.fit == 'auto' else loader.fit


def samples(config: ConfigDict, spec: DataSpec) -> int:
  """Samples of an epoch: records, or about as many windows as they make."""
  return -(-spec.rows // (config.loader.window_stride or config.loader.window or 1))


def _fill_views(config: ConfigDict, objective: Any) -> None:
  """Sets sizes of views; a UserError for a number of views that the method cannot use."""
  augment, rank = config.augment, len(config.image_size)
  augment.flip = augment.flip * rank if len(augment.flip) == 1 else augment.flip
  needs = objective.DEFAULTS.get('augment', {}).get('views', 1)
  if (needs > 1) != (augment.views > 1) or (needs == 1 and augment.local_views):
    takes = 'compares views: augment.views must be at least 2' if needs > 1 else 'takes one view and no local ones'
    raise UserError(f'method {config.method} {takes}, not augment.views={augment.views} '
                    f'local_views={augment.local_views}')
  if augment.local_views and not augment.local_size:
    patch = registry.create_model(config.model, tuple(config.image_size), 1, **config.encoder).patch_size
    augment.local_size = tuple(max(round(n * 3 / 7 / p), 1) * p for n, p in zip(config.image_size, patch, strict=True))
  for name in ('local_size', 'gram_size'):
    augment[name] = _by_axis(f'augment.{name}', augment[name], rank)
  view_sizes.check(config)


def _fill_objective(config: ConfigDict, spec: DataSpec) -> None:
  if 'num_classes' in config.objective:
    config.objective.num_classes = len(spec.classes)
    if not config.loader.label and config.objective.get('class_weight', 1.0):  # by default the method is about classes
      raise UserError(f'method {config.method} needs loader.label=COLUMN, a column of the manifest')
  predicts = objectives.get(config.method).PREDICTS
  if predicts == 'mask':
    _fill_values(config, spec)
  if predicts == 'number' and not config.objective.std:
    config.objective.mean, config.objective.std = spec.number


def _fill_values(config: ConfigDict, spec: DataSpec) -> None:
  """The classes of masks: those of the training records, or those named, of which there must be some."""
  named, found = config.objective['values'], [v for v in spec.mask_values if v not in config.objective.ignore]
  config.objective['values'] = tuple(named or found)
  lost = [v for v in config.objective['values'] if v not in found] or [v for v in found if v not in named and named]
  if lost:
    raise UserError(f'objective.values={",".join(map(str, named))}, but the masks of the corpus have the values '
                    f'{", ".join(map(str, found))}: name them all, or give others in objective.ignore')
  if len(found) < 2:
    some = f'only the value {found[0]}' if found else 'no value'
    raise UserError(f'the masks of the corpus have {some}: expected two or more classes')


def check_fields(config: ConfigDict, objective: Any, spec: DataSpec) -> None:
  """Raises a UserError where no record has a field that the method wants, or windows do not suit it."""
  for name in objective.FIELDS:
    choose(f'field of method {config.method}', name, FIELDS)
    if name not in ALWAYS and name not in spec.holds:
      raise UserError(f'method {config.method} trains on the field {name!r}, which no record of the corpus has: give '
                      f'jaxmed prepare a table with a column {name!r}')
  if 'image' not in objective.FIELDS:
    raise UserError(f'method {config.method} must have the field image beside {", ".join(objective.FIELDS)}')
  if {'label', 'number'} & {*objective.FIELDS} and not config.loader.label:
    raise UserError(f'method {config.method} needs loader.label=COLUMN, a column of the manifest')
  if config.loader.window and not objective.WINDOWS:
    raise UserError(f'loader.window={config.loader.window} makes samples of several records, but method '
                    f'{config.method} takes one: leave loader.window out')
  if config.loader.window and config.augment.local_views:
    raise UserError(f'loader.window={config.loader.window} goes with global views alone, not augment.local_views='
                    f'{config.augment.local_views}')


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
  local = config.batch_size // jax.process_count()
  if local % config.loader.crops:
    raise UserError(f'loader.crops={config.loader.crops} does not divide the {local} records a step of each process')
