"""Folders of published benchmarks and data sets, one file a layout: what a table would have to say of them.

A layout's `here(root)` says whether a folder is one, judged by names alone; its `plan(root)` lists what to read, as
`data.table` does of a table: an item for each image with channels, subject, and, where the benchmark fixes them, split,
labels and mask. `prepare` does everything else.
"""

import importlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxmed.data.prepare.items import Plan
from jaxmed.errors import UserError, choose

_VIDEOS = {'phases': {'cholec80': 'Cholec80', 'm2cai16': 'M2CAI16', 'autolaparo': 'AutoLaparo', 'heichole': 'HeiChole',
                      'pitvis': 'PitVis-2023'},
           'clips': {'ophnet': 'OphNet', 'surgtoolloc': 'SurgToolLoc 2022'},
           'scenes': {'cholecseg8k': 'CholecSeg8k', 'endovis17': 'EndoVis 2017', 'endovis18': 'EndoVis 2018'},
           'detections': {'endoscapes': 'Endoscapes2023', 'hsdb': 'hSDB-instrument'},
           'relations': {'cholect45': 'CholecT45', 'or4d': '4D-OR'}}  # modules that hold several layouts
_HOMES = {name: module for module, names in _VIDEOS.items() for name in names}
LAYOUTS = {'jumpcp': 'JUMP-CP', 'chammi': 'CHAMMI', 'so2sat': 'So2Sat LCZ42', 'nnunet': 'nnU-Net',
           'totalsegmentator': 'TotalSegmentator', 'bids': 'BIDS', 'brats': 'BraTS', 'mimic': 'MIMIC-CXR',
           'openi': 'Open-i', 'roco': 'ROCO, ROCOv2 or PMC-OA', 'quilt': 'Quilt-1M', 'ptbxl': 'PTB-XL',
           'mmeb': 'MMEB or mmE5', 'webdataset': 'WebDataset',
           **{name: title for names in _VIDEOS.values() for name, title in names.items()}}
AUTO, NONE = 'auto', 'none'


def find(layout: str, inputs: Sequence[str | os.PathLike], told: Sequence[str]) -> str:
  """The layout of the inputs, '' for none; 'auto' detects it, unless a given option excludes that.

  Args:
    layout: 'auto', 'none' or one of LAYOUTS.
    inputs: a layout is of one folder.
    told: options that say what a layout says itself.

  Raises:
    UserError: an unknown layout (the nearest is named), not one folder, an option that it excludes.
  """
  choose('layout', layout, (AUTO, NONE, *LAYOUTS))
  folder = pathlib.Path(inputs[0]) if len(inputs) == 1 else None
  if layout == NONE or (layout == AUTO and (told or folder is None or not folder.is_dir())):
    return ''
  if layout == AUTO:
    assert folder is not None
    name = next((name for name in LAYOUTS if _module(name).here(folder)), '')
    if name:
      print(f'jaxmed: {folder} is laid out as {LAYOUTS[name]}: read so (--layout none takes it as any folder)',
            file=sys.stderr, flush=True)
    return name
  if folder is None or not folder.is_dir():
    raise UserError(f'--layout {layout} is of one folder, not of {", ".join(map(str, inputs)) or "nothing"}')
  if told:
    raise UserError(f'--layout {layout} says itself what {told[0]} says: leave one of them out')
  return layout


def plan(name: str, root: str | os.PathLike) -> Plan:
  """What a folder of a layout holds.

  Raises:
    UserError: it is not laid out so, its tables are damaged, or list nothing that exists.
  """
  found = _module(name).plan(pathlib.Path(root))
  if not found.items:
    if found.rejects:
      path, reason = found.rejects[0]
      raise UserError(f'{root} holds no whole image of {LAYOUTS[name]}; first {path}: {reason}')
    raise UserError(f'{root} is not laid out as {LAYOUTS[name]}: expected {_module(name).EXPECTED}')
  return found


def _module(name: str) -> Any:
  """What has `here`, `plan` and EXPECTED of a layout: its module, or its entry in one of several."""
  module = importlib.import_module(f'jaxmed.data.prepare.benchmarks.{_HOMES.get(name, name)}')
  return module.LAYOUTS[name] if name in _HOMES else module
