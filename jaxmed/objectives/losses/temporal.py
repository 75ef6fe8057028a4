"""Losses and targets of sequences of frames, float32: smooth segments, class weights, futures, tasks and their noise.

Shapes: B videos, T frames, K phases. `valid` [B, T] bool are the frames of a video; labels below 0 are unknown.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError, choose

COMPAT = ('', 'ms_tcn')


def check_weights(weights: Sequence[float], classes: int) -> None:
  """Raises a UserError where the option class_weights does not have a number for each of the known classes."""
  if classes and weights and len(weights) != classes:
    raise UserError(f'objective.class_weights has {len(weights)} numbers, loader.label {classes} classes: expected one '
                    'a class, in the order of their names')


def class_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None,
                        double: bool = False) -> jax.Array:
  """Cross-entropy of logits [..., K] and labels [...]: the mean weighted by class [K], as PyTorch's; 0 without labels.

  double: a softmax before the log-softmax, as the published TeCNO trains (tobiascz/TeCNO, modules/mstcn/tecno.py): with
    7 classes the loss cannot fall below log(e + 6) - 1 = 1.165, and gradients are small.
  """
  logits = jax.nn.softmax(logits) if double else logits
  known, place = labels >= 0, jnp.maximum(labels, 0)
  weight = known.astype(jnp.float32) if weights is None else jnp.where(known, jnp.asarray(weights)[place], 0.0)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), place[..., None], axis=-1)[..., 0]
  return -(picked * weight).sum() / jnp.maximum(weight.sum(), 1e-12)


def truncated_mse(logits: jax.Array, valid: jax.Array, threshold: float = 4.0, compat: str = '') -> jax.Array:
  """Mean of min((log p_t - stop_gradient(log p_{t-1}))^2, threshold^2) over frames and classes (yabufarha/ms-tcn).

  Args:
    logits: [B, T, K]. valid: [B, T].
    compat: 'ms_tcn' divides by all cells of the batch, padded ones too, as the published code; by default by those of
      the frames of videos that have one before them.
  """
  choose('compat', compat, COMPAT)
  log_p = jax.nn.log_softmax(logits)
  change = jnp.square(log_p[:, 1:] - jax.lax.stop_gradient(log_p[:, :-1]))
  both = valid[:, 1:, None].astype(jnp.float32)
  total = (jnp.minimum(change, threshold**2) * both).sum()
  cells = both.size if compat == 'ms_tcn' else jnp.maximum(both.sum(), 1.0)
  return total / (cells * logits.shape[-1])


def binary_cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
  """Mean binary cross-entropy of logits and truth [...], 0 or 1; below 0 is unknown and does not count."""
  known = (truth >= 0).astype(jnp.float32)
  loss = jax.nn.softplus(logits) - logits * jnp.maximum(truth, 0)
  return (loss * known).sum() / jnp.maximum(known.sum(), 1.0)


def weighed_tasks(losses: Sequence[jax.Array], log_variances: jax.Array) -> jax.Array:
  """Sum of exp(-s) loss + s of tasks with learned s [tasks] (tobiascz/TeCNO, modules/cnn/feature_extraction.py).

  Kendall et al. 2018 have exp(-s) loss / 2 + s / 2 for regressions and exp(-s) loss + s / 2 for classifications.
  """
  return (jnp.exp(-log_variances) * jnp.stack(list(losses)) + log_variances).sum()


def future_tokens(labels: jax.Array, valid: jax.Array, tokens: int, stride: int, end: int,
                  ended: jax.Array | None = None) -> jax.Array:
  """Classes [B, T, tokens] of the frames `stride`, 2 * `stride`, ... after each frame; `end` after a video's end.

  As SWAG has them (datasets/base_video_dataset.py): tokens are frames at equal distances, not the most frequent phase.

  Args:
    labels, valid: [B, T], from the first frames on. ended: [B] whether the last of the valid frames is that of the
      video, None for all; where it is not, later frames are unknown.
  Returns:
    Unknown classes, and those of frames that do not exist, are -1.
  """
  length, ended = labels.shape[1], jnp.ones(len(labels), bool) if ended is None else ended
  place = jnp.arange(length)[:, None] + stride * jnp.arange(1, tokens + 1)  # [T, F]
  beyond = place >= valid.sum(axis=1)[:, None, None]
  found = jnp.where(beyond, jnp.where(ended, end, -1)[:, None, None], labels[:, place.clip(0, length - 1)])
  return jnp.where(valid[..., None], found, -1)


def remaining_time(labels: jax.Array, valid: jax.Array, classes: int, horizon: float, per_minute: float,
                   ended: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Minutes [B, T, classes + 1] until each phase is next seen, 0 while it goes on, and until the video ends.

  At most `horizon`, which also stands where a phase does not come (as in Rivoir et al. 2020). `per_minute` frames are
  a minute; the other arguments as of `future_tokens`.

  Returns:
    The minutes, and which are known, bool: all of valid frames, but what comes after a video that has not ended, nearer
    than the horizon.
  """
  length, ended = labels.shape[1], jnp.ones(len(labels), bool) if ended is None else ended
  at = jnp.arange(length, dtype=jnp.float32)
  count = valid.sum(axis=1)[:, None, None].astype(jnp.float32)
  seen = (labels[..., None] == jnp.arange(classes)) & valid[..., None]
  when = jax.lax.cummin(jnp.where(seen, at[:, None], jnp.inf), axis=1, reverse=True)  # [B, T, K]
  ends = jnp.where(ended[:, None, None], jnp.broadcast_to(count, (*labels.shape, 1)), jnp.inf)
  minutes = (jnp.concatenate([when, ends], axis=-1) - at[:, None]) / per_minute
  told = jnp.isfinite(minutes) | ended[:, None, None] | ((count - at[:, None]) / per_minute >= horizon)
  return jnp.clip(minutes, 0.0, horizon), told & valid[..., None]


def time_error(predicted: jax.Array, target: jax.Array, horizon: float, known: jax.Array) -> jax.Array:
  """Mean of exp(-target / horizon) |predicted - target| / horizon over what is `known` of [B, T, classes].

  maxboels/SWAG-surgical-workflow-anticipative-generation, R2A2/train/losses/remaining_time_loss.py, 'mae' with
  'exponential' weights.
  """
  weight = jnp.exp(-target / horizon) * known
  return (weight * jnp.abs(predicted - target) / horizon).sum() / jnp.maximum(known.sum(), 1)
