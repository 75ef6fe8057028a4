"""Which files lie under a folder: each once, by its real path, without loops, and nothing that is no regular file."""

import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterator

from jaxmed.data import readers
from jaxmed.errors import UserError

_KINDS = {stat.S_IFIFO: 'a FIFO', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device'}


@dataclasses.dataclass
class Folder:
  """What lies in a folder, hidden names left out; each list is sorted.

  Attributes:
    path: its name below the root.
    real: its path without links.
    files: names of regular files, links to such files included.
    whole: names of folders that are one image.
    targets: {name: real path} of files and whole folders that are links.
    odd: {name: what it is} of whatever else lies there: a FIFO, a link to nothing. It is never opened.
    repeats: links to folders that are read already, or that hold the link or the root: they are not followed.
  """

  path: pathlib.Path
  real: str
  files: list[str] = dataclasses.field(default_factory=list)
  whole: list[str] = dataclasses.field(default_factory=list)
  targets: dict[str, str] = dataclasses.field(default_factory=dict)
  odd: dict[str, str] = dataclasses.field(default_factory=dict)
  repeats: list[str] = dataclasses.field(default_factory=list)

  def real_of(self, name: str) -> str:
    """The path without links of a file or whole folder."""
    return self.targets.get(name) or os.path.join(self.real, name)


@dataclasses.dataclass
class Found:
  """What lies under a root.

  Attributes:
    files: {real path: path below the root} of files and folders that are one image, in the order of a walk.
    odd: {path: what it is} of what is no regular file.
    repeats: links that lead to what another name leads to already.
  """

  files: dict[str, pathlib.Path]
  odd: dict[pathlib.Path, str]
  repeats: list[pathlib.Path]


def kind_of(path: str | os.PathLike) -> str:
  """What a path is that is neither a regular file nor a folder, such as 'a FIFO'; '' for those. Nothing is opened."""
  try:
    mode = os.stat(path).st_mode
  except OSError as e:
    return f'a link to nothing ({e.strerror})' if os.path.islink(path) else f'not there ({e.strerror})'
  return '' if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), 'no regular file')


def folders(root: str | os.PathLike, own: frozenset[str] = frozenset()) -> Iterator[Folder]:
  """The folders under a root, each once: first those that lie there, then those that links lead to.

  Args:
    root: where to begin.
    own: real paths of folders to leave out.

  Raises:
    UserError: a folder that cannot be listed.
  """
  top = os.path.realpath(root)
  later, seen = [(pathlib.Path(root), top)], set(own)
  while later:
    path, real = later.pop(0)
    if real in seen:
      yield Folder(path.parent, os.path.dirname(real), repeats=[path.name] if real not in own else [])
      continue
    stack = [(path, real)]
    while stack:
      path, real = stack.pop()
      if real in seen:
        continue
      seen.add(real)
      folder = Folder(path, real)
      inner = []
      for entry in _listed(path):
        target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
        if not _is_dir(entry):
          _note(folder, entry, target)
        elif target not in own and readers.is_folder_format(entry.path):
          folder.whole.append(entry.name)
          _note(folder, entry, target)
        elif not entry.is_symlink():
          inner.append((path / entry.name, target))
        elif _holds(target, real) or _holds(target, top):
          folder.repeats.append(entry.name)
        else:
          later.append((path / entry.name, target))
      yield folder
      stack += reversed(inner)


def files_under(root: str | os.PathLike, own: frozenset[str] = frozenset()) -> Found:
  """All files under a root, each once; of several names for one file the one without a link is kept.

  Raises as `folders` does.
  """
  found = Found({}, {}, [])
  links: list[tuple[pathlib.Path, str]] = []
  for folder in folders(root, own):
    for name in (*folder.files, *folder.whole):
      if name in folder.targets:
        links.append((folder.path / name, folder.targets[name]))
      else:
        found.files[folder.real_of(name)] = folder.path / name
    found.odd |= {folder.path / name: kind for name, kind in folder.odd.items()}
    found.repeats += [folder.path / name for name in folder.repeats]
  for path, real in sorted(links):
    if real in found.files:
      found.repeats.append(path)
    else:
      found.files[real] = path
  found.files = dict(sorted(found.files.items(), key=lambda pair: _order(pair[1].relative_to(root))))
  return found


def _listed(path: pathlib.Path) -> list[os.DirEntry]:
  try:
    with os.scandir(path) as entries:
      return sorted((e for e in entries if not e.name.startswith('.')), key=lambda e: e.name)
  except OSError as e:
    raise UserError(f'cannot list {path}: {e.strerror}') from e


def _is_dir(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link that cannot be followed: `kind_of` says why
    return False


def _note(folder: Folder, entry: os.DirEntry, target: str) -> None:
  """Puts a file or whole folder on the lists of its folder."""
  kind = '' if entry.is_file(follow_symlinks=False) else kind_of(entry.path)
  if kind:
    folder.odd[entry.name] = kind
    return
  if entry.name not in folder.whole:
    folder.files.append(entry.name)
  if entry.is_symlink():
    folder.targets[entry.name] = target


def _holds(folder: str, path: str) -> bool:
  return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _order(path: pathlib.Path) -> tuple[tuple[int, str], ...]:
  """Files of a folder come before its folders, both by name."""
  return (*((1, part) for part in path.parts[:-1]), (0, path.name))
