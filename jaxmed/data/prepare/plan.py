"""What `prepare` will read, and all that can be known, and refused, before a pixel is read."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa

from jaxmed.data import readers
from jaxmed.data.prepare import benchmarks
from jaxmed.data.prepare.grouping import grouped
from jaxmed.data.prepare.items import Item, Plan, joined, sized
from jaxmed.data.prepare.table import from_table
from jaxmed.errors import UserError
from jaxmed.files import unique_names

_SPLIT_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
                  'test': 'test', 'testing': 'test'}


def make_plan(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, table: str | os.PathLike | None = None,
    labels_from_folders: bool = False, subject_pattern: str | None = None,
    options: readers.Options = readers.DEFAULT, layout: str = benchmarks.AUTO,
) -> Plan:
  """Lists what to read, with subjects, given splits and columns. See `prepare` for the arguments.

  Raises:
    UserError: nothing to read, a damaged table, contradictory splits, labels or subjects.
  """
  pattern = _compile(subject_pattern)
  told = {'--table': table, '--labels-from-folders': labels_from_folders, '--channels': options.channels}
  name = benchmarks.find(layout, inputs, [k for k, v in told.items() if v])
  if name:
    return _laid_out(name, inputs[0], pattern)
  found, ignored = _walk(inputs, pathlib.Path(os.path.abspath(out)))
  if table is not None:
    plan = from_table(pathlib.Path(table), found, inputs)
  elif found:
    plan = Plan(_folder_splits(found))
  else:
    raise UserError(f'no readable file in {joined(inputs)} ({ignored} of other kinds): '
                    f'expected {", ".join(readers.SUFFIXES)}')
  plan.ignored = ignored
  if labels_from_folders:
    if 'label' in plan.types:
      raise UserError(f"{table} has a column 'label': drop it, or do not take labels from folders")
    plan.items = [dataclasses.replace(i, extra=i.extra | {'label': _folder_label(i)}) for i in plan.items]
    plan.types['label'] = pa.string()
  if pattern is not None:
    plan.items = [i if i.subject else dataclasses.replace(i, subject=_matched(i, pattern)) for i in plan.items]
  plan = grouped(plan, options)
  plan.items = [sized(i if i.subject else dataclasses.replace(i, subject=_subject(i))) for i in plan.items]
  return plan


def _laid_out(name: str, root: str | os.PathLike, pattern: re.Pattern | None) -> Plan:
  """The plan of a published layout; its splits are dropped where a pattern gives other subjects."""
  plan = benchmarks.plan(name, root)
  if pattern is not None:
    plan.items = [dataclasses.replace(i, subject=_matched(i, pattern) or i.subject, split=None) for i in plan.items]
  plan.items = [sized(i) for i in plan.items]
  return plan


def _walk(inputs, out: pathlib.Path) -> tuple[list[Item], int]:
  """All that some reader takes, sorted within each input, and the number of other files."""
  if not inputs:
    raise UserError('no input: expected folders or files')
  names = unique_names([pathlib.Path(os.path.abspath(i)).name for i in inputs])
  found: list[Item] = []
  ignored = 0
  for root, name in zip((pathlib.Path(i) for i in inputs), names):
    if not root.exists():
      raise UserError(f'{root} does not exist')
    if root.is_file() or readers.is_folder_format(root):
      if not root.is_dir() and not readers.known(root):
        raise UserError(f'{root} has no known suffix: expected {", ".join(readers.SUFFIXES)}')
      found.append(Item(root, name, root.name, pathlib.Path(os.path.abspath(root)).parent.name, input=name))
      continue
    before = len(found) + ignored
    for file in _files(root, out):
      inner = file.relative_to(root).as_posix()
      if file.is_dir() or readers.known(file):
        found.append(Item(file, f'{name}/{inner}' if len(names) > 1 else inner, inner, name, input=name))
      else:
        ignored += 1
    if len(found) + ignored == before:
      raise UserError(f'{root} is empty: expected images in it')
  return found, ignored


def _files(root: pathlib.Path, out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Files and folder formats under a folder, sorted; hidden ones and the corpus itself (inside) are left out."""
  own = (str(out), f'{out}.part', f'{out}.old')
  for folder, dirs, names in os.walk(root, onerror=_unlisted, followlinks=True):
    shown = [d for d in dirs if not d.startswith('.') and os.path.abspath(os.path.join(folder, d)) not in own]
    whole = {d for d in shown if readers.is_folder_format(os.path.join(folder, d))}
    dirs[:] = sorted(set(shown) - whole)
    yield from (pathlib.Path(folder, n) for n in sorted({n for n in names if not n.startswith('.')} | whole))


def _unlisted(error: OSError) -> None:
  raise UserError(f'cannot list {error.filename}: {error.strerror}')


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
    return readers.stem(item.file)
  return item.rel[:len(item.rel) - len(readers.suffix(item.file) or '')]
