"""How often 95 % intervals of a scaling law hold the truth, and how often noise is called undecided, on simulations.

Each simulation draws a grid of runs from a known law with noise on log loss, and fits it as `jaxmed study fit` does. A
line is a grid: widths x sizes x seeds, the noise (Gaussian, or Student's t of 3 degrees with a `t`), then of 100
simulations how many hold each number, how many are called a law, and of how many tables of mere noise.

Needs `make install` alone.

Example:
  python tools/law_coverage.py --grids laptop:4x4x2:0.01,chinchilla:8x8x1:0.005 --simulations 100
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxmed import files  # noqa: E402
from jaxmed.errors import UserError, choose  # noqa: E402
from jaxmed.study import law_intervals, laws  # noqa: E402
from jaxmed.study.laws import Design, Law  # noqa: E402
from tools.needs import measured_on, run_script  # noqa: E402

NAMES = ('E', 'A', 'B', 'alpha', 'beta')
GRIDS = 'laptop:4x4x1:0.01,laptop:4x4x2:0.01,laptop:4x4x2:0.01t,laptop:6x6x1:0.03,chinchilla:6x6x1:0.005'
# A law, and the ends of parameters and samples: what a study on a laptop shows, and that of Besiroglu et al. 2024.
LAWS = {'laptop': (Law(0.30, (12.0, 25.0), (0.35, 0.40)), (1e5, 1e7), (1e4, 1e6)),
        'chinchilla': (Law(1.8172, (477.9, 2142.6), (0.3473, 0.3672)), (5e7, 1e10), (1e9, 2e11))}


def simulated(grid: str, rng: np.random.Generator) -> tuple[Law, Design, np.ndarray, np.ndarray, np.ndarray]:
  """The law, the design, y and y of noise alone, and the cells of a grid such as laptop:4x4x2:0.01."""
  name, shape, noise = grid.split(':')
  law, params, samples = LAWS[choose('law', name, LAWS)]
  widths, sizes, seeds = (int(n) for n in shape.split('x'))
  n, d = np.meshgrid(np.geomspace(*params, widths), np.geomspace(*samples, sizes), indexing='ij')
  x = np.repeat(np.stack([n.ravel(), d.ravel()], axis=1), seeds, axis=0)
  draw = (lambda: rng.standard_t(3, len(x))) if noise.endswith('t') else (lambda: rng.standard_normal(len(x)))
  size = float(noise.rstrip('t'))
  y = law.predict(x) * np.exp(size * draw())
  return law, Design(x), y, np.exp(size * draw()), np.repeat(np.arange(widths * sizes), seeds)


def covered(grid: str, simulations: int, draws: int, seed: int) -> dict[str, Any]:
  """Counts over the simulations of a grid."""
  held, decided, noise, width = np.zeros(5, int), 0, 0, []
  for i in range(simulations):
    law, design, y, nothing, cells = simulated(grid, np.random.default_rng((seed, i)))
    numbers = law_intervals.bootstrap(design, y, laws.fit(design, y), cells, draws, seed)
    low, high = np.percentile(numbers, [2.5, 97.5], axis=0)
    truth = np.array([law.E, *law.A, *law.alpha])
    held += (low <= truth) & (truth <= high)
    width.append(high / low)
    decided += max(law_intervals.chances(design, y, ('params', 'samples'), 199).values()) <= law_intervals.LEVEL
    noise += law_intervals.chance(design, nothing, permutations=199) > law_intervals.LEVEL
  return {'grid': grid, 'simulations': simulations, **dict(zip(NAMES, held.tolist(), strict=True)), 'law': int(decided),
          'noise undecided': int(noise), 'high over low': np.median(width, axis=0).round(2).tolist()}


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the table and writes it."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--grids', default=GRIDS, help=f'comma-separated; default {GRIDS}')
  p.add_argument('--simulations', type=int, default=100)
  p.add_argument('--draws', type=int, default=400, help='of the bootstrap; default 400')
  p.add_argument('--seed', type=int, default=0)
  p.add_argument('--out', help='file for the counts, as JSON')
  args = p.parse_args(argv)
  if min(args.simulations, args.draws) < 1:
    raise UserError('--simulations and --draws expect at least 1')
  head = ('grid', *NAMES, 'law', 'noise undecided', 'high over low')
  print(f'{args.simulations} simulations a grid; {measured_on()}\n')
  print('| ' + ' | '.join(head) + ' |\n' + '|---' * len(head) + '|', flush=True)
  rows = []
  for grid in args.grids.split(','):
    rows.append(covered(grid, args.simulations, args.draws, args.seed))
    print('| ' + ' | '.join(str(rows[-1][key]) for key in head) + ' |', flush=True)
  if args.out:
    files.write_json(args.out, rows)


if __name__ == '__main__':
  run_script(main)
