"""Frames of operations whose labels are relations: action triplets, scene graphs.

  cholect45   data/VID01/000000.png, triplet/VID01.txt (frame, 100 flags), dict/triplet.txt (number:tool,verb,target)
  or4d        export_holistic_take1_processed/colorimage/camera01_colorimage-000100.jpg, and in it
              timestamp_to_pcd_and_frames_list.json; relationships_train.json, relationships_validation.json

CholecT45 (CAMMA-public/cholect45): VID01 is video01 of Cholec80, and so says `video`; those above 80, of CholecT50, are
others. `fold` is the official cross-validation. Split: fold 1 is test, the last five videos of the others val. The
official loader takes the five videos of val from those that stay in train, so that they are in both.

4D-OR (egeozsoy/4D-OR): a scan has six cameras; `relations` is `subject>relation>object|...`, empty where a scan has
none, nothing where nobody annotated it (test). Takes 1, 3, 5, 7, 9, 10 are train, 4, 8 val, 2, 6 test. The number of a
scan is its second. A person is the name of its number where the file says who it is.
"""

import pathlib
import re
from typing import Any

from jaxmed import files
from jaxmed.data.prepare.benchmarks import videos
from jaxmed.data.prepare.benchmarks.videos import Layout
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.errors import UserError

FOLDS = ((79, 2, 51, 6, 25, 14, 66, 23, 50), (80, 32, 5, 15, 40, 47, 26, 48, 70), (31, 57, 36, 18, 52, 68, 10, 8, 73),
         (42, 29, 60, 27, 65, 75, 22, 49, 12), (78, 43, 62, 35, 74, 1, 56, 4, 13))
_OF_CHOLEC80 = 80  # videos
_TAKES = {'train': (1, 3, 5, 7, 9, 10), 'val': (4, 8), 'test': (2, 6)}
_FRAMES = 'timestamp_to_pcd_and_frames_list.json'


def _cholect45(root: pathlib.Path) -> Plan:
  out = videos.typed('triplets', 'tools', 'verbs', 'targets', 'fold', images=True)
  found = videos.found(root, r'dict/triplet\.txt')
  if not found:
    raise UserError(f'{root} has no dict/triplet.txt: expected the names of the triplets')
  names = _names(found[0][0])
  home = found[0][0].parent.parent
  rest = [v for fold in FOLDS[1:] for v in fold]
  splits = {'test': FOLDS[0], 'val': rest[-5:], 'train': rest[:-5]}
  for table in sorted((home / 'triplet').glob('VID*.txt')):
    number = int(re.sub(r'\D', '', table.stem))
    operation = f'cholec80/{number}' if number <= _OF_CHOLEC80 else f'cholect50/{number}'
    fold = next((str(k) for k, some in enumerate(FOLDS, 1) if number in some), None)
    def make_all(table=table, number=number, operation=operation, fold=fold) -> list[Item]:
      items = []
      for seconds, flags in videos.numbered(table, videos.cells(table, ','), header=False):
        file = home / 'data' / table.stem / f'{int(seconds):06d}.png'
        if not file.is_file():
          raise UserError(f'{table} goes on to frame {int(seconds)}, but there is no {file.name}')
        triplets = [t for t in videos.present(flags, names, table).split(videos.SEPARATOR) if t]
        parts = [videos.SEPARATOR.join(dict.fromkeys(t.split(',')[k] for t in triplets)) for k in range(3)]
        items.append(videos.frame(root, file, operation, seconds, videos.part_of(number, splits), fold=fold,
                                  triplets=videos.SEPARATOR.join(triplets), tools=parts[0], verbs=parts[1],
                                  targets=parts[2]))
      return items
    _add_all(out, root, table, make_all)
  return out


def _names(path: pathlib.Path) -> list[str]:
  """Triplets in the order of their numbers, 0, 1 ..., from lines 'number:tool,verb,target'."""
  found: dict[int, str] = {}
  for row in videos.cells(path, ':'):
    if len(row) != 2 or not row[0].isdigit() or row[1].count(',') != 2:
      raise UserError(f'{path}: {":".join(row)!r} is no triplet: expected number:tool,verb,target')
    found[int(row[0])] = row[1]
  if sorted(found) != list(range(len(found))):
    raise UserError(f'{path} lists {len(found)} triplets, not numbered 0 to {len(found) - 1}')
  return [found[k] for k in range(len(found))]


def _add_all(plan: Plan, root: pathlib.Path, file: pathlib.Path, make_all) -> None:
  """Adds the items of a table, or the table as a reject."""
  try:
    plan.items += make_all()
  except UserError as e:
    plan.rejects.append((files.text_of(file.relative_to(root).as_posix()), str(e)))


def _or4d(root: pathlib.Path) -> Plan:
  out = videos.typed('relations', 'camera', images=True)
  graphs: dict[tuple[int, str], str] = {}
  for path, _ in videos.found(root, r'relationships_(?:train|validation|test)\.json'):
    graphs |= _graphs(path)
  for path, match in videos.found(root, rf'export_holistic_take(\d+)_processed/{re.escape(_FRAMES)}'):
    take = int(match[1])
    def make_all(path=path, take=take) -> list[Item]:
      items = []
      for scan, about in _scans(path):
        for key, name in sorted(about.items()):
          if not key.startswith('color_'):
            continue
          file = path.parent / 'colorimage' / f'camera{int(key[6:]):02d}_colorimage-{name}.jpg'
          if not file.is_file():
            raise UserError(f'{path.name} lists {file.name}, but no such file exists')
          items.append(videos.frame(root, file, f'or4d/{take}', float(scan), videos.part_of(take, _TAKES),
                                    relations=graphs.get((take, f'{scan:06d}')), camera=f'camera{int(key[6:]):02d}'))
      return items
    _add_all(out, root, path, make_all)
  return out


def _scans(path: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
  try:
    return [(int(scan), dict(about)) for scan, about in files.read_json(path)]
  except (TypeError, ValueError) as e:
    raise UserError(f'cannot read {path}: expected JSON of the form [["0", {{"color_1": "000100", ...}}], ...]') from e


def _graphs(path: pathlib.Path) -> dict[tuple[int, str], str]:
  """{(take, scan): relations} of a file whose scans have any; those of a file without labels are left out."""
  try:
    out = {}
    for scan in files.read_json(path)['scans']:
      if 'relationships' not in scan:
        continue
      people = scan.get('human_idx_to_name', {})
      of = lambda number: people.get(str(number)) or scan['objects'][str(number)]  # noqa: B023
      rows = [f'{of(a)}>{name}>{of(b)}' for a, b, _, name in scan['relationships']]
      key = int(scan['take_idx']), str(scan['scan'])
      if key in out:
        raise UserError(f'{path} has scan {key[1]} of take {key[0]} twice')
      out[key] = videos.SEPARATOR.join(rows)
    return out
  except (KeyError, TypeError, ValueError) as e:
    if isinstance(e, UserError):
      raise
    raise UserError(f'cannot read {path}: expected scans with take_idx, scan, objects and relationships; {e} is '
                    'missing or odd') from e


LAYOUTS = {
  'cholect45': Layout(lambda root: videos.near(root, 'dict/triplet.txt'), _cholect45,
                      'data/VID01/000000.png with triplet/VID01.txt and dict/triplet.txt'),
  'or4d': Layout(lambda root: videos.near(root, f'export_holistic_take*_processed/{_FRAMES}'), _or4d,
                 f'export_holistic_take1_processed with colorimage and {_FRAMES}'),
}
