"""`jaxmed transfer`: whether pretraining pays, over many corpora and arms from one file."""

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from jaxmed.cli import grids
from jaxmed.errors import EXIT_UNAVAILABLE, EXIT_USER, UserError

DOES = 'fine-tune and compare pretrained, scratch and linear arms on many corpora, from one file'
EXAMPLE = ('jaxmed transfer experiments/transfer/segbook_like.py:laptop --data tissue=corpora/tissue '
           '--data regions=corpora/regions --encoder run --out transfer')


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  from jaxmed.launch import options as launch_options
  p.add_argument('words', nargs='*', metavar='FILE key=value', help='benchmark, FILE.py or FILE.py:VARIANT, then '
                 'config values of all cells')
  p.add_argument('--data', action='append', metavar='NAME=PATH', help='a corpus by its name in the file, or '
                 'NAME:MODALITY=PATH; may be repeated')
  p.add_argument('--encoder', action='append', metavar='RUN|FILE', help='encoder of the arms, or ARM=RUN of one; may '
                 'be repeated')
  p.add_argument('--out', metavar='FOLDER', help='folder for cells, transfer.json, table.csv and transfer.md')
  p.add_argument('--dry-run', action='store_true', help='print cells, parameters, FLOPs, memory and hours, start '
                 'nothing')
  grids.options(p)
  launch_options.add(p)


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Runs a benchmark, one cell of it, or says what it would take."""
  from jaxmed import config
  from jaxmed.launch import options as launch_options
  words = list(args.words)
  if not words or '=' in words[0]:
    raise UserError('give a file: jaxmed transfer FILE.py --data NAME=PATH --out FOLDER')
  config.find(words[0] if os.path.isfile(words[0]) else words[0].partition(':')[0])
  changes = config.parse_overrides(words[1:])
  if not args.out and not args.dry_run:
    raise UserError('give --out FOLDER, the folder for the cells')
  chosen = launch_options.of(args.launcher, args)
  if args.cell or args.cell_index:
    return _one(args, words[0], changes)
  if args.launcher != 'local':
    return _queued(args, words[0], changes, chosen)
  return _dry(args, words[0], changes) if args.dry_run else _here(args, words[0], changes, chosen)


def _ready(args: argparse.Namespace, file: str, changes: Mapping[str, Any], out: str) -> tuple[Any, Any, list[Any]]:
  """The benchmark, what was counted of its corpora, and the cells."""
  from jaxmed.study import cost, transfer
  cost.stay_small()
  whole = transfer.read(file, args.data or (), args.encoder or (), changes)
  counts = transfer.check_data(whole)
  return whole, counts, transfer.ready(whole, out)


def _planned(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
  """The plan, written, and its cells."""
  from jaxmed.study import transfer
  whole, counts, ready = _ready(args, file, changes, args.out)
  return transfer.write_plan(args.out, file, whole, counts, ready), ready


def _one(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Trains one cell in this process; where it is the last of its arm, the chosen ones are judged."""
  from jaxmed.launch import pool
  from jaxmed.parallel import compilation
  from jaxmed.study import cells, transfer_table
  pool.follow_parent()
  compilation.keep()
  known = (pathlib.Path(args.out) / cells.PLAN).exists()
  plan = cells.read_plan(args.out) if known else _planned(args, file, changes)[0]
  name = args.cell or grids.numbered(plan, args.cell_index)
  cells.find(plan, name)
  found = cells.run(args.out, plan, name, args.again, transfer_table.validated)
  transfer_table.settle(args.out, plan, args.again)
  transfer_table.write(args.out)
  return grids.ended(name, found, args.again)


def _dry(args: argparse.Namespace, file: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """What the cells take on this machine."""
  from jaxmed.study import cost, forecast
  with tempfile.TemporaryDirectory() as place:
    _, _, ready = _ready(args, file, changes, place)
  warnings = cost.check_memory(ready, args.jobs or 1)
  found = forecast.here(ready, *forecast.rate(args.out, args.rate), args.jobs or 1)
  return {'json': found, 'text': '\n'.join([forecast.text(found, 1), *(f'warning: {w}' for w in warnings)])}


def _queued(args: argparse.Namespace, file: str, changes: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
  """Gives the cells to SLURM or Kubernetes; the corpora must be seen from here, too."""
  from jaxmed.launch import control
  from jaxmed.study import transfer
  kept = args.launcher == 'slurm' and not args.dry_run  # pods write their plan where their folder is
  with tempfile.TemporaryDirectory() as place:
    whole, counts, ready = _ready(args, file, changes, args.out if kept else place)
  corpora = {f'{n}:{c.modality}' if c.modality else n: c.data for n, c in whole.corpora.items()}
  arms = {n: a.encoder for n, a in whole.arms.items() if a.encoder}
  words = [*args.words, *(f'--data={n}={path}' for n, path in corpora.items()),
           *(f'--encoder={n}={path}' for n, path in arms.items()), *(['--again'] if args.again else [])]
  sent = control.prepare(args.launcher, words, '', args.out or 'FOLDER', chosen, len(ready), args.jobs or 0, args.verb,
                         [*corpora.values(), *arms.values()])
  if kept:
    transfer.write_plan(args.out, file, whole, counts, ready)
  out = control.send(args.launcher, *sent, chosen, args.dry_run)
  text = out['script'].rstrip('\n') if args.dry_run else (
      f'{args.launcher} job {out["job"]}, {len(ready)} cells: jaxmed status {args.out}, jaxmed stop {args.out}\n'
      f'script: {out["script"]}\nlog: {out["log"]}')
  return {'json': out, 'text': text}


def _here(args: argparse.Namespace, file: str, changes: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
  """Runs the cells that are not done, so many at once, each a process."""
  from jaxmed.study import cost, transfer_table
  plan, ready = _planned(args, file, changes)
  for warning in cost.check_memory(ready, args.jobs or 1):
    print(f'jaxmed: warning: {warning}', file=sys.stderr, flush=True)
  words = [*args.words, *(f'--data={text}' for text in args.data or ()),
           *(f'--encoder={text}' for text in args.encoder or ())]
  more = {name for name, _ in transfer_table.pending(args.out, plan, args.again)}
  found, unknown = grids.run(args, plan, chosen, words, transfer_table.write, more)
  text = (f'{transfer_table.markdown(found)}\ntable: {args.out}/table.csv, transfer.json, transfer.md'
          + ''.join(f'\ncell {name} is not finished: {why}' for name, why in unknown.items()))
  failed = any(r['reason'] for r in found['rows'])
  return {'json': {'transfer': args.out, **found}, 'text': text,
          'code': EXIT_USER if failed else EXIT_UNAVAILABLE if unknown else 0}
