"""Retrieval of images by image: whether the nearest images of other subjects have the same label."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate import retrieval
from jaxmed.evaluate.protocols.protocol import Answers, FeatureProtocol, lone_subject
from jaxmed.evaluate.protocols.tasks import Part, Task

RANKS = (1, 5, 10)
GALLERIES = ('train', 'test')


@dataclasses.dataclass(frozen=True)
class Retrieve(FeatureProtocol):
  """Each test image asks a gallery for images of its class, by the cosine similarity of their vectors.

  Nothing is fitted. Images of the query's own subject are no part of its gallery. Queries without an image of their
  class are left out, and named in 'notes'. See `retrieval.retrieval` for the metrics.

  Attributes:
    gallery: split that is searched; 'test' leaves the query's subject out of its own split.
  """

  gallery: str = 'train'

  name: ClassVar[str] = 'retrieve'
  task: ClassVar[str] = 'retrieval of images of the same label'
  methods: ClassVar[Mapping[str, str]] = {'cosine': 'cosine'}
  metrics: ClassVar[Mapping[str, str]] = {f'recall_at_{k}': f'recall@{k}' for k in RANKS} | {'map': 'mAP'}

  def __post_init__(self):
    choose('retrieve.gallery', self.gallery, GALLERIES)

  @property
  def splits(self) -> tuple[str, ...]:
    """The gallery and the queries."""
    return tuple(dict.fromkeys((self.gallery, 'test')))

  def run(self, encoder: Any, source: Any, label: str, **options: Any) -> dict[str, Any]:
    """As of every protocol; the result also says its 'gallery'."""
    return super().run(encoder, source, label, **options) | {'gallery': self.gallery}

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """[..., M, 4]: recall at each rank and average precision of each query, NaN where it has no answer.

    Of several sets of test features each asks itself where the gallery is 'test'.
    """
    part, test = self._gallery(task), np.asarray(x['test'])
    sets = test.reshape(-1, *test.shape[-2:])
    own = self.gallery == 'test'
    found = [retrieval.retrieval(q, task.test.y, task.test.subjects, q if own else x['train'], part.y, part.subjects,
                                 RANKS) for q in sets]
    return Answers(np.stack(found).reshape(*test.shape[:-1], -1))

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Means over the queries."""
    return self._named(values[~np.isnan(values).any(axis=1)].mean(axis=0))

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The same [draws] on resampled test subjects; the gallery stays."""
    return self._named(statistics.resampled_means(values, task.test.subjects, draws=draws, seed=seed).T)

  def chance(self, task: Task) -> dict[str, float]:
    """What a shuffled gallery gives."""
    values = retrieval.chance(*self._alike(task), RANKS)
    return {m: float(v) for m, v in self._named(np.nanmean(values, axis=0)).items()}

  def notes(self, task: Task) -> list[str]:
    """Queries that have no answer, a single test subject; a UserError where no query has one."""
    lost = int(np.count_nonzero(self._alike(task)[0] == 0))
    if lost == len(task.test.y):
      raise UserError(f'label {task.label!r}: no test row has a row of its class and of another subject in the gallery '
                      f'({self.gallery})')
    notes = [f'{lost} of {len(task.test.y)} test rows have no row of their class and of another subject in the gallery '
             'and are left out'] if lost else []
    return notes + lone_subject(task)

  def _gallery(self, task: Task) -> Part:
    return task.train if self.gallery == 'train' else task.test

  def _alike(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """[M], [M]: rows of the class of each query in its gallery, and all rows of it."""
    gallery, asked = self._gallery(task), list(zip(task.test.y, task.test.subjects, strict=True))
    classes, subjects = collections.Counter(gallery.y), collections.Counter(gallery.subjects)
    both = collections.Counter(zip(gallery.y, gallery.subjects, strict=True))
    return (np.array([classes[y] - both[y, s] for y, s in asked]),
            np.array([len(gallery.y) - subjects[s] for _, s in asked]))

  def _named(self, values: Any) -> dict[str, Any]:
    return dict(zip(self.metrics, values, strict=True))
