#!/usr/bin/env python3
"""What a training step costs against the number of channels, for each kind of attention over channel tokens.

For C channels prints operations (from the jaxpr), scratch memory (of the compiled program) and seconds of a supervised
step of ChannelViT-Ti/16, and the same step of a PyTorch ChannelViT with joint attention on the same cores; the kinds
and PyTorch take turns, each in a process of its own, and times are medians. With --plot also a picture. With --json
what was measured before is not measured again.

With --seeds also the accuracy of each kind: of a ChannelViT of patch 24 and two blocks of width 64, trained with labels
on synthetic images whose two classes lie in the interaction of channels (data/prepare/synthetic.py, with C channels;
chance is 0.5, and one channel says nothing), on held-out ones; mean over seeds and Student's t interval. All kinds of a
seed see the same images in the same order.

Needs `make install`; PyTorch's row `pip install -e '.[parity]'` (--no-torch goes without).

Example:
  python tools/bench_channels.py --channels 1,2,4,8,16,32 --rounds 5 --seeds 3 --plot channels.png
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.data.prepare import synthetic  # noqa: E402
from jaxmed.errors import choose  # noqa: E402
from jaxmed.models.layers.channel_attention import KINDS  # noqa: E402
from jaxmed.study.compare import cell, interval  # noqa: E402
from tools.bench_step import Case, Worker, jax_program  # noqa: E402
from tools.needs import need, run_script  # noqa: E402

TORCH = 'PyTorch joint'
FORMS = {'gflops': '.1f', 'scratch_mb': '.0f', 'seconds': '.3f'}
IMAGES, HELD_OUT, BATCH, RATE = 4000, 1000, 32, 1e-3  # of the runs for accuracy


def case_of(kind: str, channels: int, size: int, batch: int) -> Case:
  """A step of that many channels."""
  return Case('channel_vit_tiny/16', 192, 3, batch, channels, size=size, attention=kind)


def described(case: Case) -> dict[str, float]:
  """Operations of the model of a step, and bytes of scratch memory."""
  import jax

  from jaxmed.parallel import flops
  trainer, step, state, batch = jax_program(case)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
  memory = step.memory_analysis()
  return {'gflops': flops.count(trainer.step, *abstract) / 1e9, 'scratch_mb': memory.temp_size_in_bytes / 2**20}


def measure(channels: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
  """{kind: gflops, scratch_mb, seconds} at one number of channels."""
  kinds = [k for k in args.kinds if channels * (args.size // 16) ** 2 <= args.most or k != 'joint']
  out: dict[str, dict[str, Any]] = {k: described(case_of(k, channels, args.size, args.batch)) for k in kinds}
  sides = {k: Worker('jax', args.threads, False) for k in kinds}
  if 'joint' in kinds and not args.no_torch:
    sides[TORCH] = Worker('torch', args.threads, False)
    out[TORCH] = {}
  for kind, side in sides.items():
    side.ask('load', json.dumps(dataclasses.asdict(case_of('joint' if kind == TORCH else kind, channels, args.size,
                                                           args.batch))))
  times: dict[str, list[float]] = {k: [] for k in sides}
  for _ in range(args.rounds):
    for kind, side in sides.items():
      times[kind] += side.ask('run', args.steps)
  for kind, side in sides.items():
    out[kind]['seconds'] = statistics.median(times[kind])
    side.close()
  return out


def images(channels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Synthetic images [N, H, W, C] uint8 and their classes [N]; the letters of the channels take turns."""
  letter = -(-channels // 2)
  order = [c // 2 + letter * (c % 2) for c in range(channels)]
  out, label = [], np.arange(IMAGES + HELD_OUT, dtype=np.int32) % 2
  for i, which in enumerate(label):
    rng = np.random.default_rng((seed, i))
    gain, offset = rng.uniform(0.8, 1.2, channels), rng.uniform(16, 40, channels)
    pixels = synthetic.image(synthetic.RELATIONS[which], rng, letter)[..., order] * 90 * gain + offset
    out.append(pixels.round().clip(0, 255).astype(np.uint8))
  return np.stack(out), label


def accuracies(channels: int, args: argparse.Namespace) -> dict[str, list[float]]:
  """{kind: share of held-out images that a run of each seed gets right}."""
  out: dict[str, list[float]] = {kind: [] for kind in args.kinds}
  for seed in range(args.seeds):
    data = images(channels, seed)
    for kind in args.kinds:
      out[kind].append(accuracy(kind, *data, seed, args.train_steps))
      print(f'{channels} channels, {kind}, seed {seed}: {out[kind][-1]:.3f}', file=sys.stderr, flush=True)
  return out


def accuracy(kind: str, image: np.ndarray, label: np.ndarray, seed: int, steps: int) -> float:
  """Trains one model on the first IMAGES images and judges it on the rest."""
  import jax

  from jaxmed.augment.views import ViewMaker
  from jaxmed.models import create_model
  from jaxmed.objectives import Supervised
  from jaxmed.parallel import mesh as mesh_lib
  from jaxmed.train.optimizer import Optimizer
  from jaxmed.train.step import Trainer

  channels, mesh = image.shape[-1], mesh_lib.make_mesh({'data': 0})
  ids = np.broadcast_to(np.arange(channels, dtype=np.int32), (BATCH, channels))
  part = lambda rows: {'image': image[rows], 'channels': ids, 'label': label[rows]}
  mean, std = ((float(value),) * channels for value in (image[:IMAGES].mean(), image[:IMAGES].std()))
  view = ViewMaker(image.shape[1:3], mean, std, scale=(1.0, 1.0), flip=(0.0, 0.0), brightness=0.1, contrast=0.1)
  small = dict(embed_dim=64, depth=2, num_heads=2)
  model = create_model('channel_vit_micro/24', image.shape[1:3], channels, channel_attention=kind, **small)
  objective = Supervised(model, num_classes=2, label_smoothing=0.0)
  trainer = Trainer(objective, Optimizer(RATE, steps, warmup_steps=steps // 10), view, seed)
  held = np.arange(IMAGES, IMAGES + HELD_OUT // BATCH * BATCH).reshape(-1, BATCH)
  abstract = trainer.abstract(part(held[0]), mesh)
  step, state = trainer.compile(abstract, part(held[0]), mesh), trainer.initialize(abstract, part(held[0]))
  rng = np.random.default_rng((seed, channels))
  for _ in range(steps):
    state, _ = step(state, part(rng.integers(IMAGES, size=BATCH)))

  @jax.jit
  def judge(variables, batch):
    return objective.loss(variables, view.plain(batch), jax.random.key(0), 0, train=False)[1][0]['accuracy']

  return float(np.mean([judge(state.variables(), part(rows)) for rows in held]))


def rows(found: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
  """A Markdown table."""
  lines = ['| channels | attention | GFLOP | scratch, MB | step, s | joint / this | accuracy |',
           '|---|---|---|---|---|---|---|']
  for channels, kinds in found.items():
    joint = kinds.get('joint', {}).get('seconds')
    for kind, one in kinds.items():
      shown = [format(one[key], form) if key in one else '-' for key, form in FORMS.items()]
      ratio = f'{joint / one["seconds"]:.2f}' if joint and 'seconds' in one else '-'
      right = cell(interval(one['accuracy'])) if one.get('accuracy') else '-'
      lines.append(f'| {channels} | {kind} | {" | ".join(shown)} | {ratio} | {right} |')
  return lines


def plot(found: dict[int, dict[str, dict[str, Any]]], path: str) -> None:
  """Seconds, operations, memory and accuracy against channels."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout='constrained')
  labels = {'seconds': 'step, s', 'gflops': 'GFLOP a step', 'scratch_mb': 'scratch, MB', 'accuracy': 'accuracy'}
  for ax, (key, label) in zip(axes.flat, labels.items()):
    for kind in dict.fromkeys(k for cells in found.values() for k in cells):
      x = [c for c, cells in found.items() if cells.get(kind, {}).get(key)]
      if x:
        ax.plot(x, [np.mean(found[c][kind][key]) for c in x], marker='o', markersize=3, label=kind)
    ax.set(xscale='log', yscale='linear' if key == 'accuracy' else 'log', xlabel='channels', title=label)
    ax.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--channels', default='1,2,4,8,16,32')
  parser.add_argument('--kinds', default=','.join(KINDS), help='of attention')
  parser.add_argument('--size', type=int, default=96, help='pixels along a side')
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='of a turn')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--most', type=int, default=4096, help='tokens up to which joint attention is tried')
  parser.add_argument('--seeds', type=int, default=0, help='runs for the accuracy of each kind')
  parser.add_argument('--train-steps', type=int, default=300, help='of such a run')
  parser.add_argument('--no-torch', action='store_true')
  parser.add_argument('--plot', metavar='FILE.png')
  parser.add_argument('--json', metavar='FILE', help='keep what was measured here, and go on with what is missing')
  args = parser.parse_args(argv)
  args.kinds = [choose('kind of attention', kind, KINDS) for kind in args.kinds.split(',')]
  if not args.no_torch:
    need('parity', 'torch', 'timm')
  place = pathlib.Path(args.json) if args.json else None
  found = {int(k): v for k, v in json.loads(place.read_text()).items()} if place and place.exists() else {}
  for channels in map(int, args.channels.split(',')):
    if channels not in found:
      found[channels] = measure(channels, args)
    if args.seeds and not all('accuracy' in found[channels].get(kind, {}) for kind in args.kinds):
      for kind, right in accuracies(channels, args).items():
        found[channels].setdefault(kind, {})['accuracy'] = right
    print('\n'.join(rows({channels: found[channels]})[2:]), file=sys.stderr, flush=True)
    if place:
      place.write_text(json.dumps(found, indent=2))
  found = dict(sorted(found.items()))
  print('\n'.join(rows(found)))
  if args.plot:
    plot(found, args.plot)


if __name__ == '__main__':
  run_script(main)
