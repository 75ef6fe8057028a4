"""Hierarchical channel sampling with DINO on the demo corpus: against no training, RGB images alone, and no sampling.

Four encoders of one model, judged as in the README (which of 12 regions of the brain an unseen slice shows):

  untrained    random weights
  rgb          DINO on the natural-colour images alone (fundus, histology); the brain's channels enter as R, G and B,
               as they enter a model that was pretrained on colour images
  all          DINO on all images, every view with all channels of its image
  hcs          DINO on all images, each view with channels of its own (experiments/channel_vit_dino.py:laptop)

The number of steps, batch, views and everything else are alike. Intervals are Student's t over seeds. Differences are
paired: the two encoders of a seed answer for the same test slices. Their second interval is a bootstrap
over seeds and blocks of the brain together, and n/n says in how many seeds the difference is above 0.

Needs `make install` alone.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/channel_study.py --data runs/demo/corpus --out runs/channels --steps 400 --seeds 3
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxmed import config, files  # noqa: E402
from jaxmed.data.corpus.open import open_source  # noqa: E402
from jaxmed.errors import UserError  # noqa: E402
from jaxmed.evaluate.metrics import difference_over_runs, score  # noqa: E402
from jaxmed.evaluate.protocols.classify import answers_of  # noqa: E402
from jaxmed.study.compare import cell, interval, judged  # noqa: E402
from jaxmed.train import loop  # noqa: E402
from jaxmed.train.build.rundir import load_encoder  # noqa: E402
from tools.needs import run_script  # noqa: E402

RGB, BRAIN = ('R', 'G', 'B'), ('T1', 'GM', 'WM')
ARMS = {
    'rgb': {'loader': {'sources': 'fundus,histology', 'label': ''}, 'augment': {'channel_sampling': 'none'}},
    'all': {'augment': {'channel_sampling': 'none'}},
    'hcs': {},
}
DIFFERENCES = (('hcs', 'rgb'), ('hcs', 'untrained'), ('all', 'rgb'))
NAMES = ('logistic accuracy', 'knn accuracy', 'logistic auroc')


def as_colours(encoder, source):
  """An encoder of R, G and B that takes the brain's channels in their places, normalised by their own statistics."""
  names = dict(zip(RGB, BRAIN, strict=True))
  stats = lambda name: {'name': name, 'mean': source.stats[name]['mean'], 'std': source.stats[name]['std']}
  return dataclasses.replace(encoder, channels=tuple(stats(names[c['name']]) for c in encoder.channels))


def trained(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
  """The encoders of one run, by arm; a run of `hcs` gives its encoder before training too."""
  folder = pathlib.Path(args.out) / f'{arm}_{seed}'
  fixed = {'data': args.data, 'seed': seed, 'steps': args.steps, 'eval_every': args.steps,
           'checkpoint_every': args.steps}
  user = config.merge(config.load_file(f'{ROOT}/experiments/channel_vit_dino.py:laptop'), fixed, ARMS[arm],
                      config.parse_overrides(args.words))
  if (folder / 'config.json').exists():
    loop.resume(folder, quiet=True)
  else:
    loop.train(user, folder, quiet=True)
  encoder = load_encoder(folder)
  if arm == 'rgb':
    return {arm: as_colours(encoder, open_source(args.data))}
  return {arm: encoder} | ({'untrained': encoder.untrained(seed)} if arm == 'hcs' else {})


def run(arm: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, dict], dict[str, dict]]:
  """Scores of one run, and what its probes say of each test slice, both by arm; read where they were written before."""
  out = pathlib.Path(args.out)
  place, answers = out / f'{arm}_{seed}.json', {}
  names = (arm, 'untrained') if arm == 'hcs' else (arm,)
  paths = {name: out / f'{name}_{seed}.npz' for name in names}
  if not place.exists() or not all(path.exists() for path in paths.values()):
    print(f'{arm}, seed {seed}', file=sys.stderr, flush=True)
    source, scores = open_source(args.data), {}
    for name, encoder in trained(arm, seed, args).items():
      scores[name] = judged(encoder, source, 'region', seed)
      np.savez(paths[name], **answers_of(encoder, source, 'region', feature=encoder.feature, seed=seed))
    files.write_json(place, scores)
  for name, path in paths.items():
    with np.load(path) as f:
      answers[name] = dict(f)
  return files.read_json(place), answers


def difference(pairs: list[tuple[dict, dict]], name: str) -> str:
  """Mean difference as text, with an interval over seeds, one over seeds and slices, and how many seeds are above 0."""
  probe, metric = name.split()
  one = pairs[0][0]
  for pair in pairs:
    for answer in pair:
      if not np.array_equal(answer['y'], one['y']) or not np.array_equal(answer['subjects'], one['subjects']):
        raise UserError('the runs were judged on other test slices: begin again with another --out')
  known = [int(c) for c in one['known']]
  value = lambda answer: score(one['y'], answer[probe], known)[metric]
  each = [value(a) - value(b) for a, b in pairs]
  both = difference_over_runs(one['y'], [(a[probe], b[probe]) for a, b in pairs], one['subjects'], auroc_classes=known)
  text = lambda found: '' if found['low'] is None else f' [{found["low"]:+.3f}, {found["high"]:+.3f}]'
  return f'{np.mean(each):+.3f}{text(interval(each))}{text(both[metric])} {sum(d > 0 for d in each)}/{len(each)}'


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, trains, prints a Markdown table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('words', nargs='*', metavar='key=value', help='config values for all runs')
  parser.add_argument('--data', required=True, help='the demo corpus')
  parser.add_argument('--out', required=True, help='folder of all runs and of table.md')
  parser.add_argument('--steps', type=int, default=400, help='of 32 images each')
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  found: dict[str, list[dict]] = {'untrained': []}
  answers: dict[str, list[dict]] = {}
  for seed in range(args.seeds):
    for arm in ARMS:
      scores, answered = run(arm, seed, args)
      for name in scores:
        found.setdefault(name, []).append(scores[name])
        answers.setdefault(name, []).append(answered[name])
  lines = ['| encoder | ' + ' | '.join(NAMES) + ' |', '|---' * (1 + len(NAMES)) + '|']
  for name, runs in found.items():
    lines.append(f'| {name} | ' + ' | '.join(cell(interval([r[n]['value'] for r in runs])) for n in NAMES) + ' |')
  lines += ['', '| difference | ' + ' | '.join(NAMES) + ' |', '|---' * (1 + len(NAMES)) + '|']
  for a, b in DIFFERENCES:
    pairs = list(zip(answers[a], answers[b], strict=True))
    lines.append(f'| {a} - {b} | ' + ' | '.join(difference(pairs, n) for n in NAMES) + ' |')
  files.write_text(out / 'table.md', '\n'.join(lines) + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  run_script(main)
