"""Files that are whole or absent: everything is written aside, flushed, then renamed into place."""

import contextlib
import csv
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxmed.errors import UserError

# A byte that os.fsdecode could not decode; a backslash that would be read as the begin of one.
_UNTOLD = re.compile('[\udc80-\udcff]|\\\\(?=x[0-9a-f]{2})')


def check_place(path: str | os.PathLike) -> None:
  """Raises a UserError where `path` could not be written, before the work that makes its content."""
  path = pathlib.Path(path)
  if path.is_dir():
    raise UserError(f'cannot write {path}: it is a folder')
  _part(pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path).unlink()


def _part(path: pathlib.Path) -> pathlib.Path:
  """A new empty file beside `path`, whose folder is made."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.part', dir=path.parent)
    os.close(fd)
    os.chmod(name, 0o666 & ~_umask())
  except OSError as e:
    raise UserError(f'cannot write {path}: {e.strerror or e}') from e
  return pathlib.Path(name)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path beside `path`; on success it is renamed onto `path`, on failure removed. A link stays, and
  the file that it leads to is written.

  Raises:
    UserError: the place cannot be written (missing permission, full disk, a folder in the way).
  """
  path = pathlib.Path(os.path.realpath(path) if os.path.islink(path) else path)
  part = _part(path)
  try:
    yield part
    with open(part, 'rb') as f:
      os.fsync(f.fileno())
    os.replace(part, path)
  except OSError as e:
    raise UserError(f'cannot write {path}: {e.strerror or e}') from e
  finally:
    part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file, whole or not at all."""
  with writing(path) as part:
    part.write_text(text, encoding='utf-8')


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON with sorted keys, whole or not at all."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + '\n')


def write_csv(path: str | os.PathLike, rows: Iterable[Sequence[Any]]) -> None:
  """Writes rows as CSV, whole or not at all."""
  with writing(path) as part, open(part, 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows(rows)


def read_json(path: str | os.PathLike) -> Any:
  """Reads JSON; a UserError names the file that is missing or damaged."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except FileNotFoundError as e:
    raise UserError(f'{path} does not exist') from e
  except (OSError, ValueError) as e:
    raise UserError(f'cannot read {path} as JSON: {e}') from e


def read_json_lines(path: str | os.PathLike) -> tuple[list[Any], int]:
  """The values of a file of JSON lines, and how many lines are damaged, as a kill leaves the last one.

  A missing file has none; a UserError names one that cannot be read.
  """
  try:
    lines = pathlib.Path(path).read_bytes().decode('utf-8', 'replace').splitlines()
  except FileNotFoundError:
    return [], 0
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror or e}') from e
  values, damaged = [], 0
  for line in lines:
    if line.strip():
      try:
        values.append(json.loads(line))
      except ValueError:
        damaged += 1
  return values, damaged


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def text_of(name: str) -> str:
  r"""A file name as text that UTF-8 can hold: bytes that are not UTF-8 become \xNN; `name_of` gives the name back.

  The backslash of a name that holds such a sequence itself becomes \x5c.
  """
  return _UNTOLD.sub(lambda m: f'\\x{ord(m[0]) & 0xff:02x}', name)


def name_of(text: str) -> str:
  """The file name that `text_of` made a text of."""
  raw = re.sub(rb'\\x([0-9a-f]{2})', lambda m: bytes.fromhex(m[1].decode()), text.encode('utf-8', 'surrogateescape'))
  return raw.decode('utf-8', 'surrogateescape')


def shown(text: str) -> str:
  r"""Text for a person: bytes of file names that are not UTF-8 become \xNN, all else stays."""
  return re.sub('[\udc80-\udcff]', lambda m: f'\\x{ord(m[0]) & 0xff:02x}', text)


def unique_names(names: Iterable[str]) -> list[str]:
  """The names, equal ones with a number: a, a-2."""
  out: list[str] = []
  for name in names:
    candidate, n = name, 2
    while candidate in out:
      candidate, n = f'{name}-{n}', n + 1
    out.append(candidate)
  return out
