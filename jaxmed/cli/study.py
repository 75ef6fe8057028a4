"""`jaxmed study`: a grid of runs from one file, started or gone on with, here or by a queue."""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.cli import grids
from jaxmed.cli.common import positive
from jaxmed.errors import EXIT_UNAVAILABLE, EXIT_USER, UserError

DOES = 'run a grid of trainings from one file, or go on with it'
EXAMPLE = 'jaxmed study experiments/studies/scaling_mae.py:laptop --data corpus --out study'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  from jaxmed.launch import options as launch_options
  p.add_argument('words', nargs='*', metavar='FILE key=value', help='study file, FILE.py or FILE.py:VARIANT, then '
                 'config values of all cells')
  p.add_argument('--data', metavar='CORPUS', help='corpus of all cells; --dry-run with --topology goes without')
  p.add_argument('--out', metavar='STUDY', help='folder for cells, table.csv, study.json and study.md')
  p.add_argument('--dry-run', action='store_true', help='print cells, parameters, FLOPs, memory and hours, start '
                 'nothing')
  grids.options(p)
  p.add_argument('--rows', type=positive, help='records of the corpus, without --data; default 1000000')
  p.add_argument('--channels', type=positive, help='channels of a record, without --data; default 3')
  launch_options.add(p)
  topology = next(a for a in p._actions if a.dest == 'topology')
  topology.help = f'{topology.help}; with --dry-run CHIP:SIZE (v5e:4x4, h100:8), for which the cells are planned'


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Runs a study, one cell of it, or says what it would take."""
  from jaxmed.launch.job import absolute
  file, changes = _words(args)
  args.data = ','.join(map(absolute, args.data.split(','))) if args.data else None
  topology = args.topology if args.topology and ':' in args.topology else ''
  if topology and not args.dry_run:
    raise UserError(f'--topology {topology} is for --dry-run: a study runs where it is started, or by --launcher')
  if (args.rows or args.channels or not args.data) and not (topology and not args.data):
    raise UserError('give --data CORPUS; --dry-run --topology CHIP:SIZE goes without, with --rows and --channels')
  if not args.out and not args.dry_run:
    raise UserError('give --out STUDY, the folder for the cells')
  chosen = _launcher(args, topology)
  if args.cell or args.cell_index:
    return _one(args, file, changes)
  if args.dry_run and topology:
    return _planned(args, file, changes, topology)
  if args.launcher != 'local':
    return _queued(args, file, changes, chosen)
  return _dry(args, file, changes) if args.dry_run else _here(args, file, changes, chosen)


def _words(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
  """The study file, and the values of all cells."""
  from jaxmed import config
  words = list(args.words)
  if not words or '=' in words[0]:
    raise UserError('give a study file: jaxmed study FILE.py --data CORPUS --out STUDY')
  config.find(words[0] if os.path.isfile(words[0]) else words[0].partition(':')[0])
  return words[0], config.parse_overrides(words[1:])


def _launcher(args: argparse.Namespace, topology: str) -> Any:
  """The options of the launcher."""
  from jaxmed.launch import options as launch_options
  given = argparse.Namespace(**vars(args))
  if topology:
    given.topology = None
  return launch_options.of(args.launcher, given)


def _ready(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> tuple[Any, Any, list[Any]]:
  """The study, what is known of the corpus, and the cells."""
  from jaxmed.study import cost, grid
  cost.stay_small()
  study = grid.read(file, changes)
  assumed = {k: v for k, v in (('rows', args.rows), ('channels', args.channels)) if v}
  corpus = cost.Corpus(args.data or '', **assumed)
  return study, corpus, cost.ready(study, corpus)


def _one(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Trains and judges one cell in this process."""
  from jaxmed.launch import pool
  from jaxmed.parallel import compilation
  from jaxmed.study import cells, table
  pool.follow_parent()
  compilation.keep()
  plan = _plan_of_cell(args, file, changes)
  name = args.cell or grids.numbered(plan, args.cell_index)
  cells.find(plan, name)
  found = cells.run(args.out, plan, name, args.again)
  table.write(args.out)
  return grids.ended(name, found, args.again)


def _plan_of_cell(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """The plan that the study wrote; the first cell of a cluster that does not share this disk writes it."""
  from jaxmed.study import cells
  if (pathlib.Path(args.out) / cells.PLAN).exists():
    return cells.read_plan(args.out)
  study, _, ready = _ready(args, file, changes)
  return cells.write_plan(args.out, file, study, ready, args.data)


def _dry(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """What the cells take on this machine."""
  from jaxmed.study import cost, forecast
  study, _, ready = _ready(args, file, changes)
  warnings = cost.check_memory(ready, args.jobs or 1)
  rate, how = forecast.rate(args.out, args.rate)
  found = forecast.here(ready, rate, how, args.jobs or 1)
  text = forecast.text(found, len(study.judges))
  return {'json': found, 'text': '\n'.join([text, *(f'warning: {w}' for w in warnings)])}


def _planned(args: argparse.Namespace, file: str, changes: Mapping[str, Any], topology: str) -> dict[str, Any]:
  """What the cells take on a cluster."""
  os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX starts: with libtpu installed it would look for a TPU
  from jaxmed.parallel import chips
  from jaxmed.study import forecast
  cluster = chips.parse(topology)
  study, corpus, ready = _ready(args, file, changes)
  found = forecast.there(ready, corpus, cluster)
  return {'json': found, 'text': forecast.text(found, len(study.judges))}


def _queued(args: argparse.Namespace, file: str, changes: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
  """Gives the cells to SLURM or Kubernetes."""
  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.selection import split_uri
  from jaxmed.launch import control
  from jaxmed.study import cells, grid
  count = len(grid.cells(grid.read(file, changes)))
  sent = control.prepare(args.launcher, args.words, args.data, args.out, chosen, count, args.jobs or 0)
  sent = (_again(sent[0]) if args.again else sent[0], *sent[1:])
  if args.launcher == 'slurm' and not args.dry_run and is_corpus(split_uri(args.data)[0]):
    study, _, ready = _ready(args, file, changes)  # before anything waits in a queue
    cells.write_plan(args.out, sent[0].words[0], study, ready, sent[0].data)
  out = control.send(args.launcher, *sent, chosen, args.dry_run)
  text = out['script'].rstrip('\n') if args.dry_run else (
      f'{args.launcher} job {out["job"]}, {count} cells: jaxmed status {args.out}, jaxmed stop {args.out}\n'
      f'script: {out["script"]}\nlog: {out["log"]}')
  return {'json': out, 'text': text}


def _again(job: Any) -> Any:
  return dataclasses.replace(job, words=(*job.words, '--again'))


def _here(args: argparse.Namespace, file: str, changes: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
  """Runs the cells that are not done, so many at once, each a process."""
  from jaxmed.study import cells, cost, table
  study, _, ready = _ready(args, file, changes)
  for warning in cost.check_memory(ready, args.jobs or 1):
    print(f'jaxmed: warning: {warning}', file=sys.stderr, flush=True)
  plan = cells.write_plan(args.out, file, study, ready, args.data)
  found, unknown = grids.run(args, plan, chosen, [*args.words, '--data', args.data], table.write)
  return _end(args, plan, found, unknown)


def _end(args: argparse.Namespace, plan: Mapping[str, Any], found: Sequence[Mapping[str, Any]],
         unknown: Mapping[str, str]) -> dict[str, Any]:
  """What is printed at the end, and the exit code."""
  from jaxmed.study import table
  text = f'{table.markdown(found, plan)}\n{table.counted(found)}\ntable: {args.out}/table.csv, study.json, study.md'
  text += ''.join(f'\ncell {name} is not finished: {why}' for name, why in unknown.items())
  law = _law(args.out, found)
  failed = any(r['status'] == 'failed' for r in found)
  code = EXIT_USER if failed else EXIT_UNAVAILABLE if unknown else 0
  return {'json': {'study': args.out, 'cells': [*found]} | ({'law': law['json']} if law else {}),
          'text': text + (f'\n\n{law["text"]}' if law else ''), 'code': code}


def _law(out: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """The law of loss over parameters and samples, where the grid spans both; one that cannot be fitted says why."""
  from jaxmed.study import table
  axes = table.law_axes(found)
  if axes is None:
    return None
  from jaxmed.study.fit import fit
  try:
    return fit(out, **axes)
  except UserError as e:
    return {'json': {'undecided': str(e)}, 'text': f'no law: {e}'}
