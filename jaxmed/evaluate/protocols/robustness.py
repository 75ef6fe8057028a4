"""Whether features follow the biology of an image or its origin: PathoROB's three measures, and corruptions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import clusters, confounding, drops, metrics, robustness, tables
from jaxmed.evaluate import corruptions as corruptions_lib
from jaxmed.evaluate.confounding import Design
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.corruptions import Corruptions
from jaxmed.evaluate.protocols.origins import SPLITS, Origins, origins
from jaxmed.evaluate.protocols.tasks import TRAINED, UNTRAINED, sizes
from jaxmed.evaluate.report import shifts

PARTS = ('index', 'clustering', 'drop', 'corruptions')
LABELS = {'index': 'robustness index', 'clustering': 'clustering score', 'ari_biology': 'ARI, label',
          'ari_centre': 'ARI, centre', 'drop_id': 'performance drop, ID', 'drop_ood': 'performance drop, OOD'}
METHOD = 'frozen'
LEAST = {'train': 4, 'val': 2}  # rows of a cell at correlation 0

Measured = dict[str, tuple[dict[str, float], dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows that index and clustering score are of: classes, origins, subjects [N], and the splits they are from."""

  y: np.ndarray
  place: np.ndarray
  subjects: np.ndarray
  splits: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fits:
  """What the performance drop is fitted on: home cells, the centres of training, the others, rows of a cell."""

  home: np.ndarray
  known: tuple[int, ...]
  others: tuple[int, ...]
  sizes: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Robustness:
  """Robustness index, clustering score and average performance drop of PathoROB (arXiv 2507.17845), and corruptions.

  The label is the biology, `centre` the column of the origin: a hospital, scanner, stain, plate. The index is
  SO / (SO + OS) over the k nearest neighbours of other subjects: SO has the class and another centre, OS the centre and
  another class. The clustering score is the adjusted Rand index of clusters with the classes, less that with centres.
  The drop is how much accuracy logistic regression loses as classes and centres of its training rows go together.

  Attributes:
    centre: column of the origin. parts: of index,clustering,drop,corruptions; without it all that the rows allow.
    k: neighbours; 0 for the k of the best balanced accuracy of the trained encoder's neighbours, on val rows.
    pairs: index within every two classes and two centres apart, then pooled.
    repetitions: clusterings of two classes and two centres, 50 in the paper. combinations: most of these, at random.
    fits: draws of training subjects for the drop, 20 in the paper. steps: correlations from 0 to 1.
    known: centres of its training rows, by default the two with the most rows; the others are OOD.
    splits: 'corpus' measures test rows; 'new' measures all rows (as the paper) and cuts them anew by subject for the
      drop, for encoders that never saw the labels.
    kinds, severities and rows: of the corruptions, see the protocol corruptions.
  """

  centre: str = ''
  parts: Any = ''
  k: int = 0
  pairs: bool = False
  repetitions: int = 10
  combinations: int = 12
  fits: int = 5
  steps: int = 5
  known: Any = ''
  splits: str = 'corpus'
  kinds: str = ''
  severities: Any = corruptions_lib.SEVERITIES
  rows: int = 500

  name: ClassVar[str] = 'robustness'
  task: ClassVar[str] = 'whether features follow the label or the origin, and corruptions'

  def __post_init__(self):
    for part in compared.words(self.parts):
      choose('robustness.parts', part, PARTS)
    choose('robustness.splits', self.splits, SPLITS)
    for option, least in {'k': 0, 'repetitions': 1, 'combinations': 1, 'fits': 1, 'steps': 2}.items():
      compared.positive(f'robustness.{option}', getattr(self, option), least)
    if not isinstance(self.pairs, bool):
      raise UserError(f'robustness.pairs={self.pairs}: expected true or false')
    self._corruptions()

  def check(self, source: Any, label: str, seed: int = 0) -> None:
    """A UserError where the rows do not allow what was asked for, before anything is embedded."""
    self._planned(self._origins(source, label, seed))

  def run(self, encoder: Any, source: Any, label: str, *, untrained: Any = None, beside: Mapping[str, Any] = {},
          feature: str = 'mean', batch_size: int = 64, seed: int = 0, draws: int = 1000,
          pixels: bool = True) -> dict[str, Any]:
    """The measures; arguments as of `FeatureProtocol.run`.

    Intervals of index, ARI and clustering score are 95 % bootstraps over subjects (neighbours, clusters stay), those of
    the drop Student's over draws of training subjects (Masson and Loftus 2003).

    Returns:
      The dict of `FeatureProtocol.run` with one method and those metrics of LABELS that the parts have; and centre,
      values, parts, and of the parts: index {k, chosen on, features: {name: {k, index, accuracy: lists, shares}}},
      clustering {features: {name: [{classes, centres, clusters}]}}, drop {correlations, known, others, home, rows,
      features: {name: {id, ood: accuracies [steps][fits]}}}, corruptions (the result of that protocol).
    Raises:
      UserError: as of `origins.origins`; a part that was named is not possible, or none is.
    """
    o = self._origins(source, label, seed)
    plans, notes = self._planned(o)
    those = compared.encoders(encoder, feature, untrained, beside)
    out: dict[str, Any] = {}
    measured: dict[str, Measured] = {}
    intervals: dict[str, dict[str, Any]] = {}
    if set(plans) - {'corruptions'}:
      sets = compared.feature_sets(those, o.task, batch_size, pixels)
      if 'index' in plans:
        measured['index'], out['index'] = self._index(sets, o, plans['index'], draws, seed)
      if 'clustering' in plans:
        measured['clustering'], out['clustering'] = self._clustering(sets, o, plans['clustering'], draws, seed)
      if 'drop' in plans:
        intervals, out['drop'] = self._drop(sets, o, plans['drop'], seed)
      out |= _lines(measured, intervals)
    if 'corruptions' in plans:
      out['corruptions'] = self._corruptions().judged(o.task, those, feature, batch_size, seed, draws, pixels)
    notes += [] if UNTRAINED in those else [compared.MISSING]
    return {'rows': [], 'differences': []} | out | dict(
        label=label, feature=feature, centre=o.column, values=list(o.values), classes=list(o.task.classes),
        parts=list(plans), chance=_chance(o, plans), notes=notes, draws=draws, seed=seed, **sizes(o.task))

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    blocks = []
    if result['rows']:
      blocks.append(tables.text_table(result, _labels(result), {METHOD: METHOD}) + _told(result))
    if 'corruptions' in result:
      blocks.append(self._corruptions().tables(result['corruptions']))
    return '\n'.join(blocks)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    first = tables.html_table(result, _labels(result), {METHOD: METHOD}) + compared.note(_told(result))
    more = self._corruptions().html(result['corruptions']) if 'corruptions' in result else ''
    return (first if result['rows'] else '') + more

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each score and each difference, then those of the corruptions."""
    more = tables.csv_rows(result['corruptions'])[1:] if 'corruptions' in result else []
    return tables.csv_rows(result) + more

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """{'index': against k, 'drop': accuracy against correlation}, and those of the corruptions."""
    out: dict[str, Callable[[Any], None]] = {}
    if 'index' in result:
      out['index'] = lambda path: shifts.index_curves(result, path)
    if 'drop' in result:
      out['drop'] = lambda path: shifts.drop_curves(result, path)
    more = self._corruptions().drawings(result['corruptions'], source) if 'corruptions' in result else {}
    return out | {f'corruptions_{name}': draw for name, draw in more.items()}

  def _origins(self, source: Any, label: str, seed: int) -> Origins:
    return origins(source, label, self.centre, 'robustness.centre', self.splits, seed)

  def _corruptions(self) -> Corruptions:
    return Corruptions(self.kinds, self.severities, self.rows)

  def _planned(self, o: Origins) -> tuple[dict[str, Any], list[str]]:
    """{part: what it is made of}, and notes; parts that were not named are left out where the rows lack something."""
    named, plans, notes = compared.words(self.parts), {}, list(o.notes)
    make = {'index': self._measured, 'clustering': self._combined, 'drop': self._fits,
            'corruptions': lambda o: self._corruptions().chosen(o.task.test.source)}
    for part in named or PARTS:
      try:
        plans[part] = make[part](o)
      except UserError as e:
        if named:
          raise
        notes.append(f'{part} is left out: {e}')
    if not set(plans) - {'corruptions'} and not named:
      raise UserError(f'robustness: {notes[-1]}')
    return plans, notes

  def _measured(self, o: Origins) -> Rows:
    """The rows of index and clustering score."""
    splits = ('test',) if self.splits == 'corpus' else tuple(o.task.parts)
    found = [o.task.parts[s] for s in splits]
    rows = Rows(np.concatenate([p.y for p in found]), np.concatenate([o.places[s] for s in splits]),
                np.concatenate([p.subjects for p in found]), splits)
    which, more = ('test rows', '; robustness.splits=new takes all rows') if splits == ('test',) else ('rows', '')
    for what, codes, names in ((f'label {o.task.label!r}', rows.y, o.task.classes),
                               (f'column {o.column!r}', rows.place, o.values)):
      if len(np.unique(codes)) < 2:
        raise UserError(f'{what}: all {len(codes)} {which} are {names[codes[0]]!r}; expected two or more values{more}')
    if self.pairs:
      self._combined(o, rows)
    parts = [c.rows for c in robustness.combinations(rows.y, rows.place)] if self.pairs else [slice(None)]
    largest = min(_largest(rows.subjects[part]) for part in parts)
    if largest < max(self.k, 1):
      raise UserError(f'robustness.k={self.k}: some of the {len(rows.y)} {which} have {largest} neighbours of other '
                      f'subjects; expected as many{more}')
    return rows

  def _combined(self, o: Origins, rows: Rows | None = None) -> Rows:
    """The same rows, where two classes and two centres have rows in all four cells."""
    rows = rows or self._measured(o)
    if not any(robustness.combinations(rows.y, rows.place)):
      counts = confounding.counted(rows.y, rows.place, (len(o.task.classes), len(o.values)))
      k, m = np.argwhere(counts == 0)[0]
      raise UserError(f'no two classes and two centres have rows in all four cells (class {o.task.classes[k]!r} with '
                      f'{o.values[m]!r}: 0 rows)')
    return rows

  def _fits(self, o: Origins) -> Fits:
    """Centres and sizes of the drop."""
    for name in compared.words(self.known):
      choose(f'value of column {o.column!r}', name, o.values)
    known = tuple(o.values.index(n) for n in dict.fromkeys(compared.words(self.known))) or _fullest(o)
    if len(known) < 2:
      raise UserError(f'robustness.known={self.known}: expected two or more centres')
    home = confounding.homes(len(o.task.classes), len(known))
    designs = [[Design(home, r)] for r in drops.levels(self.steps)]
    found = [confounding.check(o.counts[s][:, known], designs, LEAST[s], o.task.classes, [o.values[i] for i in known],
                               f'{s} rows') for s in ('train', 'val')]
    lacking = np.argwhere(o.counts['test'][:, known].sum(axis=1) == 0)
    if len(lacking):
      raise UserError(f'class {o.task.classes[lacking[0, 0]]!r} has no test row of the centres '
                      f'{", ".join(o.values[i] for i in known)}')
    others = tuple(i for i in range(len(o.values)) if i not in known and o.counts['test'][:, i].any())
    return Fits(home, known, others, (found[0], found[1]))

  def _index(self, sets: Mapping[str, Mapping[str, np.ndarray]], o: Origins, rows: Rows, draws: int,
             seed: int) -> tuple[Measured, dict[str, Any]]:
    found, details = {}, {}
    for name, x in sets.items():
      looked = robustness.look(np.concatenate([x[s] for s in rows.splits]), rows.y, rows.place, rows.subjects,
                               max(robustness.MOST, self.k), self.pairs, seed)
      if name == TRAINED:  # the first one
        k, where = self._chosen_k(x, looked, o)
        ks = tuple(sorted({*robustness.grid(looked.kinds.shape[1]), k}))
      curve = robustness.index(looked, ks)
      drawn = robustness.resampled_index(looked, (k,), draws=draws, seed=seed)[:, 0]
      found[name] = {'index': float(curve[ks.index(k)])}, {'index': drawn}
      details[name] = {'k': list(ks), 'index': [float(v) if np.isfinite(v) else None for v in curve],
                       'accuracy': robustness.accuracies(looked, ks).tolist(), 'shares': robustness.shares(looked, k)}
    return found, {'k': k, 'chosen_on': where, 'features': details}

  def _chosen_k(self, x: Mapping[str, np.ndarray], looked: robustness.Looked, o: Origins) -> tuple[int, str]:
    """The number of neighbours, and the rows that it was chosen on ('' where it was given)."""
    if self.k:
      return self.k, ''
    val, ks = o.task.parts['val'], robustness.grid(looked.kinds.shape[1])
    if self.splits == 'corpus' and _largest(val.subjects) >= 1 and len(np.unique(val.y)) > 1:
      looked = robustness.look(x['val'], val.y, o.places['val'], val.subjects, ks[-1])
      ks, where = tuple(k for k in ks if k <= looked.kinds.shape[1]), 'val'
    else:
      where = 'the same rows'
    return ks[int(robustness.accuracies(looked, ks).argmax())], where

  def _clustering(self, sets: Mapping[str, Mapping[str, np.ndarray]], o: Origins, rows: Rows, draws: int,
                  seed: int) -> tuple[Measured, dict[str, Any]]:
    found, details = {}, {}
    for name, x in sets.items():
      parts = clusters.clustered(np.concatenate([x[s] for s in rows.splits]), rows.y, rows.place,
                                 repetitions=self.repetitions, combined=self.combinations)
      found[name] = (clusters.score(parts, rows.y, rows.place),
                     clusters.resampled_score(parts, rows.y, rows.place, rows.subjects, draws=draws, seed=seed))
      details[name] = [{'classes': [o.task.classes[c] for c in p.combination.classes],
                        'centres': [o.values[c] for c in p.combination.centres], 'clusters': p.clusters} for p in parts]
    of = sum(1 for _ in robustness.combinations(rows.y, rows.place))
    return found, {'repetitions': self.repetitions, 'combinations': of, 'features': details}

  def _drop(self, sets: Mapping[str, Mapping[str, np.ndarray]], o: Origins, plan: Fits,
            seed: int) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Relative drops [fits] of each kind of features, and what they are made of."""
    found, details = {}, {}
    for name, x in sets.items():
      part = lambda split, places, x=x: _rows(o, split, x[split], places)
      tests = {'id': part('test', plan.known)} | ({'ood': part('test', plan.others)} if plan.others else {})
      scores = drops.accuracies(part('train', plan.known), part('val', plan.known), tests, plan.home, plan.sizes,
                                self.steps, self.fits, seed)
      found[name] = {f'drop_{k}': drops.relative(s) for k, s in scores.items()}
      details[name] = {k: s.round(6).tolist() for k, s in scores.items()}
    named = lambda places: [o.values[i] for i in places]
    home = {c: [named(plan.known)[m] for m in np.flatnonzero(row)]
            for c, row in zip(o.task.classes, plan.home, strict=True)}
    return found, {'correlations': drops.levels(self.steps).tolist(), 'fits': self.fits, 'known': named(plan.known),
                   'others': named(plan.others), 'home': home, 'features': details,
                   'rows': {s: int(confounding.cells(n, Design(plan.home, 0)).sum())
                            for s, n in zip(('train', 'val'), plan.sizes, strict=True)}}


def _rows(o: Origins, split: str, x: np.ndarray, places: tuple[int, ...]) -> drops.Rows:
  """Rows of a split from these centres, whose numbers are their places in the list."""
  part, place = o.task.parts[split], o.places[split]
  keep = np.isin(place, places)
  number = np.full(len(o.values), -1)
  number[list(places)] = np.arange(len(places))
  return drops.Rows(x[keep], part.y[keep], number[place[keep]], part.subjects[keep])


def _fullest(o: Origins) -> tuple[int, int]:
  """The two centres whose scarcest class has the most training rows, then validation rows."""
  scarce = np.stack([o.counts['train'].min(axis=0), o.counts['val'].min(axis=0), o.counts['train'].sum(axis=0)])
  first = np.lexsort((-scarce[2], -scarce[1], -scarce[0]))[:2]
  return tuple(sorted(first.tolist()))


def _largest(subjects: np.ndarray) -> int:
  """Neighbours of other subjects that every row has."""
  return len(subjects) - int(np.unique(subjects, return_counts=True)[1].max())


def _lines(measured: Mapping[str, Measured], repeated: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[dict]]:
  """'rows' and 'differences' of measures with resamples, and of those with repetitions."""
  names = list(next(iter([*measured.values(), repeated])))
  both: Measured = {name: ({}, {}) for name in names}
  for of in measured.values():
    for name, (value, drawn) in of.items():
      both[name][0].update(value)
      both[name][1].update(drawn)
  cells = {(name, METHOD): metrics.summarised(*both[name]) | {m: drops.masson_loftus([v]) for m, v in
                                                               repeated.get(name, {}).items()} for name in names}

  def minus(one: str, other: str, method: str) -> dict[str, dict[str, float]]:
    again = {m: drops.masson_loftus([v - repeated[other][m]]) for m, v in repeated.get(one, {}).items()}
    return metrics.difference(*both[one], *both[other]) | again

  return compared.lines(cells, minus)


def _chance(o: Origins, plans: Mapping[str, Any]) -> dict[str, float | None]:
  """What features without any information give: neighbours at random, clusters at random."""
  out: dict[str, float | None] = {}
  if 'index' in plans:
    rows = plans['index']
    counts = confounding.counted(rows.y, rows.place, (len(o.task.classes), len(o.values)))
    same = (counts * (counts.sum(axis=1, keepdims=True) - counts)).sum()
    other = (counts * (counts.sum(axis=0, keepdims=True) - counts)).sum()
    out['index'] = float(same / (same + other)) if same + other else None
  if 'clustering' in plans:
    out |= {'clustering': 0.0, 'ari_biology': 0.0, 'ari_centre': 0.0}
  return out


def _labels(result: Mapping[str, Any]) -> dict[str, str]:
  return {m: label for m, label in LABELS.items() if m in result['rows'][0]['metrics']}


def _told(result: Mapping[str, Any]) -> str:
  """What the numbers are of, in words."""
  out = [f'Origin: {result["centre"]!r} ({", ".join(result["values"])}).']
  if 'index' in result:
    found = result['index']
    share = ', '.join(f'{k} {v:.2f}' for k, v in found['features'][TRAINED]['shares'].items())
    chosen = f'chosen on {found["chosen_on"]}' if found['chosen_on'] else 'given'
    out.append(f'Index: k = {found["k"]} ({chosen}); neighbours of the trained encoder: {share}.')
  if 'clustering' in result:
    found = result['clustering']
    parts = found['features'][TRAINED]
    numbers = sorted(p['clusters'] for p in parts)
    out.append(f'Clustering score: {len(parts)} of {found["combinations"]} combinations of two classes and two '
               f'centres, {numbers[0]} to {numbers[-1]} clusters, {found["repetitions"]} repetitions.')
  if 'drop' in result:
    found = result['drop']
    others = ', '.join(found['others']) or 'none, so there is no OOD drop'
    home = '; '.join(f'{c} with {", ".join(v)}' for c, v in found['home'].items())
    out += [f'Performance drop: relative, 0 is none; {found["rows"]["train"]} training rows of '
            f'{", ".join(found["known"])}, at the end {home}; OOD centres: {others}.',
            f'Its [..] is a t interval over {found["fits"]} draws of training subjects.']
  return '\n'.join(out) + '\n'
