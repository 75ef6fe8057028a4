#!/usr/bin/env python3
"""What a training step costs against the number of channels, for each kind of attention over channel tokens.

For C channels prints operations (from the jaxpr), scratch memory (of the compiled program) and seconds of a supervised
step of ChannelViT-Ti/16, and the same step of a PyTorch ChannelViT with joint attention on the same cores; the kinds
and PyTorch take turns, each in a process of its own, and times are medians. With --plot also a picture. With --json
what was measured before is not measured again.

Example:
  python tools/bench_channels.py --channels 1,2,4,8,16,32 --rounds 5 --plot channels.png
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.models.channel_attention import KINDS  # noqa: E402
from tools.bench_step import Case, Worker, jax_program  # noqa: E402

TORCH = 'PyTorch joint'
FORMS = {'gflops': '.1f', 'scratch_mb': '.0f', 'seconds': '.3f'}


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
  kinds = [k for k in KINDS if channels * (args.size // 16) ** 2 <= args.most or k != 'joint']
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


def rows(found: dict[int, dict[str, dict[str, float]]]) -> list[str]:
  """A Markdown table."""
  lines = ['| channels | attention | GFLOP | scratch, MB | step, s | joint / this |', '|---|---|---|---|---|---|']
  for channels, kinds in found.items():
    joint = kinds.get('joint', {}).get('seconds')
    for kind, cell in kinds.items():
      shown = [format(cell[key], form) if key in cell else '-' for key, form in FORMS.items()]
      ratio = f'{joint / cell["seconds"]:.2f}' if joint else '-'
      lines.append(f'| {channels} | {kind} | {" | ".join(shown)} | {ratio} |')
  return lines


def plot(found: dict[int, dict[str, dict[str, float]]], path: str) -> None:
  """Seconds, operations and memory against channels."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout='constrained')
  for ax, key, label in zip(axes, ('seconds', 'gflops', 'scratch_mb'), ('step, s', 'GFLOP a step', 'scratch, MB')):
    for kind in dict.fromkeys(k for cells in found.values() for k in cells):
      x = [c for c, cells in found.items() if key in cells.get(kind, {})]
      if x:
        ax.plot(x, [found[c][kind][key] for c in x], marker='o', markersize=3, label=kind)
    ax.set(xscale='log', yscale='log', xlabel='channels', title=label)
    ax.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=120)


def main() -> None:
  """Measures, prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--channels', default='1,2,4,8,16,32')
  parser.add_argument('--size', type=int, default=96, help='pixels along a side')
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='of a turn')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--most', type=int, default=4096, help='tokens up to which joint attention is tried')
  parser.add_argument('--no-torch', action='store_true')
  parser.add_argument('--plot', metavar='FILE.png')
  parser.add_argument('--json', metavar='FILE', help='keep what was measured here, and go on with what is missing')
  args = parser.parse_args()
  place = pathlib.Path(args.json) if args.json else None
  found = {int(k): v for k, v in json.loads(place.read_text()).items()} if place and place.exists() else {}
  for channels in map(int, args.channels.split(',')):
    if channels in found:
      continue
    found[channels] = measure(channels, args)
    print('\n'.join(rows({channels: found[channels]})[2:]), file=sys.stderr, flush=True)
    if place:
      place.write_text(json.dumps(found, indent=2))
  found = dict(sorted(found.items()))
  print('\n'.join(rows(found)))
  if args.plot:
    plot(found, args.plot)


if __name__ == '__main__':
  main()
