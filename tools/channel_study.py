"""Hierarchical channel sampling with DINO on the demo corpus: against no training, RGB images alone, and no sampling.

Four encoders of one model, judged as in the README (which of 12 regions of the brain an unseen slice shows):

  untrained    random weights
  rgb          DINO on the natural-colour images alone (fundus, histology); the brain's channels enter as R, G and B,
               as they enter a model that was pretrained on colour images
  all          DINO on all images, every view with all channels of its image
  hcs          DINO on all images, each view with channels of its own (experiments/channel_vit_dino.py:laptop)

The number of steps, batch, views and everything else are alike. Intervals are Student's t over seeds.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/channel_study.py --data runs/demo/corpus --out runs/channels --steps 400 --seeds 3
"""

import argparse
import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxmed import config, files  # noqa: E402
from jaxmed.data.sources import open_source  # noqa: E402
from jaxmed.train import loop  # noqa: E402
from jaxmed.train.compare import cell, interval, judged  # noqa: E402
from jaxmed.train.run import load_encoder  # noqa: E402

RGB, BRAIN = ('R', 'G', 'B'), ('T1', 'GM', 'WM')
ARMS = {
    'rgb': {'loader': {'sources': 'fundus,histology', 'label': ''}, 'augment': {'channel_sampling': 'none'}},
    'all': {'augment': {'channel_sampling': 'none'}},
    'hcs': {},
}
NAMES = ('logistic accuracy', 'knn accuracy', 'logistic auroc')


def as_colours(encoder, source):
  """An encoder of R, G and B that takes the brain's channels in their places, normalised by their own statistics."""
  names = dict(zip(RGB, BRAIN, strict=True))
  stats = lambda name: {'name': name, 'mean': source.stats[name]['mean'], 'std': source.stats[name]['std']}
  return dataclasses.replace(encoder, channels=tuple(stats(names[c['name']]) for c in encoder.channels))


def run(arm: str, seed: int, data: str, out: pathlib.Path, steps: int) -> dict[str, dict]:
  """Scores of one run, by arm; a run of `hcs` gives those of its encoder before training too."""
  place, folder = out / f'{arm}_{seed}.json', out / f'{arm}_{seed}'
  if place.exists():
    return files.read_json(place)
  print(f'{arm}, seed {seed}', file=sys.stderr, flush=True)
  fixed = {'data': data, 'seed': seed, 'steps': steps, 'eval_every': steps, 'checkpoint_every': steps}
  user = config.merge(config.load_file(f'{ROOT}/experiments/channel_vit_dino.py:laptop'), fixed, ARMS[arm])
  if (folder / 'config.json').exists():
    loop.resume(folder, quiet=True)
  else:
    loop.train(user, folder, quiet=True)
  encoder, source = load_encoder(folder), open_source(data)
  encoder = as_colours(encoder, source) if arm == 'rgb' else encoder
  scores = {arm: judged(encoder, source, 'region', seed)}
  if arm == 'hcs':
    scores['untrained'] = judged(encoder.untrained(seed), source, 'region', seed)
  files.write_json(place, scores)
  return scores


def main() -> None:
  """Parses, trains, prints a Markdown table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', required=True, help='the demo corpus')
  parser.add_argument('--out', required=True, help='folder of all runs and of table.md')
  parser.add_argument('--steps', type=int, default=400, help='of 32 images each')
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  found: dict[str, list[dict]] = {'untrained': []}
  for seed in range(args.seeds):
    for arm in ARMS:
      for name, scores in run(arm, seed, args.data, out, args.steps).items():
        found.setdefault(name, []).append(scores)
  lines = ['| encoder | ' + ' | '.join(NAMES) + ' |', '|---' * (1 + len(NAMES)) + '|']
  for name, runs in found.items():
    lines.append(f'| {name} | ' + ' | '.join(cell(interval([r[n]['value'] for r in runs])) for n in NAMES) + ' |')
  files.write_text(out / 'table.md', '\n'.join(lines) + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  main()
