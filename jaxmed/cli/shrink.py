"""`jaxmed shrink`: fewer numbers for hashed channel embeddings."""

import argparse
import sys
from typing import Any

from jaxmed import files
from jaxmed.cli.common import positive

DOES = 'find how few numbers hashed channel embeddings need'
EXAMPLE = 'jaxmed shrink run --data corpus --out encoder.safetensors'


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('path', metavar='RUN', help='run with encoder.channel_embedding=hashed encoder.hash_draw=True')
  p.add_argument('--data', required=True, metavar='CORPUS', help='corpus whose val split judges the candidates')
  p.add_argument('--out', required=True, metavar='FILE.safetensors', help='file to write')
  p.add_argument('--rounds', type=positive, default=30, help='generations of 20 candidates; default 30')
  p.add_argument('--rows', type=positive, default=256, help='held-out rows that judge a candidate; default 256')
  p.add_argument('--seed', type=int, default=0, help='seed of the search; default 0')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Searches how few numbers the features of hashed channels need, and writes that encoder."""
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.models.layers import channel_embed
  from jaxmed.study import shrink as search
  files.check_place(args.out)
  tell = lambda line: print(line, file=sys.stderr, flush=True)
  found = search.shrink(args.path, args.data, rounds=args.rounds, rows=args.rows, seed=args.seed, tell=tell)
  encoder = found.encoder
  layouts.export_file(args.out, 'jaxmed', encoder.model, encoder.params, encoder.described)
  result = {'out': args.out, 'widths': list(found.widths), 'numbers': found.numbers[0], 'of': found.numbers[1],
            'loss': found.loss[1], 'loss_before': found.loss[0], 'features': found.census}
  told = channel_embed.told(found.census, encoder.model.hash_width)
  return {'json': result, 'text': f'{args.out}: {told}\nheld-out loss {found.loss[1]:.6g}, '
          f'with all numbers {found.loss[0]:.6g}; to train with these widths: '
          f"'encoder.hash_widths={found.widths}' encoder.hash_draw=False"}
