"""Raw studies -> a corpus: walk, group, split by subject, read, check, write; in blocks, by any number of processes."""

import csv
import os
import pathlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxmed.data import readers
from jaxmed.data.corpus import corpus_format, operations
from jaxmed.data.corpus import labels as labels_lib
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import assembly, benchmarks, pool
from jaxmed.data.prepare.building import Place, building, check_free
from jaxmed.data.prepare.card import write_card
from jaxmed.data.prepare.cluster import Slurm
from jaxmed.data.prepare.preparation import Preparation, make_preparation, split_of
from jaxmed.data.prepare.walk import folders
from jaxmed.errors import UserError

__all__ = ['check_small', 'prepare', 'split_of']

# What `train --data FOLDER` prepares by itself; more is a matter for `prepare` and its options.
SMALL_BYTES, SMALL_FILES = 2 << 30, 20_000


def prepare(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, *, table: str | os.PathLike | None = None,
    labels_from_folders: bool = False, subject_pattern: str | None = None,
    channels: Sequence[str] | None = None, volumes: str = 'slices',
    splits: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0, max_bad: float = 0.0, overwrite: bool = False,
    progress: bool = True, workers: int = 1, scheduler: str | Slurm | None = None, layout: str = benchmarks.AUTO,
    labels: str | os.PathLike | None = None, **reading: Any,
) -> dict[str, Any]:
  """Writes a corpus (see jaxmed.data.corpus.corpus_format) of every readable file under the inputs.

  It grows in OUT.part. When the work is stopped, even by a kill, the same call goes on there, and the corpus has the
  same bytes as one made without a stop, by any number of processes.

  Args:
    inputs: folders or files; or a word of jaxmed.data.prepare.made, where nothing of that name exists: 'demo',
      'synthetic', 'phantoms', 'surgery' and 'one_image' (generated with `seed`), 'tissue', 'regions', 'nuclei',
      'nuclei3d'.
    out: the folder to write.
    table: CSV or Parquet with a column `path` (of a file or folder, relative to an input or to the table's folder)
      and optionally `subject`, `split` and `source`; its other columns go to the manifest. Of these, `text` goes into
      the records, too, and so do the files that `mask` (on the image's grid, brought into shape with it) and `signal`
      ([T, C], with `signal_rate` in Hz) name; cells may be empty. Only files that it lists are read.
    labels_from_folders: the name of a file's folder becomes the column `label`.
    subject_pattern: a regular expression searched in the path relative to the input; its group `subject`, or
      first group, or whole match is the subject. Without it (and without a table) the subject is the path
      without suffix, for NIfTI the file's stem, for DICOM the salted hash of the patient's identifier.
    channels: names for the channels of every file.
    volumes: 'slices' or 'whole'.
    splits: fractions of subjects in train, val and test, drawn by a hash of (seed, subject); a split with a fraction
      gets a subject where chance left it none. Folders train, val and test right under an input, or the table, give
      splits instead.
    max_bad: fraction of files that may be unreadable.
    overwrite: replace an existing corpus.
    progress: show a bar where standard error is a terminal.
    workers: processes that read. More than one needs a main module that can be imported (`if __name__ ==
      '__main__'`), as always with Python's multiprocessing.
    scheduler: address of a Dask scheduler whose workers read instead, or the SLURM jobs that do; they must see the same
      files.
    layout: of a folder of a published benchmark (see `benchmarks`), which then says channels, labels, subjects and
      splits; 'auto' looks whether the folder is one, 'none' does not. With a subject pattern splits are drawn.
    labels: JSON file with the names of the values of masks, {"1": "liver"} or {"liver": 1}; other values than these,
      0 and -1 are refused.
    reading: further fields of readers.Options; of generators the fields of their `Wanted`.

  Returns:
    The summary: out, files, records, subjects, rejected, empty (files that hold no image by their nature, and images
    and planes below min_content), ignored, others (of these, those of each suffix),
    not_in_table, groups (of the plan), blocks, bytes, seconds; splits (records and subjects of each), channels, shapes
    and dtypes (records of each), filled (pixels that were not finite), labels (values of each text column), carried
    (what may tell who somebody is), operations (of each family of surgical videos, see corpus.operations).

  Raises:
    UserError: nothing to read, OUT in the way, a bad table or option, a subject in two splits, a full disk,
      too many unreadable files (OUT.rejects.csv then lists them).
    Unavailable: a worker was killed; the same call goes on.
  """
  begin = time.monotonic()
  if not 0 <= max_bad <= 1:
    raise UserError(f'max_bad is {max_bad}: expected a fraction between 0 and 1')
  if workers < 1:
    raise UserError(f'workers is {workers}: expected a positive number')
  check_free(out, overwrite)
  work = make_preparation(
      inputs, out, table=table, labels_from_folders=labels_from_folders, subject_pattern=subject_pattern,
      channels=channels, volumes=volumes, splits=splits, seed=seed, layout=layout, labels=labels, **reading)
  with building(out, overwrite, work.fingerprint()) as place:
    if not place.finished:
      shutil.rmtree(place.blocks / 'tmp', ignore_errors=True)  # of processes that were killed
      with pool.put_off() as signals:
        pool.run(work.tasks, place.blocks, workers, progress, scheduler, signals)
        _finish(work, place, out, max_bad)
  return _summary(pathlib.Path(out), work, time.monotonic() - begin)


def check_small(folder: str | os.PathLike) -> None:
  """Raises a UserError where a folder holds more than is prepared without being asked."""
  size = 0
  for count, path in enumerate(_files(folder) if os.path.isdir(folder) else (), 1):
    size += os.path.getsize(path) if os.path.exists(path) else 0
    if size > SMALL_BYTES or count > SMALL_FILES:
      raise UserError(f'{folder} is no corpus and too large to be prepared on the way (more than '
                      f'{SMALL_BYTES >> 30} GB or {SMALL_FILES:,} files): jaxmed prepare {folder} --out CORPUS '
                      'makes one')


def _files(folder: str | os.PathLike) -> Iterator[str]:
  """The files under a folder, those of folder formats included."""
  for found in folders(folder):
    yield from (os.path.join(found.path, name) for name in found.files)
    for whole in found.whole:
      yield from (os.path.join(at, n) for at, _, names in os.walk(os.path.join(found.path, whole)) for n in names)


def _finish(work: Preparation, place: Place, out, max_bad: float) -> None:
  """From finished blocks to a whole corpus in `place.corpus`."""
  plan, tasks = work.plan, work.tasks
  table = assembly.rows(tasks, place)
  facts = assembly.facts(tasks, place)
  late = [(path, reason) for fact in facts for path, reason in fact['rejects']]
  empty = [(path, reason) for fact in facts for path, reason in fact['empty']]
  rejects = plan.rejects + late
  _judge(rejects, len(plan.items) + len(plan.rejects), len(table), max_bad, out, len(empty))
  work.check_train(set(zip(table['subject'].to_pylist(), table['split'].to_pylist())))
  assembly.write(tasks, place, table, rejects + plan.empty + empty, plan.labels)
  _warn_of_classes(table, plan.labels)
  write_card(place.corpus, open_source(place.corpus), len(rejects), work.carried(), plan.note)


def _warn_of_classes(table: pa.Table, names: Mapping[int, str]) -> None:
  """Says which classes of masks have no voxel in the train split, where there is one."""
  if labels_lib.VALUES not in table.column_names:
    return
  values = lambda rows: set(pc.unique(pc.list_flatten(rows[labels_lib.VALUES])).to_pylist())
  train = table.filter(pc.equal(table['split'], 'train'))
  lost = sorted((values(table) | set(names)) - values(train) - {labels_lib.ABSENT, labels_lib.BACKGROUND})
  if len(train) and lost:
    told = ', '.join(f'{v} ({names[v]})' if v in names else str(v) for v in lost[:10])
    more = f' and {len(lost) - 10} more' if len(lost) > 10 else ''
    print(f'jaxmed: no mask of split train holds {told}{more}: nothing can be learned of '
          f'{"it" if len(lost) == 1 else "them"}', file=sys.stderr, flush=True)


def _judge(rejects: list[tuple[str, str]], total: int, records: int, max_bad: float, out, empty: int) -> None:
  """Stops when more than `max_bad` of the files are unreadable; the list then lies beside OUT."""
  if not records and not rejects:
    wanted = ' with the content that min_content wants' if empty else ''
    raise UserError(f'none of the files found holds an image{wanted}')
  if rejects and (len(rejects) > max_bad * total or not records):
    listed = pathlib.Path(os.path.abspath(out))
    listed = listed.with_name(listed.name + '.rejects.csv')
    corpus_format.write_rejects(listed, rejects)
    path, reason = rejects[0]
    raise UserError(f'{len(rejects)} of {total} files are unreadable (max_bad {max_bad:g}), first {path}: '
                    f'{reason}; all are listed in {listed}')


def _summary(out: pathlib.Path, work: Preparation, seconds: float) -> dict[str, Any]:
  plan = work.plan
  table = pq.read_table(out / corpus_format.MANIFEST)
  with open(out / 'rejects.csv', newline='', encoding='utf-8') as f:
    reasons = [row[1] for row in csv.reader(f)][1:]
  empty = sum(r.startswith((readers.NO_IMAGE, readers.NO_CONTENT)) for r in reasons)
  def per(values) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))

  subjects = Counter(split for split, _ in set(zip(table['split'].to_pylist(), table['subject'].to_pylist())))
  text = [k for k, t in plan.types.items() if pa.types.is_string(t) and k not in corpus_format.fields_of(plan.types)]
  return {
    'out': str(out), 'files': pc.count_distinct(table['path']).as_py(), 'records': len(table),
    'subjects': sum(subjects.values()), 'rejected': len(reasons) - empty, 'empty': empty, 'ignored': plan.ignored,
    'others': per(Counter(plan.others).elements()),
    'groups': sum(i.group is not None for i in plan.items),
    'not_in_table': plan.not_in_table, 'blocks': len(work.tasks),
    'splits': {s: {'records': n, 'subjects': subjects[s]} for s, n in per(table['split'].to_pylist()).items()},
    'channels': per(pc.list_flatten(table['channels']).to_pylist()),
    'shapes': per('x'.join(map(str, shape)) for shape in table['shape'].to_pylist()),
    'dtypes': per(table['dtype'].to_pylist()),
    'filled': (pc.sum(table['nan_filled']).as_py() or 0) if 'nan_filled' in table.column_names else 0,
    'labels': {k: pc.count_distinct(table[k]).as_py() for k in text},
    'carried': {k: v for k, v in work.carried().items() if k in table.column_names},
    'operations': operations.counted(table[operations.COLUMN].unique().to_pylist()
                                     if operations.COLUMN in table.column_names else ()),
    'bytes': sum(f.stat().st_size for f in out.iterdir()), 'seconds': round(seconds, 2),
  }
