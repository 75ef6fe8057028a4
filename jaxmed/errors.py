"""The errors that end a command with one line, and how they name the nearest valid choice."""

import difflib
import errno
import importlib
from collections.abc import Iterable
from types import ModuleType

EXIT_USER, EXIT_STOPPED, EXIT_UNAVAILABLE = 2, 75, 69  # the latter two may be started again with --resume
# What an operating system says of a place that cannot be written: the user's to mend.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class UserError(Exception):
  """Something that the user can mend. The command prints its text as one line and exits with 2.

  The text names the file, field or option, what was expected, and the nearest valid choice.
  """


class Stopped(Exception):
  """A signal ended the work and everything is saved. The command exits with 75 (EX_TEMPFAIL)."""


class Unavailable(Exception):
  """A device or another process does not answer any more. The command exits with 69 (EX_UNAVAILABLE)."""


def choose(kind: str, name: str, choices: Iterable[str]) -> str:
  """Returns `name` if it is one of `choices`; otherwise raises a UserError that names the nearest one."""
  choices = sorted(str(c) for c in choices)
  if name in choices:
    return name
  near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.4)
  hint = f'did you mean {near[0]!r}?' if near else 'choose one of ' + ', '.join(choices)
  raise UserError(f'unknown {kind} {name!r}: {hint}')


def need(module: str, extra: str) -> ModuleType:
  """Imports an optional module, or raises a UserError that names the extra which installs it."""
  try:
    return importlib.import_module(module)
  except ImportError as e:
    package = module.split('.')[0]
    raise UserError(f"{package} is not installed: pip install 'jaxmed[{extra}]' ({e})") from e
