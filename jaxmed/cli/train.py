"""`jaxmed train`: starts a run, or resumes one."""

import argparse
import contextlib
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from jaxmed import config, owner
from jaxmed.cli.common import left_out
from jaxmed.errors import UserError

DOES = 'pretrain an encoder'
EXAMPLE = 'jaxmed train --data corpus --out run'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.epilog = f'{p.epilog}\n\n{config.about()}'
  p.add_argument('words', nargs='*', metavar='CONFIG key=value',
                 help='recipe or config file, then overrides; the keys are listed below')
  p.add_argument('--data', metavar='CORPUS', help='corpus, or a folder of images to prepare first')
  p.add_argument('--out', metavar='RUN', help='run directory to create')
  p.add_argument('--resume', metavar='RUN', help='run to resume from its last checkpoint')
  p.add_argument('--auto-resume', action='store_true', help='resume if --out RUN exists, start otherwise: one command '
                 'for every start of a job')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Starts a run, or goes on with one."""
  from jaxmed.train import loop
  from jaxmed.train.build import resolve
  words = list(args.words)
  user: dict[str, Any] = {}
  if words and '=' not in words[0]:
    user = config.load_file(words.pop(0))
  changes = config.parse_overrides(words)
  if args.data:
    changes['data'] = args.data
  if args.resume:
    if args.out or user or args.auto_resume:
      raise UserError('--resume RUN goes on with the config of the run: leave --out, --auto-resume and the config '
                      'file out')
    summary = loop.resume(args.resume, changes)
  elif args.auto_resume and args.out and (pathlib.Path(args.out) / 'config.json').is_file():
    # All processes look before they join each other, and only then does one of them write: they see the same.
    summary = _go_on(pathlib.Path(args.out), config.merge(user, changes))
  else:
    if not args.out:
      raise UserError('give --out RUN, the directory to make, or --resume RUN')
    user = config.merge(user, changes)
    loop.check_new(args.out)
    resolve.check(user)  # before a folder of images is prepared
    with _corpus(str(user.get('data', '')), pathlib.Path(args.out)) as corpus:
      summary = loop.train(user | {'data': corpus}, args.out)
  pace = f'{summary["steps"]} steps, loss {summary["loss"]:.4g}, {summary["images_per_second"]:.3g} images/s'
  text = '\n'.join([pace, *summary['verdict'], f'run: {summary["run"]}', f'report: {summary["run"]}/report.html'])
  return {'json': summary, 'text': text}


def _go_on(out: pathlib.Path, user: dict[str, Any]) -> dict[str, Any]:
  """Goes on with a run for the words that started it; another value than the run has must be one that may change."""
  from jaxmed.parallel import process
  from jaxmed.train import loop
  from jaxmed.train.build import resolve, rundir
  process.start()
  before, spec = rundir.load_config(out)
  if (out / 'corpus').exists():  # made from the folder that the words name
    user = user | {'data': before.data}
  wanted, have = config.flat(resolve.resolve(user, spec)), config.flat(before)
  said = config.flat(config.from_dict(user))
  return loop.resume(out, config.nested({key: wanted[key] for key in said if wanted[key] != have.get(key)}))


@contextlib.contextmanager
def _corpus(data: str, run: pathlib.Path) -> Iterator[str]:
  """The corpus itself, or one prepared in the run directory from a folder of images.

  That one is removed when the run does not begin, so that the corrected command finds the place free.
  """
  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.open import elsewhere
  from jaxmed.data.corpus.selection import split_uri
  if not data:
    raise UserError('nothing to train on: give --data with a corpus or a folder of images')
  if elsewhere(data):
    yield data
    return
  place, target = split_uri(data)[0], run / 'corpus'
  if not place.exists():
    raise UserError(f'{data} does not exist: expected a corpus or a folder of images')
  if is_corpus(place):
    yield data
    return
  if target.exists():
    raise UserError(f'{target} exists: give --data {target} to train on it, or remove it')
  from jaxmed.data.prepare.prepare import check_small
  from jaxmed.data.prepare.prepare import prepare as prepare_
  from jaxmed.parallel.devices import cores
  check_small(place)
  with owner.of_folder(run):
    try:
      summary = prepare_([data], target, progress=sys.stderr.isatty(), workers=cores())
      print(f'prepared {summary["records"]} records of {data} in {target}', file=sys.stderr)
      left_out(summary, data)
      yield str(target)
    finally:
      if not (run / 'config.json').exists():
        shutil.rmtree(target, ignore_errors=True)
