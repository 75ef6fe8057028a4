"""What is launched: one command that starts a run or goes on with it, and what can be checked before it waits.

The same command serves the first start and every restart, because `jaxmed train --auto-resume` looks at RUN itself.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from jaxmed import config
from jaxmed.errors import UserError
from jaxmed.launch.options import Common
from jaxmed.parallel.axes import filled

NUMBERED = 'auto'  # a cell's number is that of the task in its array, as the system tells each process
MANY = 100  # restarts of a job that a queue starts again by itself

# File systems that several machines see (the types in /proc/mounts), and those that one machine has for itself.
_OWN = ('ext2', 'ext3', 'ext4', 'xfs', 'btrfs', 'zfs', 'tmpfs', 'ramfs', 'overlay', 'f2fs', 'vfat', 'squashfs')


@dataclasses.dataclass(frozen=True)
class Job:
  """The command of one run.

  Attributes:
    words: a config file and overrides, as `jaxmed train` takes them. data, out: paths where the processes run.
    folder: where they start. place: folder of the launcher's own files, never RUN itself, which must begin empty.
    config: the config file on this machine, where the processes see a copy of it instead.
    cells: of a study, whose command each of so many processes runs for the cell of its number; 0: a run. at_once: how
      many of them run at once at most; 0: as many as there is room for. verb: the command of the cells; `data` is ''
      where the words name several corpora. reads: other folders that a container must see.
  """

  words: tuple[str, ...]
  data: str
  out: str
  python: str
  folder: str
  place: pathlib.Path
  cache: str = ''
  env: tuple[str, ...] = ()
  restarts: int = MANY
  config: str = ''
  cells: int = 0
  at_once: int = 0
  verb: str = 'study'
  reads: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """A name that SLURM, gcloud and Kubernetes take: jaxmed-RUN, lower case, at most 40 characters."""
    run = re.sub(r'[^a-z0-9]+', '-', pathlib.PurePath(self.out).name.lower())
    return f'jaxmed-{run}'[:40].strip('-')

  @property
  def unique(self) -> str:
    """The same with a hash of RUN, where a name belongs to one job at a time."""
    return f'{self.name}-{hashlib.sha256(self.out.encode()).hexdigest()[:4]}'

  def command(self) -> list[str]:
    """The words of the command that every process runs."""
    if self.cells:
      data = ['--data', self.data] if self.data else []
      return [self.python, '-m', 'jaxmed', self.verb, *self.words, *data, '--out', self.out, '--cell-index', NUMBERED]
    return [self.python, '-m', 'jaxmed', 'train', *self.words, '--data', self.data, '--out', self.out, '--auto-resume']

  def line(self) -> str:
    """The command for a shell."""
    return shlex.join(self.command())

  def variables(self) -> dict[str, str]:
    """Variables of every process."""
    cache = {'JAX_COMPILATION_CACHE_DIR': self.cache} if self.cache else {}
    return cache | dict(pair.split('=', 1) for pair in self.env)

  def exports(self) -> list[str]:
    """The variables as lines of a shell script."""
    return [f'export {name}={shlex.quote(value)}' for name, value in self.variables().items()]


def absolute(place: str) -> str:
  """A folder's absolute path; a URL as it is."""
  return place if '://' in place else os.path.abspath(place)


def make(words: Sequence[str], data: str, out: str, options: Common, *, here: bool, restarts: int = MANY,
         python: str = '', copy: str = '') -> Job:
  """The job of `jaxmed launch ... WORDS --data D --out RUN`.

  Args:
    here: its processes see the files of this machine, so paths are made absolute; otherwise they are kept, and must
      be absolute already.
    restarts, python: what applies where the user did not say. copy: where the processes see a copy of the config file.
  """
  words = list(words)
  if here:
    if words and '=' not in words[0] and words[0].partition(':')[0] not in _shipped():
      words[0] = os.path.abspath(words[0])
    data, out = data and ','.join(map(absolute, data.split(','))), os.path.abspath(out)
    cache = os.path.abspath(options.cache) if options.cache else ''
  else:
    for flag, path in (('--data', data), ('--out', out), ('--cache', options.cache)):
      if path and not (os.path.isabs(path) or (flag == '--data' and '://' in path)):
        raise UserError(f'{flag} {path} must be an absolute path: it is one of the machines that train')
    cache = options.cache
  file, colon, variant = words[0].partition(':') if words and '=' not in words[0] else ('', '', '')
  copied = os.path.abspath(file) if copy and os.path.isfile(file) else ''
  if copied:
    words[0] = copy + colon + variant
  return Job(tuple(words), data, out.rstrip('/'), options.python or python or sys.executable, os.getcwd(),
             place(out, here), cache, options.env, options.restarts if options.restarts >= 0 else restarts, copied)


def _shipped() -> set[str]:
  """Names of recipes that no file of the working directory hides: every process finds them by name."""
  return {name for name in (*config.recipes(), *config.studies(), *config.transfers()) if not os.path.isfile(name)}


def place(out: str, here: bool) -> pathlib.Path:
  """Where the launcher keeps its files: RUN.launch beside RUN, or in this folder where RUN is on other machines."""
  run = pathlib.Path(os.path.abspath(out))
  return (run.parent if here else pathlib.Path.cwd()) / f'{run.name}.launch'


def check_config(words: Sequence[str], devices: int, what: str, *, here: bool = True) -> None:
  """Checks what can be known of the config before the job starts: its file, its keys, its mesh.

  Args:
    devices: how many devices all processes have, 0 where that is not known. what: how they come about, for the message.
    here: the config file must be on this machine; otherwise it is read only where it is here too.
  Raises:
    UserError: a missing or broken file, an unknown key, a mesh of another number of devices.
  """
  words = list(words)
  file = words.pop(0) if words and '=' not in words[0] else ''
  user = config.load_file(file) if file and (here or os.path.exists(file.partition(':')[0])) else {}
  user = config.merge(user, config.parse_overrides(words))
  base = config.base()
  # `encoder` and `objective` take their keys from the model and the method, which are not ours to know.
  config.update(base, {k: v for k, v in user.items() if k not in ('encoder', 'objective')})
  if devices:
    check_mesh(base.mesh, devices, what)


def check_mesh(mesh: ConfigDict | Mapping[str, int], devices: int, what: str) -> None:
  """Raises a UserError when the sizes of a mesh (0: the remaining devices) do not multiply to the number of devices."""
  if filled(mesh, devices) is None:
    wanted = ' x '.join(f'{a}={n or "rest"}' for a, n in mesh.items() if n != 1)
    raise UserError(f'mesh {wanted} does not fit {what} = {devices} devices: the sizes must multiply to {devices}')


def file_system(path: str, mounts: str) -> str:
  """The type of the file system that `path` is on, from the text of /proc/mounts ('' where that has none)."""
  best, kind = '', ''
  for line in mounts.splitlines():
    fields = line.split()
    if len(fields) < 3:
      continue
    point = fields[1].replace('\\040', ' ')
    inside = path == point or path.startswith(point.rstrip('/') + '/')
    if inside and len(point) >= len(best):
      best, kind = point, fields[2]
  return kind


def shared_warning(out: str, hosts: int) -> str:
  """A warning where a run of several machines would be written to a disk that each has for itself, or ''."""
  try:
    mounts = pathlib.Path('/proc/mounts').read_text(encoding='utf-8')
  except OSError:
    return ''
  kind = file_system(os.path.realpath(out), mounts)
  if hosts < 2 or kind not in _OWN:
    return ''
  return (f'{out} is on {kind}, a file system that machines do not share: {hosts} machines must see one RUN, '
          'or no checkpoint is whole')
