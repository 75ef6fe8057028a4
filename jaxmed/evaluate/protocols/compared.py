"""The trained encoder beside the untrained one, raw pixels and other encoders: features, rows, paired differences."""

import dataclasses
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics, probes, tables
from jaxmed.evaluate.protocols.tasks import (
  PIXELS,
  SPLITS,
  TRAINED,
  UNTRAINED,
  Part,
  Task,
  encoded,
  pixel_features,
  plain,
)

MISSING = 'no untrained encoder was given: that baseline is missing'
PROBES = {method: tables.METHODS[method] for method in ('knn', 'logistic')}

Cells = dict[str, dict[str, float]]
Found = Mapping[tuple[str, str], tuple[dict[str, float], dict[str, np.ndarray]]]


def encoders(encoder: Any, feature: str, untrained: Any, beside: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
  """{kind of features: (encoder, its vector)}; those beside are judged by the vector that they recommend."""
  out = {TRAINED: (encoder, feature)} | ({} if untrained is None else {UNTRAINED: (untrained, feature)})
  for name, other in beside.items():
    if name in (*out, PIXELS):
      raise UserError(f'two encoders are called {name!r}; expected a name each')
    out[name] = other, other.feature
  return out


def feature_sets(those: Mapping[str, tuple[Any, str]], task: Task, batch_size: int, pixels: bool,
                 splits: Sequence[str] = SPLITS) -> dict[str, dict[str, np.ndarray]]:
  """{kind of features: {split: [n, D]}}; those are of `encoders`."""
  out = {name: encoded(one, task, feature, batch_size, name, splits) for name, (one, feature) in those.items()}
  if pixels:
    out[PIXELS] = pixel_features(those[TRAINED][0], task, batch_size, splits)
  return out


def classified(method: str, x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
  """The classes [..., M] that a probe of PROBES answers for features x['test'] [..., M, D].

  Args:
    x: {'train', 'val', 'test': features}. y: {'train', 'val': classes}.
  """
  test = x['test'].reshape(-1, x['test'].shape[-1])  # one fit for all sets
  if method == 'knn':
    scores = probes.knn(x['train'], y['train'], test, classes)
  else:
    scores = probes.logistic(x['train'], y['train'], x['val'], y['val'], test, classes)[0]
  return scores.argmax(axis=-1).reshape(x['test'].shape[:-1])


def with_val(task: Task) -> tuple[Task, list[str]]:
  """The task with a val part, cut of the training subjects where there is none, and a note on that."""
  if task.val is not None:
    return task, []
  part = lambda rows: Part(task.train.source.keep(rows), task.train.y[rows], task.train.subjects[rows])
  held = np.count_nonzero(~task.fit)
  return (dataclasses.replace(task, train=part(task.fit), val=part(~task.fit),
                              fit=np.ones(np.count_nonzero(task.fit), bool)),
          [f'no val split: {held} train rows, cut by subject, stand for it'])


def pairs(kinds: Sequence[str]) -> list[tuple[str, str]]:
  """Which kinds of features are compared: the trained encoder to all others, those beside it to each other."""
  named = [k for k in kinds if k not in (TRAINED, UNTRAINED, PIXELS)]
  return [(TRAINED, other) for other in kinds if other != TRAINED] + list(itertools.combinations(named, 2))


def rows_of(found: Found) -> dict[str, list[dict[str, Any]]]:
  """'rows' and 'differences' of a result, as those of `FeatureProtocol.run`.

  Args:
    found: {(features, method): ({metric: value}, {metric: [draws] on the same resamples})}.
  """
  cells = {key: metrics.summarised(value, drawn) for key, (value, drawn) in found.items()}
  minus = lambda one, other, method: metrics.difference(*found[one, method], *found[other, method])
  return lines(cells, minus)


def lines(cells: Mapping[tuple[str, str], Cells], minus: Callable[[str, str, str], Cells]) -> dict[str, list[dict]]:
  """The same of cells {(features, method): {metric: {value, low, high}}}; minus(one, other, method) has differences."""
  rows = [{'features': name, 'method': method, 'metrics': plain(of)} for (name, method), of in cells.items()]
  methods = list(dict.fromkeys(method for _, method in cells))
  differences = [{'features': one, 'minus': other, 'method': method, 'metrics': plain(minus(one, other, method))}
                 for one, other in pairs(list(dict.fromkeys(name for name, _ in cells))) for method in methods]
  return {'rows': rows, 'differences': differences}


def note(text: str) -> str:
  """Lines below a table as HTML."""
  return ''.join(f'<p class="note">{html.escape(line)}</p>' for line in text.splitlines())


def words(value: Any) -> tuple[str, ...]:
  """An option that is a list: 'a,b' from a command, which makes numbers of '1,2'."""
  if isinstance(value, str):
    return tuple(w.strip() for w in value.split(',') if w.strip())
  return tuple(map(str, value)) if isinstance(value, (tuple, list)) else (str(value),)


def positive(option: str, value: Any, least: int = 1) -> None:
  """A UserError where an option is no whole number, or smaller than `least`."""
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise UserError(f'{option}={value}: expected a whole number, {least} or more')
