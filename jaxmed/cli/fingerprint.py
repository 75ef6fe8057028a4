"""`jaxmed fingerprint`: what a corpus with masks is like, and the U-Net that nnU-Net's rule plans for it."""

import argparse
import dataclasses
from typing import Any

from jaxmed.cli.common import millimetres, positive

DOES = "show spacings, shapes, classes and intensities of a corpus, and nnU-Net's plan for it"
EXAMPLE = 'jaxmed fingerprint corpus --preset resenc_m'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('data', metavar='CORPUS', help='prepared corpus, or CORPUS@NAME; of its training records')
  p.add_argument('--preset', default='nnunet_plain', help='network to plan: nnunet_plain, resenc_m, resenc_l or '
                 'resenc_xl; default nnunet_plain')
  p.add_argument('--memory', type=float, metavar='GB', help="memory of the device; default: the preset's, 8, 8, 24 and "
                 '40 GB')
  p.add_argument('--spacing', metavar='MM', help='spacing to plan for, along the stored axes: 3,1,1; default: '
                 'the medians, and less of a coarse and short axis')
  p.add_argument('--records', type=positive, default=200, metavar='N', help='records whose pixels are read for '
                 'intensities; default 200')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Looks at the training records, and plans."""
  from jaxmed.data.corpus.fingerprint import fingerprint
  from jaxmed.data.corpus.open import open_source
  from jaxmed.models import unet_plan
  found = fingerprint(open_source(args.data).select('train'), args.records)
  rank, spacings, stored = found.shapes.shape[1], found.spacings.tolist(), found.shapes.tolist()
  target = (millimetres('--spacing', args.spacing, rank) if args.spacing else
            unet_plan.target_spacing(spacings, stored))
  shapes = [unet_plan.resampled_shape(*pair, target) for pair in zip(stored, spacings, strict=True)]
  shape, count, classes = _median(shapes), len(shapes), max(len(found.classes), 2)
  made = unet_plan.plan(target, shape, count, classes, args.preset, args.memory)
  coarse = unet_plan.low_resolution(made, count, classes, args.memory) if len(target) == 3 else None
  words = [*made.words, *([f'loader.normalize={found.constants}'] if found.foreground else [])]
  apart = unet_plan.separate_axis(_median(found.spacings), target)
  out = {
      'records': count, 'masks': found.masks, 'read': found.read, 'spacing': _median(found.spacings),
      'spacing_known': found.known, 'shape': _median(found.shapes), 'classes': found.classes,
      'foreground': {name: dataclasses.asdict(f) for name, f in found.foreground.items()},
      'plan': _described(made), 'separate_axis': apart, 'coarse_plan': _described(coarse) if coarse else None,
      'words': words}
  return {'json': out, 'text': _text(out, args)}


def _median(values: Any) -> tuple[float, ...]:
  import numpy as np
  return tuple(np.median(np.asarray(values, np.float64), axis=0).tolist())


def _described(plan: Any) -> dict[str, Any]:
  return dataclasses.asdict(plan) | {'pools': plan.pools, 'words': plan.words}


def _text(out: dict[str, Any], args: argparse.Namespace) -> str:
  """The fingerprint, the plan, and the words of a run."""
  line = lambda values: ' x '.join(f'{value:.4g}' for value in values)
  plan, coarse = out['plan'], out['coarse_plan']
  classes = ', '.join(name if n is None else f'{name} ({n})' for name, n in out['classes'].items())
  rows = [('training records', f'{out["records"]}, {out["masks"]} with a mask'),
          ('median spacing', f'{line(out["spacing"])} mm' if out['spacing_known'] else 'unknown of some: taken as 1'),
          ('median shape', line(out['shape']))]
  rows += [('classes (records)', classes)] if classes else []
  rows += [(f'foreground of {name}', f'{f["low"]:.6g} .. {f["high"]:.6g} (0.5 and 99.5 %), mean {f["mean"]:.6g}, '
            f'deviation {f["std"]:.6g}') for name, f in out['foreground'].items()]
  rows += [('plan', f'{plan["model"]}: spacing {line(plan["spacing"])} mm, patch {line(plan["patch"])}, batch '
            f'{plan["batch"]}, {len(plan["strides"])} stages, axes halved {line(plan["pools"])} times')]
  if out['separate_axis'] is not None:
    rows += [('resampling', f'axis {out["separate_axis"]} is coarse: nearest neighbours along it')]
  if coarse:
    rows += [('coarser plan', f'spacing {line(coarse["spacing"])} mm, patch {line(coarse["patch"])}, batch '
              f'{coarse["batch"]}')]
  wide = max(len(name) for name, _ in rows)
  spacing = ','.join(f'{value:.6g}' for value in plan['spacing'])
  volumes = [f'jaxmed prepare RAW --out {args.data} --volumes whole --spacing {spacing}']
  return '\n'.join([*(f'{name:{wide}}  {text}' for name, text in rows), '',
                    *(volumes if out['spacing_known'] and len(plan['spacing']) == 3 else []), ' '.join(out['words'])])
