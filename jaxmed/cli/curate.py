"""`jaxmed curate`: a selection of records, and leaks."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from jaxmed.cli.common import names
from jaxmed.errors import EXIT_USER, UserError

DOES = 'select records of a corpus, or find records that an evaluation corpus shares'
EXAMPLE = 'jaxmed curate corpus --methods quality,hash --out lean && jaxmed train --data corpus@lean --out run'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('corpus', metavar='CORPUS', help='corpus, or a selection of it: CORPUS@NAME')
  p.add_argument('words', nargs='*', metavar='key=value', help='options of the methods, such as hash.radius=4 or '
                 'quality.blur=0.2')
  p.add_argument('--out', metavar='NAME', help='selection to write; jaxmed train --data CORPUS@NAME trains on it')
  p.add_argument('--methods', metavar='NAMES', help='methods in their order, comma-separated: quality, hash, ssim, '
                 'mutual_information, entropy, embedding, semdedup, balance; default hash')
  p.add_argument('--scope', default='all', help='range of the search for near-duplicates: volume (records of one file) '
                 'or all; default all')
  p.add_argument('--split', default='train', help='split to judge, other records stay: train, val, test or all; '
                 'default train')
  p.add_argument('--encoder', metavar='RUN|FILE', help='encoder for the methods that need features')
  p.add_argument('--features', metavar='FILE.npz', help='features by jaxmed embed instead of --encoder; '
                 'comma-separated, one file for each --against too')
  p.add_argument('--against', metavar='CORPORA', help='evaluation corpora, comma-separated; records that share a file, '
                 'a subject or an image are listed in leakage.csv')
  p.add_argument('--drop-leaks', action='store_true', help='leave shared records out of the selection')
  p.add_argument('--strict', action='store_true', help='end with exit code 2 if records are shared')
  p.add_argument('--seed', type=int, default=0, help='seed of methods that draw; default 0')
  p.add_argument('--overwrite', action='store_true', help='replace a selection of that name')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Selects records of a corpus, looks for those that an evaluation set holds too."""
  from jaxmed import config
  from jaxmed.data.curate import curate
  from jaxmed.data.curate.features import stored
  against = names(args.against) or ()
  methods = names(args.methods) or (('hash',) if args.out and not args.drop_leaks else ())
  paths = names(args.features) or ()
  if len(paths) not in (0, 1, 1 + len(against)):
    raise UserError(f'--features takes one file for the corpus, or {1 + len(against)}: one for each --against too')
  request = curate.Request(args.corpus, args.out or '', methods, config.parse_overrides(args.words), args.scope,
                        args.split, against=against, drop_leaks=args.drop_leaks, seed=args.seed,
                        overwrite=args.overwrite)
  curate.check(request)
  given = _embedded(args.encoder, (args.corpus, *against)) if args.encoder else [stored(path) for path in paths]
  request = dataclasses.replace(request, features=given[0] if given else None, against_features=tuple(given[1:]))
  found = curate.curate(request, progress=sys.stderr.isatty())
  leaking = any(leaks['leaks'] for leaks in found['leaks'])
  return {'json': found, 'text': curate.text(found, args.out), 'code': EXIT_USER if args.strict and leaking else 0}


def _embedded(encoder: str, corpora: Iterable[str]) -> list[tuple[Any, Any]]:
  """Features and ids of each corpus, by a run or an exported file."""
  import numpy as np

  from jaxmed.data.corpus.open import open_source
  from jaxmed.train.build.rundir import load
  loaded = load(encoder)
  return [(loaded.embed_source(source, 64)[loaded.feature], np.asarray(source.table.column('id').to_pylist()))
          for source in map(open_source, corpora)]
