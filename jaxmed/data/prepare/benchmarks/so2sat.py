"""So2Sat LCZ42: HDF5 files of patches of Sentinel-1 and Sentinel-2, with local climate zones (Zhu et al. 2020).

  training.h5, validation.h5, testing.h5 (of the version by cultures: train-new.h5, val-new.h5, test-new.h5), each with
  sen1 [N, 32, 32, 8], sen2 [N, 32, 32, 10] float64 and label [N, 17], one of them 1

The 18 channels in this order are those of ChannelViT's and DiChaViT's code (datasets/so2sat.py); the names of
Sentinel-1's say what the data set's own description says of them. Files give the splits. No file says what city a
patch is of, so each patch is its own subject. Patches are read by their place in the file, in runs of ROWS.
"""

import pathlib

import pyarrow as pa

from jaxmed.data.prepare.items import Item, Plan, one_line
from jaxmed.data.readers import Parts
from jaxmed.errors import UserError, need

EXPECTED = 'training.h5 with validation.h5 or testing.h5'
SPLITS = {'training.h5': 'train', 'validation.h5': 'val', 'testing.h5': 'test',
          'train-new.h5': 'train', 'val-new.h5': 'val', 'test-new.h5': 'test'}
SEN1 = ('VH real', 'VH imaginary', 'VV real', 'VV imaginary', 'VH Lee', 'VV Lee', 'covariance real',
        'covariance imaginary')
SEN2 = ('B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B8A', 'B11', 'B12')
CHANNELS = SEN1 + SEN2
ZONES = ('compact high-rise', 'compact mid-rise', 'compact low-rise', 'open high-rise', 'open mid-rise',
         'open low-rise', 'lightweight low-rise', 'large low-rise', 'sparsely built', 'heavy industry', 'dense trees',
         'scattered trees', 'bush or scrub', 'low plants', 'bare rock or paved', 'bare soil or sand', 'water')
ROWS = 2048


def here(root: pathlib.Path) -> bool:
  """Whether training and another split lie there."""
  splits = {split for name, split in SPLITS.items() if (root / name).is_file()}
  return 'train' in splits and len(splits) > 1


def plan(root: pathlib.Path) -> Plan:
  """An item for every ROWS patches.

  Raises:
    UserError: a file is no HDF5, lacks a data set, or has one of another shape; h5py is not installed.
  """
  h5py = need('h5py', 'medical')
  out = Plan([], types={'label': pa.string()})
  for name, split in SPLITS.items():
    path = root / name
    if not path.is_file():
      continue
    try:
      with h5py.File(path, 'r') as store:
        count = _checked(store, path)
    except OSError as e:
      raise UserError(f'{path} is no HDF5 file that can be read: {one_line(e)}') from e
    stat = path.stat()
    for first in range(0, count, ROWS):
      end = min(first + ROWS, count)
      rel = f'{name}/{first}-{end - 1}'
      out.items.append(Item(
        path, rel, rel, 'so2sat', subject=rel, split=split, extra={'label': None},
        size=max(stat.st_size * (end - first) // count, 1), stamp=stat.st_mtime_ns,
        parts=Parts((path,), CHANNELS, 'rows', rows=(first, end), values=ZONES)))
  return out


def _checked(store, path: pathlib.Path) -> int:
  """The number of patches."""
  shapes = {key: store[key].shape for key in ('sen1', 'sen2', 'label') if key in store}
  lost = [key for key in ('sen1', 'sen2', 'label') if key not in shapes]
  if lost:
    raise UserError(f'{path} has no data set {lost[0]!r}: it has {", ".join(sorted(store)) or "none"}')
  count = shapes['label'][0]
  for key, last in (('sen1', len(SEN1)), ('sen2', len(SEN2)), ('label', len(ZONES))):
    shape = shapes[key]
    if shape[0] != count or shape[-1] != last or len(shape) != (2 if key == 'label' else 4):
      wanted = [count, last] if key == 'label' else [count, 'H', 'W', last]
      raise UserError(f'{path} has {key} of shape {list(shape)}: expected {wanted}')
  return count
