"""`jaxmed evaluate`: frozen features against baselines."""

import argparse
import pathlib
from typing import Any

from jaxmed import files
from jaxmed.cli.common import for_channels, positive, tower, unseen, which
from jaxmed.errors import choose

DOES = 'judge frozen features against two baselines'
EXAMPLE = 'jaxmed evaluate run --data corpus --label diagnosis --out evaluation.json'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  which(p)
  tower(p)
  unseen(p)
  p.add_argument('--data', required=True, metavar='CORPUS', help='corpus with labels and splits')
  p.add_argument('--label', required=True, metavar='COLUMN', help='column of labels')
  p.add_argument('--where', default='', metavar='COLUMN=A,B', help='values that a row must have to be judged')
  p.add_argument('--out', metavar='FILE.json', help='file for the results; a run also gets evaluation.json and a new '
                 'report')
  p.add_argument('--feature', choices=('cls', 'mean'), help='vector to judge; default: the vector of the method')
  p.add_argument('--channels', metavar='all', help='all: judge test images with each subset of their channels')
  p.add_argument('--subsets', type=positive, default=255, help='largest number of subsets, beyond it a random sample; '
                 'default 255')
  p.add_argument('--beside', metavar='RUN|FILE', help='second encoder to compare, with --channels')
  p.add_argument('--batch-size', type=positive, default=64, help='images in one pass; default 64')
  p.add_argument('--seed', type=int, default=0, help='seed of baselines, bootstrap and subsets; default 0')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Judges frozen features."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.feed.sampling import parse_values
  from jaxmed.evaluate import tables
  from jaxmed.evaluate.protocols.classify import evaluate
  from jaxmed.evaluate.report.page import write_report
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  compilation.keep()
  source = open_source(args.data).where(parse_values(args.where, '--where'))
  choose(f'column of {args.data}', args.label, source.table.column_names)
  encoder = for_channels(load(args.path, args.checkpoint, args.tower), args, source)
  if args.out:
    files.check_place(args.out)
  if args.channels:
    return _by_channels(args, encoder, source)
  result = evaluate(encoder, source, args.label, untrained=encoder.untrained(args.seed),
                    feature=args.feature or encoder.feature, batch_size=args.batch_size, seed=args.seed)
  if args.out:
    files.write_json(args.out, result)
  text = tables.text_table(result)
  if pathlib.Path(args.path).is_dir():
    files.write_json(pathlib.Path(args.path) / 'evaluation.json', result)
    text += f'\nreport: {write_report(args.path)}'
  return {'json': result, 'text': text}


def _by_channels(args: argparse.Namespace, encoder: Any, source: Any) -> dict[str, Any]:
  """Judges frozen features of test images that show subsets of their channels, maybe of two encoders side by side."""
  from jaxmed.evaluate.protocols import channels
  from jaxmed.evaluate.report import figures
  from jaxmed.train.build.rundir import load
  choose('--channels', args.channels, ('all',))
  both = {args.path: encoder} | ({args.beside: for_channels(load(args.beside), args, source)} if args.beside else {})
  results = {}
  for name, one in both.items():
    results[name] = channels.evaluate_channels(
        one, source, args.label, subsets=args.subsets, feature=args.feature or one.feature, batch_size=args.batch_size,
        seed=args.seed)
  text = channels.text_table(results)
  run = pathlib.Path(args.path)
  stem = pathlib.Path(args.out).with_suffix('') if args.out else run / 'channels' if run.is_dir() else None
  if stem is not None:
    files.write_json(stem.with_suffix('.json'), results)
    files.write_csv(stem.with_suffix('.csv'), channels.csv_rows(results))
    figures.channel_curves(results, stem.with_suffix('.png'))
    text += f'\ntable and plot: {stem}.json, .csv, .png'
  return {'json': results, 'text': text}
