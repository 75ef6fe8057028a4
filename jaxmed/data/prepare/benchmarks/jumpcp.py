"""JUMP-CP, in two layouts.

Cells, as ChannelViT, DiChaViT and ContextViT read them (s3://insitro-research-2023-context-vit/jumpcp):

  BR00116991.pq                              ID, well_loc, path, plate_id: a row a cell
  BR00116991/BR00116991_A01_1_12.npy         PLATE_WELL_FIELD_CELL, [8, 224, 224]
  platemap_and_metadata/JUMP-Target-1_compound_{platemap,metadata}.tsv

The label is the target of the well's compound, 'control' where it has none (161 classes); wells that the map does not
name have no label. Splits are those of insitro/ChannelViT, data/jumpcp.py: 60, 20 and 20 % of a plate's cells, by
NumPy's legacy generator of seed 0. They part cells of one well, so a cell is its own subject; with a subject pattern,
such as '/([^/]+_[A-P][0-9]+)_' for wells, splits are drawn by subject instead. The order of the channels is not
written down there: it is taken to be that of CellProfiler's names, AGP, DNA, ER, Mito, RNA (the second is the darkest
by far, as nuclei are), then three planes of brightfield.

Fields of view, as in the Cell Painting Gallery: load_data*.csv, .csv.gz or .parquet with Metadata_Plate, Metadata_Well,
Metadata_Site, and FileName_Orig*, PathName_Orig* for each channel, whose files lie at that path, or below the folder. A
well of a plate is a subject; labels come from a map of wells as above, where there is one.
"""

import os
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from jaxmed.data.prepare.benchmarks.tables import Row, each, rows
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.readers import Parts
from jaxmed.errors import UserError
from jaxmed.files import name_of

EXPECTED = 'a plate such as BR00116991.pq beside platemap_and_metadata, or load_data.csv'
CHANNELS = ('AGP', 'DNA', 'ER', 'Mito', 'RNA', 'brightfield high', 'brightfield low', 'brightfield')
MAPS = 'platemap_and_metadata'
CONTROL = 'control'
_TABLES = ('load_data*.csv', 'load_data*.csv.gz', 'load_data*.parquet')


def here(root: pathlib.Path) -> bool:
  """Whether a table of plates or fields is there."""
  near = (path for pattern in _TABLES for place in (root, *sorted(root.glob('*/'))) for path in place.glob(pattern))
  return bool(_plates(root)) and (_home(root) / MAPS).is_dir() or any(True for _ in near)


def plan(root: pathlib.Path) -> Plan:
  """An item a cell, or a field of view. Rejects are files that are missing or named twice, and tables of plates that
  are empty or damaged.

  Raises:
    UserError: the map of the wells is missing or damaged.
  """
  labels = _labels(_home(root) / MAPS)
  out = Plan([], types=dict.fromkeys(('label', 'plate', 'well', 'field'), pa.string()))
  plates = _plates(root) if (_home(root) / MAPS).is_dir() else []
  if plates:
    each(out, root, plates, lambda table: _cells(out, table, labels))
    return out
  taken: dict[pathlib.Path, str] = {}
  lacking: Counter[str] = Counter()
  each(out, root, _load_data(root), lambda table: _fields(out, root, table, labels, taken, lacking))
  for name, count in lacking.items():
    print(f'jaxmed: tables that name no file for {name}: {count}; their images lack this channel', file=sys.stderr,
          flush=True)
  return out


def _home(root: pathlib.Path) -> pathlib.Path:
  """The folder of the plates: the given folder, or the bucket's folder inside it."""
  return root / 'jumpcp' if (root / 'jumpcp' / MAPS).is_dir() else root


def _plates(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(_home(root).glob('*.pq'))


def _load_data(root: pathlib.Path) -> list[pathlib.Path]:
  found = sorted(path for pattern in _TABLES for path in root.rglob(pattern))
  # Of one folder the table with illumination names the same images again.
  return [path for path in found if 'with_illum' not in path.name or not any(
    other.parent == path.parent and 'with_illum' not in other.name for other in found)]


def _labels(maps: pathlib.Path) -> dict[str, str]:
  """{well: target of its compound}, as the join of the two tables by `broad_sample` gives; of a well that is named
  twice the last one. Nothing joins with nothing: wells without a compound are controls if the metadata have such a row.
  """
  if not maps.is_dir():
    return {}
  compounds = rows(maps / 'JUMP-Target-1_compound_metadata.tsv', ('broad_sample', 'target'))
  wells = rows(maps / 'JUMP-Target-1_compound_platemap.tsv', ('broad_sample', 'well_position'))
  by_sample: dict[str | None, list[Row]] = {}
  for well in wells:
    by_sample.setdefault(well['broad_sample'], []).append(well)
  return {str(well['well_position']): compound['target'] or CONTROL
          for compound in compounds for well in by_sample.get(compound['broad_sample'], ())}


def _cells(out: Plan, table: pathlib.Path, labels: dict[str, str]) -> None:
  found = rows(table, ('ID', 'well_loc', 'path', 'plate_id'))
  seen: set[str] = set()
  for row, split in zip(found, _official(len(found)), strict=True):
    if not row['path'] or not row['ID']:
      raise UserError(f'{table}: a row has no path or ID')
    rel = '/'.join(row['path'].split('/')[-2:])
    file = table.parent / rel
    if not file.is_file() or rel in seen:
      reason = 'names it twice' if rel in seen else 'names it, but no such file exists'
      out.rejects.append((rel, f'{table.name} {reason}'))
      continue
    seen.add(rel)
    words = row['ID'].split('_')
    extra = {'label': labels.get(row['well_loc'] or ''), 'plate': row['plate_id'], 'well': row['well_loc'],
             'field': words[2] if len(words) == 4 else None}
    out.items.append(Item(file, rel, rel, 'jumpcp', subject=row['ID'], split=split, extra=extra,
                          parts=Parts((file,), CHANNELS, 'named')))


def _official(count: int) -> Iterator[str]:
  """The split of each cell of a plate."""
  order = np.random.RandomState(0).permutation(count)
  place = np.empty(count, np.int64)
  place[order] = np.arange(count)
  train = int(0.6 * count)
  val = train + int(0.2 * count)
  return ('train' if i < train else 'val' if i < val else 'test' for i in place)


def _fields(out: Plan, root: pathlib.Path, table: pathlib.Path, labels: dict[str, str],
            taken: dict[pathlib.Path, str], lacking: Counter[str]) -> None:
  """The fields of a table. `taken` holds {file: what it is of} over all tables, `lacking` counts channels without file.
  """
  found = rows(table, ('Metadata_Plate', 'Metadata_Well', 'Metadata_Site', 'FileName_OrigDNA', 'PathName_OrigDNA'))
  listed = [key.removeprefix('FileName_Orig') for key in found[0] if key.startswith('FileName_Orig')] if found else []
  names = [name for name in listed if any(row[f'FileName_Orig{name}'] for row in found)]
  lacking.update(set(listed) - set(names))
  for row in found:
    plate, well, site = (row[f'Metadata_{k}'] or '' for k in ('Plate', 'Well', 'Site'))
    rel = f'{plate}/{well}/{site}'
    files = {name: _file(root, table, row.get(f'PathName_Orig{name}') or '', row[f'FileName_Orig{name}'] or '')
             for name in names}
    lost = next((name for name, file in files.items() if file is None), None)
    if lost:
      out.rejects.append((rel, f'{table.name} names {row[f"FileName_Orig{lost}"] or "nothing"} for {lost}, but no such '
                               'file exists'))
      continue
    twice = _twice(files, rel, taken)
    if twice:
      out.rejects.append((rel, f'{table.name} names {twice}'))
      continue
    order = tuple(file for file in files.values() if file is not None)
    extra = {'label': labels.get(well), 'plate': plate, 'well': well, 'field': site}
    out.items.append(Item(order[0], rel, rel, 'jumpcp', subject=f'{plate}_{well}', extra=extra,
                          parts=Parts(order, tuple(names), 'stack')))


def _twice(files: Mapping[str, pathlib.Path | None], rel: str, taken: dict[pathlib.Path, str]) -> str:
  """The file that two channels or fields would share, in words; '' and a note of all files in `taken` for none."""
  own: dict[pathlib.Path, str] = {}
  for name, file in files.items():
    assert file is not None
    real = pathlib.Path(os.path.realpath(file)) if file.is_symlink() else file
    if real in own:
      return f'{file.name} for both {own[real]} and {name}: expected a file for each'
    if real in taken:
      return f'{file.name} for {name}, which is {taken[real]} already: expected a file for each'
    own[real] = name
  taken |= {real: f'{name} of {rel}' for real, name in own.items()}
  return ''


def _file(root: pathlib.Path, table: pathlib.Path, folder: str, name: str) -> pathlib.Path | None:
  """A channel's file: at its path, or at as much of the end of its path as there is below the folder."""
  if not name:
    return None
  folder, name = name_of(folder), name_of(name)
  parts = [part for part in folder.split('/') if part not in ('', '.', '..')]
  places = [pathlib.Path(folder, name)] if folder.startswith('/') else []
  for base in (table.parent, root):
    places += [base.joinpath(*parts[k:], name) for k in range(len(parts) + 1)]
  return next((place for place in places if place.is_file()), None)
