"""Where a corpus grows: OUT.part, which outlives a kill, belongs to one process, and becomes OUT at the end."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import IO

from jaxmed import files
from jaxmed.data.corpus.corpus_format import is_corpus
from jaxmed.errors import Stopped, Unavailable, UserError
from jaxmed.files import shown

_PLAN, _LOCK, _WHOLE = 'plan.json', 'lock', 'whole'


@dataclasses.dataclass(frozen=True)
class Place:
  """The folder OUT.part.

  Attributes:
    part: it.
    finished: the corpus lies in OUT already; only the rest of OUT.part is there still.
  """

  part: pathlib.Path
  finished: bool = False

  @property
  def blocks(self) -> pathlib.Path:
    """Where finished blocks lie, and unfinished ones in its folder `tmp`."""
    return self.part / 'blocks'

  @property
  def corpus(self) -> pathlib.Path:
    """What becomes OUT."""
    return self.part / 'corpus'


def check_free(out: str | os.PathLike, overwrite: bool) -> None:
  """Raises a UserError where OUT exists (with `overwrite`: and is no corpus); a link counts as what it leads to."""
  out = _absolute(out)
  if not os.path.lexists(out) or _swapped(_part(out)):
    return
  if not overwrite:
    raise UserError(f'{out} exists: choose another folder, or say overwrite')
  empty = out.is_dir() and not any(out.iterdir())
  if not empty and not is_corpus(out):
    raise UserError(f'{out} is no corpus, so it is not overwritten: choose another folder, or remove it')


@contextlib.contextmanager
def building(out: str | os.PathLike, overwrite: bool, fingerprint: str) -> Iterator[Place]:
  """Yields OUT.part; its folder `corpus` is renamed to OUT on success.

  A user's mistake or a full disk removes OUT.part. Whatever else ends the work keeps it: the next call with the same
  fingerprint (of plan and options) finds there what is done; one with another fingerprint says so and starts afresh.

  Raises:
    UserError: OUT exists (with `overwrite`: and is no corpus), another process is at work on it, the place cannot
      be written, the disk is full.
  """
  out = _absolute(out)
  check_free(out, overwrite)
  keep = False
  lock: IO | None = None
  try:
    lock = _locked(_part(out), out)
    place = _claimed(_part(out), out, fingerprint)
    if not place.finished:
      check_free(out, overwrite)  # a finished corpus of other words may lie there
    yield place
    if not place.finished:
      files.write_text(place.part / _WHOLE, '')
      _swap(place.corpus, out)
  except (Stopped, Unavailable):
    keep = True
    raise
  except Exception as e:  # array_record raises RuntimeError, pyarrow OSError, protobuf others
    if is_full(e):
      raise UserError(f'the disk is full: nothing was kept of {out}') from e
    if isinstance(e, OSError):
      raise UserError(f'cannot write {out}: {e.strerror or e}') from e
    keep = not isinstance(e, UserError)
    raise
  except BaseException:
    keep = True
    raise
  finally:
    if lock is not None:
      if not keep:
        _remove(_part(out))
      lock.close()


def is_full(error: BaseException | None) -> bool:
  """Whether an error comes from a full disk or quota."""
  while error is not None:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def _absolute(out: str | os.PathLike) -> pathlib.Path:
  """Where OUT lies; of a link, where it leads: the link stays."""
  if not os.fspath(out):
    raise UserError('out is empty: expected a folder to write')
  found = os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out)
  if shown(found) != found:
    raise UserError(f'cannot write {found}: the name is no UTF-8, choose another place')
  return pathlib.Path(found)


def _part(out: pathlib.Path) -> pathlib.Path:
  return out.with_name(out.name + '.part')


def _swapped(part: pathlib.Path) -> bool:
  return (part / _WHOLE).exists() and not (part / 'corpus').exists()


def _remove(part: pathlib.Path) -> None:
  """Removes OUT.part so that a kill meanwhile leaves no half of it that could be taken for a whole."""
  gone = part.with_name(f'.{part.name}.gone')
  shutil.rmtree(gone, ignore_errors=True)
  try:
    os.rename(part, gone)
  except OSError:
    gone = part
  shutil.rmtree(gone, ignore_errors=True)


def _locked(part: pathlib.Path, out: pathlib.Path) -> IO:
  """Makes OUT.part and locks it; the lock ends with this process, however it ends."""
  part.mkdir(parents=True, exist_ok=True)
  lock = open(part / _LOCK, 'w')  # noqa: SIM115
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
      lock.close()
      raise _Busy(f'another process is preparing {out}: wait for it, or choose another folder') from e
    # A file system without locks: nothing to be had there.
  return lock


class _Busy(UserError):
  """OUT.part belongs to somebody else, so it is left alone."""


def _claimed(part: pathlib.Path, out: pathlib.Path, fingerprint: str) -> Place:
  """OUT.part, emptied unless its finished blocks belong to this fingerprint."""
  before = files.read_json(part / _PLAN).get('fingerprint') if (part / _PLAN).exists() else None
  if before == fingerprint and (not _swapped(part) or is_corpus(out)):
    return Place(part, _swapped(part))
  if before not in (None, fingerprint):
    print(f'jaxmed: {part} was begun with other files or options: starting afresh', file=sys.stderr)
  (part / _PLAN).unlink(missing_ok=True)  # first: without it nothing here counts
  for entry in part.iterdir():
    if entry.is_dir():
      shutil.rmtree(entry)
    elif entry.name != _LOCK:
      entry.unlink()
  place = Place(part)
  (place.blocks / 'tmp').mkdir(parents=True)
  place.corpus.mkdir()
  files.write_json(part / _PLAN, {'fingerprint': fingerprint})
  return place


def _swap(part: pathlib.Path, out: pathlib.Path) -> None:
  old = out.with_name(out.name + '.old')
  shutil.rmtree(old, ignore_errors=True)
  if out.exists():
    os.rename(out, old)
  try:
    os.rename(part, out)
  except OSError:
    if old.exists():
      os.rename(old, out)
    raise
  shutil.rmtree(old, ignore_errors=True)
