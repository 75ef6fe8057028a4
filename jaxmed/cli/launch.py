"""`jaxmed launch`: training by several processes or on a cluster."""

import argparse
from typing import Any

from jaxmed.errors import UserError

DOES = 'train with several processes, or on a cluster'
EXAMPLE = 'jaxmed launch slurm --data corpus --out run --nodes 2 --gpus-per-task 4 --time 12:00:00'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  from jaxmed.launch import options
  p.add_argument('launcher', metavar='LAUNCHER', help='system that runs the training: ' + ', '.join(options.LAUNCHERS))
  p.add_argument('words', nargs='*', metavar='CONFIG key=value',
                 help='recipe or config file, then overrides (jaxmed train --help)')
  p.add_argument('--data', required=True, metavar='CORPUS', help='corpus to train on')
  p.add_argument('--out', required=True, metavar='RUN', help='run directory on a file system that all machines share; '
                 'RUN.launch holds the files of the launcher')
  p.add_argument('--dry-run', action='store_true', help='print the script or manifest, start nothing')
  options.add(p)


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Starts the training command on another system, or as several processes here."""
  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.selection import split_uri
  from jaxmed.launch import control, options
  chosen = options.of(args.launcher, args)
  data = split_uri(args.data)[0]
  if args.launcher in ('local', 'slurm') and data.exists() and not is_corpus(data):
    raise UserError(f'--data {data} is not a corpus: jaxmed prepare {data} --out CORPUS makes one, before many '
                    'processes read it')
  out = control.launch(args.launcher, args.words, args.data, args.out, chosen, args.dry_run)
  if args.dry_run:
    text = out['script'].rstrip('\n')
  elif 'code' in out:
    text = f'run: {args.out}\nlogs: {out["place"]}' + (f'\nended with exit code {out["code"]}' if out['code'] else '')
  else:
    text = (f'{args.launcher} job {out["job"]}: jaxmed status {args.out}, jaxmed stop {args.out}\n'
            f'script: {out["script"]}\nlog: {out["log"]}')
  return {'json': out, 'text': text, 'code': out.get('code', 0)}
