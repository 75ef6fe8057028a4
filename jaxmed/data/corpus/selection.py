"""A selection: the ids of some records of a corpus, in the manifest's order, under a name.

  CORPUS/selections/NAME.parquet   column id
  CORPUS/selections/NAME.json      what was done: options, counts, seed
  CORPUS/selections/NAME.csv       what was left out: id, method, reason, value, like

The corpus itself stays as it is: no pixel is copied, and statistics stay those of the whole.
"""

import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.errors import UserError, choose

FOLDER = 'selections'
OTHERS = ('hashes', 'leakage')  # files in the same folder that are none
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')


def split_uri(uri: str | os.PathLike) -> tuple[pathlib.Path, str]:
  """'CORPUS@NAME' -> (CORPUS, NAME); (the path, '') without one, and for a path with an @ that exists."""
  path = pathlib.Path(uri)
  corpus, at, name = str(uri).rpartition('@')
  if not at or not corpus or '/' in name or path.exists():
    return path, ''
  return pathlib.Path(corpus), name


def names(corpus: pathlib.Path) -> list[str]:
  """The selections of a corpus."""
  return sorted(p.stem for p in (corpus / FOLDER).glob('*.parquet') if p.stem not in OTHERS)


def check_name(name: str) -> str:
  """The name, or a UserError where it could not be a file's or is kept for something else."""
  if not _NAME.fullmatch(name) or name in OTHERS:
    raise UserError(f'{name!r} cannot name a selection: use letters, digits, . _ and -, but not {", ".join(OTHERS)}')
  return name


def write(corpus: pathlib.Path, name: str, ids: Sequence[str] | pa.ChunkedArray, about: Mapping[str, Any],
          left_out: Iterable[Sequence[Any]] = ()) -> pathlib.Path:
  """Writes a selection, each file whole; returns the path of the ids. An older one of the name is replaced."""
  place = corpus / FOLDER / check_name(name)
  head = ('id', 'method', 'reason', 'value', 'like')
  files.write_csv(place.with_name(f'{name}.csv'), itertools.chain([head], left_out))
  files.write_json(place.with_name(f'{name}.json'), dict(about))
  path = place.with_name(f'{name}.parquet')
  with files.writing(path) as part:
    pq.write_table(pa.table({'id': pa.chunked_array(ids) if isinstance(ids, pa.ChunkedArray) else
                             pa.array(ids, pa.string())}), part)
  return path


def filtered(corpus: pathlib.Path, name: str, table: Any) -> Any:
  """The rows of a manifest that a selection keeps, in the manifest's order.

  Raises:
    UserError: no selection of that name (the nearest is named), a damaged one, or ids that the manifest lacks.
  """
  known = names(corpus)
  if not known:
    raise UserError(f'{corpus} has no selection {name!r}, nor any: jaxmed curate {corpus} --out {name} makes one')
  choose(f'selection of {corpus}', name, known)
  path = corpus / FOLDER / f'{name}.parquet'
  try:
    ids = pq.read_table(path, columns=['id'])['id']
  except (pa.ArrowException, OSError, KeyError) as e:
    raise UserError(f'{path} is damaged: {" ".join(str(e).split())}; make it again with jaxmed curate') from e
  ids = ids.combine_chunks()
  kept = table.filter(pc.is_in(table['id'], value_set=ids))
  if len(kept) != len(ids):
    raise UserError(f'{path} names {len(ids)} records, of which {corpus} has {len(kept)}: make it again with jaxmed '
                    'curate')
  return kept
