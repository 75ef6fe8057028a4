"""Classes as the target of probes, in no order or in one."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import calibration, confusion, operating, probes, roc, tables
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate.protocols.probing import ATTENTIVE, Probing
from jaxmed.evaluate.protocols.protocol import Answers, lone_subject
from jaxmed.evaluate.protocols.tasks import TRAINED, Task, make_task, plain

POSITIVE = ('1', 'true', 'yes', 'positive')  # names of a class that are no guess
_MOST = 30  # classes whose confusion is kept
_CURVES = 10  # classes whose own curves are kept
_SHOWN = 1000  # rows of the map of features
_QUERIES, _NEAR = 6, 5  # pictures of neighbours


@dataclasses.dataclass(frozen=True)
class Classes(Probing):
  """Probes of classes in no order."""

  kind: ClassVar[str] = 'classes'
  task: ClassVar[str] = 'classification of records by a label'
  offered: ClassVar[tuple[str, ...]] = ('knn', 'logistic', *ATTENTIVE)
  metrics: ClassVar[Mapping[str, str]] = {m: tables.NAMES[m] for m in (*statistics.METRICS, 'macro_f1', 'ece', 'brier')}

  @property
  def headline(self) -> str:
    """Balanced accuracy."""
    return 'balanced_accuracy'

  def predict(self, method: str, train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray],
              asked: np.ndarray, task: Task, refit: bool = True) -> Answers:
    """Scores [M, K] of the classes; of the logistic regression also its 'penalty'."""
    classes = len(task.classes)
    if method == 'knn':
      return Answers(probes.knn(*train, asked, classes))
    scores, info = probes.logistic(*train, *val, asked, classes, refit=refit)
    failed, fits = info.get('unconverged'), len(info['grid']) + 1
    return Answers(scores, {'penalty': info}, f'{failed} of {fits} fits did not converge' if failed else '')

  def content(self, y: np.ndarray, task: Task) -> tuple[np.ndarray, list[str]]:
    """The class of each row."""
    return y[:, None] == np.arange(len(task.classes)), [f'class {c!r}' for c in task.classes]

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro AUROC, macro F1; ECE and Brier score, which are of probabilities."""
    y, classes = task.test.y, len(task.classes)
    table = confusion.confusion(y, values.argmax(axis=1), classes)
    f1 = confusion.macro_f1(np.diag(table), table.sum(axis=1), table.sum(axis=0))
    return statistics.score(y, values, task.known) | {'macro_f1': float(f1)} | calibration.score(y, values)

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    y, names = task.test.y, task.test.subjects
    f1 = confusion.macro_f1(*_counts(values, task, draws, seed))
    return (statistics.resampled(y, values, names, draws=draws, seed=seed, auroc_classes=task.known)
            | {'macro_f1': f1} | calibration.resampled(y, values, names, draws=draws, seed=seed))

  def headline_outcome(self, values: np.ndarray, task: Task, draws: int, seed: int) -> tuple[float, np.ndarray]:
    """Balanced accuracy."""
    right, true, _ = _counts(values, task, draws, seed)
    recall = np.divide(right, true, out=np.full(true.shape, np.nan), where=true > 0)
    there = ~np.isnan(recall)
    count = there.sum(axis=1)
    drawn = np.divide(np.where(there, recall, 0).sum(axis=1), count, out=np.full(len(recall), np.nan), where=count > 0)
    y, predicted = task.test.y, values.argmax(axis=1)
    return float(np.mean([(predicted[y == c] == c).mean() for c in np.unique(y)])), drawn

  def chance(self, task: Task) -> dict[str, float]:
    """What a constant answer, the frequencies of the training classes, gets on the test rows; 0.5 for AUROC."""
    y, rate = task.test.y, np.bincount(task.train.y, minlength=len(task.classes)) / len(task.train.y)
    common = rate.argmax()
    constant = np.tile(rate, (len(y), 1))
    right, seen = float((y == common).mean()), len(np.unique(y))
    f1 = 2 * right / (1 + right) / (seen + (right == 0))  # of the one class that is answered
    return dict(accuracy=right, auroc=0.5, balanced_accuracy=float(np.any(y == common) / seen), macro_f1=f1,
                **calibration.score(y, constant))

  def notes(self, task: Task) -> list[str]:
    """A penalty chosen without a val split, classes that only some splits have, a single test subject.

    Raises:
      UserError: the operating point cannot be found.
    """
    notes, classes = [], task.classes
    if self.sensitivity:
      self.positive_class(task)
    if task.val is None:
      notes.append(f'no val split: the penalty was chosen on {np.count_nonzero(~task.fit)} train rows, cut by subject')
    seen, counts = set(task.known), collections.Counter(task.test.y.tolist())
    lacking = [f'{classes[c]} ({counts[c]} rows)' for c in sorted(counts) if c not in seen]
    if lacking:
      notes.append('test classes that no training row has, counted as errors and left out of AUROC: '
                   + ', '.join(lacking))
    absent = [classes[c] for c in sorted(seen) if c not in counts]
    if absent:
      notes.append('classes without a test row, left out of AUROC: ' + ', '.join(absent))
    return notes + lone_subject(task)

  def positive_class(self, task: Task) -> int:
    """The class whose sensitivity is asked for; a UserError where it is not told or has no validation row."""
    names = task.classes
    if self.positive:
      found = names.index(choose('class of classify.positive', self.positive, names))
    else:
      plain_names = [c for c, name in enumerate(names) if name.lower() in POSITIVE]
      if len(names) != 2 or len(plain_names) != 1:
        raise UserError(f'classify.sensitivity needs classify.positive=CLASS, one of {", ".join(names)}')
      found = plain_names[0]
    val_y = task.val.y if task.val else task.train.y[~task.fit]
    for what, y in (('validation', val_y), ('test', task.test.y)):
      if not (y == found).any():
        raise UserError(f'classify.sensitivity: no {what} row has the class {names[found]!r}')
    return found

  def details(self, name: str, method: str, x: Mapping[str, np.ndarray], answers: Answers, task: Task, draws: int,
              seed: int) -> dict[str, Any]:
    """Curves to draw, confusion, and the operating point."""
    y, values, classes = task.test.y, answers.values, len(task.classes)
    out: dict[str, Any] = {'roc': _curves(y, values, task, name == TRAINED)}
    if calibration.are_probabilities(values):
      out['reliability'] = calibration.reliability(y, values)
    if classes <= _MOST:
      out['confusion'] = confusion.confusion(y, values.argmax(axis=1), classes).astype(int).tolist()
    if self.sensitivity:
      out['operating'] = self._operating(method, x, task, draws, seed)
    return out

  def _operating(self, method: str, x: Mapping[str, np.ndarray], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """A threshold found on validation rows and judged on test rows, both by a probe fitted on training rows alone."""
    positive, prefix = self.positive_class(task), 'tokens ' if method in ATTENTIVE else ''
    train, (val, val_y) = self.chosen_rows(x, task, prefix)
    asked = np.concatenate([val, x[f'{prefix}test']])
    found = (self.attended(method, x, task, asked) if prefix
             else self.predict(method, train, (val, val_y), asked, task, refit=False))
    scores = found.values[:, positive]
    limit = operating.threshold(val_y == positive, scores[:len(val_y)], self.sensitivity)
    ask: dict[str, Any] = {'draws': draws, 'seed': seed}
    test = operating.at(task.test.y == positive, scores[len(val_y):], limit, task.test.subjects, **ask)
    on_val = operating.at(val_y == positive, scores[:len(val_y)], limit, np.arange(len(val_y)), draws=1)
    return {'positive': task.classes[positive], 'wanted': self.sensitivity, 'threshold': limit,
            'val': {m: c['value'] for m, c in plain(on_val).items()}, 'metrics': plain(test)}

  def whole(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """Few labels; the trained features of test rows on a plane, and the neighbours of some."""
    return super().whole(sets, task, draws, seed) | _looks(sets[TRAINED], task)

  def more_tables(self, result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Few labels and the operating point."""
    rows = [r for r in result['rows'] if 'operating' in r]
    out = super().more_tables(result)
    if rows:
      first = rows[0]['operating']
      title = (f'Operating point of {first["positive"]!r}: sensitivity {first["wanted"]:g} on validation rows, on test '
               'rows')
      out.append((title, ['features', 'method', 'threshold', *operating.METRICS], [
          [r['features'], tables.METHODS[r['method']], f'{r["operating"]["threshold"]:.3g}',
           *(tables.interval(r['operating']['metrics'][m]) for m in operating.METRICS)] for r in rows]))
    return out

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """ROC, reliability, confusion, few labels, the plane of features and neighbours, as far as the result has them."""
    from jaxmed.evaluate.report import curves, overlays
    rows, out = result['rows'], {}
    if any(r.get('roc') for r in rows):
      out['roc'] = lambda path: curves.roc_curves(rows, path)
    if any(r.get('reliability') for r in rows):
      out['reliability'] = lambda path: curves.reliability(rows, path)
    if any(r.get('confusion') for r in rows):
      out['confusion'] = lambda path: curves.confusions(rows, result['classes'], path)
    if result.get('few_labels'):
      out['few_labels'] = lambda path: curves.few_labels(result['few_labels'], path)
    if result.get('plane'):
      out['features'] = lambda path: curves.plane(result['plane'], result['classes'], path)
    if result.get('neighbours'):
      out['neighbours'] = lambda path: overlays.retrieved(result['neighbours'], source, path)
    return out


@dataclasses.dataclass(frozen=True)
class Ordinal(Classes):
  """Probes of classes in an order, such as grades."""

  kind: ClassVar[str] = 'ordinal'
  metrics: ClassVar[Mapping[str, str]] = {'kappa': tables.NAMES['kappa'], 'accuracy': 'accuracy',
                                          'balanced_accuracy': 'balanced accuracy', 'mae': 'MAE in classes'}

  @property
  def headline(self) -> str:
    """Quadratic weighted kappa."""
    return 'kappa'

  def task_of(self, source: Any, label: str, seed: int) -> Task:
    """The labelled rows, classes in the order of their numbers or of the option `order`."""
    return make_task(source, label, seed, lambda classes: _ordered(label, classes, self.order))

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Kappa, accuracy, balanced accuracy, and how many classes an answer is off."""
    table = confusion.confusion(task.test.y, values.argmax(axis=1), len(task.classes))
    return {m: float(v[0]) for m, v in _grades(table[None]).items()}

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    k = len(task.classes)
    drawn = statistics.resampled_counts(task.test.y * k + values.argmax(axis=1), k * k, task.test.subjects, draws=draws,
                                        seed=seed)
    return _grades(drawn.reshape(-1, k, k))

  def headline_outcome(self, values: np.ndarray, task: Task, draws: int, seed: int) -> tuple[float, np.ndarray]:
    """Kappa."""
    return self.score(values, task)['kappa'], self.resampled(values, task, draws, seed)['kappa']

  def chance(self, task: Task) -> dict[str, float]:
    """What a constant answer, the commonest training class, gets on the test rows; 0 for kappa."""
    common = np.bincount(task.train.y).argmax()
    found = super().chance(task)
    return {'kappa': 0.0, 'accuracy': found['accuracy'], 'balanced_accuracy': found['balanced_accuracy'],
            'mae': float(np.abs(task.test.y - common).mean())}

  def notes(self, task: Task) -> list[str]:
    """Those of classes, and their order."""
    return [f'classes in the order {" < ".join(task.classes)}', *super().notes(task)]


def _ordered(label: str, classes: tuple[str, ...], order: tuple[str, ...]) -> tuple[str, ...]:
  """Classes in the given order or in that of their numbers; a UserError where there is none."""
  if order:
    for name in classes:
      choose('class of classify.order', name, order)
    return tuple(name for name in dict.fromkeys(order) if name in classes)
  try:
    return tuple(sorted(classes, key=float))
  except ValueError as e:
    lost = next(name for name in classes if not _is_number(name))
    raise UserError(f'label {label!r}: {lost!r} is no number, so that the order of the classes is unknown; expected '
                    f'classify.order=LOW,..,HIGH with {", ".join(classes)}') from e


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _grades(table: np.ndarray) -> dict[str, np.ndarray]:
  """The metrics of ordered classes of counts [R, K, K]."""
  rows, true = table.sum(axis=(1, 2)), table.sum(axis=2)
  right = np.diagonal(table, axis1=1, axis2=2)
  grade = np.arange(table.shape[1])
  off = (table * np.abs(grade[:, None] - grade)).sum(axis=(1, 2))
  recall = np.divide(right, true, out=np.zeros(true.shape), where=true > 0)
  with np.errstate(invalid='ignore'):
    return {'kappa': confusion.quadratic_kappa(table), 'accuracy': right.sum(axis=1) / rows,
            'balanced_accuracy': recall.sum(axis=1) / np.where(np.isnan(rows), np.nan, (true > 0).sum(axis=1)),
            'mae': off / rows}


def _counts(values: np.ndarray, task: Task, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows [draws, K] of each class that are right, there, and predicted, on resampled subjects."""
  y, predicted, ask = task.test.y, values.argmax(axis=1), dict(draws=draws, seed=seed)
  count = lambda codes: statistics.resampled_counts(codes, len(task.classes), task.test.subjects, **ask)
  return count(np.where(predicted == y, y, -1)), count(y), count(predicted)


def _curves(y: np.ndarray, values: np.ndarray, task: Task, each: bool) -> dict[str, list[float]]:
  """True positive rates at even false positive rates: of the second of two classes, else the mean over classes, and
  with `each` of every class if there are few."""
  usable = [c for c in task.known if 0 < (y == c).sum() < len(y)]
  if not usable:
    return {}
  if len(task.classes) == 2:
    return {task.classes[1]: roc.tpr_at(y == 1, values[:, 1])}
  found = {task.classes[c]: roc.tpr_at(y == c, values[:, c]) for c in usable}
  mean = {'mean over classes': np.mean(list(found.values()), axis=0).tolist()}
  return mean | (found if each and len(usable) <= _CURVES else {})


def _looks(x: Mapping[str, np.ndarray], task: Task) -> dict[str, Any]:
  """Two principal components of the test rows, and what is nearest to some of these among the training rows."""
  train, test = (probes.unit(x[s]).astype(np.float64) for s in ('train', 'test'))
  rows = np.unique(np.linspace(0, len(test) - 1, min(_SHOWN, len(test))).round().astype(int))
  centred = test[rows] - test[rows].mean(axis=0)
  _, axes = np.linalg.eigh(centred.T @ centred)
  place = centred @ axes[:, ::-1][:, :2]
  plane = {'points': np.round(place, 4).tolist(), 'classes': task.test.y[rows].tolist()}
  ids = {s: [str(i) for i in p.source.table['id'].to_pylist()] for s, p in task.parts.items()}
  found = []
  for i in np.unique(np.linspace(0, len(test) - 1, min(_QUERIES, len(test))).round().astype(int)):
    near = np.argsort(-(train @ test[i]), kind='stable')[:_NEAR]
    of = lambda j, y=task.test.y[i]: {'id': ids['train'][j], 'label': task.classes[task.train.y[j]],
                                      'right': bool(task.train.y[j] == y)}
    found.append({'query': ids['test'][i], 'label': task.classes[task.test.y[i]], 'found': [of(j) for j in near]})
  return {'plane': plane, 'neighbours': found} if place.shape[1] == 2 else {'neighbours': found}
