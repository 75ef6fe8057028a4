"""What a protocol of frozen features is: it fits on some splits and scores another, beside two baselines."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate import tables
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.tasks import (
  PIXELS,
  SPLITS,
  TRAINED,
  UNTRAINED,
  Task,
  encoded,
  make_task,
  pixel_features,
  plain,
  sizes,
)


class Answers(NamedTuple):
  """What a method says of the test rows.

  values: [..., M, K], a row of numbers for each test row. info: what a row of the result says of the fit. trouble: a
  note on it, '' for none.
  """

  values: np.ndarray
  info: Mapping[str, Any] = {}
  trouble: str = ''


@dataclasses.dataclass(frozen=True)
class FeatureProtocol:
  """Base of the protocols that judge one frozen vector a record; the simple fields of a class are its options.

  A class says what its methods answer for test rows, what the answers are worth and what chance gets. Splits,
  baselines, paired differences, intervals and tables are those of all. `channels.ByChannels` wraps any of them.
  """

  name: ClassVar[str]
  task: ClassVar[str]  # what is asked of the features, in words
  methods: ClassVar[Mapping[str, str]]  # {name: how tables call it}
  metrics: ClassVar[Mapping[str, str]]  # the same; the first ranks subsets of channels
  of_pixels: ClassVar[bool] = True  # whether raw pixels can be judged, too

  @property
  def splits(self) -> tuple[str, ...]:
    """Splits whose features are read."""
    return SPLITS

  @property
  def headline(self) -> str:
    """The metric that a report shows first."""
    return next(iter(self.metrics))

  def resolved(self, source: Any, label: str) -> 'FeatureProtocol':
    """The protocol as the column asks for it."""
    return self

  def task_of(self, source: Any, label: str, seed: int) -> Task:
    """The labelled rows of each split."""
    return make_task(source, label, seed)

  def features(self, encoder: Any, task: Task, feature: str, batch_size: int, name: str) -> dict[str, np.ndarray]:
    """What is asked of an encoder: {split: [n, D]}, maybe more by other names."""
    return encoded(encoder, task, feature, batch_size, name, self.splits)

  def shown(self, encoder: Any, task: Task, subsets: Sequence[Sequence[str]], feature: str,
            batch_size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What `channels.ByChannels` asks of an encoder: what is fitted on, of all channels, and features [S, M, D] of the
    test rows that show subsets of them."""
    fitted = tuple(split for split in self.splits if split != 'test')
    return (encoded(encoder, task, feature, batch_size, TRAINED, fitted),
            encoder.embed_subsets(task.test.source, subsets, batch_size, feature))

  def methods_for(self, x: Mapping[str, np.ndarray]) -> list[str]:
    """The methods that these features can serve."""
    return list(self.methods)

  def answers(self, method: str, x: Mapping[str, np.ndarray], task: Task) -> Answers:
    """The answers of a method, given features {split: [n, D]}; test features may be several sets, [..., M, D]."""
    raise NotImplementedError

  def score(self, values: np.ndarray, task: Task) -> dict[str, float]:
    """Each metric of answers [M, K]; NaN where it does not exist."""
    raise NotImplementedError

  def resampled(self, values: np.ndarray, task: Task, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Each metric [draws] on resampled test subjects, the same ones for all answers."""
    raise NotImplementedError

  def chance(self, task: Task) -> dict[str, float]:
    """What each metric is without any features."""
    raise NotImplementedError

  def notes(self, task: Task) -> list[str]:
    """What a reader must know of the rows."""
    raise NotImplementedError

  def details(self, name: str, method: str, x: Mapping[str, np.ndarray], answers: Answers, task: Task, draws: int,
              seed: int) -> dict[str, Any]:
    """What the row of a method on the features called `name` says besides."""
    return {}

  def whole(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int, seed: int) -> dict[str, Any]:
    """What the result says besides, of all kinds of features."""
    return {}

  def check(self, source: Any, label: str, seed: int = 0) -> None:
    """A UserError where the rows cannot be judged, before anything is embedded."""
    protocol = self.resolved(source, label)
    protocol.notes(protocol.task_of(source, label, seed))

  def run(self, encoder: Any, source: Any, label: str, *, untrained: Any = None, beside: Mapping[str, Any] = {},
          feature: str = 'mean', batch_size: int = 64, seed: int = 0, draws: int = 1000,
          pixels: bool = True) -> dict[str, Any]:
    """Scores frozen features beside the untrained encoder, raw pixels, and maybe other encoders.

    Intervals are 95 % percentile bootstrap over test subjects.

    Args:
      encoder: has `embed_source(source, batch_size) -> {'cls': [N, D], 'mean': [N, D]}`, image_size and vocabulary.
      source: a jaxmed.data.corpus.source.Source with splits. label: a column of its table.
      untrained: the same encoder with its initial weights; without it that baseline is missing, and noted.
      beside: other encoders by name, each judged by the vector that it recommends.
      feature: which array of embed_source to use. draws: bootstrap resamples. pixels: whether to score raw pixels too.

    Returns:
      A dict ready for JSON: label, feature, classes, splits and subjects {split: count}, chance {metric: value},
      rows [{features, method, metrics: {metric: {value, low, high}}, ...}],
      differences [{features, minus, method, metrics}] of the encoder to all others and of those of `beside` to each
      other, notes, draws, seed. A value that does not exist is None.

    Raises:
      UserError: unknown column or feature, no test or training rows, a single class, a subject in two splits,
        features that are not finite.
    """
    protocol = self.resolved(source, label)
    if protocol is not self:
      return protocol.run(encoder, source, label, untrained=untrained, beside=beside, feature=feature,
                          batch_size=batch_size, seed=seed, draws=draws, pixels=pixels)
    task = self.task_of(source, label, seed)
    notes = [*task.notes, *self.notes(task)]
    notes += [] if untrained is not None else [compared.MISSING]
    those = compared.encoders(encoder, feature, untrained, beside)
    made = {name: self.features(one, task, vector, batch_size, name) for name, (one, vector) in those.items()}
    if pixels and self.of_pixels:
      made[PIXELS] = pixel_features(encoder, task, batch_size, self.splits)
    sets = {name: made[name] for name in (TRAINED, UNTRAINED, PIXELS, *beside) if name in made}
    rows, differences, troubles = self._scored(sets, task, draws, seed)
    return dict(label=label, feature=feature, classes=list(task.classes), chance=self.chance(task), rows=rows,
                differences=differences, notes=notes + troubles, draws=draws, seed=seed, headline=self.headline,
                **sizes(task), **self.whole(sets, task, draws, seed))

  def _scored(self, sets: Mapping[str, Mapping[str, np.ndarray]], task: Task, draws: int,
              seed: int) -> tuple[list[dict], list[dict], list[str]]:
    """The rows, the paired differences and the notes of every method on every kind of features."""
    rows, differences, notes, found = [], [], [], {}
    for name, features in sets.items():
      for method in self.methods_for(features):
        answers = self.answers(method, features, task)
        value, drawn = self.outcome(answers.values, task, draws, seed)
        found[name, method] = value, drawn
        rows.append(dict(features=name, method=method, metrics=plain(statistics.summarised(value, drawn)),
                         **answers.info, **self.details(name, method, features, answers, task, draws, seed)))
        if answers.trouble:
          notes.append(f'{method} on {name}: {answers.trouble}')
    for one, other in compared.pairs(list(sets)):
      for method in (m for m in self.methods if (one, m) in found and (other, m) in found):
        got = statistics.difference(*found[one, method], *found[other, method])
        differences.append(dict(features=one, minus=other, method=method, metrics=plain(got)))
    return rows, differences, notes

  def outcome(self, values: np.ndarray, task: Task, draws: int,
              seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Each metric of answers [M, K], and of it [draws] on resampled subjects."""
    return self.score(values, task), self.resampled(values, task, draws, seed)

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return tables.text_table(result, self.metrics, self.methods)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return tables.html_table(result, self.metrics, self.methods)

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each score and each difference, under a head."""
    return tables.csv_rows(result)

  def drawings(self, result: Mapping[str, Any], source: Any) -> Mapping[str, Callable[[Any], None]]:
    """{name: what writes a PNG to a path}, of what `run` returned and of the source that it judged."""
    return {}


def lone_subject(task: Any) -> list[str]:
  """The note on test rows of one subject."""
  return lone(task.test.subjects)


def lone(subjects: Any) -> list[str]:
  """The same of the subjects of the rows."""
  return ['the test rows are of one subject: there are no intervals'] if len(set(subjects)) < 2 else []
