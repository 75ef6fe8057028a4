"""How long `jaxmed train` takes to its first step and from its last one to the end.

  python tools/bench_start.py --rounds 3
  python tools/bench_start.py --rounds 3 --also /path/to/another/checkout

Prepares the demo corpus in a temporary folder, then trains experiments/demo.py for a few steps, a fresh process each
time, in turn: with an empty cache of compiled programs (cold) and with the one that the cold start filled (warm). Of
--also, another version of this repository, the same. Prints medians of the seconds from the command to the banner, to
the first step (the first row of metrics.jsonl that has a loss, log_every=1), and from the last step to the end; --json
prints all numbers. The machine must be idle: an hour of other work on the same cores makes these numbers mean nothing.

Needs `make install` alone.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jaxmed.errors import UserError  # noqa: E402
from tools.needs import need, run_script  # noqa: E402

PARTS, KINDS = ('banner', 'first step', 'end'), ('cold', 'warm')


def start(tree: pathlib.Path, corpus: pathlib.Path, run: pathlib.Path, cache: pathlib.Path, steps: int,
          values: Sequence[str] = ()) -> list[float]:
  """Seconds of the PARTS of one command."""
  shutil.rmtree(run, ignore_errors=True)
  env = os.environ | {'PYTHONPATH': str(tree), 'JAXMED_CACHE': str(cache)}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  words = ['-m', 'jaxmed', 'train', str(tree / 'experiments' / 'demo.py'), '--data', str(corpus), '--out', str(run),
           f'steps={steps}', 'log_every=1', *values]
  begun = time.monotonic()
  process = subprocess.Popen([sys.executable, *words], env=env, cwd=run.parent, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
  seen: dict[str, float] = {}
  while process.poll() is None:
    look(run, steps, seen, time.monotonic() - begun)
    time.sleep(0.02)
  ended = time.monotonic() - begun
  look(run, steps, seen, ended)
  if process.returncode or len(seen) < 3:
    raise UserError(f'{" ".join(words)} of {tree} ended with {process.returncode}')
  return [seen['banner'], seen['first'], ended - seen['last']]


def look(run: pathlib.Path, steps: int, seen: dict[str, float], now: float) -> None:
  """Notes when the banner, the first and the last step come; layout.txt is written with the banner."""
  if (run / 'layout.txt').exists():
    seen.setdefault('banner', now)
  path = run / 'metrics.jsonl'
  rows = [r for r in path.read_text().splitlines() if '"loss"' in r] if path.exists() else []
  if rows:
    seen.setdefault('first', now)
  if any(r.startswith(f'{{"step": {steps},') for r in rows):
    seen.setdefault('last', now)


def prepared(out: pathlib.Path) -> pathlib.Path:
  """The demo corpus."""
  need('demo', 'nilearn', 'skimage', 'mahotas')
  subprocess.run([sys.executable, '-m', 'jaxmed', 'prepare', 'demo', '--out', str(out)], check=True,
                 env=os.environ | {'PYTHONPATH': str(ROOT)}, cwd=out.parent, stdout=subprocess.DEVNULL)
  return out


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('words', nargs='*', metavar='key=value', help='config values for all runs')
  parser.add_argument('--data', type=pathlib.Path, help='a corpus; without it the demo corpus is prepared')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--cold', action='store_true', help='cold starts alone')
  parser.add_argument('--also', type=pathlib.Path, help='another checkout to compare with')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args(argv)
  trees = [ROOT, *([args.also.absolute()] if args.also else [])]
  found: dict[str, list[list[float]]] = {}
  with tempfile.TemporaryDirectory(prefix='bench-start-') as folder:
    place = pathlib.Path(folder)
    corpus = args.data.absolute() if args.data else prepared(place / 'corpus')
    for _ in range(args.rounds):
      for tree in trees:
        shutil.rmtree(place / 'cache', ignore_errors=True)
        for kind in KINDS[:1] if args.cold else KINDS:
          took = start(tree, corpus, place / 'run', place / 'cache', args.steps, args.words)
          found.setdefault(f'{tree.name} {kind}', []).append(took)
  if args.json:
    print(json.dumps(found))
    return
  for name, rows in found.items():
    medians = [statistics.median(part) for part in zip(*rows, strict=True)]
    print(name, ', '.join(f'{part} {seconds:.1f} s' for part, seconds in zip(PARTS, medians, strict=True)))


if __name__ == '__main__':
  run_script(main)
