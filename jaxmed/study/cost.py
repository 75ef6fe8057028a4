"""What each cell of a study is and takes, known before anything runs: config, parameters, FLOPs, memory, hours."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import lacking
from jaxmed.errors import UserError, choose
from jaxmed.parallel import sharding_table
from jaxmed.parallel.chips import Cluster
from jaxmed.plan import plan, roofline, worker
from jaxmed.study import grid
from jaxmed.study.grid import LOSS, Cell, Judge, Study
from jaxmed.train import evaluators
from jaxmed.train.build import data_spec, records, resolve, towers, wording

# What of a config neither parameters nor FLOPs nor memory depend on, by key or section.
_FREE_OF_COST = ('seed', 'steps', 'epochs', 'learning_rate', 'data', 'checkpoint_every', 'eval_every', 'log_every',
                 'evaluators', 'loggers', 'evaluation', 'on_collapse', 'on_spike', 'on_leak', 'leak_encoder', 'init',
                 'init_map', 'init_parts', 'checkpoint', 'watchdog')
_LOADER = ('load_size', 'fit', 'normalize', 'text_length', 'signal_length', 'window', 'label')


@dataclasses.dataclass(frozen=True)
class Ready:
  """A cell that can run.

  Attributes:
    name, group, axes: see `grid.Cell`. config: what it trains with, for `train.loop.train`. params: of all that is
      trained. samples: records to train on. seen: samples that the training sees, with repetitions. flops: of the whole
      training, see `train.utilization.model_flops`. memory: bytes of a device, an estimate. state: of that the weights,
      moments and gradients, without which no step runs.
  """

  name: str
  group: str
  axes: Mapping[str, Any]
  config: Mapping[str, Any]
  params: int
  samples: int
  batch_size: int
  steps: int
  seen: int
  epochs: float
  flops: float
  memory: int
  state: int


class Corpus:
  """What is known of the records: an opened corpus, or assumptions of how many records and channels there are."""

  def __init__(self, data: str = '', rows: int = plan.ROWS, channels: int = 3):
    self.data, self.rows = data, rows
    self.source = open_source(data) if data else None
    self.channels = self.source.channels if self.source else tuple(f'channel{i}' for i in range(channels))
    self._specs: dict[str, data_spec.DataSpec] = {}

  def spec(self, user: Mapping[str, Any]) -> data_spec.DataSpec:
    """What a run with this config knows of its data."""
    key = json.dumps([user.get('loader', {}), user.get('method'), user.get('model') if not self.source else '',
                      user.get('image_size') if not self.source else ''], sort_keys=True, default=str)
    if key not in self._specs:
      self._specs[key] = self._described(user) if self.source else self._assumed(user)
    return self._specs[key]

  def channels_of(self, user: Mapping[str, Any]) -> tuple[str, ...]:
    """The channels of the records that a config trains on."""
    return records.rows(self.source, user).channels if self.source else self.channels

  def _described(self, user: Mapping[str, Any]) -> data_spec.DataSpec:
    rows = records.rows(self.source, user)
    loader = dict(user.get('loader', {}))
    lack = lacking.parse(str(loader.get('missing', '')), rows.channels)
    spec = data_spec.describe(rows, str(loader.get('label', '')), data_spec.vocabulary_of(user, rows), lack,
                              data_spec.labels_of(user, self.source), data_spec.numeric(user))
    return wording.added(spec, user, rows)

  def _assumed(self, user: Mapping[str, Any]) -> data_spec.DataSpec:
    if not user.get('model'):
      raise UserError('without --data the study must name a model: give model=NAME, for example model=vit_base/16')
    wanted = int(dict(user.get('loader', {})).get('records', 0))
    if wanted > self.rows:
      raise UserError(f'loader.records={wanted} is more than the {self.rows} records of --rows')
    cluster: Any = None  # nothing here depends on it
    return plan.assumed(user, plan.Request(dict(user), cluster, len(self.channels), wanted or self.rows))


class Sizes:
  """Parameters, FLOPs and memory of a step, traced once for each shape."""

  def __init__(self) -> None:
    self._known: dict[str, plan.Traced] = {}

  def of(self, config: ConfigDict, spec: data_spec.DataSpec) -> plan.Traced:
    """What a step of a resolved config takes."""
    kept = {k: v for k, v in config_lib.to_dict(config).items() if k not in _FREE_OF_COST}
    kept['loader'] = {k: kept['loader'][k] for k in _LOADER}
    kept['optimizer'] = {k: v for k, v in kept['optimizer'].items() if k in ('name', 'accumulate', 'ema', 'groups',
                                                                             'options', 'moments')}
    if not config.objective.get('class_weight', 1.0):  # classes of a subset that nothing is computed with
      kept['objective'].pop('num_classes', None)
    rows = objectives.get(config.method).shaped_by(spec.rows)
    key = json.dumps([kept, spec.vocabulary, spec.slots, spec.masked, spec.mixed, spec.dtype, bool(spec.classes), rows],
                     sort_keys=True, default=str)
    if key not in self._known:
      self._known[key] = plan.trace(config, spec)
    return self._known[key]


class Facts(dict):
  """A cell as rules see it: flat values; `params` and `flops` are traced when they are asked for."""

  def __init__(self, config: ConfigDict, spec: data_spec.DataSpec, sizes: Sizes, more: Mapping[str, Any]):
    flat = config_lib.flat(config)
    super().__init__(flat | dict(more) | {
        'samples': spec.rows, 'seen': config.steps * config.batch_size, 'epochs': config.epochs,
        'width': _width(config), 'depth': flat.get('encoder.depth', 0)})
    self._traced = lambda: sizes.of(config, spec)

  def __missing__(self, key: str) -> Any:
    if key not in ('params', 'flops'):
      choose('value of a cell, which a rule asks for,', key, [*self, 'params', 'flops'])
    traced = self._traced()
    self['params'], self['flops'] = _params(traced), traced.model
    return self[key]


def _width(config: ConfigDict) -> int:
  """The width of the encoder: embed_dim, or that of the last stage."""
  encoder = config.encoder
  dims = encoder.get('dims', (0,))
  return int(encoder.get('embed_dim', 0) or dims[-1])


def _params(traced: plan.Traced) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(traced.boxed.params))


def ready(study: Study, corpus: Corpus) -> list[Ready]:
  """Every cell, resolved, checked and costed.

  Raises:
    UserError: one line that names the cell: an unknown key, a batch larger than the subset, more records than there
      are, a budget below a step, memory above what the machine has; or a judge that the corpus cannot serve.
  """
  cells, sizes = grid.cells(study), Sizes()
  check_judges(study, corpus)
  try:
    base = _facts(study.base, corpus, sizes, {})
  except UserError as e:
    raise UserError(f'base of the study: {e}') from e
  out = []
  for cell in cells:
    try:
      out.append(_ready(study, cell, base, corpus, sizes))
    except UserError as e:
      raise UserError(f'cell {cell.name}: {e}') from e
  return out


def check_judges(study: Study, corpus: Corpus) -> None:
  """Raises a UserError where the corpus lacks what a judge needs."""
  if corpus.source is None:
    return
  if LOSS in study.judges and not len(corpus.source.select(split='val')):
    raise UserError(f"{corpus.data} has no records of split val: judge 'loss' is the loss on those")
  for judge in (j for j in study.judges if isinstance(j, Judge)):
    protocol = grid.made(judge)
    if judge.label:
      choose(f'column of {corpus.data}', judge.label, corpus.source.table.column_names)
    elif getattr(protocol, 'labelled', True):
      raise UserError(f'judge {judge.task} has no label: name a column of {corpus.data}')
    if hasattr(protocol, 'check'):
      protocol.check(corpus.source, judge.label, 0)


def _resolved(user: Mapping[str, Any], corpus: Corpus) -> tuple[ConfigDict, data_spec.DataSpec]:
  resolve.check(user)
  spec = corpus.spec(user)
  return resolve.resolve(user, spec), spec


def _facts(user: Mapping[str, Any], corpus: Corpus, sizes: Sizes, more: Mapping[str, Any]) -> Facts:
  return Facts(*_resolved(user, corpus), sizes, more)


def _ready(study: Study, cell: Cell, base: Facts, corpus: Corpus, sizes: Sizes) -> Ready:
  user = dict(cell.config)
  if 'channels' in cell.axes:
    missing = grid.hidden(cell.axes['channels'], corpus.channels_of(user))
    user = config_lib.merge(user, {'loader': {'missing': missing}} if missing else {})
  return costed(cell, _ruled(study, cell, user, base, corpus, sizes), corpus, sizes, LOSS in study.judges)


def costed(cell: Cell, user: Mapping[str, Any], corpus: Corpus, sizes: Sizes, loss: bool = False) -> Ready:
  """A cell with its config resolved, and what it takes; with `loss` its run looks at the held-out loss."""
  config, spec = _resolved(user, corpus)
  traced = sizes.of(config, spec)
  # What a start elsewhere would choose anew, by its devices, is fixed; `loss` is measured at the end.
  named = evaluators.parse(config.evaluators)
  more = {'evaluators': f'{config.evaluators},loss'} if named and 'loss' not in named and loss else {}
  user = config_lib.merge(user, {k: config[k] for k in ('model', 'batch_size', 'steps', 'learning_rate')}, more,
                          {'image_size': list(config.image_size), 'data': corpus.data})
  state = sum(roofline.state_bytes(_alone(traced.boxed)).values()) + _bytes(traced.boxed.params)
  return Ready(cell.name, cell.group, cell.axes, user, _params(traced), spec.rows, config.batch_size, config.steps,
               config.steps * config.batch_size, config.epochs, float(traced.model * config.steps), state + traced.live,
               state)


def _ruled(study: Study, cell: Cell, user: dict[str, Any], base: Facts, corpus: Corpus, sizes: Sizes) -> dict[str, Any]:
  """The config values with what the rules give; the length follows after each."""
  more = {'base': base, 'given_rate': config_lib.given(user, 'learning_rate') is not None, **cell.axes}
  settled = any(name in cell.axes for name in ('steps', 'epochs'))
  if not settled:
    user = _lengthened(study, cell, user, base, corpus, sizes)
  for rule in study.rules:
    name = getattr(rule, '__name__', str(rule))
    try:
      found = rule(_facts(user, corpus, sizes, more))
    except UserError:
      raise
    except Exception as e:
      raise UserError(f'rule {name}: {type(e).__name__}: {e}') from e
    if not isinstance(found, Mapping):
      raise UserError(f'rule {name} gives {found!r}: expected config values, such as {{"learning_rate": 1e-3}}')
    if not found:
      continue
    settled = settled or bool({'steps', 'epochs'} & set(found))
    fresh = {'steps': config_lib.AUTO} if 'epochs' in found and 'steps' not in found else {}
    user = config_lib.merge(user, fresh, config_lib.nested(dict(found)))
    if not settled:
      user = _lengthened(study, cell, user, base, corpus, sizes)
  return user


def _lengthened(study: Study, cell: Cell, user: dict[str, Any], base: Facts, corpus: Corpus,
                sizes: Sizes) -> dict[str, Any]:
  """The config values with the steps that follow from what is equal, or from a budget."""
  equal = 'flops' if 'budget' in cell.axes else study.equal or 'steps'
  if equal == 'epochs':
    return user | {'epochs': float(base['epochs']), 'steps': config_lib.AUTO}
  if equal == 'steps':
    return user | {'steps': base['steps']}
  config, spec = _resolved(user | {'steps': base['steps']}, corpus)
  if equal == 'samples':
    return user | {'steps': max(1, math.ceil(base['seen'] / config.batch_size))}
  budget = cell.axes.get('budget') or base['flops'] * base['steps']
  step = sizes.of(config, spec).model
  if budget < step:
    raise UserError(f'{budget:.4g} FLOPs are fewer than the {step:.4g} of one step')
  return user | {'steps': round(budget / step)}


def _alone(boxed: Any) -> Any:
  return sharding_table.on_mesh(boxed, {'replica': 1, 'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1})


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_memory(cells: Sequence[Ready], jobs: int) -> list[str]:
  """Warnings of cells whose estimated memory is above this machine's.

  Raises:
    UserError: a cell whose weights, moments and gradients alone are, with as many like it as run at once.
  """
  has, whole = sharding_table.device_memory(), psutil.virtual_memory().total
  on_cpu = jax.default_backend() == 'cpu'
  has, jobs = (whole, jobs) if on_cpu else (has, 1)
  if has is None:
    return []
  at_once = f', {jobs} at once' if jobs > 1 else ''
  for cell in cells:
    if cell.state * jobs > has:
      raise UserError(f'cell {cell.name}: its weights, moments and gradients take {cell.state / 1e9:.3g} GB{at_once}, '
                      f'this machine has {has / 1e9:.3g}')
  over = [c for c in cells if c.memory * jobs > has]
  return [f'{len(over)} cells may not fit in {has / 1e9:.3g} GB{at_once} (an estimate, without fusion), the largest '
          f'{max(over, key=lambda c: c.memory).name}'] if over else []


def stay_small() -> None:
  """Starts JAX so that this process leaves the memory of a GPU to those that train."""
  name = 'XLA_PYTHON_CLIENT_PREALLOCATE'
  if name in os.environ:
    return
  os.environ[name] = 'false'
  try:
    jax.devices()
  finally:
    del os.environ[name]  # processes that are started later take what they want


def measured_rate(seconds: float = 1.0) -> float:
  """FLOP/s of this machine's devices in float32 products of matrices of 1024, measured for about a second.

  A bound: a training reaches a part of it.
  """
  x = jnp.ones((jax.local_device_count(), 1024, 1024))
  product = jax.jit(lambda a: a @ a * 1e-3)
  product(x).block_until_ready()
  begun, count = time.monotonic(), 0
  while time.monotonic() - begun < seconds:
    product(x).block_until_ready()
    count += 1
  return count * x.shape[0] * 2 * 1024**3 / (time.monotonic() - begun)


def planned(cells: Sequence[Ready], corpus: Corpus, cluster: Cluster) -> dict[str, dict[str, Any]]:
  """{cell: plan} on a cluster: compiled where libtpu is installed and it is of TPUs, otherwise analytic.

  Cells of the same shapes share one plan.

  Raises:
    UserError: one line that names the cell, as of `plan.plan`.
  """
  compiled = cluster.compiled and worker.installed()
  known: dict[str, dict[str, Any]] = {}
  out = {}
  for cell in cells:
    user = {k: v for k, v in cell.config.items() if k not in (*_FREE_OF_COST, 'loader')}
    key = json.dumps(user, sort_keys=True, default=str)
    if key not in known:
      request = plan.Request(_planned_config(cell), cluster, len(corpus.channels), max(cell.samples, 1))
      try:
        known[key] = plan.plan(request) if compiled else plan.analyse(plan.prepare(request))
      except UserError as e:
        raise UserError(f'cell {cell.name}: {e}') from e
    out[cell.name] = known[key]
  return out


def _planned_config(cell: Ready) -> dict[str, Any]:
  """A cell's config for a corpus of which only numbers are assumed."""
  kept = ('load_size', 'fit', 'window', 'text_length')
  loader = {k: v for k, v in cell.config.get('loader', {}).items() if k in kept}
  user = {k: v for k, v in cell.config.items() if k not in ('data', 'loader', 'init')}
  return towers.short(user | ({'loader': loader} if loader else {}))
