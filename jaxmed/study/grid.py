"""What a study file declares, and the cells of its grid.

A study file is Python with `get_study()`, or `get_study(variant)` and a list VARIANTS, that returns a `Study` or a dict
of its fields. The cells are all combinations of the values of the axes, the last axis changing fastest.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed.errors import UserError, choose
from jaxmed.study.tuned import FINETUNE, Tuned

# Axes that are no key of a config, with what they say.
SPECIAL = {
    'samples': 'records to train on, whole subjects, nested for a seed; all: every record',
    'budget': 'FLOPs of the whole training, from which the number of steps follows',
    'sources': "sources to train on ('CT,MR'), or their shares ('CT=2,MR=1,*=1'); all: every record",
    'channels': "channels that training shows: a number (the first of the corpus) or names ('R,G'); all: every one",
}
ALL = 'all'
LENGTHS = ('steps', 'epochs', 'budget')  # axes that say how long a cell trains
EQUAL = {
    'steps': 'steps', 'samples': 'samples that the training sees, with repetitions',
    'epochs': 'passes over the records of the cell', 'flops': 'FLOPs of the whole training',
}
LOSS = 'loss'
COLUMNS = ('cell', 'seed', 'params', 'samples', 'steps', 'flops', LOSS, 'batch_size', 'seen', 'epochs', 'seconds',
           'status', 'reason', 'name')  # of STUDY/table.csv, beside axes and scores
_OPEN = ('encoder', 'objective', 'towers')  # their keys are those of the model and the method of a cell


@dataclasses.dataclass(frozen=True)
class Judge:
  """How a finished cell is judged beside its held-out loss.

  Attributes:
    task: a protocol of `jaxmed.evaluate.protocols`, or 'finetune', see `tuned`. label: a column of the corpus.
    options: of the protocol.
    feature: the vector to judge, cls or mean; empty: that of the method.
  """

  task: str
  label: str = ''
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  feature: str = ''


@dataclasses.dataclass(frozen=True)
class Study:
  """A grid of runs.

  Attributes:
    base: a recipe or config file ('experiments/mae.py:laptop'), or config values.
    axes: {name: values}. A name is a key of the config or one of SPECIAL, its values a sequence; or any other name, its
      values {label: config values}, such as {'width': {'w64': {'encoder.embed_dim': 64, 'encoder.num_heads': 1}}}.
    rules: functions of a cell that give config values, called in this order; see jaxmed.study.rules. A cell is a
      mapping: its axes by name, every key of its config ('batch_size', 'optimizer.b1'), `samples` (records), `seen`
      (steps x batch), `epochs`, `width`, `depth`, `params`, `flops` (of a step), and `base`, the same of the base.
    equal: what all cells have as much of as the base, one of EQUAL; 'steps' by default. An axis of LENGTHS replaces it.
    judges: 'loss' (held out, the method's own) and `Judge`s, or dicts of their fields.
    shared: config values of all cells, over those of the base.
  """

  base: Any
  axes: Mapping[str, Any]
  rules: Sequence[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = ()
  equal: str = ''
  judges: Sequence[Any] = (LOSS,)
  shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
  """A combination of values.

  Attributes:
    name: of it, and of its folder. group: the same without the seed. axes: {axis: value or label}. config: its values.
  """

  name: str
  group: str
  axes: Mapping[str, Any]
  config: Mapping[str, Any]


def read(path: str, changes: Mapping[str, Any] = {}) -> Study:
  """The study of FILE.py or FILE.py:VARIANT, checked.

  Args:
    changes: nested config values of all cells, over what the file says.
  Raises:
    UserError: no such file or variant, no `get_study`, an unknown field, axis, judge or key, an axis without values.
  """
  given = config_lib.call(path, 'get_study')
  if isinstance(given, (Mapping, ConfigDict)):
    fields = {f.name for f in dataclasses.fields(Study)}
    for name in given:
      choose(f'field of the study {path}', name, fields)
    for name in ('base', 'axes'):
      if name not in given:
        raise UserError(f'study {path} has no {name}: expected a Study, or a dict of its fields')
    given = Study(**given)
  if not isinstance(given, Study):
    raise UserError(f'study {path}: get_study() must return a Study or a dict, not {given!r}')
  judges = tuple(_judge(j) for j in given.judges)
  study = dataclasses.replace(given, base=_base(given, changes), judges=judges, shared={})
  _check(study, path)
  return study


def _base(study: Study, changes: Mapping[str, Any]) -> dict[str, Any]:
  base = config_lib.load_file(study.base) if isinstance(study.base, str) else nested(study.base)
  return config_lib.merge(base, nested(study.shared), changes)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
  """Config values whose keys may be dotted, as a nested dict."""
  parts = [config_lib.nested({k: nested(v) if isinstance(v, Mapping) else v}) for k, v in values.items()]
  return config_lib.merge(*parts)


def _judge(given: Any) -> Any:
  """'loss', or a Judge whose protocol and options are known."""
  from jaxmed.evaluate import protocols
  if isinstance(given, Mapping):
    for name in given:
      choose('field of a judge', name, {f.name for f in dataclasses.fields(Judge)})
    if 'task' not in given:
      raise UserError(f'a judge of the study has no task: {dict(given)}')
    given = Judge(**given)
  if isinstance(given, str):
    choose('judge', given, (LOSS, FINETUNE, *protocols.PROTOCOLS))
    given = given if given == LOSS else Judge(given)
  if isinstance(given, Judge):
    choose('judge', given.task, (LOSS, FINETUNE, *protocols.PROTOCOLS))
    made(given)
  elif given != LOSS:
    raise UserError(f'a judge of the study is {given!r}: expected {LOSS!r}, a Judge, or a dict of its fields')
  return given


def made(judge: Judge) -> Any:
  """The protocol of a judge, or its fine-tuning, with its options."""
  from jaxmed.evaluate import protocols
  if judge.task == FINETUNE:
    return Tuned.of(judge.options)
  return protocols.get(judge.task, {f'{judge.task}.{k}': v for k, v in judge.options.items()})[0]


def _check(study: Study, path: str) -> None:
  if not isinstance(study.axes, Mapping) or not study.axes:
    raise UserError(f'study {path} has no axes: expected {{name: values}}')
  if not study.judges:
    raise UserError(f'study {path} has no judge: give {LOSS!r} or a protocol')
  known = [*config_lib.flat(config_lib.base()), *SPECIAL]
  for name, values in study.axes.items():
    if isinstance(values, (str, bytes)) or not isinstance(values, (Mapping, Sequence)):
      raise UserError(f'axis {name} of {path} takes a list of values, not {values!r}')
    if not len(values):
      raise UserError(f'axis {name} of {path} is empty: give it a value')
    if isinstance(values, Mapping):
      _check_settings(name, values, known)
    elif name == 'data':
      raise UserError(f'axis data of {path}: a study is of one corpus, --data; axis sources mixes parts of it')
    elif name.partition('.')[0] not in _OPEN and not name.startswith(tuple(f'{k}.' for k in config_lib.FREE)):
      choose(f'axis of {path}', name, known)
  lengths = [name for name in LENGTHS if name in study.axes]
  if len(lengths) > 1:
    raise UserError(f'axes {" and ".join(lengths)} of {path} both say how long a cell trains: leave one out')
  if study.equal and lengths:
    raise UserError(f'study {path} has the axis {lengths[0]} and equal={study.equal!r}: leave one out')
  choose(f'equal of {path}', study.equal or 'steps', EQUAL)


def _check_settings(name: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
  """An axis of named settings."""
  if name in known or name in COLUMNS:
    raise UserError(f'axis {name} is a key, a special axis or a column of the table: give it a list of values, or '
                    'settings another name')
  for label, setting in values.items():
    if not isinstance(setting, Mapping):
      raise UserError(f'axis {name}: {label} is {setting!r}, expected config values such as {{"batch_size": 64}}')


def cells(study: Study) -> list[Cell]:
  """All combinations, with the config values of base and axes; `budget` and `channels` are set where data are known.

  Raises:
    UserError: a value that an axis does not take, two cells of one name.
  """
  out: list[Cell] = []
  parts = [[(name, label, value) for label, value in _values(axis)] for name, axis in study.axes.items()]
  short = _short([*study.axes])
  for combination in itertools.product(*parts):
    words = {axis: f'{short[axis]}={word(label)}' for axis, label, _ in combination}
    name, group = '_'.join(words.values()), '_'.join(w for axis, w in words.items() if axis != 'seed')
    if len(name.encode()) > 200:
      raise UserError(f'cell {name[:80]}... has a name of {len(name)} characters: give settings short labels')
    config = config_lib.merge(study.base, *(_config(axis, value) for axis, _, value in combination))
    if config.get('loader', {}).get('records'):
      config = config_lib.merge({'loader': {'records_seed': int(config.get('seed', 0))}}, config)
    out.append(Cell(name, group or 'all', {axis: label for axis, label, _ in combination}, config))
  twice = [c.name for i, c in enumerate(out) if c.name in {d.name for d in out[:i]}]
  if twice:
    raise UserError(f'two cells have the name {twice[0]}: an axis has a value twice, or two that are written alike')
  return out


def _values(axis: Any) -> list[tuple[Any, Any]]:
  """(label, value) of each value."""
  return [*axis.items()] if isinstance(axis, Mapping) else [(v, v) for v in axis]


def _short(names: Sequence[str]) -> dict[str, str]:
  """The last part of each dotted name, where no other has it."""
  lasts = [name.rpartition('.')[2] for name in names]
  return {name: last if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)}


def word(label: Any) -> str:
  """A value as part of a file's name."""
  text = ','.join(map(str, label)) if isinstance(label, (tuple, list)) else str(label)
  return re.sub(r'[^A-Za-z0-9.+=*_-]+', '-', text).strip('-') or 'none'


def _config(axis: str, value: Any) -> dict[str, Any]:
  """The config values that a value of an axis stands for."""
  if isinstance(value, Mapping):
    return nested(value)
  if axis == 'samples':
    return {'loader': {'records': _count(axis, value)}}
  if axis == 'sources':
    return {'loader': _sources(value)}
  if axis == 'budget':
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
      raise UserError(f'axis budget has {value!r}: expected a number of FLOPs above 0')
    return {}
  if axis == 'epochs':  # what the base says of steps would win
    return {'epochs': value, 'steps': config_lib.AUTO}
  return {} if axis == 'channels' else config_lib.nested({axis: value})


def _count(axis: str, value: Any) -> int:
  if value == ALL:
    return 0
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise UserError(f'axis {axis} has {value!r}: expected a whole number above 0, or {ALL!r}')
  return value


def _sources(value: Any) -> dict[str, Any]:
  if not isinstance(value, str) or not value:
    raise UserError(f"axis sources has {value!r}: expected names ('CT,MR'), shares ('CT=2,MR=1') or {ALL!r}")
  if value == ALL:
    return {}
  return {'balance': 'source', 'weights': value} if '=' in value else {'sources': value}


def hidden(value: Any, channels: Sequence[str]) -> str:
  """What `loader.missing` is for a value of the axis `channels`: those that training does not show; '' for none.

  Raises:
    UserError: a number that is not from 1 to all, an unknown channel (the nearest is named).
  """
  if value == ALL:
    return ''
  if isinstance(value, str):
    kept = [name.strip() for name in value.split(',')]
    for name in kept:
      choose('channel of the axis channels', name, channels)
  elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= len(channels):
    raise UserError(f'axis channels has {value!r}: expected a number from 1 to {len(channels)}, names, or {ALL!r}; the '
                    f'corpus has {", ".join(channels)}')
  else:
    kept = list(channels[:value])
  rest = [name for name in channels if name not in kept]
  return f'{",".join(rest)}=1' if rest else ''
