"""MIMIC-CXR: chest radiographs with reports, as PhysioNet has it, and as one table of image-text methods.

As PhysioNet (MIMIC-CXR-JPG with the reports of MIMIC-CXR laid beside the images):

  mimic-cxr-2.0.0-metadata.csv[.gz]     dicom_id, subject_id, study_id, ViewPosition: a row an image
  mimic-cxr-2.0.0-split.csv[.gz]        dicom_id, split: train, validate, test
  mimic-cxr-2.0.0-chexpert.csv[.gz]     study_id and 14 labels: 1, 0, -1 for uncertain
  files/p10/p10000032/s50414267/DICOM_ID.jpg (or .dcm, .png), files/p10/p10000032/s50414267.txt (or below reports/)

As MGCA and others (HKU-MedAI/MGCA, mgca/datasets): a CSV file with the columns Path, ViewPosition, split, findings and
impression, whose paths lie below the folder.

`text` is the impression, then the findings; both are columns, too. A report without these headings is taken whole. Each
subject (pNNNNNNNN) is one; `study` and `view` are columns. Nothing is left out by its view or the length of its text.
"""

import pathlib
import re

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import Listing, columns, find, one_line, sections, split_of
from jaxmed.data.prepare.benchmarks.tables import Row, rows
from jaxmed.data.prepare.items import Plan
from jaxmed.files import text_of

EXPECTED = 'mimic-cxr-2.0.0-metadata.csv, or a CSV file with Path, split, findings and impression'
SUFFIXES = ('.jpg', '.png', '.dcm')
_TABLE = 'mimic-cxr-2.0.0-{}.csv'
_HEADING = re.compile(r'^[ \t]*([A-Z][A-Z /,()-]+):', re.MULTILINE)


def here(root: pathlib.Path) -> bool:
  """Whether the metadata, or a table of that form, is there."""
  return _named(root, 'metadata') is not None or _master(root) is not None


def plan(root: pathlib.Path) -> Plan:
  """An item an image. Rejects are images that are missing, and reports that cannot be read.

  Raises:
    UserError: a table is damaged or lacks a column.
  """
  out = Listing(root, 'mimic-cxr', findings=pa.string(), impression=pa.string(), study=pa.string(), view=pa.string())
  metadata = _named(root, 'metadata')
  if metadata is not None:
    _official(out, metadata)
  elif (table := _master(root)) is not None:
    for row in rows(table, ('Path', 'split')):
      _listed(out, table, row)
  return out.plan


def _named(root: pathlib.Path, word: str) -> pathlib.Path | None:
  name = _TABLE.format(word)
  return next((root / n for n in (name, f'{name}.gz') if (root / n).is_file()), None)


def _master(root: pathlib.Path) -> pathlib.Path | None:
  """The table of image-text methods."""
  for path in sorted(root.glob('*.csv')):
    names = set(columns(path))
    if {'Path', 'ViewPosition', 'split'} <= names and names & {'findings', 'impression'}:
      return path
  return None


def _listed(out: Listing, table: pathlib.Path, row: Row) -> None:
  path = row['Path'] or ''
  file = find(out.root, path) or find(out.root, re.sub(r'^.*?(?=files/)', '', path))
  if file is None:
    out.lost(path, table)
    return
  person, study = re.search(r'(p\d{8})(?:/|$)', path), re.search(r'(s\d{8})(?:/|$)', path)
  told = {'study': study[1] if study else None, 'view': row.get('ViewPosition')}
  out.add(file, sections(row.get('findings'), row.get('impression')) | told,
          subject=person[1] if person else row.get('subject_id') or '', split=split_of(row['split']))


def _official(out: Listing, metadata: pathlib.Path) -> None:
  found = rows(metadata, ('dicom_id', 'subject_id', 'study_id', 'ViewPosition'))
  table = _named(out.root, 'split')
  splits = {r['dicom_id']: r['split'] for r in rows(table, ('dicom_id', 'split'))} if table else {}
  table = _named(out.root, 'chexpert')
  labels = {r['study_id']: r for r in rows(table, ('study_id', 'subject_id'))} if table else {}
  names = [n for n in next(iter(labels.values()), {}) if n not in ('study_id', 'subject_id')]
  out.plan.types |= dict.fromkeys(names, pa.string())
  reports: dict[str, str | None] = {}
  for row in found:
    person, study = f'p{row["subject_id"]}', f's{row["study_id"]}'
    folder = f'files/{person[:3]}/{person}'
    file = next((f for s in SUFFIXES if (f := find(out.root, f'{folder}/{study}/{row["dicom_id"]}{s}'))), None)
    if file is None:
      out.lost(f'{folder}/{study}/{row["dicom_id"]}.jpg', metadata)
      continue
    if study not in reports:
      reports[study] = _report(out, folder, study)
    own = labels.get(row['study_id'], {})
    told = {'study': study, 'view': row['ViewPosition']} | {n: own.get(n) for n in names}
    out.add(file, report(reports[study]) | told, subject=person, split=split_of(splits.get(row['dicom_id'])))


def _report(out: Listing, folder: str, study: str) -> str | None:
  """The report of a study, None without one; one that is no text is a reject."""
  path = find(out.root, f'{folder}/{study}.txt', ('', 'reports', 'mimic-cxr-reports'))
  if path is None:
    return None
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    out.reject(text_of(path.relative_to(out.root).as_posix()), f'is no text that can be read: {e}')
    return None


def report(text: str | None) -> dict[str, str | None]:
  """The columns findings, impression and text of a report: what stands below these headings, or else all of it."""
  if not text:
    return sections(None, None)
  heads = list(_HEADING.finditer(text))
  ends = [*(h.start() for h in heads), len(text)][1:]
  parts = {h[1].strip(): text[h.end():end] for h, end in zip(heads, ends, strict=False)}
  taken = {k: next((v for name, v in parts.items() if name.startswith(k)), None) for k in ('FINDINGS', 'IMPRESSION')}
  found = sections(taken['FINDINGS'], taken['IMPRESSION'])
  return found if found['text'] else found | {'text': one_line(text) or None}
