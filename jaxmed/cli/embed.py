"""`jaxmed embed`: features of images."""

import argparse
import pathlib
import tempfile
from typing import Any

from jaxmed import files
from jaxmed.cli.common import for_channels, left_out, names, positive, tower, unseen, which
from jaxmed.errors import UserError

DOES = 'write features of images'
EXAMPLE = 'jaxmed embed run --data scans/ --out features.npz'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  which(p)
  tower(p)
  unseen(p)
  p.add_argument('--data', required=True, metavar='CORPUS', help='corpus, or a folder of images')
  p.add_argument('--out', required=True, metavar='FILE.npz', help='file for features [N, D] float32 and id [N]')
  p.add_argument('--feature', choices=('cls', 'mean', 'map'), help='vector of each image; map: vector of each patch '
                 '[N, *grid, D], the mean over channels; default: the vector of the method')
  p.add_argument('--split', help='split of the corpus to embed; default: all')
  p.add_argument('--channels', metavar='NAMES', help='channels of a folder of images, comma-separated')
  p.add_argument('--batch-size', type=positive, default=64, help='images in one pass; default 64')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Writes features of a corpus or a folder."""
  import numpy as np

  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.open import open_source
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  compilation.keep()
  encoder = load(args.path, args.checkpoint, args.tower)
  files.check_place(args.out)
  feature = args.feature or encoder.feature
  with tempfile.TemporaryDirectory() as scratch:
    data = args.data
    if pathlib.Path(data).exists() and not is_corpus(data):
      from jaxmed.data.prepare.prepare import prepare
      data = str(pathlib.Path(scratch) / 'corpus')
      summary = prepare([args.data], data, channels=names(args.channels), splits=(1.0, 0.0, 0.0), progress=False)
      left_out(summary, args.data)
    source = open_source(data)
    source = source.select(split=args.split) if args.split else source
    found = for_channels(encoder, args, source).embed_source(source, args.batch_size, feature == 'map')
    if feature not in found:
      raise UserError(f'the encoder has no feature {feature!r}: choose one of {", ".join(found)}')
    ids = np.asarray(source.table.column('id').to_pylist())
    with files.writing(args.out) as part, open(part, 'wb') as f:
      np.savez(f, features=found[feature], id=ids)
  shape = list(found[feature].shape)
  return {'json': {'out': args.out, 'shape': shape, 'feature': feature},
          'text': f'features {shape} ({feature}) in {args.out}'}
