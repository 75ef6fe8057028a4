"""Symile's claim, in less than a minute on two cores: what only three modalities together say, no pairs of them find.

Saporta et al. 2024, section 5.1, with the sizes of rajesh-lab/symile, examples/binary_xor_missing.py: a and b are fair
coins and c = a XOR b, so that any two say nothing of each other. Linear encoders of one number and a flag to 16, unit
vectors, batches of 1,000 of 10,000 records, AdamW at 0.1, a logit scale that begins at exp(-0.3). After training b is
predicted of a and c on 5,000 other records. `clip` is the sum of the three pairwise losses. With a share missing, each
modality of a training record is replaced by 0.5 and flagged with that probability, alone.

  python tools/symile_xor.py --seeds 3

Needs `make install` alone.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxmed.models.layers.norm import normalize  # noqa: E402
from jaxmed.objectives.losses import paired  # noqa: E402
from jaxmed.objectives.losses.symile import retrieval_logits, symile  # noqa: E402
from tools.needs import run_script  # noqa: E402

COUNT, BATCH, EPOCHS, DIM, HELD_OUT = 10_000, 1_000, 30, 16, 5_000
CASES = (('symile', 0.0), ('clip', 0.0), ('symile', 0.5))


def records(rng: np.random.Generator, count: int, missing: float = 0.0) -> np.ndarray:
  """Values and flags of a, b and c, [3, N, 2]."""
  a, b = rng.integers(0, 2, (2, count))
  values, gone = np.stack([a, b, a ^ b]).astype(np.float32), rng.random((3, count)) < missing
  return np.stack([np.where(gone, 0.5, values), gone], axis=-1).astype(np.float32)


def encoded(params: dict, x: jax.Array) -> list[jax.Array]:
  """Unit vectors [N, DIM] of each modality."""
  return list(normalize(jnp.einsum('mnk,mkd->mnd', x, params['kernel']) + params['bias'][:, None]))


def cost(params: dict, x: jax.Array, rng: jax.Array, method: str) -> jax.Array:
  """The loss of a batch."""
  vectors = encoded(params, x)
  if method == 'symile':
    return symile(vectors, params['scale'], rng, chunk=0)[0]
  pairs = ((0, 1), (0, 2), (1, 2))
  return sum(paired.clip(vectors[i], vectors[j], params['scale'], chunk=0)[0] for i, j in pairs)


@functools.partial(jax.jit, static_argnames=('method', 'epochs', 'batch'))
def train(rng: jax.Array, data: jax.Array, method: str, epochs: int, batch: int) -> dict:
  """Parameters after so many epochs over data [3, N, 2]."""
  first, rng = jax.random.split(rng)
  uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-(2**-0.5), maxval=2**-0.5)  # PyTorch's Linear
  keys = jax.random.split(first)
  params = {'kernel': uniform(keys[0], (3, 2, DIM)), 'bias': uniform(keys[1], (3, DIM)), 'scale': jnp.asarray(-0.3)}
  rule, steps = optax.adamw(0.1, weight_decay=0.01), data.shape[1] // batch

  def epoch(carry, key):
    order = jax.random.permutation(key, data.shape[1])[: steps * batch].reshape(steps, batch)

    def step(carry, rows):
      params, state, key = carry
      key, own = jax.random.split(key)
      slope = jax.grad(cost)(params, data[:, rows], own, method)
      change, state = rule.update(slope, state, params)
      return (optax.apply_updates(params, change), state, key), None

    return jax.lax.scan(step, carry, order)[0], None

  return jax.lax.scan(epoch, (params, rule.init(params), rng), jax.random.split(rng, epochs))[0][0]


def accuracy(params: dict, x: np.ndarray, method: str) -> float:
  """How often b [N] is found of a and c among its two values, on whole records."""
  a, b, c = encoded(params, jnp.asarray(x))
  either = np.zeros((3, 2, 2), np.float32)
  either[1, 1, 0] = 1
  candidates = encoded(params, jnp.asarray(either))[1]
  logits = retrieval_logits([a, c], candidates) if method == 'symile' else (a + c) @ candidates.T
  return float((np.asarray(logits.argmax(axis=1)) == x[1, :, 0]).mean())


def run(method: str, missing: float, seed: int, count: int = COUNT, epochs: int = EPOCHS, batch: int = BATCH) -> float:
  """The accuracy after training."""
  rng = np.random.default_rng(seed)
  params = train(jax.random.key(seed), jnp.asarray(records(rng, count, missing)), method, epochs, batch)
  return accuracy(params, records(rng, HELD_OUT), method)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a line a case."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args(argv)
  for method, missing in CASES:
    start, found = time.perf_counter(), [run(method, missing, seed) for seed in range(args.seeds)]
    print(json.dumps({'method': method, 'missing': missing, 'accuracy': [round(x, 3) for x in found],
                      'seconds': round(time.perf_counter() - start, 1)}))


if __name__ == '__main__':
  run_script(main)
