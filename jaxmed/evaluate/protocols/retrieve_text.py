"""Retrieval between the towers of a paired run: the texts of an image, and the images of a text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy import sparse

from jaxmed.data.feed.texts import Texts
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import cross, retrieval, tables
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate.protocols import compared
from jaxmed.evaluate.protocols.protocol import lone
from jaxmed.evaluate.protocols.tasks import TRAINED, subjects_of
from jaxmed.pair import pair_of, texts_of

DUPLICATES = ('drop', 'hits', 'keep')
WAYS = {'image_to_text': 'image to text', 'text_to_image': 'text to image'}
METHODS = {'cosine': 'cosine'}
EXAMPLES, SHOWN, LONGEST = 8, 3, 160


class Pairs(NamedTuple):
  """Images [M] and texts [T] of a source, what belongs to what [M, T], the subject of each, and what a reader must know
  of them."""

  source: Any
  texts: list[str]
  right: sparse.csr_array
  subjects: dict[str, np.ndarray]
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class RetrieveText:
  """Each test image asks all texts of the test rows for its own, and each text all images. Nothing is fitted.

  A record whose column `captions` (or whose text) is a JSON list has several texts; any of them is a hit. Rows without
  a text are left out. Among equally similar candidates wrong ones come first, so that a constant feature scores the
  worst that it can. See `cross.ranked`.

  Attributes:
    text: columns whose texts are joined, such as impression,findings; empty: captions, or else text.
    by: column whose equal values make images and texts belong to each other, such as subject or study; empty: the
      record.
    duplicates: texts that are equal: 'drop' makes one candidate of them, which belongs to all their images; 'hits'
      keeps each, right for all their images; 'keep' lets each belong to its own record alone.
    k: ranks of recall, as numbers.
    split: whose rows are judged.
  """

  text: tuple[str, ...] = ()
  by: str = ''
  duplicates: str = 'drop'
  k: tuple[int, ...] = (1, 5, 10)
  split: str = 'test'

  name: ClassVar[str] = 'retrieve_text'
  task: ClassVar[str] = 'the texts of an image and the images of a text, by the towers of both'
  labelled: ClassVar[bool] = False

  def __post_init__(self):
    choose('retrieve_text.duplicates', self.duplicates, DUPLICATES)
    object.__setattr__(self, 'text', compared.words(self.text))
    ranks = tuple(self.k) if isinstance(self.k, (tuple, list)) else (self.k,)
    for rank in ranks:
      compared.positive('retrieve_text.k', rank)
    object.__setattr__(self, 'k', tuple(sorted(set(ranks))))

  @property
  def metrics(self) -> dict[str, str]:
    """{name: what tables call it}."""
    return {f'{way}_{metric}': f'{words}, {told}' for way, words in WAYS.items() for metric, told in self._each.items()}

  @property
  def _each(self) -> dict[str, str]:
    """Those of one way."""
    return ({f'recall_at_{k}': f'recall@{k}' for k in self.k}
            | {'mean_rank': 'mean rank', 'median_rank': 'median rank', 'map': 'mAP'})

  def check(self, source: Any, label: str = '', seed: int = 0) -> None:
    """A UserError where there is nothing to judge."""
    del label, seed
    self.pairs(source)

  def pairs(self, source: Any) -> Pairs:
    """The images and texts that are judged.

    Raises:
      UserError: no rows of the split, none with a text, an unknown column, or a single group.
    """
    choose('retrieve_text.split', self.split, {str(s) for s in source.table['split'].to_pylist()})
    part = source.select(split=self.split)
    for name in self.text:
      choose('column of retrieve_text.text', name, part.table.column_names)
    texts = texts_of(part, Texts(self.text or ('text',)))
    several = not self.text and 'captions' in part.table.column_names
    captions = part.table['captions'].to_pylist() if several else [None] * len(texts)
    own = [cross.captions_of(c or t or '') for c, t in zip(captions, texts, strict=True)]
    there = np.array([bool(some) for some in own])
    part, own = part.keep(there), [some for some in own if some]
    notes = [] if there.all() else [f'{np.count_nonzero(~there)} of {len(there)} rows have no text and are left out']
    choose('column of retrieve_text.by', self.by or 'id', part.table.column_names)
    groups = part.table[self.by or 'id'].to_pylist()
    owners = [i for i, some in enumerate(own) for _ in some]
    flat = [t for some in own for t in some]
    keys = [{f'group {g if g is not None else f"of row {i}"}'} for i, g in enumerate(groups)]
    theirs = [set(keys[i]) for i in owners]
    repeated = len(flat) - len(set(flat))
    if self.duplicates != 'keep':
      keys = [key | {f'text {t}' for t in some} for key, some in zip(keys, own, strict=True)]
      theirs = [key | {f'text {t}'} for key, t in zip(theirs, flat, strict=True)]
    if self.duplicates == 'drop':
      merged: dict[str, set] = {}
      first: dict[str, int] = {}
      for t, key, i in zip(flat, theirs, owners, strict=True):
        merged[t] = merged.get(t, set()) | key
        first.setdefault(t, i)
      flat, theirs, owners = list(merged), list(merged.values()), list(first.values())
    right = cross.belongs(keys, theirs)
    if right.nnz == right.shape[0] * right.shape[1]:
      raise UserError(f'all {len(flat)} texts of split {self.split} belong to all {len(keys)} images: there is nothing '
                      'to retrieve')
    if repeated:
      told = {'drop': 'are one candidate', 'hits': 'are right for all their images', 'keep': 'are right for their own'}
      notes.append(f'{repeated} of {repeated + len(set(flat))} texts repeat another one; equal texts '
                   + told[self.duplicates])
    if self.by:
      notes.append(f'what has the same {self.by} belongs together')
    subjects = subjects_of(part)
    return Pairs(part, flat, right, {'image_to_text': subjects, 'text_to_image': subjects[owners]}, notes)

  def run(self, encoder: Any, source: Any, label: str = '', *, untrained: Any = None, beside: Mapping[str, Any] = {},
          feature: str = 'mean', batch_size: int = 64, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """Scores of both ways, with 95 % intervals by bootstrap over subjects.

    Args:
      encoder: has `embed_source` and `pair`, see `jaxmed.pair.pair_of`; untrained and those beside, too.
    Returns:
      A dict ready for JSON, as of `FeatureProtocol.run`; texts: how many candidates there are.
    Raises:
      UserError: an encoder without texts, and as of `pairs`.
    """
    del label
    given = self.pairs(source)
    those = compared.encoders(encoder, feature, untrained, beside)
    found, examples = {}, []
    for name, (one, _) in those.items():
      pair = pair_of(one, f'the task {self.name}')
      images = pair.images(one.embed_source(given.source, batch_size)[pair.feature])
      words = pair.texts(given.texts, batch_size)
      found[name, 'cosine'] = self.outcome(images, words, given, draws, seed)
      if name == TRAINED:
        examples = _examples(images, words, given, seed)
    notes = given.notes + ([] if untrained is not None else [compared.MISSING]) + lone(given.subjects['image_to_text'])
    count = len(given.source)
    return dict(label='', target='pairs', feature=pair_of(encoder, self.name).feature, classes=[],
                splits={self.split: count}, subjects={self.split: len(set(given.subjects['image_to_text']))},
                texts=len(given.texts), chance=self.chance(given), headline=next(iter(self.metrics)), k=list(self.k),
                draws=draws, seed=seed, notes=notes, examples=examples, **compared.rows_of(found))

  def outcome(self, images: np.ndarray, words: np.ndarray, given: Pairs, draws: int,
              seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Each metric, and of it [draws] on resampled subjects."""
    value: dict[str, float] = {}
    drawn: dict[str, np.ndarray] = {}
    ask: dict[str, Any] = dict(draws=draws, seed=seed)
    for way, (queries, gallery, right) in {'image_to_text': (images, words, given.right),
                                           'text_to_image': (words, images, sparse.csr_array(given.right.T))}.items():
      rank, precision = cross.ranked(queries, gallery, right)
      subjects = given.subjects[way]
      rows = np.column_stack([*(rank <= k for k in self.k), rank, precision]).astype(np.float64)
      means = statistics.resampled_means(rows, subjects, **ask)
      names = [m for m in self._each if m != 'median_rank']
      value |= {f'{way}_{m}': float(v) for m, v in zip(names, rows.mean(axis=0), strict=True)}
      drawn |= {f'{way}_{m}': means[:, i] for i, m in enumerate(names)}
      value[f'{way}_median_rank'] = float(np.median(rank))
      drawn[f'{way}_median_rank'] = cross.resampled_median(rank, subjects, **ask)
    return value, drawn

  def chance(self, given: Pairs) -> dict[str, float]:
    """What a shuffled gallery gives; of the median rank nothing is said."""
    out: dict[str, float] = {}
    for way, axis in (('image_to_text', 1), ('text_to_image', 0)):
      alike = np.asarray((given.right > 0).sum(axis=axis)).ravel()
      size = np.full(len(alike), given.right.shape[axis])
      columns = retrieval.chance(alike, size, self.k).mean(axis=0)
      out |= {f'{way}_recall_at_{k}': float(v) for k, v in zip(self.k, columns, strict=False)}
      out |= {f'{way}_mean_rank': float(np.mean((size + 1) / (alike + 1))), f'{way}_map': float(columns[-1])}
    return out

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return tables.text_table(result, RetrieveText(k=tuple(result['k'])).metrics, METHODS)

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return tables.html_table(result, RetrieveText(k=tuple(result['k'])).metrics, METHODS)

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each score and each difference, under a head."""
    return tables.csv_rows(result)

  def drawings(self, result: Mapping[str, Any], source: Any) -> dict[str, Callable[[Any], None]]:
    """Images with the texts that they found."""
    from jaxmed.evaluate.report import overlays
    return {'best_texts': lambda path: overlays.captioned(result['examples'], source, path)}


def _examples(images: np.ndarray, words: np.ndarray, given: Pairs, seed: int) -> list[dict[str, Any]]:
  """What some images found."""
  picked = np.random.default_rng(seed).permutation(len(images))[:EXAMPLES]
  ids = given.source.table['id'].to_pylist()
  found = cross.best(images[picked], words, SHOWN)
  right = given.right[picked].toarray() > 0
  return [{'query': str(ids[i]), 'label': '', 'found': [
      {'text': given.texts[j][:LONGEST], 'right': bool(right[row, j])} for j in found[row]]}
          for row, i in enumerate(picked)]
