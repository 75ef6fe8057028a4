"""Segmentation by the run itself: whole test images predicted on the grid that they are stored on, and judged."""

import dataclasses
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmed.data.corpus.labels import labels_of
from jaxmed.data.feed import fields
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate import postprocess as post
from jaxmed.evaluate import segmentation, tables
from jaxmed.evaluate.overlap import OUTCOMES
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.protocol import lone_subject
from jaxmed.evaluate.protocols.tasks import SPLITS, TRAINED, plain, subjects_of

BACKGROUND = 0  # the value that is no class of the scores
EXAMPLES = 6
METHOD = 'whole'
FLIPS = ('auto', 'none')
NUMBERS = ('volume', 'volume_predicted', 'lesions')  # of a case, beside its metrics


@dataclasses.dataclass(frozen=True)
class Segment:
  """Masks that runs of method segment predict for whole test records, against the masks of these.

  Records are predicted on the grid and spacing of the corpus; where the run was trained at another spacing they are
  brought to it and logits back. A case is a record. See `segmentation` for metrics and for what is counted where a
  class is missed, made up or absent. The background (0) is no class of the scores.

  Attributes:
    tolerance: of NSD, in mm (pixels where the spacing is unknown).
    surface: what a surface is, 'surfel' or 'voxel', see `surface`; 'none' measures no distances.
    lesions: rule by which components are counted as lesions, 'touch' or 'iou', see `lesions`; 'none' counts none.
    least: smallest IoU of the rule 'iou'.
    step: largest distance of two tiles, as a share of their size. flips: 'auto' mirrors the axes that training
      mirrored (none where classes are left and right), 'none' mirrors none. tiles: in one pass on each device.
    postprocess: 'auto' keeps the largest component of classes where that raises the Dice of split 'val', see
      `postprocess`; 'none' takes masks as they are.
  """

  tolerance: float = 1.0
  surface: str = 'surfel'
  lesions: str = 'none'
  least: float = 0.1
  step: float = 0.5
  flips: str = 'auto'
  tiles: int = 1
  postprocess: str = 'none'

  name: ClassVar[str] = 'segment'
  labelled: ClassVar[bool] = False  # the masks are the labels
  judges: ClassVar[str] = 'segmenter'  # not an encoder
  task: ClassVar[str] = 'masks that a run of method segment predicts for whole images'
  metrics: ClassVar[Mapping[str, str]] = segmentation.LABELS

  def __post_init__(self):
    choose('segment.flips', self.flips, FLIPS)
    choose('segment.postprocess', self.postprocess, post.MODES)
    compared.positive('segment.tiles', self.tiles)
    assert self.ask  # which checks the rest

  @property
  def ask(self) -> segmentation.Ask:
    """What is measured."""
    word = lambda value: '' if value == 'none' else value
    return segmentation.Ask(self.tolerance, word(self.surface), word(self.lesions), self.least)

  def check(self, source: Any, label: str = '', seed: int = 0) -> None:
    """A UserError where there is no test record with a mask, or a subject of these is in training too."""
    if 'mask' not in fields.held(source):
      raise UserError(f"{source.path} has no masks in these rows: expected a column 'mask' of files in the table that "
                      'it was prepared with')
    if not len(source.select(split='test', label='mask')):
      raise UserError(f"no row of split 'test' of {source.path} has a mask")
    homes = {split: set(subjects_of(source.select(split=split)).tolist()) for split in SPLITS}
    both = sorted(homes['test'] & (homes['train'] | homes['val']))
    if both:
      raise UserError(f'subject {both[0]!r} has rows in test and in {"train" if both[0] in homes["train"] else "val"}; '
                      'expected one split a subject')

  def run(self, encoder: Any, source: Any, label: str = '', *, beside: Mapping[str, Any] = {}, feature: str = '',
          batch_size: int = 1, seed: int = 0, draws: int = 1000, untrained: Any = None) -> dict[str, Any]:
    """Predicts and judges the test records, once for each run.

    Args:
      encoder: a `segmenter.Segmenter`. source: with masks. beside: other segmenters by name, of the same classes.
      label, feature, batch_size, untrained: of no effect.
      draws: bootstrap resamples of test subjects.
    Returns:
      A dict ready for JSON: label 'mask', classes [{value, name}], rows [{features, method, metrics {metric: {value,
      low, high}}, classes [{value, name, metric ..., both, missed, hallucinated, absent}], cases [{id, subject,
      classes [{value, outcome, metric ...}]}]}], differences over the same resamples, examples (the worst records),
      splits, subjects, notes, draws, seed.
    Raises:
      UserError: as of `check`; classes that two runs do not share; what a run says of a record.
    """
    del label, feature, batch_size, untrained
    self.check(source)
    if self.postprocess != 'none':
      val_of(source)
    runs = {TRAINED: encoder} | dict(beside)
    task = _task(source, runs)
    judged = {name: self._judged(run, task, name == TRAINED) for name, run in runs.items()}
    return self._result(task, judged, source, draws, seed)

  def _judged(self, segmenter: Any, task: '_Task', shown: bool) -> '_Judged':
    """Metrics of every test record by one run, and the worst of them."""
    how = {'step': self.step, 'flips': None if self.flips == 'auto' else (), 'batch_size': self.tiles}
    change = post.Change(()) if self.postprocess == 'none' else best_change(segmenter, task.val, **how)
    cases: list[dict[str, np.ndarray]] = []
    examples: list[dict[str, Any]] = []
    for i, record in enumerate(_records(task.source)):
      truth = _known(record['mask'], task.ignored)
      predicted = change(segmenter.mask_of(record, record['id'], **how))
      found = segmentation.case(truth, predicted, task.values, record['spacing'] or (1,) * truth.ndim, self.ask)
      found = {m: np.where(task.annotated[i], x, -1 if m == 'outcome' else np.nan) for m, x in found.items()}
      found = {m: np.where(task.annotated[i], x, 0) if m == 'lesions' else x for m, x in found.items()}
      cases.append(found)
      if shown and not np.isnan(found['dice']).all():
        worst = _example(record, truth, predicted, float(np.nanmean(found['dice'])))
        examples = sorted([*examples, worst], key=lambda e: e['dice'])[:EXAMPLES]
    return _Judged(cases, examples, change.names)

  def _result(self, task: '_Task', judged: Mapping[str, '_Judged'], source: Any, draws: int,
              seed: int) -> dict[str, Any]:
    """What `run` returns."""
    found, rows = {}, []
    for name, one in judged.items():
      value = {m: segmentation.score(one.cases, m) for m in self.ask.metrics}
      drawn = {m: segmentation.resampled(one.cases, m, task.subjects, draws=draws, seed=seed) for m in self.ask.metrics}
      found[name, METHOD] = value, drawn
      rows.append(dict(features=name, method=METHOD, metrics=plain(statistics.summarised(value, drawn)),
                       postprocess=list(one.changed), classes=self._classes(one.cases, task),
                       cases=self._cases(one.cases, task)))
    sizes = {s: source.select(split=s, label='mask') for s in SPLITS}
    return dict(label='mask', classes=task.classes, rows=rows, differences=compared.rows_of(found)['differences'],
                chance={}, splits={s: len(rows) for s, rows in sizes.items()},
                subjects={s: len(set(subjects_of(rows).tolist())) for s, rows in sizes.items()},
                examples={'cases': judged[TRAINED].examples}, notes=self._notes(task, judged), draws=draws, seed=seed,
                headline='dice')

  def _classes(self, cases: Sequence[Mapping[str, np.ndarray]], task: '_Task') -> list[dict[str, Any]]:
    means = {m: segmentation.by_class(cases, m) for m in self.ask.metrics}
    counts = segmentation.outcomes(cases)
    return [dict(value=int(v), name=task.names[i]) | {m: _plain(x[i]) for m, x in means.items()} | {
      o: int(n[i]) for o, n in counts.items()} for i, v in enumerate(task.values)]

  def _cases(self, cases: Sequence[Mapping[str, np.ndarray]], task: '_Task') -> list[dict[str, Any]]:
    numbers = [m for m in (*self.ask.metrics, *NUMBERS) if m in cases[0]]
    outcome = lambda code: OUTCOMES[int(code)] if code >= 0 else 'not annotated'
    return [dict(id=task.ids[n], subject=str(task.subjects[n]), classes=[
      dict(value=int(v), outcome=outcome(c['outcome'][i])) | {m: _plain(c[m][i]) for m in numbers}
      for i, v in enumerate(task.values)]) for n, c in enumerate(cases)]

  def _notes(self, task: '_Task', judged: Mapping[str, '_Judged']) -> list[str]:
    """What a reader must know of the numbers."""
    notes = ['means are over cases, then over classes; a class that is missed or made up has Dice and NSD 0 and the '
             'diagonal of the image as distance, one that is absent from both says nothing']
    if self.ask.surface:
      known = all(task.source.column('spacing').to_pylist())
      notes.append(f'surfaces are of {self.surface}s; NSD at {self.tolerance:g} mm; distances in mm'
                   + ('' if known else ', in pixels where the spacing is unknown'))
    if self.ask.lesions:
      notes.append(f'lesions are connected components, found by the rule {self.lesions}; sensitivity is of all lesions '
                   'together, false positives are components a case')
    if task.foreign:
      notes.append(f'classes that the run cannot predict, counted as missed: {", ".join(task.foreign)}')
    notes += [f'{name}: the largest component is kept of {", ".join(one.changed)}, chosen on split val'
              for name, one in judged.items() if one.changed]
    if not task.annotated.all():
      notes.append('classes that the source of a record does not annotate say nothing there')
    test = dataclasses.make_dataclass('Test', ['subjects'])(task.subjects)
    return notes + lone_subject(dataclasses.make_dataclass('Task', ['test'])(test))

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text: the means, then the classes of the run."""
    return f'{tables.text_table(result, self._labels(result), {METHOD: "whole images"})}\n{self._by_class(result)}\n'

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return (f'{tables.html_table(result, self._labels(result), {METHOD: "whole images"})}\n'
            f'<pre>{html.escape(self._by_class(result))}</pre>')

  def _labels(self, result: Mapping[str, Any]) -> dict[str, str]:
    return {m: label for m, label in self.metrics.items() if m in result['rows'][0]['metrics']}

  def _by_class(self, result: Mapping[str, Any]) -> str:
    """A line a class of the run's own row."""
    some = ('dice', 'nsd', 'hd95', 'volume_difference', 'sensitivity')
    names = [m for m in some if m in result['rows'][0]['metrics']]
    text = lambda v: 'n/a' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v)
    body = [[c['name'], *(text(c[k]) for k in (*names, *OUTCOMES))] for c in result['rows'][0]['classes']]
    table = tables.aligned([['class', *(self.metrics[m] for m in names), *OUTCOMES], *body])
    return '\n'.join(['Means over cases, and how many cases have the class in mask and prediction:', *table])

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A line a metric: of all classes with intervals, of each class, and of each class of each case."""
    cell = lambda v: '' if v is None else f'{v:.6g}' if isinstance(v, float) else str(v)
    head, *rows = tables.csv_rows(result)
    out = [[*head[:3], 'class', 'case', *head[3:]], *([*row[:3], 'all', 'all', *row[3:]] for row in rows)]
    names = {c['value']: c['name'] for c in result['classes']}
    for row in result['rows']:
      for case, classes in (('all', row['classes']), *((c['id'], c['classes']) for c in row['cases'])):
        out += [[row['features'], '', row['method'], names[c['value']], case, m, cell(v), '', ''] for c in classes
                for m, v in c.items() if m not in ('value', 'name')]
    return out

  def drawings(self, result: Mapping[str, Any], source: Any) -> dict[str, Callable[[Any], None]]:
    """{name: what writes a picture}: the worst test records with their masks and predictions over them."""
    from jaxmed.evaluate.report import overlays
    if not result['examples']['cases']:
      return {}
    return {'worst_test_records': lambda path: overlays.cases(result, source, path)}


def best_change(segmenter: Any, source: Any, **how: Any) -> post.Change:
  """What makes better masks of predicted ones, chosen on records that were not trained on, see `postprocess`.

  Args:
    source: the records, as of `val_of`. how: arguments of `Segmenter.logits`.
  """
  ignored = tuple(segmenter.objective.ignore)
  pairs = ((_known(r['mask'], ignored), segmenter.mask_of(r, r['id'], **how)) for r in _records(source))
  classes = [(v, n) for v, n in zip(segmenter.values, segmenter.names, strict=True) if v != BACKGROUND]
  return post.choose(pairs, classes)


def val_of(source: Any) -> Any:
  """The rows of split 'val' with a mask; a UserError where there is none."""
  if 'mask' not in fields.held(source) or not len(found := source.select(split='val', label='mask')):
    raise UserError(f"postprocess=auto: no row of split 'val' of {source.path} has a mask to choose by")
  return found


@dataclasses.dataclass(frozen=True)
class _Task:
  """The test and val records with masks, and the classes that are scored, by value and name; ignored are values of
  masks that are no class; annotated [N, K] says which classes a test record's source annotates."""

  source: Any
  val: Any
  ids: list[str]
  subjects: np.ndarray
  values: tuple[int, ...]
  names: tuple[str, ...]
  ignored: tuple[int, ...]
  foreign: tuple[str, ...]
  annotated: np.ndarray

  @property
  def classes(self) -> list[dict[str, Any]]:
    """As in results."""
    return [{'value': int(v), 'name': n} for v, n in zip(self.values, self.names, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Judged:
  """Of one run: the metrics of each case, the worst cases, and the classes that post-processing changes."""

  cases: list[dict[str, np.ndarray]]
  examples: list[dict[str, Any]]
  changed: tuple[str, ...]


def _task(source: Any, runs: Mapping[str, Any]) -> _Task:
  test, val = (source.select(split=split, label='mask') for split in ('test', 'val'))
  first = runs[TRAINED]
  for name, other in runs.items():
    if set(other.values) != set(first.values):
      raise UserError(f'{name} predicts the values {", ".join(map(str, other.values))} of masks, the run '
                      f'{", ".join(map(str, first.values))}: expected the same classes to be compared')
  ignored = tuple(getattr(first.objective, 'ignore', ()))
  labels = labels_of(test)
  stored = dict(zip(labels.values, labels.names, strict=True))
  named = dict(zip(first.values, first.names, strict=True))
  values = tuple(v for v in sorted({*stored, *named} - {BACKGROUND, *ignored}))
  if not values:
    raise UserError(f'the masks of {source.path} and the run have no class but the background')
  names = tuple(named.get(v) or stored[v] for v in values)
  codes, kinds = fields.annotated(test, sorted({*stored, *named}))
  columns = [sorted({*stored, *named}).index(v) for v in values]
  return _Task(test, val, [str(i) for i in test.table['id'].to_pylist()], subjects_of(test), values, names, ignored,
               tuple(n for v, n in zip(values, names) if v not in first.values), kinds[codes][:, columns])


def _records(source: Any) -> Iterable[dict[str, Any]]:
  """Records with their masks, one at a time."""
  for i in range(len(source)):
    record = source.record(i)
    if record.get('mask') is None:
      raise UserError(f'{source.path}: record {record["id"]} has a mask in the manifest, none in its shard; prepare it '
                      'again')
    if record['mask'].shape != record['image'].shape[:-1]:
      raise UserError(f'{source.path}: the mask of {record["id"]} has the grid {list(record["mask"].shape)}, its image '
                      f'{list(record["image"].shape[:-1])}; prepare it again')
    yield record


def _known(mask: np.ndarray, ignored: Sequence[int]) -> np.ndarray:
  """The mask as int32, -1 where it says nothing."""
  mask = mask.astype(np.int32)
  return np.where(np.isin(mask, ignored), -1, mask) if ignored else mask


def _example(record: Mapping[str, Any], truth: np.ndarray, predicted: np.ndarray, dice: float) -> dict[str, Any]:
  """A test record with its prediction in runs of equal values; of a volume the slice with most errors."""
  place = None
  if truth.ndim == 3:
    place = int(((truth != predicted) & (truth >= 0)).sum(axis=(1, 2)).argmax())
    predicted = predicted[place]
  flat = predicted.ravel()
  ends = np.flatnonzero(np.append(flat[1:] != flat[:-1], True))
  return dict(id=str(record['id']), dice=dice, slice=place, shape=list(predicted.shape), values=flat[ends].tolist(),
              lengths=np.diff(ends, prepend=-1).tolist())


def _plain(value: Any) -> float | None:
  return float(value) if np.isfinite(value) else None
