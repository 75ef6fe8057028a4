"""Methods for tests of what a run is made of: two towers, a teacher that is only read, two groups of parameters."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed import objectives
from jaxmed.objectives.base import Method
from jaxmed.objectives.networks import inputs


def features(model, params, batch):
  return model.apply({'params': params}, **inputs(batch)).mean


@dataclasses.dataclass(frozen=True)
class Toy(Method):
  """What the toys share: one view, the mean vector."""

  encoder: Any
  towers: FrozenDict = FrozenDict()

  LEARNING_RATE: ClassVar[tuple[float, float]] = (1e-3, 8)


class TwoTowers(Toy):
  """Two encoders of one image look for a common vector that tells the images of a batch apart."""

  TOWERS = ('image', 'second')

  def init(self, rng, batch):
    keys = jax.random.split(rng)
    models = {'encoder': self.encoder, 'second': self.towers['second']}
    params = {name: model.init(key, **inputs(batch))['params']
              for key, (name, model) in zip(keys, models.items(), strict=True)}
    return {'params': params, 'target': {}, 'extra': {}}

  def loss(self, variables, batch, rng, step, train=True):
    params = variables['params']
    a, b = features(self.encoder, params['encoder'], batch), features(self.towers['second'], params['second'], batch)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    logits = unit(a) @ unit(b).T / 0.1
    return -jnp.diag(jax.nn.log_softmax(logits)).mean(), ({}, {})


class Distilled(Toy):
  """The encoder follows the mean vector of a teacher that is only read."""

  TOWERS = ('image', 'teacher')

  def init(self, rng, batch):
    return {'params': {'encoder': self.encoder.init(rng, **inputs(batch))['params']}, 'target': {}, 'extra': {}}

  def loss(self, variables, batch, rng, step, train=True):
    taught = features(self.towers['teacher'], variables['fixed']['teacher'], batch)
    student = features(self.encoder, variables['params']['encoder'], batch)
    return jnp.square(student - taught).mean(), ({}, {})


class Players(Toy):
  """Two players with losses of their own over the same vector: one lowers what the other raises."""

  GROUPS = {'critic': ('critic',)}

  def init(self, rng, batch):
    params = {'encoder': self.encoder.init(rng, **inputs(batch))['params']}
    return {'params': params | {'critic': {'kernel': jnp.linspace(-0.3, 0.5, self.encoder.embed_dim)[:, None]}},
            'target': {}, 'extra': {}}

  def loss(self, variables, batch, rng, step, train=True):
    params = variables['params']
    score = jnp.square(features(self.encoder, params['encoder'], batch) @ params['critic']['kernel']).mean()
    return {'rest': score, 'critic': 0.5 * jnp.square(score - 1.0)}, ({}, {})


TOYS = {'toy_two_towers': TwoTowers, 'toy_distilled': Distilled, 'toy_players': Players}


def register(monkeypatch) -> None:
  for name, toy in TOYS.items():
    monkeypatch.setitem(objectives.METHODS, name, toy)
