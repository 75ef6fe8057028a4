"""How few numbers of a row each feature of a hashed channel needs: OptEmbed's search over widths.

arXiv 2208.04482, section 3.3, with the constants of its code (fuyuanlyu/OptEmbed, evolution.py): generations of 10
mutations (each width drawn anew with probability 0.1) and 10 crossovers at one point, of the 15 best so far. What is
judged is the held-out loss of the run's own method. The table was trained with widths drawn at random
(`encoder.hash_draw=True`), so that vectors cut short are ones that it knows.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.data.corpus.open import open_source
from jaxmed.data.corpus.vocabulary import described
from jaxmed.encoder import Encoder
from jaxmed.errors import UserError
from jaxmed.models.layers import channel_embed
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build.rundir import encoder_of, load_state
from jaxmed.train.probe import Probe

MUTATIONS, CROSSOVERS, PARENTS, CHANCE = 10, 10, 15, 0.1
Widths = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shrunk:
  """An encoder whose features read fewer numbers, and what that took.

  loss: held out, (all numbers, these widths). numbers: of the table, (kept, of how many). census: see `channel_embed`.
  """

  encoder: Encoder
  widths: Widths
  loss: tuple[float, float]
  numbers: tuple[int, int]
  census: dict[str, dict[str, int]]


def shrink(run: str | pathlib.Path, data: str, *, rounds: int = 30, rows: int = 256, seed: int = 0,
           tell: Callable[[str], None] = lambda line: None) -> Shrunk:
  """Searches the widths of a run's hashed channel embeddings.

  Args:
    data: the corpus; its `val` split judges. rounds: generations. rows: held-out rows that a candidate is judged on.
    tell: is given a line a generation.
  Raises:
    UserError: as of `load_state`; a run without hashed channels, or trained without `encoder.hash_draw`; no `val` rows.
  """
  trainer, config, spec, state = load_state(run)
  model = trainer.objective.encoder
  if getattr(model, 'channel_embedding', '') != 'hashed' or not model.hash_draw:
    raise UserError(f'{run} was not trained with encoder.channel_embedding=hashed encoder.hash_draw=True: its table '
                    'does not know vectors that are cut short')
  probe = Probe(trainer, config, spec, open_source(data), mesh_lib.make_mesh({'data': 0}), lambda: None)
  names, width = described(spec.channels), model.hash_width
  there = [f for f, feature in enumerate(channel_embed.FEATURES)
           if any(feature in channel_embed.parse(name) for name in names)]

  cut = lambda some: dataclasses.replace(state, **{
      key: narrowed(getattr(state, key), _all(some, there, width), width) for key in ('params', 'target', 'average')})
  judge = lambda some: probe.held_out(cut(some), rows)
  whole = judge((width,) * len(there))
  if not np.isfinite(whole):
    raise UserError(f'{data} has no rows of split val whose channels the run knows: the search judges by them')
  best, loss = evolve(judge, len(there), width, rounds, seed, tell)
  widths = _all(best, there, width)
  encoder = encoder_of(trainer, config, spec, cut(best))
  encoder = dataclasses.replace(encoder, model=encoder.model.clone(hash_widths=widths))
  census = channel_embed.census(encoder.params['channel_hash'], names, widths)
  return Shrunk(encoder, widths, (whole, loss), channel_embed.numbers(census, width), census)


def evolve(judge: Callable[[Widths], float], count: int, width: int, rounds: int, seed: int,
           tell: Callable[[str], None] = lambda line: None) -> tuple[Widths, float]:
  """The widths, `count` numbers from 1 to `width`, of least loss among all generations, and that loss.

  The first generation is drawn at random, all numbers being one of it. Of equal losses the narrower one is better.
  """
  rng = np.random.default_rng(seed)
  draw = lambda: tuple(int(n) for n in rng.integers(1, width + 1, count))
  known: dict[Widths, float] = {}
  generation = [(width,) * count] + [draw() for _ in range(MUTATIONS + CROSSOVERS - 1)]
  order = lambda: sorted(known, key=lambda w: (known[w], sum(w)))
  for number in range(rounds):
    for candidate in generation:
      if candidate not in known:
        known[candidate] = judge(candidate)
    parents = order()[:PARENTS]
    tell(f'generation {number + 1} of {rounds}: least held-out loss {known[parents[0]]:.6g}, widths {parents[0]}')
    pick = lambda parents=parents: parents[rng.integers(len(parents))]
    generation = [_mutated(pick(), draw(), rng) for _ in range(MUTATIONS)]
    generation += [_crossed(pick(), pick(), rng) for _ in range(CROSSOVERS)]
  best = order()[0]
  return best, known[best]


def _mutated(parent: Widths, other: Widths, rng: np.random.Generator) -> Widths:
  return tuple(o if rng.random() < CHANCE else p for p, o in zip(parent, other, strict=True))


def _crossed(a: Widths, b: Widths, rng: np.random.Generator) -> Widths:
  point = int(rng.integers(1, len(a))) if len(a) > 1 else 1
  return a[:point] + b[point:]


def _all(some: Sequence[int], there: Sequence[int], width: int) -> Widths:
  """A width for each of FEATURES; those that no channel has keep all."""
  out = [width] * len(channel_embed.FEATURES)
  for f, w in zip(there, some, strict=True):
    out[f] = w
  return tuple(out)


def narrowed(tree: Any, widths: Sequence[int], width: int) -> Any:
  """A tree of parameters in which every hashed table's matrices [F, K * width, D] skip the numbers beyond `widths`."""
  factors = jnp.asarray(channel_embed.narrow(np.asarray(widths), width))  # [F, width]

  def visit(path, x):
    if [getattr(p, 'key', None) for p in path[-2:]] != ['channel_hash', 'kernel']:
      return x
    return x * jnp.tile(factors, (1, x.shape[1] // width))[..., None]

  return jax.tree_util.tree_map_with_path(visit, tree)
