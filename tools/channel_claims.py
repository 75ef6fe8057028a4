"""The three claims of ChannelViT (Bao et al. 2024, arXiv 2309.16108) on a corpus, with the recipes of
experiments/channel_vit/:

  1  with all channels ChannelViT is better than ViT (without channel sampling, and with it)
  2  with fewer test channels it is better to have trained with hierarchical channel sampling (HCS) than without
  3  where a share of the training records lacks channels, ChannelViT is better than ViT (both with HCS, judged on all)

Encoders are trained with labels, as in the paper, and judged by the accuracy of their own heads on test images that
show subsets of their channels (as `jaxmed evaluate --channels all` chooses them, --subsets at most). A ViT sees the
other channels zeroed and the rest scaled, a ChannelViT has no tokens of them.

Differences are paired: two encoders of a seed answer for the same test images. Their interval is a bootstrap over seeds
and test subjects together; a claim is reproduced where it lies above 0, not where below, else undecided. Beside it
stand Student's t over seeds and in how many seeds the difference is above 0. Stopped, it goes on where it was.

Needs `make install` alone.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/channel_claims.py --data runs/demo/corpus --label region --out runs/claims_demo
  jaxmed prepare synthetic --out runs/synthetic
  python tools/channel_claims.py --data runs/synthetic --label relation --out runs/claims_synthetic
  python tools/channel_claims.py --data JUMPCP --label label --size published --shares 0.25,0.5,0.75 --out claims
"""

import argparse
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxmed import config, files  # noqa: E402
from jaxmed.data.corpus.open import open_source  # noqa: E402
from jaxmed.errors import EXIT_STOPPED, Stopped, UserError  # noqa: E402
from jaxmed.evaluate import metrics  # noqa: E402
from jaxmed.evaluate.protocols.channels import chosen_subsets, common_rows  # noqa: E402
from jaxmed.evaluate.protocols.tasks import make_task  # noqa: E402
from jaxmed.evaluate.report import figures  # noqa: E402
from jaxmed.study.compare import cell, interval  # noqa: E402
from jaxmed.train import loop  # noqa: E402
from jaxmed.train.build.rundir import encoder_of, load_state  # noqa: E402
from tools.needs import run_script  # noqa: E402

SIZES = ('laptop', 'published')
# An arm: recipe and what its variant's name ends with.
ARMS = {'ChannelViT': ('all_channels', ''), 'ViT': ('all_channels', '_vit'),
        'ChannelViT, HCS': ('fewer_channels', ''), 'ViT, HCS': ('fewer_channels', '_vit')}
LACKING = {'ChannelViT': ('missing_channels', ''), 'ViT': ('missing_channels', '_vit')}
DRAWS = 2000


class Study:
  """What is asked: a corpus, its test rows, and the subsets of channels that they show."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.out = args, pathlib.Path(args.out)
    self.task, self.names, self.notes = common_rows(make_task(open_source(args.data), args.label, 0))
    self.subsets = chosen_subsets(self.names, args.subsets, np.random.default_rng(0))
    last = self.names[-max(1, round(len(self.names) * 3 / 8)):]
    self.lacking = tuple(args.lacking.split(',')) if args.lacking else last
    self.shares = tuple(s.strip() for s in args.shares.split(',') if s.strip())

  def arms(self) -> dict[str, tuple[str, str, str]]:
    """{name: recipe, end of the variant, loader.missing}."""
    plain = {name: (*recipe, '') for name, recipe in ARMS.items()}
    missing = lambda share: f'{",".join(self.lacking)}={share}'
    return plain | {lacking(name, share): (*recipe, missing(share)) for share in self.shares
                    for name, recipe in LACKING.items()}

  def user(self, arm: str, seed: int) -> dict[str, Any]:
    """The config of one run."""
    recipe, end, missing = self.arms()[arm]
    user = config.load_file(f'{ROOT}/experiments/channel_vit/{recipe}.py:{self.args.size}{end}')
    fixed: dict[str, Any] = {'data': self.args.data, 'seed': seed, 'loader': {'label': self.args.label}}
    if missing:
      fixed['loader']['missing'] = missing
    if self.args.steps:
      fixed |= {'steps': self.args.steps, 'eval_every': self.args.steps,
                'checkpoint_every': self.args.steps}
    if self.args.model_size:
      family, patch = user['model'].rsplit('_', 1)[0], user['model'].partition('/')[2]
      fixed['model'] = f'{family}_{self.args.model_size}/{patch}'
    return config.merge(user, fixed, config.parse_overrides(self.args.words))

  def right(self, arm: str, seed: int) -> np.ndarray:
    """Which test rows one run gets right, bool [S, M]; trained and asked, or read where that was written before."""
    name = ''.join(c if c.isalnum() else '_' for c in arm.lower())
    folder, place = self.out / f'{name}_{seed}', self.out / f'{name}_{seed}.npz'
    asked = {'subsets': np.array(['+'.join(s) for s in self.subsets]),
             'ids': np.array(self.task.test.source.table['id'].to_pylist())}
    if place.exists():
      with np.load(place) as f:
        if any(not np.array_equal(f[k], v) for k, v in asked.items()):
          raise UserError(f'{place} is of other test rows or subsets: choose another --out')
        return f['right']
    print(f'{arm}, seed {seed}', file=sys.stderr, flush=True)
    if (folder / 'config.json').exists():
      loop.resume(folder, quiet=True)
    else:
      loop.train(self.user(arm, seed), folder, quiet=True)
    right = self._asked(folder)
    with files.writing(place) as part, open(part, 'wb') as f:
      np.savez_compressed(f, right=right, **asked)
    return right

  def _asked(self, folder: pathlib.Path) -> np.ndarray:
    """What a trained head says of each subset, against the labels."""
    trainer, settings, spec, state = load_state(folder)
    encoder, objective = encoder_of(trainer, settings, spec, state), trainer.objective
    head = (state.average or state.params)['head']
    shown = encoder.embed_subsets(self.task.test.source, self.subsets, self.args.batch_size, objective.feature)
    logits = np.asarray(objective.head.apply({'params': head}, shown))  # [S, M, K]
    return np.array(spec.classes)[logits.argmax(axis=-1)] == np.array(self.task.classes)[self.task.test.y]

  def counts(self) -> np.ndarray:
    """How many channels each subset shows, [S]."""
    return np.array([len(s) for s in self.subsets])

  def shown(self, right: np.ndarray, which: str | int) -> np.ndarray:
    """Share of right answers for each row, [M]: with 'all' channels, with `which` of them, or with 'fewer': the mean
    over their numbers, each the mean over its subsets."""
    of = lambda n: right[self.counts() == n].mean(axis=0)
    if which == 'fewer':
      return np.mean([of(n) for n in range(1, len(self.names))], axis=0)
    return of(len(self.names) if which == 'all' else which)


def lacking(name: str, share: str) -> str:
  """The name of an arm of the third claim."""
  return f'{name}, HCS, {share} lack'


def compared(a: np.ndarray, b: np.ndarray, subjects: np.ndarray) -> dict[str, Any]:
  """Mean of a - b, shares of right answers [runs, M], with its intervals.

  A resample draws runs and, independently, subjects, the same ones for all runs (as metrics.difference_over_runs does,
  for answers that are right in part).
  """
  _, subject = np.unique(subjects, return_inverse=True)
  rows = np.bincount(subject)
  by_subject = np.stack([np.bincount(subject, weights=d) for d in a - b])  # [runs, subjects]
  drawn = next(metrics.resamples(len(rows), DRAWS, 0))
  each = drawn @ by_subject.T / (drawn @ rows)[:, None]  # [DRAWS, runs]
  runs = next(metrics.resamples(len(a), DRAWS, 1)) / len(a)
  low, high = np.percentile((each * runs).sum(axis=1), [2.5, 97.5])
  by_run = (a - b).mean(axis=1)
  return {'value': float(by_run.mean()), 'low': float(low), 'high': float(high),
          'over_seeds': interval(by_run.tolist()), 'above': int((by_run > 0).sum()), 'seeds': len(by_run),
          'reproduced': 'yes' if low > 0 else 'no' if high < 0 else 'undecided'}


def judge(study: Study, right: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
  """Every comparison of every claim; the first of a claim is the claim's own."""
  pairs: list[tuple[int, str, str, str, str | int]] = [
    (1, 'all channels, with HCS', 'ChannelViT, HCS', 'ViT, HCS', 'all'),
    (1, 'all channels, without', 'ChannelViT', 'ViT', 'all'),
    (2, 'fewer channels, ChannelViT', 'ChannelViT, HCS', 'ChannelViT', 'fewer'),
    (2, 'fewer channels, ViT', 'ViT, HCS', 'ViT', 'fewer')]
  pairs += [(2, f'{n} of {len(study.names)}, ChannelViT', 'ChannelViT, HCS', 'ChannelViT', n)
            for n in range(1, len(study.names))]
  pairs += [(3, f'{share} lack {", ".join(study.lacking)}', lacking('ChannelViT', share), lacking('ViT', share), 'all')
            for share in study.shares]
  out = []
  for claim, what, a, b, which in pairs:
    shares = [np.stack([study.shown(r, which) for r in right[arm]]) for arm in (a, b)]
    out.append({'claim': claim, 'what': what, 'a': a, 'b': b} | compared(*shares, study.task.test.subjects))
  return out


def table(study: Study, right: dict[str, list[np.ndarray]]) -> dict[str, dict[str, Any]]:
  """Accuracy of each arm by the number of test channels: mean over subsets, Student's t over seeds."""
  numbers = range(1, len(study.names) + 1)
  return {arm: {str(n): interval([float(study.shown(r, n).mean()) for r in runs]) for n in numbers}
          for arm, runs in right.items()}


def text(study: Study, accuracy: dict[str, dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
  """The tables as Markdown."""
  args, source = study.args, study.task.test.source
  kinds = sorted(set(source.distinct('source')[1]))
  numbers = [str(n) for n in range(1, len(study.names) + 1)]
  lines = [f'# ChannelViT\'s claims on {args.data}, label {args.label}', '',
           f'Images of {", ".join(kinds)}{" (synthetic, no real image)" if kinds == ["synthetic"] else ""}; channels '
           f'{", ".join(study.names)}; {len(study.task.test.y)} test images of {len(set(study.task.test.subjects))} '
           f'subjects; {args.seeds} seeds; {len(study.subsets)} of {2 ** len(study.names) - 1} subsets; accuracy, '
           f'chance {np.bincount(study.task.test.y).max() / len(study.task.test.y):.3f} (the commonest class).', '',
           '| accuracy with so many channels | ' + ' | '.join(numbers) + ' |', '|---' * (1 + len(numbers)) + '|']
  lines += [f'| {arm} | ' + ' | '.join(cell(row[n]) for n in numbers) + ' |' for arm, row in accuracy.items()]
  lines += ['', '| claim | compared | difference (seeds and subjects) | over seeds | above 0 | reproduced |',
            '|---|---|---|---|---|---|']
  signed = lambda d: f'{d["value"]:+.3f}' + ('' if d['low'] is None else f' [{d["low"]:+.3f}, {d["high"]:+.3f}]')
  lines += [f'| {d["claim"]} | {d["what"]}: {d["a"]} - {d["b"]} | {signed(d)} | {signed(d["over_seeds"])} | '
            f'{d["above"]}/{d["seeds"]} | {d["reproduced"]} |' for d in found]
  for claim in (1, 2, 3):
    first = next((d for d in found if d['claim'] == claim), None)
    if first:
      lines += ['', f'Claim {claim} ({first["what"]}), reproduced: {first["reproduced"]}, {signed(first)}.']
  lines += [f'\nNote: {note}.' for note in study.notes]
  return '\n'.join(lines) + '\n'


def draw(study: Study, accuracy: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
  """Accuracy against the number of test channels, mean and interval over seeds."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6.4, 4.0), layout='constrained')
  FigureCanvasAgg(figure)
  ax = figure.subplots()
  numbers = np.arange(1, len(study.names) + 1)
  for i, (arm, row) in enumerate(accuracy.items()):
    value, low, high = (np.array([row[str(n)][k] for n in numbers], float) for k in ('value', 'low', 'high'))
    style = dict(color=figures.COLOURS[i % len(figures.COLOURS)], linestyle='-' if arm.startswith('Channel') else '--')
    ax.errorbar(numbers + 0.03 * i, value, (value - low, high - value), label=arm, marker='o', markersize=3, capsize=2,
                **style)
  ax.set_xticks(numbers)
  ax.set_xlabel('channels of a test image')
  ax.set_ylabel('accuracy')
  ax.legend(fontsize=8)
  with files.writing(path) as part:
    figure.savefig(part, format='png', dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
  """Parses, trains what is not there yet, writes OUT/claims.md, claims.json and claims.png, prints the first."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', required=True, help='a corpus with labels and splits')
  parser.add_argument('--label', required=True, help='column of its manifest')
  parser.add_argument('--out', required=True, help='folder of all runs and of claims.md, claims.json, claims.png')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=0, help='of each run; those of the recipes by default')
  parser.add_argument('--size', choices=SIZES, default=SIZES[0], help='which variants of the recipes')
  parser.add_argument('--model-size', default='', help='another one than that of the recipes: micro, tiny, small ...')
  parser.add_argument('--lacking', default='', help='channels that records lack for claim 3, comma-separated; the last '
                      'three eighths by default')
  parser.add_argument('--shares', default='0.75', help='shares of the training records that lack them')
  parser.add_argument('--subsets', type=int, default=63, help='of channels, at most')
  parser.add_argument('--batch-size', type=int, default=64, help='of test images')
  parser.add_argument('words', nargs='*', metavar='key=value', help='config values for all runs')
  args = parser.parse_args(argv)
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  try:
    study = Study(args)
    study.out.mkdir(parents=True, exist_ok=True)
    right = {arm: [] for arm in study.arms()}
    for seed in range(args.seeds):
      for arm in right:
        right[arm].append(study.right(arm, seed))
  except Stopped as e:
    print(f'channel_claims: stopped by {e}; the same command goes on', file=sys.stderr, flush=True)
    os._exit(EXIT_STOPPED)  # a compilation may still be running in a thread that nothing can end
  accuracy, found = table(study, right), judge(study, right)
  files.write_json(study.out / 'claims.json', {
    'data': args.data, 'label': args.label, 'seeds': args.seeds, 'steps': args.steps, 'size': args.size,
    'channels': list(study.names), 'subsets': [list(s) for s in study.subsets], 'accuracy': accuracy, 'claims': found})
  draw(study, accuracy, study.out / 'claims.png')
  told = text(study, accuracy, found)
  files.write_text(study.out / 'claims.md', told)
  print(told, end='')
  return 0


if __name__ == '__main__':
  run_script(main)
