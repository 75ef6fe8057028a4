"""Time and peak memory of finding near-duplicates against the number of images, on synthetic hashes or features.

Hashes are those of volumes of 50 slices: each slice turns about three bits of the one before it, a quarter of the bits
hardly vary from volume to volume (as where images have a dark border), and one volume in twenty is there twice.
Features lie in groups of about 20 around common centres, a tenth of them are copies. What is timed is `near_duplicates`
of jaxmed.data.curate, which for hashes keeps exactly what comparing all pairs would keep; with --check that is done
for the first rows. Each size runs in a process of its own; its peak is that process's, with Python and NumPy.

Needs `make install` alone.

Example:
  python tools/bench_curate.py --large
  python tools/bench_curate.py --kind features --sizes 100000
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.data.curate import features, hashes  # noqa: E402
from tools.needs import run_script  # noqa: E402

SLICES = 50


def synthetic_hashes(count: int, seed: int = 0) -> np.ndarray:
  """uint64 [count], volume after volume."""
  rng = np.random.default_rng(seed)
  volumes = -(-count // SLICES)
  chance = np.where(np.arange(64) < 16, 0.03, rng.uniform(0.3, 0.7, 64))
  steps = np.zeros((volumes, SLICES), np.uint64)
  for bit in rng.permutation(64):
    steps[:, 0] |= (rng.random(volumes) < chance[bit]).astype(np.uint64) << np.uint64(bit)
    steps[:, 1:] |= (rng.random((volumes, SLICES - 1)) < 3 / 64).astype(np.uint64) << np.uint64(bit)
  out = np.bitwise_xor.accumulate(steps, axis=1)
  again = rng.random(volumes) < 0.05
  out[again] = out[rng.integers(0, volumes, int(again.sum()))]
  return out.reshape(-1)[:count]


def synthetic_features(count: int, width: int, seed: int = 0) -> np.ndarray:
  """float32 [count, width] of length 1."""
  rng = np.random.default_rng(seed)
  x = np.empty((count, width), np.float32)
  centres = rng.normal(size=(max(count // 20, 1), width)).astype(np.float32)
  for start in range(0, count, 1 << 16):
    part = x[start:start + (1 << 16)]
    part[:] = centres[rng.integers(0, len(centres), len(part))] + 0.5 * rng.normal(size=part.shape)
  copies = np.flatnonzero(rng.random(count) < 0.1)
  x[copies] = x[rng.integers(0, count, len(copies))] + 0.01 * rng.normal(size=(len(copies), width))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  return x


def peak() -> float:
  """MB of this process so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(kind: str, count: int, width: int, check: int) -> dict:
  """Measures one size."""
  x = synthetic_hashes(count) if kind == 'hashes' else synthetic_features(count, width)
  before, begin = peak(), time.perf_counter()
  like = hashes.near_duplicates(x) if kind == 'hashes' else features.near_duplicates(x, 0.98)
  out = {'kind': kind, 'images': count, 'kept': int((like < 0).sum()), 'seconds': round(time.perf_counter() - begin, 2),
         'data_mb': round(x.nbytes / 1e6, 1), 'before_mb': round(before), 'peak_mb': round(peak())}
  if check and kind == 'hashes':
    kept: list[int] = []
    for i in range(min(check, count)):
      if not (np.bitwise_count(x[kept] ^ x[i]) <= hashes.RADIUS).any():
        kept.append(i)
    out['checked'] = bool(np.array_equal(np.flatnonzero(like[:check] < 0), kept))
  return out


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, runs each size in a process, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kind', choices=('hashes', 'features'), default='hashes')
  parser.add_argument('--sizes', default='100000,1000000', help='numbers of images')
  parser.add_argument('--large', action='store_true', help='ten million as well')
  parser.add_argument('--width', type=int, default=64, help='of features')
  parser.add_argument('--check', type=int, default=0, help='compare so many first rows with what comparing all keeps')
  parser.add_argument('--one', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.one:
    print(json.dumps(one(args.kind, args.one, args.width, args.check)))
    return
  sizes = [int(n) for n in args.sizes.split(',')] + ([10_000_000] if args.large else [])
  print(f'{args.kind:>10} {"kept":>10} {"seconds":>9} {"us/image":>9} {"peak MB":>9} {"before, MB":>11} {"checked":>8}')
  for count in sizes:
    words = ['--kind', args.kind, '--one', count, '--width', args.width, '--check', args.check]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, capture_output=True, text=True)
    r = json.loads(done.stdout)
    print(f'{count:>10} {r["kept"]:>10} {r["seconds"]:>9.2f} {r["seconds"] / count * 1e6:>9.2f} {r["peak_mb"]:>9} '
          f'{r["before_mb"]:>11} {str(r.get("checked", "")):>8}', flush=True)


if __name__ == '__main__':
  run_script(main)
