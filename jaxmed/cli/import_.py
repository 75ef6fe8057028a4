"""`jaxmed import`: an encoder from PyTorch."""

import argparse
from typing import Any

from jaxmed.cli.common import names

DOES = 'convert an encoder from PyTorch'
EXAMPLE = 'jaxmed import vit.safetensors --format timm --out encoder.safetensors'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='FILE', help='weights of a PyTorch model: safetensors (of several files the '
                 'index or its folder), or .pth, .pt, .bin, .ckpt; no code in the file is executed')
  p.add_argument('--format', help='weight format: timm, channelvit, monai_vit, '
                 'monai_swinunetr (MONAI 1.5 and later), monai_swinunetr_legacy (before) or monai_swinunetr_mergingv2; '
                 'default: found from the tensors')
  p.add_argument('--out', required=True, metavar='FILE.safetensors', help='file to write')
  p.add_argument('--num-heads', type=int, metavar='N', help='number of attention heads; default: width / 64')
  p.add_argument('--image-size', type=int, nargs='+', metavar='N', help='native size; default: square')
  p.add_argument('--channels', metavar='NAMES', help='names of the input channels, comma-separated')
  p.add_argument('--inflate', metavar='RULE', help='rule that gives the model other --channels: name (a known channel '
                 'keeps its weights, others get the mean), mean or repeat')
  p.add_argument('--positions', choices=('antialias', 'offset'), help='resampling of learned positions to other image '
                 'sizes: timm has antialias, DINO and DINOv2 without registers offset; default: found from the names')
  p.add_argument('--weights', choices=('ema', 'plain'), help='weights of a checkpoint that holds averaged and plain '
                 'ones; default: ema where there are some')
  p.add_argument('--to', metavar='FAMILY', help='family to convert to: vit to channel_vit, or back where that is '
                 'linear')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Rewrites a PyTorch encoder as a file that `jaxmed.load` takes."""
  from jaxmed.interop import verify
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.models import registry
  size = tuple(args.image_size) if args.image_size else None
  if size and len(size) == 1:
    size = size * 2
  model = layouts.import_file(args.path, args.format, args.out, args.num_heads, size, names(args.channels),
                              args.inflate, args.to, args.positions, args.weights)
  about = registry.describe(model)
  resampled = f", positions resampled by '{about['pos_interpolation']}'" if about.get('pos') == 'learned' else ''
  return {'json': {'out': args.out, 'model': about},
          'text': f'{verify.architecture(model)}, {model.in_channels} channels{resampled} in {args.out}'}
