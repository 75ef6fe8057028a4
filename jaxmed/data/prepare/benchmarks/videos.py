"""What layouts of surgical video share: tables of frames, spans of labels, items of videos and of single frames.

Labels are names, never the integers of a file, whose order differs from code to code. The column `video` is the id of
an operation, the same in every set that was cut from it (see jaxmed.data.corpus.operations), and so is the subject:
splits are by operation. Several names of a frame stand as `a|b`.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from jaxmed.data.prepare.items import Item, Plan, one_line
from jaxmed.data.prepare.spreadsheet import raw_bytes, text
from jaxmed.data.prepare.walk import files_under
from jaxmed.data.readers import Masks, Parts
from jaxmed.errors import UserError, choose
from jaxmed.files import text_of

CHANNELS = ('R', 'G', 'B')
SEPARATOR = '|'
TOOLS = ('Grasper', 'Bipolar', 'Hook', 'Scissors', 'Clipper', 'Irrigator', 'SpecimenBag')
_NUMBERS = {'frame_seconds': pa.float64()}

Span = tuple[float, float, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """A layout of a file that holds several: what a module of `benchmarks` has."""

  here: Callable[[pathlib.Path], bool]
  plan: Callable[[pathlib.Path], Plan]
  EXPECTED: str


def typed(*columns: str, images: bool = False) -> Plan:
  """An empty plan with columns of text; of single images they have `frame_seconds`, too, which videos have anyway."""
  return Plan([], types=dict.fromkeys(('video', *columns), pa.string()) | (_NUMBERS if images else {}))


def near(root: pathlib.Path, *patterns: str) -> bool:
  """Whether a path that fits one of some patterns lies in a folder, or in a folder of it."""
  return any(True for at in ('', '*/') for pattern in patterns for _ in root.glob(at + pattern))


def found(root: pathlib.Path, pattern: str) -> list[tuple[pathlib.Path, re.Match]]:
  """Files under a root whose path below it, with slashes, ends in a pattern, ignoring case, each with its match."""
  wanted = re.compile(rf'(?:^|.*/){pattern}', re.IGNORECASE)
  matches = ((root / path, wanted.fullmatch(path.as_posix())) for path in files_under(root).files.values())
  return [(path, match) for path, match in matches if match]


def cells(path: pathlib.Path, delimiters: str = '\t,') -> list[list[str]]:
  """The rows of a text table, stripped; the first of the delimiters that its first line holds parts them.

  Raises:
    UserError: no such file, empty, no text.
  """
  content, _ = text(path, raw_bytes(path))
  lines = [line for line in content.splitlines() if line.strip()]
  by = next((d for d in delimiters if d in lines[0]), None)
  return [[cell.strip() for cell in line.split(by)] for line in lines]


def numbered(path: pathlib.Path, rows: Sequence[Sequence[str]], rate: float = 1.0, header: bool = True,
             ) -> list[tuple[float, Sequence[str]]]:
  """(seconds, further cells) of the rows of a table whose first cell is the number of a frame.

  header: whether the first row may be names of columns.

  Raises:
    UserError: a first cell that is no number, frames out of order, no row.
  """
  out: list[tuple[float, Sequence[str]]] = []
  for number, row in enumerate(rows, 1):
    if not re.fullmatch(r'\d+(\.0+)?', row[0]):
      if number == 1 and header:
        continue
      raise UserError(f'{path}: row {number} begins with {row[0]!r}: expected the number of a frame')
    seconds = float(row[0]) / rate
    if out and seconds <= out[-1][0]:
      raise UserError(f'{path}: frames are out of order: {row[0]} in row {number} comes after {out[-1][0] * rate:.0f}')
    out.append((seconds, row[1:]))
  if not out:
    raise UserError(f'{path} lists no frame: expected rows of a frame and its labels')
  return out


def told(path: pathlib.Path, what: str, name: str, names: Iterable[str]) -> str:
  """A name, which must be one of some; the UserError says where it stands."""
  return choose(f'{what} in {path}', name, names)


def spans(rows: Sequence[tuple[float, dict[str, Any]]], step: float) -> list[Span]:
  """Spans of equal columns, of rows (seconds, columns) that hold until the next one; the last for one step and another,
  as tables of videos may lack a last row."""
  out: list[Span] = []
  for k, (seconds, columns) in enumerate(rows):
    end = rows[k + 1][0] if k + 1 < len(rows) else seconds + 2 * step
    if out and out[-1][2] == columns and abs(out[-1][1] - seconds) < 1e-6:
      out[-1] = (out[-1][0], end, columns)
    else:
      out.append((seconds, end, columns))
  return out


def laid_over(segments: Sequence[tuple[float, float, Mapping[str, str]]], columns: Sequence[str]) -> list[Span]:
  """Disjoint spans of segments (begin, end, names) that may overlap: each column has the names of all that cover it, in
  their order, and `segments` has them as JSON [[begin, end, names ...], ...], so that none is lost."""
  edges = sorted({time for begin, end, _ in segments for time in (begin, end)})
  out: list[Span] = []
  for begin, end in zip(edges, edges[1:]):
    over = [s for s in segments if s[0] <= begin and s[1] >= end]
    if over:
      names = {c: SEPARATOR.join(dict.fromkeys(s[2][c] for s in over)) for c in columns}
      whole = json.dumps([[s[0], s[1], *(s[2][c] for c in columns)] for s in over])
      out.append((begin, end, names | {'segments': whole}))
  return out


def merged(first: Sequence[Span], second: Sequence[Span]) -> tuple[Span, ...]:
  """Spans of two tables of a video as one list in order of begin, each with the columns of both."""
  edges = sorted({time for span in (*first, *second) for time in span[:2]})
  out: list[Span] = []
  at = [0, 0]
  for begin, end in zip(edges, edges[1:]):
    columns: dict[str, Any] = {}
    for which, some in enumerate((first, second)):
      while at[which] < len(some) and some[at[which]][1] <= begin:
        at[which] += 1
      if at[which] < len(some) and some[at[which]][0] <= begin:
        columns |= some[at[which]][2]
    if columns:
      out.append((begin, end, columns))
  return tuple(out)


def present(flags: Sequence[str], names: Sequence[str], path: pathlib.Path) -> str:
  """The names whose flags are 1, as 'a|b'; a UserError for other flags than 0 and 1, or another number of them."""
  if len(flags) != len(names):
    raise UserError(f'{path}: a row has {len(flags)} flags: expected {len(names)} ({", ".join(names)})')
  for flag in flags:
    choose(f'flag in {path}', flag, ('0', '1'))
  return SEPARATOR.join(name for name, flag in zip(names, flags) if flag == '1')


def add(plan: Plan, root: pathlib.Path, file: pathlib.Path, make: Callable[[], Item]) -> None:
  """Adds an item; where its tables are damaged it is a reject, and the others stay."""
  try:
    plan.items.append(make())
  except UserError as e:
    plan.rejects.append((text_of(file.relative_to(root).as_posix()), one_line(ValueError(str(e)))))


def video(root: pathlib.Path, file: pathlib.Path, operation: str, labels: Sequence[Span], until: float = 0.0,
          split: str | None = None, **extra: Any) -> Item:
  """The item of a video whose frames have labels; `until` is how long its annotation goes on, in seconds."""
  rel = text_of(file.relative_to(root).as_posix())
  parts = Parts((file,), CHANNELS, 'video', spans=tuple(labels), until=until)
  return Item(file, rel, rel, operation.partition('/')[0], subject=operation, split=split,
              extra={'video': operation} | extra, parts=parts)


def frame(root: pathlib.Path, file: pathlib.Path, operation: str, seconds: float | None, split: str | None = None,
          mask: pathlib.Path | Masks | None = None, **extra: Any) -> Item:
  """The item of a single frame of a video."""
  rel = text_of(file.relative_to(root).as_posix())
  at = mask.files[0] if isinstance(mask, Masks) else mask
  beside = {'mask': text_of(at.relative_to(root).as_posix())} if at else {}
  return Item(file, rel, rel, operation.partition('/')[0], subject=operation, split=split,
              extra={'video': operation, 'frame_seconds': seconds} | beside | extra, mask=mask)


def part_of(number: int, splits: Mapping[str, Iterable[int]]) -> str | None:
  """The split whose numbers hold one, None where none does."""
  return next((name for name, numbers in splits.items() if number in numbers), None)
