"""`jaxmed plan`: what a run takes on a cluster."""

import argparse
import os
from typing import Any

from jaxmed.cli.common import positive

DOES = 'estimate memory and time of a run on a TPU pod or GPU cluster, without one'
EXAMPLE = 'jaxmed plan experiments/dinov2.py --topology v5e:16x16'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('words', nargs='*', metavar='CONFIG key=value',
                 help='recipe or config file, then overrides (jaxmed train --help)')
  p.add_argument('--topology', required=True, metavar='CHIP:SIZE', help='chips: v4:4x4x8, v5e:16x16, v5p:8x8x8, '
                 'v6e:16x16, two slices v5e:16x16*2; a100:16, h100:64, h200:64')
  p.add_argument('--slices', type=positive, default=1, help='number of slices of that size; default 1')
  p.add_argument('--channels', type=positive, default=3, help='channels of an image; default 3')
  p.add_argument('--rows', type=positive, default=1_000_000, help='images of the corpus; default 1000000')
  p.add_argument('--search', action='store_true', help='search meshes, batches and rematerialisation')
  p.add_argument('--compile', type=int, default=3, metavar='N', help='number of best candidates of the search to '
                 'compile; default 3')
  p.add_argument('--hlo', metavar='FILE', help='file for the optimised program')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """What a run takes on a cluster."""
  os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX starts: with libtpu installed it would look for a TPU
  from jaxmed import config
  from jaxmed.parallel import chips
  from jaxmed.plan import plan, search, tables
  words = list(args.words)
  user = config.load_file(words.pop(0)) if words and '=' not in words[0] else {}
  user = config.merge(user, config.parse_overrides(words))
  request = plan.Request(user, chips.parse(args.topology, args.slices), args.channels, args.rows)
  if args.search:
    found = search.search(request, args.compile)
    return {'json': found, 'text': tables.render_search(found)}
  made = plan.plan(request, args.hlo or '')
  return {'json': made, 'text': tables.render(made)}
