"""Checksums of checkpoints, RUN/checkpoints.sums/STEP.json: {path in the checkpoint: [bytes, CRC-32]}.

They are written before a checkpoint gets its final name, so that one with that name always has its own; one of an
older version of jaxmed has none and is taken as it is. CRC-32 finds every change of up to 32 adjacent bits, and any
other damage but one in 4e9; zlib gives 3.9 GB/s on one core (SHA-256: 0.8), without holding Python's lock.
"""

import concurrent.futures
import json
import pathlib
import zlib
from collections.abc import Iterable

from jaxmed import files

_BLOCK = 1 << 22
_THREADS = 8
_METADATA = '_CHECKPOINT_METADATA'  # gets the time of its end after the sums are taken
_MARK = 'commit_success.txt'  # says when, nothing else


def path(checkpoints: pathlib.Path, step: int) -> pathlib.Path:
  """The file with the sums of a step."""
  return checkpoints.parent / 'checkpoints.sums' / f'{step}.json'


def take(checkpoints: pathlib.Path, step: int, folder: pathlib.Path) -> None:
  """Writes the sums of the checkpoint that lies, complete, in `folder`."""
  names = sorted(p for p in folder.rglob('*') if p.is_file() and p.name not in (_METADATA, _MARK))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    found = dict(zip((p.relative_to(folder).as_posix() for p in names), pool.map(_sum, names), strict=True))
  files.write_json(path(checkpoints, step), found)


def _sum(file: pathlib.Path) -> list[int]:
  size, crc = 0, 0
  with open(file, 'rb') as f:
    while block := f.read(_BLOCK):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]


def damage(checkpoints: pathlib.Path, step: int, part: int = 0, parts: int = 1) -> str:
  """What is wrong with a checkpoint, naming the file, or ''.

  Args:
    part, parts: look at this share of the files only, for processes that divide the work.
  """
  folder, listed = checkpoints / str(step), path(checkpoints, step)
  if not listed.is_file():
    return ''
  try:
    wanted = json.loads(listed.read_text(encoding='utf-8'))
    rows = sorted((name, int(size), int(crc)) for name, (size, crc) in wanted.items())
  except (OSError, ValueError, TypeError, AttributeError) as e:
    return '' if part else f'{listed} is damaged ({e})'
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    said = list(pool.map(lambda row: _differs(folder / row[0], *row[1:]), rows[part::parts]))
  return next(filter(None, [*said, '' if part else _unreadable(folder / _METADATA)]), '')


def _differs(file: pathlib.Path, size: int, crc: int) -> str:
  try:
    have = file.stat().st_size
    if have != size:
      return f'{file} has {have} bytes instead of {size}'
    return '' if _sum(file) == [size, crc] else f'{file} has another checksum than when it was written'
  except FileNotFoundError:
    return f'{file} is missing'
  except OSError as e:
    return f'{file} cannot be read: {e.strerror or e}'


def _unreadable(file: pathlib.Path) -> str:
  """Metadata has no sum, so it must at least be JSON."""
  try:
    json.loads(file.read_text(encoding='utf-8'))
    return ''
  except FileNotFoundError:
    return f'{file} is missing'
  except (OSError, ValueError) as e:
    return f'{file} is damaged: {e}'


def prune(checkpoints: pathlib.Path, steps: Iterable[int]) -> None:
  """Removes the sums of checkpoints that are gone."""
  kept = {str(s) for s in steps}
  for file in path(checkpoints, 0).parent.glob('*.json'):
    if file.stem not in kept:
      file.unlink(missing_ok=True)
