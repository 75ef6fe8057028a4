"""Methods of an objective, compiled once for equal objectives and shapes: what is known stays out of the programs."""

import functools

import flax.linen as nn
import jax


@functools.partial(jax.jit, static_argnums=0)
def _init(objective, batch):
  return objective.init(jax.random.key(0), batch)


def init(objective, batch):
  """Unboxed variables."""
  return nn.unbox(_init(objective, batch))


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def loss(objective, variables, batch, key, train=True):
  """(loss, (metrics, extra)) at step 0."""
  return objective.loss(variables, batch, key, 0, train)


@functools.partial(jax.jit, static_argnums=0)
def both(objective, variables, given, batch, key):
  """(what `loss` gives, what `_predict` gives for its first argument `given`): what they share is computed once."""
  return objective.loss(variables, batch, key, 0), objective._predict(given, batch, key, True)


@functools.partial(jax.jit, static_argnums=0)
def by_pixels(objective, variables, batch, key):
  """(loss, its gradient to the image)."""
  return jax.value_and_grad(lambda image: objective.loss(variables, batch | {'image': image}, key, 0)[0])(batch['image'])


@functools.partial(jax.jit, static_argnums=0)
def hidden(objective, params, batch, key):
  """Which tokens a method of masks hides."""
  return objective._predict(params, batch, key, True)[1]
