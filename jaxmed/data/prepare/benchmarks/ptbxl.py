"""PTB-XL: electrocardiograms of 12 leads with reports and statements (Wagner et al. 2020, PhysioNet).

  ptbxl_database.csv       ecg_id, patient_id, report, scp_codes, strat_fold, filename_lr, filename_hr ...
  scp_statements.csv       the statements, with diagnostic_class where they are diagnoses
  records100/00000/00001_lr.hea, .dat ...

A record is the trace as an image [leads, samples, 1] in mV (channel `ECG`), the same as `signal` [samples, leads],
and the report as `text`. `label` has the superclasses of all diagnostic statements, 'MI|STTC', whatever their
likelihood, as copies of the data set's example aggregate them; None where there is no diagnosis, or no
scp_statements.csv. Of strat_fold 1 to 8 are train, 9 val and 10 test, as the data set recommends;
folds keep patients together. The rate is 100 Hz where records100 is there, else 500 Hz.
"""

import ast
import pathlib

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import Listing, columns, find, one_line
from jaxmed.data.prepare.benchmarks.tables import rows
from jaxmed.data.prepare.items import Plan
from jaxmed.data.readers import Parts
from jaxmed.errors import UserError

EXPECTED = 'ptbxl_database.csv beside records100 or records500'
TABLE, STATEMENTS = 'ptbxl_database.csv', 'scp_statements.csv'
SPLITS = {**dict.fromkeys(range(1, 9), 'train'), 9: 'val', 10: 'test'}


def here(root: pathlib.Path) -> bool:
  """Whether the table is there."""
  return {'strat_fold', 'filename_lr'} <= set(columns(root / TABLE))


def plan(root: pathlib.Path) -> Plan:
  """An item a recording. Rejects are recordings that are missing.

  Raises:
    UserError: a table is damaged, or says of a row what cannot be.
  """
  out = Listing(root, 'ptbxl', label=pa.string(), signal=pa.string(), signal_rate=pa.float64(), age=pa.string(),
                sex=pa.string())
  table = root / TABLE
  classes = _classes(root / STATEMENTS)
  column = 'filename_lr' if (root / 'records100').is_dir() else 'filename_hr'
  for row in rows(table, ('ecg_id', 'patient_id', 'report', 'scp_codes', 'strat_fold', column)):
    name = row[column] or ''
    file = find(root, f'{name}.hea')
    samples = find(root, f'{name}.dat')
    if file is None or samples is None:
      out.lost(f'{name}{".hea" if file is None else ".dat"}', table)
      continue
    fold = (row['strat_fold'] or '').removesuffix('.0')
    if not fold.isdigit() or int(fold) not in SPLITS:
      raise UserError(f'{table}: strat_fold of {row["ecg_id"]} is {row["strat_fold"]!r}: expected 1 to 10')
    told = {'text': one_line(row['report']) or None, 'label': _label(row['scp_codes'], classes, table),
            'age': row.get('age'), 'sex': row.get('sex'), 'signal': f'{name}.hea'}
    out.add(file, told, subject=f'patient {(row["patient_id"] or "").removesuffix(".0")}', split=SPLITS[int(fold)],
            parts=Parts((file, samples), ('ECG',), 'signal'))
  return out.plan


def _classes(path: pathlib.Path) -> dict[str, str]:
  """{statement: superclass} of the diagnostic ones."""
  if not path.is_file():
    return {}
  first = columns(path)[:1] or ('',)
  found = rows(path, ('diagnostic_class',))
  key = first[0] if first[0] in (found[0] if found else {}) else next(iter(found[0]), '') if found else ''
  return {str(row[key]): str(row['diagnostic_class']) for row in found if row['diagnostic_class']}


def _label(codes: str | None, classes: dict[str, str], table: pathlib.Path) -> str | None:
  try:
    found = ast.literal_eval(codes or '{}')
  except (ValueError, SyntaxError):
    found = None
  if not isinstance(found, dict):
    raise UserError(f'{table}: scp_codes {codes!r}: expected {{statement: likelihood}}')
  return '|'.join(sorted({classes[c] for c in found if c in classes})) or None
