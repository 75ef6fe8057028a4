"""`jaxmed compare`: several methods under the same conditions."""

import argparse
from typing import Any

from jaxmed.cli.common import names, positive

DOES = 'train several methods under the same conditions and compare them'
EXAMPLE = ('jaxmed compare --data corpus --methods mae,dino,simclr --model channel_vit_micro/16 '
           '--label diagnosis --out comparison')


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('words', nargs='*', metavar='key=value', help='overrides for all methods; METHOD:key=value for one')
  p.add_argument('--data', required=True, metavar='CORPUS', help='corpus with labels and splits')
  p.add_argument('--methods', required=True, metavar='NAMES', help='methods, comma-separated (jaxmed list methods)')
  p.add_argument('--model', required=True, help='encoder of all methods, such as channel_vit_micro/16')
  p.add_argument('--label', required=True, metavar='COLUMN', help='column of labels for the probes')
  p.add_argument('--out', required=True, metavar='FOLDER', help='folder for the runs, compare.md, compare.json and '
                 'compare.png')
  p.add_argument('--samples', type=positive, default=20_000, help='images that each run sees; default 20000')
  p.add_argument('--seeds', type=positive, default=3, help='runs of each method; default 3')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Trains several methods with the same data, steps and seeds."""
  from jaxmed import config
  from jaxmed.study.compare import Plan, compare, markdown
  own: dict[str, list[str]] = {}
  shared = []
  for word in args.words:
    method, colon, _ = word.partition('=')[0].partition(':')
    if colon:
      own.setdefault(method, []).append(word[len(method) + 1 :])
    else:
      shared.append(word)
  plan = Plan(args.data, names(args.methods) or (), args.model, args.label, args.samples, args.seeds,
              config.parse_overrides(shared), {k: config.parse_overrides(v) for k, v in own.items()})
  whole = compare(plan, args.out)
  return {'json': whole, 'text': f'{markdown(whole)}\nfigure: {args.out}/compare.png'}
