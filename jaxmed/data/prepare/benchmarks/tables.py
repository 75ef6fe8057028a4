"""Tables that lie beside the images of a benchmark, as rows of text."""

import csv
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.data.prepare.items import Plan, one_line
from jaxmed.data.prepare.spreadsheet import first_line, named, raw_bytes, text
from jaxmed.errors import UserError, choose
from jaxmed.files import text_of

Row = dict[str, str | None]


def rows(path: pathlib.Path, needed: Sequence[str]) -> list[Row]:
  """The rows of a CSV (maybe .gz), TSV or Parquet file, values as text, empty ones None. First bytes count before the
  suffix: there is Parquet that is called .tsv.

  Raises:
    UserError: the file is missing, empty or damaged, has a column twice, or lacks one; the nearest one is named.
  """
  if not os.path.lexists(path):
    raise UserError(f'{path} does not exist: expected a table with the columns {", ".join(needed)}')
  data = raw_bytes(path)
  try:
    names, found = _parquet(path, data) if data[:4] == b'PAR1' else _text(path, data, needed[0])
  except (pa.ArrowException, OSError, csv.Error) as e:
    raise UserError(f'cannot read {path} as a table: {one_line(e)}') from e
  for name in needed:
    choose(f'column (needed in {path})', name, names)
  return found


def each(plan: Plan, root: pathlib.Path, tables: Iterable[pathlib.Path], add: Callable[[pathlib.Path], None]) -> None:
  """Adds what each table lists to a plan; one that cannot be read, or lists nothing, is a reject: the others stay."""
  for table in tables:
    items, rejects = len(plan.items), len(plan.rejects)
    rel = text_of(table.relative_to(root).as_posix())
    try:
      add(table)
      if (items, rejects) == (len(plan.items), len(plan.rejects)):
        raise UserError('lists no image')
    except UserError as e:
      del plan.items[items:], plan.rejects[rejects:]
      plan.rejects.append((rel, one_line(ValueError(str(e)))))


def _parquet(path: pathlib.Path, data: bytes) -> tuple[list[str], list[Row]]:
  source = pq.ParquetFile(io.BytesIO(data))
  named(path, source.schema_arrow.names)
  simple = [f.name for f in source.schema_arrow if not pa.types.is_nested(f.type)]
  as_text = lambda value: None if value is None or value != value else str(value)  # NaN is pandas' word for nothing
  return simple, [{k: as_text(v) for k, v in row.items()} for row in source.read(simple).to_pylist()]


def _text(path: pathlib.Path, data: bytes, needed: str) -> tuple[list[str], list[Row]]:
  found, _ = text(path, data)
  header, delimiter, skipped = first_line(found, needed)
  names = named(path, header)
  lines = csv.reader(io.StringIO(found, newline=''), delimiter=delimiter)
  for _ in range(skipped + 1):
    next(lines)
  out: list[Row] = []
  for line in filter(None, lines):
    if any(line[len(names):]):
      raise UserError(f'cannot read {path} as a table: line {lines.line_num} has {len(line)} cells, expected '
                      f'{len(names)}')
    out.append(dict.fromkeys(names) | dict(zip(names, (cell or None for cell in line))))
  return names, out
