"""Finished blocks become a corpus. Each step can be done again, so a kill in the middle costs nothing."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.data import readers
from jaxmed.data.corpus import labels
from jaxmed.data.corpus.corpus_format import MANIFEST, fields_of, shard_name, write_metadata, write_rejects
from jaxmed.data.corpus.stats import Stats, merged
from jaxmed.data.prepare.blocks import Task, schema
from jaxmed.data.prepare.building import Place
from jaxmed.data.prepare.items import one_split
from jaxmed.errors import UserError


def facts(tasks: Sequence[Task], place: Place) -> list[dict[str, Any]]:
  """What block.json says of each block: shards, kinds of files beside them, rejects, and empty (records left
  out for want of content)."""
  return [files.read_json(place.blocks / t.name / 'block.json') for t in tasks]


def rows(tasks: Sequence[Task], place: Place) -> pa.Table:
  """The manifest: the rows of all blocks in their order, without the columns of readers.META that nobody filled.

  Raises:
    UserError: a subject in two splits, or an id that two records have.
  """
  if not tasks:
    return schema({}).empty_table()
  table = pa.concat_tables([pq.read_table(place.blocks / t.name / 'rows.parquet') for t in tasks]).combine_chunks()
  seen: dict[str, tuple[str, str]] = {}
  pairs = table.group_by(['subject', 'split'], use_threads=False).aggregate([('path', 'first')])
  for row in pairs.to_pylist():
    one_split(seen, row['subject'], row['split'], row['path_first'])
  counts = pc.value_counts(table['id'])
  twice = counts.filter(pc.greater(counts.field('counts'), 1))
  if len(twice):
    raise UserError(f'two records have the id {twice[0]["values"].as_py()}: give inputs whose names differ')
  own = tasks[0].types
  empty = [k for k in readers.META if k not in own and table[k].null_count == len(table)]
  return _numbered(table.drop_columns(empty))


def write(tasks: Sequence[Task], place: Place, table: pa.Table, rejects: Sequence[Sequence[str]],
          names: Mapping[int, str]) -> None:
  """Moves the shards of all blocks to their names in the corpus and writes everything beside them but the card.

  `names` are those of the values of masks; 0, where they lack it and a mask has it, is 'background'.
  """
  for path in place.corpus.iterdir():  # what a kill may have left half-done
    if '.array_record' not in path.name or path.name.startswith('.'):
      path.unlink()
  told = facts(tasks, place)
  shards: dict[str, list[list[int]]] = {}
  for fact in told:
    for split, sizes in fact['shards'].items():
      shards.setdefault(split, []).extend(sizes)
  number = dict.fromkeys(shards, 0)
  for task, fact in zip(tasks, told):
    for split, sizes in fact['shards'].items():
      for i in range(len(sizes)):
        for key in (split, *(f'{split}-{kind}' for kind in fact['beside'][split][i])):
          _move(place.blocks / task.name / f'{key}-{i:05d}.part',
                place.corpus / shard_name(key, number[split], len(shards[split])))
        number[split] += 1
  write_rejects(place.corpus / 'rejects.csv', rejects)
  stats = merged(Stats.load(place.blocks / t.name / 'stats.npz') for t in tasks)
  files.write_json(place.corpus / 'stats.json', stats.summary())
  with files.writing(place.corpus / MANIFEST) as part:
    pq.write_table(table, part)
  if names:
    found = set(pc.unique(pc.list_flatten(table[labels.VALUES])).to_pylist())
    more = {0: 'background'} if labels.BACKGROUND in found and labels.BACKGROUND not in names else {}
    files.write_json(place.corpus / labels.FILE, {str(k): v for k, v in sorted((more | dict(names)).items())})
  write_metadata(place.corpus, shards, fields_of(tasks[0].types if tasks else {}))


def _numbered(table: pa.Table) -> pa.Table:
  """Lets `row` count the records of each split over all blocks."""
  if not len(table):
    return table
  split = table['split'].combine_chunks().dictionary_encode()
  codes = split.indices.to_numpy(zero_copy_only=False)
  row = np.zeros(len(table), np.int64)
  for code in range(len(split.dictionary)):
    row[codes == code] = np.arange(int((codes == code).sum()))
  return table.set_column(table.column_names.index('row'), 'row', pa.array(row))


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
  if source.exists() or not target.exists():
    os.replace(source, target)
