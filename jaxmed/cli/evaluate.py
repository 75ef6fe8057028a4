"""`jaxmed evaluate`: frozen features by one or more tasks."""

import argparse
import pathlib
import shutil
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
  p.add_argument('--label', action='append', default=[], metavar='COLUMN', help='column of labels; A,B: columns of one '
                 'multi-label task; may be repeated, for a task each')
  p.add_argument('--protocol', '--task', dest='task', default='classify', metavar='NAMES',
                 help='tasks, comma-separated; jaxmed list protocols shows them; default classify')
  p.add_argument('--option', action='append', default=[], metavar='KEY=VALUE', help='option of a task, such as '
                 'retrieve.gallery=test; may be repeated')
  p.add_argument('--prompts', metavar='NAME|FILE', help='of --task zero_shot: list of classes and templates that '
                 'comes with jaxmed, or a JSON file; default: the values of the label')
  p.add_argument('--where', default='', metavar='COLUMN=A,B', help='values that a row must have to be judged')
  p.add_argument('--out', metavar='FILE.json', help='file for the results, with tables as CSV and pictures as PNG '
                 'beside it; a run also gets evaluation.json (of another task evaluation.NAME.json) and a new report')
  p.add_argument('--feature', choices=('cls', 'mean'), help='vector to judge; default: the vector of the method')
  p.add_argument('--channels', metavar='all', help='all: judge test images with each subset of their channels')
  p.add_argument('--subsets', type=positive, default=255, help='largest number of subsets, beyond it a random sample; '
                 'default 255')
  p.add_argument('--beside', action='append', default=[], metavar='RUN|FILE', help='another encoder to compare; may be '
                 'repeated')
  p.add_argument('--batch-size', type=positive, default=64, help='images in one pass; default 64')
  p.add_argument('--seed', type=int, default=0, help='seed of baselines, bootstrap and subsets; default 0')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Judges frozen features; of several tasks or labels the result is {'protocols': {name: result}, 'wins': ..}."""
  from jaxmed import config
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.feed.sampling import parse_values
  from jaxmed.evaluate import judge, protocols
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load, load_segmenter
  told = config.flat(config.from_dict(config.parse_overrides(args.option)))
  if args.prompts and 'zero_shot' not in (name.strip() for name in args.task.split(',')):
    raise UserError(f'--prompts is of --task zero_shot, not of {args.task}')
  chosen = protocols.get(args.task, told | ({'zero_shot.prompts': args.prompts} if args.prompts else {}))
  compilation.keep()
  source = open_source(args.data).where(parse_values(args.where, '--where'))
  for label in args.label:
    judge.columns_of(label, source)
  others = judge.named(args.beside)
  if protocols.judges(chosen) == protocols.SEGMENTER:
    encoder: Any = load_segmenter(args.path, args.checkpoint)
    beside = {name: load_segmenter(path) for name, path in others.items()}
  else:
    encoder = for_channels(load(args.path, args.checkpoint, args.tower), args, source)
    beside = {name: for_channels(load(path, tower=args.tower), args, source) for name, path in others.items()}
  if args.out:
    files.check_place(args.out)
  return (_by_channels if args.channels else _whole)(args, encoder, source, chosen, beside)


def _whole(args: argparse.Namespace, encoder: Any, source: Any, chosen: Sequence[Any],
           beside: dict[str, Any]) -> dict[str, Any]:
  """Judges frozen features of whole images."""
  from jaxmed.evaluate import judge, wins
  from jaxmed.evaluate.page import write_report
  found = judge.judged(encoder, source, chosen, args.label, beside=beside, feature=args.feature,
                       batch_size=args.batch_size, seed=args.seed)
  text, result = _titled({f.key: f.protocol.tables(f.result) for f in found}), judge.together(found)
  run = pathlib.Path(args.path) if pathlib.Path(args.path).is_dir() else None
  if args.out:
    files.write_json(args.out, result)
  for one in found:
    if run:
      files.write_json(run / f'{_stem(one.key)}.json', one.result)
    _write_beside(one, source, run, pathlib.Path(args.out) if args.out else None, len(found) == 1)
  table = result.get('wins') if len(found) > 1 else None
  if table:
    text += f'\n{wins.text(table)}'
    if args.out:
      files.write_csv(pathlib.Path(args.out).with_suffix('.wins.csv'), wins.csv_rows(table))
  if run:
    _wins_of_run(run, table)
    text += f'\nreport: {write_report(run)}'
  return {'json': result, 'text': text}


def _wins_of_run(run: pathlib.Path, table: Any) -> None:
  """Writes RUN/evaluation.wins.json, or removes that of an earlier call."""
  place = run / 'evaluation.wins.json'
  if table:
    files.write_json(place, {'wins': table})
  else:
    place.unlink(missing_ok=True)


def _stem(key: str) -> str:
  """The name of a result in a run."""
  return 'evaluation' if key == 'classify' else f'evaluation.{key}'


def _write_beside(one: Any, source: Any, run: pathlib.Path | None, out: pathlib.Path | None, alone: bool) -> None:
  """Writes what a protocol has besides JSON: a table, and pictures, which stand in the report of a run."""
  rows = one.protocol.csv_rows(one.result) if hasattr(one.protocol, 'csv_rows') else None
  drawings = one.protocol.drawings(one.result, source) if hasattr(one.protocol, 'drawings') else {}
  if run:
    for old in (run / 'figures').glob(f'evaluation.{one.key}.*.png'):
      old.unlink()
  if rows:
    for place in ([run / f'{_stem(one.key)}.csv'] if run else []) + (
        [out.with_suffix('.csv' if alone else f'.{one.key}.csv')] if out else []):
      files.write_csv(place, rows)
  for name, draw in drawings.items() if run or out else ():
    places = ([run / 'figures' / f'evaluation.{one.key}.{name}.png'] if run else []) + (
        [out.with_suffix(f'.{one.key}.{name}.png')] if out else [])
    draw(places[0])
    for other in places[1:]:
      with files.writing(other) as part:
        shutil.copyfile(places[0], part)


def _by_channels(args: argparse.Namespace, encoder: Any, source: Any, chosen: Sequence[Any],
                 beside: dict[str, Any]) -> dict[str, Any]:
  """Judges frozen features of test images that show subsets of their channels, maybe of encoders side by side."""
  from jaxmed.evaluate.protocols import channels
  from jaxmed.evaluate.protocols.protocol import FeatureProtocol
  from jaxmed.evaluate.report import figures
  choose('--channels', args.channels, ('all',))
  other = [p.name for p in chosen if not isinstance(p, FeatureProtocol)]
  if other:
    raise UserError(f'--channels does not go with the task {other[0]}: it does not judge one vector a record')
  if len(args.label) != 1:
    raise UserError(f'--channels goes with one --label, not {len(args.label)}')
  both = {args.path: encoder} | dict(zip(args.beside, beside.values(), strict=True))
  run = pathlib.Path(args.path)
  stem = pathlib.Path(args.out).with_suffix('') if args.out else run / 'channels' if run.is_dir() else None
  found, texts = {}, {}
  for p in chosen:
    p = p.resolved(source, args.label[0])
    wrapped = channels.ByChannels(p, args.subsets)
    results = {name: wrapped.run(one, source, args.label[0], feature=args.feature or one.feature, seed=args.seed,
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
    files.write_json(args.out, {'protocols': found})
  return {'json': next(iter(found.values())) if len(found) == 1 else {'protocols': found}, 'text': _titled(texts)}


def _titled(texts: dict[str, str]) -> str:
  """One text as it is, several under their names."""
  return next(iter(texts.values())) if len(texts) == 1 else '\n'.join(f'{name}:\n\n{t}' for name, t in texts.items())
