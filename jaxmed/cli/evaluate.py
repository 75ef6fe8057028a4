"""`jaxmed evaluate`: frozen features by one or more protocols."""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxmed import files
from jaxmed.cli.common import for_channels, positive, tower, unseen, which
from jaxmed.errors import UserError, choose

DOES = 'judge frozen features against two baselines'
EXAMPLE = 'jaxmed evaluate run --data corpus --label diagnosis --out evaluation.json'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  which(p)
  tower(p)
  unseen(p)
  p.add_argument('--data', required=True, metavar='CORPUS', help='corpus with labels and splits')
  p.add_argument('--label', required=True, metavar='COLUMN', help='column of labels')
  p.add_argument('--protocol', default='classify', metavar='NAMES', help='protocols, comma-separated; '
                 'jaxmed list protocols shows them; default classify')
  p.add_argument('--option', action='append', default=[], metavar='KEY=VALUE', help='option of a protocol, such as '
                 'retrieve.gallery=test; may be repeated')
  p.add_argument('--where', default='', metavar='COLUMN=A,B', help='values that a row must have to be judged')
  p.add_argument('--out', metavar='FILE.json', help='file for the results; a run also gets evaluation.json (of '
                 'another protocol evaluation.NAME.json) and a new report')
  p.add_argument('--feature', choices=('cls', 'mean'), help='vector to judge; default: the vector of the method')
  p.add_argument('--channels', metavar='all', help='all: judge test images with each subset of their channels')
  p.add_argument('--subsets', type=positive, default=255, help='largest number of subsets, beyond it a random sample; '
                 'default 255')
  p.add_argument('--beside', metavar='RUN|FILE', help='second encoder to compare, with --channels')
  p.add_argument('--batch-size', type=positive, default=64, help='images in one pass; default 64')
  p.add_argument('--seed', type=int, default=0, help='seed of baselines, bootstrap and subsets; default 0')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Judges frozen features; of several protocols the result is {'protocols': {name: result}}."""
  from jaxmed import config
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.feed.sampling import parse_values
  from jaxmed.evaluate import protocols
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  chosen = protocols.get(args.protocol, config.flat(config.from_dict(config.parse_overrides(args.option))))
  compilation.keep()
  source = open_source(args.data).where(parse_values(args.where, '--where'))
  choose(f'column of {args.data}', args.label, source.table.column_names)
  encoder = for_channels(load(args.path, args.checkpoint, args.tower), args, source)
  if args.out:
    files.check_place(args.out)
  return (_by_channels if args.channels else _whole)(args, encoder, source, chosen)


def _whole(args: argparse.Namespace, encoder: Any, source: Any, chosen: Sequence[Any]) -> dict[str, Any]:
  """Judges frozen features of whole images."""
  from jaxmed.evaluate.report.page import write_report
  untrained, found = encoder.untrained(args.seed), {}
  for p in chosen:
    found[p.name] = p.run(encoder, source, args.label, untrained=untrained, feature=args.feature or encoder.feature,
                          batch_size=args.batch_size, seed=args.seed)
  text = _titled({p.name: p.tables(found[p.name]) for p in chosen})
  if args.out:
    files.write_json(args.out, _together(found))
  run = pathlib.Path(args.path)
  if run.is_dir():
    for name, result in found.items():
      files.write_json(run / ('evaluation.json' if name == 'classify' else f'evaluation.{name}.json'), result)
    text += f'\nreport: {write_report(args.path)}'
  return {'json': _together(found), 'text': text}


def _by_channels(args: argparse.Namespace, encoder: Any, source: Any, chosen: Sequence[Any]) -> dict[str, Any]:
  """Judges frozen features of test images that show subsets of their channels, maybe of two encoders side by side."""
  from jaxmed.evaluate.protocols import channels
  from jaxmed.evaluate.protocols.protocol import FeatureProtocol
  from jaxmed.evaluate.report import figures
  from jaxmed.train.build.rundir import load
  choose('--channels', args.channels, ('all',))
  other = [p.name for p in chosen if not isinstance(p, FeatureProtocol)]
  if other:
    raise UserError(f'--channels does not go with the protocol {other[0]}: it does not judge one vector a record')
  beside = {args.beside: for_channels(load(args.beside, tower=args.tower), args, source)} if args.beside else {}
  both = {args.path: encoder} | beside
  run = pathlib.Path(args.path)
  stem = pathlib.Path(args.out).with_suffix('') if args.out else run / 'channels' if run.is_dir() else None
  found, texts = {}, {}
  for p in chosen:
    wrapped = channels.ByChannels(p, args.subsets)
    results = {name: wrapped.run(one, source, args.label, feature=args.feature or one.feature, seed=args.seed,
                                 batch_size=args.batch_size) for name, one in both.items()}
    found[p.name], texts[p.name] = results, wrapped.compared(results)
    if stem is not None:
      place = stem if len(chosen) == 1 else stem.with_name(f'{stem.name}.{p.name}')
      named: Callable = lambda end, place=place: place.with_name(place.name + end)
      files.write_json(named('.json'), results)
      files.write_csv(named('.csv'), channels.csv_rows(results))
      figures.channel_curves(results, named('.png'), next(iter(p.metrics)))
      texts[p.name] += f'\ntable and plot: {place}.json, .csv, .png'
  if args.out and len(chosen) > 1:
    files.write_json(args.out, _together(found))
  return {'json': _together(found), 'text': _titled(texts)}


def _together(found: dict[str, Any]) -> dict[str, Any]:
  """One result as it is, several by the names of their protocols."""
  return next(iter(found.values())) if len(found) == 1 else {'protocols': found}


def _titled(texts: dict[str, str]) -> str:
  """One text as it is, several under the names of their protocols."""
  return next(iter(texts.values())) if len(texts) == 1 else '\n'.join(f'{name}:\n\n{t}' for name, t in texts.items())
