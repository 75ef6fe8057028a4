"""Packed rows of tokens: samples of different lengths share rows of one fixed length, each attending to itself alone.

Tokens come padded, [S, N, D] with `valid` [S, N]. The valid ones of a sample move together into one of R rows of L
slots, and what the blocks made of them moves back; nothing is compiled again for other lengths. On a mesh every device
packs its own samples, so no token crosses a link: arrays have a leading axis of groups, one a part of the batch.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmed.parallel.axes import BATCH_AXES
from jaxmed.parallel.mesh import axis_size, constrain


class Plan(NamedTuple):
  """Where tokens of each of G groups go: [S / G, N] tokens of a group into [R / G, L] slots.

  slot: [G, S / G * N] the slot of a token in its group's rows, R / G * L for none. token: [G, R / G * L] the token in a
  slot, S / G * N for none. shape: (R, L), (S, N). fits: bool, whether every valid token of every group has a slot.
  """

  slot: jax.Array
  token: jax.Array
  fits: jax.Array
  rows: tuple[int, int]
  samples: tuple[int, int]

  def pack(self, x: jax.Array) -> jax.Array:
    """[S, N, ...] -> [R, L, ...], zero in empty slots."""
    return self._moved(x, self.token, self.slot, self.rows)

  def unpack(self, x: jax.Array) -> jax.Array:
    """[R, L, ...] -> [S, N, ...], zero for tokens that have no slot."""
    return self._moved(x, self.slot, self.token, self.samples)

  def spread(self, x: jax.Array) -> jax.Array:
    """A number a sample [..., S] for each slot of its tokens, [..., R, L]; zero in empty slots."""
    each = jnp.broadcast_to(jnp.moveaxis(x, -1, 0)[:, None], (*self.samples, *x.shape[:-1]))
    return jnp.moveaxis(self.pack(each), (0, 1), (-2, -1))

  def segments(self) -> jax.Array:
    """[R, L] int32, the number of a slot's sample from 1 in its group; 0 in empty slots."""
    sample = jnp.where(self.token < self.slot.shape[1], self.token // self.samples[1] + 1, 0)
    return sample.reshape(self.rows).astype(jnp.int32)

  def _moved(self, x, there, back, shape):
    count = self.slot.shape[0]
    x = constrain(x.reshape(count, -1, *x.shape[2:]), 'batch', *[None] * (x.ndim - 1))
    x = constrain(_move(x, there, back), 'batch', *[None] * (x.ndim - 1))
    return x.reshape(*shape, *x.shape[2:])


def groups(samples: int) -> int:
  """Into how many parts the surrounding mesh cuts so many samples."""
  parts = math.prod(axis_size(axis) for axis in BATCH_AXES)
  return 1 if samples % parts else parts


def plan(valid: jax.Array, count: int, share: float, spare: int = 0) -> Plan:
  """Assigns samples to rows, the longest first, each to the first row that has room for it (first-fit decreasing).

  Args:
    valid: [S, N] bool, the tokens to be packed.
    count: groups, which divide S.
    share: rows as a share of the samples; every group has the same number, at least one.
    spare: slots of a row beyond N, for the prefix tokens of the second and third sample in it.
  """
  samples, tokens = valid.shape
  own = samples // count
  rows = min(math.ceil(share * own - 1e-9), own)
  length = tokens + spare
  length += -length % axis_size('sequence')
  valid = constrain(valid.reshape(count, own, tokens), 'batch', None, None)
  slot, fits = jax.vmap(functools.partial(_assigned, rows=rows, length=length))(valid)
  slot = constrain(slot.reshape(count, own * tokens), 'batch', None)
  fill = lambda slot: jnp.full(rows * length, own * tokens).at[slot].set(jnp.arange(own * tokens), mode='drop')
  token = constrain(jax.vmap(fill)(slot), 'batch', None)
  return Plan(slot, token, fits.all(), (count * rows, length), (samples, tokens))


def _assigned(valid: jax.Array, rows: int, length: int) -> tuple[jax.Array, jax.Array]:
  """The slots [S, N] of one group's tokens, rows * length for none, and whether all samples have a row."""
  sizes = valid.sum(axis=1)
  order = jnp.argsort(-sizes, stable=True)

  def place(free, size):
    row = jnp.argmax(free >= size)
    fits = free[row] >= size
    return free.at[row].add(jnp.where(fits, -size, 0)), (jnp.where(fits, row, rows), length - free[row], fits)

  _, (row, start, fits) = lax.scan(place, jnp.full(rows, length), sizes[order])
  first = jnp.zeros_like(sizes).at[order].set(row * length + jnp.where(fits, start, 0))
  slot = first[:, None] + jnp.cumsum(valid, axis=1) - 1
  return jnp.where(valid, jnp.minimum(slot, rows * length), rows * length), fits.all()


@jax.custom_vjp
def _move(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
  """x [G, A, ...] at `there` [G, B] of each group -> [G, B, ...], zero beyond the end.

  `back` [G, A] is the inverse, so the gradient is gathered too: adding at indices is slow.
  """
  return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode='fill', fill_value=0))(x, there)


_move.defvjp(lambda x, there, back: (_move(x, there, back), (there, back)),
             lambda indices, g: (_move(g, indices[1], indices[0]), None, None))
