"""What `jaxmed curate` does: methods one after the other, each on what the one before it left; one selection."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from jaxmed import config, owner
from jaxmed.data.corpus import selection
from jaxmed.data.corpus.corpus_format import SPLITS
from jaxmed.data.corpus.open import open_source
from jaxmed.data.corpus.source import Source
from jaxmed.data.curate import balance, features, hashes, leakage, measures, pictures, quality, semdedup
from jaxmed.data.curate.verdict import Verdict
from jaxmed.errors import UserError, choose

SCOPES = ('volume', 'all')
_LINES = 1 << 16  # of a CSV that are made at once
DEFAULTS: dict[str, dict[str, Any]] = {
  'hash': {'radius': hashes.RADIUS},  # most differing bits of 64
  'embedding': {'threshold': 0.98},  # least cosine
  'ssim': {'threshold': 0.9, 'neighbours': 8},  # least similarity; how many records each is compared with
  'mutual_information': {'threshold': 0.6, 'neighbours': 8},
  'entropy': {'least': 1.0},  # bits a pixel
  'semdedup': {'clusters': 0, 'epsilon': 0.05},  # 0: the square root of the records; 1 - the least cosine
  'balance': {'target': 0, 'levels': ()},  # records; clusters of each level from the finest, () for two levels
  'quality': {'blank': 0.99, 'flat': 0.02, 'blur': 0.1, 'saturated': 0.5, 'outlier': 10.0},  # see quality.judge
  'leaks': {'radius': hashes.RADIUS, 'cosine': leakage.COSINE},
}


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for.

  Attributes:
    corpus: a corpus, or CORPUS@NAME. out: name of the selection, '' for none. methods: of METHODS, in order. options:
      nested, as DEFAULTS. scope: whether methods that compare records do so within a volume (records of one file) or
      over the set. split: 'train', 'val', 'test' or 'all'; records of other splits are kept untouched. features:
      float32 [N, D] and their ids [N]. against: evaluation sets. against_features: features and ids of each.
      drop_leaks: leave out what they hold. overwrite: replace a selection of that name.
  """

  corpus: str
  out: str = ''
  methods: tuple[str, ...] = ()
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  scope: str = 'all'
  split: str = 'train'
  features: tuple[np.ndarray, np.ndarray] | None = None
  against: tuple[str, ...] = ()
  against_features: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
  drop_leaks: bool = False
  seed: int = 0
  overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows that a method is to judge."""

  source: Source
  options: Any
  scope: str
  features: tuple[np.ndarray, np.ndarray] | None
  seed: int
  progress: bool

  @property
  def groups(self) -> np.ndarray | None:
    """The volume (file) of each row, where it matters."""
    if self.scope == 'all':
      return None
    return self.source.distinct('path')[0]

  def vectors(self) -> np.ndarray:
    """float32 [N, D] of length 1."""
    if self.features is None:
      raise UserError('this method needs features: give --encoder RUN, or --features FILE.npz of jaxmed embed')
    return features.of_ids(*self.features, self.source.table['id'], 'what --features or --encoder gave')

  def small(self) -> np.ndarray:
    """uint8 [N, SIDE, SIDE]: grey pictures."""
    shape = (0, measures.SIDE, measures.SIDE)
    each = pictures.each(self.source, lambda x: pictures.small(x, measures.SIDE), 'pictures', self.progress)
    return np.stack(each) if each else np.zeros(shape, np.uint8)


def _hash(rows: Rows) -> Verdict:
  found = hashes.of_source(rows.source, rows.progress)[:, 0]
  like = hashes.near_duplicates(found, rows.options.radius, rows.groups)
  return Verdict.duplicates(like, np.bitwise_count(found ^ found[like]))


def _by_cosine(x: np.ndarray, like: np.ndarray) -> Verdict:
  return Verdict.duplicates(like, np.einsum('nd,nd->n', x, x[like]))


def _embedding(rows: Rows) -> Verdict:
  x = rows.vectors()
  return _by_cosine(x, features.near_duplicates(x, rows.options.threshold, rows.groups))


def _pairs(measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Rows], Verdict]:
  def method(rows: Rows) -> Verdict:
    small, o = rows.small(), rows.options
    like = measures.redundant(small, measure, o.threshold, o.neighbours, rows.groups)
    value = np.full(len(like), np.nan)
    gone = np.flatnonzero(like >= 0)
    for part in np.array_split(gone, len(gone) // 1024 + 1):
      value[part] = measure(small[like[part]], small[part]) if len(part) else value[part]
    return Verdict.duplicates(like, value)
  return method


def _entropy(rows: Rows) -> Verdict:
  value = measures.entropy(rows.small()) if len(rows.source) else np.zeros(0)
  return Verdict.of(value < rows.options.least, 'entropy', value)


def _semdedup(rows: Rows) -> Verdict:
  x = rows.vectors()
  count = rows.options.clusters or max(int(len(x) ** 0.5), 1)
  return _by_cosine(x, semdedup.semdedup(x, count, rows.options.epsilon, rows.seed))


def _balance(rows: Rows) -> Verdict:
  x, target = rows.vectors(), rows.options.target
  if target < 1:
    raise UserError('balance needs balance.target=N, the number of records to take')
  finest = max(int(len(x) ** 0.5), 1)
  levels = [int(n) for n in rows.options.levels] or [finest, max(finest // 10, 1)]
  if min(levels) < 1:
    raise UserError(f'balance.levels takes numbers of clusters of at least 1, from the finest level, not {levels}')
  return Verdict.of(~balance.balanced(x, levels, target, rows.seed), 'balance')


def _quality(rows: Rows) -> Verdict:
  return quality.judge(rows.source, rows.options, rows.progress)


METHODS: dict[str, Callable[[Rows], Verdict]] = {
  'hash': _hash, 'embedding': _embedding, 'ssim': _pairs(measures.ssim),
  'mutual_information': _pairs(measures.mutual_information), 'entropy': _entropy, 'semdedup': _semdedup,
  'balance': _balance, 'quality': _quality,
}


def options_of(values: Mapping[str, Any]) -> ConfigDict:
  """DEFAULTS with other values; a UserError names the nearest key to an unknown one."""
  out = ConfigDict(DEFAULTS)
  config.update(out, values)
  flat = config.flat(out)
  for key, value in flat.items():
    if key.endswith('radius') and not 0 <= value < 64 or key.endswith('neighbours') and value < 1:
      raise UserError(f'{key}={value}: expected {"0 to 63 bits" if key.endswith("radius") else "at least 1"}')
  return out


def curate(request: Request, progress: bool = False) -> dict[str, Any]:
  """Looks for leaks, applies the methods, writes the selection where one is named.

  Returns:
    What NAME.json holds: corpus, records, kept, steps [{method, before, kept, seconds, reasons, options}], leaks.
  Raises:
    UserError: an unknown method, option or corpus; a selection of that name is there already, or another process makes
      it.
  """
  check(request)
  if not request.out:
    return _curated(request, progress)
  folder = selection.split_uri(request.corpus)[0] / selection.FOLDER
  if folder.parent.is_dir():
    folder.mkdir(exist_ok=True)
  with owner.of_file(folder / f'{request.out}.parquet'):
    return _curated(request, progress)


def _curated(request: Request, progress: bool) -> dict[str, Any]:
  """`curate` without checks."""
  options = options_of(request.options)
  whole = open_source(request.corpus)
  codes, splits = whole.distinct('split')
  told = np.array([request.split in ('all', split) for split in splits], bool)[codes]
  keep = np.ones(len(whole), bool)
  leaks = _leaks(request, options.leaks, whole.keep(told), progress)
  left_out: list[Iterator[Sequence[Any]]] = []
  steps: list[dict[str, Any]] = []
  judges: list[tuple[str, Callable[[Rows], Verdict]]] = [(name, METHODS[name]) for name in request.methods]
  if request.drop_leaks:
    gone = np.any([found.rows for found in leaks], axis=0)
    judges.insert(0, ('leaks', lambda rows: Verdict.of(gone, 'leak')))
  for name, judge in judges:
    at = np.flatnonzero(told & keep)
    begin = time.perf_counter()
    rows = Rows(whole.keep(told & keep), options[name], request.scope, request.features, request.seed, progress)
    verdict = judge(rows)
    keep[at] = verdict.keep
    left_out.append(_left_out(rows.source, name, verdict))
    words, counts = np.unique(verdict.reason[~verdict.keep].astype(str), return_counts=True)
    steps.append({'method': name, 'before': len(at), 'kept': int(verdict.keep.sum()),
                  'seconds': round(time.perf_counter() - begin, 2), 'options': options[name].to_dict(),
                  'reasons': dict(zip(words.tolist(), counts.tolist()))})
  about = {'corpus': request.corpus, 'split': request.split, 'scope': request.scope, 'seed': request.seed,
           'records': len(whole), 'judged': int(told.sum()), 'kept': int(keep.sum()), 'steps': steps,
           'leaks': [found.summary() for found in leaks]}
  if request.out:
    if not (told & keep).any():
      raise UserError(f'nothing of split {request.split} is left: no selection is written')
    selection.write(whole.path, request.out, whole.table['id'].filter(pa.array(keep)), about,
                    itertools.chain.from_iterable(left_out))
  return about | {'lines': [found.text() for found in leaks]}


def check(request: Request) -> None:
  """Everything about a request that can be said before a corpus is opened."""
  if ',' in request.corpus and not os.path.exists(request.corpus):
    raise UserError(f'{request.corpus} is more than one corpus: curate each by itself, then train with '
                    'data=A@NAME,B@NAME')
  for name in request.methods:
    choose('method', name, METHODS)
  choose('scope', request.scope, SCOPES)
  choose('split', request.split, (*SPLITS, 'all'))
  if not request.out and (request.methods or request.drop_leaks):
    raise UserError('give --out NAME, the selection to write')
  if not request.out and not request.against:
    raise UserError('nothing to do: give --out NAME with --methods, or --against CORPUS to look for leaks')
  if request.drop_leaks and not request.against:
    raise UserError('--drop-leaks needs --against CORPUS, the evaluation set')
  if request.out:
    selection.check_name(request.out)
    corpus, _ = selection.split_uri(request.corpus)
    if request.out in selection.names(corpus) and not request.overwrite:
      raise UserError(f'{corpus} has a selection {request.out} already: choose another --out, or give --overwrite')


def text(found: Mapping[str, Any], out: str | None) -> str:
  """What the command prints."""
  lines = list(found['lines'])
  for step in found['steps']:
    why = ', '.join(f'{k} {v}' for k, v in step['reasons'].items())
    lines.append(f'{step["method"]}: {step["kept"]} of {step["before"]} kept' + (f' ({why})' if why else ''))
  corpus, _ = selection.split_uri(found['corpus'])
  if found['leaks']:
    lines.append(f'leaks: {corpus / selection.FOLDER / "leakage.csv"}')
  if out:
    lines.append(f'{found["kept"]} of {found["records"]} records in {corpus}@{out}; what was left out: '
                 f'{corpus / selection.FOLDER / out}.csv')
  return '\n'.join(lines)


def _leaks(request: Request, options: Any, source: Source, progress: bool) -> list[leakage.Leaks]:
  """What the rows share with each evaluation set; leakage.csv beside the selections lists it."""
  found = []
  for i, name in enumerate(request.against):
    given, held = None, leakage.held_out(name)
    if request.against_features and request.features is not None:
      given = (features.of_ids(*request.features, source.table['id'], 'the features of the corpus'),
               features.of_ids(*request.against_features[i], held.table['id'], f'the features of {name}'))
    found.append(leakage.between(source, name, held, options.radius, progress, given, options.cosine))
  if request.against:
    leakage.write(source.path / selection.FOLDER / 'leakage.csv', source, found)
  return found


def _left_out(source: Source, method: str, verdict: Verdict) -> Iterator[Sequence[Any]]:
  """Lines of NAME.csv."""
  ids = source.table['id']
  for gone in np.array_split(every := np.flatnonzero(~verdict.keep), len(every) // _LINES + 1):
    names = ids.take(pa.array(gone)).to_pylist()
    like = ids.take(pa.array(np.maximum(verdict.like[gone], 0))).to_pylist() if len(gone) else []
    for i, name, other in zip(gone, names, like):
      value = verdict.value[i]
      yield (name, method, verdict.reason[i], '' if np.isnan(value) else round(float(value), 4),
             other if verdict.like[i] >= 0 else '')
