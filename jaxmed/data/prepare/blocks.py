"""Blocks: pieces of a plan that are read, written and counted on their own, in any order, by any number of processes,
and never twice.

A finished block is a folder `00042` with its shards, rows.parquet, stats.npz and block.json. It is made aside and
renamed, so a block that is there is whole. What is in it follows from its items alone.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed import files
from jaxmed.data import readers
from jaxmed.data.corpus import labels
from jaxmed.data.corpus.corpus_format import BESIDE, COLUMNS, Writer, fields_of
from jaxmed.data.prepare.items import Item, one_line, paths
from jaxmed.data.prepare.made import Made
from jaxmed.data.readers import signals
from jaxmed.data.readers.companions import read_signal
from jaxmed.errors import UserError

# A block holds a 32nd of the bytes to read, within these bounds, and at least one item: small corpora are not torn into
# tiny shards, and blocks of large ones fill shards of SHARD_BYTES.
BLOCK_BYTES = (32 << 20, 256 << 20)
BLOCKS = 32
# Records of an item are held back until it is read whole, or until they take this much.
HELD_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Task:
  """One block to do.

  Attributes:
    number: its place in the plan.
    items: to read; each has subject and split.
    options: of the readers.
    types: the manifest's other columns.
    made: the corpus, where it has no items; or None.
    labels: {value of masks: name}; {} allows all values.
  """

  number: int
  items: tuple[Item, ...]
  options: readers.Options = readers.DEFAULT
  types: dict[str, pa.DataType] = dataclasses.field(default_factory=dict)
  made: Made | None = None
  labels: dict[int, str] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """Of its folder."""
    return f'{self.number:05d}'


def cut(items: Sequence[Item], options: readers.Options, types: dict[str, pa.DataType],
        names: dict[int, str] | None = None) -> list[Task]:
  """Cuts a plan into blocks, in its order; where is a function of the sizes of its files alone."""
  low, high = BLOCK_BYTES
  limit = min(max(sum(i.size for i in items) // BLOCKS, low), high)
  blocks: list[list[Item]] = []
  size = 0
  for item in items:
    if not blocks or size + item.size > limit:
      blocks.append([])
      size = 0
    blocks[-1].append(item)
    size += item.size
  return [Task(i, tuple(block), options, types, labels=names or {}) for i, block in enumerate(blocks)]


def schema(types: dict[str, pa.DataType]) -> pa.Schema:
  """The columns of a block's rows: manifest, plan and readers.META."""
  meta = {k: t for k, t in readers.META.items() if k not in types}
  masks = labels.COLUMNS if 'mask' in types else {}
  return pa.schema([*COLUMNS, *types.items(), *masks.items(), *meta.items()])


def write(task: Task, folder: pathlib.Path, tick: Callable[[int], Any] = lambda n: None) -> None:
  """Does a block, unless `folder` has it already.

  Args:
    task: the block.
    folder: where finished blocks lie; `folder/tmp` is for unfinished ones.
    tick: called with the number of items that are done since the last call.

  Raises:
    UserError: a package that reads a format is not installed. OSError, RuntimeError: the place cannot be written.
  """
  if (folder / task.name).exists():
    tick(len(task.items))
    return
  part = folder / 'tmp' / f'{task.name}-{uuid.uuid4().hex}'
  late: dict[str, str] = {}
  while True:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
      rejects = _made(task.made, task, part) if task.made else _items(task, part, late, tick)
      break
    except _Late as e:
      late[e.rel] = e.reason
  files.write_json(part / 'block.json', rejects)
  _flush(part)
  try:
    os.rename(part, folder / task.name)
  except OSError:
    if not (folder / task.name).exists():  # another process may have finished it, with the same bytes
      raise
    shutil.rmtree(part, ignore_errors=True)


class _Late(Exception):
  """An item failed after some of its records were written: the block is done again without it."""

  def __init__(self, rel: str, reason: str):
    super().__init__(rel, reason)
    self.rel, self.reason = rel, reason


def _items(task: Task, part: pathlib.Path, late: dict[str, str], tick: Callable[[int], Any]) -> dict[str, Any]:
  writer = Writer(part, task.number, fields_of(task.types))
  rejects: list[tuple[str, str]] = []
  empty: list[tuple[str, str]] = []
  try:
    for item in task.items:
      reason = late.get(item.rel) or _one(item, task, writer, empty)
      if reason:
        rejects.append((item.rel, reason))
      if not late:
        tick(1)
  finally:
    writer.close()
  return _rows(writer, task, rejects, empty)


def _one(item: Item, task: Task, writer: Writer, empty: list[tuple[str, str]]) -> str | None:
  """Reads an item and writes its records; returns why it cannot be read, or None. `empty` gets records left out."""
  held: list[readers.Record] = []
  digest: str | None = None
  beside: dict[str, Any] = {}
  begun, size = False, 0
  rows = hashlib.sha256() if item.parts is not None and item.parts.rows is not None else None  # hashed as they are read
  source = _records(item, task.options, rows)
  while True:
    try:
      if digest is None:
        digest, beside = '' if rows else sha256(item), _beside(item, task.options.signals)
      record = _counted(next(source, None), task.labels)
      if record is None and not (begun or held):
        raise ValueError('holds no image')
      if rows and not digest and record is None:
        digest = rows.hexdigest()
      elif rows and not digest and record and size + record['image'].nbytes > HELD_BYTES:  # needed before the end
        digest = sha256(item)
    except UserError:
      raise
    except Exception as e:  # decoders raise anything at all for damaged files
      reason = one_line(e)
      if begun:
        raise _Late(item.rel, reason) from e
      return reason
    if record is not None:
      held.append(record)
      size += record['image'].nbytes
    if record is None or size > HELD_BYTES:
      for kept in held:
        _add(kept | beside, item, digest or '', task, writer, empty)
      begun, held, size = True, [], 0
    if record is None:
      return None


def _counted(record: readers.Record | None, names: Mapping[int, str]) -> readers.Record | None:
  """The record with `mask_counts`, where it has a mask.

  Raises:
    ValueError: a value that no class can have, or that `names` lack.
  """
  if record is None or 'mask' not in record:
    return record
  counts = labels.counted(record['mask'])
  for value in counts:
    if value < labels.ABSENT:
      raise ValueError(f'mask: holds the value {value}: expected 0 and more, or -1 for pixels that it says nothing of')
    if names and value not in names and value not in (labels.ABSENT, labels.BACKGROUND):
      raise ValueError(f'mask: holds the value {value}, which the labels do not name: expected '
                       f'{", ".join(map(str, names))}')
  return record | {'mask_counts': counts}


def _records(item: Item, options: readers.Options, rows: Any = None) -> Iterator[readers.Record]:
  """The records of an item; where it is rows of a file, their bytes go into the hash `rows`."""
  if item.group is not None:
    yield from readers.read_group(item.group, options, item.mask)
  elif item.parts is not None:
    yield from readers.read_parts(item.parts, options, item.mask, rows)
  else:
    yield from readers.read(item.file, options, item.mask)


def _beside(item: Item, steps: str) -> dict[str, Any]:
  """What a table lays beside an image, for each of its records."""
  out = {'text': item.extra['text']} if isinstance(item.extra.get('text'), str) else {}
  if item.signal is not None:
    signal, rate = read_signal(item.signal)
    rate = item.extra.get('signal_rate') or rate
    if steps:
      signal, rate = signals.apply(signal, rate, signals.parse(steps))
    out |= {'signal': signal, 'signal_rate': rate}
  return out


def _add(record: readers.Record, item: Item, digest: str, task: Task, writer: Writer, empty: list) -> None:
  name = item.rel + (f'#{record["part"]}' if record['part'] else '')
  content = record.get('content', 1.0)
  if content < task.options.min_content:
    empty.append((name, f'{readers.NO_CONTENT}{100 * content:.2g} % of its pixels are not background'))
    return
  meta = {k: v for k, v in record.get('meta', {}).items() if k not in task.types}
  unknown = sorted(set(meta) - set(readers.META))
  if unknown:
    raise RuntimeError(f'the reader of {item.rel} gives {unknown[0]!r}, which readers.META does not know')
  told = dict(record.get('told', {}))  # of this image alone
  own = {'id': name, 'subject': told.pop('subject', item.subject), 'source': item.source}
  writer.add(record | own, item.split or '', item.rel, digest, item.extra | told | meta)


def _made(made: Made, task: Task, part: pathlib.Path) -> dict[str, Any]:
  writer = Writer(part, task.number, fields_of(task.types))
  try:
    for record, split, path, digest, extra in made.records():
      writer.add(_counted(record, task.labels) or record, split, path, digest, extra)
  finally:
    writer.close()
  return _rows(writer, task, [], [])


def _rows(writer: Writer, task: Task, rejects: list[tuple[str, str]], empty: list[tuple[str, str]]) -> dict[str, Any]:
  """Writes rows and statistics of a closed writer; returns what block.json says."""
  columns = schema(task.types)
  arrays = [pa.array([r.get(f.name) for r in writer.rows], type=f.type) for f in columns]
  pq.write_table(pa.Table.from_arrays(arrays, schema=columns), writer.folder / 'rows.parquet')
  writer.stats.save(writer.folder / 'stats.npz')
  beside = {s: [[k for k in BESIDE if writer.part(f'{s}-{k}', i).exists()] for i in range(len(n))]
            for s, n in writer.shards.items()}
  return {'shards': writer.shards, 'beside': beside, 'rejects': rejects, 'empty': empty}


def _flush(folder: pathlib.Path) -> None:
  """Has the disk take what a rename will call whole."""
  for path in [*folder.iterdir(), folder]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def sha256(item: Item) -> str:
  """The SHA-256 of a file; for several files, of their hexadecimal hashes in order; for rows, of their bytes."""
  if item.parts is not None and item.parts.rows is not None:
    return readers.digest_rows(item.parts)
  digests = []
  for path in paths(item):
    with open(path, 'rb') as f:
      digests.append(hashlib.file_digest(f, 'sha256').hexdigest())
  return digests[0] if len(digests) == 1 else hashlib.sha256(''.join(digests).encode()).hexdigest()
