"""How well risks order times to an event: Harrell's concordance index."""

import numpy as np


def concordance(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
  """Share of comparable pairs in which the earlier event has the higher risk (Harrell et al. 1996); ties of risk 1/2.

  A pair is comparable where the earlier time is an event; of two at one time it is where one is an event and the other
  is censored, which lived longer. NaN without such a pair.

  Args:
    risk, time: [N]. event: [N] bool, False for censored.
  """
  risk, time, event = np.asarray(risk, np.float64), np.asarray(time, np.float64), np.asarray(event, bool)
  right = pairs = 0.0
  for i in np.flatnonzero(event):
    later = (time > time[i]) | ((time == time[i]) & ~event)
    right += (risk[i] > risk[later]).sum() + 0.5 * (risk[i] == risk[later]).sum()
    pairs += later.sum()
  return float(right / pairs) if pairs else float('nan')
