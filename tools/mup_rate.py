"""Where the best learning rate lies at several widths, by muP and by the standard rules; prints a Markdown table.

Trains one method on the first batches of a corpus, the same ones in the same order for every cell, at each width, rate
and seed. A cell's number is the mean loss of the last fifth of its steps. Heads are 32 wide, so that their number
grows; the narrowest width is the base of muP, where both rules are one. The optimum of a width is the vertex of a
parabola through the three points around the best rate, in the logarithm of the rate; "at the edge" where the best is
the first or the last. The last line of each rule is the slope of that optimum over the width, in octaves of the rate an
octave of the width: 0 where it stays put.

One program serves all rates of a width, as the state has a factor on the rate.

Needs `make install` alone.

Example:
  jaxmed prepare demo --out runs/demo/corpus
  python tools/mup_rate.py --data runs/demo/corpus --json mup.json
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed import config as config_lib  # noqa: E402
from jaxmed import files  # noqa: E402
from jaxmed.errors import UserError  # noqa: E402
from tools.needs import measured_on, run_script  # noqa: E402

HEAD = 32
SCALINGS = ('mup', 'standard')
FIXED = {'image_size': 32, 'encoder': {'depth': 2}, 'objective': {'decoder_depth': 1}}


def cells(user: dict[str, Any], width: int, rates: Sequence[float], seeds: int, batches: list[Any],
          spec: Any) -> np.ndarray:
  """Losses [seeds, rates] of one width, nan where a training diverged."""
  import jax
  import jax.numpy as jnp

  from jaxmed.parallel import mesh as mesh_lib
  from jaxmed.train.build import assemble, resolve

  own = {'learning_rate': max(rates), 'encoder': {'embed_dim': width, 'num_heads': width // HEAD}}
  config = resolve.resolve(config_lib.merge(user, own), spec)
  trainer, mesh = assemble.build(config, spec), mesh_lib.make_mesh({'data': 0})
  shapes = assemble.batch_shapes(config, spec, mesh)
  abstract = trainer.abstract(shapes, mesh)
  step = trainer.compile(abstract, shapes, mesh)
  out = np.empty((seeds, len(rates)))
  for seed in range(seeds):
    first = dataclasses.replace(trainer, seed=seed).initialize(abstract, shapes)
    for i, rate in enumerate(rates):
      state = dataclasses.replace(jax.tree.map(jnp.copy, first), rate=jnp.float32(rate / max(rates)))
      losses = []
      for batch in batches:
        state, metrics = step(state, mesh_lib.put_batch(batch, mesh))
        losses.append(metrics['loss'])
      kept = np.asarray(losses[-max(len(losses) // 5, 1):], np.float64)
      out[seed, i] = kept.mean() if np.isfinite(kept).all() and not int(state.skipped) else np.nan
  return out


def optimum(rates: Sequence[float], losses: np.ndarray) -> float | None:
  """The rate at the vertex of a parabola through the best point and its neighbours; None at an edge.

  Args:
    rates: rising, with equal ratios. losses: [R], nan for none.
  """
  best = int(np.nanargmin(losses))
  if not 0 < best < len(losses) - 1 or np.isnan(losses[best - 1:best + 2]).any():
    return None
  a, b, c = losses[best - 1:best + 2]
  shift = 0.5 * (a - c) / (a - 2 * b + c) if a - 2 * b + c > 0 else 0.0
  return float(rates[best] * (rates[best + 1] / rates[best]) ** shift)


def slope(found: dict[int, float | None]) -> float | None:
  """Octaves of the optimum an octave of the width, over the widths that have one; None for fewer than two."""
  known = {w: rate for w, rate in found.items() if rate}
  if len(known) < 2:
    return None
  return float(np.polyfit(np.log2(list(known)), np.log2(list(known.values())), 1)[0])


def lines_of(scaling: str, rates: Sequence[float], losses: dict[int, np.ndarray]) -> list[str]:
  """Rows of a Markdown table of one rule; the best rate of each width is bold."""
  out, found = [], {}
  for width, each in losses.items():
    mean = each.mean(axis=0)
    best, found[width] = int(np.nanargmin(mean)), optimum(rates, mean)
    shown = ['diverged' if np.isnan(x) else f'**{x:.4f}**' if i == best else f'{x:.4f}' for i, x in enumerate(mean)]
    where = f'{found[width]:.2g}' if found[width] else 'at the edge'
    out.append(f'| {scaling} | {width} | {" | ".join(shown)} | {where} |')
  moves = slope(found)
  return [*out, f'| {scaling} | slope |{" |" * len(rates)} {"-" if moves is None else f"{moves:+.2f}"} |']


def main(argv: Sequence[str] | None = None) -> None:
  """Parses, trains, prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('words', nargs='*', metavar='key=value', help='config values for all cells')
  parser.add_argument('--data', required=True, help='a corpus')
  parser.add_argument('--method', default='mae')
  parser.add_argument('--model', default='vit_micro/8')
  parser.add_argument('--widths', default='64,128,256,512')
  parser.add_argument('--rates', type=int, default=6, help='how many, each twice the one before')
  parser.add_argument('--first', type=float, default=1e-3, help='the lowest rate')
  parser.add_argument('--steps', type=int, default=150)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--seeds', type=int, default=1)
  parser.add_argument('--scalings', default=','.join(SCALINGS))
  parser.add_argument('--json', help='file for the losses')
  args = parser.parse_args(argv)
  widths = [int(w) for w in args.widths.split(',')]
  for width in widths:
    if width % HEAD:
      near = max(round(width / HEAD), 1) * HEAD
      raise UserError(f'--widths: {width} does not divide into heads of {HEAD}: nearest is {near}')
  rates = [args.first * 2.0**i for i in range(args.rates)]
  user = config_lib.merge(FIXED, {'method': args.method, 'model': args.model, 'data': args.data, 'steps': args.steps,
                                  'batch_size': args.batch}, config_lib.parse_overrides(args.words))
  spec, batches = first_batches(user, args.steps)
  begun, losses = time.process_time(), {}
  for scaling, width in itertools.product(args.scalings.split(','), widths):
    own = {'optimizer': {'scaling': scaling, 'base_width': widths[0]}}
    losses.setdefault(scaling, {})[width] = cells(config_lib.merge(user, own), width, rates, args.seeds, batches, spec)
    print(f'{scaling} {width}: {np.round(losses[scaling][width].mean(axis=0), 4)}', file=sys.stderr, flush=True)
  print(f'| rule | width | {" | ".join(f"{r:.3g}" for r in rates)} | optimum |\n{"|---" * (len(rates) + 3)}|')
  for scaling, found in losses.items():
    print('\n'.join(lines_of(scaling, rates, found)))
  print(f'\n{measured_on()}; {(time.process_time() - begun) / 60:.1f} minutes of processor time')
  if args.json:
    plain = {s: {str(w): x.tolist() for w, x in each.items()} for s, each in losses.items()}
    files.write_json(pathlib.Path(args.json), {'rates': rates, 'losses': plain, 'measured_on': measured_on()})


def first_batches(user: dict[str, Any], steps: int) -> tuple[Any, list[Any]]:
  """What the corpus is, and the first batches of its training split as a run of seed 0 reads them."""
  from jaxmed.data.feed.pipeline import train_batches
  from jaxmed.train.build import assemble, data_spec, records, resolve

  _, source = records.open_records(user)
  label = str(user.get('loader', {}).get('label', ''))
  spec = data_spec.describe(source, label, data_spec.vocabulary_of(user, source), None)
  config = resolve.resolve(user, spec)
  stream = train_batches(source, batch_size=config.batch_size, seed=0, threads=config.loader.threads,
                         **assemble.stream(config, source, None), **assemble.reading(config, spec))
  return spec, list(itertools.islice(stream, steps))


if __name__ == '__main__':
  run_script(main)
