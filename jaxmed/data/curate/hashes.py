"""Near-duplicates by difference hash, as Less is More finds them (Wolf et al. 2024, arXiv 2410.14524).

As in Wolfda95/Less_is_More, PreTrain-Data_Reduction/Hash_*.py: the grey image is reduced to 8 rows of 9 pixels; each of
the 64 bits says whether a pixel is brighter than its left neighbour. Two images are near-duplicates where at most 6
bits differ. The first of them, in the manifest's order, stays.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.data.corpus.corpus_format import is_corpus
from jaxmed.data.corpus.selection import FOLDER
from jaxmed.data.corpus.source import Source
from jaxmed.data.curate import bands, greedy, pictures
from jaxmed.errors import UserError

RADIUS = 6
FLAT = 6  # a hash with no more bits than this is of an image without structure
_VERSION = b'1'


def difference_hash(image: np.ndarray) -> tuple[int, int]:
  """The hashes of an image [H, W, C] and of its mirror image (left and right exchanged), 64 bits each.

  Rows are bytes from the first to the last, the first pixel of a row is the highest bit. Grey as in `pictures.grey`,
  rounded to 8 bits and reduced by Pillow's Lanczos filter: of a grey image from 0 to 255 it is imagehash's dhash.
  """
  from PIL import Image

  whole = Image.fromarray(np.rint(pictures.grey(image)).astype(np.uint8))
  tiny = np.asarray(whole.resize((9, 8), Image.Resampling.LANCZOS))
  return _packed(tiny), _packed(tiny[:, ::-1])


def _packed(tiny: np.ndarray) -> int:
  return int.from_bytes(np.packbits(tiny[:, 1:] > tiny[:, :-1], axis=1).tobytes(), 'big')


def variants(hashes: np.ndarray) -> np.ndarray:
  """[N, 2] of `of_source` -> [N, 4]: of the image, mirrored, upside down, and both."""
  return np.concatenate([hashes, np.ascontiguousarray(hashes).byteswap()], axis=1)


def of_source(source: Source, progress: bool = False) -> np.ndarray:
  """uint64 [N, 2]: the hashes of each record and of its mirror image; computed once, then read from the corpus.

  CORPUS/selections/hashes.parquet keeps them where the corpus can be written.
  """
  place = source.path / FOLDER / 'hashes.parquet'
  known = _cached(place)
  ids = source.table['id']
  at = pc.index_in(ids, value_set=known['id'].combine_chunks())
  lost = pc.is_null(at)
  missing = source.table.filter(lost)
  if len(missing):
    new = pictures.each(dataclasses.replace(source, table=missing), difference_hash, 'hash', progress)
    columns = np.array(new, np.uint64).reshape(-1, 2)
    fresh = pa.table({'id': missing['id'], 'hash': pa.array(columns[:, 0]), 'mirrored': pa.array(columns[:, 1])})
    known = pa.concat_tables([known, fresh])
    if is_corpus(source.path):  # several corpora as one have no place of their own
      _save(place, known)
    at = pc.index_in(ids, value_set=known['id'].combine_chunks())
  rows = known.take(at.combine_chunks() if isinstance(at, pa.ChunkedArray) else at)
  return np.stack([rows['hash'].to_numpy(), rows['mirrored'].to_numpy()], axis=1)


def _cached(place: pathlib.Path) -> pa.Table:
  """What was computed before; nothing where that is damaged, or of another definition."""
  schema = pa.schema([('id', pa.string()), ('hash', pa.uint64()), ('mirrored', pa.uint64())])
  try:
    table = pq.read_table(place)
    if (table.schema.metadata or {}).get(b'version') == _VERSION:
      return table.select(schema.names).cast(schema)
  except (pa.ArrowException, OSError, KeyError, ValueError):
    pass
  return schema.empty_table()


def _save(place: pathlib.Path, table: pa.Table) -> None:
  try:
    with files.writing(place) as part:
      pq.write_table(table.replace_schema_metadata({b'version': _VERSION}), part)
  except UserError:
    pass  # a corpus that may only be read: they are computed again the next time


def near_duplicates(hashes: np.ndarray, radius: int = RADIUS, groups: np.ndarray | None = None) -> np.ndarray:
  """int64 [N]: the kept row within `radius` bits of each row, -1 for rows that are kept, first come first kept.

  Args:
    hashes: uint64 [N]. groups: [N], compare within equal values only; all with all by default.
  """
  if groups is not None:
    return greedy.in_groups(groups, lambda rows: near_duplicates(hashes[rows], radius))
  if not len(hashes):
    return np.zeros(0, np.int64)
  # Rows with the same hash share its fate: only the first of them is compared with others.
  values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
  order = np.argsort(first, kind='stable')
  ordered = bands.permuted(values[order], bands.spread(values))
  found = greedy.first_come(
    len(order), lambda rows, kept: bands.match(ordered[rows], ordered[kept], radius),
    lambda rows: bands.distances(ordered[rows][:, None], ordered[rows]) <= radius)
  first = first[order]
  stays = np.where(found < 0, first, first[found])  # the row that stays for each hash
  rank = np.empty(len(order), np.int64)
  rank[order] = np.arange(len(order))
  like = stays[rank[inverse.reshape(-1)]]
  return np.where(like == np.arange(len(hashes)), -1, like)


def within(queries: np.ndarray, hashes: np.ndarray, radius: int = RADIUS) -> np.ndarray:
  """int64 [Q]: the place of one of `hashes` within `radius` bits of each query, -1 where there is none."""
  if not len(queries) or not len(hashes):
    return np.full(len(queries), -1, np.int64)
  order = bands.spread(hashes)
  return bands.match(bands.permuted(queries, order), bands.permuted(hashes, order), radius)
