"""Trains every method on several models on the demo corpus, alike, and writes one Markdown table.

Each method takes the options of its recipe's `laptop` variant; model, batch, number of images and seed are the same for
all. The score is of a frozen encoder on unseen slabs of the demo brain (see the README), beside that of the same
encoder untrained (initial weights and the vector that is looked at differ by method) and raw pixels. A table that was
stopped goes on where it was.

Needs `make install` alone.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/method_table.py --data runs/demo/corpus --out runs/methods --steps 300
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed import config, files, objectives  # noqa: E402
from jaxmed.study.compare import Plan, compare  # noqa: E402
from tools.needs import run_script  # noqa: E402

MODELS = ('vit_micro/16', 'channel_vit_micro/16', 'convnextv2_micro')
SHARED = ('method', 'model', 'steps', 'epochs', 'batch_size', 'data', 'eval_every', 'seed')
VIT_ONLY = ('layer_scale', 'pos', 'num_registers', 'local_norm', 'rope_rescale', 'rope_shift', 'rope_jitter',
            'class_token', 'kernel_init', 'pos_interpolation', 'mlp_ratio', 'mlp')


def laptop(method: str, model: str) -> dict:
  """What a method's laptop recipe sets, without what is the same for all methods here."""
  values = config.load_file(f'{pathlib.Path(__file__).parent.parent}/experiments/{method}.py:laptop')
  values = {k: v for k, v in values.items() if k not in SHARED}
  if 'vit' not in model:
    values['encoder'] = {k: v for k, v in values.get('encoder', {}).items() if k not in VIT_ONLY}
  return values


def table(wholes: list[dict]) -> str:
  """Accuracy of linear probe and kNN, that of the same encoder untrained in brackets: methods down, models across."""
  head = '| method | ' + ' | '.join(f'{w["model"].partition("/")[0]} linear | kNN' for w in wholes) + ' |'
  lines = [head, '|---' * (1 + 2 * len(wholes)) + '|']
  row_of = lambda whole, method: next((r for r in (*whole['rows'], *whole['baselines']) if r['method'] == method), {})
  order = dict.fromkeys(r['method'] for key in ('rows', 'baselines') for w in wholes for r in w[key])
  for method in order:
    cells = []
    for row in (row_of(whole, method) for whole in wholes):
      for score in ('logistic accuracy', 'knn accuracy'):
        if 'scores' not in row:
          cells.append('failed' if 'failed' in row else '')
          continue
        before = f' ({row["untrained"][score]["value"]:.3f})' if 'untrained' in row else ''
        cells.append(f'{row["scores"][score]["value"]:.3f}{before}')
    lines.append(f'| {method} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, trains, writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('words', nargs='*', metavar='key=value', help='config values for all runs')
  parser.add_argument('--data', required=True, help='the demo corpus')
  parser.add_argument('--out', required=True, help='folder of all runs and of table.md')
  parser.add_argument('--steps', type=int, default=300, help='of 32 images each')
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--models', default=','.join(MODELS))
  parser.add_argument('--methods', default=','.join(objectives.METHODS))
  args = parser.parse_args(argv)
  wholes = []
  for model in args.models.split(','):
    methods = tuple(args.methods.split(','))
    user = {'batch_size': 32, 'eval_every': args.steps, 'checkpoint_every': args.steps, 'log_every': 25}
    plan = Plan(args.data, methods, model, 'region', 32 * args.steps, args.seeds, user,
                {m: config.merge(laptop(m, model), config.parse_overrides(args.words)) for m in methods})
    wholes.append(compare(plan, pathlib.Path(args.out) / model.replace('/', '_')))
    files.write_text(pathlib.Path(args.out) / 'table.md', table(wholes))
  print(table(wholes))


if __name__ == '__main__':
  run_script(main)
