"""What was launched, remembered in RUN.launch/launch.json, and how far the run is by its own files."""

import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from jaxmed import files
from jaxmed.errors import UserError
from jaxmed.launch.job import place

FILE = 'launch.json'
STOP = 'stop'  # a file of this name in RUN.launch keeps a job from starting again


@dataclasses.dataclass(frozen=True)
class State:
  """What a system says of a job. alive: it runs or waits to; None where the system cannot tell."""

  alive: bool | None
  text: str


def find(out: str) -> dict[str, Any]:
  """The record of what was launched for RUN, with `place`, the folder that it is in.

  Raises:
    UserError: nothing was launched for RUN.
  """
  for here in (True, False):
    folder = place(out.rstrip('/'), here)
    if (folder / FILE).is_file():
      values = files.read_json(folder / FILE)
      if not isinstance(values, dict) or 'launcher' not in values:
        raise UserError(f'{folder / FILE} is damaged: it names no launcher')
      return values | {'place': str(folder)}
  raise UserError(f'nothing was launched for {out}: there is no {place(out.rstrip("/"), True) / FILE}')


def write(folder: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes the record; what an earlier `stop` left is gone."""
  files.write_json(folder / FILE, dict(values))
  (folder / STOP).unlink(missing_ok=True)


def progress(out: str) -> str:
  """How far a run is: 'step 120 of 1000, loss 0.412', or that it has not begun."""
  run = pathlib.Path(out)
  if not (run / 'config.json').is_file():
    return 'training has not begun'
  steps = files.read_json(run / 'config.json').get('steps')
  rows = [r for r in files.read_json_lines(run / 'metrics.jsonl')[0] if isinstance(r, dict) and 'loss' in r]
  if not rows:
    return f'step 0 of {steps}'
  return f'step {rows[-1]["step"]} of {steps}, loss {rows[-1]["loss"]:.4g}'


def need(program: str, launcher: str, brings: str) -> None:
  """Raises a UserError where a program of the system is not installed."""
  if shutil.which(program) is None:
    raise UserError(f'launch {launcher} needs {program}, which is not on the path: {brings}; '
                    '--dry-run works without it')


def call(words: Sequence[str], what: str = '') -> str:
  """Runs a program of the system and returns what it prints.

  Raises:
    UserError: it failed; `what` (that it failed) begins the line, the end of its own words follows.
  """
  done = attempt(words)
  if done.returncode:
    said = ' '.join((done.stderr or done.stdout).split())[-400:]
    raise UserError(f'{what or " ".join(words[:2]) + " failed"}: {said or f"exit code {done.returncode}"}')
  return done.stdout.strip()


def attempt(words: Sequence[str]) -> subprocess.CompletedProcess:
  """Runs a program of the system to its end, whatever that is. A UserError tells of one that is not there."""
  try:
    return subprocess.run(list(words), capture_output=True, text=True, check=False)
  except FileNotFoundError as e:
    raise UserError(f'{words[0]} is not on the path of this machine') from e


def identity(pid: int) -> list[float]:
  """A process of this machine and when it began: an id alone may be another's by now."""
  try:
    return [pid, psutil.Process(pid).create_time()]
  except psutil.NoSuchProcess:
    return [pid, 0.0]


def alive(who: Sequence[float]) -> bool:
  """Whether the process that `identity` named still runs."""
  pid, begun = who
  try:
    process = psutil.Process(int(pid))
    return abs(process.create_time() - begun) < 1 and process.status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False
