"""Raw studies -> a corpus: walk, read, check, split by subject, write."""

import hashlib
import os
import pathlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from jaxmed.data import readers
from jaxmed.data.corpus import Writer, building, write_rejects
from jaxmed.data.plan import Item, Plan, given_splits, make_plan, one_line, one_split
from jaxmed.errors import UserError


def prepare(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, *, table: str | os.PathLike | None = None,
    labels_from_folders: bool = False, subject_pattern: str | None = None,
    channels: Sequence[str] | None = None, volumes: str = 'slices',
    splits: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0, max_bad: float = 0.0, overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes a corpus (see jaxmed.data.corpus) of every readable file under the inputs.

  Args:
    inputs: folders or files; the word 'demo', where nothing of that name exists, is the demo corpus.
    out: the folder to write.
    table: CSV or Parquet with a column `path` (relative to an input or to the table's folder) and optionally
      `subject`, `split` and `source`; its other columns go to the manifest. Only files that it lists are
      read.
    labels_from_folders: the name of a file's folder becomes the column `label`.
    subject_pattern: a regular expression searched in the path relative to the input; its group `subject`, or
      first group, or whole match is the subject. Without it (and without a table) the subject is the path
      without suffix, and for NIfTI the file's stem.
    channels: names for the channels of every file.
    volumes: 'slices' or 'whole'.
    splits: fractions of subjects in train, val and test, drawn by a hash of (seed, subject). Folders train,
      val and test right under an input, or the table, give splits instead.
    max_bad: fraction of files that may be unreadable.
    overwrite: replace an existing corpus.

  Returns:
    The summary: out, files, records, subjects, rejected, ignored, not_in_table, bytes, seconds; splits
    (records and subjects of each), channels, shapes and dtypes (records of each), labels (values of each text
    column).

  Raises:
    UserError: nothing to read, OUT in the way, a bad table or option, a subject in two splits, a full disk,
      too many unreadable files (OUT.rejects.csv then lists them).
  """
  begin = time.monotonic()
  options = readers.Options(_channel_names(channels), volumes)
  splits = _fractions(splits)
  if not 0 <= max_bad <= 1:
    raise UserError(f'max_bad is {max_bad}: expected a fraction between 0 and 1')
  with building(out, overwrite) as folder:
    writer = Writer(folder)
    if [str(i) for i in inputs] == ['demo'] and not os.path.exists('demo'):
      if table or labels_from_folders or subject_pattern or channels:
        raise UserError("the demo corpus takes no table, labels, subject pattern or channels: "
                        "'demo' stands alone")
      plan = _write_demo(writer)
    else:
      plan = make_plan(inputs, out, table, labels_from_folders, subject_pattern)
      _write_files(writer, plan, options, splits, seed, progress)
    total = len(plan.items) + len(plan.rejects)
    _judge(plan.rejects, total, max_bad, out, writer)
    if splits[0] > 0 and not any(r['split'] == 'train' for r in writer.rows) and not _given(plan):
      raise UserError(f'none of {len({r["subject"] for r in writer.rows})} subjects fell into train: '
                      'give more subjects, other splits or another seed')
    writer.finish(plan.rejects, plan.types)
    size = sum(f.stat().st_size for f in folder.iterdir())
  return _summary(writer.rows, plan, str(out), size, time.monotonic() - begin)


def split_of(subject: str, seed: int, splits: Sequence[float]) -> str:
  """The split of a subject: a uniform number from SHA-256 of 'seed:subject' against cumulated fractions."""
  digest = hashlib.sha256(f'{seed}:{subject}'.encode()).digest()
  u = int.from_bytes(digest[:8], 'big') / 2**64
  return 'train' if u < splits[0] else 'val' if u < splits[0] + splits[1] else 'test'


def _write_files(
    writer: Writer, plan: Plan, options: readers.Options, splits: Sequence[float], seed: int, progress: bool,
) -> None:
  given = given_splits(plan.items)
  seen: dict[str, tuple[str, str]] = {}
  read_items = []
  for item in _bar(plan.items, progress):
    try:
      digest = _sha256(item.file)
      records = list(readers.read(item.file, options))
      if not records:
        raise ValueError('holds no image')
    except Exception as e:  # decoders raise anything at all for damaged files
      plan.rejects.append((item.rel, one_line(e)))
      continue
    read_items.append(item)
    for record in records:
      subject = item.subject or record['subject']
      split = item.split or given.get(subject) or split_of(subject, seed, splits)
      one_split(seen, subject, split, item.rel)
      name = item.rel + (f'#{record["part"]}' if record['part'] else '')
      writer.add(record | {'id': name, 'subject': subject, 'source': item.source}, split, item.rel, digest,
                 item.extra)
  plan.items = read_items


def _write_demo(writer: Writer) -> Plan:
  from jaxmed.data import demo

  plan = Plan([], types={'region': pa.string()})
  for record, split, path, digest, extra in demo.records():
    writer.add(record, split, path, digest, extra)
    if not plan.items or plan.items[-1].rel != path:
      plan.items.append(Item(pathlib.Path(path), path, path, record['source'], split=split))
  return plan


def _judge(rejects, total: int, max_bad: float, out, writer: Writer) -> None:
  """Stops when more than `max_bad` of the files are unreadable; the list then lies beside OUT."""
  if rejects and (len(rejects) > max_bad * total or not writer.rows):
    listed = pathlib.Path(os.path.abspath(out))
    listed = listed.with_name(listed.name + '.rejects.csv')
    write_rejects(listed, rejects)
    path, reason = rejects[0]
    raise UserError(f'{len(rejects)} of {total} files are unreadable (max_bad {max_bad:g}), first {path}: '
                    f'{reason}; all are listed in {listed}')


def _given(plan: Plan) -> bool:
  return any(i.split for i in plan.items)


def _summary(rows, plan: Plan, out: str, size: int, seconds: float) -> dict[str, Any]:
  def per(key) -> dict[str, int]:
    return dict(sorted(Counter(key(r) for r in rows).items()))
  subjects = {(r['split'], r['subject']) for r in rows}
  text = [k for k, t in plan.types.items() if pa.types.is_string(t)]
  return {
    'out': out, 'files': len(plan.items), 'records': len(rows), 'subjects': len(subjects),
    'rejected': len(plan.rejects), 'ignored': plan.ignored, 'not_in_table': plan.not_in_table,
    'splits': {s: {'records': n, 'subjects': sum(x == s for x, _ in subjects)}
               for s, n in per(lambda r: r['split']).items()},
    'channels': dict(sorted(Counter(c for r in rows for c in r['channels']).items())),
    'shapes': per(lambda r: 'x'.join(map(str, r['shape']))), 'dtypes': per(lambda r: r['dtype']),
    'labels': {k: len({r[k] for r in rows if r.get(k) is not None}) for k in text},
    'bytes': size, 'seconds': round(seconds, 2),
  }


def _bar(items: list[Item], progress: bool) -> Iterable[Item]:
  from tqdm import tqdm

  return tqdm(items, desc='prepare', unit='file', disable=None if progress else True)


def _channel_names(channels: Sequence[str] | None) -> tuple[str, ...] | None:
  if channels is None:
    return None
  names = tuple(str(c) for c in channels)
  if not names or len(set(names)) != len(names) or not all(names):
    raise UserError(f'channels are {", ".join(names) or "empty"}: expected distinct names')
  return names


def _fractions(splits: Sequence[float]) -> tuple[float, float, float]:
  values = tuple(float(s) for s in splits)
  if len(values) != 3 or min(values) < 0 or abs(sum(values) - 1) > 1e-6:
    raise UserError(f'splits are {", ".join(map(str, splits))}: expected three fractions (train, val, test) '
                    'that sum to 1')
  return values


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
