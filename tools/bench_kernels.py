"""Times single array functions of a transformer beside PyTorch's on the same CPU cores, alternating in one process.

GELU, the products of a dense layer (forward, gradient of the input, gradient of the weights in three orders) and
attention with its gradient, whose probabilities are kept or made again in blocks. A row has the median of each form in
milliseconds and the median of PyTorch's time over its; above 1 it is faster than PyTorch. With --step also the gradient
of whole encoders, whose attention keeps its probabilities or does not, as the median ratio of the two.

What is fast alone may gain nothing inside of a step: a form is chosen by --step. The script asks for huge pages, as
`jaxmed train` does.

Needs `pip install -e '.[parity]'`.

Example:
  python tools/bench_kernels.py --step --json kernels.json
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.models import create_model  # noqa: E402
from jaxmed.models.layers import kernels  # noqa: E402
from jaxmed.parallel.memory import restart_with_huge_pages  # noqa: E402
from jaxmed.train.utilization import keeping  # noqa: E402
from tools.needs import measured_on, need, run_script  # noqa: E402

KEPT = {'kept': 1 << 62, 'blocks': 0}  # keys whose probabilities attention keeps
PAUSE, EACH = 0.02, 5  # seconds before a turn, calls in it
DENSE = ((3152, 192, 768), (3152, 768, 192), (1576, 384, 1536), (1576, 1536, 384))  # rows, in, out of ViT-Ti and ViT-S
ATTENTION = ((16, 197, 3, 64), (4, 577, 6, 64), (2, 785, 6, 64), (1, 1569, 6, 64))  # batch, tokens, heads, width
STEPS = (('vit_tiny/16', 16, 224, 3), ('vit_small/16', 2, 384, 3), ('channel_vit_small/16', 2, 224, 3),
         ('channel_vit_small/16', 1, 224, 5))  # model, batch, size, channels
SMALL = dict(gelu=(64, 32), dense=((32, 8, 16),), attention=((2, 17, 2, 8),),
             steps=(('channel_vit_micro/16', 2, 32, 2),))


def _normal(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def alternating(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each form in each round: they take turns, and a turn is `EACH` calls, of which the median counts.

  A turn begins when the idle threads of the one before sleep, with a call that is not timed: threads of PyTorch that
  spin take the cores of what comes after them.
  """
  times: dict[str, list[float]] = {name: [] for name in forms}
  for _ in range(rounds):
    for name, form in forms.items():
      time.sleep(PAUSE)
      turn = []
      for _ in range(1 + EACH):
        start = time.perf_counter()
        jax.block_until_ready(form())
        turn.append(time.perf_counter() - start)
      times[name].append(statistics.median(turn[1:]))
  return times


def compiled(f: Callable, *operands: jax.Array) -> Callable[[], Any]:
  """A call of the program of `f`, compiled now."""
  return functools.partial(jax.jit(f).lower(*operands).compile(), *operands)


def gelu(torch: Any, rows: int, width: int) -> dict[str, Callable[[], Any]]:
  """GELU alone, and with its gradient."""
  x = _normal(0, rows, width)
  t = torch.from_numpy(np.array(x))

  def back():
    leaf = t.clone().requires_grad_(True)
    torch.nn.functional.gelu(leaf).backward(t)
    return leaf.grad

  return {'gelu': compiled(kernels.gelu, x), 'torch gelu': lambda: torch.nn.functional.gelu(t),
          'gelu, gradient': compiled(lambda x: jax.vjp(kernels.gelu, x)[1](x)[0], x), 'torch gelu, gradient': back}


def dense(torch: Any, rows: int, wide: int, out: int) -> dict[str, Callable[[], Any]]:
  """The three products of a dense layer; that of the weights in three orders."""
  x, w, g = _normal(0, rows, wide), _normal(1, wide, out), _normal(2, rows, out)
  tx, tw, tg = (torch.from_numpy(np.array(a)) for a in (x, w, g))
  once, over_rows = lax.optimization_barrier, (((0,), (0,)), ((), ()))
  return {
      'forward': compiled(lambda x, w: x @ w, x, w), 'torch forward': lambda: tx @ tw,
      'input': compiled(lambda g, w: g @ w.T, g, w), 'torch input': lambda: tg @ tw.T,
      'weights': compiled(lambda x, g: lax.dot_general(x, g, over_rows), x, g), 'torch weights': lambda: tx.T @ tg,
      'weights, x turned': compiled(lambda x, g: once(x.T) @ g, x, g),
      'weights, g turned': compiled(lambda x, g: once(once(g.T) @ x).T, x, g)}


def attention(torch: Any, *shape: int) -> dict[str, Callable[[], Any]]:
  """Attention with its gradient."""
  batch, tokens, heads, width = shape
  qkv = _normal(0, batch, tokens, 3, heads, width)
  leaf = torch.from_numpy(np.array(qkv)).requires_grad_(True)

  def theirs():
    leaf.grad = None
    q, k, v = leaf.permute(2, 0, 3, 1, 4)
    torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

  total = lambda x: kernels.self_attention(x).sum()
  forms: dict[str, Callable[[], Any]] = {}
  for name, keys in KEPT.items():
    with keeping(keys):
      forms[name] = compiled(jax.value_and_grad(total), qkv)
  return forms | {'torch': theirs}


def step(model_name: str, batch: int, size: int, channels: int) -> dict[str, Callable[[], Any]]:
  """The gradient of an encoder, with and without kept probabilities."""
  model = create_model(model_name, image_size=size, in_channels=channels)
  x, ids = _normal(0, batch, size, size, channels), jnp.tile(jnp.arange(channels), (batch, 1))
  params = jax.jit(lambda key: nn.unbox(model.init(key, x, ids)['params']))(jax.random.key(0))
  loss = lambda params, x: model.apply({'params': params}, x, ids).mean.sum()
  forms = {}
  for name, keys in KEPT.items():
    with keeping(keys):
      forms[name] = compiled(jax.grad(loss), params, x)
  return forms


def rows_of(title: str, times: Mapping[str, list[float]], theirs: Callable[[str], str]) -> list[dict[str, Any]]:
  """A row for each of our forms, beside what `theirs` names."""
  ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
  return [{'case': title, 'form': name, 'ms': 1e3 * statistics.median(found), 'beside_ms': 1e3 * statistics.median(
      times[theirs(name)]), 'ratio': ratio(theirs(name), name)} for name, found in times.items()
          if theirs(name) in times and theirs(name) != name]


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--rounds', type=int, default=12, help='turns of each form, a quarter of them for --step; default 12')
  p.add_argument('--step', action='store_true', help='also whole encoders')
  p.add_argument('--small', action='store_true', help='tiny shapes, to try the script')
  p.add_argument('--json', metavar='FILE', help='file for the rows')
  args = p.parse_args(argv)
  need('parity', 'torch')
  import torch
  size = SMALL if args.small else dict(gelu=(3152, 768), dense=DENSE, attention=ATTENTION, steps=STEPS)
  rows = rows_of(f'{list(size["gelu"])}', alternating(gelu(torch, *size['gelu']), args.rounds), lambda n: f'torch {n}')
  for shape in size['dense']:
    theirs = lambda name: f'torch {name.split(",")[0]}'
    rows += rows_of(f'dense {list(shape)}', alternating(dense(torch, *shape), args.rounds), theirs)
  for shape in size['attention']:
    rows += rows_of(f'attention {list(shape)}', alternating(attention(torch, *shape), args.rounds), lambda _: 'torch')
  for case in size['steps'] if args.step else ():
    title = f'{case[0]} of {case[3]} channels, {case[2]} px, batch {case[1]}'
    rows += rows_of(title, alternating(step(*case), max(args.rounds // 4, 1)), lambda _: 'kept')
  print(f'float32, {args.rounds} alternating rounds; {measured_on()}')
  print(f'{"case":52}{"form":24}{"ms":>10}{"beside ms":>11}{"ratio":>8}')
  for r in rows:
    print(f'{r["case"]:52}{r["form"]:24}{r["ms"]:10.2f}{r["beside_ms"]:11.2f}{r["ratio"]:8.2f}')
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
  return 0


if __name__ == '__main__':
  restart_with_huge_pages()
  run_script(main)
