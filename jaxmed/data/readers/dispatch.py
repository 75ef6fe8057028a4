"""Which reader takes a file: reading a file, a group, parts or a mask, whatever its format."""

import contextlib
import dataclasses
import importlib
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from jaxmed.data.readers import shaping
from jaxmed.data.readers.companions import labels, laid_together, packed
from jaxmed.data.readers.types import DEFAULT, Group, Masks, Options, Parts, Record, check_pixels, kind, suffix
from jaxmed.errors import UserError
from jaxmed.files import shown


def read(path: str | os.PathLike, options: Options = DEFAULT, mask: str | os.PathLike | Masks | None = None,
         ) -> Iterator[Record]:
  """Yields the records of one file, with the mask that another file holds. See the module's docstring for a record's
  fields.

  Raises:
    ValueError: the file is empty, of no known format, holds no finite pixels, or has another number of
      channels than `options.channels` names; the mask does not fit. Decoders raise their own errors for damaged files.
    UserError: the package that decodes this format is not installed.
  """
  name = kind(path)
  with _taken(path, name) as place:
    yield from _checked(_reader(name).read(place, options), options, mask)


def outline(path: str | os.PathLike, options: Options = DEFAULT) -> Iterator[Record]:
  """Yields what the reader of a file would, from its header: images are stand-ins (see `stand_in`), not yet cut.

  Raises as `read` does, for a damaged header."""
  name = kind(path)
  with _taken(path, name) as place:
    yield from _reader(name).outline(place, options)


def outline_group(group: Group, options: Options = DEFAULT) -> Iterator[Record]:
  """`outline` of a group."""
  yield from _reader(group.kind).outline_group(group, options)


def groups(
    kind: str, paths: Iterable[pathlib.Path], root: str | os.PathLike, options: Options = DEFAULT,
) -> tuple[list[Group], list[tuple[pathlib.Path, str]]]:
  """Sorts files of one kind of GROUPED into groups, by their headers.

  Args:
    kind: a member of GROUPED.
    paths: files, in any order.
    root: the folder that they were found under; not looked at by the readers there are.
    options: `salt` is used.

  Returns:
    Groups, in an order that does not depend on that of the paths, and (path, reason) for each file that is in none.
  """
  found, rejects = _reader(kind).groups(sorted(paths), root, options)
  return sorted(found, key=lambda g: (g.subject, g.name)), sorted(rejects)


def read_group(group: Group, options: Options = DEFAULT, mask: str | os.PathLike | Masks | None = None
               ) -> Iterator[Record]:
  """Yields the records of a group. Raises as `read` does."""
  yield from _checked(_reader(group.kind).read_group(group, options), options, mask)


def read_parts(parts: Parts, options: Options = DEFAULT, mask: str | os.PathLike | Masks | None = None,
               rows: Any = None) -> Iterator[Record]:
  """Yields the images of some files whose channels a layout names. Raises as `read` does.

  `rows`, a hash, takes what is read of rows of a file: after the last record it is that of `digest_rows`.
  """
  yield from _checked(_reader('parts').read_parts(parts, options, rows), options, mask)


def outline_parts(parts: Parts, options: Options = DEFAULT) -> Iterator[Record]:
  """`outline` of `read_parts`."""
  yield from _reader('parts').outline_parts(parts, options)


def digest_rows(parts: Parts) -> str:
  """The hash of some rows of a file."""
  return _reader('parts').digest(parts)


def reader_of(path: str | os.PathLike) -> ModuleType:
  """The module that reads a file."""
  return _reader(kind(path))


@contextlib.contextmanager
def _taken(path: str | os.PathLike, kind: str) -> Iterator[str | os.PathLike]:
  """A name of a file that its reader takes: SimpleITK ends the process for one that is no UTF-8, so a link stands for
  it, or for its folder where the name of the file itself is UTF-8 (pixels may lie beside it)."""
  text = os.path.abspath(path)
  if kind != 'itk' or shown(text) == text:
    yield path
    return
  folder, name = os.path.split(text)
  with tempfile.TemporaryDirectory() as scratch:
    link = os.path.join(scratch, 'link')
    if shown(name) == name:
      os.symlink(folder, link)
      yield os.path.join(link, name)
    else:
      link += suffix(path) or ''
      os.symlink(text, link)
      yield link


def _reader(kind: str) -> ModuleType:
  return importlib.import_module(f'jaxmed.data.readers.{kind}')


def _checked(records: Iterable[Record], options: Options, mask: str | os.PathLike | Masks | None) -> Iterator[Record]:
  try:
    masks = read_masks(mask, options) if mask is not None else []
    yield from shaping.shaped(_named(records, options), options, masks)
  except MemoryError as e:
    raise ValueError(f'needs more memory than there is ({e})') from e
  except Exception as e:
    if str(e).strip() and not isinstance(e, AssertionError):
      raise
    raise ValueError(f'is damaged: {type(e).__name__} in its decoder') from e  # decoders do not always find words


def _named(records: Iterable[Record], options: Options) -> Iterator[Record]:
  for record in records:
    hint = ', or prepare --nan 0 or --nan mean, which fill them'
    image = check_pixels(record['image'], options.nan == 'refuse', hint)
    yield record | {'image': image, 'channels': _name_channels(record, options)}


def _name_channels(record: Record, options: Options) -> list[str]:
  count = record['image'].shape[-1]
  if options.channels is None:
    return list(record['channels'])
  if len(options.channels) != count:
    raise ValueError(f'has {count} channels, but {len(options.channels)} names were given '
                     f'({", ".join(options.channels)})')
  return list(options.channels)


def read_masks(path: str | os.PathLike | Masks, options: Options) -> list[Record]:
  """The whole images of a mask's file, turned as the image is: `image` [*grid] of integers. Their mismatch with the
  image is found by `masked`. Of an image with a palette they are the numbers of the colours.

  Of a layout's files it is one image.

  Raises:
    ValueError: more than one value a pixel, or values that are no integers; and as readers.read does.
  """
  if isinstance(path, Masks):
    return _together(path, options)
  plain = dataclasses.replace(options, channels=None, volumes='whole', spacing=None, crop='none', min_content=0.0,
                              slides='auto', nan='refuse' if options.nan == 'refuse' else '0')
  try:
    found = _palette(path) if kind(path) == 'image' else []
    if kind(path) == 'tiff':
      found = list(_checked(_reader('tiff').read_indices(path, plain), plain, None))
    found = found or list(read(path, plain))
    return [r | {'image': labels(r['image'])} for r in found]
  except Exception as e:
    if isinstance(e, UserError):
      raise
    raise ValueError(f'mask: {e}') from e


def _together(masks: Masks, options: Options) -> list[Record]:
  records = []
  for file in masks.files:
    found = _coded(file, options) if masks.codes else read_masks(file, options)
    if len(found) != 1:
      raise ValueError(f'mask: {file.name} holds {len(found)} images: expected one')
    records += found
  try:
    return [laid_together(masks, records)]
  except ValueError as e:
    raise ValueError(f'mask: {e}') from e


def _coded(path: pathlib.Path, options: Options) -> list[Record]:
  """The images of a file whose values, or colours, are codes."""
  plain = dataclasses.replace(options, channels=None, volumes='whole', spacing=None, crop='none', min_content=0.0)
  return [record | {'image': packed(record['image'])} for record in read(path, plain)]


def _palette(path: str | os.PathLike) -> list[Record]:
  from PIL import Image, UnidentifiedImageError

  from jaxmed.data.readers.image import FORMATS

  with contextlib.suppress(UnidentifiedImageError), Image.open(path, formats=FORMATS) as handle:
    return [{'image': np.asarray(handle)[..., None], 'spacing': None}] if handle.mode == 'P' else []
  return []
