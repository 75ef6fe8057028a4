"""Vectors of the frames of windows, of an encoder that is trained or of one that stays."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder
from jaxmed.errors import UserError
from jaxmed.objectives import networks

LOADER: dict[str, Any] = {'window': 256, 'window_group': 'subject', 'window_order': 'frame_seconds'}


def checked(method: str, encoder: Encoder, batch: Batch) -> None:
  """Raises a UserError where a batch is none of windows."""
  if batch['image'].ndim != len(encoder.image_size) + 3:
    raise UserError(f'method {method} takes windows of frames: set loader.window to the frames of a sample and '
                    'loader.window_group to the column that says which video they are of')


def one(batch: Batch) -> Any:
  """The encoder's inputs of the first frame of one sample: what it is initialised by."""
  known: Any = networks.inputs(batch)
  return {name: x[:1, 0] for name, x in known.items()}


def labels(batch: Batch) -> jax.Array:
  """The label of each frame [B, K], -1 where there is no frame or no label."""
  return jnp.where(batch['index'] >= 0, batch['label'], -1)


def encode(encoder: Encoder, params: Any, batch: Batch, feature: str, train: bool, rngs: Any, fixed: bool,
           at_once: int = 0) -> tuple[jax.Array, Any]:
  """(vectors [B, K, D] float32 of the frames of windows, new running statistics).

  Args:
    fixed: whether the encoder runs as in evaluation, without a gradient.
    at_once: frames of a window that a fixed encoder computes at once, so that whole videos fit in memory; 0 for all.
  """
  given: Any = networks.inputs(batch)
  known = {name: networks.last_again(x, batch['index'] >= 0) for name, x in given.items()}
  size, frames = batch['index'].shape

  def run(part):
    flat: Any = networks.flat(part)
    found, stats = networks.encode(encoder, params, flat, train, rngs, fixed)
    x = found.pooled(feature).astype(jnp.float32)
    return x.reshape(size, -1, x.shape[-1]), stats

  if not fixed or not at_once or at_once >= frames:
    return run(known)
  count = -(-frames // at_once)
  fill = lambda x: jnp.pad(x, ((0, 0), (0, count * at_once - frames), *((0, 0),) * (x.ndim - 2)), mode='edge')
  parts = {name: fill(x).reshape(size, count, at_once, *x.shape[2:]).swapaxes(0, 1) for name, x in known.items()}
  x = jax.lax.map(lambda part: run(part)[0], parts)  # [count, B, at_once, D]
  return x.swapaxes(0, 1).reshape(size, count * at_once, -1)[:, :frames], {}
