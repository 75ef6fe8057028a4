"""Videos of operations whose phases, and tools, stand in a table a video.

  cholec80     videos/video01.mp4, phase_annotations/video01-phase.txt (Frame, Phase: a row a frame of 25 a second),
               tool_annotations/video01-tool.txt (Frame and seven flags: a row a second)
  m2cai16      {train,test}_dataset/workflow_video_01.mp4 and .txt (as the phases above, eight of them), or
               tool_video_01.mp4 and .txt (as the tools above)
  autolaparo   01.mp4 and 01.txt or label_01.txt: a row a second, numbers 1 to 7
  heichole     Hei-Chole1.mp4, Hei-Chole1_Annotation_Phase.csv: no header, frame and number 0 to 6, 25 a second
  pitvis       video_01.mp4, annotations_01.csv: int_time, int_step, int_instrument1, int_instrument2; a row a second;
               map_steps.csv and map_instruments.csv name the numbers

Cholec80 is read as tobiascz/TeCNO and YuemingJin/TMRNet read it, with names instead of their integers, which disagree:
a second has the label of the row Frame % 25 == 0, and where a tool table lacks the last row, the one before counts.
Splits are 1-40 train, 41-48 val, 49-80 test (TeCNO); `subject_pattern` has others drawn. AutoLaparo's names and splits
(1-10, 11-14, 15-21) are those of its README. Names of HeiChole's numbers are those of two public converters: its own
README, and its tables of instruments and actions, were not read. Of M2CAI16 the folders are the splits, val is drawn.

A table that goes on for more than two seconds after the last frame of its video refuses the video, since it may be of
another frame rate.
"""

import pathlib
import re

from jaxmed.data.prepare.benchmarks import videos
from jaxmed.data.prepare.benchmarks.videos import Layout, Span
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.errors import UserError, choose

RATE = 25.0  # rows of a table of phases in a second
CHOLEC80 = ('Preparation', 'CalotTriangleDissection', 'ClippingCutting', 'GallbladderDissection',
            'GallbladderPackaging', 'CleaningCoagulation', 'GallbladderRetraction')
M2CAI16 = ('TrocarPlacement', *CHOLEC80)
AUTOLAPARO = ('Preparation', 'Dividing Ligament and Peritoneum', 'Dividing Uterine Vessels and Ligament',
              'Transecting the Vagina', 'Specimen Removal', 'Suturing', 'Washing')
_CHOLEC80_SPLITS = {'train': range(1, 41), 'val': range(41, 49), 'test': range(49, 81)}
_AUTOLAPARO_SPLITS = {'train': range(1, 11), 'val': range(11, 15), 'test': range(15, 22)}
_NO_STEP, _NO_TOOL = ('-1',), ('-1', '-2')


def _phases(path: pathlib.Path, names: tuple[str, ...], rate: float = RATE) -> list[tuple[float, dict]]:
  """(seconds, {phase}) of the rows of a table of names."""
  rows = videos.numbered(path, videos.cells(path), rate)
  return [(seconds, {'phase': videos.told(path, 'phase', row[0] if row else '', names)}) for seconds, row in rows]


def _numbered_phases(path: pathlib.Path, names: dict[str, str], rate: float, header: bool) -> list[tuple[float, dict]]:
  rows = videos.numbered(path, videos.cells(path), rate, header)
  for _, row in rows:
    choose(f'number of a phase in {path}', row[0] if row else '', names)
  return [(seconds, {'phase': names[row[0]]}) for seconds, row in rows]


def _tools(path: pathlib.Path) -> list[tuple[float, dict]]:
  """(seconds, {tools}) of a table of flags; its header may name the tools in another order."""
  rows = videos.cells(path)
  names = rows[0][1:] if not rows[0][0].isdigit() else list(videos.TOOLS)
  for name in names:
    videos.told(path, 'tool', name, videos.TOOLS)
  return [(seconds, {'tools': videos.present(flags, names, path)})
          for seconds, flags in videos.numbered(path, rows, RATE)]


def _with_tables(root: pathlib.Path, file: pathlib.Path, operation: str, split: str | None,
                 phases: list[tuple[float, dict]], tools: list[tuple[float, dict]]) -> Item:
  """A video with the spans of one or two tables; the tools of a second that has no row are those before it."""
  first: list[Span] = videos.spans(phases, 1 / RATE) if phases else []
  if first:  # a row of a frame: the second that begins with it keeps its label
    first[-1] = (first[-1][0], first[-1][1] + 1, first[-1][2])
  second = videos.spans(tools, 1.0) if tools else []
  until = max(rows[-1][0] for rows in (phases, tools) if rows)
  return videos.video(root, file, operation, videos.merged(first, second), until, split)


def _cholec80(root: pathlib.Path) -> Plan:
  out = videos.typed('phase', 'tools')
  tables = {(m[1], m[2].lower()): path for path, m in videos.found(root, r'video(\d+)-(phase|tool)\.txt')}
  for file, match in videos.found(root, r'video(\d+)\.mp4'):
    number = match[1]
    def make(file=file, number=number) -> Item:
      phase, tool = tables.get((number, 'phase')), tables.get((number, 'tool'))
      if not phase:
        raise UserError(f'has no video{number}-phase.txt: expected it in phase_annotations')
      return _with_tables(root, file, f'cholec80/{int(number)}', videos.part_of(int(number), _CHOLEC80_SPLITS),
                          _phases(phase, CHOLEC80), _tools(tool) if tool else [])
    videos.add(out, root, file, make)
  return out


def _m2cai16(root: pathlib.Path) -> Plan:
  out = videos.typed('phase', 'tools')
  for file, match in videos.found(root, r'((?:test_)?(workflow|tool)_video_(\d+))\.mp4'):
    def make(file=file, match=match) -> Item:
      table, kind = file.with_suffix('.txt'), match[2].lower()
      rows = _phases(table, M2CAI16) if kind == 'workflow' else _tools(table)
      split = 'test' if 'test' in file.relative_to(root).as_posix().lower() else None
      place = 'test' if split else 'train'
      return _with_tables(root, file, f'm2cai16/{kind}-{place}-{int(match[3])}', split,
                          rows if kind == 'workflow' else [], rows if kind == 'tool' else [])
    videos.add(out, root, file, make)
  out.tested, out.fill = any(i.split == 'test' for i in out.items), True
  return out


def _autolaparo(root: pathlib.Path) -> Plan:
  out, names = videos.typed('phase'), {str(k): name for k, name in enumerate(AUTOLAPARO, 1)}
  tables = {int(m[1]): path for path, m in videos.found(root, r'(?:label_)?(\d+)\.txt')}
  for file, match in videos.found(root, r'(\d+)\.mp4'):
    def make(file=file, number=int(match[1]), name=match[1]) -> Item:
      if number not in tables:
        raise UserError(f'has no {name}.txt or label_{name}.txt')
      rows = _numbered_phases(tables[number], names, 1.0, True)
      return videos.video(root, file, f'autolaparo/{number}', videos.spans(rows, 1.0), rows[-1][0],
                          videos.part_of(number, _AUTOLAPARO_SPLITS))
    videos.add(out, root, file, make)
  return out


def _heichole(root: pathlib.Path) -> Plan:
  out, names = videos.typed('phase'), {str(k): name for k, name in enumerate(CHOLEC80)}
  tables = {int(m[1]): path for path, m in videos.found(root, r'hei-chole(\d+)_annotation_phase\.csv')}
  for file, match in videos.found(root, r'hei-chole(\d+)\.mp4'):
    def make(file=file, number=int(match[1])) -> Item:
      if number not in tables:
        raise UserError(f'has no Hei-Chole{number}_Annotation_Phase.csv')
      rows = _numbered_phases(tables[number], names, RATE, True)
      return _with_tables(root, file, f'heichole/{number}', None, rows, [])
    videos.add(out, root, file, make)
  return out


def _pitvis(root: pathlib.Path) -> Plan:
  out = videos.typed('step', 'instruments')
  steps, instruments = _mapped(root, 'map_steps.csv'), _mapped(root, 'map_instruments.csv')
  tables = {int(m[1]): path for path, m in videos.found(root, r'annotations_(\d+)\.csv')}
  for file, match in videos.found(root, r'video_(\d+)\.mp4'):
    def make(file=file, number=int(match[1]), name=match[1]) -> Item:
      if number not in tables:
        raise UserError(f'has no annotations_{name}.csv')
      rows = _pitvis_rows(tables[number], steps, instruments)
      return videos.video(root, file, f'pitvis/{number}', videos.spans(rows, 1.0), rows[-1][0])
    videos.add(out, root, file, make)
  return out


def _pitvis_rows(path: pathlib.Path, steps: dict[str, str], instruments: dict[str, str]) -> list[tuple[float, dict]]:
  """Background (-1, and -2 for no second instrument) is no label."""
  out = []
  for seconds, row in videos.numbered(path, videos.cells(path)):
    if len(row) != 3:
      raise UserError(f'{path}: a row has {len(row) + 1} cells: expected int_time, int_step, int_instrument1, '
                      'int_instrument2')
    for kind, number, names in (('step', row[0], steps), *(('instrument', n, instruments) for n in row[1:])):
      if number not in _NO_TOOL:
        choose(f'number of a {kind} in {path}', number, names)
    tools = dict.fromkeys(instruments[n] for n in row[1:] if n not in _NO_TOOL)
    out.append((seconds, {'step': None if row[0] in _NO_STEP else steps[row[0]],
                          'instruments': None if row[0] in _NO_STEP else videos.SEPARATOR.join(tools)}))
  return out


def _mapped(root: pathlib.Path, name: str) -> dict[str, str]:
  """{number: name} of a map; the first of several names of a number counts, and blanks at its ends do not."""
  paths = videos.found(root, re.escape(name))
  if not paths:
    raise UserError(f'{root} has no {name}: expected the names of its numbers beside the annotations')
  out: dict[str, str] = {}
  for row in videos.cells(paths[0][0], ','):
    number = next((cell for cell in row if re.fullmatch(r'-?\d+', cell)), None)
    word = next((cell for cell in row if cell and not re.fullmatch(r'-?\d+', cell)), None)
    if number is not None and word is not None:
      out.setdefault(number, word)
  return out


LAYOUTS = {
  'cholec80': Layout(lambda root: videos.near(root, 'phase_annotations/video*-phase.txt'), _cholec80,
                     'videos/video01.mp4 with phase_annotations/video01-phase.txt'),
  'm2cai16': Layout(lambda root: videos.near(root, 'train_dataset/*_video_*.txt', 'test_dataset/*_video_*.txt'),
                    _m2cai16, 'train_dataset/workflow_video_01.mp4 with workflow_video_01.txt'),
  'autolaparo': Layout(lambda root: videos.near(root, 'label_01.txt'), _autolaparo,
                       '01.mp4 to 21.mp4 with 01.txt or label_01.txt'),
  'heichole': Layout(lambda root: videos.near(root, '[Hh]ei-[Cc]hole*_[Aa]nnotation_[Pp]hase.csv'), _heichole,
                     'Hei-Chole1.mp4 with Hei-Chole1_Annotation_Phase.csv'),
  'pitvis': Layout(lambda root: videos.near(root, 'map_steps.csv'), _pitvis,
                   'video_01.mp4 with annotations_01.csv and map_steps.csv'),
}
