"""TotalSegmentator's data sets, CT and MR: a folder a case, with a file for each structure.

  s0000/ct.nii.gz (or mri.nii.gz)
  s0000/segmentations/liver.nii.gz ...     104 structures (v1), 117 (v2), 50 (MR), or any others
  meta.csv                                 image_id, split, age, gender, ...

Structures become one mask. Their values are the numbers of wasserth/TotalSegmentator, totalsegmentator/map_to_binary.py
(the first of `total`, `total_v1`, `total_mr` that has all names), else those of the names in alphabetical order. Where
structures overlap, the one of the higher value counts, as in the official resources/convert_dataset_to_nnunet.py.

A case is a subject; splits are those of meta.csv, whose other columns go to the manifest. Where cases differ in their
structures, column `annotated` lists those of each, with 0, as far as it lacks some.
"""

import os
import pathlib
from collections.abc import Sequence

import pyarrow as pa

from jaxmed.data.corpus import labels
from jaxmed.data.corpus.corpus_format import COLUMNS, SPLITS
from jaxmed.data.prepare.benchmarks.tables import Row, rows
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.readers import META, Masks, Parts
from jaxmed.errors import UserError, choose
from jaxmed.files import text_of

EXPECTED = 'folders such as s0000 with ct.nii.gz or mri.nii.gz beside segmentations'
IMAGES = {'ct.nii.gz': 'CT', 'mri.nii.gz': 'MR'}
FOLDER, TABLE, ENDING = 'segmentations', 'meta.csv', '.nii.gz'
ANNOTATED = 'annotated'
_LOOKED_AT = 50  # folders in which `here` looks

_both = lambda *names: [f'{name}_{side}' for name in names for side in ('left', 'right')]
_SPINE = [f'vertebrae_{part}{i}' for part, count in (('L', 5), ('T', 12), ('C', 7)) for i in range(count, 0, -1)]
_RIBS = [f'rib_{side}_{i}' for side in ('left', 'right') for i in range(1, 13)]
_BELLY = ['spleen', 'kidney_right', 'kidney_left', 'gallbladder', 'liver', 'stomach']
_ADRENAL = ['adrenal_gland_right', 'adrenal_gland_left']
_LUNGS = ['lung_upper_lobe_left', 'lung_lower_lobe_left', 'lung_upper_lobe_right', 'lung_middle_lobe_right',
          'lung_lower_lobe_right']
_ILIAC = _both('iliac_artery', 'iliac_vena')
_LIMBS = _both('humerus', 'scapula', 'clavicula', 'femur', 'hip')
_MUSCLES = _both('gluteus_maximus', 'gluteus_medius', 'gluteus_minimus', 'autochthon', 'iliopsoas')
_PORTAL = 'portal_vein_and_splenic_vein'
STRUCTURES: dict[str, list[str]] = {
  'total': [
    *_BELLY, 'pancreas', *_ADRENAL, *_LUNGS, 'esophagus', 'trachea', 'thyroid_gland', 'small_bowel', 'duodenum',
    'colon', 'urinary_bladder', 'prostate', *_both('kidney_cyst'), 'sacrum', 'vertebrae_S1', *_SPINE, 'heart', 'aorta',
    'pulmonary_vein', 'brachiocephalic_trunk', 'subclavian_artery_right', 'subclavian_artery_left',
    'common_carotid_artery_right', 'common_carotid_artery_left', *_both('brachiocephalic_vein'),
    'atrial_appendage_left', 'superior_vena_cava', 'inferior_vena_cava', _PORTAL, *_ILIAC, *_LIMBS, 'spinal_cord',
    *_MUSCLES, 'brain', 'skull', *_RIBS, 'sternum', 'costal_cartilages'],
  'total_v1': [
    *_BELLY, 'aorta', 'inferior_vena_cava', _PORTAL, 'pancreas', *_ADRENAL, *_LUNGS, *_SPINE, 'esophagus', 'trachea',
    'heart_myocardium', 'heart_atrium_left', 'heart_ventricle_left', 'heart_atrium_right', 'heart_ventricle_right',
    'pulmonary_artery', 'brain', *_ILIAC, 'small_bowel', 'duodenum', 'colon', *_RIBS, *_LIMBS, 'sacrum', 'face',
    *_MUSCLES, 'urinary_bladder'],
  'total_mr': [
    *_BELLY, 'pancreas', *_ADRENAL, 'lung_left', 'lung_right', 'esophagus', 'small_bowel', 'duodenum', 'colon',
    'urinary_bladder', 'prostate', 'sacrum', 'vertebrae', 'intervertebral_discs', 'spinal_cord', 'heart', 'aorta',
    'inferior_vena_cava', _PORTAL, *_ILIAC, *_LIMBS, *_MUSCLES, 'brain'],
}


def here(root: pathlib.Path) -> bool:
  """Whether one of the first folders holds an image beside structures."""
  return any(_image(folder) is not None and (folder / FOLDER).is_dir() for folder in _folders(root)[:_LOOKED_AT])


def plan(root: pathlib.Path) -> Plan:
  """An item a case; a folder of structures without an image is a reject.

  Raises:
    UserError: meta.csv is damaged, or names a case twice, or a split that is none.
  """
  cases = {folder: _structures(folder) for folder in _folders(root)}
  names = sorted({name for found in cases.values() for name in found})
  values = values_of(names)
  out = Plan([], labels={0: 'background'} | {v: n for n, v in sorted(values.items(), key=lambda p: p[1])})
  about = _about(root, out)
  partial = any(0 < len(found) < len(names) for found in cases.values())
  for folder, found in cases.items():
    _add(out, root, folder, sorted(found, key=values.__getitem__), values, about, partial and len(found) < len(names))
  columns = [k for k in next(iter(about.values()), {}) if k != 'split']
  out.types |= dict.fromkeys(columns, pa.string()) | {'mask': pa.string()}
  if partial:
    out.types[ANNOTATED] = labels.COLUMNS[labels.VALUES]
  out.tested = any(i.split == 'test' and i.mask for i in out.items)
  return out


def values_of(names: Sequence[str]) -> dict[str, int]:
  """The value of each structure in masks, above 0."""
  order = next((known for known in STRUCTURES.values() if set(names) <= set(known)), sorted(names))
  return {name: order.index(name) + 1 for name in names}


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(pathlib.Path(e.path) for e in os.scandir(root)  # os.path: a link to itself is no folder, and no error
                if os.path.isdir(e.path) and not e.name.startswith('.'))


def _image(folder: pathlib.Path) -> str | None:
  return next((name for name in IMAGES if (folder / name).is_file()), None)


def _structures(folder: pathlib.Path) -> list[str]:
  place = folder / FOLDER
  names = [e.name for e in os.scandir(place) if not e.name.startswith('.')] if place.is_dir() else []
  return sorted(n.removesuffix(ENDING) for n in names if n.endswith(ENDING))


def _about(root: pathlib.Path, out: Plan) -> dict[str, Row]:
  """{case: split and what else of its row of meta.csv goes to the manifest}; nothing where there is no table."""
  path = root / TABLE
  if not path.is_file():
    return {}
  about: dict[str, Row] = {}
  own = {*COLUMNS.names, *META, *labels.COLUMNS, ANNOTATED, 'mask', 'image_id'} - {'split'}
  for row in rows(path, ('image_id',)):
    case = row['image_id'] or ''
    if case in about:
      raise UserError(f'{path} names the case {case} twice')
    if row.get('split'):
      choose(f'split of {case} in {path}', row['split'] or '', SPLITS)
    if not (root / case).is_dir():
      out.rejects.append((case, f'{TABLE} names it, but no such folder exists'))
    about[case] = {name: value for name, value in row.items() if name not in own}
  return about


def _add(out: Plan, root: pathlib.Path, folder: pathlib.Path, found: Sequence[str], values: dict[str, int],
         about: dict[str, Row], partial: bool) -> None:
  case, name = text_of(folder.name), _image(folder)
  if name is None:
    if found or case in about:
      out.rejects.append((case, f'has no image: expected {" or ".join(IMAGES)}'))
    return
  row = about.get(case, {})
  extra: dict = {k: v for k, v in row.items() if k != 'split'} | {'mask': f'{case}/{FOLDER}' if found else None}
  if partial:
    extra[ANNOTATED] = [0, *(values[n] for n in found)] if found else None
  masks = Masks(tuple(folder / FOLDER / f'{n}{ENDING}' for n in found), tuple(values[n] for n in found))
  out.items.append(Item(folder / name, case, case, text_of(root.resolve().name), subject=case, split=row.get('split'),
                        extra=extra, mask=masks if found else None, parts=Parts((folder / name,), (IMAGES[name],),
                                                                               'named')))
