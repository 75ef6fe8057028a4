"""Videos whose labels are segments, or one for a whole clip.

  ophnet        OphNet2024_loca_all.csv (or loca_challenge.csv, loca_challenge_phase.csv; or a .json of the form
                {database: {id: {annotations: [{label, segment}], subset}}}), ID.mp4
  surgtoolloc   labels.csv (clip_name, tools_present), clip_000000.mp4

OphNet (minghu0830/OphNet-benchmark): surgery, phase and operation are hierarchical numbers, whose names the tables of
segments do not hold: labels are `phase_12`, `operation_3`, `surgery_5`, not numbers that another table may give another
meaning. Adjacent segments may overlap: a frame then has both, as `a|b`, and `segments` holds those that cover it,
whole. Tables begin with a byte order mark or not, and JSON is UTF-8 or GBK, as the benchmark's code opens it. Splits
are the tables'.

SurgToolLoc 2022: four places of tools as `[needle driver, nan, ...]` without quotes; `nan` is the camera's arm, and
anything else must be one of the 14 tools. A label says what is installed, not what is seen, and holds for the clip. No
file says which clips are of one operation, so clips are their own subjects: splits by clip may part an operation.
"""

import json
import pathlib
from typing import Any

from jaxmed.data.corpus.corpus_format import SPLITS
from jaxmed.data.prepare.benchmarks import videos
from jaxmed.data.prepare.benchmarks.tables import rows
from jaxmed.data.prepare.benchmarks.videos import Layout
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.prepare.spreadsheet import raw_bytes
from jaxmed.errors import UserError, choose

SURGTOOLLOC = ('needle driver', 'monopolar curved scissor', 'force bipolar', 'clip applier',
               'tip up fenestrated grasper', 'cadiere forceps', 'bipolar forceps', 'vessel sealer', 'suction irrigator',
               'bipolar dissector', 'prograsp forceps', 'stapler', 'permanent cautery hook spatula',
               'grasping retractor')
_LEVELS = ('phase', 'operation', 'surgery')
_TABLES = ('OphNet2024_loca_all.csv', 'loca_challenge.csv', 'loca_challenge_phase.csv')
_SPLITS = {'training': 'train', 'validation': 'val', 'testing': 'test'}

Segments = dict[str, tuple[str, list[tuple[float, float, dict[str, str]]]]]  # of an id: split, (begin, end, names)


def _ophnet(root: pathlib.Path) -> Plan:
  out = videos.typed(*_LEVELS, 'segments')
  table, found = _segments(root)
  files = {file.stem: file for file, _ in videos.found(root, r'[^/]+\.(?:mp4|mkv|avi|mov|webm)')}
  for name, (split, segments) in found.items():
    if name not in files:
      out.rejects.append((name, f'{table.name} lists it, but there is no {name}.mp4'))
      continue
    def make(name=name, split=split, segments=segments) -> Item:
      columns = [c for c in _LEVELS if c in segments[0][2]]
      return videos.video(root, files[name], f'ophnet/{name}', videos.laid_over(segments, columns),
                          max(end for _, end, _ in segments), split)
    videos.add(out, root, files[name], make)
  return out


def _segments(root: pathlib.Path) -> tuple[pathlib.Path, Segments]:
  """The segments of the first table there is."""
  for name in _TABLES:
    for path, _ in videos.found(root, name.replace('.', r'\.')):
      return path, _of_table(path)
  for path, _ in videos.found(root, r'[^/]+\.json'):
    return path, _of_json(path)
  raise UserError(f'{root} is not laid out as OphNet: expected {_TABLES[0]} or a JSON file of segments')


def _of_table(path: pathlib.Path) -> Segments:
  found: Segments = {}
  for row in rows(path, ('video_id', 'start', 'end', 'split', 'phase_id')):
    name = row['video_id'] or ''
    split = choose(f'split of {name} in {path}', str(row['split']), (*SPLITS, *_SPLITS))
    levels = {c: f'{c}_{str(row[f"{c}_id"]).removesuffix(".0")}' for c in _LEVELS if row.get(f'{c}_id')}
    _note(found, path, name, _SPLITS.get(split, split), row['start'], row['end'], levels)
  return found


def _of_json(path: pathlib.Path) -> Segments:
  try:
    content = json.loads(_decoded(raw_bytes(path)))
    database = content['database']
    found: Segments = {}
    for name, about in database.items():
      split = choose(f'subset of {name} in {path}', str(about['subset']).lower(), (*SPLITS, *_SPLITS))
      for each in about['annotations']:
        begin, end = each['segment']
        _note(found, path, name, _SPLITS.get(split, split), begin, end, {'phase': str(each['label']).strip()})
    return found
  except (KeyError, TypeError, ValueError) as e:
    if isinstance(e, UserError):
      raise
    raise UserError(f'cannot read {path}: expected JSON of the form {{"database": {{ID: {{"annotations": [{{"label", '
                    '"segment": [begin, end]}], "subset"}}}') from e


def _decoded(data: bytes) -> str:
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError:
    return data.decode('gbk')


def _note(found: Segments, path: pathlib.Path, name: str, split: str, begin: Any, end: Any, names: dict[str, str]
          ) -> None:
  try:
    times = float(begin), float(end)
  except (TypeError, ValueError) as e:
    raise UserError(f'{path}: a segment of {name} is from {begin} to {end}: expected seconds') from e
  if not 0 <= times[0] < times[1]:
    raise UserError(f'{path}: a segment of {name} is from {begin} to {end} s: expected an end after its begin')
  if found.setdefault(name, (split, []))[0] != split:
    raise UserError(f'{path}: {name} is in two splits: {found[name][0]} and {split}')
  found[name][1].append((*times, names))


def _surgtoolloc(root: pathlib.Path) -> Plan:
  out = videos.typed('tools')
  table = next((path for path, _ in videos.found(root, r'labels\.csv')), root / 'labels.csv')
  files = {file.stem: file for file, _ in videos.found(root, r'clip_\d+\.mp4')}
  for row in rows(table, ('clip_name', 'tools_present')):
    name = str(row['clip_name'])
    if name not in files:
      out.rejects.append((name, f'{table.name} lists it, but there is no {name}.mp4'))
      continue
    def make(name=name, told=row['tools_present']) -> Item:
      tools = videos.SEPARATOR.join(_installed(table, str(told)))
      return videos.video(root, files[name], f'surgtoolloc/{name}', [(0.0, float('inf'), {'tools': tools})])
    videos.add(out, root, files[name], make)
  out.note = ('No file says which clips are of one operation: clips are their own subjects, and splits by clip may '
              'part an operation. Tools are those installed in a clip, seen or not.')
  return out


def _installed(table: pathlib.Path, told: str) -> list[str]:
  """The tools of '[a, nan, b, a]', each once."""
  inner = told.strip().removeprefix('[').removesuffix(']')
  words = [word.strip().strip('\'"').replace('_', ' ') for word in inner.split(',')]
  tools = dict.fromkeys(word for word in words if word and word != 'nan')
  return [videos.told(table, 'tool', word, SURGTOOLLOC) for word in tools]


def _has_tools(root: pathlib.Path) -> bool:
  for path in (root / 'labels.csv', *root.glob('*/labels.csv')):
    if path.is_file():
      with open(path, 'rb') as f:
        return b'tools_present' in f.readline()
  return False


LAYOUTS = {
  'ophnet': Layout(lambda root: videos.near(root, *_TABLES), _ophnet, 'OphNet2024_loca_all.csv with ID.mp4'),
  'surgtoolloc': Layout(_has_tools, _surgtoolloc, 'labels.csv (clip_name, tools_present) with clip_000000.mp4'),
}
