"""`jaxmed predict`: masks of whole images."""

import argparse
import sys
from typing import Any

from jaxmed.cli.common import names, positive
from jaxmed.errors import UserError, choose

DOES = 'write masks of whole images'
EXAMPLE = 'jaxmed predict run --data scans/ --out masks'
FLIPS = ('auto', 'none')


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='RUN', help='directory of a run of method segment or semi_segment')
  p.add_argument('--checkpoint', default='latest', help='checkpoint of the run: latest, best or a step; default latest')
  p.add_argument('--data', required=True, metavar='CORPUS', help='folder of images, an image, or a corpus')
  p.add_argument('--out', required=True, metavar='FOLDER', help='folder for masks, one an image, under its name; masks '
                 'that are there already are kept')
  p.add_argument('--split', help='split of a corpus to predict; default: all')
  p.add_argument('--channels', metavar='NAMES', help='names of the channels of all images, comma-separated; of files '
                 'CASE_0000, CASE_0001 ... in that order')
  p.add_argument('--step', type=float, default=0.5, help='largest distance of two tiles, as a fraction of a tile; '
                 'default 0.5')
  p.add_argument('--flips', default='auto', metavar='AXES', help='axes to mirror, such as 0,2, whose logits are '
                 'averaged; auto: those that training mirrored, none where classes are left and right; none; default '
                 'auto')
  p.add_argument('--batch-size', type=positive, default=1, help='tiles in one pass on each device; default 1')
  p.add_argument('--volumes', metavar='FILE.csv', help='file for volume and mean intensity of each structure')
  p.add_argument('--postprocess', choices=('none', 'auto'), default='none', help='auto: keep the largest component of '
                 'classes where that raises the Dice of split val of the corpus of the run; default none')
  p.add_argument('--format', default='auto', help='auto: masks in the format of the image, NIfTI for DICOM; dicomseg: '
                 'DICOM segmentations of DICOM series; default auto')
  p.add_argument('--overwrite', action='store_true', help='replace masks of another run or of other options')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Predicts a folder or a corpus."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.evaluate.protocols.segment import best_change, val_of
  from jaxmed.parallel import compilation
  from jaxmed.predict.job import Options, predict
  from jaxmed.train.build.rundir import load_config, load_segmenter
  compilation.keep()
  segmenter = load_segmenter(args.path, args.checkpoint)
  asked = Options(names(args.channels), args.split, args.step, flips_of(args.flips), args.batch_size, args.volumes,
                  args.overwrite, args.format)
  change = None
  if args.postprocess == 'auto':
    change = best_change(segmenter, val_of(open_source(load_config(args.path)[0].data)), **asked.asked)
  changed = f'largest component of {", ".join(change.names)}' if change and change.names else ''
  found = predict(segmenter, args.data, args.out, asked, change=change, changed=changed, progress=sys.stderr.isatty())
  text = f'{found["written"]} masks written, {found["kept"]} kept, in {args.out}'
  text += f'\n{changed} kept' if changed else ''
  return {'json': found, 'text': text + (f'\nvolumes: {args.volumes}' if args.volumes else '')}


def flips_of(text: str) -> tuple[int, ...] | None:
  """'0,2' -> (0, 2); None for auto."""
  if text in FLIPS:
    return None if text == 'auto' else ()
  try:
    return tuple(int(word) for word in text.split(','))
  except ValueError:
    choose('--flips', text, FLIPS)
    raise UserError(f'--flips {text}: expected axes such as 0,2, auto or none') from None
