"""BIDS, the Brain Imaging Data Structure: volumes by subject and session, with masks of derivatives beside them.

  dataset_description.json, participants.tsv (participant_id, ...)
  sub-01/[ses-1/]anat/sub-01[_ses-1][_...]_T1w.nii.gz
  derivatives/PIPELINE/sub-01/[ses-1/]anat/sub-01[...][_desc-...]_dseg.nii.gz, or ..._label-lesion_mask.nii.gz
  [derivatives/PIPELINE/][...]dseg.tsv (index, name)

An item is a volume of a folder anat, ct or pet; its channel is the last word of its name, such as T1w. Its mask is that
file beside it or in the same place below a derivative whose words are those of the volume, with none but desc, label,
res and `space-orig` added (other spaces are other grids); a mask that does not name its volume by `space-T1w` is that
of the T1w where there are several. A `_dseg` goes before `_mask`; several `label-NAME_mask` are structures of one mask,
numbered by their names in alphabetical order, of which the last counts where they overlap.

`participant_id` is the subject, so no session lies in another split; splits are drawn. The other columns of
participants.tsv go to the manifest, with `session`; `annotated` lists the structures of a volume that lacks some.
"""

import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa

from jaxmed.data.corpus import labels
from jaxmed.data.corpus.corpus_format import COLUMNS
from jaxmed.data.prepare.benchmarks.tables import Row, rows
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.prepare.walk import folders
from jaxmed.data.readers import META, Masks, Parts
from jaxmed.errors import UserError
from jaxmed.files import text_of

EXPECTED = 'dataset_description.json beside folders such as sub-01/anat with files such as sub-01_T1w.nii.gz'
TYPES = ('anat', 'ct', 'pet')
MASKS = ('dseg', 'mask')
ADDED = ('desc', 'label', 'res')  # entities that a mask may have beyond those of its volume
TABLE, ANNOTATED = 'participants.tsv', 'annotated'
_FILE = re.compile(r'(?P<words>sub-[A-Za-z0-9]+(?:_[A-Za-z0-9]+-[A-Za-z0-9+]+)*)_(?P<suffix>[A-Za-z0-9]+)'
                   r'\.nii(?:\.gz)?')

Name = tuple[dict[str, str], str]  # entities and suffix


def here(root: pathlib.Path) -> bool:
  """Whether dataset_description.json lies beside folders of subjects."""
  return (root / 'dataset_description.json').is_file() and any(root.glob('sub-*/'))


def plan(root: pathlib.Path) -> Plan:
  """An item a volume. Rejects are volumes with several masks to choose from.

  Raises:
    UserError: participants.tsv or a dseg.tsv is damaged.
  """
  files, tables = _files(root)
  about = _participants(root)
  volumes = [p for p in files if parsed(p.name)[1] not in MASKS and p.relative_to(root).parts[0] != 'derivatives']
  masks: dict[str, list[pathlib.Path]] = {}
  for path in files:
    if parsed(path.name)[1] in MASKS:
      masks.setdefault(_visit(path), []).append(path)
  visits: dict[str, list[pathlib.Path]] = {}
  for path in volumes:
    visits.setdefault(_visit(path), []).append(path)
  found = {p: _masks_of(p, masks.get(_visit(p), ()), visits[_visit(p)]) for p in volumes}
  structures = sorted({parsed(m.name)[0]['label'] for own in found.values() for m in own if _is_structure(m)})
  out = Plan([], labels=_labels(tables, structures, root))
  for path in volumes:
    _add(out, root, path, found[path], structures, about)
  columns = [k for k in next(iter(about.values()), {})]
  out.types |= dict.fromkeys([*columns, 'session'], pa.string())
  if any(i.extra[ANNOTATED] for i in out.items):
    out.types[ANNOTATED] = labels.COLUMNS[labels.VALUES]
  if any(i.mask for i in out.items):
    out.types['mask'] = pa.string()
  else:
    out.labels = {}
  return out


def parsed(name: str) -> Name:
  """The entities of a file's name, {'sub': '01', ...}, and its suffix, ({}, '') of other names."""
  match = _FILE.fullmatch(name)
  if match is None:
    return {}, ''
  return dict(word.split('-', 1) for word in match['words'].split('_')), match['suffix']


def _files(root: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """NIfTI files of folders of TYPES, and tables of the names of masks' values, each sorted."""
  files, tables = [], []
  for folder in folders(root):
    tables += [folder.path / n for n in folder.files if n.endswith('dseg.tsv')]
    if folder.path.name in TYPES:
      files += [folder.path / n for n in folder.files if parsed(n)[0]]
  return sorted(files), sorted(tables)


def _visit(path: pathlib.Path) -> str:
  """Subject and session of a file."""
  own = parsed(path.name)[0]
  return f'{own["sub"]}/{own.get("ses", "")}'


def _is_structure(mask: pathlib.Path) -> bool:
  own, suffix = parsed(mask.name)
  return suffix == 'mask' and 'label' in own


def _masks_of(path: pathlib.Path, masks: Iterable[pathlib.Path], visit: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """The masks of a volume, of those of its visit: `_dseg` where there is one, else `_mask`."""
  own, suffix = parsed(path.name)
  fits = []
  for mask in masks:
    words, kind = parsed(mask.name)
    space = words.pop('space', '')
    rivals = [parsed(v.name)[1] for v in visit if parsed(v.name)[0] == own]
    first = 'T1w' if 'T1w' in rivals else min(rivals)
    named = space == suffix or (space in ('', 'orig') and suffix == first)
    if named and {k: v for k, v in words.items() if k not in ADDED or k in own} == own:
      fits.append((MASKS.index(kind), mask))
  best = min((rank for rank, _ in fits), default=0)
  return sorted(mask for rank, mask in fits if rank == best)


def _labels(tables: Sequence[pathlib.Path], structures: Sequence[str], root: pathlib.Path) -> dict[int, str]:
  """The names of values: of structures, else of the tables, which must agree."""
  if structures:
    return {0: 'background'} | {k + 1: name for k, name in enumerate(structures)}
  names: dict[int, str] = {}
  for path in tables:
    for row in rows(path, ('index', 'name')):
      value, name = (row['index'] or '').removesuffix('.0'), row['name'] or ''
      if not value.isdigit() or not name:
        raise UserError(f'{path} has the row {row["index"]}, {row["name"]}: expected a whole number and a name')
      if names.setdefault(int(value), name) != name:
        raise UserError(f'{path} calls the value {value} {name!r}, another table of {root} {names[int(value)]!r}')
  return labels.checked({0: 'background'} | names, root) if names else {}


def _participants(root: pathlib.Path) -> dict[str, Row]:
  """{participant_id: what of its row goes to the manifest}; nothing where there is no table."""
  if not (root / TABLE).is_file():
    return {}
  own = {*COLUMNS.names, *META, *labels.COLUMNS, 'mask', 'session', ANNOTATED, 'participant_id'}
  return {row['participant_id'] or '': {k: v for k, v in row.items() if k not in own}
          for row in rows(root / TABLE, ('participant_id',))}


def _add(out: Plan, root: pathlib.Path, path: pathlib.Path, masks: Sequence[pathlib.Path], structures: Sequence[str],
         about: dict[str, Row]) -> None:
  words, suffix = parsed(path.name)
  rel = text_of(path.relative_to(root).as_posix())
  inside = lambda mask: text_of(os.path.relpath(mask, root))
  parts = [m for m in masks if _is_structure(m)]
  if len(masks) > 1 and len(parts) < len(masks) or len({parsed(m.name)[0]['label'] for m in parts}) < len(parts):
    out.rejects.append((rel, f'has {len(masks)} masks, {inside(masks[0])} and {inside(masks[1])}: expected one, or one '
                             'for each label'))
    return
  values = tuple(structures.index(parsed(m.name)[0]['label']) + 1 for m in parts)
  order = sorted(range(len(parts)), key=values.__getitem__)
  mask = Masks(tuple(parts[k] for k in order), tuple(values[k] for k in order)) if parts else next(iter(masks), None)
  subject = f'sub-{words["sub"]}'
  extra: dict = {**about.get(subject, {}), 'session': words.get('ses'), 'mask': inside(masks[0]) if masks else None,
           ANNOTATED: [0, *values] if parts and len(parts) < len(structures) else None}
  out.items.append(Item(path, rel, rel, text_of(root.resolve().name), subject=subject, extra=extra, mask=mask,
                        parts=Parts((path,), (suffix,), 'named')))
