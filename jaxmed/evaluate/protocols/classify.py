"""The evaluation of an encoder on one label: probes on its features beside two baselines on the same rows."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics, pixels, probes

TRAINED, UNTRAINED, PIXELS = 'trained', 'untrained', 'pixels (PCA)'
METHODS = ('knn', 'logistic')


@dataclasses.dataclass(frozen=True)
class _Part:
  """The labelled rows of one split: its source, label indices y [n] (int64) and subjects [n] (str)."""
  source: Any
  y: np.ndarray
  subjects: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
  """Three parts, the classes, and which training rows fit the penalty search (the rest judges it)."""

  label: str
  classes: tuple[str, ...]
  train: _Part
  val: _Part | None
  test: _Part
  fit: np.ndarray  # bool [len(train)]: all True if there is a val split
  notes: tuple[str, ...]

  @property
  def known(self) -> list[int]:
    """Classes that the probes can learn: the classes of the train and val rows."""
    seen = set(self.train.y) | (set(self.val.y) if self.val else set())
    return sorted(int(c) for c in seen)


def evaluate(encoder: Any, source: Any, label: str, *, untrained: Any = None, feature: str = 'mean',
             batch_size: int = 64, seed: int = 0, draws: int = 1000, pixels: bool = True) -> dict[str, Any]:
  """Scores frozen features by kNN and logistic regression, beside the untrained encoder and raw pixels.

  Probes are fitted on the rows of split 'train' that have the label; the logistic penalty is chosen on split
  'val' (without one, on 20 % of the training subjects); scores are of split 'test'. Intervals are 95 %
  percentile bootstrap over test subjects. Rows whose class no training row has stay in, as errors, in
  accuracy and balanced accuracy, are left out of macro AUROC, and are named in 'notes'.

  Args:
    encoder: has `embed_source(source, batch_size) -> {'cls': [N, D], 'mean': [N, D]}`, image_size and
      vocabulary.
    source: a jaxmed.data.corpus.source.Source with splits. label: a column of its table.
    untrained: the same encoder with its initial weights; without it that baseline is missing, and noted.
    feature: which array of embed_source to use. draws: bootstrap resamples. pixels: whether to score raw pixels too.

  Returns:
    A dict ready for JSON: label, feature, classes, splits and subjects {split: count},
    chance {metric: value}, rows [{features, method, metrics: {metric: {value, low, high}}, penalty}],
    differences [{features, minus, method, metrics}], notes, draws, seed. A value that does not exist is None.

  Raises:
    UserError: unknown column or feature, no test or training rows, a single class, a subject in two splits,
      features that are not finite.
  """
  task = make_task(source, label, seed)
  notes, sets = list(task.notes), {TRAINED: encoded(encoder, task, feature, batch_size, TRAINED)}
  if untrained is not None:
    sets[UNTRAINED] = encoded(untrained, task, feature, batch_size, UNTRAINED)
  else:
    notes.append('no untrained encoder was given: that baseline is missing')
  if pixels:
    sets[PIXELS] = _pixels(encoder, task, batch_size)
  rows, differences, troubles = _scored(sets, task, draws, seed)
  return dict(label=label, feature=feature, classes=list(task.classes), chance=chance_of(task), rows=rows,
              differences=differences, notes=notes + troubles, draws=draws, seed=seed, **_sizes(task))


def answers_of(encoder: Any, source: Any, label: str, *, feature: str = 'mean', batch_size: int = 64,
                seed: int = 0) -> dict[str, Any]:
  """What the probes of `evaluate` say of each test row: {'y': [M], 'subjects': [M], 'known': classes that the probes
  can learn, 'knn': [M, K], 'logistic': [M, K]}; arguments and errors as there."""
  task = make_task(source, label, seed)
  features = encoded(encoder, task, feature, batch_size, TRAINED)
  scores = {method: probe_scores(method, features, task)[0] for method in METHODS}
  return {'y': task.test.y, 'subjects': task.test.subjects, 'known': task.known} | scores


def _scored(
  sets: dict[str, dict[str, np.ndarray]], task: Task, draws: int, seed: int
) -> tuple[list, list, list]:
  """The rows, the paired differences and the notes of every probe on every kind of features."""
  ask: dict[str, Any] = dict(draws=draws, seed=seed, auroc_classes=task.known)
  y, subjects = task.test.y, task.test.subjects
  rows, differences, notes, scores = [], [], [], {}
  for name, features in sets.items():
    for method in METHODS:
      scores[name, method], info = probe_scores(method, features, task)
      row = dict(features=name, method=method,
                 metrics=plain(metrics.intervals(y, scores[name, method], subjects, **ask)))
      rows.append(row | ({'penalty': info} if info else {}))
      if info.get('unconverged'):
        fits = len(info['grid']) + 1
        notes.append(f'logistic on {name}: {info["unconverged"]} of {fits} fits did not converge')
  for other in (UNTRAINED, PIXELS):
    for method in METHODS if other in sets else ():
      got = metrics.paired_difference(y, scores[TRAINED, method], scores[other, method], subjects, **ask)
      differences.append(dict(features=TRAINED, minus=other, method=method, metrics=plain(got)))
  return rows, differences, notes


def make_task(source: Any, label: str, seed: int) -> Task:
  """The labelled rows of each split; errors as of `evaluate`."""
  classes = tuple(source.classes(label)) if label in source.table.column_names else ()
  if not classes:
    source.select(label=label)  # an unknown column raises here, with the nearest name
    raise UserError(f'label {label!r} is empty in every row; expected a column with two or more classes')
  train, val, test = (_part(source, split, label, classes) for split in ('train', 'val', 'test'))
  for split, part in (('train', train), ('test', test)):
    if part is None:
      has = ', '.join(sorted({str(s) for s in source.table['split'].to_pylist()}))
      raise UserError(f'no row of split {split!r} has the label {label!r}; expected train and test rows '
                      f'(the splits present are: {has})')
  assert train is not None and test is not None
  _check_classes(train, label, classes)
  _check_subjects(dict(train=train, val=val, test=test))
  notes, fit = [], np.ones(len(train.y), bool)
  if val is None:
    fit = _cut(train, label, seed)
    notes.append(
      f'no val split: the penalty was chosen on {np.count_nonzero(~fit)} train rows, cut by subject'
    )
  seen, counts = set(train.y) | (set(val.y) if val else set()), collections.Counter(test.y.tolist())
  lacking = [f'{classes[c]} ({counts[c]} rows)' for c in sorted(counts) if c not in seen]
  if lacking:
    notes.append('test classes that no training row has, counted as errors and left out of AUROC: '
                 + ', '.join(lacking))
  absent = [classes[c] for c in sorted(seen) if c not in counts]
  if absent:
    notes.append('classes without a test row, left out of AUROC: ' + ', '.join(absent))
  if len(set(test.subjects)) < 2:
    notes.append('the test rows are of one subject: there are no intervals')
  return Task(label, classes, train, val, test, fit, tuple(notes))


def _part(source: Any, split: str, label: str, classes: tuple[str, ...]) -> _Part | None:
  present = {str(s) for s in source.table['split'].to_pylist()}
  if split not in present:
    return None
  part = source.select(split=split, label=label)
  if not len(part):
    return None
  y = np.asarray(part.codes(label, classes), np.int64)
  ids, names = part.table['id'].to_pylist(), part.table['subject'].to_pylist()
  # A row without a subject stands for itself; the prefix keeps it apart from subjects of the same name.
  return _Part(
    part, y, np.array([f'row {i}' if s is None else str(s) for i, s in zip(ids, names, strict=True)])
  )


def _check_classes(train: _Part, label: str, classes: tuple[str, ...]) -> None:
  seen = np.unique(train.y)
  if len(seen) < 2:
    raise UserError(f'label {label!r}: all {len(train.y)} training rows are {classes[seen[0]]!r}; '
                    'expected two or more classes')
  if len(seen) > max(2, len(train.y) // 2):
    raise UserError(
      f'label {label!r}: {len(seen)} different values in {len(train.y)} training rows; expected classes '
      'with several rows each (is it an identifier or a measurement?)'
    )


def _check_subjects(parts: dict[str, _Part | None]) -> None:
  home: dict[str, str] = {}
  for split, part in parts.items():
    for subject in sorted({str(s) for s in part.subjects}) if part else ():
      if subject in home:
        raise UserError(
          f'subject {subject!r} has rows in {home[subject]} and in {split}; expected one split a '
          'subject, or the scores would be of memorised subjects'
        )
      home[subject] = split


def _cut(train: _Part, label: str, seed: int) -> np.ndarray:
  """Bool [n]: the training rows to fit on, when 20 % of the subjects (at least one) judge the penalty."""
  subjects = np.unique(train.subjects)
  if len(subjects) < 2:
    raise UserError(
      f'label {label!r}: no val split, and the training rows are of one subject, so none can be cut; '
      "expected rows of split 'val' or two or more training subjects"
    )
  rng, best = np.random.default_rng(seed), None
  for _ in range(50):  # a cut that takes the only subject of a class is drawn again
    held = rng.permutation(subjects)[:math.ceil(0.2 * len(subjects))]
    fit = ~np.isin(train.subjects, held)
    if best is None or len(np.unique(train.y[fit])) > len(np.unique(train.y[best])):
      best = fit
    if len(np.unique(train.y[best])) == len(np.unique(train.y)):
      break
  if best is None or len(np.unique(train.y[best])) < 2:
    raise UserError(
      f'label {label!r}: no val split, and without 20 % of the training subjects a single class is left; '
      "expected rows of split 'val' or more training subjects of each class"
    )
  return best


def encoded(encoder: Any, task: Task, feature: str, batch_size: int, name: str,
            splits: Sequence[str] = ('train', 'val', 'test')) -> dict[str, np.ndarray]:
  """{split: [n, D]} features of one encoder; a UserError where one is not finite."""
  out = {}
  for split, part in (('train', task.train), ('val', task.val), ('test', task.test)):
    if part is None or split not in splits:
      continue
    found = encoder.embed_source(part.source, batch_size)
    x = np.asarray(found[choose('feature', feature, found)], np.float32)
    if len(x) != len(part.y):
      raise UserError(f'{name} encoder: {len(x)} features for {len(part.y)} {split} rows; expected one a row')
    bad = np.count_nonzero(~np.isfinite(x).all(axis=1))
    if bad:
      raise UserError(
        f'{name} encoder: {bad} of {len(x)} {split} rows have features that are NaN or infinite; '
        'expected finite numbers (did the training diverge?)'
      )
    out[split] = x
  return out


def _pixels(encoder: Any, task: Task, batch_size: int) -> dict[str, np.ndarray]:
  parts = {
    s: p.source for s, p in (('train', task.train), ('val', task.val), ('test', task.test)) if p is not None
  }
  found = pixels.source_features(encoder, *parts.values(), batch_size=batch_size)
  return dict(zip(parts, found, strict=True))


def probe_scores(method: str, x: dict[str, np.ndarray], task: Task) -> tuple[np.ndarray, dict[str, Any]]:
  """Scores [M, K] of the test rows, and what the fit has to say (nothing for kNN)."""
  if method == 'knn':
    return probes.knn(x['train'], task.train.y, x['test'], len(task.classes)), {}
  fit = task.fit
  val_x, val_y = (x['val'], task.val.y) if task.val else (x['train'][~fit], task.train.y[~fit])
  return probes.logistic(x['train'][fit], task.train.y[fit], val_x, val_y, x['test'], len(task.classes))


def chance_of(task: Task) -> dict[str, float]:
  """What a constant answer, the commonest training class, gets on the test rows; 0.5 for AUROC."""
  common = np.bincount(task.train.y).argmax()
  return dict(accuracy=float((task.test.y == common).mean()), auroc=0.5,
              balanced_accuracy=float(np.any(task.test.y == common) / len(np.unique(task.test.y))))


def _sizes(task: Task) -> dict[str, dict[str, int]]:
  parts = dict(train=task.train, val=task.val, test=task.test)
  return dict(splits={s: len(p.y) if p else 0 for s, p in parts.items()},
              subjects={s: len(set(p.subjects)) if p else 0 for s, p in parts.items()})


def plain(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
  """NaN is not JSON: a value that does not exist becomes None."""
  return {m: {k: float(v) if np.isfinite(v) else None for k, v in i.items()} for m, i in found.items()}


def best_row(
  result: dict[str, Any], metric: str = 'balanced_accuracy', features: str = TRAINED
) -> dict[str, Any]:
  """The row of `features` with the highest `metric`, out of what `evaluate` returned."""
  rows: Sequence[dict[str, Any]] = [r for r in result['rows'] if r['features'] == features]
  return max(
    rows, key=lambda r: -1.0 if r['metrics'][metric]['value'] is None else r['metrics'][metric]['value']
  )
