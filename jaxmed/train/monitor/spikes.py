"""Spikes of the loss, told from its noise by the median and the median absolute deviation of the last ones.

The loop looks at the logged rows on the host (`Spikes`); with on_spike='skip' the step looks at every loss (`judge`).
"""

import collections
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, LEAST = 100, 20  # losses that are compared with, and fewest of them
SIGMAS = 10.0  # standard deviations above the median; 1.4826 median absolute deviations are one of a normal
SHARE = 0.05  # and at least this share of the median, where the loss hardly varies

ACTIONS = ('ignore', 'warn', 'skip', 'rollback')


def limit_of(losses: Any, xp: Any = np) -> Any:
  """What a loss may reach after these, [n] with NaN for none; `xp` is numpy or jax.numpy."""
  median = xp.nanmedian(losses)
  spread = SIGMAS * 1.4826 * xp.nanmedian(xp.abs(losses - median))
  return median + xp.maximum(spread, SHARE * xp.abs(median))


def empty() -> jax.Array:
  """The window of `judge` before the first loss: [WINDOW] float32 NaN."""
  return jnp.full((WINDOW,), jnp.nan, jnp.float32)


def judge(losses: jax.Array, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(whether this loss is a spike, the window after it), by the rule of `Spikes`, inside a jitted step."""
  known = jnp.isfinite(losses).sum()
  spike = jnp.isfinite(loss) & (known >= LEAST) & (loss > limit_of(losses, jnp))
  enters = jnp.isfinite(loss) & ~spike
  return spike, jnp.where(enters, jnp.append(losses[1:], loss.astype(losses.dtype)), losses)


class Spikes:
  """Looks at the losses of logged rows, in order. A spike does not enter the window."""

  def __init__(self, losses: Iterable[float] = ()):
    self._window: collections.deque[float] = collections.deque(maxlen=WINDOW)
    for loss in losses:
      self.look(loss)

  def look(self, loss: float) -> float | None:
    """The limit that this loss is above, or None. A loss that is not finite is another matter (see the step)."""
    if not math.isfinite(loss):
      return None
    if len(self._window) >= LEAST:
      limit = float(limit_of(np.asarray(self._window)))
      if loss > limit:
        return limit
    self._window.append(loss)
    return None
