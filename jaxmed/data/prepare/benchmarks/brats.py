"""BraTS: a folder a case with a NIfTI file for each sequence and one for the segmentation, as released from 2018 on.

  BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz       (2018 to 2021)
  BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz  (from 2023 on; the last number is the visit)

Channels have the same names in all years: T1, T1c (with contrast), T2, FLAIR. Subject is the patient, so that no visit
lies in another split; splits are drawn, for the segmentations of the official validation cases are not released.
`grade` is HGG or LGG where a folder says so (2018, 2019).
"""

import pathlib
import re
from collections.abc import Mapping

import pyarrow as pa

from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.prepare.walk import Folder, folders
from jaxmed.data.readers import Parts
from jaxmed.files import text_of

EXPECTED = 'folders such as BraTS2021_00000 or BraTS-GLI-00000-000 with files that end in _t1ce.nii.gz or -t1c.nii.gz'
CHANNELS = ('T1', 'T1c', 'T2', 'FLAIR')
_WORDS = {'t1': 'T1', 't1n': 'T1', 't1ce': 'T1c', 't1c': 'T1c', 't2': 'T2', 't2w': 'T2', 'flair': 'FLAIR',
          't2f': 'FLAIR', 'seg': 'mask'}
_FILE = re.compile(rf'(?P<case>brats.*?)[-_](?P<word>{"|".join(_WORDS)})\.nii(\.gz)?', re.IGNORECASE)
_ODD_MASK = re.compile(r'.*_segm\.nii(\.gz)?', re.IGNORECASE)  # of one case of 2020, W39_1998.09.19_Segm.nii
_VISIT = re.compile(r'(BraTS-[A-Za-z]+-.+)-(\d+)')
_RELEASE = re.compile(r'brats(\d+|-[a-z]+)?', re.IGNORECASE)
_LOOKED_AT = 200  # folders in which `here` looks for a file


def here(root: pathlib.Path) -> bool:
  """Whether one of the first folders holds a file with a name as above."""
  for number, folder in enumerate(folders(root)):
    if any(_FILE.fullmatch(name) for name in folder.files):
      return True
    if number >= _LOOKED_AT:
      return False
  return False


def plan(root: pathlib.Path) -> Plan:
  """An item a case; one that lacks a sequence is a reject."""
  out = Plan([], types={'grade': pa.string(), 'visit': pa.string(), 'mask': pa.string()})
  taken: dict[str, str] = {}
  for folder in folders(root):
    for case, files in _cases(folder.path, folder.files).items():
      rel = text_of(folder.path.relative_to(root).as_posix())
      rel = case if rel == '.' else rel if rel.split('/')[-1] == case else f'{rel}/{case}'
      lost = [c for c in CHANNELS if c not in files]
      if lost:
        words = ' or '.join(f'{case}_{w}' for w, c in _WORDS.items() if c == lost[0])
        out.rejects.append((rel, f'has no {lost[0]}: expected {words} .nii.gz beside its other sequences'))
      elif twice := _twice(files, folder, rel, taken):
        out.rejects.append((rel, twice))
      else:
        out.items.append(_item(root, rel, case, files))
  for name in [k for k in out.types if all(i.extra[k] is None for i in out.items)]:
    del out.types[name]
    for item in out.items:
      del item.extra[name]
  return out


def _twice(files: Mapping[str, pathlib.Path], folder: Folder, rel: str, taken: dict[str, str]) -> str:
  """The file that two sequences or cases would share by links, in words; '' for none."""
  for word, file in files.items():
    what = f'{word} of {rel}'
    other = taken.setdefault(folder.real_of(file.name), what)
    if other != what:
      return f'{file.name} leads to the file that is {other} already'
  return ''


def _cases(folder: pathlib.Path, names: list[str]) -> dict[str, dict[str, pathlib.Path]]:
  """{case: {channel or 'mask': file}} of one folder."""
  cases: dict[str, dict[str, pathlib.Path]] = {}
  for name in names:
    if match := _FILE.fullmatch(name):
      cases.setdefault(match['case'], {})[_WORDS[match['word'].lower()]] = folder / name
  odd = [folder / name for name in names if _ODD_MASK.fullmatch(name)]
  if len(cases) == 1 and odd:
    next(iter(cases.values())).setdefault('mask', odd[0])
  return cases


def _item(root: pathlib.Path, rel: str, case: str, files: dict[str, pathlib.Path]) -> Item:
  visit = _VISIT.fullmatch(case)
  mask = files.get('mask')
  grade = next((part for part in pathlib.PurePosixPath(rel).parts if part in ('HGG', 'LGG')), None)
  extra = {'grade': grade, 'visit': visit[2] if visit else None,
           'mask': mask and text_of(mask.relative_to(root).as_posix())}
  release = _RELEASE.match(case)
  order = tuple(files[c] for c in CHANNELS)
  return Item(order[0], rel, rel, release[0] if release else 'brats', subject=visit[1] if visit else case, extra=extra,
              mask=mask, parts=Parts(order, CHANNELS, 'stack'))
