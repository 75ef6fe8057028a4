#!/usr/bin/env python3
"""Compiles the targets for TPU pods and writes docs/results/scaling.md and its figure (scaling.json keeps plans).

Needs `pip install -e '.[tpu-plan]'`; --write-only `make install` alone.

Each target takes minutes to compile; one that docs/results/scaling.json has is not compiled again, unless --again.

  python tools/plan_table.py [--only vitl] [--again] [--write-only] [--hlo FOLDER]
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed import config, files  # noqa: E402
from jaxmed.parallel import chips, sharding_table  # noqa: E402
from jaxmed.plan import plan, roofline, tables  # noqa: E402
from tools.needs import need, run_script  # noqa: E402

DOCS = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'results'
RECIPES = DOCS.parents[1] / 'experiments'
PODS = ('v5e:16x16', 'v5p:8x8x8')
IMAGENET, IMAGENET22K = 1_281_167, 14_197_122


@dataclasses.dataclass(frozen=True)
class Target:
  """A recipe, what is changed, and the images that it is planned for."""

  title: str
  recipe: str
  words: tuple[str, ...]
  channels: int
  rows: int

  def request(self, pod: str) -> plan.Request:
    """For one cluster."""
    user = config.merge(config.load_file(str(RECIPES / self.recipe)), config.parse_overrides(self.words))
    return plan.Request(user, chips.parse(pod), self.channels, self.rows)


TARGETS = {
    'vitl': Target('ViT-L/16 DINOv2', 'dinov2.py', (), 3, IMAGENET),
    'vitg': Target('ViT-g/14 DINOv2', 'dinov2.py:long', ('mesh.fsdp=8',), 3, IMAGENET22K),
    'channelvit': Target('ChannelViT-B/8 DINO, 8 channels', 'channel_vit_dino.py',
                         ('model=channel_vit_base/8', 'encoder.dtype=bfloat16', 'encoder.remat=full',
                          'encoder.attention=flash'), 8, IMAGENET),
}
FLOPS_PLAIN, FLOPS_REMAT, NETWORK, MFU = 1.10, 1.35, 1.10, 0.60


SHORT = """## Where the rest goes

What the program is made of decides more than the mesh. Each change below is one of the code, compiled before and after:

| change | run | before | after |
|---|---|---|---|
| activations pinned to the batch axes, not split over fsdp by width | ViT-g, v5p | sends 25.8 x | 2.13 x |
| global and local crops in one pass over the blocks, each weight gathered once | ViT-L, v5e | sends 2.00 x | 1.08 x |
| the same | ViT-g, v5e | (not compiled) | sends 1.20 x |
| a weight gathered in one shape for both products of the backward pass | ViT-g, v5e | sends 1.20 x | 1.04 x |
| flash attention | ChannelViT-B, v5e | MFU at most 12 %, 4.30 s of HBM traffic | 68 %, 0.71 s |

What ViT-L sends beyond the least are the gradients of the projection heads, summed in float32, and those of ViT-g the
all-reduce of the qkv kernel's gradient over fsdp, which XLA does not turn into a reduce-scatter. FLOPs beyond the
model's are rematerialisation: of whole blocks (a third of the student's forward and backward passes, which the teacher
dilutes), and with flash attention of the products of queries and keys, which its backward pass computes twice more.
"""
FORMULAS = """## Formulas

- Model FLOPs: `dot_general` and convolutions of the step's jaxpr, two for a multiplication and addition; a scan times
  its length; rematerialisation off; views and optimizer included (`jaxmed/parallel/flops.py`).
- Compiled FLOPs: dots and convolutions of the optimised HLO of one device, in fusions too, loops times their rounds,
  times the chips (`jaxmed/plan/hlo.py`).
- Bytes sent by a device: all-gather and reduce-scatter (n-1)/n of the whole, all-reduce 2 (n-1)/n, all-to-all (n-1)/n,
  permutation all of it; n devices in a group.
- Least: all-reduce of each gradient over the data axes; with fsdp an all-gather of each sharded parameter forward, one
  backward, one for the teacher, and a reduce-scatter of its gradient; all in the dtype of the products.
- Memory bound: bytes that instructions which are not fused read and write in HBM (slices and updates in place count
  their part), over the bandwidth. Compute bound: compiled FLOPs over the peak; vector work is not in it. Network bound:
  bytes sent over all links of a chip together; between slices over the data centre network.
- Step: the largest of the three, as if they overlapped perfectly. MFU: model FLOPs over chips, peak and step.
"""
ASSUMPTIONS = """Assumptions: a chip's share of the batch stays as in the table (larger clusters have larger
batches); compute at the peak rate, rematerialisation included; the least communication of the sharding, at the full
rate of all links and not hidden behind compute; v5e in slices of 256 chips joined by the data centre network, v5p in
one slice; no latency, no stragglers, no input. Real efficiency is lower. Overlap hides what the curves lose where the
network bound is below the compute bound.
"""
MEASURED = """## Weak scaling, measured on one machine

Several processes of one machine share its cores, so this shows what processes cost, not how a cluster scales: the
efficiency of N processes on fewer cores is at most cores / N, and the ratio to one process with as many devices, whose
collectives are copies in memory, should be 1.
"""
WEAK = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # chips
HEAD = """# Scaling

What a training step takes on TPU pods, planned on a CPU: `tools/plan_table.py` writes this page from plans that
`jaxmed plan` made with the real XLA:TPU compiler (`docs/results/scaling.json`). Nothing here was measured on an
accelerator.
"""


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles what is missing and writes the pages."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--only', nargs='*', choices=TARGETS, default=list(TARGETS))
  parser.add_argument('--pods', nargs='*', default=list(PODS))
  parser.add_argument('--again', action='store_true', help='compile also what docs/results/scaling.json has')
  parser.add_argument('--write-only', action='store_true', help='compile nothing')
  parser.add_argument('--hlo', type=pathlib.Path, help='a folder for the optimised programs')
  args = parser.parse_args(argv)
  if not args.write_only:
    need('tpu-plan', 'libtpu')
  place = DOCS / 'scaling.json'
  have = lambda: files.read_json(place) if place.exists() else {}
  for name, pod in [] if args.write_only else [(n, p) for n in args.only for p in args.pods]:
    key = f'{name} {pod}'
    if args.again or key not in have():
      print(key, file=sys.stderr, flush=True)
      text = args.hlo / f'{key.replace(":", "-").replace(" ", "-")}.hlo' if args.hlo else ''
      made = plan.plan(TARGETS[name].request(pod), str(text))
      files.write_json(place, have() | {key: made})
  write(have())


def write(plans: dict[str, Any]) -> None:
  """docs/results/scaling.md and its figure."""
  curves = weak_scaling()
  draw(curves)
  measured = DOCS / 'weak_scaling.md'
  parts = [HEAD, targets(plans), SHORT, chip_table(), FORMULAS, weak_text(curves), MEASURED,
           measured.read_text(encoding='utf-8') if measured.exists() else 'Not measured yet.\n']
  files.write_text(DOCS / 'scaling.md', '\n'.join(parts))


def targets(plans: dict[str, Any]) -> str:
  """The table of the targets, and a line for each that is missed."""
  lines = ['## Targets', '',
           f'Compiled FLOPs at most {FLOPS_PLAIN:.2f} x the model\'s without rematerialisation, {FLOPS_REMAT:.2f} x '
           f'with it; collective bytes at most {NETWORK:.2f} x the least that the sharding needs; bound on MFU at '
           f'least {MFU:.0%}.', '',
           '| run | cluster | mesh | batch | remat | memory of a chip | FLOPs | collectives sent | bounds: compute, '
           'memory, network | MFU at most | days at least |', '|---|---|---|---|---|---|---|---|---|---|---|']
  missed = []
  for name, target in TARGETS.items():
    for pod in PODS:
      made = plans.get(f'{name} {pod}')
      lines.append(row(target.title, pod, made))
      missed += misses(target.title, pod, made) if made else []
  return '\n'.join([*lines, '', *(missed or ['No target is missed by what was compiled.']), ''])


def row(title: str, pod: str, p: dict[str, Any] | None) -> str:
  """One line of the table."""
  if p is None:
    return f'| {title} | {pod} | not compiled yet |' + ' |' * 8
  mesh = ', '.join(f'{k} {v}' for k, v in p['mesh'].items() if v > 1)
  memory = f'{p["memory"]["peak"] / 1e9:.1f} of {p["memory"]["chip"] / 1e9:.1f} GB'
  start = f'| {title} | {pod} | {mesh} | {p["batch_size"]} | {p["remat"]} | {memory}'
  if p['how'] != 'compiled':
    return f'{start}: DOES NOT FIT |' + ' |' * 5
  s, n = p['seconds'], p['network']
  return (f'{start} | {p["flops"]["ratio"]:.3f} x | {n["moved"] / 1e9:.2f} GB = {n["moved"] / n["least"]:.2f} x | '
          f'{1e3 * s["compute"]:.0f}, {1e3 * s["memory"]:.0f}, {1e3 * s["network"]:.0f} ms | {100 * p["mfu"]:.0f} % | '
          f'{p["days"]:.2f} |')


def misses(title: str, pod: str, p: dict[str, Any]) -> list[str]:
  """What a plan misses, by how much, and where the rest goes."""
  where = f'- {title} on {pod}: '
  if p['how'] != 'compiled':
    whose = 'the compiler needs' if p['memory']['compiler'] else 'the compiler refused it; the estimate is'
    return [f'{where}does not fit: {whose} {p["memory"]["peak"] / 1e9:.1f} GB.']
  out = []
  limit = FLOPS_REMAT if p['remat'] == 'full' else FLOPS_PLAIN
  if p['flops']['ratio'] > limit:
    out.append(f'{where}compiled FLOPs are {p["flops"]["ratio"]:.3f} x the model\'s, target {limit:.2f}.')
  times = p['network']['moved'] / p['network']['least']
  if times > NETWORK:
    top = ', '.join(f'{kind} over {axes} {moved / 1e9:.2f} GB' for kind, axes, _, moved, _ in
                    tables.grouped(p['collectives'])[:4])
    out.append(f'{where}collectives send {times:.2f} x the least, target {NETWORK:.2f}: {top}.')
  if p['mfu'] < MFU:
    out.append(f'{where}MFU is at most {p["mfu"]:.0%}, target {MFU:.0%}: bound by {p["bound_by"]}.')
  return out


def chip_table() -> str:
  """What the bounds are computed from."""
  lines = ['## Chips', '', '| chip | bf16 TFLOP/s | memory | bandwidth | fast links, one way | network | source |',
           '|---|---|---|---|---|---|---|']
  lines += [f'| {c.name} | {c.flops / 1e12:.4g} | {c.memory / 1e9:.4g} GB | {c.bandwidth / 1e9:.4g} GB/s | '
            f'{c.link / 1e9:.4g} GB/s | {c.network / 1e9:.4g} GB/s | {c.source} |' for c in chips.CHIPS.values()]
  return '\n'.join([*lines, ''])


def weak_scaling() -> dict[str, list[tuple[int, float]]]:
  """Target and chip -> [(chips, share of the speed of one chip's work alone)], the batch growing with the chips."""
  curves = {}
  for target in TARGETS.values():
    jobs = [plan.prepare(target.request(pod)) for pod in PODS]
    traced = plan.trace(jobs[0].config, jobs[0].spec)  # the same on every cluster
    for job in jobs:
      curves[f'{target.title}, {job.cluster.chip.name}'] = [
          (n, share(job, traced, n)) for n in WEAK if n >= job.mesh['fsdp']]
  return curves


def share(job: plan.Job, traced: plan.Traced, count: int) -> float:
  """Compute time over the time of a step whose least communication is not hidden behind it."""
  whole = {'v5e': 256, 'v5p': 6144}[job.cluster.chip.name]
  slices = max(count // whole, 1)
  mesh = job.mesh | {'data': count // job.mesh['fsdp']}
  cluster = dataclasses.replace(job.cluster, chips=count, slices=slices)
  needed = roofline.least(sharding_table.on_mesh(traced.boxed, mesh), mesh, job.item, gathered=job.gathered)
  compute = traced.executed / job.cluster.chips / cluster.chip.flops
  return compute / (compute + roofline.network_seconds(needed, mesh, cluster))


def draw(curves: dict[str, list[tuple[int, float]]]) -> None:
  """docs/results/scaling.png."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
  for (label, points), dashes in zip(curves.items(), ['-', '--'] * len(curves), strict=False):
    axes.plot(*zip(*points, strict=True), dashes, marker='o', markersize=3, label=label)
  axes.set(xscale='log', xlabel='chips', ylabel='efficiency (modelled)', ylim=(0, 1.02), xticks=WEAK,
           title='Weak scaling, modelled: batch per chip fixed, no overlap of network and compute')
  axes.set_xticks(WEAK, [str(n) for n in WEAK])
  axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc='lower left')
  with files.writing(DOCS / 'scaling.png') as part:
    figure.savefig(part, format='png', dpi=130)
  plt.close(figure)


def weak_text(curves: dict[str, list[tuple[int, float]]]) -> str:
  """The figure with its numbers and assumptions."""
  lines = ['## Weak scaling, modelled', '', '![Efficiency by number of chips](scaling.png)', '',
           '| | ' + ' | '.join(map(str, WEAK)) + ' |', '|---|' + '---|' * len(WEAK)]
  for label, points in curves.items():
    have = dict(points)
    lines.append(f'| {label} | ' + ' | '.join(f'{have[n]:.3f}' if n in have else '' for n in WEAK) + ' |')
  return '\n'.join([*lines, '', ASSUMPTIONS])


if __name__ == '__main__':
  run_script(main)
