"""A corpus against its selection without near-duplicates (see experiments/curation_study.py).

Four trainings a seed, of one model and method, judged by frozen features on the test records of the whole corpus:

  full             all records
  reduced, steps   the selection, as many steps as full: the same compute, more epochs
  reduced, epochs  the selection, as many epochs as full: fewer steps
  random, steps    as many records as the selection has, drawn at random, as many steps as full

Intervals are Student's t over seeds; differences are from full, seed by seed.

Needs `make install` alone.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/curation_study.py --data runs/demo/corpus --out runs/curation --steps 400 --seeds 3
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxmed import config, files  # noqa: E402
from jaxmed.data.corpus import selection  # noqa: E402
from jaxmed.data.corpus.open import open_source  # noqa: E402
from jaxmed.data.curate import curate  # noqa: E402
from jaxmed.study.compare import cell, interval, judged  # noqa: E402
from jaxmed.train import loop  # noqa: E402
from jaxmed.train.build.rundir import load_encoder  # noqa: E402
from tools.needs import run_script  # noqa: E402

NAMES = ('logistic accuracy', 'knn accuracy', 'logistic auroc')
REDUCED, RANDOM = 'study-reduced', 'study-random'
ARMS = ('full', 'reduced, steps', 'reduced, epochs', 'random, steps')


def select(data: str, radius: int, seed: int) -> dict[str, int]:
  """Writes both selections; returns the numbers of training records."""
  curate.curate(curate.Request(data, REDUCED, ('hash',), {'hash': {'radius': radius}}, overwrite=True))
  whole = open_source(data)
  train = np.array(whole.table['split'].to_pylist()) == 'train'
  count = len(open_source(f'{data}@{REDUCED}').select('train'))
  keep = ~train
  keep[np.random.default_rng(seed).choice(np.flatnonzero(train), count, replace=False)] = True
  ids = np.array(whole.table['id'].to_pylist())
  selection.write(whole.path, RANDOM, ids[keep].tolist(), {'what': 'drawn at random', 'seed': seed})
  return {'full': int(train.sum()), 'reduced': count, 'random': count}


def user_of(arm: str, seed: int, args: argparse.Namespace, counts: dict[str, int]) -> dict[str, Any]:
  """The config of one run."""
  kind, _, same = arm.partition(', ')
  steps = max(round(args.steps * counts[kind] / counts['full']), 1) if same == 'epochs' else args.steps
  data = {'full': args.data, 'reduced': f'{args.data}@{REDUCED}', 'random': f'{args.data}@{RANDOM}'}[kind]
  fixed = {'data': data, 'seed': seed, 'steps': steps, 'eval_every': steps, 'checkpoint_every': steps}
  return config.merge(config.load_file(f'{ROOT}/experiments/curation_study.py'), fixed,
                      config.parse_overrides(args.words))


def run(arm: str, seed: int, args: argparse.Namespace, counts: dict[str, int]) -> dict[str, Any]:
  """Trains and judges one run; read from where it was written before."""
  folder = pathlib.Path(args.out) / f'{arm.replace(", ", "_")}_{seed}'
  place = folder.with_suffix('.json')
  if place.exists():
    return files.read_json(place)
  print(f'{arm}, seed {seed}: {folder}', file=sys.stderr, flush=True)
  user = user_of(arm, seed, args, counts)
  summary = loop.resume(folder, quiet=True) if (folder / 'config.json').exists() else loop.train(
      user, folder, quiet=True)
  result = {'arm': arm, 'seed': seed, 'steps': summary['steps'], 'seconds': summary['seconds'],
            'scores': judged(load_encoder(folder), open_source(args.data), args.label, seed)}
  files.write_json(place, result)
  return result


def table(results: dict[str, list[dict]], counts: dict[str, int]) -> str:
  """Markdown: scores of each arm, and their differences from full."""
  lines = ['| trained on | records | steps | ' + ' | '.join(NAMES) + ' |', '|---' * (3 + len(NAMES)) + '|']
  value = lambda r, name: r['scores'][name]['value']
  for arm, runs in results.items():
    cells = [cell(interval([value(r, n) for r in runs])) for n in NAMES]
    lines.append(f'| {arm} | {counts[arm.partition(",")[0]]} | {runs[0]["steps"]} | ' + ' | '.join(cells) + ' |')
  for arm, runs in list(results.items())[1:]:
    pairs = [[value(a, n) - value(b, n) for a, b in zip(runs, results['full'], strict=True)] for n in NAMES]
    lines.append(f'| {arm} - full | | | ' + ' | '.join(signed(interval(p)) for p in pairs) + ' |')
  return '\n'.join(lines) + '\n'


def signed(found: dict[str, float | None]) -> str:
  """A difference with its interval."""
  low = '' if found['low'] is None else f' [{found["low"]:+.3f}, {found["high"]:+.3f}]'
  return f'{found["value"]:+.3f}{low}'


def draw(results: dict[str, list[dict]], path: pathlib.Path) -> None:
  """One panel a score: mean and interval of each arm, its seeds as dots."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4 * len(NAMES), 3.6), layout='constrained')
  FigureCanvasAgg(figure)
  for ax, name in zip(figure.subplots(1, len(NAMES), squeeze=False).flat, NAMES, strict=True):
    for x, runs in enumerate(results.values()):
      values = [r['scores'][name]['value'] for r in runs]
      found = interval(values)
      ax.plot([x] * len(values), values, 'o', color='0.7', ms=4)
      spread = None if found['low'] is None else found['high'] - found['value']
      ax.errorbar([x], [found['value']], None if spread is None else [[spread], [spread]], fmt='s', color=f'C{x}',
                  capsize=4)
    told = [f'{arm}, {runs[0]["steps"]} steps'.replace(', ', '\n') for arm, runs in results.items()]
    ax.set_xticks(range(len(results)), told)
    ax.set_title(name)
    ax.margins(x=0.15)
  with files.writing(path) as part:
    figure.savefig(part, format='png', dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, selects, trains, writes OUT/table.md and OUT/curation.png."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('words', nargs='*', metavar='key=value', help='config values for all runs')
  parser.add_argument('--data', required=True, help='the demo corpus, or another with labels and splits')
  parser.add_argument('--out', required=True, help='folder of all runs, table.md and curate.png')
  parser.add_argument('--label', default='region', help='column to judge by')
  parser.add_argument('--steps', type=int, default=800, help='of the full set')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--radius', type=int, default=6, help='most bits in which near-duplicates differ')
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  counts = select(args.data, args.radius, seed=0)
  results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
  for seed in range(args.seeds):
    for arm in ARMS:
      results[arm].append(run(arm, seed, args, counts))
  text = table(results, counts)
  files.write_text(out / 'table.md', text)
  draw(results, out / 'curation.png')
  print(text)


if __name__ == '__main__':
  run_script(main)
