"""nnU-Net's raw data (v2 and v1) and the Medical Segmentation Decathlon: folders of images and masks, dataset.json.

  dataset.json                        channel_names (v1: modality), labels, file_ending
  imagesTr/CASE_0000.nii.gz ...       a file each channel (Decathlon: CASE.nii.gz, channels as its fourth axis)
  labelsTr/CASE.nii.gz
  imagesTs, labelsTs                  test cases, often without masks
  splits_final.json                   train and val of fold 0, where it was laid beside them

The form is that of MIC-DKFZ/nnUNet, documentation/dataset_format.md and nnunetv2/utilities/dataset_name_id_conversion,
with `dataset`, which lists files that lie anywhere, and the label `ignore`, whose pixels become -1 (nothing is said of
them). A label that is a list of values is a region, a union of values: masks keep the values, which have the names that
labels of one value give them.

A case is a subject. imagesTs is split test; where it has masks, no other case is drawn into test. splits_final.json
gives train and val; without it they are drawn.
"""

import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jaxmed import files
from jaxmed.data.corpus import labels as labels_lib
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.readers import Masks, Parts
from jaxmed.errors import UserError
from jaxmed.files import text_of, unique_names

EXPECTED = 'dataset.json beside imagesTr and labelsTr'
IGNORE = 'ignore'
SPLITS = 'splits_final.json'


def here(root: pathlib.Path) -> bool:
  """Whether dataset.json lies beside imagesTr."""
  return (root / 'dataset.json').is_file() and (root / 'imagesTr').is_dir()


def plan(root: pathlib.Path) -> Plan:
  """An item a case. Rejects are cases that lack a channel or mask, masks without a case, and files that are named and
  not there.

  Raises:
    UserError: dataset.json or splits_final.json is missing or damaged, or contradicts itself or the folder.
  """
  about = _read(root / 'dataset.json')
  channels = _channels(about, root)
  names, absent = _labels(about, root)
  out = Plan([], types={'mask': pa.string()}, labels=names, fill=True)
  found = _listed(about, root, out) if 'dataset' in about or 'training' in about else _found(about, root, out)
  for (folder, case), (images, mask) in found.items():
    _add(out, root, folder, case, images, mask, channels, absent)
  twice = sorted({c for f, c in found if f != 'imagesTs'} & {c for f, c in found if f == 'imagesTs'})
  if twice:
    raise UserError(f'{root}: case {twice[0]} is in imagesTr and in imagesTs: expected it in one of them')
  out.tested = any(i.split == 'test' and i.mask for i in out.items)
  _split(out, root)
  told, have = about.get('numTraining'), sum(f != 'imagesTs' for f, _ in found)
  if isinstance(told, int) and told != have:
    print(f'jaxmed: {root}/dataset.json tells of {told} training cases, and there are {have}', file=sys.stderr)
  return out


def _read(path: pathlib.Path) -> dict[str, Any]:
  content = files.read_json(path)
  if not isinstance(content, dict):
    raise UserError(f'{path} holds no object: expected channel_names, labels and file_ending')
  return content


def _channels(about: Mapping[str, Any], root: pathlib.Path) -> tuple[str, ...]:
  """Names of the channels, in the order of their numbers; equal ones get a number: MRI, MRI-2."""
  told = about.get('channel_names', about.get('modality'))
  told = dict(enumerate(told)) if isinstance(told, list) else told
  try:
    return tuple(unique_names([str(told[k]) for k in sorted(told, key=int)])) or _refuse(root, told)
  except (TypeError, ValueError):
    return _refuse(root, told)


def _refuse(root: pathlib.Path, told: Any) -> Any:
  raise UserError(f'{root}/dataset.json has channel_names {told!r}: expected {{"0": "CT", ...}}')


def _labels(about: Mapping[str, Any], root: pathlib.Path) -> tuple[dict[int, str], int | None]:
  """{value: name} and the value of pixels to ignore, of labels in the form of v2 {name: value} or v1 {value: name}."""
  told, path = about.get('labels'), root / 'dataset.json'
  if not isinstance(told, dict) or not told:
    raise UserError(f'{path} has labels {told!r}: expected {{"background": 0, "liver": 1, ...}}')
  if all(isinstance(v, str) for v in told.values()):
    try:
      return labels_lib.checked({int(k): v for k, v in told.items()}, path), None
    except ValueError as e:
      raise UserError(f'{path} has labels {told!r}: expected {{"background": 0, ...}} or {{"0": "background", ...}}'
                      ) from e
  several = {name: v if isinstance(v, list) else [v] for name, v in told.items()}
  if not all(v and all(type(n) is int for n in v) for v in several.values()):
    raise UserError(f'{path} has labels {told!r}: expected whole numbers, or lists of them for regions')
  absent = several.pop(IGNORE, [None])[0]
  single: dict[int, str] = {}
  for name, values in several.items():
    if len(values) == 1 and single.setdefault(values[0], name) != name:
      raise UserError(f'{path} gives the value {values[0]} the names {single[values[0]]!r} and {name!r}')
  regions = {name: values for name, values in several.items() if len(values) > 1}
  if regions:
    words = '; '.join(f'{name} is {" + ".join(map(str, values))}' for name, values in regions.items())
    print(f'jaxmed: {path} has labels that are regions ({words}): masks keep their values', file=sys.stderr)
  rest = {v: f'value {v}' for values in regions.values() for v in values if v not in single}
  return labels_lib.checked(single | rest, path), absent


Cases = dict[tuple[str, str], tuple[list[pathlib.Path], pathlib.Path | None]]


def _found(about: Mapping[str, Any], root: pathlib.Path, out: Plan) -> Cases:
  """{(folder, case): (its images, its mask)} of what lies in the folders."""
  ending = about.get('file_ending', '.nii.gz')
  pattern = re.compile(r'(.+?)(?:_(\d{4}))?' + re.escape(ending))
  cases: Cases = {}
  for images, masks in (('imagesTr', 'labelsTr'), ('imagesTs', 'labelsTs')):
    own: dict[str, list[pathlib.Path]] = {}
    for name in _names(root / images):
      if match := pattern.fullmatch(name):
        own.setdefault(match[1], []).append(root / images / name)
    labelled = {n.removesuffix(ending): root / masks / n for n in _names(root / masks) if n.endswith(ending)}
    for case in sorted(set(labelled) - set(own)):
      out.rejects.append((f'{masks}/{case}{ending}', f'is a mask without an image in {images}'))
    for case, paths in own.items():
      if images == 'imagesTr' and case not in labelled:
        out.rejects.append((f'{images}/{case}', f'has no mask: expected {masks}/{case}{ending}'))
      else:
        cases[images, case] = paths, labelled.get(case)
  return cases


def _listed(about: Mapping[str, Any], root: pathlib.Path, out: Plan) -> Cases:
  """The same of files that dataset.json lists: `dataset` of nnU-Net, `training` and `test` of the Decathlon."""
  cases: Cases = {}
  for folder, case, images, mask in _entries(about, root):
    lost = [p for p in (*images, *([mask] if mask else [])) if not p.is_file()]
    if lost:
      out.rejects.append((_rel(lost[0], root), 'dataset.json names it, but no such file exists'))
    elif (folder, case) in cases:
      raise UserError(f'{root}/dataset.json names the case {case} twice')
    else:
      cases[folder, case] = images, mask
  if 'dataset' in about:  # imagesTs is listed nowhere then
    cases |= {key: value for key, value in _found(about, root, Plan([])).items() if key[0] == 'imagesTs'}
  return cases


def _entries(about: Mapping[str, Any], root: pathlib.Path) -> list[tuple[str, str, list[pathlib.Path],
                                                                         pathlib.Path | None]]:
  ending = about.get('file_ending', '.nii.gz')
  place = lambda text: root / os.path.expandvars(text)
  try:
    if 'dataset' in about:
      return [('', case, [place(p) for p in entry['images']], place(entry['label']))
              for case, entry in about['dataset'].items()]
    case = lambda path: pathlib.PurePosixPath(path).name.removesuffix(ending)
    train = [('imagesTr', case(e['image']), _images(place(e['image']), ending), place(e['label']))
             for e in about['training']]
    paths = [e['image'] if isinstance(e, dict) else e for e in about.get('test', [])]
    return train + [('imagesTs', case(p), _images(place(p), ending), None) for p in paths]
  except (TypeError, KeyError, AttributeError) as e:
    key = 'dataset' if 'dataset' in about else 'training'
    wanted = '{CASE: {"images": [...], "label": ...}}' if key == 'dataset' else '[{"image": ..., "label": ...}, ...]'
    raise UserError(f'{root}/dataset.json: {key} lists no cases as expected, {wanted}') from e


def _images(path: pathlib.Path, ending: str) -> list[pathlib.Path]:
  """The files of a listed image; nnU-Net v1 lists CASE.nii.gz where the files are CASE_0000.nii.gz and so on."""
  if path.is_file() or not path.parent.is_dir():
    return [path]
  own = re.compile(re.escape(path.name.removesuffix(ending)) + r'_\d{4}' + re.escape(ending))
  return [path.parent / n for n in _names(path.parent) if own.fullmatch(n)] or [path]


def _names(folder: pathlib.Path) -> list[str]:
  """Of the files in a folder, hidden ones left out."""
  return sorted(e.name for e in os.scandir(folder) if not e.name.startswith('.')) if folder.is_dir() else []


def _rel(path: pathlib.Path, root: pathlib.Path) -> str:
  return text_of(str(os.path.relpath(path, root)) if path.is_relative_to(root) else str(path))


def _add(out: Plan, root: pathlib.Path, folder: str, case: str, images: Sequence[pathlib.Path],
         mask: pathlib.Path | None, channels: tuple[str, ...], absent: int | None) -> None:
  rel = text_of(f'{folder}/{case}' if folder else case)
  if len(images) not in (1, len(channels)):
    out.rejects.append((rel, f'has {len(images)} files: expected one for each of {len(channels)} channels '
                             f'({", ".join(channels)})'))
    return
  way = 'stack' if len(images) > 1 else 'named'
  split = 'test' if folder == 'imagesTs' else None
  masks = mask if mask is None or absent is None else Masks((mask,), absent=absent)
  out.items.append(Item(images[0], rel, rel, text_of(root.resolve().name), subject=text_of(case), split=split,
                        extra={'mask': mask and _rel(mask, root)}, mask=masks,
                        parts=Parts(tuple(images), channels, way)))


def _split(out: Plan, root: pathlib.Path) -> None:
  """Sets train and val as the first fold of splits_final.json says, where that is there."""
  path = root / SPLITS
  if not path.is_file():
    return
  content = files.read_json(path)
  try:
    fold = {str(case): split for split in ('train', 'val') for case in content[0][split]}
  except (TypeError, KeyError, IndexError) as e:
    raise UserError(f'{path} has no first fold: expected [{{"train": [CASE, ...], "val": [CASE, ...]}}, ...]') from e
  free = [k for k, item in enumerate(out.items) if not item.split]
  unknown = sorted(set(fold) - {out.items[k].subject for k in free} - {p.rpartition('/')[2] for p, _ in out.rejects})
  lost = [out.items[k].subject for k in free if out.items[k].subject not in fold]
  if unknown or lost:
    raise UserError(f'{path} names the case {unknown[0]}, which is not there' if unknown else
                    f'{path} says nothing of the case {lost[0]}: expected it in train or val of the first fold')
  for k in free:
    out.items[k] = dataclasses.replace(out.items[k], split=fold[out.items[k].subject or ''])
