"""Leakage: records to train on that an evaluation set holds too, as the same file, subject or operation (the column
`video`), or nearly the same image.

A hash misses another slice of the same lesion and finds nothing in flat images; names of subjects may agree by chance:
read the table that is written. Features find what hashes do not.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed import files
from jaxmed.data.corpus import operations
from jaxmed.data.corpus.open import open_source
from jaxmed.data.corpus.source import Source
from jaxmed.data.curate import features, hashes

KINDS = {'file': 'the same file', 'subject': 'the same subject', 'video': 'the same operation',
         'hash': 'nearly the same image','embedding': 'nearly the same features'}
COSINE = 0.98


@dataclasses.dataclass(frozen=True)
class Leaks:
  """What a corpus shares with one evaluation set.

  Attributes:
    evaluation: where that is. records: rows to train on. matches: {kind: int64 [records], a row of the evaluation set,
      -1 for none}. values: {kind: float64 [records]}, differing bits or the cosine. ids: of the evaluation set's rows.
  """

  evaluation: str
  records: int
  matches: dict[str, np.ndarray]
  values: dict[str, np.ndarray]
  ids: pa.ChunkedArray

  @property
  def rows(self) -> np.ndarray:
    """bool [records]: rows that leak in any way."""
    return np.any([m >= 0 for m in self.matches.values()], axis=0)

  def summary(self) -> dict[str, Any]:
    """Counts for JSON."""
    return {'evaluation': self.evaluation, 'records': self.records, 'evaluated': len(self.ids),
            'leaks': int(self.rows.sum()), 'kinds': {k: int((m >= 0).sum()) for k, m in self.matches.items()}}

  def text(self) -> str:
    """One line."""
    kinds = ', '.join(f'{KINDS[k]} {int((m >= 0).sum())}' for k, m in self.matches.items())
    return f'{int(self.rows.sum())} of {self.records} records are in {self.evaluation} too ({kinds})'


def held_out(evaluation: str) -> Source:
  """The rows of an evaluation set (a corpus, or CORPUS@NAME) that answers are judged by: val and test, or all where it
  has neither. A UserError where it cannot be opened."""
  source = open_source(evaluation)
  told = pc.is_in(source.table['split'], value_set=pa.array(['val', 'test']))
  return source.keep(told.to_numpy()) if pc.any(told).as_py() else source


def between(source: Source, evaluation: str, held: Source, radius: int = hashes.RADIUS, progress: bool = False,
            given: tuple[np.ndarray, np.ndarray] | None = None, cosine: float = COSINE) -> Leaks:
  """What records to train on share with an evaluation set, of that name.

  Images count as nearly the same within `radius` bits, also when one is flipped left to right or upside down; hashes of
  at most hashes.FLAT bits say nothing and are left out.

  Args:
    held: its rows, as `held_out` gives them. given: features of length 1 of both, [N, D] and [M, D].
  """
  matches = {'file': _same(source, held, 'sha256'), 'subject': _same(source, held, 'subject')}
  values = {kind: np.full(len(source), np.nan) for kind in ('file', 'subject')}
  if all(operations.COLUMN in each.table.column_names for each in (source, held)):
    matches['video'], values['video'] = _same(source, held, operations.COLUMN), np.full(len(source), np.nan)
  mine = hashes.of_source(source, progress)[:, 0]
  theirs = hashes.variants(hashes.of_source(held, progress))
  matches['hash'], values['hash'] = near_hashes(mine, theirs, radius)
  if given is not None:
    matches['embedding'] = found = features.within(*given, cosine)
    values['embedding'] = np.where(found >= 0, np.einsum('nd,nd->n', given[0], given[1][found]), np.nan)
  return Leaks(evaluation, len(source), matches, values, held.table['id'])


def near_hashes(mine: np.ndarray, theirs: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
  """For each hash [N] a row of theirs [M, 4] with a variant within `radius` bits (-1: none), and the distance (NaN)."""
  found, value = np.full(len(mine), -1, np.int64), np.full(len(mine), np.nan)
  tells = lambda x: np.bitwise_count(x) > hashes.FLAT
  asked, known = np.flatnonzero(tells(mine)), np.flatnonzero(tells(theirs.reshape(-1)))
  at = hashes.within(mine[asked], theirs.reshape(-1)[known], radius)
  hit = at >= 0
  rows, places = asked[hit], known[at[hit]]
  found[rows] = places // theirs.shape[1]
  value[rows] = np.bitwise_count(mine[rows] ^ theirs.reshape(-1)[places])
  return found, value


def _same(source: Source, held: Source, name: str) -> np.ndarray:
  """int64 [N]: the first row of the evaluation set with the same text in a column, -1 for none; empty text is none."""
  mine, theirs = _bare(source, name), _bare(held, name)
  known = pc.unique(theirs)
  _, first = np.unique(pc.index_in(theirs, value_set=known).to_numpy(), return_index=True)
  at = pc.fill_null(pc.index_in(mine, value_set=known, skip_nulls=True), -1).to_numpy()
  empty = pc.fill_null(pc.equal(mine, ''), True).to_numpy()
  return np.where((at >= 0) & ~empty, first[at] if len(first) else -1, -1)


def _bare(source: Source, name: str) -> pa.ChunkedArray:
  """A column as its corpus has it: of several corpora as one, subjects have the name of theirs before them."""
  column = source.table[name]
  if name != 'subject' or not source.datasets:
    return column
  return pa.chunked_array([[text[len(of) + 1:] for of, text in zip(
    source.table['dataset'].to_pylist(), column.to_pylist())]], pa.string())


def write(path: pathlib.Path, source: Source, found: Sequence[Leaks]) -> None:
  """A CSV with a row for each leaking record and kind."""
  lines = (line for leaks in found for line in _lines(source, leaks))
  files.write_csv(path, itertools.chain([('id', 'kind', 'evaluation', 'evaluation_id', 'value')], lines))


def _lines(source: Source, leaks: Leaks) -> Iterator[tuple]:
  for kind, match in leaks.matches.items():
    rows = np.flatnonzero(match >= 0)
    mine, theirs = source.table['id'].take(pa.array(rows)), leaks.ids.take(pa.array(match[rows]))
    for row, a, b in zip(rows, mine.to_pylist(), theirs.to_pylist()):
      value = leaks.values[kind][row]
      yield a, kind, leaks.evaluation, b, '' if np.isnan(value) else round(float(value), 4)
