"""Text tables as people's programs write them: encodings, delimiters, names of columns, and cells that no number holds.

A table is UTF-8, UTF-16 or UTF-32 with a mark at its begin, or else Windows' Latin letters (cp1252), which is told. The
delimiter is the one of `,` `;` tab and `|` that makes the needed column one of the first line.
"""

import csv
import io
import os
import pathlib
import sys
import zlib
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from jaxmed.data.prepare.walk import kind_of
from jaxmed.errors import UserError, choose
from jaxmed.files import shown

DELIMITERS = (',', ';', '\t', '|')
NULLS = ('', 'NA', 'NaN', 'nan', 'null')
_MARKS = ((b'\xef\xbb\xbf', 'utf-8-sig'), (b'\xff\xfe\x00\x00', 'utf-32'), (b'\x00\x00\xfe\xff', 'utf-32'),
          (b'\xff\xfe', 'utf-16'), (b'\xfe\xff', 'utf-16'))
_PACKED = {'.gz': 'gzip', '.bz2': 'bz2', '.zst': 'zstd', '.lz4': 'lz4'}
# Cells that a number would change: leading zeros; an exponent without a sign, as of the well 1E5.
_NO_NUMBER = r'^\s*[+-]?(0\d+([.]\d+)?|\d+[eE]\d+)\s*$'
_NO_FLOAT = r'^\s*[+-]?\d{16,}\s*$'  # an integer with more digits than a float64 holds


def raw_bytes(path: pathlib.Path) -> bytes:
  """The bytes of a table, unpacked as its suffix says.

  Raises:
    UserError: no such file, no regular file, or one that cannot be read.
  """
  if not path.is_file():
    kind = kind_of(path) or 'a folder'
    raise UserError(f'{path} does not exist: expected a table' if not os.path.lexists(path) else
                    f'{path} is {kind}: expected a table in a regular file')
  try:
    data = path.read_bytes()
    packed = _PACKED.get(path.suffix.lower())
    return pa.input_stream(io.BytesIO(data), compression=packed).read() if packed else data
  except (OSError, pa.ArrowException, zlib.error, EOFError) as e:
    raise UserError(f'cannot read {path} as a table: {e}') from e


def text(path: pathlib.Path, data: bytes) -> tuple[str, str]:
  """A table as text, and its encoding.

  Raises:
    UserError: empty, or no text.
  """
  if not data.strip():
    raise UserError(f'cannot read {path} as a table: it is empty')
  if data.startswith(b'PK\x03\x04') or data.startswith(b'\xd0\xcf\x11\xe0'):
    raise UserError(f'cannot read {path} as a table: it is a workbook or an archive, save the sheet as CSV')
  encoding = next((name for mark, name in _MARKS if data.startswith(mark)), 'utf-8')
  try:
    found = data.decode(encoding)
  except UnicodeDecodeError as e:
    if encoding not in ('utf-8', 'utf-8-sig'):
      raise UserError(f'cannot read {path} as a table: its first bytes say {encoding.upper()}, but {e.reason} at byte '
                      f'{e.start}') from e
    line, byte = data.count(b'\n', 0, e.start) + 1, data[e.start]
    encoding = 'cp1252'
    try:
      found = data.decode(encoding)
    except UnicodeDecodeError:
      encoding = 'latin-1'
      found = data.decode(encoding)
    print(f'jaxmed: {shown(str(path))} is no UTF-8 (byte 0x{byte:02x} in line {line}): read as {encoding}; save it as '
          'UTF-8 if letters come out wrong', file=sys.stderr, flush=True)
  if '\0' in found:
    raise UserError(f'cannot read {path} as a table: it holds NUL bytes, expected text in UTF-8 (UTF-16 needs its byte '
                    'order mark)')
  return found, encoding


def first_line(found: str, needed: str) -> tuple[list[str], str, int]:
  """(names of the columns, delimiter, lines before them): the delimiter that makes the needed name one of them, else a
  comma. Excel's line `sep=;` may come first."""
  skipped = 0
  if found[:4].lower() == 'sep=' and found[5:6] in ('\n', '\r'):
    skipped = 1
  body = found.split('\n', 1)[1] if skipped else found
  rows = {d: next(csv.reader(io.StringIO(body, newline=''), delimiter=d), []) for d in DELIMITERS}
  delimiter = next((d for d in DELIMITERS if needed in rows[d]), ',')
  return rows[delimiter], delimiter, skipped


def named(path: pathlib.Path, names: Sequence[str]) -> list[str]:
  """The names of columns; one without a name is called by its place, `unnamed_1`, ...

  Raises:
    UserError: two columns of one name.
  """
  out = [name if name.strip() else f'unnamed_{i}' for i, name in enumerate(names, 1)]
  twice = [name for name, count in Counter(out).items() if count > 1]
  if twice:
    places = ' and '.join(str(i) for i, name in enumerate(out, 1) if name == twice[0])
    raise UserError(f'{path} has two columns {twice[0]!r} (columns {places}): rename one of them')
  return out


def read_text(path: pathlib.Path, data: bytes, needed: str, types: dict[str, pa.DataType]) -> tuple[pa.Table, str]:
  """A text table with typed columns, and its encoding.

  A column becomes numbers only where each cell comes back from its number: one with leading zeros, with integers of
  more digits than a float holds, or with `1E5` stays text. Columns without name and content are left out.

  Args:
    path: of the table, for errors.
    data: its bytes.
    needed: the name of a column that it must have.
    types: of columns whose type is known.

  Raises:
    UserError: no text, no such column (the nearest is named), two columns of one name.
    pa.ArrowException: rows of other lengths, cells that do not have the known type.
  """
  found, encoding = text(path, data)
  header, delimiter, skipped = first_line(found, needed)
  choose(f'column (needed in {path})', needed, header)
  names = named(path, header)
  plain = found.encode()
  def read(types: dict[str, pa.DataType], only: Sequence[str] | None = None) -> pa.Table:
    return pacsv.read_csv(
      io.BytesIO(plain), pacsv.ReadOptions(column_names=names, skip_rows=skipped, skip_rows_after_names=1,
                                           block_size=min(len(plain) + 1, 2**31 - 1)),
      pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
      pacsv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=list(NULLS),
                           include_columns=list(only or ())))

  table = read(types)
  numbers = [f.name for f in table.schema if f.name not in types and not pa.types.is_string(f.type)]
  cells = read(dict.fromkeys(numbers, pa.string()), numbers) if numbers else table
  for name in numbers:
    odd = pc.match_substring_regex(cells[name], _NO_NUMBER)
    if pa.types.is_floating(table.schema.field(name).type):
      odd = pc.or_(odd, pc.match_substring_regex(cells[name], _NO_FLOAT))
    if pc.any(odd).as_py():
      table = table.set_column(table.column_names.index(name), name, cells[name])
  for name, given in zip(names, header, strict=True):
    if not given.strip():
      if table[name].null_count == len(table):
        table = table.drop_columns([name])
      else:
        print(f'jaxmed: a column of {shown(str(path))} has no name: it is called {name}', file=sys.stderr, flush=True)
  return table, encoding
