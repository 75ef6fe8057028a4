"""CHAMMI: single cells of three microscopy data sets with 3, 4 and 5 channels (Chen et al. 2023, zenodo 7988357).

  Allen/enriched_meta.csv, HPA/enriched_meta.csv, CP/enriched_meta.csv (or morphem70k_v2.csv of all three), and the
  images that they name by `file_path`, [H, W * C]: the channels side by side, each `channel_width` pixels wide

The channels' names and order are those of chaudatascience/channel_adaptive_models (configs/morphem70k/data_chunk); the
data sets share nucleus, protein and er. `train_test_split` Train is train, Task_one to Task_four are test, and stay as
the column `task`, whose official scores are task by task (MorphEm). There is no val. The tasks split cells, not fields,
so each cell is its own subject.
"""

import pathlib

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.tables import Row, each, rows
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.readers import Parts
from jaxmed.errors import UserError, choose
from jaxmed.files import name_of, text_of

EXPECTED = 'Allen, HPA or CP with enriched_meta.csv, or morphem70k_v2.csv'
CHANNELS = {'Allen': ('nucleus', 'membrane', 'protein'), 'HPA': ('microtubules', 'protein', 'nucleus', 'er'),
            'CP': ('nucleus', 'er', 'rna', 'golgi', 'mito')}
MERGED, META = 'morphem70k_v2.csv', 'enriched_meta.csv'
# Column of the manifest: columns of the tables, of which the first that there is counts.
COLUMNS = {'label': ('Label', 'label'), 'task': ('train_test_split',), 'cell_type': ('cell_type',),
           'plate': ('Plate', 'plate'), 'structure': ('Structure',), 'field': ('FOVId',)}


def here(root: pathlib.Path) -> bool:
  """Whether one of the tables is there."""
  return any((root / name / META).is_file() for name in CHANNELS) or (root / MERGED).is_file()


def plan(root: pathlib.Path) -> Plan:
  """An item a cell; rejects are a file that is missing and the table of one data set that cannot be read.

  Raises:
    UserError: the table of all data sets is damaged, or says of a row what cannot be.
  """
  out = Plan([], types=dict.fromkeys(COLUMNS, pa.string()))
  def add(path: pathlib.Path) -> None:
    for row in rows(path, ('file_path', 'channel_width', 'train_test_split')):
      _add(out, root, path.parent.name, row, path)

  each(out, root, (path for name in CHANNELS if (path := root / name / META).is_file()), add)
  if not out.items and not out.rejects and (root / MERGED).is_file():
    for row in rows(root / MERGED, ('file_path', 'channel_width', 'train_test_split', 'chunk')):
      _add(out, root, choose(f'chunk in {root / MERGED}', str(row['chunk']), CHANNELS), row, root / MERGED)
  return out


def _add(out: Plan, root: pathlib.Path, name: str, row: Row, table: pathlib.Path) -> None:
  path, width = row['file_path'], row['channel_width'] or ''
  if not path:
    raise UserError(f'{table}: a row has no file_path')
  if not width.removesuffix('.0').isdigit():
    raise UserError(f'{table}: channel_width of {path} is {width!r}: expected a number of pixels')
  file = next((f for f in (root / name_of(path), root / name / name_of(path)) if f.is_file()), None)
  if file is None:
    out.rejects.append((path, f'{table.name} names it, but no such file exists'))
    return
  rel = text_of(file.relative_to(root).as_posix())
  extra = {k: next((row[c] for c in columns if row.get(c)), None) for k, columns in COLUMNS.items()}
  split = 'train' if row['train_test_split'] == 'Train' else 'test'
  parts = Parts((file,), CHANNELS[name], 'tape', width=int(width.removesuffix('.0')))
  out.items.append(Item(file, rel, rel, name, subject=rel, split=split, extra=extra, parts=parts))
