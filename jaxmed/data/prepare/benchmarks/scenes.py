"""Frames of operations with masks.

  cholecseg8k   video01/video01_00080/frame_80_endo.png and frame_80_endo_watershed_mask.png
  endovis17     instrument_dataset_1/left_frames/frame000.png, ground_truth/NAME_labels/frame000.png: a folder a tool
  endovis18     seq_1/left_frames/frame000.png, labels/frame000.png: colours

CholecSeg8k: grey values of the watershed mask are the classes that public readers agree on; 255 is its white border,
which counts as background, as 0 does; another value refuses the frame. There is no official split: frames of a clip are
nearly the same, so splits are by video, which is one of Cholec80 (25 frames a second).

EndoVis 2017: masks are of types of instruments, by the names of folders (values of ternaus/robot-surgery-segmentation,
prepare_data.py); parts (10, 20, 30) are not kept, and nothing is cropped: that code keeps rows 28 to 1052 and columns
320 to 1600. `fold` is its split in four, by sequences. EndoVis 2018: colours are those of its labels.json; sequences 2,
5, 9 and 15 are val, as of ISINet, whose annotation of types is another; folders whose path says test are test. No file
says when frames of either were taken: `frame_seconds` is the number of the frame.
"""

import pathlib

from jaxmed.data.prepare.benchmarks import videos
from jaxmed.data.prepare.benchmarks.videos import Layout
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.readers import Masks
from jaxmed.errors import UserError

CHOLECSEG8K = ('background', 'abdominal wall', 'liver', 'gastrointestinal tract', 'fat', 'grasper', 'connective tissue',
               'blood', 'cystic duct', 'L-hook electrocautery', 'gallbladder', 'hepatic vein', 'liver ligament')
WATERSHED = {50: 0, 255: 0, 0: 0, 11: 1, 21: 2, 13: 3, 12: 4, 31: 5, 23: 6, 24: 7, 25: 8, 32: 9, 22: 10, 33: 11, 5: 12}
ENDOVIS17 = {1: 'bipolar forceps', 2: 'prograsp forceps', 3: 'large needle driver', 4: 'vessel sealer',
             5: 'grasping retractor', 6: 'monopolar curved scissors', 7: 'other'}
_WORDS = {'bipolar': 1, 'prograsp': 2, 'large_needle_driver': 3, 'vessel_sealer': 4, 'grasping_retractor': 5,
          'monopolar': 6, 'other': 7}
_FOLDS = ((1, 3), (2, 5), (4, 8), (6, 7))
ENDOVIS18 = {'background-tissue': (0, 0, 0), 'instrument-shaft': (0, 255, 0), 'instrument-clasper': (0, 255, 255),
             'instrument-wrist': (125, 255, 12), 'kidney-parenchyma': (255, 55, 0), 'covered-kidney': (24, 55, 125),
             'thread': (187, 155, 25), 'clamps': (0, 255, 125), 'suturing-needle': (255, 255, 125),
             'suction-instrument': (123, 15, 175), 'small-intestine': (124, 155, 5), 'ultrasound-probe': (12, 255, 141)}
_VAL18 = (2, 5, 9, 15)
_RATE = 25.0


def _cholecseg8k(root: pathlib.Path) -> Plan:
  out = videos.typed('mask', 'clip', images=True)
  out.labels = dict(enumerate(CHOLECSEG8K))
  for file, match in videos.found(root, r'video(\d+)/(video\d+_\d+)/frame_(\d+)_endo\.png'):
    def make(file=file, match=match) -> Item:
      mask = file.with_name(f'{file.stem}_watershed_mask.png')
      if not mask.is_file():
        raise UserError(f'has no {mask.name} beside it')
      return videos.frame(root, file, f'cholec80/{int(match[1])}', int(match[3]) / _RATE,
                          mask=Masks((mask,), codes=WATERSHED), clip=match[2])
    videos.add(out, root, file, make)
  return out


def _endovis17(root: pathlib.Path) -> Plan:
  out = videos.typed('mask', 'fold', images=True)
  out.labels = {0: 'background', **ENDOVIS17}
  for file, match in videos.found(root, r'instrument_dataset_(\d+)/left_frames/(frame(\d+))\.png'):
    def make(file=file, number=int(match[1]), name=match[2], at=int(match[3])) -> Item:
      kinds = {}
      for folder in sorted((file.parent.parent / 'ground_truth').glob('*/')):
        mask = folder / f'{name}.png'
        value = next((v for word, v in _WORDS.items() if word in folder.name.lower().replace(' ', '_')), None)
        if value is None:
          raise UserError(f'{folder.name} names no known instrument: expected one of {", ".join(_WORDS)}')
        if mask.is_file():
          kinds[mask] = value
      if not kinds:
        raise UserError(f'has no {name}.png in ground_truth')
      fold = next((str(k) for k, some in enumerate(_FOLDS) if number in some), None)
      return videos.frame(root, file, f'endovis17/{number}', float(at), mask=Masks(tuple(kinds), tuple(kinds.values())),
                          fold=fold)
    videos.add(out, root, file, make)
  return out


def _endovis18(root: pathlib.Path) -> Plan:
  out = videos.typed('mask', images=True)
  out.labels = dict(enumerate(ENDOVIS18))
  codes = {65536 * r + 256 * g + b: k for k, (r, g, b) in enumerate(ENDOVIS18.values())}
  for file, match in videos.found(root, r'seq_(\d+)/left_frames/(frame(\d+))\.png'):
    def make(file=file, number=int(match[1]), name=match[2], at=int(match[3])) -> Item:
      mask = file.parent.parent / 'labels' / f'{name}.png'
      if not mask.is_file():
        raise UserError(f'has no {name}.png in labels')
      test = 'test' in file.relative_to(root).as_posix().lower()
      split = 'test' if test else 'val' if number in _VAL18 else 'train'
      return videos.frame(root, file, f'endovis18/{"test-" if test else ""}{number}', float(at), split,
                          Masks((mask,), codes=codes))
    videos.add(out, root, file, make)
  return out


LAYOUTS = {
  'cholecseg8k': Layout(lambda root: videos.near(root, 'video*/video*_*/*_endo_watershed_mask.png'), _cholecseg8k,
                        'video01/video01_00080/frame_80_endo.png with frame_80_endo_watershed_mask.png'),
  'endovis17': Layout(lambda root: videos.near(root, 'instrument_dataset_*/ground_truth'), _endovis17,
                      'instrument_dataset_1/left_frames/frame000.png with ground_truth'),
  'endovis18': Layout(lambda root: videos.near(root, 'seq_*/left_frames'), _endovis18,
                      'seq_1/left_frames/frame000.png with labels/frame000.png'),
}
