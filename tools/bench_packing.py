"""Packed rows of tokens beside padded ones: waste on mixtures of 1 to 8 channels, and tokens a second in training.

The first table draws batches as training does (`loader.balance=n_channels` beside a plain shuffle) and packs them by
the model's own plan: how many rows, which share of slots holds no token, how many batches do not fit (they are computed
padded), the share of empty slots with those counted as padded, and what padding alone wastes.

The second part times the gradient of supervised training in float32 with both layouts, alternating, on the same batches
of one compiled program each; then the packed program on a batch that does not fit. "Expected" is the ratio of the
matrix products of the blocks. Bytes are the compiler's, of temporary memory.

Needs `make install` alone.

Example:
  python tools/bench_packing.py --rounds 7 --json packing.json
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.data.feed import sampling  # noqa: E402
from jaxmed.models import create_model  # noqa: E402
from jaxmed.models.layers import packing  # noqa: E402
from jaxmed.objectives.supervised.supervised import Supervised  # noqa: E402
from tools.needs import measured_on, run_script  # noqa: E402

MOST, RECORDS = 8, 5000
MIXTURES = {'uniform': (1,) * MOST, 'mostly few': (4, 1, 3, 2, 1, 2, 1, 2)}  # records of 1, 2, ... channels
CLASSES = 8


class Records:
  """What a mixture asks of a source: how many channels each record has."""

  path = 'records'

  def __init__(self, shares: tuple[int, ...]):
    self.sets = [[f'c{i}' for i in range(n)] for n in range(1, MOST + 1)]
    shares = np.array(shares) / sum(shares)
    self.codes = np.random.default_rng(0).choice(MOST, RECORDS, p=shares)

  def __len__(self) -> int:
    return len(self.codes)

  def distinct(self, name: str) -> tuple[np.ndarray, list]:
    """The values of a column, and which one each record has."""
    assert name == 'channels'
    return self.codes, self.sets


def drawn(mixture: str, balanced: bool, batches: int, batch: int) -> np.ndarray:
  """Channels of the records of batches [batches, batch]."""
  source = Records(MIXTURES[mixture])
  if balanced:
    sampler = sampling.make(source, sampling.Mixture(balance='n_channels'), 0)
    rows = np.array([sampler(i) for i in range(batches * batch)])
  else:
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.permutation(RECORDS) for _ in range(-(-batches * batch // RECORDS))])[:batches * batch]
  return 1 + source.codes[rows].reshape(batches, batch)


def token_mask(counts: np.ndarray, cells: int, prefix: int) -> np.ndarray:
  """Which tokens are there, [..., prefix + MOST * cells]."""
  mask = np.repeat(np.arange(MOST) < counts[..., None], cells, axis=-1)
  return np.concatenate([np.ones((*counts.shape, prefix), bool), mask], axis=-1)


def fitting(counts: np.ndarray, cells: int, prefix: int, rows: int) -> np.ndarray:
  """Which batches [batches, batch] fit so many rows."""
  share = rows / counts.shape[1]
  plan = jax.jit(lambda valid: jax.lax.map(lambda v: packing.plan(v, 1, share, 2 * prefix).fits, valid))
  return np.asarray(plan(token_mask(counts, cells, prefix)))


def waste(counts: np.ndarray, cells: int, prefix: int, rows: int) -> dict[str, float]:
  """Of so many rows: their share of the samples, empty slots of batches that fit, batches that do not, and both."""
  batch = counts.shape[1]
  sizes, length = counts * cells + prefix, MOST * cells + 3 * prefix
  fit = fitting(counts, cells, prefix, rows)
  padded = batch * (MOST * cells + prefix)
  each, slots = 1 - sizes.sum(axis=1) / (rows * length), np.where(fit, rows * length, padded)
  return {'rows': rows, 'share': rows / batch, 'waste': float(each[fit].mean()) if fit.any() else float('nan'),
          'overflow': float(1 - fit.mean()), 'total': float(1 - sizes.sum() / slots.sum()),
          'padded': float(1 - sizes.sum() / (len(counts) * padded))}


def waste_table(cells: int, prefix: int, batches: int, batch: int) -> list[dict]:
  """Rows of the first table: the fewest rows with which 1 batch in 50 does not fit, the one fewer and the one more."""
  out = []
  for mixture in MIXTURES:
    for balanced in (False, True):
      counts = drawn(mixture, balanced, batches, batch)
      first = int(counts.sum(axis=1).mean() // MOST)
      tried = []
      for rows in range(first, batch + 1):
        tried.append({'mixture': mixture, 'balanced': balanced} | waste(counts, cells, prefix, rows))
        if len(tried) > 1 and tried[-2]['overflow'] <= 0.02:
          break
      out += tried[-3:]
  return out


def batch_of(counts: np.ndarray, size: int) -> dict[str, jax.Array]:
  """Noise of so many channels."""
  rng = np.random.default_rng(2)
  batch = len(counts)
  return {'image': jnp.asarray(rng.normal(size=(batch, size, size, MOST)), jnp.float32),
          'channels': jnp.tile(jnp.arange(MOST, dtype=jnp.int32), (batch, 1)),
          'channel_mask': jnp.asarray(np.arange(MOST) < counts[:, None]),
          'label': jnp.asarray(np.arange(batch) % CLASSES, jnp.int32)}


def speed(args: argparse.Namespace, rows: int) -> dict:
  """Seconds of both layouts on the same batches, and what they may be expected to be."""
  counts = drawn('uniform', True, 200, args.batch)
  encoder = create_model(f'{args.model}/{args.patch}', args.size, MOST, pos_interpolation='antialias')
  cells, prefix = (args.size // args.patch) ** 2, encoder.num_prefix_tokens
  length = MOST * cells + 3 * prefix
  fits = counts[fitting(counts, cells, prefix, rows)][:4]
  batches = [batch_of(c, args.size) for c in fits]
  too_many = batch_of(np.full(args.batch, MOST), args.size)
  objective = Supervised(encoder, num_classes=CLASSES)
  variables = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), batches[0])))()
  found = {}
  for name, share in (('padded', 0.0), ('packed', rows / args.batch)):
    objective = Supervised(encoder.clone(packing=share), num_classes=CLASSES)
    loss = lambda p, b, o=objective: o.loss(variables | {'params': p}, b, jax.random.key(1), 0)[0]
    found[name] = jax.jit(jax.value_and_grad(loss)).lower(variables['params'], batches[0]).compile()

  def seconds(name, batch):
    start = time.perf_counter()
    jax.block_until_ready(found[name](variables['params'], batch))
    return time.perf_counter() - start

  losses = [[float(found[name](variables['params'], b)[0]) for b in batches] for name in found]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  times = {name: [] for name in (*found, 'overflow')}
  for i in range(args.rounds):
    batch = batches[i % len(batches)]
    for name in (('padded', 'packed'), ('packed', 'padded'))[i % 2]:
      times[name].append(seconds(name, batch))
    times['overflow'].append(seconds('packed', too_many))
  tokens = float(np.mean([(c * cells + prefix).sum() for c in fits]))
  work = lambda n, slots: n * slots * (24 * encoder.embed_dim + 4 * slots)  # of the blocks, by D
  median = {name: statistics.median(t) for name, t in times.items()}
  return {
      'rows': rows, 'length': length, 'tokens': tokens, 'seconds': times,
      'tokens_per_second': {name: tokens / median[name] for name in found},
      'ratio': statistics.median(a / b for a, b in zip(times['padded'], times['packed'], strict=True)),
      'expected': work(args.batch, MOST * cells + prefix) / work(rows, length),
      'overflow': median['overflow'] / median['padded'],
      'bytes': {name: f.memory_analysis().temp_size_in_bytes for name, f in found.items()}}


def main(argv: Sequence[str] | None = None) -> None:
  """Prints both parts."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='channel_vit_micro')
  parser.add_argument('--size', type=int, default=48)
  parser.add_argument('--patch', type=int, default=8)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--batches', type=int, default=200, help='of the first table')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--share', type=float, default=0.57, help='encoder.packing of the second part')
  parser.add_argument('--json', default='', help='write the numbers here too')
  args = parser.parse_args(argv)
  table = waste_table((args.size // args.patch) ** 2, 1, args.batches, args.batch)
  print(f'{"mixture":12} {"drawn":9} {"rows":>4} {"share":>6} {"waste":>7} {"overflow":>8} {"in all":>7} {"padded":>7}')
  for r in table:
    kind = 'balanced' if r['balanced'] else 'shuffled'
    print(f'{r["mixture"]:12} {kind:9} {r["rows"]:4} {r["share"]:6.3f} {r["waste"]:7.1%} {r["overflow"]:8.1%} '
          f'{r["total"]:7.1%} {r["padded"]:7.1%}', flush=True)
  out = {'waste': table, 'device': jax.devices()[0].device_kind, 'on': measured_on()}
  if args.rounds:
    out['speed'] = found = speed(args, int(np.ceil(args.share * args.batch)))
    rates = ', '.join(f'{name} {rate:,.0f}' for name, rate in found['tokens_per_second'].items())
    print(f'tokens/s: {rates}; packed {found["ratio"]:.2f} times padded, expected {found["expected"]:.2f}; a batch '
          f'that does not fit takes {found["overflow"]:.2f} of padded')
    print('temporary bytes: ' + ', '.join(f'{name} {size / 2**20:,.0f} MiB' for name, size in found['bytes'].items()))
  if args.json:
    with open(args.json, 'w') as f:
      json.dump(out, f, indent=1)


if __name__ == '__main__':
  run_script(main)
