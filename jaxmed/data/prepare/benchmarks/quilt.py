"""Quilt-1M: histology images with captions (Ikezogwo et al. 2023, wisdomikezogwo/quilt1m).

  quilt_1M_lookup.csv     caption, image_path, subset, split, pathology, magnification ...: images below quilt_1m/,
                          images/ or the folder
  quilt_data.csv          of a reconstruction: video_id, image_path, medical_text (a list as Python writes it)

Rows of one image are its captions. Images of a video are one subject where the table has video_id; else each image is
its own, as the lookup does not say what video it is of. The column split is kept where it says train, val or test.
"""

import pathlib

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import Listing, columns, find, listed, one_line, split_of, texts
from jaxmed.data.prepare.benchmarks.tables import Row, rows
from jaxmed.data.prepare.items import Plan

EXPECTED = 'quilt_1M_lookup.csv or quilt_data.csv'
TABLES = {'quilt_1M_lookup.csv': 'caption', 'quilt_data.csv': 'medical_text'}
FOLDERS = ('', 'quilt_1m', 'images', 'images_part_1/quilt_1m')
KEPT = ('subset', 'pathology', 'magnification', 'single_wsi', 'not_histology')


def here(root: pathlib.Path) -> bool:
  """Whether one of the tables is there."""
  return any('image_path' in columns(root / name) for name in TABLES)


def plan(root: pathlib.Path) -> Plan:
  """An item an image. Rejects are images that are missing or have no caption.

  Raises:
    UserError: a table is damaged or lacks a column.
  """
  out = Listing(root, 'quilt', **dict.fromkeys(KEPT, pa.string()))
  for name, column in TABLES.items():
    table = root / name
    if not table.is_file():
      continue
    found: dict[str, list[Row]] = {}
    for row in rows(table, ('image_path', column)):
      found.setdefault(row['image_path'] or '', []).append(row)
    for path, some in found.items():
      file = find(root, path, FOLDERS)
      captions = [one_line(t) for row in some for t in listed(row[column])]
      if file is None:
        out.lost(path, table)
      elif not captions:
        out.reject(path, f'{name} has no caption of it')
      else:
        first = some[0]
        out.add(file, texts(captions) | {k: first.get(k) for k in KEPT}, subject=first.get('video_id') or '',
                split=split_of(first.get('split')))
  return out.plan
