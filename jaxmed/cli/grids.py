"""What `study` and `transfer` share: a grid of cells, each a process here or in a queue."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxmed.cli.common import positive
from jaxmed.errors import EXIT_USER, UserError

NUMBERS = ('SLURM_ARRAY_TASK_ID', 'JOB_COMPLETION_INDEX')  # what a queue tells each process


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the cells."""
  p.add_argument('--jobs', type=positive, metavar='N', help='cells at once; default: local 1, others as many as fit')
  p.add_argument('--launcher', default='local', help='what runs the cells: local (processes here), slurm (an array) or '
                 'jobset; default local')
  p.add_argument('--cell', metavar='NAME', help='run this cell alone, in this process')
  p.add_argument('--cell-index', metavar='N', help='the same by its number in the grid, from 0; auto: the number that '
                 'SLURM or Kubernetes gives this process')
  p.add_argument('--again', action='store_true', help='run cells anew that failed')
  p.add_argument('--rate', type=float, metavar='FLOP/S', help='what this machine reaches, for --dry-run; default: '
                 'that of finished cells, or of matrix products, measured for a second')


def numbered(plan: Mapping[str, Any], text: str) -> str:
  """The name of a cell by its number."""
  if text == 'auto':
    text = next((os.environ[name] for name in NUMBERS if name in os.environ), '')
    if not text:
      raise UserError(f'--cell-index auto: neither {" nor ".join(NUMBERS)} is set here')
  if not text.isdigit() or int(text) >= len(plan['cells']):
    raise UserError(f'--cell-index {text}: expected a number from 0 to {len(plan["cells"]) - 1}, or auto')
  return plan['cells'][int(text)]['name']


def ended(name: str, found: Mapping[str, Any], again: bool) -> dict[str, Any]:
  """What is printed of one cell that ran in this process, and the exit code."""
  from jaxmed.study import cells
  if found['status'] == cells.FAILED:
    hint = '' if again else f' (run it anew: --cell {name} --again)'
    print(f'jaxmed: cell {name} failed: {found["reason"]}{hint}', file=sys.stderr, flush=True)
  text = f'cell {name} {found["status"]}' + (f', loss {found["loss"]:.4g}' if found.get('loss') is not None else '')
  return {'json': {**found, 'cell': name}, 'text': text, 'code': EXIT_USER if found['status'] == cells.FAILED else 0}


def run(args: argparse.Namespace, plan: Mapping[str, Any], chosen: Any, words: Sequence[str],
        write: Callable[[str], Any], more: Collection[str] = ()) -> tuple[Any, dict[str, str]]:
  """Runs the cells that are not done, so many at once, each a process of the same verb with these words.

  Args:
    chosen: options of the launcher. write: writes the tables of the folder, after each cell too.
    more: names of cells that are done and have more to do.
  Returns:
    What `write` gave at the end, and {cell: why} of those that neither are done nor failed.
  """
  from jaxmed.launch import local, pool
  from jaxmed.study import cells
  jobs = args.jobs or 1
  shares = local.share(local.visible_gpus(os.environ), dataclasses.replace(chosen, processes=jobs))
  tasks = _tasks(args, plan, chosen, words, more)
  count = {'done': len(plan['cells']) - len(tasks)}
  unknown: dict[str, str] = {}

  def ended(task: Any, code: int, last: str) -> None:
    found = cells.result(args.out, task.name)
    if found is None and code > 128:
      cells.fail(args.out, task.name, f'its process was killed by signal {code - 128} (out of memory?): {last}'[:500])
      found = cells.result(args.out, task.name)
    elif found is None and code not in (0, 75):
      unknown[task.name] = last.removeprefix('jaxmed: ')
    count['done'] += found is not None
    _tell(task.name, found, unknown.get(task.name, ''), count['done'], len(plan['cells']))
    write(args.out)

  try:
    pool.run(tasks, jobs, ended, grace=chosen.grace, environments=pool.environments(jobs, shares, _variables(chosen)))
  finally:
    found = write(args.out)
  return found, unknown


def _variables(chosen: Any) -> dict[str, str]:
  cache = {'JAX_COMPILATION_CACHE_DIR': os.path.abspath(chosen.cache)} if chosen.cache else {}
  return cache | dict(pair.split('=', 1) for pair in chosen.env)


def _tasks(args: argparse.Namespace, plan: Mapping[str, Any], chosen: Any, words: Sequence[str],
           more: Collection[str]) -> list[Any]:
  """A process for each cell that is to run; those that failed before are named."""
  from jaxmed.launch import pool
  from jaxmed.study import cells
  out = []
  for cell in plan['cells']:
    name, found = cell['name'], cells.result(args.out, cell['name'])
    failed = found is not None and found['status'] == cells.FAILED
    if found and failed and not args.again:
      print(f'jaxmed: cell {name} failed before ({found["reason"]}): --again runs it anew', file=sys.stderr, flush=True)
    if found is None or (args.again and failed) or name in more:
      command = [chosen.python or sys.executable, '-m', 'jaxmed', args.verb, *words, '--out', args.out, '--cell', name,
                 *(['--again'] if found and args.again else [])]
      out.append(pool.Task(name, command, cells.folder(args.out, name) / cells.LOG))
  return out


def _tell(name: str, found: Mapping[str, Any] | None, trouble: str, count: int, of: int) -> None:
  """A line about a cell that ended."""
  if found is None:
    text = f'not finished: {trouble}' if trouble else 'stopped'
  elif found['status'] == 'failed':
    text = f'failed: {found["reason"]}'
  else:
    loss = f', loss {found["loss"]:.4g}' if found['loss'] is not None else ''
    text = f'done{loss}, {found["seconds"]:.3g} s'
  print(f'cell {name}: {text} ({count} of {of})', file=sys.stderr, flush=True)
