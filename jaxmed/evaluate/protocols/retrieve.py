"""Retrieval of images by image: whether the nearest images of other subjects have the same label."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate import retrieval
from jaxmed.evaluate.protocols.protocol import Answers, FeatureProtocol, lone_subject
from jaxmed.evaluate.protocols.tasks import TRAINED, Part, Task
from jaxmed.evaluate.retrieval import Rule

GALLERIES = ('train', 'test')
EXAMPLES, SHOWN = 8, 6  # queries that are shown, and what they found


@dataclasses.dataclass(frozen=True)
class Retrieve(FeatureProtocol):
  """Each test image asks a gallery for images of its class, by the similarity of their vectors.

  Nothing is fitted. The query itself is no part of its gallery. Queries without an image of their class are left out,
  and counted in 'notes'. See `retrieval.retrieval` for the metrics. Beside them stands the NMI of the classes of all
  test images with KMeans clusters of their features, as many as they have classes.

  Attributes:
    gallery: split that is searched; 'test' leaves the query's subject out of its own split.
    k: ranks of recall, as numbers; the largest is also that of nDCG.
    metric: similarity of vectors, 'cosine' or 'euclidean'.
    across: column of which only images with another value than the query's count, such as a scanner; '' for none.
    within: column of which only images with the value of the query count, such as an organ; '' for none.
    same_subject: 'exclude' leaves images of the query's subject out of its gallery, 'include' the query alone.
    depth: ranks that are looked at, for large galleries, which faiss then searches where it is installed; 0 for all.
    nmi: whether to cluster the test images.
  """

  gallery: str = 'train'
  k: tuple[int, ...] = (1, 5, 10)
  metric: str = 'cosine'
  across: str = ''
  within: str = ''
  same_subject: str = 'exclude'
  depth: int = 0
  nmi: bool = True

  name: ClassVar[str] = 'retrieve'
  task: ClassVar[str] = 'retrieval of images of the same label'

  def __post_init__(self):
    choose('retrieve.gallery', self.gallery, GALLERIES)
    choose('retrieve.metric', self.metric, retrieval.DISTANCES)
    choose('retrieve.same_subject', self.same_subject, ('exclude', 'include'))
    ranks = tuple(self.k) if isinstance(self.k, (tuple, list)) else (self.k,)
    whole = lambda n, least: isinstance(n, int) and not isinstance(n, bool) and n >= least
    if not ranks or not all(whole(n, 1) for n in ranks):
      raise UserError(f'retrieve.k is {self.k!r}: expected positive whole numbers such as 1,5,10')
    object.__setattr__(self, 'k', tuple(sorted(set(ranks))))
    if not whole(self.depth, 0) or 0 < self.depth < max(ranks):
      raise UserError(f'retrieve.depth is {self.depth!r}: expected 0 for all ranks, or at least the largest k, '
                      f'{max(ranks)}')
    if not isinstance(self.nmi, bool):
      raise UserError(f'retrieve.nmi is {self.nmi!r}: expected true or false')
    if self.across and self.across == self.within:
      raise UserError(f'retrieve.across and retrieve.within are both {self.across!r}: no image has the same value and '
                      'another one')

  @property
  def methods(self) -> Mapping[str, str]:  # type: ignore[override]
    """The similarity."""
    return {self.metric: self.metric}

  @property
  def metrics(self) -> Mapping[str, str]:  # type: ignore[override]
    """Those of the ranking, then of the clusters."""
    return retrieval.names(self.k) | ({'nmi': 'NMI of clusters'} if self.nmi else {})

  @property
  def splits(self) -> tuple[str, ...]:
    """The gallery and the queries."""
    return tuple(dict.fromkeys((self.gallery, 'test')))

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """[..., M, K]: the metrics of each query, NaN where it has no answer, and with `nmi` the cluster of each test row.

    Of several sets of test features each asks itself where the gallery is 'test'.
    """
    part, test, rules = self._gallery(task), np.asarray(x['test']), self._rules(task)
    sets = test.reshape(-1, *test.shape[-2:])
    own = self.gallery == 'test'
    found = [retrieval.retrieval(q, task.test.y, q if own else x['train'], part.y, rules, self.k, self.metric,
                                 self.depth) for q in sets]
    if self.nmi:
      count = len(np.unique(task.test.y))
      found = [np.column_stack([f, retrieval.clusters(q, count, self.metric)])
               for f, q in zip(found, sets, strict=True)]
    return Answers(np.stack(found).reshape(*test.shape[:-1], -1))

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Means over the queries, and the NMI of the clusters."""
    ranks = values[:, :len(self.k) + 3]
    found = self._named(ranks[~np.isnan(ranks).any(axis=1)].mean(axis=0))
    return found | ({'nmi': retrieval.clustering_score(task.test.y, values[:, -1])} if self.nmi else {})

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects; the gallery stays, and so do the clusters."""
    ask = dict(draws=draws, seed=seed)
    found = self._named(statistics.resampled_means(values[:, :len(self.k) + 3], task.test.subjects, **ask).T)
    if self.nmi:
      # NMI rises where fewer different subjects are counted: the resamples say how far it scatters, not around what.
      drawn = retrieval.resampled_score(task.test.y, values[:, -1], task.test.subjects, **ask)
      found['nmi'] = drawn - drawn.mean() + retrieval.clustering_score(task.test.y, values[:, -1])
    return found

  def chance(self, task: Task) -> dict[str, float]:
    """What a shuffled gallery gives, and shuffled clusters of equal size."""
    values = retrieval.chance(*self._alike(task), self.k, self.depth)
    found = {m: float(v) for m, v in self._named(np.nanmean(values, axis=0)).items()}
    if self.nmi:
      rng, y = np.random.default_rng(0), task.test.y
      even = np.arange(len(y)) % len(np.unique(y))
      found['nmi'] = float(np.mean([retrieval.clustering_score(y, rng.permutation(even)) for _ in range(20)]))
    return found

  def notes(self, task: Task) -> list[str]:
    """Rules, unknown values, queries that have no answer, a single test subject; a UserError where none has one."""
    notes = []
    for what, column in (('across', self.across), ('within', self.within)):
      if column:
        unknown = sum(int(np.count_nonzero(c < 0)) for c in self._codes(task, what, column))
        notes.append(f'{what} {column}: a query has the images of {"another" if what == "across" else "its own"} '
                     f'{column} alone' + (f'; {unknown} rows without one have no gallery and are in none' if unknown
                                          else ''))
    if self.same_subject == 'include':
      notes.append('images of the subject of a query are in its gallery')
    if self.depth:
      notes.append(f'the first {self.depth} ranks were looked at: mAP and mAP@R are of these')
    lost = int(np.count_nonzero(self._alike(task)[0] == 0))
    if lost == len(task.test.y):
      rules = ' and of another subject' if self.same_subject == 'exclude' else ''
      rules += ''.join(f', {what} {column}' for what, column in (('across', self.across), ('within', self.within))
                       if column)
      raise UserError(f'label {task.label!r}: no test row has a row of its class{rules} in the gallery '
                      f'({self.gallery})')
    if lost:
      notes.append(f'{lost} of {len(task.test.y)} test rows have no row of their class in their gallery and are left '
                   'out')
    return notes + lone_subject(task)

  def whole(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """The gallery, queries that are left out, and what some queries found by the trained features, of each class in
    turn."""
    x, alike, part = sets[TRAINED], self._alike(task)[0], self._gallery(task)
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(np.flatnonzero((task.test.y == c) & (alike > 0))) for c in np.unique(task.test.y)]
    turns = [rows[i] for i in range(max(map(len, by_class))) for rows in by_class if i < len(rows)]
    picked = np.array(turns[:EXAMPLES])
    rules = [r._replace(query=r.query[picked]) for r in self._rules(task)]
    y, examples = task.test.y[picked], []
    asked, stored = (p.source.table['id'].to_pylist() for p in (task.test, part))
    for rows, order, there in retrieval.ranked(x['test'][picked], y, x[self.gallery], part.y, rules, self.metric,
                                               min(SHOWN, len(part.y)), 'numpy'):
      for i, places, real in zip(rows, order, there, strict=True):
        found = [{'id': str(stored[p]), 'label': task.classes[part.y[p]], 'right': bool(part.y[p] == y[i])}
                 for p in places[real]]
        examples.append({'query': str(asked[picked[i]]), 'label': task.classes[y[i]], 'found': found})
    return dict(gallery=self.gallery, queries={'asked': int((alike > 0).sum()), 'left_out': int((alike == 0).sum())},
                examples=examples)

  def drawings(self, result: Mapping[str, Any], source: Any) -> dict[str, Callable[[Any], None]]:
    """{name: what writes a picture}: queries and the images that they found."""
    from jaxmed.evaluate.report import overlays
    return {'nearest_images': lambda path: overlays.retrieved(result['examples'], source, path)}

  def _gallery(self, task: Task) -> Part:
    return task.train if self.gallery == 'train' else task.test

  def _rules(self, task: Task) -> list[Rule]:
    """What is in the gallery of each test row."""
    gallery, test, rules = self._gallery(task), task.test, []
    if self.same_subject == 'exclude':
      rules.append(Rule(*_shared(test.subjects.tolist(), gallery.subjects.tolist()), False))
    elif self.gallery == 'test':
      rules.append(Rule(np.arange(len(test.y)), np.arange(len(test.y)), False))
    for what, column, same in (('across', self.across, False), ('within', self.within, True)):
      if column:
        rules.append(Rule(*self._codes(task, what, column), same))
    return rules

  def _codes(self, task: Task, what: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """[M], [G]: the value of a column of each test row and of each row of the gallery, -1 where there is none."""
    test, gallery = (p.source.table for p in (task.test, self._gallery(task)))
    choose(f'column of retrieve.{what}', column, test.column_names)
    found = _shared(test[column].to_pylist(), gallery[column].to_pylist())
    if max(c.max(initial=-1) for c in found) < (1 if what == 'across' else 0):
      raise UserError(f'retrieve.{what}: the column {column!r} has a single value, or none, in the test rows and the '
                      'gallery; expected ' + ('two or more' if what == 'across' else 'a value'))
    return found

  def _alike(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """[M], [M]: rows of the class of each query in its gallery, and all rows of it."""
    return retrieval.counts(task.test.y, self._gallery(task).y, self._rules(task))

  def _named(self, values: Any) -> dict[str, Any]:
    return dict(zip(retrieval.names(self.k), values, strict=True))


def _shared(asked: list, stored: list) -> tuple[np.ndarray, np.ndarray]:
  """Two lists of values as integers, equal where the values are; -1 for None."""
  place = {v: i for i, v in enumerate(dict.fromkeys(str(v) for v in (*asked, *stored) if v is not None))}
  codes = lambda values: np.array([-1 if v is None else place[str(v)] for v in values], np.int64)
  return codes(asked), codes(stored)
