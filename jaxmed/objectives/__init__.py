"""Training objectives, one file each, and the registry of their names.

An objective is a frozen dataclass whose simple fields are its options:
  init(rng, batch) -> variables {'params', 'target', 'extra'}: trained by gradient; following by EMA; the rest.
  loss(variables, batch, rng, step, train) -> (loss, (metrics, extra)), over the global batch.
  encoder_params(variables): the weights of `encoder`, which is the product.
  DEFAULTS: what the method wants of the other config sections, used where the user says nothing.
  LEARNING_RATE: (peak rate, reference batch), scaled by the square root of the batch.
Optionally `pictures(variables, batch, rng)`, a dict of named image arrays for the report.
"""

import dataclasses
from typing import Any

from jaxmed.errors import choose
from jaxmed.objectives.mae import MAE
from jaxmed.objectives.supervised import Supervised

METHODS: dict[str, Any] = {'mae': MAE, 'supervised': Supervised}


def get(name: str) -> Any:
  """The objective's class by its name; a UserError names the nearest."""
  return METHODS[choose('method', name, METHODS)]


def default_options(name: str) -> dict[str, Any]:
  """The options of a method that a config may set, with their defaults."""
  return {f.name: f.default for f in dataclasses.fields(get(name)) if f.name != 'encoder'}
