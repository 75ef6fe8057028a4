"""Classification of corrupted test images by probes of clean ones."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.data.resize import resize
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import confounding, corruptions, grouped, metrics, tables
from jaxmed.evaluate import pixels as pixels_lib
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.compared import PROBES
from jaxmed.evaluate.protocols.protocol import lone_subject
from jaxmed.evaluate.protocols.tasks import PIXELS, TRAINED, UNTRAINED, Part, Task, encoded, make_task, plain, sizes
from jaxmed.evaluate.report import shifts

CLEAN, MEAN = 'clean', 'mean'
_SHOWN = (1, 3, 5)  # severities in the picture


@dataclasses.dataclass(frozen=True)
class Corruptions:
  """kNN and logistic regression, fitted on clean training rows, asked of test rows with corruptions of five severities.

  What is compared is balanced accuracy; a change is that of corrupted rows less that of the same rows clean. Images are
  corrupted in stored intensities at the encoder's grid; see `corruptions` in jaxmed/evaluate for each one's severities.

  Attributes:
    kinds: corruptions; without it all that suit the images. severities: 1 .. 5, which ones.
    rows: most test rows, whole subjects at random.
  """

  kinds: str = ''
  severities: Any = corruptions.SEVERITIES
  rows: int = 500

  name: ClassVar[str] = 'corruptions'
  task: ClassVar[str] = 'classification of corrupted images by probes of clean ones'

  def __post_init__(self):
    for kind in compared.words(self.kinds):
      choose('corruption', kind, corruptions.KINDS)
    self._levels()
    compared.positive('corruptions.rows', self.rows)

  def check(self, source: Any, label: str, seed: int = 0) -> None:
    """A UserError where the rows do not allow it, before anything is embedded."""
    self.chosen(make_task(source, label, seed).test.source)

  def run(self, encoder: Any, source: Any, label: str, *, untrained: Any = None, beside: Mapping[str, Any] = {},
          feature: str = 'mean', batch_size: int = 64, seed: int = 0, draws: int = 1000,
          pixels: bool = True) -> dict[str, Any]:
    """Changes of balanced accuracy; arguments as of `FeatureProtocol.run`.

    Returns:
      The dict of `FeatureProtocol.run` with the metrics 'clean', a change for each corruption (mean of its severities)
      and their 'mean'; and kinds, left_out {corruption: why it does not suit}, severities
      [{features, method, kind, severity, accuracy, change}], shown (id of a record).
    Raises:
      UserError: as of `tasks.make_task`; a corruption that does not suit the images.
    """
    return self.judged(make_task(source, label, seed), compared.encoders(encoder, feature, untrained, beside),
                       feature, batch_size, seed, draws, pixels)

  def judged(self, task: Task, those: Mapping[str, tuple[Any, str]], feature: str, batch_size: int, seed: int,
             draws: int, pixels: bool) -> dict[str, Any]:
    """The result of `run` for the rows of a task; those are of `compared.encoders`."""
    kinds, left_out = self.chosen(task.test.source)
    task, notes = compared.with_val(task)
    task, more = self._fewer(task, seed)
    y = {split: part.y for split, part in task.parts.items()}
    encoder = those[TRAINED][0]
    sources = corruptions.corrupted(task.test.source, encoder.image_size, kinds, self._levels(), seed)
    found, details = {}, []
    for name, x in self._features(those, task, sources, batch_size, pixels).items():
      for method in PROBES:
        predicted = compared.classified(method, x, y, len(task.classes))  # [S, M]
        value, drawn = grouped.balanced_accuracies(task.test.y, predicted, task.test.subjects, draws=draws, seed=seed)
        found[name, method] = _by_kind(list(sources), value), _by_kind(list(sources), drawn)
        details += [dict(features=name, method=method, **line) for line in _lines(list(sources), value, drawn)]
    notes += [*more, *([] if UNTRAINED in those else [compared.MISSING])]
    chance = {CLEAN: 1 / len(set(task.test.y.tolist())), **dict.fromkeys((*kinds, MEAN), 0.0)}
    return compared.rows_of(found) | dict(
        label=task.label, feature=feature, classes=list(task.classes), chance=chance, kinds=list(kinds),
        left_out=left_out, severities=details, shown=task.test.source.table['id'].to_pylist()[0],
        grid=list(encoder.image_size), notes=notes + lone_subject(task), draws=draws, seed=seed, **sizes(task))

  def chosen(self, source: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The corruptions that are used, and {corruption: why it does not suit} of the others."""
    unsuited = {kind: why for kind, why in corruptions.suited(source).items() if why}
    wanted = compared.words(self.kinds)
    for kind in wanted:
      if kind in unsuited:
        raise UserError(f'corruptions.kinds: {kind} does not suit {source.path}: {unsuited[kind]}')
    kinds = wanted or tuple(kind for kind in corruptions.KINDS if kind not in unsuited)
    return kinds, {} if wanted else unsuited

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    left = ''.join(f'{kind} is left out: {why}.\n' for kind, why in result['left_out'].items())
    return tables.text_table(result, _labels(result), PROBES) + (
        'Balanced accuracy of clean rows; of a corruption what it changes, the mean over severities.\n' + left)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return tables.html_table(result, _labels(result), PROBES)

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each kind of features, method, corruption and severity."""
    out = [['features', 'method', 'corruption', 'severity', 'metric', 'value', 'low', 'high']]
    for row in result['severities']:
      for metric in ('accuracy', 'change'):
        out.append([row['features'], row['method'], row['kind'], str(row['severity']), metric,
                    *('' if v is None else f'{v:.6g}' for v in row[metric].values())])
    return out

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """{'curves': accuracy against severity, 'examples': a record with each corruption}."""
    return {'curves': lambda path: shifts.severities(result, PROBES, path),
            'examples': lambda path: _examples(result, source, path)}

  def _levels(self) -> tuple[int, ...]:
    levels = compared.words(self.severities)
    for level in levels:
      choose('corruptions.severities', level, map(str, corruptions.SEVERITIES))
    if not levels or len(set(levels)) < len(levels):
      raise UserError(f'corruptions.severities={self.severities}: expected some of 1 .. 5, each once')
    return tuple(map(int, levels))

  def _fewer(self, task: Task, seed: int) -> tuple[Task, list[str]]:
    """The task with at most `rows` test rows, and a note on it."""
    part, count = task.test, len(task.test.y)
    if count <= self.rows:
      return task, []
    keep = np.zeros(count, bool)
    keep[confounding.order_by_subject(part.subjects, np.random.default_rng(seed))[:self.rows]] = True
    part = Part(part.source.keep(keep), part.y[keep], part.subjects[keep])
    return (dataclasses.replace(task, test=part),
            [f'{self.rows} of {count} test rows are used (corruptions.rows)'])

  def _features(self, those: Mapping[str, tuple[Any, str]], task: Task, sources: Mapping[Any, Any], batch_size: int,
                pixels: bool) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {'train', 'val': [n, D], 'test': [S, M, D]}}."""
    out = {}
    for name, (encoder, feature) in those.items():
      x = encoded(encoder, task, feature, batch_size, name, ('train', 'val'))
      asked = [dataclasses.replace(task, test=dataclasses.replace(task.test, source=s)) for s in sources.values()]
      out[name] = x | {'test': np.stack([encoded(encoder, t, feature, batch_size, name, ('test',))['test']
                                         for t in asked])}
    if pixels:
      fitted = {s: p.source for s, p in task.parts.items() if s != 'test'}
      found = pixels_lib.source_features(those[TRAINED][0], *fitted.values(), *sources.values(), batch_size=batch_size)
      out[PIXELS] = dict(zip(fitted, found, strict=False)) | {'test': np.stack(found[len(fitted):])}
    return out


def _labels(result: Mapping[str, Any]) -> dict[str, str]:
  return {CLEAN: 'clean', **{kind: kind.replace('_', ' ') for kind in result['kinds']}, MEAN: 'mean change'}


def _by_kind(names: list[tuple[str, int]], values: np.ndarray) -> dict[str, Any]:
  """Of accuracies [..., S]: clean, the mean change by each corruption, the mean of these."""
  clean = values[..., names.index(('', 0))]
  kinds = dict.fromkeys(kind for kind, _ in names if kind)
  out = {k: values[..., [i for i, n in enumerate(names) if n[0] == k]].mean(axis=-1) - clean for k in kinds}
  return {CLEAN: clean, **out, MEAN: np.mean(list(out.values()), axis=0)}


def _lines(names: list[tuple[str, int]], value: np.ndarray, drawn: np.ndarray) -> list[dict[str, Any]]:
  """Accuracy and change of each corruption and severity."""
  clean, out = names.index(('', 0)), []
  for i, (kind, severity) in enumerate(names):
    cells = metrics.summarised({'accuracy': value[i], 'change': value[i] - value[clean]},
                               {'accuracy': drawn[:, i], 'change': drawn[:, i] - drawn[:, clean]})
    out.append({'kind': kind or CLEAN, 'severity': severity, **plain(cells)})
  return out


def _examples(result: Mapping[str, Any], source: Any, path: Any) -> None:
  """One record, a line a corruption, clean and at three severities."""
  row = source.table['id'].to_pylist().index(result['shown'])
  sources = corruptions.corrupted(source, result['grid'], result['kinds'], _SHOWN, result['seed'])
  record = sources['', 0].record(row)
  image = lambda kind, severity: sources[kind, severity].record(row)['image']
  lines = {kind: [resize(record['image'], result['grid']), *(image(kind, s) for s in _SHOWN)]
           for kind in result['kinds']}
  shifts.tiles(lines, ['clean', *(f'severity {s}' for s in _SHOWN)], record['channels'], path)
