#!/usr/bin/env python3
"""What several processes cost on one machine: the same work by 1, 2 and 4 processes, and by one with as many devices.

Weak scaling: each device has the same share of the batch, so N devices do N times the work of one. On the cores of one
machine this takes N times as long at least (once they are all busy), so the efficiency here, N * time(1) / time(N),
shows overheads alone, as does the ratio of N processes to one process with N simulated devices, whose collectives are
copies in memory. Each pair of runs alternates; the figure of a run is its median step, the first steps left out.

Needs `make install` alone.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/weak_scaling.py --data runs/demo/corpus --out docs/results/weak_scaling.md
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed import files  # noqa: E402
from jaxmed.errors import UserError  # noqa: E402
from tools.needs import measured_on, run_script  # noqa: E402

FIRST = 5  # steps that are left out
CONFIG = ('model=channel_vit_micro/16', 'method=mae', 'image_size=96', 'log_every=1', 'loader.threads=1',
          'evaluators=health')


def step_seconds(data: str, folder: pathlib.Path, processes: int, devices: int, batch: int, steps: int) -> float:
  """Median seconds of a step of a run of so many processes, with so many devices in all."""
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices // processes}'
  words = [*CONFIG, f'batch_size={batch * devices}', f'steps={steps}', f'checkpoint_every={steps}']
  command = [sys.executable, '-m', 'jaxmed', *(['launch', 'local', '--processes', str(processes)] if processes > 1 else
                                               ['train']), *words, '--data', data, '--out', str(folder)]
  done = subprocess.run(command, env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}, capture_output=True,
                        text=True)
  if done.returncode:
    raise UserError(done.stderr[-2000:])
  rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  times = [batch * devices / r['images_per_second'] for r in rows if 'images_per_second' in r]
  return float(np.median(times[FIRST:]))


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints a Markdown table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', required=True, help='the demo corpus')
  parser.add_argument('--counts', default='1,2,4', help='of processes; the first is 1')
  parser.add_argument('--batch', type=int, default=8, help='images of a device')
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', type=pathlib.Path, help='a Markdown file for the table')
  args = parser.parse_args(argv)
  counts = [int(n) for n in args.counts.split(',')]
  if counts[0] != 1 or args.steps <= FIRST:
    parser.error(f'--counts begins with 1, and --steps is above {FIRST}')
  seen: dict[tuple[int, int], list[float]] = {}
  with tempfile.TemporaryDirectory() as place:
    for turn in range(args.rounds):
      for devices in counts:
        for processes in dict.fromkeys((devices, 1)):
          folder = pathlib.Path(place) / f'{turn}-{devices}-{processes}'
          seconds = step_seconds(args.data, folder, processes, devices, args.batch, args.steps)
          seen.setdefault((devices, processes), []).append(seconds)
          print(f'{devices} devices, {processes} processes: {seconds:.3f} s', file=sys.stderr, flush=True)
  lines = [f'`tools/weak_scaling.py` on {os.cpu_count()} cores ({measured_on()}), {args.batch} images a device, '
           f'medians of {args.rounds} rounds:', '',
           '| processes | step, s | one process with as many devices, s | ratio | efficiency |',
           '|---|---|---|---|---|']
  for n in counts:
    many, one = (np.array(seen[n, p]) for p in (n, 1))
    ratio, efficiency = np.median(many / one), np.median(n * np.array(seen[1, 1]) / many)
    lines.append(f'| {n} | {np.median(many):.3f} | {np.median(one):.3f} | {ratio:.2f} | {efficiency:.2f} |')
  print('\n'.join(lines))
  if args.out:
    files.write_text(args.out, '\n'.join(lines) + '\n')


if __name__ == '__main__':
  run_script(main)
