"""Classes by their names in words: images and texts of a paired run are compared, and nothing is fitted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import calibration, multilabel, naming, tables
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate.prompts import Prompts, make
from jaxmed.evaluate.protocols import classify, compared, labels
from jaxmed.evaluate.protocols.protocol import Answers, FeatureProtocol, lone_subject
from jaxmed.evaluate.protocols.tasks import TRAINED, Part, Task, check_subjects, encoded, part_of, plain, subjects_of
from jaxmed.pair import Pair, pair_of, tokenize

PARTS = ('val', 'test')
EXAMPLES, SHOWN = 8, 3  # images that are shown, and classes of each


@dataclasses.dataclass(frozen=True)
class ZeroShot(FeatureProtocol):
  """Each test image gets the class whose prompts are most similar to it. Columns of yes and no are judged each by a
  pair of prompts, of the label and of its absence.

  Nothing is fitted; rows of split 'train' are not looked at. Rows of split 'val', where there are any, choose the scale
  of a second, calibrated answer. Texts are cut as in training.

  Attributes:
    prompts: a list of classes and templates that comes with jaxmed, or a JSON file; empty: the values of the label.
    template: text with the slot {} for a class, in the place of those of `prompts`.
    pool: how prompts of a class count: 'mean' (of unit vectors, as CLIP's), 'max' (the best one, as GLoRIA's), or both.
    k: of top-k accuracy. ranks: of the precision of images found by class.
  """

  prompts: str = ''
  template: str = ''
  pool: tuple[str, ...] = ('mean',)
  k: int = 5
  ranks: tuple[int, ...] = (5, 10, 50)

  name: ClassVar[str] = 'zero_shot'
  task: ClassVar[str] = 'classes from their names in words, by the towers of images and texts'
  of_pixels: ClassVar[bool] = False  # texts cannot be compared to them

  def __post_init__(self):
    object.__setattr__(self, 'pool', compared.words(self.pool))
    object.__setattr__(self, 'prompts', str(self.prompts))
    object.__setattr__(self, 'template', str(self.template))
    for pool in self.pool:
      choose('zero_shot.pool', pool, naming.POOLS)
    if not self.pool:
      raise UserError(f'zero_shot.pool is empty: expected {" or ".join(naming.POOLS)}')
    ranks = tuple(self.ranks) if isinstance(self.ranks, (tuple, list)) else (self.ranks,)
    compared.positive('zero_shot.k', self.k)
    for rank in ranks:
      compared.positive('zero_shot.ranks', rank)
    object.__setattr__(self, 'ranks', tuple(sorted(set(ranks))))

  @property
  def methods(self) -> Mapping[str, str]:  # type: ignore[override]
    """The ways to count several prompts of a class."""
    return {pool: naming.POOLS[pool] for pool in self.pool}

  @property
  def metrics(self) -> Mapping[str, str]:  # type: ignore[override]
    """Those of classes."""
    return (statistics.LABELS | {'top_k': f'top-{self.k} accuracy', 'ece': 'ECE, trained scale',
                                 'ece_val': 'ECE, scale of val'}
            | {f'precision_at_{k}': f'precision@{k} of images by class' for k in self.ranks})

  @property
  def splits(self) -> tuple[str, ...]:
    """Those that are read."""
    return PARTS

  def resolved(self, source: Any, label: str) -> FeatureProtocol:
    """That of labels, where the column holds several or is of yes and no in several columns."""
    if type(self) is not ZeroShot or classify.kind_of(source, label) != 'labels':
      return self
    return ZeroShotLabels(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  def task_of(self, source: Any, label: str, seed: int) -> Task:
    """The labelled rows of val and test; train is empty."""
    del seed
    classes = tuple(source.classes(label)) if label in source.table.column_names else ()
    if not classes:
      source.select(label=label)  # an unknown column raises here, with the nearest name
      raise UserError(f'label {label!r} is empty in every row; expected a column with two or more classes')
    if len(classes) < 2:
      raise UserError(f'label {label!r}: all rows are {classes[0]!r}; expected two or more classes')
    val, test = (part_of(source, split, label, classes) for split in PARTS)
    return _task(source, label, classes, val, test, np.zeros(0, np.int64))

  def asked(self, task: Task) -> Prompts:
    """The prompts of the classes of a task."""
    return make(self.prompts, task.classes, self.template)

  def features(self, encoder: Any, task: Task, feature: str, batch_size: int, name: str) -> dict[str, np.ndarray]:
    """Unit vectors {split: [n, D]} of images, and those of the prompts."""
    pair = pair_of(encoder, f'the task {self.name}')
    found = encoded(encoder, task, pair.feature, batch_size, name, self.splits)
    return {split: pair.images(x) for split, x in found.items()} | self.words(pair, task, batch_size)

  def shown(self, encoder: Any, task: Task, subsets: Sequence[Sequence[str]], feature: str,
            batch_size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same with images [S, M, D] that show subsets of their channels."""
    pair = pair_of(encoder, f'the task {self.name}')
    fitted = encoded(encoder, task, pair.feature, batch_size, TRAINED, PARTS[:1])
    images = encoder.embed_subsets(task.test.source, subsets, batch_size, pair.feature)
    return ({split: pair.images(x) for split, x in fitted.items()} | self.words(pair, task, batch_size),
            pair.images(images))

  def words(self, pair: Pair, task: Task, batch_size: int) -> dict[str, np.ndarray]:
    """Unit vectors of all prompts 'words' [P, D], the class of each 'place' [P], and 'scale'."""
    texts, place = naming.flat(self.asked(task).yes)
    _check_cut(pair, texts, place, task.classes)
    return {'words': pair.texts(texts, batch_size), 'place': place, 'scale': np.array(pair.scale)}

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """[..., M, 3 K]: probabilities at the trained scale and at that of val (NaN without), and cosines."""
    cosine = naming.similarity(x['test'], x['words'], x['place'], method)
    probability = naming.softmax(float(x['scale']) * cosine)
    info: dict[str, Any] = {'prompts': len(x['place']), 'scale': float(x['scale'])}
    calibrated, trouble = np.full_like(cosine, np.nan), ''
    if 'val' in x and task.val is not None:
      best = calibration.best_scale(task.val.y, naming.similarity(x['val'], x['words'], x['place'], method))
      calibrated, info['val_scale'] = naming.softmax(best * cosine), best
      if not 0.11 < best < 9e3:
        trouble = f'the scale of val is at the edge of the range, {best:.3g}'
    return Answers(np.concatenate([probability, calibrated, cosine], axis=-1), info, trouble)

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Each metric."""
    y, (probability, calibrated, cosine) = task.test.y, np.split(values, 3, axis=-1)
    precision = naming.precision_at(y, cosine, self.ranks)[0]
    return (statistics.score(y, probability)
            | {'top_k': naming.top(y, probability, self.k).mean(), 'ece': calibration.score(y, probability)['ece'],
               'ece_val': calibration.score(y, calibrated)['ece']}
            | {f'precision_at_{k}': float(v) for k, v in zip(self.ranks, precision, strict=True)})

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    y, subjects, (probability, calibrated, cosine) = task.test.y, task.test.subjects, np.split(values, 3, axis=-1)
    ask: dict[str, Any] = dict(draws=draws, seed=seed)
    precision = naming.resampled_precision(y, cosine, self.ranks, subjects, **ask)
    return (statistics.resampled(y, probability, subjects, **ask)
            | {'top_k': statistics.resampled_means(naming.top(y, probability, self.k)[:, None], subjects, **ask)[:, 0],
               'ece': calibration.resampled(y, probability, subjects, **ask)['ece'],
               'ece_val': calibration.resampled(y, calibrated, subjects, **ask)['ece']}
            | {f'precision_at_{k}': precision[:, i] for i, k in enumerate(self.ranks)})

  def chance(self, task: Task) -> dict[str, float]:
    """What a class drawn at random gets, and images in random order."""
    count, y = len(task.classes), task.test.y
    there = [np.mean(y == c) for c in np.unique(y)]
    ece = calibration.score(y, np.full((len(y), count), 1 / count))['ece']
    return ({'accuracy': 1 / count, 'balanced_accuracy': 1 / count, 'auroc': 0.5, 'top_k': min(self.k / count, 1.0),
             'ece': ece, 'ece_val': ece} | {f'precision_at_{k}': float(np.mean(there)) for k in self.ranks})

  def notes(self, task: Task) -> list[str]:
    """Where prompts come from, classes and splits that are not there."""
    asked = self.asked(task)
    notes = [f'{sum(map(len, asked.yes.values()))} prompts of {len(task.classes)} classes'
             + (f' ({asked.source})' if asked.source else '')]
    if asked.unused:
      notes.append(f'classes of the prompts that the label does not have, not offered: {", ".join(asked.unused)}')
    return notes + self._more_notes(task) + lone_subject(task)

  def _more_notes(self, task: Task) -> list[str]:
    lost = [task.classes[c] for c in statistics.absent_classes(task.test.y, len(task.classes))]
    notes = [f'classes that no test row has, offered but no part of macro AUROC: {", ".join(lost)}'] if lost else []
    return notes + ([] if task.val else ['no val split: there is no second scale'])

  def whole(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """Texts of each class, and what some images were answered."""
    return {'target': 'classes', 'k': self.k, 'ranks': list(self.ranks),
            'prompts': {c: list(t) for c, t in self.asked(task).yes.items()},
            'examples': self._examples(sets[TRAINED], task, seed)}

  def _examples(self, x: Mapping[str, np.ndarray], task: Task, seed: int) -> list[dict[str, Any]]:
    """Test images in turn of the classes, each with its most similar classes."""
    values = self.answers(self.pool[0], x, task).values[:, :len(task.classes)]
    rng, y = np.random.default_rng(seed), task.test.y
    rows = [rng.permutation(np.flatnonzero(y == c)) for c in np.unique(y)]
    picked = [r[i] for i in range(max(map(len, rows))) for r in rows if i < len(r)][:EXAMPLES]
    ids = task.test.source.table['id'].to_pylist()
    return [{'query': str(ids[i]), 'label': task.classes[y[i]],
             'found': [{'text': f'{task.classes[c]} {values[i, c]:.2f}', 'right': bool(c == y[i])}
                       for c in np.argsort(-values[i], kind='stable')[:SHOWN]]} for i in picked]

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return tables.text_table(result, _metrics_of(result), naming.POOLS)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return tables.html_table(result, _metrics_of(result), naming.POOLS)

  def drawings(self, result: Mapping[str, Any], source: Any) -> dict[str, Callable[[Any], None]]:
    """Images with the classes that are most similar to them."""
    from jaxmed.evaluate.report import overlays
    examples = result.get('examples')
    return {'named_images': lambda path: overlays.captioned(examples, source, path)} if examples else {}


@dataclasses.dataclass(frozen=True)
class ZeroShotLabels(ZeroShot):
  """Several labels of yes and no: the probability of each is the softmax of its prompt and that of its absence.

  As rajpurkarlab/CheXzero, zero_shot.py, where cosines are not scaled: AUROC and AP are the same.
  """

  metrics: ClassVar[Mapping[str, str]] = {m: tables.NAMES[m] for m in multilabel.METRICS}

  def task_of(self, source: Any, label: str, seed: int) -> Task:
    """The rows of which a label is known, y [n, L]: 1, 0, or -1 for unknown."""
    del seed
    names, y = labels.read(source, label)
    known, split = (y >= 0).any(axis=1), np.array([str(s) for s in source.table['split'].to_pylist()])
    rows = {s: (split == s) & known for s in PARTS}
    val, test = (Part(source.keep(r), y[r], subjects_of(source.keep(r))) if r.any() else None for r in rows.values())
    return _task(source, label, names, val, test, np.zeros((0, len(names)), np.int8))

  def words(self, pair: Pair, task: Task, batch_size: int) -> dict[str, np.ndarray]:
    """As of classes, with 'no words' and 'no place' of what a label is not."""
    texts, place = naming.flat(self.asked(task).no)
    return super().words(pair, task, batch_size) | {'no words': pair.texts(texts, batch_size), 'no place': place}

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """Probabilities [..., M, L]."""
    yes = naming.similarity(x['test'], x['words'], x['place'], method)
    no = naming.similarity(x['test'], x['no words'], x['no place'], method)
    both = naming.softmax(float(x['scale']) * np.stack([yes, no], axis=-1))
    return Answers(both[..., 0], {'prompts': len(x['place']) + len(x['no place']), 'scale': float(x['scale'])})

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Macro AUROC and macro average precision."""
    return {m: float(multilabel.macro(v)) for m, v in multilabel.score(task.test.y, values).items()}

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects."""
    drawn = multilabel.resampled(task.test.y, values, task.test.subjects, draws=draws, seed=seed)
    return {m: multilabel.macro(v) for m, v in drawn.items()}

  def details(self, name: str, method: str, x: Mapping[str, np.ndarray], answers: Answers, task: Task, draws: int,
              seed: int) -> dict[str, Any]:
    """AUROC and average precision of each label."""
    found = multilabel.score(task.test.y, answers.values)
    return {'labels': {label: plain({m: {'value': v[k]} for m, v in found.items()})
                       for k, label in enumerate(task.classes)}}

  def chance(self, task: Task) -> dict[str, float]:
    """0.5 for AUROC, the mean prevalence for average precision."""
    y = task.test.y
    rate = [(y[:, k] == 1).sum() / (y[:, k] >= 0).sum() for k in range(y.shape[1]) if (y[:, k] == 1).any()]
    return {'auroc': 0.5, 'ap': float(np.mean(rate)) if rate else float('nan')}

  def _more_notes(self, task: Task) -> list[str]:
    y, out = task.test.y, []
    for told, flat in (('no test row has, left out', ~(y == 1).any(axis=0)),
                       ('no test row lacks, left out of AUROC', ~(y == 0).any(axis=0))):
      if names := [task.classes[k] for k in np.flatnonzero(flat)]:
        out.append(f'labels that {told}: {", ".join(names)}')
    return out

  def whole(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """Texts of each label and of its absence."""
    asked = self.asked(task)
    return {'target': 'labels', 'prompts': {c: {'yes': list(asked.yes[c]), 'no': list(asked.no[c])}
                                            for c in task.classes}}


def _task(source: Any, label: str, classes: tuple[str, ...], val: Part | None, test: Part | None,
          y: np.ndarray) -> Task:
  """A task whose train part is empty; a UserError where there is no test row, or a subject is in two splits."""
  if test is None:
    raise UserError(f'no row of split test has the label {label!r}: expected test rows')
  check_subjects(dict(val=val, test=test))
  none = np.zeros(len(source), bool)
  return Task(label, classes, Part(source.keep(none), y, np.zeros(0, str)), val, test, np.zeros(0, bool))


def _check_cut(pair: Pair, texts: Sequence[str], place: np.ndarray, classes: Sequence[str]) -> None:
  """A UserError where prompts of two classes are the same ids once they are cut."""
  first: dict[bytes, int] = {}
  for text, ids, c in zip(texts, tokenize(pair, texts), place, strict=True):
    other = first.setdefault(ids.tobytes(), int(c))
    if other != c:
      raise UserError(f'the prompt {text!r} of class {classes[c]!r} has the same {pair.length} ids as one of class '
                      f'{classes[other]!r}: expected prompts that differ within the length of texts')


def _metrics_of(result: Mapping[str, Any]) -> Mapping[str, str]:
  """The metrics of a result, whichever kind it is of."""
  if result['target'] == 'labels':
    return ZeroShotLabels.metrics
  return ZeroShot(k=result['k'], ranks=tuple(result['ranks'])).metrics
