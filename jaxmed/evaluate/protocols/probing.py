"""What the kinds of targets of `classify` share: options, probes of vectors and of patch tokens, few labels."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import few_labels, tables
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate.protocols.protocol import Answers, FeatureProtocol
from jaxmed.evaluate.protocols.tasks import TRAINED, Task, encoded, plain

KINDS = ('auto', 'classes', 'ordinal', 'labels', 'number')
METHODS = tables.METHODS
ATTENTIVE = ('capi', 'vjepa')  # probes of patch tokens
_TOKEN_BYTES = 1 << 30  # of patch tokens of one encoder
_STEPS, _PASSES = 500, 20  # of an attentive probe, the more of both


@dataclasses.dataclass(frozen=True)
class Probing(FeatureProtocol):
  """Base of the kinds of targets; their options are those of `classify.Classify`."""

  target: str = 'auto'
  probes: tuple[str, ...] = ()
  order: tuple[str, ...] = ()
  positive: str = ''
  sensitivity: float = 0.0
  fractions: tuple[float, ...] = ()
  seeds: int = 3
  attentive_steps: int = 0

  name: ClassVar[str] = 'classify'
  kind: ClassVar[str]
  offered: ClassVar[tuple[str, ...]]  # probes that can answer for the kind, those by default first
  defaults: ClassVar[int] = 2  # of them

  def __post_init__(self):
    for field in ('probes', 'order', 'fractions'):
      value = getattr(self, field)
      value = tuple(value) if isinstance(value, (tuple, list)) else () if value == '' else tuple(
        v.strip() for v in value.split(',')) if isinstance(value, str) else (value,)
      object.__setattr__(self, field, tuple(map(_number if field == 'fractions' else _text, value)))
    object.__setattr__(self, 'positive', _text(self.positive))
    choose('classify.target', self.target, KINDS)
    for probe in self.probes:
      choose('probe of classify.probes', probe, METHODS)
    if not all(isinstance(f, (int, float)) and 0 < f <= 100 for f in self.fractions):
      raise UserError(f'classify.fractions={",".join(map(str, self.fractions))}: expected percentages of the training '
                      'subjects above 0 and up to 100, such as 1,5,10,25,50,100')
    object.__setattr__(self, 'fractions', tuple(sorted(set(self.fractions))))
    if not isinstance(self.sensitivity, (int, float)) or not 0 <= self.sensitivity <= 1:
      raise UserError(f'classify.sensitivity={self.sensitivity}: expected a number up to 1, such as 0.95; 0 is off')
    for field, least in (('seeds', 1), ('attentive_steps', 0)):
      if not isinstance(getattr(self, field), int) or getattr(self, field) < least:
        raise UserError(f'classify.{field}={getattr(self, field)}: expected a whole number of {least} or more')

  @property
  def methods(self) -> Mapping[str, str]:  # type: ignore[override]
    """The probes that are fitted."""
    for probe in self.probes:
      if probe not in self.offered:
        raise UserError(f'classify.probes={probe} does not go with the target {self.kind}: expected '
                        f'{", ".join(self.offered)}')
    return {p: METHODS[p] for p in self.probes or self.offered[:self.defaults]}

  def predict(self, method: str, train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray],
              asked: np.ndarray, task: Task, refit: bool = True) -> Answers:
    """What a probe of vectors, fitted on `train` and chosen on `val`, says of rows `asked` [M, D]: [M, K]."""
    raise NotImplementedError

  def content(self, y: np.ndarray, task: Task) -> tuple[np.ndarray, list[str]]:
    """Bool [N, K]: what rows with y show of all that a part of the training subjects must hold; and its names."""
    raise NotImplementedError

  def headline_outcome(self, values: np.ndarray, task: Task, draws: int, seed: int) -> tuple[float, np.ndarray]:
    """The headline metric alone, and on resampled subjects [draws]."""
    value, drawn = self.outcome(values, task, draws, seed)
    return value[self.headline], drawn[self.headline]

  def check(self, source: Any, label: str, seed: int = 0) -> None:
    """As of every protocol; also whether each part of the training subjects holds all classes."""
    protocol = self.resolved(source, label)
    assert isinstance(protocol, Probing) and protocol.methods
    task = protocol.task_of(source, label, seed)
    protocol.notes(task)
    protocol._few(task, seed)

  def features(self, encoder: Any, task: Task, feature: str, batch_size: int, name: str) -> dict[str, np.ndarray]:
    """Vectors, and for an attentive probe also 'tokens SPLIT' [n, N, D], the mean over channels."""
    if not set(self.methods) & set(ATTENTIVE):
      return encoded(encoder, task, feature, batch_size, name, self.splits)
    rows = sum(len(p.y) for p in task.parts.values())
    count, width = _token_shape(encoder, task)
    size = 4 * rows * count * width
    if size > _TOKEN_BYTES:
      raise UserError(f'classify.probes: {rows:,} rows of {count} patch tokens of width {width} take '
                      f'{size / 2**30:.1f} GiB, at most {_TOKEN_BYTES / 2**30:.0f} GiB are held: judge fewer rows, or '
                      f'without {" and ".join(p for p in ATTENTIVE if p in self.methods)}')
    out: dict[str, np.ndarray] = {}
    dense = _Dense(encoder)
    out |= encoded(dense, task, feature, batch_size, name, self.splits)
    for split, tokens in zip((s for s in task.parts if s in self.splits), dense.tokens, strict=True):
      out[f'tokens {split}'] = tokens
    return out

  def methods_for(self, x: Mapping[str, np.ndarray]) -> list[str]:
    """Attentive probes need tokens, which pixels do not have."""
    return [m for m in self.methods if m not in ATTENTIVE or 'tokens train' in x]

  def chosen_rows(self, x: Mapping[str, np.ndarray], task: Task, prefix: str = '') -> tuple[Any, Any]:
    """(features, y) that are fitted, and (features, y) that choices are made on."""
    fit, train = task.fit, x[f'{prefix}train']
    val_x, val_y = (x[f'{prefix}val'], task.val.y) if task.val else (train[~fit], task.train.y[~fit])
    return (train[fit], task.train.y[fit]), (val_x, val_y)

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """[..., M, K] of a probe, fitted once for all sets of test features."""
    if method in ATTENTIVE:
      if 'tokens test' not in x:
        raise UserError(f'classify.probes={method} asks patch tokens, which subsets of channels do not give')
      return self.attended(method, x, task, x['tokens test'])
    test, shape = x['test'].reshape(-1, x['test'].shape[-1]), x['test'].shape[:-1]
    train, val = self.chosen_rows(x, task)
    if method == 'knn':  # nothing is chosen: all rows vote
      train = x['train'], task.train.y
    found = self.predict(method, train, val, test, task)
    return found._replace(values=found.values.reshape(*shape, -1))

  def attended(self, method: str, x: Mapping[str, np.ndarray], task: Task, asked: np.ndarray) -> Answers:
    """What an attentive probe says of tokens [M, N, D]."""
    from jaxmed.evaluate import attentive
    (train, y), (val, val_y) = self.chosen_rows(x, task, 'tokens ')
    steps = self.attentive_steps or max(_STEPS, math.ceil(_PASSES * len(y) / 128))
    values, info = attentive.fit(train, y, val, val_y, asked, len(task.classes), kind=method, steps=steps)
    trouble = (f'the best learning rate {info["learning_rate"]:g} is at the edge of the grid: try another '
               'classify.attentive_steps') if info['rate_at_edge'] else ''
    return Answers(values, {'probe': info}, trouble)

  def whole(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """The kind of the target, and the curves of few labels."""
    parts = self._few(task, seed)
    return {'target': self.kind} | ({'few_labels': self._curves(sets, task, parts, draws, seed)} if parts else {})

  def _few(self, task: Task, seed: int) -> list[list[np.ndarray]]:
    """Rows bool [N] of the training rows for each seed and fraction."""
    if not self.fractions:
      return []
    content, names = self.content(task.train.y[task.fit], task)
    out = []
    for s in range(seed, seed + self.seeds):
      rows = few_labels.parts(task.train.subjects[task.fit], content, names, self.fractions, s)
      whole = [np.zeros(len(task.fit), bool) for _ in rows]
      for all_rows, part in zip(whole, rows, strict=True):
        all_rows[task.fit] = part
      out.append(whole)
    return out

  def _curves(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, parts: list[list[np.ndarray]], draws: int,
              seed: int) -> dict[str, Any]:
    """The headline metric against the fraction of training subjects, for each kind of features and probe."""
    drawn: dict[tuple[str, str], np.ndarray] = {}  # [F, draws]
    curves: list[dict[str, Any]] = []
    for name, x in sets.items():
      for method in (m for m in self.methods if m not in ATTENTIVE):
        points: list[dict[str, Any]] = []
        ends = []
        for i, fraction in enumerate(self.fractions):
          same = {rows[i].tobytes(): rows[i] for rows in parts}  # all subjects are the same part for each seed
          fits = {key: self._of_part(method, x, task, rows, draws, seed) for key, rows in same.items()}
          found = [fits[rows[i].tobytes()] for rows in parts]
          values = [f[0] for f in found]
          ends.append(np.mean([f[1] for f in found], axis=0))
          cell = plain(statistics.summarised({'m': float(np.mean(values))}, {'m': ends[-1]}))['m']
          points.append({'fraction': fraction, 'seeds': [v if np.isfinite(v) else None for v in values], **cell})
        drawn[name, method] = np.stack(ends)
        curves.append({'features': name, 'method': method, 'points': points,
                       'area': self._area([p['value'] for p in points], drawn[name, method])})
    heights = {(c['features'], c['method']): [p['value'] for p in c['points']] for c in curves}
    out = []
    for name, method in drawn:
      if name == TRAINED:
        continue
      one, other = (np.array(heights[n, method], np.float64) for n in (TRAINED, name))  # None is NaN
      gap = (one - other).tolist()
      crossing = None if np.isnan(gap).any() else few_labels.crossing(self.fractions, one, other)
      out.append({'minus': name, 'method': method, 'crossing': crossing,
                  'area': self._area(gap, drawn[TRAINED, method] - drawn[name, method])})
    subjects = [len(set(task.train.subjects[rows])) for rows in parts[0]]
    return {'metric': self.headline, 'fractions': list(self.fractions), 'subjects': subjects, 'seeds': self.seeds,
            'curves': curves, 'differences': out}

  def _area(self, values: Sequence[float | None], drawn: np.ndarray) -> dict[str, Any]:
    height = float(few_labels.area(self.fractions, np.array(values, np.float64)))  # None is NaN
    return plain(statistics.summarised({'area': height}, {'area': few_labels.area(self.fractions, drawn.T)}))['area']

  def _of_part(self, method: str, x: Mapping[str, np.ndarray], task: Task, rows: np.ndarray, draws: int,
               seed: int) -> tuple[float, np.ndarray]:
    """The headline metric of a probe fitted on some training rows, and on resampled subjects."""
    _, val = self.chosen_rows(x, task)
    found = self.predict(method, (x['train'][rows], task.train.y[rows]), val, x['test'], task, refit=False)
    return self.headline_outcome(found.values, task, draws, seed)

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    parts = [tables.text_table(result, self.metrics, METHODS), *map(_aligned, self.more_tables(result))]
    return '\n'.join(parts)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    out = [tables.html_table(result, self.metrics, METHODS)]
    for title, head, rows in self.more_tables(result):
      out.append(f'<h3>{html.escape(title)}</h3>' + tables.html_rows(head, [list(map(html.escape, r)) for r in rows]))
    return '\n'.join(out)

  def more_tables(self, result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each further table."""
    few = result.get('few_labels')
    if not few:
      return []
    head = ['features', 'method', *(f'{f:g} %' for f in few['fractions']), 'area']
    rows = [[c['features'], METHODS[c['method']], *(tables.number(p['value']) for p in c['points']),
             tables.interval(c['area'])] for c in few['curves']]
    title = (f'Few labels: {self.metrics[few["metric"]]} by the percentage of training subjects, mean of '
             f'{few["seeds"]} seeds; area over its logarithm. Penalties are chosen on all validation rows.')
    less = [[tables.short(TRAINED) + ' - ' + tables.short(d['minus']), METHODS[d['method']],
             tables.interval(d['area'], sign=True),
             'none' if d['crossing'] is None else f'{d["crossing"]:.3g} %'] for d in few['differences']]
    return [(title, head, rows), ('Few labels: difference of the areas, and from where the other is as good',
                                  ['difference', 'method', 'area', 'crossing'], less)]


def _text(value: Any) -> str:
  """The name of a class that an option was read as: true is one of a column of booleans."""
  return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: Any) -> Any:
  """A number written as text, else the value."""
  try:
    return float(value) if isinstance(value, str) else value
  except ValueError:
    return value


class _Dense:
  """An encoder that is asked for vectors and tokens in one pass; keeps the tokens of each source in order."""

  def __init__(self, encoder: Any):
    self.encoder, self.tokens = encoder, []  # type: ignore[var-annotated]

  def embed_source(self, source: Any, batch_size: int) -> dict[str, Any]:
    found = dict(self.encoder.embed_source(source, batch_size, dense=True))
    tokens = np.asarray(found.pop('map'), np.float32)
    self.tokens.append(tokens.reshape(len(tokens), -1, tokens.shape[-1]))
    return found


def _token_shape(encoder: Any, task: Task) -> tuple[int, int]:
  """Number and width of the patch tokens of a record."""
  model = getattr(encoder, 'model', None)
  if model is not None:
    return math.prod(n // p for n, p in zip(model.image_size, model.patch_size, strict=True)), model.embed_dim
  first = np.arange(len(task.train.y)) == 0
  tokens = encoder.embed_source(task.train.source.keep(first), 1, dense=True)['map']
  return math.prod(tokens.shape[1:-1]), tokens.shape[-1]


def _aligned(table: tuple[str, list[str], list[list[str]]]) -> str:
  title, head, rows = table
  return '\n'.join([title, *tables.aligned([head, *rows]), ''])
