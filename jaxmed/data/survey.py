"""What `prepare` would do, from names and headers alone; nothing is written."""

import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmed.data import readers
from jaxmed.data.items import Item, one_line
from jaxmed.data.layout import Layout, lay_out
from jaxmed.errors import UserError


def survey(inputs: Sequence[str | os.PathLike], out: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Lays a corpus out and counts. See `prepare` for the arguments, except those of writing.

  Returns:
    out; formats (items of each), items, groups, files, bytes, blocks; subjects; splits (items and subjects of each);
    records (how many the headers tell of) and untold (items whose header does not tell); rejects ([path, reason] of
    what is known to be bad already); empty, ignored, not_in_table.

  Raises:
    UserError: as `prepare` does before it reads.
  """
  layout = lay_out(inputs, out, **options)
  plan = layout.plan
  formats: Counter[str] = Counter()
  records, untold, rejects = 0, 0, list(plan.rejects)
  for item in plan.items:
    try:
      formats[item.group.kind if item.group else readers.kind(item.file)] += 1
      count = expected(item, layout.options)
    except UserError:
      raise
    except Exception as e:  # decoders raise anything at all for damaged headers
      rejects.append((item.rel, one_line(e)))
      continue
    records, untold = records + (count or 0), untold + (count is None)
  return {
    'out': str(out), 'formats': dict(sorted(formats.items())), 'items': len(plan.items),
    'groups': sum(i.group is not None for i in plan.items),
    'files': sum(len(i.group.files) if i.group else 1 for i in plan.items),
    'bytes': sum(i.size for i in plan.items), 'blocks': len(layout.tasks),
    'subjects': len({i.subject for i in plan.items}), 'splits': _splits(layout), 'records': records, 'untold': untold,
    'rejects': [list(r) for r in rejects], 'empty': len(plan.empty), 'ignored': plan.ignored,
    'not_in_table': plan.not_in_table,
  }


def expected(item: Item, options: readers.Options) -> int | None:
  """How many records an item gives, where its header tells; None where it does not.

  Raises:
    ValueError, or whatever a decoder raises: the header is damaged.
  """
  if item.group is not None:
    several = len(item.group.files) > 1
    return (len(item.group.files) if options.volumes == 'slices' else 1) if several else None
  kind = readers.kind(item.file)
  depth = {'image': _image, 'nifti': _nifti, 'array': _array}.get(kind, lambda path: None)(item.file)
  return depth and (depth if options.volumes == 'slices' else 1)


def _image(path: pathlib.Path) -> int:
  from PIL import Image

  with Image.open(path):
    return 1


def _nifti(path: pathlib.Path) -> int | None:
  import nibabel

  image: Any = nibabel.load(path)
  if [n for n in image.shape[3:] if n > 1] or len(image.shape) < 3:
    return None  # channels, or time
  axis = nibabel.orientations.io_orientation(image.affine)[:, 0].tolist().index(2)
  return int(image.shape[axis])  # planes from inferior to superior


def _array(path: pathlib.Path) -> int | None:
  with open(path, 'rb') as f:
    if f.read(6) != b'\x93NUMPY':
      return None
  shape = np.load(path, mmap_mode='r', allow_pickle=False).shape
  if len(shape) == 2:
    return 1
  if len(shape) == 3 and min(shape) > readers.MAX_CHANNELS:
    return int(shape[0])
  return 1 if len(shape) == 3 else int(shape[0]) if len(shape) == 4 else None


def _splits(layout: Layout) -> dict[str, dict[str, int]]:
  items = layout.plan.items
  counts = Counter(i.split or '' for i in items)
  subjects = Counter(split for split, _ in {(i.split or '', i.subject) for i in items})
  return {s: {'items': n, 'subjects': subjects[s]} for s, n in sorted(counts.items())}
