"""Spikes of the loss, told from its noise by the median and the median absolute deviation of the last rows."""

import collections
import math
from collections.abc import Iterable

import numpy as np

WINDOW, LEAST = 100, 20  # rows that are compared with, and fewest of them
SIGMAS = 10.0  # standard deviations above the median; 1.4826 median absolute deviations are one of a normal
SHARE = 0.05  # and at least this share of the median, where the loss hardly varies

ACTIONS = ('ignore', 'warn', 'rollback')


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
    limit = None
    if len(self._window) >= LEAST:
      values = np.asarray(self._window)
      median = float(np.median(values))
      spread = SIGMAS * 1.4826 * float(np.median(np.abs(values - median)))
      limit = median + max(spread, SHARE * abs(median))
    if limit is not None and loss > limit:
      return limit
    self._window.append(loss)
    return None
