"""A transfer benchmark: many corpora x arms, each a fine-tuning; what a file declares, and the cells that follow.

A file is Python with `get_transfer()`, or `get_transfer(variant)` and a list VARIANTS, that returns a `Transfer` or a
dict of its fields. See `transfer_table` for what comes out.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import files
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import fields
from jaxmed.errors import UserError, choose
from jaxmed.evaluate.protocols.tasks import SPLITS, check_subjects, subjects_of
from jaxmed.study import cells as cells_lib
from jaxmed.study import cost
from jaxmed.study.grid import Cell, nested, word
from jaxmed.train import finetune
from jaxmed.train.build import rundir

KINDS = ('pretrained', 'scratch', 'linear')
ANY = '*'  # the corpus of a file that stands for every name
CHANNELS = 'channels.json'


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A corpus that arms are judged on.

  Attributes:
    data: path, or that of --data. task: of `train.finetune.TASKS`. label: its column; 'mask' of segment.
    modality: a word to count wins by. values: config values of all cells that train on it alone.
  """

  data: str = ''
  task: str = 'segment'
  label: str = ''
  modality: str = ''
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Arm:
  """A way to train.

  Attributes:
    kind: 'pretrained' (the weights of an encoder and a fresh head), 'scratch' (the same model from fresh weights) or
      'linear' (the encoder frozen, a linear head); by default the name of the arm where it is one of these.
    encoder: run or file, or that of --encoder. An arm from scratch without any, or whose values name a model, trains
      what `base` and its values say, without the recipe of fine-tuning.
    rates: learning rates of which the one with the best metric on split val is taken, and alone judged on test; () for
      the rate of the recipe.
    train: names of corpora to train on together, and to be judged on each; () for each corpus its own.
    values: config values over all others of the file.
  """

  kind: str = ''
  encoder: str = ''
  rates: Sequence[float] = ()
  train: Sequence[str] = ()
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What a file declares.

  Attributes:
    corpora, arms: {name: Corpus or Arm, or a dict of its fields}. The corpus '*' is that of every name that --data
      gives and the file lacks.
    base: a recipe ('experiments/finetune_segment.py:published') or config values of all cells, over the recipe of
      fine-tuning; its model is for arms without an encoder. shared: config values over it.
    against: the arm that all others are compared with. seeds, fractions: of the training records, by whole subjects.
    sizes: borders of the classes of size, in training subjects.
    same: {name: channels} that are one channel, such as {'scan': ('CT', 'MR')}.
  """

  corpora: Mapping[str, Any]
  arms: Mapping[str, Any]
  base: Any = dataclasses.field(default_factory=dict)
  shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  against: str = 'scratch'
  seeds: Sequence[int] = (0,)
  fractions: Sequence[float] = (1.0,)
  sizes: Sequence[int] = (30, 100)
  same: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def read(path: str, data: Sequence[str] = (), encoders: Sequence[str] = (),
         changes: Mapping[str, Any] = {}) -> Transfer:
  """The benchmark of FILE.py or FILE.py:VARIANT with its corpora and encoders, checked; no corpus is opened.

  Args:
    data: 'NAME=PATH' or 'NAME:MODALITY=PATH'. encoders: 'RUN', or 'ARM=RUN' of one arm. changes: nested config values.
  Raises:
    UserError: an unknown field, corpus, arm or kind; a corpus without a path, an arm without an encoder.
  """
  whole = _made(Transfer, config_lib.call(path, 'get_transfer'), path)
  for name in ('corpora', 'arms'):
    if not isinstance(getattr(whole, name), Mapping) or not getattr(whole, name):
      raise UserError(f'{path} has no {name}: expected {{name: fields}}')
  corpora = {n: _made(Corpus, c, f'corpus {n} of {path}') for n, c in whole.corpora.items()}
  arms = {n: _made(Arm, a, f'arm {n} of {path}') for n, a in whole.arms.items()}
  base = config_lib.load_file(whole.base) if isinstance(whole.base, str) else nested(whole.base)
  whole = dataclasses.replace(
      whole, corpora=_placed(corpora, data, path), arms=_armed(arms, encoders, path, bool(base)),
      base=config_lib.merge(base, nested(whole.shared), changes), shared={})
  _check(whole, path)
  return whole


def _made(kind: Any, given: Any, what: str) -> Any:
  """A dataclass of it or of a dict of its fields."""
  if isinstance(given, (Mapping, ConfigDict)):
    for name in given:
      choose(f'field of {what}', name, [f.name for f in dataclasses.fields(kind)])
    lacks = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory and f.name not in given]
    if lacks:
      raise UserError(f'{what} has no {lacks[0]}')
    given = kind(**given)
  if not isinstance(given, kind):
    raise UserError(f'{what} is {given!r}: expected a {kind.__name__}, or a dict of its fields')
  return given


def _placed(corpora: Mapping[str, Corpus], data: Sequence[str], path: str) -> dict[str, Corpus]:
  """The corpora with their paths, tasks and labels."""
  out = {name: corpus for name, corpus in corpora.items() if name != ANY}
  for text in data:
    name, equals, place = text.partition('=')
    name, _, modality = name.partition(':')
    if not (equals and name and place):
      raise UserError(f'--data {text}: expected NAME=PATH, or NAME:MODALITY=PATH')
    if name not in out and ANY in corpora:
      out[name] = corpora[ANY]
    choose(f'corpus of {path}', name, out)
    out[name] = dataclasses.replace(out[name], data=place, modality=modality or out[name].modality)
  if not out:
    raise UserError(f'{path} names no corpus: give --data NAME=PATH for each')
  for name, corpus in out.items():
    if not corpus.data:
      raise UserError(f'corpus {name} of {path} has no path: give --data {name}=PATH')
    choose(f'task of corpus {name}', corpus.task, finetune.TASKS)
    label = corpus.label or ('mask' if corpus.task == 'segment' else '')
    if not label:
      raise UserError(f'corpus {name} of {path} has no label: name its column')
    at = ','.join(p if '://' in p else os.path.abspath(p) for p in corpus.data.split(','))
    out[name] = dataclasses.replace(corpus, data=at, label=label)
  return out


def _armed(arms: Mapping[str, Arm], encoders: Sequence[str], path: str, based: bool) -> dict[str, Arm]:
  """The arms with their kinds and encoders."""
  given, default = {}, ''
  for text in encoders:
    name, equals, run = text.partition('=')
    if equals and name in arms:
      given[name] = run
    else:
      default = text
  out = {}
  for name, arm in arms.items():
    kind = choose(f'kind of arm {name}', arm.kind or name, KINDS)
    alone = kind == 'scratch' and 'model' in arm.values
    encoder = given.get(name) or arm.encoder or ('' if alone else default)
    if not encoder and not (kind == 'scratch' and (alone or based)):
      raise UserError(f'arm {name} of {path} has no encoder: give --encoder RUN')
    out[name] = dataclasses.replace(arm, kind=kind, train=tuple(arm.train), rates=tuple(arm.rates),
                                    encoder=encoder if '://' in encoder or not encoder else os.path.abspath(encoder))
  return out


def _check(whole: Transfer, path: str) -> None:
  for name in (*whole.corpora, *whole.arms):
    if word(name) != name or '_' in name:
      raise UserError(f'{path}: the name {name!r} has other characters than letters, digits and .+-')
  choose(f'arm that {path} compares with (against)', whole.against, whole.arms)
  for name, arm in whole.arms.items():
    for corpus in arm.train:
      choose(f'corpus of arm {name} to train on', corpus, whole.corpora)
    other = next((n for n, c in whole.corpora.items() if c.task != 'segment'), '') if arm.train else ''
    if other:
      raise UserError(f'arm {name} trains on {", ".join(arm.train)} and is judged on all corpora, which masks alone '
                      f'allow: corpus {other} is of task {whole.corpora[other].task}')
  for field in ('seeds', 'fractions'):
    values = [*getattr(whole, field)]
    if not values or len(set(values)) < len(values):
      raise UserError(f'{field} of {path} are {values}: expected one or more different ones')


def check_data(whole: Transfer) -> dict[str, dict[str, int]]:
  """{corpus: {'subjects', 'records': to train on, 'test_subjects'}}, of corpora that can be trained on and judged.

  Raises:
    UserError: one line that names the corpus: its column or records of a split are missing, a subject is in two
      splits, or one subject alone is in test, so that no interval exists.
  """
  out = {}
  for name, corpus in whole.corpora.items():
    try:
      source = open_source(corpus.data)
      choose(f'column of {corpus.data}', corpus.label, source.table.column_names)
      if corpus.label == 'mask' and 'mask' not in fields.held(source):
        raise UserError(f'{corpus.data} has no record with a mask')
      parts = {s: source.select(split=s, label=corpus.label) for s in SPLITS}
      for split, rows in parts.items():
        why = ': rates and checkpoints are chosen on these' if split == 'val' else ''
        if not len(rows):
          raise UserError(f'{corpus.data} has no record of split {split} with {corpus.label!r}{why}')
      subjects = {s: subjects_of(rows) for s, rows in parts.items()}
      check_subjects({s: _Subjects(names) for s, names in subjects.items()})
      count = {s: len(np.unique(names)) for s, names in subjects.items()}
      if count['test'] < 2:
        raise UserError(f'{corpus.data} has one subject in split test, so no interval says what is won: expected two '
                        'or more')
    except UserError as e:
      raise UserError(f'corpus {name}: {e}') from e
    out[name] = {'subjects': count['train'], 'records': len(parts['train']), 'test_subjects': count['test']}
  return out


@dataclasses.dataclass(frozen=True)
class _Subjects:
  subjects: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Wanted:
  """A cell before its config is known."""

  arm: str
  on: tuple[str, ...]
  rate: float | None
  fraction: float
  seed: int


def _wanted(whole: Transfer) -> Iterator[_Wanted]:
  for name, arm in whole.arms.items():
    places = [arm.train] if arm.train else [(corpus,) for corpus in whole.corpora]
    for found in itertools.product(places, whole.fractions, arm.rates or (None,), whole.seeds):
      on, fraction, rate, seed = found
      yield _Wanted(name, tuple(on), rate, float(fraction), int(seed))


def ready(whole: Transfer, out: str | pathlib.Path) -> list[cost.Ready]:
  """Every cell, resolved, checked and costed.

  Args:
    out: folder of the benchmark, where the file of `same` channels is written.
  Raises:
    UserError: one line that names the cell.
  """
  vocabulary = _vocabulary(whole, pathlib.Path(out))
  encoders = {path: rundir.load(path) for path in {a.encoder for a in whole.arms.values()} if path}
  known: dict[str, cost.Corpus] = {}
  sizes, found = cost.Sizes(), []
  for wanted in _wanted(whole):
    cell = _cell(whole, wanted)
    try:
      user = config_lib.merge(_config(whole, wanted, encoders), vocabulary)
      corpus = known.setdefault(user['data'], cost.Corpus(user['data']))
      found.append(cost.costed(cell, user, corpus, sizes))
    except UserError as e:
      raise UserError(f'cell {cell.name}: {e}') from e
  return found


def _vocabulary(whole: Transfer, out: pathlib.Path) -> dict[str, Any]:
  """Config values that make channels one, by a file in the folder."""
  if not whole.same:
    return {}
  path = out.resolve() / CHANNELS
  content = {name: {'aliases': [*channels]} for name, channels in whole.same.items()}
  if not path.exists() or files.read_json(path) != content:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
  return {'loader': {'vocabulary': str(path)}}


def _cell(whole: Transfer, wanted: _Wanted) -> Cell:
  axes: dict[str, Any] = {'corpus': '+'.join(wanted.on), 'arm': wanted.arm}
  axes |= {'rate': wanted.rate} if len(whole.arms[wanted.arm].rates) > 1 else {}
  axes |= {'fraction': wanted.fraction} if len(whole.fractions) > 1 else {}
  group = '_'.join(f'{k}={word(v)}' for k, v in axes.items())
  return Cell(f'{group}_seed={wanted.seed}' if len(whole.seeds) > 1 else group, group,
              dataclasses.asdict(wanted) | {'on': [*wanted.on]}, {})


def _config(whole: Transfer, wanted: _Wanted, encoders: Mapping[str, Any]) -> dict[str, Any]:
  """What a cell trains with."""
  arm, corpora = whole.arms[wanted.arm], [whole.corpora[name] for name in wanted.on]
  base = {k: v for k, v in whole.base.items() if not arm.encoder or k not in ('model', 'encoder')}
  own = nested(corpora[0].values) if len(corpora) == 1 else {}
  linear = {'objective': {'decoder': 'linear'}} if (arm.kind, corpora[0].task) == ('linear', 'segment') else {}
  subset = {'loader': {'records_seed': wanted.seed}} if wanted.fraction < 1 else {}
  rate = {} if wanted.rate is None else {'learning_rate': float(wanted.rate)}
  user = config_lib.merge(subset, base, own, linear, nested(arm.values), rate, {'seed': wanted.seed})
  asked = finetune.Request(arm.encoder, ','.join(c.data for c in corpora), corpora[0].task, corpora[0].label, user,
                           freeze=arm.kind == 'linear', scratch=arm.kind == 'scratch', fraction=wanted.fraction)
  return finetune.recipe(asked, encoders[arm.encoder]) if arm.encoder else finetune.recipe_alone(asked)


def write_plan(out: str | pathlib.Path, file: str, whole: Transfer, counts: Mapping[str, Mapping[str, int]],
               cells: Sequence[cost.Ready]) -> dict[str, Any]:
  """Writes OUT/plan.json, see `cells.save_plan`; counts are of `check_data`."""
  corpora = [{'name': n, **dataclasses.asdict(c), **counts[n]} for n, c in whole.corpora.items()]
  arms = [{'name': n, **dataclasses.asdict(a)} for n, a in whole.arms.items()]
  return cells_lib.save_plan(out, {
      'file': file, 'data': '', 'judges': [], 'axes': {}, 'corpora': corpora, 'arms': arms, 'against': whole.against,
      'sizes': [*whole.sizes], 'fractions': [*whole.fractions], 'seeds': [*whole.seeds]}, cells)
