"""Losses of times to an event that some records only reach censored: functions in float32 over the global batch."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError
from jaxmed.objectives.losses.contrast import OUT


def cox(risk: jax.Array, time: jax.Array, event: jax.Array, counts: jax.Array | None = None) -> jax.Array:
  """Negative log partial likelihood (Cox 1972), Breslow's for ties, over the number of events.

  -sum over events i of (r_i - logsumexp of r_j over all j with t_j >= t_i) / events; 0 for a batch without an event.

  Args:
    risk: r, [B], log hazard. time: [B]. event: [B] bool, False for censored.
    counts: [B] bool, records that count; None for all.
  """
  risk, real = risk.astype(jnp.float32), jnp.ones(len(risk), bool) if counts is None else counts
  at_risk = (time[None] >= time[:, None]) & real[None]  # [B, B], a record's own among them
  total = jax.nn.logsumexp(jnp.where(at_risk, risk[None], OUT), axis=1)
  event = event & real
  return jnp.where(event, total - risk, 0).sum() / jnp.maximum(event.sum(), 1)


def discrete(logits: jax.Array, interval: jax.Array, event: jax.Array, counts: jax.Array | None = None) -> jax.Array:
  """Mean negative log likelihood of hazards in K intervals (Gensheimer, Narasimhan 2019; Zadeh, Schmid 2020).

  With hazards h = sigmoid(logits) an event in interval k has the likelihood h_k prod_{j<k} (1 - h_j), and a time
  that is censored in it prod_{j<=k} (1 - h_j).

  Args:
    logits: [B, K]. interval: [B] int, that of each time. event: [B] bool. counts: as of `cox`.
  """
  logits = logits.astype(jnp.float32)
  live, fail = jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)
  place = jnp.arange(logits.shape[1])
  before = jnp.where(place < interval[:, None], live, 0).sum(axis=1)
  own = place == interval[:, None]
  last = jnp.where(own, jnp.where(event[:, None], fail, live), 0).sum(axis=1)
  real = jnp.ones(len(logits), bool) if counts is None else counts
  return -jnp.where(real, before + last, 0).sum() / jnp.maximum(real.sum(), 1)


def edges(time: np.ndarray, event: np.ndarray, bins: int = 4) -> np.ndarray:
  """The bins - 1 borders of intervals with as many observed events each: quantiles of the times of events.

  Raises:
    UserError: fewer different times of events than intervals.
  """
  found = np.asarray(time, np.float64)[np.asarray(event, bool)]
  borders = np.quantile(found, np.arange(1, bins) / bins) if len(found) else np.zeros(0)
  if len(np.unique(borders)) < bins - 1:
    raise UserError(f'{bins} intervals of survival need as many different times of events: the records have '
                    f'{len(np.unique(found))}')
  return borders


def interval_of(time: jax.Array, borders: jax.Array) -> jax.Array:
  """The interval [B] int32 of each time: how many borders it has reached."""
  return (time[:, None] >= jnp.asarray(borders)).sum(axis=1).astype(jnp.int32)
