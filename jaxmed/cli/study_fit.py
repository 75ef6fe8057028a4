"""`jaxmed study fit`: scaling laws with intervals."""

import argparse
from typing import Any

DOES = 'fit a scaling law to a table of runs, with intervals'
EXAMPLE = 'jaxmed study fit experiments/data/chinchilla.csv --out fit'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='TABLE.csv|STUDY', help='table with a row a run, or the folder of a study')
  p.add_argument('--out', metavar='FOLDER', help='folder for fit.json, fit.csv, fit.md and figures; '
                 'of a study STUDY/fit')
  column = lambda name, text: p.add_argument(f'--{name}', default='', metavar='COLUMN', help=text)
  column('params', 'column of parameters; default params, or its only alias')
  column('samples', 'column of samples seen; default samples, or its only alias')
  column('loss', 'column of what falls; default loss, or its only alias')
  column('score', 'column of what rises instead, such as a Dice: E - A x^-alpha')
  column('axis', 'fits a law of this column alone, such as params, samples or epochs')
  column('flops', 'column of FLOPs; default flops where there is one')
  column('unique', 'column of distinct samples, where --samples counts all passes over them')
  column('epochs', 'column of passes over --samples, which are distinct then')
  column('cells', 'column that names cells; default cell, else runs of equal axes are one')
  column('seeds', 'column that tells runs of a cell apart; default seed')
  p.add_argument('--where', default='', metavar='COLUMN=A,B', help='values that a run must have to count')
  p.add_argument('--constant', type=float, metavar='K', help='compute is K x params x samples; default the FLOPs of '
                 'the table, else 6')
  p.add_argument('--repeat', type=float, metavar='R', help='constant of repeated samples; default fitted')
  p.add_argument('--delta', type=float, default=1e-3, help="bound of Huber's loss; default 0.001")
  p.add_argument('--draws', type=int, default=1000, help='draws of the bootstrap; default 1000')
  p.add_argument('--hold-out', type=float, default=0.2, metavar='FRACTION', help='fraction of the largest cells to '
                 'predict from the others; 0 for none; default 0.2')
  p.add_argument('--compute', default='', metavar='FLOPS', help='budgets of the frontier, comma-separated')
  p.add_argument('--seed', type=int, default=0, help='seed of bootstrap and permutations; default 0')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Fits a law to a table of runs."""
  from jaxmed.data.feed.sampling import parse_values
  from jaxmed.errors import UserError
  from jaxmed.study.fit import fit
  columns = ('params', 'samples', 'loss', 'score', 'axis', 'flops', 'unique', 'epochs', 'cells', 'seeds')
  same = ('constant', 'repeat', 'delta', 'draws', 'hold_out', 'seed')
  try:
    compute = tuple(float(c) for c in args.compute.split(',') if c.strip())
  except ValueError:
    raise UserError(f'--compute is {args.compute!r}, expected FLOPs such as 1e18,1e19') from None
  return fit(args.path, args.out, where=parse_values(args.where, '--where'), compute=compute,
             **{name: getattr(args, name) for name in (*columns, *same)})
