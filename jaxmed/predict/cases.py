"""What there is to predict: the images of a folder or of a corpus, each read whole on the grid that it is stored on."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxmed.data import readers
from jaxmed.data.corpus.corpus_format import is_corpus
from jaxmed.data.corpus.open import elsewhere, open_source
from jaxmed.data.prepare.items import Item, one_line
from jaxmed.data.prepare.plan import found
from jaxmed.errors import UserError
from jaxmed.files import read_json

_CHANNEL = re.compile(r'(?P<case>.+)_(?P<channel>\d{4})')  # nnU-Net's names of files that hold one channel each
_FLAT = ('.tif', '.tiff')  # kinds of images whose masks keep the suffix; those of others are PNG


@dataclasses.dataclass(frozen=True)
class Case:
  """An image that gets a mask.

  Attributes:
    name: of the mask's file, below the folder of results.
    read: gives the record, see jaxmed.data.readers; volumes are whole, as [z, y, x, C] in RAS where that is known.
    file: a NIfTI file whose header and orientation the mask gets, or None.
    group: files of a DICOM series, of which the mask may be a segmentation; or None.
  """

  name: str
  read: Callable[[], dict[str, Any]]
  file: pathlib.Path | None = None
  group: readers.Group | None = None


def cases_of(data: str | os.PathLike, out: str | os.PathLike, channels: Sequence[str], split: str | None = None,
             segments: bool = False) -> list[Case]:
  """The images of a folder, a file or a corpus.

  Files CASE_0000.nii.gz, CASE_0001.nii.gz ... are the channels of one image, by dataset.json beside or above them or by
  `channels` in order.

  Args:
    out: where masks go; what lies there is not read. split: of a corpus. segments: whether masks are DICOM
      segmentations, which images of DICOM alone can have.
  Raises:
    UserError: nothing to read, a case that lacks a channel, or two images whose masks would have one name.
  """
  text = os.fspath(data)
  if is_corpus(text.partition('@')[0]) or elsewhere(text):
    if segments:
      raise UserError(f'--format dicomseg refers to a DICOM series, and {data} is a corpus: give the folder of DICOM')
    return _unique(_of_corpus(open_source(data), split))
  if split:
    raise UserError(f'--split {split} goes with a corpus, and {data} is a folder of images')
  options = readers.Options(volumes='whole')
  items = found(data, out, options).items
  items = _stacks(items, _names(pathlib.Path(data), channels)) or items
  if segments:
    return _unique([Case(f'{_series(i).name}.dcm', functools.partial(_read, i, options), group=i.group) for i in items])
  return _unique([Case(_name(i), functools.partial(_read, i, options), _nifti(i.file)) for i in items])


def _series(item: Item) -> readers.Group:
  """The files of an item of DICOM; a UserError for another one."""
  if item.group is None or item.group.kind != 'dicom':
    raise UserError(f'--format dicomseg refers to a DICOM series, and {item.rel} is none: leave --format out for NIfTI')
  return item.group


def _of_corpus(source: Any, split: str | None) -> list[Case]:
  source = source.select(split=split) if split else source
  ids, shapes = source.column('id').to_pylist(), source.column('shape').to_pylist()
  there = [name for name in ('direction', 'origin') if name in source.table.column_names]
  place = {name: source.column(name).to_pylist() for name in there}

  def read(row: int) -> dict[str, Any]:
    record = source.record(row, ('image',))
    return record | {'meta': {name: values[row] for name, values in place.items() if values[row] is not None}}

  end = lambda shape: ('.png',) if len(shape) == 3 else ('.nii.gz', '.nii')
  return [Case(_ended(name, *end(shape)), functools.partial(read, i)) for i, (name, shape) in enumerate(
    zip(ids, shapes))]


def _read(item: Item, options: readers.Options) -> dict[str, Any]:
  """The one image of an item."""
  try:
    if item.group is not None:
      records = list(readers.read_group(item.group, options))
    elif item.parts is not None:
      records = list(readers.read_parts(item.parts, options))
    else:
      records = list(readers.read(item.file, options))
  except UserError:
    raise
  except Exception as e:  # decoders raise anything at all for damaged files
    raise UserError(f'{item.rel}: {one_line(e)}') from e
  if len(records) != 1:
    raise UserError(f'{item.rel} holds {len(records)} images: expected one')
  record = records[0]
  if record['spacing'] and not all(0 < s < float('inf') for s in record['spacing']):
    raise UserError(f'{item.rel} has the spacing {", ".join(f"{s:g}" for s in record["spacing"])}: expected mm above 0')
  return record


def _stacks(items: Sequence[Item], names: Sequence[str]) -> list[Item] | None:
  """Items of several files, where all items are files of one channel by their names; else None."""
  matches = [None if i.group else _CHANNEL.fullmatch(readers.stem(i.rel)) for i in items]
  if not all(matches):
    return None
  cases: dict[str, dict[int, Item]] = {}
  for item, match in zip(items, matches):
    assert match is not None
    cases.setdefault(match['case'], {})[int(match['channel'])] = item
  out = []
  for case, parts in cases.items():
    if sorted(parts) != list(range(len(names))):
      have = ', '.join(f'_{i:04d}' for i in sorted(parts))
      raise UserError(f'{case} has the channels {have}: expected _0000 to _{len(names) - 1:04d} ({", ".join(names)})')
    order = [parts[i] for i in range(len(names))]
    kind = readers.suffix(order[0].file) or ''
    out.append(dataclasses.replace(order[0], rel=f'{case}{kind}', parts=readers.Parts(
      tuple(i.file for i in order), tuple(names), 'stack')))
  return out


def _names(root: pathlib.Path, channels: Sequence[str]) -> tuple[str, ...]:
  """Names of the channels _0000, _0001 ... of a folder."""
  for place in (root, root.parent):
    if (place / 'dataset.json').is_file():
      told = read_json(place / 'dataset.json')
      named = told.get('channel_names') or told.get('modality') if isinstance(told, dict) else None
      if isinstance(named, dict) and all(str(i) in named for i in range(len(named))):
        return tuple(str(named[str(i)]) for i in range(len(named)))
  return tuple(channels)


def _nifti(file: pathlib.Path) -> pathlib.Path | None:
  return file if readers.SUFFIXES.get(readers.suffix(file) or '') == 'nifti' else None


def _name(item: Item) -> str:
  """The name of an item's mask: NIfTI and TIFF keep theirs; other volumes become NIfTI, other images PNG."""
  end = readers.suffix(item.rel) or ''
  if item.group is not None:
    return f'{item.rel}.nii.gz'
  if _nifti(item.file) or end in _FLAT:
    return item.rel
  kind = readers.SUFFIXES.get(end)
  return _ended(item.rel[:len(item.rel) - len(end)], '.nii.gz' if kind in ('itk', 'dicom') else '.png')


def _ended(name: str, *ends: str) -> str:
  """A name that has one of these suffixes, the first where it had none."""
  return name if name.lower().endswith(ends) else name + ends[0]


def _unique(cases: list[Case]) -> list[Case]:
  seen: set[str] = set()
  for case in cases:
    if case.name in seen:
      raise UserError(f'two images would have the mask {case.name}: give them different names')
    if pathlib.PurePosixPath(case.name).is_absolute() or '..' in pathlib.PurePosixPath(case.name).parts:
      raise UserError(f'the image {case.name} would have its mask outside of the folder of results')
    seen.add(case.name)
  return cases
