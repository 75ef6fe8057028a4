"""`jaxmed finetune`: a trained encoder for a task."""

import argparse
import sys
from typing import Any

from jaxmed import config
from jaxmed.errors import UserError

DOES = 'train a pretrained encoder for segmentation, classification or regression'
EXAMPLE = 'jaxmed finetune run --data corpus --task segment --label mask --out tuned'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('words', nargs='*', metavar='RUN|FILE key=value', help='run directory or exported file, then '
                 'overrides of the recipe (jaxmed train --help)')
  p.add_argument('--data', metavar='CORPUS', help='corpus with masks or labels; records without are left out')
  p.add_argument('--task', metavar='TASK', help='segment, classify or regress')
  p.add_argument('--label', metavar='COLUMN', help='column of classes or numbers; mask for segment')
  p.add_argument('--out', metavar='RUN', help='run directory to create')
  p.add_argument('--resume', metavar='RUN', help='run, or control, to resume')
  p.add_argument('--fraction', type=float, default=1.0, help='fraction of the training records, by whole subjects; '
                 'default 1')
  p.add_argument('--freeze', action='store_true', help='keep the weights of the encoder as they are')
  p.add_argument('--from-scratch', action='store_true', help='begin with fresh weights, at the rate of the recipe for '
                 'these')
  p.add_argument('--control', action='store_true', help='train OUT/pretrained and OUT/scratch, and compare them on the '
                 'test split')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Fine-tunes, with its control or without."""
  from jaxmed.train import finetune, loop
  from jaxmed.train.build.rundir import check_new
  if args.resume:
    asked = finetune.controlled(args.resume)
    if asked is not None:
      return _compared(finetune.control(asked, args.resume), args.resume)
    return _trained(loop.resume(args.resume, config.parse_overrides(args.words)))
  asked = _asked(args)
  if args.control:
    if args.from_scratch:
      raise UserError('--control trains both arms: leave --from-scratch out')
    check_new(args.out)
    for arm in finetune.ARMS:
      _tell(finetune, finetune.dataclasses.replace(asked, scratch=arm == 'scratch'), f'{args.out}/{arm}: ')
    return _compared(finetune.control(asked, args.out), args.out)
  check_new(args.out)
  return _trained(loop.train(_tell(finetune, asked), args.out))


def _asked(args: argparse.Namespace) -> Any:
  """The options as a request; a UserError names the first that is missing."""
  from jaxmed.train import finetune
  words = list(args.words)
  path = words.pop(0) if words and '=' not in words[0] else ''
  label = args.label or ('mask' if args.task == 'segment' else None)
  for name, value in (('RUN|FILE', path), ('--data', args.data), ('--task', args.task), ('--label', label),
                      ('--out', args.out)):
    if not value:
      raise UserError(f'finetune needs {name}: {EXAMPLE}')
  return finetune.Request(path, args.data, args.task, str(label), config.parse_overrides(words), freeze=args.freeze,
                          scratch=args.from_scratch, fraction=args.fraction)


def _tell(finetune: Any, asked: Any, prefix: str = '') -> dict[str, Any]:
  """The config of a run, whose recipe is said on standard error."""
  user = finetune.recipe(asked)
  print(f'{prefix}{finetune.told(user, asked)}', file=sys.stderr, flush=True)
  return user


def _trained(summary: dict[str, Any]) -> dict[str, Any]:
  text = (f'{summary["steps"]} steps, loss {summary["loss"]:.4g}, {summary["images_per_second"]:.3g} images/s\n'
          f'run: {summary["run"]}\nreport: {summary["run"]}/report.html')
  return {'json': summary, 'text': text}


def _compared(found: dict[str, Any], out: str) -> dict[str, Any]:
  from jaxmed.train import finetune
  return {'json': found | {'out': out}, 'text': f'{finetune.table(found)}\nruns: {out}/pretrained, {out}/scratch'}
