"""What scripts of this folder share: how they end where a package is missing, or by a mistake of the user.

It imports nothing of jaxmed by itself: tools/mutate.py runs beside copies of the package.
"""

import importlib.util
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

EXIT_USER = 2


def need(extra: str, *modules: str) -> None:
  """Ends the script with 2 and one line that names the extra, where one of the modules cannot be found."""
  lost = [name for name in modules if importlib.util.find_spec(name) is None]
  if lost:
    print(f"{_script()}: {', '.join(lost)} not installed: pip install -e '.[{extra}]'", file=sys.stderr)
    raise SystemExit(EXIT_USER)


def run_script(main: Callable[[], Any]) -> None:
  """Runs a script's `main` and ends with what it returns (nothing: 0); a UserError is one line and 2."""
  from jaxmed.errors import UserError
  try:
    code = main()
  except UserError as e:
    print(f'{_script()}: {" ".join(str(e).split())}', file=sys.stderr)
    code = EXIT_USER
  sys.exit(code or 0)


def measured_on() -> str:
  """The processor of this machine and today's date, which stand beside every figure."""
  name, info = platform.processor() or platform.machine(), pathlib.Path('/proc/cpuinfo')
  if info.exists():
    found = dict(line.partition(':')[::2] for line in info.read_text(encoding='utf-8').splitlines() if ':' in line)
    known = {key.strip(): value.strip() for key, value in found.items()}
    name = known.get('model name', name)
    name += ''.join(f', {flag}' for flag in ('avx2', 'avx512f') if flag in known.get('flags', '').split())
  return f'{name}; {time.strftime("%Y-%m-%d")}'


def _script() -> str:
  return pathlib.Path(sys.argv[0]).name
