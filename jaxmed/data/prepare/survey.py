"""What `prepare` would do, from names and headers (of slides: the coarsest level); nothing is written."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmed.data import readers
from jaxmed.data.prepare.items import Item, one_line
from jaxmed.data.prepare.preparation import Preparation, make_preparation
from jaxmed.data.readers.shaping import count
from jaxmed.errors import UserError


def survey(inputs: Sequence[str | os.PathLike], out: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Plans a corpus and counts its records. Takes the arguments of `prepare` that do not concern writing.

  Returns:
    out; formats (items of each), items, groups, files, bytes, blocks; subjects; splits (items and subjects of each);
    records (how many the headers tell of, before min_content) and untold (items cropped before they are cut); rejects
    ([path, reason] of what is known to be bad already); empty, ignored, not_in_table.

  Raises:
    UserError: as `prepare` does before it reads.
  """
  work = make_preparation(inputs, out, **options)
  plan, pairs = work.plan, _pairs(work)
  formats: Counter[str] = Counter()
  records, untold, rejects = 0 if plan.items else len(pairs), 0, list(plan.rejects)
  for item in plan.items:
    try:
      formats[_format(item)] += 1
      told = expected(item, work.options)
    except UserError:
      raise
    except Exception as e:  # decoders raise anything at all for damaged headers
      rejects.append((item.rel, one_line(e)))
      continue
    records, untold = records + (told or 0), untold + (told is None)
  return {
    'out': str(out), 'formats': dict(sorted(formats.items())), 'items': len(pairs),
    'groups': sum(i.group is not None for i in plan.items),
    'files': sum(len(i.group.files) if i.group else 1 for i in plan.items),
    'bytes': sum(i.size for i in plan.items), 'blocks': len(work.tasks),
    'subjects': len({subject for _, subject in pairs}), 'splits': _splits(pairs), 'records': records, 'untold': untold,
    'rejects': [list(r) for r in rejects], 'empty': len(plan.empty), 'ignored': plan.ignored,
    'not_in_table': plan.not_in_table,
  }


def expected(item: Item, options: readers.Options) -> int | None:
  """How many records an item gives, before `options.min_content`; None where its pixels decide that.

  Raises:
    ValueError, or whatever a decoder raises: the header is damaged.
  """
  outlines = _outlines(item, options)
  total = 0
  for record in outlines:
    number = count(record, options)
    if number is None:
      return None
    total += number
  return total


def _format(item: Item) -> str:
  """The format of an item; of parts, that of the first file."""
  way = item.parts.way if item.parts else ''
  if item.parts and way in ('member', 'signal'):
    return 'wfdb' if way == 'signal' else readers.SUFFIXES.get(item.parts.values[0], 'image')
  return item.group.kind if item.group else readers.kind(item.file)


def _outlines(item: Item, options: readers.Options) -> Iterator[readers.Record]:
  if item.group is not None:
    return readers.outline_group(item.group, options)
  return readers.outline_parts(item.parts, options) if item.parts else readers.outline(item.file, options)


def _pairs(work: Preparation) -> list[tuple[str, Any]]:
  """(split, subject) of each item; of a corpus that comes with the package, of each record."""
  made = work.tasks[0].made if work.tasks else None
  return made.pairs() if made else [(i.split or '', i.subject) for i in work.plan.items]


def _splits(pairs: list[tuple[str, Any]]) -> dict[str, dict[str, int]]:
  counts = Counter(split for split, _ in pairs)
  subjects = Counter(split for split, _ in set(pairs))
  return {s: {'items': n, 'subjects': subjects[s]} for s, n in sorted(counts.items())}
