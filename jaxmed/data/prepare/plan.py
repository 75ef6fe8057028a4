"""What `prepare` will read, and all that can be known, and refused, before a pixel is read."""

import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Sequence

import pyarrow as pa

from jaxmed.data import readers
from jaxmed.data.prepare import benchmarks
from jaxmed.data.prepare.grouping import grouped
from jaxmed.data.prepare.items import Item, Plan, joined, measured
from jaxmed.data.prepare.table import from_table
from jaxmed.data.prepare.walk import files_under, kind_of
from jaxmed.errors import UserError
from jaxmed.files import text_of, unique_names

_SPLIT_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
                  'test': 'test', 'testing': 'test'}
REPEATED = 'leads to what is read already'


def make_plan(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, table: str | os.PathLike | None = None,
    labels_from_folders: bool = False, subject_pattern: str | None = None,
    options: readers.Options = readers.DEFAULT, layout: str = benchmarks.AUTO,
) -> Plan:
  """Lists what to read, with subjects, given splits and columns. See `prepare` for the arguments.

  Raises:
    UserError: nothing to read, a damaged table, contradictory splits, labels or subjects.
  """
  if not inputs or not all(os.fspath(i) for i in inputs):
    raise UserError(f'{"an input is empty" if inputs else "no input"}: expected folders or files')
  pattern = _compile(subject_pattern)
  told = {'--table': table, '--labels-from-folders': labels_from_folders, '--channels': options.channels}
  name = benchmarks.find(layout, inputs, [k for k, v in told.items() if v])
  if name:
    return _laid_out(name, inputs[0], pattern)
  plan = _walk(inputs, pathlib.Path(out))
  if table is not None:
    plan = from_table(pathlib.Path(table), plan, inputs)
    _check_subjects(plan, table, pattern)
  elif plan.items:
    plan.items = _folder_splits(plan.items)
  elif plan.rejects:
    rel, reason = plan.rejects[0]
    raise UserError(f'no readable file in {joined(inputs)}; first {rel}: {reason}')
  else:
    raise UserError(f'no readable file in {joined(inputs)} ({plan.ignored} of other kinds): '
                    f'expected {", ".join(readers.SUFFIXES)}')
  if labels_from_folders:
    if 'label' in plan.types:
      raise UserError(f"{table} has a column 'label': drop it, or do not take labels from folders")
    plan.items = [dataclasses.replace(i, extra=i.extra | {'label': _folder_label(i)}) for i in plan.items]
    plan.types['label'] = pa.string()
  if pattern is not None:
    plan.items = [i if i.subject else dataclasses.replace(i, subject=_matched(i, pattern)) for i in plan.items]
  plan = grouped(plan, options)
  plan.items = [i if i.subject else dataclasses.replace(i, subject=_subject(i)) for i in plan.items]
  return measured(plan)


def found(root: str | os.PathLike, out: str | os.PathLike, options: readers.Options = readers.DEFAULT) -> Plan:
  """All that some reader takes in a folder, or a file, with files that belong together as one item; OUT is left aside.

  Raises:
    UserError: there is none.
  """
  plan = grouped(_walk([root], pathlib.Path(out)), options)
  if not plan.items:
    raise UserError(f'no image in {root} ({plan.ignored} files of other kinds): expected {", ".join(readers.SUFFIXES)}')
  return plan


def _check_subjects(plan: Plan, table: str | os.PathLike, pattern: re.Pattern | None) -> None:
  """Raises a UserError for a table of frames of videos that does not say of which: splits would part them."""
  column = next((name for name in ('frame_seconds', 'video') if name in plan.types), None)
  if column and pattern is None and not any(i.subject for i in plan.items):
    raise UserError(f'{table} has a column {column}, but no column subject: frames of one video would fall into '
                    'several splits; add subject, the patient or video, or give --subject-pattern')


def _laid_out(name: str, root: str | os.PathLike, pattern: re.Pattern | None) -> Plan:
  """The plan of a published layout; its splits are dropped where a pattern gives other subjects."""
  plan = benchmarks.plan(name, root)
  if pattern is not None:
    plan.items = [dataclasses.replace(i, subject=_matched(i, pattern) or i.subject, split=None) for i in plan.items]
  return measured(plan)


def _walk(inputs, out: pathlib.Path) -> Plan:
  """All that some reader takes, sorted within each input, each file once; other files are counted as ignored.

  Rejects are files that cannot be opened and links to nothing. What is left out beside them is told on standard error.
  """
  own = frozenset(os.path.realpath(f'{out}{end}') for end in ('', '.part', '.old'))
  names = unique_names([text_of(os.path.basename(os.path.abspath(i))) for i in inputs])
  plan, taken = Plan([]), set()
  left: list[tuple[str, str]] = []  # (name, why)
  for root, name in zip((pathlib.Path(i) for i in inputs), names):
    for real, item in _items(root, name, len(names) > 1, own, left).items():
      if real in taken:
        left.append((item.rel, REPEATED))
      else:
        taken.add(real)
        _sort_in(plan, item)
  plan.rejects += [(rel, why) for rel, why in left if why.startswith('is a link to nothing') and readers.suffix(rel)]
  odd = [(rel, why) for rel, why in left if why != REPEATED and (rel, why) not in plan.rejects]
  plan.ignored += len(odd)
  for what, pairs in (('not opened', odd), ('each file is read once', [p for p in left if p[1] == REPEATED])):
    if pairs:
      more = f', and {len(pairs) - 1} more' if len(pairs) > 1 else ''
      print(f'jaxmed: {what}: {" ".join(pairs[0])}{more}', file=sys.stderr, flush=True)
  return plan


def _items(root: pathlib.Path, name: str, several: bool, own: frozenset[str], left: list[tuple[str, str]],
           ) -> dict[str, Item]:
  """{real path: item} of an input, whatever its kind; `left` gets (name, why) of what is never opened."""
  if kind := kind_of(root):
    raise UserError(f'{root} is {kind}: expected a folder or a regular file' if os.path.lexists(root) else
                    f'{root} does not exist')
  if root.is_file() or readers.is_folder_format(root):
    if not root.is_dir() and not readers.known(root):
      raise UserError(f'{root} has no known suffix: expected {", ".join(readers.SUFFIXES)}')
    source = text_of(os.path.basename(os.path.dirname(os.path.abspath(root))))
    return {os.path.realpath(root): Item(root, name, text_of(root.name), source, input=name)}
  found = files_under(root, own)
  if not (found.files or found.odd or found.repeats):
    raise UserError(f'{root} is empty: expected images in it')
  inner = lambda path: text_of(path.relative_to(root).as_posix())
  rel = lambda path: f'{name}/{inner(path)}' if several else inner(path)
  left += [(rel(path), f'is {kind}') for path, kind in found.odd.items()]
  left += [(rel(path), REPEATED) for path in found.repeats]
  return {real: Item(path, rel(path), inner(path), name, input=name) for real, path in found.files.items()}


def _sort_in(plan: Plan, item: Item) -> None:
  """Adds an item that some reader takes; counts any other."""
  try:
    known = item.file.is_dir() or readers.known(item.file)
  except OSError as e:  # without a suffix the first bytes tell, and they are not to be had
    plan.rejects.append((item.rel, f'cannot be opened: {e.strerror}'))
    return
  if known:
    plan.items.append(item)
  else:
    suffix = pathlib.PurePosixPath(item.rel).suffix.lower()
    plan.ignored += 1
    plan.others[suffix] = plan.others.get(suffix, 0) + 1


def _folder_splits(items: list[Item]) -> list[Item]:
  """Takes the split from the first folder under the input, if that is train, val or test for every file."""
  split = [_SPLIT_FOLDERS.get(_first_folder(i).lower()) for i in items]
  if not any(split):
    return items
  if not all(split):
    outside = items[split.index(None)].rel
    raise UserError(f'some files lie in folders train, val or test, but {outside} does not: '
                    'move it, or give splits in a table')
  return [dataclasses.replace(i, split=s) for i, s in zip(items, split)]


def _first_folder(item: Item) -> str:
  parts = pathlib.PurePosixPath(item.inner).parts
  return parts[0] if len(parts) > 1 else ''


def _folder_label(item: Item) -> str:
  label = pathlib.PurePosixPath(item.inner).parent.name
  if not label or (label.lower() in _SPLIT_FOLDERS and item.split):
    raise UserError(f'{item.rel} lies in no folder that could be its label: expected LABEL/{item.file.name}')
  return label


def _compile(pattern: str | None) -> re.Pattern | None:
  if pattern is None:
    return None
  try:
    return re.compile(pattern)
  except re.error as e:
    raise UserError(f'subject_pattern {pattern!r} is no regular expression: {e}') from e


def _matched(item: Item, pattern: re.Pattern) -> str | None:
  """The subject that the pattern finds in the path; None where it finds nothing but emptiness."""
  match = pattern.search(item.rel)
  if match is None:
    raise UserError(f'subject_pattern {pattern.pattern!r} matches nothing in {item.rel}')
  groups = match.groupdict()
  return (groups['subject'] if 'subject' in groups else match.group(1 if pattern.groups else 0)) or None


def _subject(item: Item) -> str:
  if readers.SUFFIXES.get(readers.suffix(item.file) or '') == 'nifti':
    return readers.stem(item.rel)
  return item.rel[:len(item.rel) - len(readers.suffix(item.rel) or '')]
