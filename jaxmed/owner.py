"""Who writes a place: one process at a time, told to any other at once, and no lock is left by one that is gone.

A small JSON file beside what is written names its owner: host, process, start times and a token. It is made by a hard
link, which is atomic on shared file systems too. An owner touches it every BEAT seconds. One on this machine is looked
up among the processes; of one elsewhere, which nobody here can ask for, a sign of life is waited for. The file of an
owner that is gone is taken over with a note.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from jaxmed.errors import UserError

NAME = '.owner.json'
BEAT, DEAD = 5.0, 20.0  # seconds between signs of life; without one for so long, an owner elsewhere is gone
SETTLE = 0.3  # seconds after a takeover, in which one that began at the same moment would show
Identity = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Owner:
  """The right to write, held by this process until `release`."""

  lock: pathlib.Path
  token: str
  ended: threading.Event = dataclasses.field(default_factory=threading.Event)

  def check(self) -> None:
    """Raises a UserError where another process took the place over, as after a long suspension."""
    now = _read(self.lock)
    if now is None or now.get('token') != self.token:
      raise UserError(f'{self.lock.parent} was taken over by {_named(now or {})}: this process writes it no more')

  def release(self) -> None:
    """Removes the file, if it is still this process's."""
    self.ended.set()
    _held.pop(self.lock, None)
    with contextlib.suppress(OSError):
      if (_read(self.lock) or {}).get('token') == self.token:
        self.lock.unlink()

  def _beat(self) -> None:
    while not self.ended.wait(BEAT):
      with contextlib.suppress(OSError):
        if (_read(self.lock) or {}).get('token') == self.token:
          os.utime(self.lock)


_held: dict[pathlib.Path, Owner] = {}  # by this process


def release_all() -> None:
  """Gives up whatever this process owns, before it ends without unwinding."""
  for owner in list(_held.values()):
    owner.release()


@contextlib.contextmanager
def of_folder(folder: str | os.PathLike) -> Iterator[Owner]:
  """Owns a folder that is written, which is made where there is none and removed again if nothing came into it.

  Within another `of_folder` of this process it is the same owner.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  if folder / NAME in _held:  # by who called
    yield _held[folder / NAME]
    return
  try:
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f'cannot write {folder}: {e.strerror or e}') from e
  owner = acquire(folder / NAME, folder)
  try:
    yield owner
  finally:
    owner.release()
    if new:
      with contextlib.suppress(OSError):  # there is something in it
        folder.rmdir()


@contextlib.contextmanager
def of_file(path: str | os.PathLike) -> Iterator[Owner]:
  """Owns a file that is written; where its folder is missing, that is for the writer to say."""
  path = pathlib.Path(path)
  if not path.parent.is_dir():
    yield Owner(path, '')
    return
  owner = acquire(path.with_name(f'.{path.name}{NAME}'), path)
  try:
    yield owner
  finally:
    owner.release()


def alive(lock: pathlib.Path) -> bool:
  """Whether the file `lock` names an owner that lives; one on another machine is asked for a sign of life of late."""
  other = _read(lock)
  if not other:
    return False
  if other.get('machine') == _machine():
    return _started(int(other.get('process', 0))) == other.get('started')
  return time.time_ns() - _touched(lock) < DEAD * 1e9


def acquire(lock: pathlib.Path, what: pathlib.Path) -> Owner:
  """Takes the place `what` for this process, whose file is `lock`.

  Raises:
    UserError: another process writes it, or the file cannot be written.
  """
  me = _me()
  try:
    while not _made(lock, me):
      other, seen = _read(lock), _touched(lock)
      if other is None:  # released just now
        continue
      if _alive(other, lock, seen):
        raise UserError(f'{what} is being written by {_named(other)}: wait for it, or choose another --out')
      if _taken(lock, other, me):
        print(f'jaxmed: {what} belonged to {_named(other)}, which is gone: taken over', file=sys.stderr)
        break
  except OSError as e:
    raise UserError(f'cannot write {what}: {e.strerror or e}') from e
  owner = _held[lock] = Owner(lock, me['token'])
  threading.Thread(target=owner._beat, name='owner', daemon=True).start()
  return owner


def _me() -> Identity:
  return {'token': uuid.uuid4().hex, 'host': socket.gethostname(), 'process': os.getpid(),
          'machine': _machine(), 'started': _started(os.getpid()),
          'since': time.strftime('%Y-%m-%d %H:%M:%S %z').strip()}


def _machine() -> str:
  """What processes share that can look each other up: a boot of a machine, and a space of process numbers."""
  parts = []
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip())
    parts.append(str(os.stat('/proc/self/ns/pid').st_ino))
  return '/'.join([socket.gethostname(), *parts])


def _started(process: int) -> str:
  """When a process began, in ticks since the boot: a number is given to others later. '' for none that is alive."""
  try:
    text = pathlib.Path(f'/proc/{process}/stat').read_text(encoding='utf-8', errors='replace')
    fields = text.rpartition(')')[2].split()  # after the name, which may hold anything
    return '' if fields[0] in 'ZX' else fields[19]
  except OSError:
    pass
  if pathlib.Path('/proc/self/stat').exists():
    return ''
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return ''
  except PermissionError:
    pass
  return 'alive'


def _alive(other: Identity, lock: pathlib.Path, seen: int) -> bool:
  """Whether an owner lives: looked up here, or by a sign of life of one elsewhere."""
  if other.get('machine') == _machine():
    return _started(int(other.get('process', 0))) == other.get('started')
  end = time.monotonic() + DEAD
  while time.monotonic() < end:
    time.sleep(min(0.5, DEAD / 10))
    if _touched(lock) != seen:
      return True  # touched, released or taken: whoever asks again sees what became of it
  return False


def _made(lock: pathlib.Path, me: Identity) -> bool:
  """Makes the file whole and at once; whether there was none."""
  part = lock.with_name(f'{lock.name}.{me["token"]}')
  try:
    part.write_text(json.dumps(me), encoding='utf-8')
    try:
      os.link(part, lock)
    except FileExistsError:
      return False
    except OSError:  # a file system without hard links
      return _made_exclusively(lock, me)
    return True
  finally:
    part.unlink(missing_ok=True)


def _made_exclusively(lock: pathlib.Path, me: Identity) -> bool:
  try:
    with open(lock, 'x', encoding='utf-8') as f:
      f.write(json.dumps(me))
  except FileExistsError:
    return False
  return True


def _taken(lock: pathlib.Path, other: Identity, me: Identity) -> bool:
  """Puts this process in the place of an owner that is gone; False where another was quicker."""
  part = lock.with_name(f'{lock.name}.{me["token"]}')
  part.write_text(json.dumps(me), encoding='utf-8')
  if (_read(lock) or {}).get('token') != other.get('token'):
    part.unlink()
    return False
  os.replace(part, lock)
  time.sleep(SETTLE)
  return (_read(lock) or {}).get('token') == me['token']


def _read(lock: pathlib.Path) -> Identity | None:
  """What the file says; {} for one that is damaged, None for none."""
  try:
    value = json.loads(lock.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def _touched(lock: pathlib.Path) -> int:
  """Nanoseconds of its last change, asked of the file's server; 0 for none."""
  try:
    with open(lock, 'rb') as f:
      return os.fstat(f.fileno()).st_mtime_ns
  except FileNotFoundError:
    return 0


def _named(owner: Identity) -> str:
  if 'process' not in owner:
    return 'another process'
  return f'process {owner["process"]} on {owner.get("host")} since {owner.get("since")}'
