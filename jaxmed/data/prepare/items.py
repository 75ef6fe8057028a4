"""What there is to read: an item a file, folder format or group of files, and the plan that lists them."""

import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from jaxmed.data.readers import Group, Masks, Parts
from jaxmed.errors import UserError
from jaxmed.files import shown


@dataclasses.dataclass(frozen=True)
class Item:
  """A file, folder format or group to read, with the facts known before reading.

  Attributes:
    file: where it lies: a file, a folder that is one image, or the first file of a group.
    rel: its name in the corpus (manifest column `path`), unique; bytes that are not UTF-8 as files.text_of has them.
    inner: its path below its input.
    source: the name of the input folder, or what the table says.
    subject: None while nothing was said.
    split: the split that a table or a folder gives, or None.
    extra: values of the manifest's other columns.
    input: the name of the input that it was found in, '' for none.
    group: the files to read together, or None.
    size: bytes of its files.
    stamp: when they were last changed, in nanoseconds.
    mask: the file of its mask, or how that lies in files, or None.
    signal: the file of its signal, or None.
    parts: how its channels lie in files, where a layout says so, or None.
  """

  file: pathlib.Path
  rel: str
  inner: str
  source: str
  subject: str | None = None
  split: str | None = None
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)
  input: str = ''
  group: Group | None = None
  size: int = 0
  stamp: int = 0
  mask: pathlib.Path | Masks | None = None
  signal: pathlib.Path | None = None
  parts: Parts | None = None


@dataclasses.dataclass
class Plan:
  """What to read, in order.

  Attributes:
    items: files, folder formats and groups.
    ignored: number of files found that no reader takes.
    others: {suffix: number} of these, '' for names without one.
    not_in_table: number of readable files found that the table does not list.
    types: the manifest's other columns.
    rejects: (path, reason) of files that are already known to be bad.
    empty: (path, reason) of files that hold no image by their nature, such as reports.
    given: a table or folders give splits.
    note: what the card must say of it.
    labels: {value of masks: name}; {} where nobody names them.
    tested: the test split is given whole, so that no other subject is drawn into it.
    fill: chance leaves no split empty among the items without one, though others have one.
  """

  items: list[Item]
  ignored: int = 0
  others: dict[str, int] = dataclasses.field(default_factory=dict)
  not_in_table: int = 0
  types: dict[str, pa.DataType] = dataclasses.field(default_factory=dict)
  rejects: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  empty: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  given: bool = False
  note: str = ''
  labels: dict[int, str] = dataclasses.field(default_factory=dict)
  tested: bool = False
  fill: bool = False


def paths(item: Item) -> list[pathlib.Path]:
  """The files of an item, in reading order; the files of a folder format are sorted."""
  if item.group is not None:
    return list(item.group.files)
  if item.parts is not None:
    return list(item.parts.files)
  if item.file.is_dir():
    return sorted(pathlib.Path(folder, n) for folder, _, names in os.walk(item.file) for n in names)
  return [item.file]


def beside(item: Item) -> list[pathlib.Path]:
  """The files of its mask and signal."""
  masks = item.mask.files if isinstance(item.mask, Masks) else (item.mask,)
  return [path for path in (*masks, item.signal) if path is not None]


def measured(plan: Plan) -> Plan:
  """The plan whose items have size and stamp, mask and signal included; a file that went away has none, a size that is
  known already stays. An item of which a part is no regular file, such as a FIFO, becomes a reject: it is not opened.
  """
  items = []
  for item in plan.items:
    stats, odd = [], None
    for path in [*paths(item), *beside(item)] if not item.size else ():
      try:
        found = path.stat()
      except OSError:  # reading it will tell
        continue
      odd = odd or (None if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) else path)
      stats.append(found)
    if odd:
      plan.rejects.append((item.rel, one_line(ValueError(f'{odd.name} is no regular file'))))
    else:
      items.append(dataclasses.replace(item, size=item.size or sum(s.st_size for s in stats), stamp=item.stamp or max(
        (s.st_mtime_ns for s in stats), default=0)))
  plan.items = items
  return plan


def one_split(seen: dict[str, tuple[str, str]], subject: str, split: str, rel: str) -> None:
  """Notes the split of a subject; a UserError names a subject that has another one already."""
  first, where = seen.setdefault(subject, (split, rel))
  if first != split:
    raise UserError(f'subject {subject!r} is in two splits: {first} ({where}) and {split} ({rel})')


def given_splits(items: Iterable[Item]) -> dict[str, str]:
  """{subject: split} where a table or folders give one.

  Raises:
    UserError: a subject that has two.
  """
  seen: dict[str, tuple[str, str]] = {}
  for item in items:
    if item.split and item.subject:
      one_split(seen, item.subject, item.split, item.rel)
  return {subject: split for subject, (split, _) in seen.items()}


def joined(inputs: Sequence[str | os.PathLike]) -> str:
  """Inputs as words."""
  return ', '.join(str(i) for i in inputs)


def one_line(error: BaseException) -> str:
  """An error as one line, with its kind unless it is a plain ValueError."""
  text = shown(' '.join(str(error).split())) or type(error).__name__
  return text if isinstance(error, ValueError) else f'{type(error).__name__}: {text}'
