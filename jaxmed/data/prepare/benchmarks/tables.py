"""Tables that lie beside the images of a benchmark, as rows of text."""

import csv
import gzip
import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.data.prepare.items import one_line
from jaxmed.errors import UserError, choose

Row = dict[str, str | None]


def rows(path: pathlib.Path, needed: Sequence[str]) -> list[Row]:
  """The rows of a CSV (maybe .gz), TSV or Parquet file, values as text, empty ones None. First bytes count before the
  suffix: there is Parquet that is called .tsv.

  Raises:
    UserError: the file is missing or damaged, or lacks a column; the nearest one is named.
  """
  if not path.is_file():
    raise UserError(f'{path} does not exist: expected a table with the columns {", ".join(needed)}')
  try:
    with open(path, 'rb') as f:
      parquet = f.read(4) == b'PAR1'
    names, found = _parquet(path) if parquet else _text(path)
  except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as e:
    raise UserError(f'cannot read {path} as a table: {one_line(e)}') from e
  for name in needed:
    choose(f'column (needed in {path})', name, names)
  return found


def _parquet(path: pathlib.Path) -> tuple[list[str], list[Row]]:
  table = pq.read_table(path)
  simple = [f.name for f in table.schema if not pa.types.is_nested(f.type)]
  text = lambda value: None if value is None or value != value else str(value)  # NaN is pandas' word for nothing
  return simple, [{k: text(v) for k, v in row.items()} for row in table.select(simple).to_pylist()]


def _text(path: pathlib.Path) -> tuple[list[str], list[Row]]:
  unpack = gzip.open if path.suffix == '.gz' else open
  with unpack(path, 'rt', newline='', encoding='utf-8-sig') as f:
    reader = csv.DictReader(f, delimiter='\t' if '.tsv' in path.suffixes else ',')
    found: list[Row] = [{k: v or None for k, v in row.items() if isinstance(k, str)} for row in reader]
  return list(reader.fieldnames or ()), found
