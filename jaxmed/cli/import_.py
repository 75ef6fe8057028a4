"""`jaxmed import`: an encoder from PyTorch."""

import argparse
from typing import Any

from jaxmed.cli.common import names

DOES = 'take an encoder from PyTorch'
EXAMPLE = 'jaxmed import vit.safetensors --format timm --out encoder.safetensors'


def options(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='FILE', help='weights of a PyTorch model: safetensors, or .pth, .pt, .bin, .ckpt, of '
                 'which nothing is executed')
  p.add_argument('--format', help='timm or channelvit; told by the tensors by default')
  p.add_argument('--out', required=True, metavar='FILE.safetensors')
  p.add_argument('--num-heads', type=int, help='attention heads; width / 64 by default')
  p.add_argument('--image-size', type=int, nargs='+', help='native size; square by default')
  p.add_argument('--channels', help='names of the input channels, comma-separated')
  p.add_argument('--inflate', help='make it a model of --channels, which may be more or others: name (what has the '
                 'name of a known channel keeps its weights, the rest gets the mean), mean or repeat')
  p.add_argument('--to', help='make a vit a channel_vit, or the other way round as far as that is linear')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Rewrites a PyTorch encoder as a file that `jaxmed.load` takes."""
  from jaxmed.interop import verify
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.models import registry
  size = tuple(args.image_size) if args.image_size else None
  if size and len(size) == 1:
    size = size * 2
  model = layouts.import_file(args.path, args.format, args.out, args.num_heads, size, names(args.channels),
                              args.inflate, args.to)
  about = registry.describe(model)
  return {'json': {'out': args.out, 'model': about},
          'text': f'{verify.architecture(model)}, {model.in_channels} channels in {args.out}'}
