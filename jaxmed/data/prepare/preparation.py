"""The plan of a corpus with everything that can be decided before a pixel is read: options, splits, blocks."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmed.data import readers
from jaxmed.data.corpus import corpus_format, store
from jaxmed.data.corpus import labels as labels_lib
from jaxmed.data.corpus.corpus_format import SPLITS
from jaxmed.data.prepare import benchmarks, blocks
from jaxmed.data.prepare import made as made_lib
from jaxmed.data.prepare.items import Item, Plan, given_splits
from jaxmed.data.prepare.plan import make_plan
from jaxmed.errors import UserError, choose
from jaxmed.version import __version__


@dataclasses.dataclass(frozen=True)
class Preparation:
  """What `prepare` will do.

  Attributes:
    plan: what is read; each item has subject and split.
    tasks: the plan in blocks.
    options: of the readers.
    shares: fractions of subjects in train, val and test.
  """

  plan: Plan
  tasks: list[blocks.Task]
  options: readers.Options
  shares: tuple[float, float, float]

  def fingerprint(self) -> str:
    """A hash of all that the corpus follows from: files by name, size and time, options, and how it is cut."""
    plan = self.plan
    told: list[Any] = [task.made.identity() for task in self.tasks if task.made]
    told += [__version__, dataclasses.asdict(self.options), {k: str(t) for k, t in plan.types.items()}, plan.rejects,
             sorted(plan.labels.items()),
             plan.empty, store.CHUNK_BYTES, store.EDGE, corpus_format.SHARD_BYTES]
    for task in self.tasks:
      told.append([[i.rel, i.subject, i.split, i.source, i.extra, i.size, i.stamp, *_of_parts(i)] for i in task.items])
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

  def carried(self) -> dict[str, str]:
    """{column of the manifest: what of it may tell who somebody is}, as far as `prepare` can know."""
    items, types = self.plan.items, self.plan.types
    hashed = [i for i in items if i.group is not None and i.subject == i.group.subject]
    salted = 'salted' if self.options.salt else 'not salted: who knows an identifier can look for it'
    out = {'subject': f"hash of the patient's identifier, {salted}"} if hashed else {}
    if len(hashed) < len(items):
      given = 'as the table, the pattern or the file names say'
      out['subject'] = f'{out["subject"]}; else {given}' if hashed else given
    if any(i.group is None for i in items):
      out |= dict.fromkeys(('id', 'path'), 'names of files and folders, except of DICOM')
    if any(i.group is not None for i in items):
      out['site'] = f"hash of the institution's name, {salted}"
    told = {'text': 'free text, in the records too', 'mask': 'name of a file', 'signal': 'name of a file'}
    return out | {k: told.get(k, 'as the table or the folders say') for k in (types if items else ())}

  def check_train(self, pairs: set[tuple[Any, Any]]) -> None:
    """Raises a UserError where chance left train without a subject; pairs are (subject, split)."""
    if pairs and self.shares[0] > 0 and not self.plan.given and not any(split == 'train' for _, split in pairs):
      raise UserError(f'none of {len(pairs)} subjects fell into train: give more subjects, other splits or another '
                      'seed')


def _of_parts(item: Item) -> list[Any]:
  """How channels and mask of an item lie in its files, for the fingerprint."""
  parts, mask = item.parts, item.mask
  masks: list[Any] = []
  if isinstance(mask, readers.Masks):
    masks = [mask.values, mask.absent, sorted(mask.codes.items()), [f.name for f in mask.files]]
  return masks + ([parts.way, parts.channels, parts.width, parts.rows, parts.spans, parts.until,
                   [f.name for f in parts.files]] if parts else [])


def make_preparation(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, *, table: str | os.PathLike | None = None,
    labels_from_folders: bool = False, subject_pattern: str | None = None, channels: Sequence[str] | None = None,
    volumes: str = 'slices', splits: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0, layout: str = benchmarks.AUTO,
    labels: str | os.PathLike | None = None, **reading: Any,
) -> Preparation:
  """Walks the inputs and reads headers of files that are grouped. See `prepare` for the arguments.

  Raises:
    UserError: nothing to read, a bad table or option, a subject in two splits.
  """
  given = {name: reading.pop(name) for name in made_lib.OPTIONS if name in reading}
  options = _options(channels, volumes, reading)
  shares = _fractions(splits)
  others = {'--table': table, '--labels-from-folders': labels_from_folders, '--subject-pattern': subject_pattern,
            '--channels': channels, '--labels': labels}
  if made := made_lib.of(made_of(inputs), seed, volumes, given, [name for name, value in others.items() if value]):
    plan = Plan([], types=made.types, given=True, note=made.note, labels=made.labels)
    return Preparation(plan, [blocks.Task(0, (), options, plan.types, made, made.labels)], options, shares)
  plan = make_plan(inputs, out, table, labels_from_folders, subject_pattern, options, layout)
  if labels is not None:
    plan.labels = _named(pathlib.Path(labels), plan)
  given = given_splits(plan.items)
  plan.given = any(i.split for i in plan.items)
  subject = lambda i: i.subject or ''
  drawn = splits_of({subject(i) for i in plan.items if not i.split}, seed, _open(shares, plan.tested),
                    fill=plan.fill or not plan.given)
  plan.items = [dataclasses.replace(i, split=i.split or given.get(subject(i)) or drawn[subject(i)])
                for i in plan.items]
  work = Preparation(plan, blocks.cut(plan.items, options, plan.types, plan.labels), options, shares)
  work.check_train({(i.subject, i.split) for i in plan.items})
  return work


def _named(path: pathlib.Path, plan: Plan) -> dict[int, str]:
  """The names that a file gives to the values of masks; a UserError where the layout says them, or there is no mask."""
  if plan.labels:
    raise UserError(f'--labels {path}: the layout names the values of its masks itself: leave --labels out')
  if 'mask' not in plan.types:
    raise UserError(f'--labels {path} names values of masks, and there are none: give a table with a column mask')
  return labels_lib.read(path)


def split_of(subject: str, seed: int, splits: Sequence[float]) -> str:
  """The split of a subject: a uniform number from SHA-256 of 'seed:subject' against cumulated fractions."""
  u = _number(subject, seed)
  return 'train' if u < splits[0] else 'val' if u < splits[0] + splits[1] else 'test'


def splits_of(subjects: Iterable[str], seed: int, splits: Sequence[float], fill: bool = True) -> dict[str, str]:
  """The split of each subject, as `split_of` says.

  With `fill` chance leaves no split empty whose fraction is not 0, where there are as many subjects as such splits: it
  gets the subject whose number is nearest to its own ones, of a split that has others.
  """
  found = {subject: split_of(subject, seed, splits) for subject in subjects}
  ends = (0.0, splits[0], splits[0] + splits[1], 1.0)
  wanted = {name: ends[k:k + 2] for k, name in enumerate(SPLITS) if splits[k] > 0}
  if not fill or len(found) < len(wanted):
    return found
  count = Counter(found.values())
  for name, (low, high) in wanted.items():
    if not count[name]:
      free = [s for s, split in found.items() if count[split] > 1 or split not in wanted]
      numbers = {s: _number(s, seed) for s in free}
      moved = min(free, key=lambda s: (max(low - numbers[s], numbers[s] - high), s))
      count[found[moved]] -= 1
      count[name] += 1
      found[moved] = name
  return found


def _open(shares: tuple[float, float, float], tested: bool) -> tuple[float, float, float]:
  """The fractions to draw by; where the test split is given, those of train and val alone."""
  rest = shares[0] + shares[1]
  return (shares[0] / rest, shares[1] / rest, 0.0) if tested and rest else shares


def _number(subject: str, seed: int) -> float:
  """A number in [0, 1), uniform over subjects."""
  digest = hashlib.sha256(f'{seed}:{subject}'.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def made_of(inputs: Sequence[str | os.PathLike]) -> str:
  """The word of `made` that stands for a corpus, '' for folders and files."""
  word = str(inputs[0]) if len(inputs) == 1 else ''
  return word if word in made_lib.WORDS and not os.path.exists(word) else ''


def _options(channels: Sequence[str] | None, volumes: str, reading: dict[str, Any]) -> readers.Options:
  names = [f.name for f in dataclasses.fields(readers.Options)]
  for name in reading:
    choose('option of prepare', name, names)
  return readers.Options(_channel_names(channels), volumes, **reading)


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
